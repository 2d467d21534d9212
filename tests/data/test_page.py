"""What docs/data.md shows is true: every record is recognised without options, and the messages are the code's."""

import json
import re
from pathlib import Path

import pytest

from lit_rlhf.data import Demonstrations, Preferences, Prompts
from lit_rlhf.data.records import read_records
from lit_rlhf.errors import UserError

PAGE = (Path(__file__).parent.parent.parent / "docs" / "data.md").read_text(encoding="utf-8")
RECORDS = re.findall(r"```json\n(.*?)```", PAGE, flags=re.DOTALL)
LAYOUTS = [
    pytest.param(kind, json.loads(line), id=f"{kind.__name__}: {' '.join(json.loads(line))}")
    for kind, text in zip((Demonstrations, Preferences, Prompts), RECORDS, strict=True)
    for line in text.splitlines()
]
USER = {"role": "user", "content": "w1"}
MISTAKES = [
    (Prompts, [{"review": "w1"}], {}),
    (Prompts, [{"question": "w1", "messages": [USER]}], {}),
    (Prompts, [{"prompt": [USER]}], {}),
    (Preferences, [{"prompt": "w1", "chosen": " w2", "rejected": " w2"}], {}),
    (Prompts, [{"prompt": "w1 w2"}] * 3, {"max_tokens": 1}),
    (Prompts, [{"prompt": "w1"}] * 3, {"batch_size": 64}),
]


@pytest.mark.parametrize(("kind", "record"), LAYOUTS)
def test_every_layout_of_the_page_is_recognised(make_data, chat_tokenizer, kind, record):
    data = make_data(kind, "data.jsonl", chat_tokenizer, [record], batch_size=1, max_tokens=100)
    (batch,) = data.val_dataloader()
    assert (batch.tokens != chat_tokenizer.pad_token_id).sum() > 1
    if kind is Prompts and ("answer" in record or "reward_model" in record):
        assert batch.columns["answer"] == ["42"]


@pytest.mark.parametrize(("kind", "records", "options"), MISTAKES)
def test_the_messages_of_the_page(make_data, tokenizer, kind, records, options):
    with pytest.raises(UserError) as error:
        make_data(kind, "data.jsonl", tokenizer, records, **options).train_dataloader()
    rows = re.findall(r"^\| `(.*?)` \|", PAGE, flags=re.MULTILINE)
    said = re.sub(r"\S*/data\.jsonl", "data.jsonl", str(error.value))
    assert [row for row in rows if row in said], said


def test_the_messages_about_sources(tmp_path, make_data, tokenizer):
    (tmp_path / "data.jsonl").write_text('{"prompt": "w1"}\nw2\n')
    with pytest.raises(UserError, match=r"data\.jsonl, line 2 is not JSON"):
        read_records(str(tmp_path / "data.jsonl"), "data.train")
    with pytest.raises(UserError, match=r"data\.train is not set"):
        make_data(Prompts, "data.jsonl", tokenizer, [], train=None, validation=None)
    for message in ("data.jsonl, line 2 is not JSON", "data.train is not set"):
        assert f"| `{message}` |" in PAGE


def test_the_other_messages_are_in_the_code():
    sources = "".join(path.read_text() for path in Path(read_records.__code__.co_filename).parent.glob("*.py"))
    rows = ("the chat template refuses the conversation", "is neither a file nor a data set of the hub")
    for message in (*rows, "the cache of tokens cannot be written or read"):
        assert f"| `{message}` |" in PAGE
        assert message in sources


def test_the_line_about_what_is_dropped(make_data, tokenizer, capsys):
    make_data(Prompts, "prompts.jsonl", tokenizer, [{"prompt": "w1 " * n} for n in (1, 2, 9)], max_tokens=8)
    (shown,) = re.findall(r"```text\n(.*?)\n```", PAGE, flags=re.DOTALL)
    assert shown in re.sub(r"from \S*/", "from ", capsys.readouterr().out).splitlines()


def test_a_folder_of_files_is_a_source(tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_text(f'{{"prompt": "{name}"}}\n')
    records = read_records({"path": str(tmp_path)}, "data.train")
    assert sorted(record["prompt"] for record in records) == ["a", "b"]
