"""Columns as data sets for TRL, OpenRLHF and verl have them are recognised, and options win."""

import json

import pytest
import torch

from lit_rlhf.data import Demonstrations, Preferences, Prompts
from lit_rlhf.errors import UserError
from lit_rlhf.rewards import ExactAnswer, NumericAnswer, make_reward_inputs

SYSTEM = {"role": "system", "content": "w0"}
USER = {"role": "user", "content": "w1 w2"}
VERL = {
    "data_source": "my/sums",
    "prompt": [USER],
    "ability": "math",
    "reward_model": {"style": "rule", "ground_truth": "72"},
    "extra_info": {"index": 3, "question": "w5"},
}


def says(content):
    return {"role": "assistant", "content": content}


@pytest.fixture
def make(make_data, chat_tokenizer):
    def build(kind, records, **options):
        return make_data(kind, "data.jsonl", chat_tokenizer, records, **({"batch_size": 1} | options))

    return build


def lines(capsys):
    """Return the lines that tell what was recognised."""
    out = capsys.readouterr().out.splitlines()
    return [line.removeprefix("data: ") for line in out if line.startswith("data: ") and " from `" in line]


PROMPTS = {
    "text": ({"prompt": "w1"}, "w1", []),
    "conversation": ({"prompt": [SYSTEM, USER]}, [SYSTEM, USER], []),
    "messages": ({"messages": [USER, says("w3"), USER, says("w4")]}, [USER, says("w3"), USER], ["`messages`"]),
    "openrlhf": ({"context_messages": [USER], "context": "w9", "id": 4}, [USER], ["`context_messages`"]),
    "openrlhf default": ({"input": "w1 w2"}, "w1 w2", ["`input`"]),
    "alpaca": ({"instruction": "w1", "input": "w2", "output": "w3"}, "w1\n\nw2", ["`instruction` and `input`"]),
    "alpaca without input": ({"instruction": "w1", "input": ""}, "w1", ["`instruction` and `input`"]),
    "question": ({"question": "w1", "answer": "w2"}, "w1", ["`question`, answers from `answer`"]),
    "verl": (VERL, [USER], ["`prompt`, answers from `reward_model.ground_truth`"]),
    "whole preferences": ({"chosen": [USER, says("w3")], "rejected": [USER, says("w4")]}, [USER], ["`chosen`"]),
    "prompt beside messages": ({"prompt": "w1", "prompt_id": "x", "messages": [USER, says("w3")]}, "w1", []),
}


@pytest.mark.parametrize("name", PROMPTS)
def test_prompts(make, capsys, name):
    record, prompt, told = PROMPTS[name]
    (batch,) = make(Prompts, [record]).val_dataloader()
    assert batch.prompts == [prompt]
    assert lines(capsys) == [f"prompts from {names}" for names in told]  # once, though there are two splits
    assert batch.columns.keys() >= record.keys()


def test_ground_truth_reaches_the_rewards(make):
    (batch,) = make(Prompts, [VERL]).val_dataloader()
    assert batch.columns["answer"] == ["72"]
    assert batch.columns["reward_model"] == [VERL["reward_model"]]
    inputs = make_reward_inputs(["#### 72"], batch.prompts, **batch.columns)
    assert NumericAnswer()(inputs).tolist() == [1.0]
    assert NumericAnswer(column="reward_model.ground_truth")(inputs).tolist() == [1.0]
    assert ExactAnswer(column="extra_info.index")(make_reward_inputs(["3"], **batch.columns)).tolist() == [1.0]
    with pytest.raises(UserError, match=r"no column 'extra.index'; they have: data_source"):
        ExactAnswer(column="extra.index")(inputs)


def test_verl_from_parquet(make, tmp_path):
    import datasets

    datasets.Dataset.from_list([VERL]).to_parquet(path := tmp_path / "train.parquet")
    (batch,) = make(Prompts, [], train=None, validation=str(path), stage="validate").val_dataloader()
    assert batch.prompts == [[USER]]
    assert batch.columns["answer"] == ["72"]
    assert batch.columns["extra_info"] == [VERL["extra_info"]]


def test_each_split_has_its_own_columns(make, tmp_path, capsys):
    other = tmp_path / "other.jsonl"
    other.write_text(json.dumps({"question": "w5", "ground_truth": "w6"}) + "\n")
    data = make(Prompts, [{"prompt": "w1", "answer": "w2"}], validation=str(other))
    (train,), (held_out,) = data.train_dataloader().once(), data.val_dataloader()
    assert (train.prompts, train.columns["answer"]) == (["w1"], ["w2"])
    assert (held_out.prompts, held_out.columns["answer"]) == (["w5"], ["w6"])
    assert lines(capsys)[-1] == "prompts from `question`, answers from `ground_truth`"


def test_the_cache_does_not_mix_columns(make):
    """The rows of one column are not taken for those of another, of the same file."""
    record = {"question": "w1", "messages": [USER, says("w3")], "prompt": "w9"}
    seen = {
        column: next(iter(make(Prompts, [record], column=column).val_dataloader())).tokens.tolist()
        for column in ("prompt", "question", "messages", "prompt")
    }
    assert len({str(tokens) for tokens in seen.values()}) == 3


def test_options_win(make, capsys):
    (batch,) = make(Prompts, [VERL], column="extra_info.question", answer="extra_info.index").val_dataloader()
    assert (batch.prompts, batch.columns["answer"]) == (["w5"], [3])
    record = {"prompt": "w1", "completion": "w2", "messages": [USER, says("w3 w4")]}
    (batch,) = make(Demonstrations, [record], response="messages").val_dataloader()
    assert int(batch.mask.sum()) == 3
    (batch,) = make(Demonstrations, [record], prompt="prompt", response="completion").val_dataloader()
    assert int(batch.mask.sum()) == 2
    (batch,) = make(Preferences, [{"question": "w1", "instruction": "w2", "chosen": " w3", "rejected": " w4"}],
                    prompt="instruction").val_dataloader()  # fmt: skip
    assert len(batch.prompts[0]) == 2  # <bos> w2
    assert lines(capsys) == []


DEMONSTRATIONS = {
    "text": ({"text": "w1 w2"}, "w1 w2 <eos>", "<bos>", None),
    "messages": (
        {"messages": [SYSTEM, USER, says("w3"), USER, says("w4"), says("w5")]},
        "w4 <eos> <assistant> w5 <eos>",
        "<unk> w0 <eos> <user> w1 w2 <eos> <assistant> w3 <eos> <user> w1 w2 <eos> <assistant>",
        "texts from `messages`",
    ),
    "completion": (
        {"prompt": "w1", "completion": " w2"},
        "w2 <eos>",
        "<bos> w1",
        "`prompt`, responses from `completion`",
    ),
    "turns": (
        {"prompt": [USER], "completion": [says("w3")]},
        "w3 <eos>",
        "<user> w1 w2 <eos> <assistant>",
        "`prompt`, responses from `completion`",
    ),
    "alpaca": (
        {"instruction": "w1", "input": "w2", "output": " w3"},
        "w3 <eos>",
        "<bos> w1 w2",
        "`instruction` and `input`, responses from `output`",
    ),
    "openrlhf": (
        {"question": "w1", "response": " w2"},
        "w2 <eos>",
        "<bos> w1",
        "`question`, responses from `response`",
    ),
    "gsm8k": ({"question": "w1", "answer": " w2"}, "w2 <eos>", "<bos> w1", "`question`, responses from `answer`"),
}


@pytest.mark.parametrize("name", DEMONSTRATIONS)
def test_demonstrations(make, chat_tokenizer, capsys, name):
    record, trained, opening, told = DEMONSTRATIONS[name]
    (batch,) = make(Demonstrations, [record]).val_dataloader()
    words = chat_tokenizer.convert_ids_to_tokens(batch.tokens[0].tolist())
    mask = batch.mask[0].tolist()
    assert " ".join(w for w, counts in zip(words, mask, strict=True) if counts) == trained
    assert " ".join(words[: mask.index(True)]) == opening
    assert lines(capsys) == ([told if told.startswith("texts") else f"prompts from {told}"] if told else [])


def pair(make, tokenizer, record, **options):
    """Return the prompt, and each response, as words."""
    (batch,) = make(Preferences, [record], **options).val_dataloader()
    rows = [tokenizer.convert_ids_to_tokens(row) for row in batch.tokens.tolist()]
    cut = zip(rows, batch.prompt_lengths.tolist(), batch.lengths.tolist(), strict=True)
    return " ".join(tokenizer.convert_ids_to_tokens(batch.prompts[0])), [" ".join(r[a:b]) for r, a, b in cut]


OPENING = "<user> w1 w2 <eos> <assistant>"
ANSWERS = {"chosen": [says("w3")], "rejected": [says("w4")]}
WHOLE = {"chosen": [USER, says("w3")], "rejected": [USER, says("w4")]}


@pytest.mark.parametrize(
    "record",
    [
        pytest.param({"prompt": [USER], **ANSWERS}, id="explicit"),
        pytest.param(WHOLE, id="implicit"),
        pytest.param({"prompt": "w1 w2", **ANSWERS}, id="text beside answers"),
        pytest.param(
            {"prompt": "w1 w2", **WHOLE, "messages": WHOLE["chosen"], "score_chosen": 8.5}, id="ultrafeedback"
        ),
        pytest.param({"prompt": [USER], **WHOLE}, id="conversation repeated"),
        pytest.param({"question": "w1 w2", **ANSWERS}, id="question"),
        pytest.param({"context_messages": [USER], "chosen": "w3", "rejected": "w4"}, id="openrlhf"),
    ],
)
def test_pairs_of_conversations(make, chat_tokenizer, record):
    assert pair(make, chat_tokenizer, record) == (OPENING, ["w3 <eos>", "w4 <eos>"])


def test_pairs_of_texts(make, chat_tokenizer, capsys):
    record = {"instruction": "w1", "input": "w2", "chosen": " w3", "rejected": " w4"}
    assert pair(make, chat_tokenizer, record) == ("<bos> w1 w2", ["w3 <eos>", "w4 <eos>"])
    assert lines(capsys) == ["prompts from `instruction` and `input`"]
    whole = {"chosen": "w1 w2 w3", "rejected": "w1 w2 w4"}
    assert pair(make, chat_tokenizer, whole) == ("", ["w3 <eos>", "w4 <eos>"])
    assert lines(capsys) == []


@pytest.mark.parametrize(
    ("kind", "record", "message"),
    [
        (Prompts, {"question": "w1", "messages": [USER]}, "the prompt may be in question or messages; .* data.column$"),
        (Prompts, {"text": "w1"}, "has no column 'prompt'; it has: text; name another with data.column$"),
        (Prompts, {"messages": [says("w1")]}, "the conversation has no user turn to answer$"),
        (
            Prompts,
            {**VERL, "ground_truth": "7"},
            "the answer may be in reward_model.ground_truth or ground_truth; choose with data.answer$",
        ),
        (
            Demonstrations,
            {"text": "w1", "prompt": "w2", "response": "w3"},
            r"the demonstration may be in text or prompt \+ response; choose with data.prompt and data.response$",
        ),
        (Demonstrations, {"prompt": "w1", "chosen": "w2"}, "it has: chosen, prompt; name others with data.prompt and"),
        (Demonstrations, {"messages": [says("w3"), USER]}, "should end with the assistant's answer"),
        (
            Preferences,
            {"question": "w1", "instruction": "w2", "chosen": "w3", "rejected": "w4"},
            "the prompt may be in question or instruction; choose with data.prompt$",
        ),
    ],
)
def test_what_is_not_clear_is_refused(make, kind, record, message):
    with pytest.raises(UserError, match=rf"^data.train: record 1 of \S*data.jsonl:? .*{message}") as error:
        make(kind, [record])
    assert "\n" not in str(error.value)


def test_the_answer_alone_retokenizes_nothing(make, monkeypatch):
    record = {"prompt": "w1", "answer": "1", "other": "2"}
    make(Prompts, [record])
    monkeypatch.setattr("lit_rlhf.data.prompts.token_rows", None)
    (batch,) = make(Prompts, [record], answer="other").val_dataloader()
    assert batch.columns["answer"] == ["2"]
    assert torch.is_tensor(batch.tokens)
