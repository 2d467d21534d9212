import json

import pandas
import pytest

from lit_rlhf.data.records import read_records, value_of
from lit_rlhf.errors import UserError

ROWS = [{"prompt": "w1 w2", "number": 1}, {"prompt": "w3, \"w4\"\nw5", "number": 2}]  # fmt: skip
FUNCTIONS = """\
def rows(): return iter([{"prompt": "w1"}, {"prompt": "w2"}])
def none(): return []
def fails(): return open("/nowhere/data.txt")
"""


def refusal(source) -> str:
    with pytest.raises(UserError) as error:
        read_records(source, "data.train")
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("name", ["data.jsonl", "data.json", "data.csv", "data.parquet"])
def test_file_formats(tmp_path, name):
    path, frame = tmp_path / name, pandas.DataFrame(ROWS)
    if path.suffix == ".csv":
        frame.to_csv(path, index=False)
    elif path.suffix == ".parquet":
        frame.to_parquet(path)
    else:
        frame.to_json(path, orient="records", lines=path.suffix == ".jsonl")
    assert list(read_records(str(path), "data.train")) == ROWS


def test_a_changed_file_is_read_again(tmp_path):
    for prompt in ("w1", "w2"):
        (tmp_path / "data.csv").write_text(f"prompt\n{prompt}\n")
        assert list(read_records(str(tmp_path / "data.csv"), "data.train")) == [{"prompt": prompt}]


def test_blank_lines_are_skipped_but_counted(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text('{"prompt": "w1"}\n\n   \n{"prompt": "ü"}\n')
    assert list(read_records(str(path), "data.train")) == [{"prompt": "w1"}, {"prompt": "ü"}]
    path.write_text('{"prompt": "w1"}\n\nw2\n')
    assert f"{path}, line 3" in refusal(str(path))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"prompt": "w1"}\n{"prompt": w2}\n', ["line 2", "not JSON"]),
        ('{"prompt": "w1"}\n[1, 2]\n', ["line 2", "object", "list"]),
        ('"w1"\n', ["line 1", "object", "str"]),
        ("", ["is empty"]),
        ("\n\n", ["no records"]),
        ('{"prompt": "caf\udce9"}\n', ["UTF-8"]),
    ],
)
def test_errors_in_jsonl_name_file_and_line(tmp_path, text, words):
    path = tmp_path / "data.jsonl"
    path.write_bytes(text.encode(errors="surrogateescape"))
    message = refusal(str(path))
    assert all(word in message for word in ["data.train", str(path), *words]), message


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("data.csv", b"", ["is empty"]),
        ("data.csv", b"prompt,number\n", ["no records"]),
        ("data.parquet", b"no parquet at all", ["cannot be read as parquet"]),
        ("data.txt", b"w1\n", [".jsonl", ".csv", ".parquet"]),
    ],
)
def test_errors_in_other_formats(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    message = refusal(str(tmp_path / name))
    assert all(word in message for word in ["data.train", name, *words]), message


def test_a_missing_file(tmp_path):
    assert f"there is no file {tmp_path}/data.jsonl" in refusal(f"{tmp_path}/data.jsonl")


def test_functions(tmp_path):
    path = tmp_path / "source.py"
    path.write_text(FUNCTIONS)
    assert list(read_records(f"{path}:rows", "data.train")) == [{"prompt": "w1"}, {"prompt": "w2"}]
    assert len(read_records("lit_rlhf.data.reviews:fresh_prompts", "data.train")) == 200
    assert "no records" in refusal(f"{path}:none")
    assert "it has: rows, none, fails" in refusal(f"{path}:row")
    assert "FileNotFoundError" in refusal(f"{path}:fails")


def test_a_dataset_that_cannot_be_loaded_from_the_hub(monkeypatch):
    for name in ("huggingface_hub.constants.HF_HUB_OFFLINE", "datasets.config.HF_HUB_OFFLINE"):
        monkeypatch.setattr(name, True)
    message = refusal({"path": "nobody/nothing"})
    assert "'nobody/nothing' is neither a file nor a data set of the hub" in message


def test_columns():
    assert value_of({"a": 1, "b": "x"}, "b", "data.train") == "x"
    with pytest.raises(UserError, match=r"^record 1 of data.csv has no column 'c'; it has: a, b$"):
        value_of({"a": 1, "b": "x"}, "c", "record 1 of data.csv")
    with pytest.raises(UserError, match=r"^record 2 of data.csv has no column 'a'; it has: b$"):
        value_of({"a": None, "b": "y"}, "a", "record 2 of data.csv")


def test_conversations_are_returned_unchanged(tmp_path):
    turns = [{"role": "user", "content": "w1"}]
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps({"prompt": turns}))
    assert list(read_records(str(path), "data.train")) == [{"prompt": turns}]
