import pytest
from transformers import AutoTokenizer

from lit_rlhf.data import Demonstrations
from lit_rlhf.errors import UserError

RECORDS = [{"prompt": "w1 w2", "response": " w3 w4 w5"}, {"prompt": "w6", "response": " w7"}]


@pytest.fixture
def make(make_data):
    def build(tokenizer, records=RECORDS, **options) -> Demonstrations:
        columns = {"prompt": "prompt", "response": "response"}
        return make_data(Demonstrations, "texts.jsonl", tokenizer, records, **(columns | options))

    return build


def texts(data, tokenizer):
    """Return, for each validation text, its tokens up to the end and the tokens that are trained on, as words."""
    (batch,) = data.val_dataloader()
    words = [tokenizer.convert_ids_to_tokens(row) for row in batch.tokens.tolist()]
    return words, [
        [w for w, counts in zip(row, mask, strict=True) if counts] for row, mask in zip(words, batch.mask, strict=True)
    ]


@pytest.mark.parametrize("special", ["distinct", "pad_is_eos", "bos_is_eos"])
def test_the_tokens_are_those_of_the_whole_text_and_an_end(make, tiny_model, special):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model("llama", special=special))
    (batch,) = make(tokenizer).val_dataloader()
    for row, record in zip(batch.tokens.tolist(), RECORDS, strict=True):
        whole = [*tokenizer(record["prompt"] + record["response"])["input_ids"], tokenizer.eos_token_id]
        assert row == whole + [tokenizer.pad_token_id] * (len(row) - len(whole))


@pytest.mark.parametrize("special", ["distinct", "pad_is_eos"])
@pytest.mark.parametrize(
    ("loss_on", "trained"),
    [
        ("response", [["w3", "w4", "w5", "<eos>"], ["w7", "<eos>"]]),
        ("all", [["w1", "w2", "w3", "w4", "w5", "<eos>"], ["w6", "w7", "<eos>"]]),
    ],
)
def test_which_tokens_are_trained(make, tiny_model, special, loss_on, trained):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model("llama", special=special))
    assert texts(make(tokenizer, loss_on=loss_on), tokenizer)[1] == trained


def test_a_text_split_inside_a_word_has_the_tokens_of_the_whole_text(make, tokenizer):
    _, trained = texts(make(tokenizer, [{"prompt": "w1 w", "response": "2 w3"}], batch_size=1), tokenizer)
    assert trained == [["w2", "w3", "<eos>"]]


def test_texts_without_a_prompt(make, tokenizer):
    data = make(tokenizer, [{"text": "w1 w2"}, {"text": "w3"}], prompt=None, response="text")
    words, trained = texts(data, tokenizer)
    assert words == [["<bos>", "w1", "w2", "<eos>"], ["<bos>", "w3", "<eos>", "<pad>"]]
    assert trained == [["w1", "w2", "<eos>"], ["w3", "<eos>"]]


def test_a_conversation_as_the_prompt(make, chat_tokenizer):
    record = {"prompt": [{"role": "user", "content": "w1"}], "response": "w2 w3"}
    words, trained = texts(make(chat_tokenizer, [record], batch_size=1), chat_tokenizer)
    assert words == [["<user>", "w1", "<eos>", "<assistant>", "w2", "w3", "<eos>"]]
    assert trained == [["w2", "w3", "<eos>"]]


@pytest.mark.parametrize(
    ("user_end", "answer_end"),
    [("", ""), ("<eos>", ""), ("", " w9"), ("", "<eos> w9")],
    ids=["neither", "user", "turn", "word"],
)
def test_a_conversation_ends_with_the_end_of_sequence_whatever_the_template_writes(
    make, chat_tokenizer, user_end, answer_end
):
    chat_tokenizer.chat_template = (
        "{% for message in messages %}{% if message.role == 'user' %}<user> {{ message.content }}"
        + user_end
        + "{% else %}<assistant> {{ message.content }}"
        + answer_end
        + "{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    record = {"prompt": [{"role": "user", "content": "w1"}], "response": "w2"}
    _, trained = texts(make(chat_tokenizer, [record], batch_size=1), chat_tokenizer)
    assert trained == [["w2", *(["w9"] if answer_end == " w9" else []), "<eos>"]]


def test_long_texts_are_truncated_at_the_end_and_counted(make, tokenizer, capsys):
    data = make(tokenizer, max_tokens=5)
    words, trained = texts(data, tokenizer)
    assert words == [["<bos>", "w1", "w2", "w3", "w4"], ["<bos>", "w6", "w7", "<eos>", "<pad>"]]
    assert trained == [["w3", "w4"], ["w7", "<eos>"]]
    assert data.cut == {"train": 1, "validation": 1}
    assert "2 train texts" in (out := capsys.readouterr().out)
    assert "1 cut (longer than 5 tokens)" in out


@pytest.mark.parametrize(
    ("records", "options", "words"),
    [
        (RECORDS, {"response": "answer"}, r"texts.jsonl has no column 'answer'; it has: prompt, response"),
        (RECORDS, {"prompt": "question"}, r"texts.jsonl has no column 'question'; it has: prompt, response"),
        ([{"prompt": "w1", "response": 7}], {}, "response.*text.*int"),
        ([{"prompt": 7, "response": "w1"}], {}, "text or a list.*'7'"),
        ([{"prompt": [{"role": "user", "content": "w1"}], "response": "w2"}], {}, "chat template"),
        (RECORDS, {"train": None}, "data.train is not set"),
    ],
)
def test_wrong_records_and_options(make, tokenizer, records, options, words):
    with pytest.raises(UserError, match=words):
        make(tokenizer, records, **options)


def test_numbers_out_of_range():
    with pytest.raises(ValueError, match=r"batch_size must be 1 or more.*0"):
        Demonstrations(batch_size=0)


def test_a_batch_that_is_larger_than_the_file(make, tokenizer):
    with pytest.raises(UserError, match=r"batch_size is 3, but data.train has only 2 records"):
        make(tokenizer, batch_size=3).train_dataloader()


def test_validation_is_optional(make, tokenizer):
    assert list(make(tokenizer, validation=None).val_dataloader()) == []
    with pytest.raises(UserError, match=r"data.validation is not set"):
        make(tokenizer, validation=None, stage="validate")


@pytest.mark.parametrize("loss_on", ["response", "all"])
def test_packing_keeps_each_text_and_its_trained_tokens(make, tokenizer, loss_on):
    records = [{"prompt": "w1", "response": " " + " ".join(f"w{i}" for i in range(n))} for n in (3, 9, 1, 5, 2, 7)]
    plain, packed = (
        make(tokenizer, records, loss_on=loss_on, batch_size=6, max_tokens=14, packing=packing)
        for packing in (False, True)
    )
    (one,), (other,) = plain.val_dataloader(), packed.val_dataloader()
    assert other.tokens.shape[0] < one.tokens.shape[0]
    assert other.tokens.shape[1] <= 14
    assert one.positions is None
    found = []
    for tokens, mask, positions in zip(other.tokens, other.mask, other.positions, strict=True):
        starts = [i for i, p in enumerate(positions.tolist()) if p == 0 and tokens[i] == tokenizer.bos_token_id]
        for start, end in zip(starts, [*starts[1:], len(tokens)], strict=True):
            length = int(positions[start:end].max()) + 1
            assert positions[start : start + length].tolist() == list(range(length))
            found.append((tokens[start : start + length].tolist(), mask[start : start + length].tolist()))
            assert not mask[start + length : end].any()
    real = (one.tokens != tokenizer.pad_token_id).sum(1).tolist()
    expected = [(t[:n].tolist(), m[:n].tolist()) for t, m, n in zip(one.tokens, one.mask, real, strict=True)]
    assert sorted(found) == sorted(expected)
