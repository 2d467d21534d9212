import pytest
import torch
from transformers import AutoTokenizer

from lit_rlhf.data import Prompts
from lit_rlhf.errors import UserError

RECORDS = [{"prompt": " ".join(f"w{i}" for i in range(n)), "answer": f"w{n}", "number": n} for n in (2, 5, 3, 1)]


@pytest.fixture
def make(make_data):
    def build(tokenizer, records=RECORDS, **options) -> Prompts:
        return make_data(Prompts, "prompts.jsonl", tokenizer, records, **options)

    return build


def held_out(data):
    """Return the tokens of each validation prompt as a list, without padding."""
    (batch,) = data.val_dataloader()
    return [tokens[mask].tolist() for tokens, mask in zip(batch.tokens, batch.mask, strict=True)], batch


def test_texts_become_their_tokens(make, tokenizer):
    rows, batch = held_out(make(tokenizer))
    assert rows == [tokenizer(record["prompt"])["input_ids"] for record in RECORDS]
    assert all(row[0] == tokenizer.bos_token_id and tokenizer.eos_token_id not in row for row in rows)
    assert list(batch.prompts) == [record["prompt"] for record in RECORDS]


@pytest.mark.parametrize("special", ["distinct", "pad_is_eos"])
def test_padding_is_on_the_left_and_masked(make, tiny_model, special):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model("llama", special=special))
    _, batch = held_out(make(tokenizer))
    lengths = [len(tokenizer(record["prompt"])["input_ids"]) for record in RECORDS]
    width = max(lengths)
    assert batch.mask.dtype == torch.bool
    assert batch.mask.tolist() == [[place >= width - length for place in range(width)] for length in lengths]
    assert (batch.tokens[~batch.mask] == tokenizer.pad_token_id).all()


def test_the_other_columns_are_kept(make, tokenizer):
    records = [*RECORDS, {"prompt": "w9", "extra": [1, 2]}]
    _, batch = held_out(make(tokenizer, records))
    assert batch.columns["answer"] == ["w2", "w5", "w3", "w1", None]
    assert batch.columns["number"] == [2, 5, 3, 1, None]
    assert batch.columns["extra"] == [None, None, None, None, [1, 2]]
    for batch in make(tokenizer).train_dataloader():
        assert [f"w{len(prompt.split())}" for prompt in batch.prompts] == batch.columns["answer"]


def test_conversations_go_through_the_chat_template(make, chat_tokenizer):
    turns = [
        {"role": "user", "content": "w1"},
        {"role": "assistant", "content": "w2"},
        {"role": "user", "content": "w3"},
    ]
    rows, batch = held_out(make(chat_tokenizer, [{"prompt": turns}]))
    expected = ["<user>", "w1", "<eos>", "<assistant>", "w2", "<eos>", "<user>", "w3", "<eos>", "<assistant>"]
    assert chat_tokenizer.convert_ids_to_tokens(rows[0]) == expected
    assert batch.prompts[0] == turns


def test_chat_turns_a_text_into_a_user_turn(make, chat_tokenizer):
    rows, batch = held_out(make(chat_tokenizer, [{"prompt": "w1 w2"}], chat=True))
    assert chat_tokenizer.convert_ids_to_tokens(rows[0]) == ["<user>", "w1", "w2", "<eos>", "<assistant>"]
    assert batch.prompts[0] == [{"role": "user", "content": "w1 w2"}]


@pytest.mark.parametrize(
    ("records", "options", "words"),
    [
        ([{"prompt": [{"role": "user", "content": "w1"}]}], {}, "chat template"),
        (RECORDS, {"chat": True}, "chat template"),
        ([{"prompt": 7}], {}, "text or a list.*'7'"),
        ([{"prompt": [{"text": "w1"}]}], {}, "text or a list"),
        ([{"prompt": []}], {}, "text or a list"),
        (RECORDS, {"column": "question"}, r"prompts.jsonl has no column 'question'; it has: answer, number, prompt"),
        ([*RECORDS, {"text": "w1"}], {}, r"record 5 of .*prompts.jsonl has no column 'prompt'; it has: text"),
        (RECORDS, {"template": "{question}?"}, "template.*'question'.*answer, number, prompt"),
        (
            [*RECORDS, {"prompt": "w1", "number": None}],
            {"template": "{prompt} {number}"},
            r"record 5 of .*prompts.jsonl: data.template names the column 'number'; the record has: prompt$",
        ),
        (RECORDS, {"template": "{prompt}{"}, "template"),
        (RECORDS, {"template": "{}"}, "template"),
        (RECORDS, {"template": "{prompt.text}"}, "template"),
        (RECORDS, {"max_tokens": 1}, "data.train: all 4 prompts of .*prompts.jsonl are longer than .*max_tokens=1"),
        (RECORDS, {"train": None}, "data.train is not set"),
    ],
)
def test_wrong_records_and_options(make, tokenizer, records, options, words):
    with pytest.raises(UserError, match=words) as error:
        make(tokenizer, records, **options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["batch_size", "validation_batch_size", "first_tokens"])
def test_numbers_out_of_range(name):
    with pytest.raises(ValueError, match=rf"{name} must be 1 or more.*0"):
        Prompts(**{name: 0})


def test_a_batch_that_is_larger_than_the_file(make, tokenizer):
    with pytest.raises(UserError, match=r"batch_size is 5, but data.train has only 4 records"):
        make(tokenizer, batch_size=5).train_dataloader()


@pytest.mark.parametrize(("stage", "source"), [("validate", "validation"), ("test", "test"), ("predict", "predict")])
def test_a_stage_without_prompts(make, tokenizer, stage, source):
    with pytest.raises(UserError, match=f"data.{source} is not set"):
        make(tokenizer, stage=stage, validation=None)


def test_template(make, tokenizer):
    rows, batch = held_out(make(tokenizer, template="w7 {prompt} w8 {number}"))
    assert list(batch.prompts) == [f"w7 {record['prompt']} w8 {record['number']}" for record in RECORDS]
    assert rows[0] == tokenizer("w7 w0 w1 w8 2")["input_ids"]


def test_first_tokens(make, tokenizer):
    rows, batch = held_out(make(tokenizer, first_tokens=3))
    whole = [tokenizer(record["prompt"])["input_ids"] for record in RECORDS]
    assert rows == [row[:3] for row in whole]
    assert list(batch.prompts) == ["w0 w1", "w0 w1", "w0 w1", "w0"]


def test_long_prompts_are_dropped_and_counted(make, tokenizer, capsys):
    data = make(tokenizer, max_tokens=4)
    _, batch = held_out(data)
    assert batch.columns["number"] == [2, 3, 1]
    assert data.dropped == {"train": 1, "validation": 1}
    assert data.cut == {"train": 0, "validation": 0}
    out = capsys.readouterr().out
    assert "3 train prompts" in out
    assert "1 dropped (longer than 4 tokens)" in out


@pytest.mark.parametrize(("too_long", "text"), [("cut_left", "w3 w4"), ("cut_right", "w0 w1")])
def test_long_prompts_are_truncated_and_counted(make, tokenizer, capsys, too_long, text):
    data = make(tokenizer, max_tokens=3, too_long=too_long)
    rows, batch = held_out(data)
    assert [len(row) for row in rows] == [3, 3, 3, 2]
    assert tokenizer.decode(rows[1], skip_special_tokens=True) == batch.prompts[1]
    assert batch.prompts[1].endswith(text) if too_long == "cut_left" else batch.prompts[1] == text
    assert data.cut == {"train": 2, "validation": 2}
    assert data.dropped == {"train": 0, "validation": 0}
    assert "2 cut (longer than 3 tokens)" in capsys.readouterr().out


def test_only_the_first_process_prints(make, tokenizer, capsys):
    make(tokenizer, rank=1, world_size=2)
    assert capsys.readouterr().out == ""


def test_group_is_the_index_in_the_global_batch(make, tokenizer):
    whole = [batch.columns["number"] for batch in make(tokenizer, batch_size=4).train_dataloader()]
    for world_size in (1, 2, 4):
        for rank in range(world_size):
            data = make(tokenizer, batch_size=4, rank=rank, world_size=world_size)
            for batch, numbers in zip(data.train_dataloader(), whole, strict=True):
                assert batch.columns["number"] == [numbers[place] for place in batch.group]
                assert batch.group.tolist() == list(range(rank * 4 // world_size, (rank + 1) * 4 // world_size))


@pytest.mark.parametrize("world_size", [2, 4])
def test_a_last_batch_smaller_than_the_number_of_processes(make, tokenizer, world_size):
    """The batch is refused or gives every process a share; no process crashes on an empty share."""
    reported = "validation_batch_size"
    try:
        for rank in range(world_size):
            data = make(tokenizer, RECORDS[:3], validation_batch_size=2, rank=rank, world_size=world_size)
            assert all(len(batch.tokens) for batch in data.val_dataloader())
    except UserError as error:
        reported = str(error)
    assert "validation_batch_size" in reported


def test_training_is_shuffled_and_validation_is_not(make, tokenizer):
    records = [{"prompt": "w1", "number": i} for i in range(32)]
    data = make(tokenizer, records, batch_size=32)
    (train,), (validation,) = data.train_dataloader(), data.val_dataloader()
    assert validation.columns["number"] == list(range(32))
    assert train.columns["number"] != list(range(32))
    assert sorted(train.columns["number"]) == list(range(32))


def test_without_validation_prompts_there_is_nothing_to_validate(make, tokenizer):
    assert list(make(tokenizer, validation=None).val_dataloader()) == []


def test_to_moves_every_tensor(make, tokenizer):
    _, batch = held_out(make(tokenizer))
    moved = batch.to(torch.device("meta"))
    assert {moved.tokens.device.type, moved.mask.device.type, moved.group.device.type} == {"meta"}
    assert moved.prompts == batch.prompts
