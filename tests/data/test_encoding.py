"""When records are tokenized, and that the result equals tokenizing one record at a time."""

import datetime
import json
import os
import sys
from pathlib import Path

import pytest
from tokenizers import processors
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from lit_rlhf.data import Demonstrations, Preferences, Prompts, encoding, records
from lit_rlhf.data.prompts import PromptEncoder
from lit_rlhf.data.records import read_records
from lit_rlhf.data.tokenize import token_rows, turns
from lit_rlhf.errors import UserError
from lit_rlhf.testing import make_tiny_model

PROMPTS = [{"prompt": " ".join(f"w{i}" for i in range(n)), "number": n} for n in (2, 5, 3, 1)]
PAIRS = [{"prompt": "w1", "chosen": " w2 w3", "rejected": f" w{i}"} for i in range(4, 8)]
TEXTS = [{"text": f"w{i} w{i + 1}"} for i in range(6)]
TURNS = [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}]


@pytest.fixture
def tokenized(monkeypatch):
    """Return a list that collects the number of texts of each tokenizer call."""
    counts: list[int] = []
    real = PreTrainedTokenizerBase.__call__

    def counting(self, text, **options):
        counts.append(1 if isinstance(text, str) else len(text))
        return real(self, text, **options)

    for kind in (PreTrainedTokenizerBase, *PreTrainedTokenizerBase.__subclasses__()):
        if "__call__" in vars(kind):
            monkeypatch.setattr(kind, "__call__", counting)
    return counts


def batches(data):
    (batch,) = data.val_dataloader()
    return batch.tokens.tolist()


@pytest.fixture
def make(make_data, tiny_model):
    """Return a function that makes a data module with a freshly loaded tokenizer."""

    def build(kind=Prompts, rows=PROMPTS, model=None, file="data.jsonl", **options):
        tokenizer = AutoTokenizer.from_pretrained(model or tiny_model("llama"))
        return make_data(kind, file, tokenizer, rows, **({"train": None, "stage": "validate"} | options))

    return build


@pytest.mark.parametrize(("kind", "rows"), [(Prompts, PROMPTS), (Preferences, PAIRS), (Demonstrations, TEXTS)])
def test_a_second_setup_tokenizes_nothing(make, tokenized, kind, rows):
    options = {"batch_size": 8}
    first = make(kind, rows, **options)
    assert sum(tokenized) >= len(rows)
    tokenized.clear()
    second = make(kind, rows, **options)
    assert tokenized == []
    assert batches(second) == batches(first)


def test_the_cache_ignores_file_names_file_times_and_padding(make, tokenized, tmp_path, monkeypatch):
    make(file="data.jsonl")
    os.utime(tmp_path / "data.jsonl", (0, 0))
    tokenized.clear()
    make(file="moved.jsonl", batch_size=3, validation_batch_size=7)
    assert tokenized == []
    load = AutoTokenizer.from_pretrained

    def used(name):  # a tokenizer keeps the settings of its last call
        tokenizer = load(name)
        tokenizer(["w1", "w1 w2"], padding=True, truncation=True, max_length=5)
        tokenized.clear()
        return tokenizer

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", used)
    make()
    assert tokenized == []


@pytest.mark.parametrize(
    "options",
    [
        {"rows": [PROMPTS[0] | {"number": 3}, *PROMPTS[1:]]},
        {"max_tokens": 4},
        {"max_tokens": 4, "too_long": "cut_left"},
        {"first_tokens": 2},
        {"template": "w7 {prompt}"},
    ],
)
def test_another_file_or_option_is_tokenized_again(make, tokenized, options):
    make()
    tokenized.clear()
    make(**options)
    assert sum(tokenized) == len(PROMPTS)


@pytest.mark.parametrize("file", ["data.jsonl", "data.csv", "data.json"])
def test_a_file_of_the_same_time_with_other_content_is_read_again(tmp_path, cache, file):
    first, second = [{"prompt": "w1"}, {"prompt": "w2"}], [{"prompt": "w3"}, {"prompt": "w4"}]
    for rows in (first, second):
        lines = ["prompt", *(row["prompt"] for row in rows)] if file.endswith("csv") else map(json.dumps, rows)
        (tmp_path / file).write_text("\n".join(lines) + "\n")
        os.utime(tmp_path / file, (10**9, 10**9))
        assert list(read_records(str(tmp_path / file), "data.train")) == rows


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path, cache, monkeypatch):
    path, check = tmp_path / "data.jsonl", records._check_line
    path.write_text('{"prompt": "w1"}\n')

    def write_meanwhile(line, where):
        check(line, where)
        with path.open("a") as file:
            file.write('{"prompt": "w2"}\n' if path.stat().st_size < 40 else "")

    monkeypatch.setattr(records, "_check_line", write_meanwhile)
    with pytest.raises(UserError, match=r"data\.jsonl changed while it was read"):
        read_records(str(path), "data.train")
    monkeypatch.undo()
    path.write_text('{"prompt": "w1"}\n')
    assert list(read_records(str(path), "data.train")) == [{"prompt": "w1"}]


def test_a_template_that_uses_the_date_is_tokenized_again_on_another_day(tiny_model, monkeypatch):
    def fingerprint(day, template):
        tokenizer = AutoTokenizer.from_pretrained(tiny_model("llama", chat=True))
        tokenizer.chat_template = template
        monkeypatch.setattr(encoding, "date", type("Date", (), {"today": lambda: datetime.date.fromisoformat(day)}))
        return encoding._fingerprint(["key"], PromptEncoder(), tokenizer)

    days = ("2026-01-01", "2026-01-02")
    assert len({fingerprint(day, "{{ strftime_now('%d') }} {{ messages[0].content }}") for day in days}) == 2
    assert len({fingerprint(day, "{{ messages[0].content }}") for day in days}) == 1


def test_a_byte_order_mark_is_skipped(tmp_path, cache):
    (tmp_path / "data.jsonl").write_bytes(b"\xef\xbb\xbf" + b'{"prompt": "w1"}\n')
    assert list(read_records(str(tmp_path / "data.jsonl"), "data.train")) == [{"prompt": "w1"}]


@pytest.mark.parametrize("change", [{"special": "bos_is_eos"}, {"chat": True}])
def test_another_tokenizer_tokenizes_again(make, tokenized, tmp_path, change):
    make()
    tokenized.clear()
    make(model=make_tiny_model(tmp_path / "other", **change))
    assert sum(tokenized) == len(PROMPTS)


def test_records_keep_their_own_columns_and_types(make):
    values = [1, 2.0, "three", None, True, [1, "a", None], {"a": 1}, {"b": {"c": []}}, 10**30, "\u2028\x85\r\n"]
    rows = [{"prompt": f"w{i}", "value": value} for i, value in enumerate(values)]
    rows += [{"prompt": "w30"}, {"prompt": "w31", "other": 1}]
    (batch,) = make(rows=rows).val_dataloader()
    assert batch.columns == {
        "prompt": [row["prompt"] for row in rows],
        "value": [*values, None, None],
        "other": [None] * 11 + [1],
    }
    assert [type(value) for value in batch.columns["value"][:10]] == [type(value) for value in values]


def test_only_a_line_feed_ends_a_line(tmp_path, tokenizer):
    path, text = tmp_path / "data.jsonl", "w1 \u2028 \x85 \u2029 w2"
    lines = [json.dumps({"prompt": text}, ensure_ascii=False), '{"prompt":\r"w3"}\r', json.dumps({"prompt": "w4"})]
    path.write_bytes("\n".join(lines).encode())
    assert [record["prompt"] for record in read_records(str(path), "data.train")] == [text, "w3", "w4"]
    path.write_bytes("\n".join([*lines[:2], "w4"]).encode())
    with pytest.raises(UserError, match=r"data\.jsonl, line 3 is not JSON"):
        read_records(str(path), "data.train")


def test_the_first_of_two_bad_lines_of_a_long_file_is_named(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text("".join('{"prompt": 1}\n' if i not in (1500, 2200) else "[]\n" for i in range(1, 3001)))
    for _ in range(2):
        with pytest.raises(UserError, match=r"^data\.train: \S*data\.jsonl, line 1500 should be a JSON object"):
            read_records(str(path), "data.train")


@pytest.mark.parametrize("bad", [(7,), (1200, 2700), (2700,)])
def test_several_processes_also_name_the_first_bad_record(make, monkeypatch, bad):
    monkeypatch.setattr(encoding, "_processes", lambda records: 2)
    environment = os.environ
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    rows = [{"prompt": f"w{i % 30}"} if i not in bad else {"text": "w1"} for i in range(1, 3001)]
    with pytest.raises(UserError, match=rf"^data\.validation: record {bad[0]} of \S*jsonl has no column 'prompt'; "):
        make(rows=rows)
    assert os.environ is environment
    assert os.environ["TOKENIZERS_PARALLELISM"] == "false"


def test_several_processes_give_the_same_rows_as_one(make, monkeypatch):
    rows = [{"prompt": f"w{i % 30} w{i % 7}", "number": i} for i in range(3000)]
    monkeypatch.setattr(encoding, "_processes", lambda records: 2)
    several = list(make(rows=rows).val_dataloader())
    monkeypatch.setattr(encoding, "_processes", lambda records: None)
    one = list(make(rows=rows, max_tokens=511).val_dataloader())  # another option, hence not from the cache
    assert [batch.tokens.tolist() for batch in several] == [batch.tokens.tolist() for batch in one]
    assert [number for batch in several for number in batch.columns["number"]] == list(range(3000))


def test_the_records_of_a_function_are_not_converted(make, tmp_path, cache):
    source = tmp_path / "source.py"
    source.write_text("def rows(): return [{'prompt': 'w1', 'check': len}, {'prompt': 'w2', 'check': {1, 2}}]")
    (batch,) = make(validation=f"{source}:rows").val_dataloader()
    assert batch.columns["check"] == [len, {1, 2}]
    assert list(batch.prompts) == ["w1", "w2"]


def test_a_cache_that_is_not_writable(make, cache):
    cache.write_text("a file where the folder should be")
    with pytest.raises(UserError, match=r"^data\.validation: the cache .*HF_DATASETS_CACHE.*cache$") as error:
        make()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("rank", "large", "shown"), [(0, False, False), (0, True, True), (1, True, False)])
def test_the_first_process_shows_a_progress_bar_for_large_files(make, monkeypatch, capsys, rank, large, shown):
    if large:
        monkeypatch.setattr(encoding, "SHOWN_SPLIT", 1)
        monkeypatch.setattr(records, "LARGE_FILE", 1)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    make(rank=rank, world_size=2)
    assert ("tokenizing" in capsys.readouterr().err) is shown


def one_by_one(tokenizer, text):
    """Return the tokens of the text with the tokenizer's opening tokens but without an end that the tokenizer added."""
    ids, plain = tokenizer(text)["input_ids"], tokenizer(text, add_special_tokens=False)["input_ids"]
    added = ids[-1:] == [tokenizer.eos_token_id] and len(ids) > len(plain) and plain and ids[-len(plain) :] != plain
    return (ids[:-1] if added else ids) or [tokenizer.bos_token_id or tokenizer.eos_token_id]


@pytest.mark.parametrize("form", ["$A", "<bos> $A", "$A <eos>", "<bos> $A <eos>", "<eos> $A"])
@pytest.mark.parametrize("has_bos", [True, False])
def test_tokenizing_in_batches_equals_tokenizing_each_text_alone(chat_tokenizer, form, has_bos):
    names = {name: chat_tokenizer.convert_tokens_to_ids(name) for name in ("<bos>", "<eos>")}
    chat_tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=form, special_tokens=list(names.items())
    )
    if not has_bos:
        chat_tokenizer.bos_token = None
    texts = ["w1 w2 w3", "", "w4", "w5 <eos>", "<eos>", "w6 unknown", "w1 w2 w3"]
    talks = [turns(chat_tokenizer, TURNS[:n], "data", opened=opened) for n in (1, 2) for opened in (True, False)]
    pieces = [texts[0], talks[0], *texts[1:3], *talks[1:], *texts[3:]]
    expected = [
        one_by_one(chat_tokenizer, piece)
        if isinstance(piece, str)
        else chat_tokenizer.apply_chat_template(
            piece.conversation, add_generation_prompt=piece.opened, return_dict=False
        )
        for piece in pieces
    ]
    assert token_rows(chat_tokenizer, pieces) == expected


def test_a_record_that_the_chat_template_refuses_is_named(make, tmp_path):
    folder: Path = make_tiny_model(tmp_path / "strict", chat=True)
    template = folder / "chat_template.jinja"
    strict = "{% if messages[0].role != 'user' %}{{ raise_exception('begin with the user') }}{% endif %}"
    template.write_text(strict + template.read_text())
    rows = [{"prompt": TURNS[:1]}, {"prompt": TURNS[::-1]}]
    with pytest.raises(UserError, match=r"record 2 of \S*: the chat template refuses .*: begin with the user$"):
        make(rows=rows, model=folder)
