import csv
import json
from itertools import islice

import pytest
import torch
from transformers import AutoTokenizer

from lit_rlhf.data import Preferences
from lit_rlhf.errors import UserError

PAIRS = [
    {"prompt": "w1 w2", "chosen": " w3 w4 w5", "rejected": " w6"},
    {"prompt": "w7", "chosen": " w8", "rejected": " w9 w10"},
    {"prompt": "w11 w12 w13", "chosen": " w14", "rejected": " w15"},
]
RANKINGS = [
    {"prompt": "w1", "responses": [" w2", " w3 w4", " w5", " w6 w7 w8"]},
    {"prompt": "w9 w10", "responses": [" w11 w12", " w13"]},
    {"prompt": "w14", "responses": [" w15", " w16", " w17 w18"]},
]
USER = {"role": "user", "content": "w1 w2"}


def says(content):
    return {"role": "assistant", "content": content}


@pytest.fixture
def make(make_data):
    def build(tokenizer, records=PAIRS, **options) -> Preferences:
        return make_data(Preferences, "preferences.jsonl", tokenizer, records, **options)

    return build


def words(batch, tokenizer):
    """Return, for each ranking, the tokens of prompt and response as words, best response first."""
    rankings = []
    for places, there in zip(batch.ranking, batch.mask, strict=True):
        rows = []
        for row in places[there].tolist():
            names = tokenizer.convert_ids_to_tokens(batch.tokens[row].tolist())
            prompt, length = int(batch.prompt_lengths[row]), int(batch.lengths[row])
            assert set(names[length:]) <= {tokenizer.pad_token}
            assert [w for w, counts in zip(names, batch.response_tokens_mask[row], strict=True) if counts] == names[
                prompt:length
            ]
            rows.append((" ".join(names[:prompt]), " ".join(names[prompt:length])))
        rankings.append(rows)
    return rankings


def only_ranking(data, tokenizer):
    (batch,) = data.val_dataloader()
    (rows,) = words(batch, tokenizer)
    return rows


@pytest.mark.parametrize("special", ["distinct", "pad_is_eos", "bos_is_eos"])
def test_the_tokens_are_prompt_response_and_end_token(make, tiny_model, special):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model("llama", special=special))
    (batch,) = make(tokenizer).val_dataloader()
    rows = []
    for record in PAIRS:
        for name in ("chosen", "rejected"):
            rows.append([*tokenizer(record["prompt"] + record[name])["input_ids"], tokenizer.eos_token_id])
    assert batch.lengths.tolist() == [len(row) for row in rows] == [7, 5, 4, 5, 6, 6]
    assert batch.prompt_lengths.tolist() == [3, 3, 2, 2, 4, 4]
    assert batch.tokens.tolist() == [row + [tokenizer.pad_token_id] * (7 - len(row)) for row in rows]
    assert batch.ranking.tolist() == [[0, 1], [2, 3], [4, 5]]
    assert batch.mask.all()
    assert batch.margin is None
    assert batch.number.tolist() == [0, 1, 2]
    assert list(batch.prompts) == [tokenizer(record["prompt"])["input_ids"] for record in PAIRS]


def test_rankings_of_different_sizes_in_one_batch(make, tokenizer):
    (batch,) = make(tokenizer, RANKINGS).val_dataloader()
    assert words(batch, tokenizer) == [
        [("<bos> w1", f"{r} <eos>") for r in ("w2", "w3 w4", "w5", "w6 w7 w8")],
        [("<bos> w9 w10", f"{r} <eos>") for r in ("w11 w12", "w13")],
        [("<bos> w14", f"{r} <eos>") for r in ("w15", "w16", "w17 w18")],
    ]
    assert batch.ranking.tolist() == [[0, 1, 2, 3], [4, 5, 0, 0], [6, 7, 8, 0]]
    assert batch.mask.sum(1).tolist() == [4, 2, 3]


def test_pairs_next_to_rankings(make, tokenizer):
    (batch,) = make(tokenizer, [PAIRS[0], RANKINGS[2]]).val_dataloader()
    assert batch.mask.tolist() == [[True, True, False], [True, True, True]]
    assert words(batch, tokenizer)[0] == [("<bos> w1 w2", "w3 w4 w5 <eos>"), ("<bos> w1 w2", "w6 <eos>")]


def test_rankings_cut_into_pairs(make, tokenizer, capsys):
    data = make(tokenizer, RANKINGS, as_pairs=True, batch_size=1)
    (batch,) = data.val_dataloader()
    assert batch.ranking.shape == (6 + 1 + 3, 2)
    assert batch.number.tolist() == list(range(10))
    responses = [tuple(response.removesuffix(" <eos>") for _, response in pair) for pair in words(batch, tokenizer)]
    first, second, third, fourth = "w2", "w3 w4", "w5", "w6 w7 w8"
    assert responses[:6] == [
        (first, second), (first, third), (first, fourth), (second, third), (second, fourth), (third, fourth)
    ]  # fmt: skip
    assert responses[6:] == [("w11 w12", "w13"), ("w15", "w16"), ("w15", "w17 w18"), ("w16", "w17 w18")]
    assert "10 train pairs" in capsys.readouterr().out


def test_other_columns(make, tokenizer):
    records = [{"q": "w1", "good": " w2", "bad": " w3"}, {"q": "w4", "ranked": [" w5", " w6"]}]
    options = {"prompt": "q", "chosen": "good", "rejected": "bad", "responses": "ranked"}
    (batch,) = make(tokenizer, records, **options).val_dataloader()
    assert words(batch, tokenizer) == [
        [("<bos> w1", "w2 <eos>"), ("<bos> w1", "w3 <eos>")],
        [("<bos> w4", "w5 <eos>"), ("<bos> w4", "w6 <eos>")],
    ]


def test_a_text_split_inside_a_word_has_the_tokens_of_the_whole_text(make, tokenizer):
    record = {"prompt": "w1 w", "chosen": "2 w3", "rejected": "4"}
    assert only_ranking(make(tokenizer, [record], batch_size=1), tokenizer) == [
        ("<bos> w1", "w2 w3 <eos>"), ("<bos> w1", "w4 <eos>")
    ]  # fmt: skip


def test_an_empty_response(make, tokenizer):
    record = {"prompt": "w1", "chosen": "", "rejected": " w2"}
    expected = [("<bos> w1", "<eos>"), ("<bos> w1", "w2 <eos>")]
    assert only_ranking(make(tokenizer, [record], batch_size=1), tokenizer) == expected


@pytest.mark.parametrize("as_turns", [False, True])
def test_conversations_as_prompts(make, chat_tokenizer, as_turns):
    chosen, rejected = ([says("w3")], [says("w4 w5")]) if as_turns else ("w3", "w4 w5")
    data = make(chat_tokenizer, [{"prompt": [USER], "chosen": chosen, "rejected": rejected}], batch_size=1)
    opening = "<user> w1 w2 <eos> <assistant>"
    assert only_ranking(data, chat_tokenizer) == [(opening, "w3 <eos>"), (opening, "w4 w5 <eos>")]
    (batch,) = data.val_dataloader()
    assert chat_tokenizer.convert_ids_to_tokens(batch.prompts[0]) == opening.split()


def test_a_response_with_several_turns(make, chat_tokenizer):
    longer = [says("w3"), {"role": "user", "content": "w4"}, says("w5")]
    rows = only_ranking(
        make(chat_tokenizer, [{"prompt": [USER], "responses": [longer, [says("w6")], [says("w7")]]}], batch_size=1),
        chat_tokenizer,
    )
    opening = "<user> w1 w2 <eos> <assistant>"
    assert rows == [
        (opening, "w3 <eos> <user> w4 <eos> <assistant> w5 <eos>"), (opening, "w6 <eos>"), (opening, "w7 <eos>")
    ]  # fmt: skip


def test_whole_conversations(make, chat_tokenizer):
    """The turns that they share are the prompt, even if the answers begin with the same word."""
    record = {"chosen": [USER, says("w3 w4")], "rejected": [USER, says("w3 w5 w6")]}
    data = make(chat_tokenizer, [record], batch_size=1)
    shared = "<user> w1 w2 <eos> <assistant>"
    assert only_ranking(data, chat_tokenizer) == [(shared, "w3 w4 <eos>"), (shared, "w3 w5 w6 <eos>")]
    (batch,) = data.val_dataloader()
    assert chat_tokenizer.convert_ids_to_tokens(batch.prompts[0]) == shared.split()


def test_text_that_the_template_writes_after_the_last_end_is_not_trained(make, chat_tokenizer):
    chat_tokenizer.chat_template += "{% if not add_generation_prompt %} w31 w30{% endif %}"
    data = make(chat_tokenizer, [{"prompt": [USER], "chosen": "w3", "rejected": "w4"}], batch_size=1)
    assert [response for _, response in only_ranking(data, chat_tokenizer)] == ["w3 <eos>", "w4 <eos>"]


def test_a_longer_generation_prompt_removes_nothing_from_the_response(make, chat_tokenizer):
    chat_tokenizer.chat_template = chat_tokenizer.chat_template.replace("<assistant>{%", "<assistant> w30{%")
    data = make(chat_tokenizer, [{"prompt": [USER], "chosen": "w3 w4", "rejected": "w5"}], batch_size=1)
    (batch,) = data.val_dataloader()
    assert chat_tokenizer.convert_ids_to_tokens(batch.prompts[0])[-2:] == ["<assistant>", "w30"]
    opening = "<user> w1 w2 <eos> <assistant>"
    assert only_ranking(data, chat_tokenizer) == [(opening, "w3 w4 <eos>"), (opening, "w5 <eos>")]


def test_an_end_is_added_where_the_template_writes_none(make, chat_tokenizer):
    chat_tokenizer.chat_template = chat_tokenizer.chat_template.replace(" <eos>", "")
    data = make(chat_tokenizer, [{"prompt": [USER], "chosen": "w3", "rejected": "w4"}], batch_size=1)
    opening = "<user> w1 w2 <assistant>"
    assert only_ranking(data, chat_tokenizer) == [(opening, "w3 <eos>"), (opening, "w4 <eos>")]


@pytest.mark.parametrize(
    ("record", "rows"),
    [
        (
            {"chosen": "w1 w2 w3", "rejected": "w1 w2 w4 w5"},
            [("<bos> w1 w2", "w3 <eos>"), ("<bos> w1 w2", "w4 w5 <eos>")],
        ),
        ({"chosen": "w1", "rejected": "w2"}, [("<bos>", "w1 <eos>"), ("<bos>", "w2 <eos>")]),
        ({"chosen": "w1 w2", "rejected": "w1"}, [("<bos> w1", "w2 <eos>"), ("<bos> w1", "<eos>")]),
        (
            {"responses": ["w1 w2 w3", "w1 w2", "w1 w4"]},
            [("<bos> w1", "w2 w3 <eos>"), ("<bos> w1", "w2 <eos>"), ("<bos> w1", "w4 <eos>")],
        ),
    ],
)
def test_whole_texts(make, tokenizer, record, rows):
    assert only_ranking(make(tokenizer, [record], batch_size=1), tokenizer) == rows


def without_opening(tokenizer):
    """Return the tokenizer without its beginning-of-sequence token, as in GPT-2 and Qwen."""
    from tokenizers import processors

    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])
    assert tokenizer("w1")["input_ids"] == tokenizer.convert_tokens_to_ids(["w1"])
    return tokenizer


@pytest.mark.parametrize(
    "record",
    [{"chosen": "w1 w2", "rejected": "w3"}, {"prompt": "", "chosen": "w1 w2", "rejected": "w3"}],
    ids=["whole texts", "empty prompt"],
)
def test_the_first_token_of_a_text_is_not_trained(make, tokenizer, record):
    (batch,) = make(without_opening(tokenizer), [record], batch_size=1).val_dataloader()
    assert not batch.response_tokens_mask[:, 0].any()
    assert batch.response_tokens_mask.any(1).all()


def test_margins(make, tokenizer):
    records = [record | {"gap": gap} for record, gap in zip(PAIRS, (0.5, 2, -1.25), strict=True)]
    (batch,) = make(tokenizer, records, margin="gap").val_dataloader()
    assert batch.margin.tolist() == [0.5, 2.0, -1.25]
    assert batch.margin.dtype == torch.float32
    assert next(iter(make(tokenizer, records).val_dataloader())).margin is None


def test_a_record_with_a_response_that_is_too_long_is_dropped_and_counted(make, tokenizer, capsys):
    data = make(tokenizer, max_tokens=6)
    (batch,) = data.val_dataloader()
    assert [rows[0][0] for rows in words(batch, tokenizer)] == ["<bos> w7", "<bos> w11 w12 w13"]
    assert batch.number.tolist() == [0, 1]
    assert data.dropped == {"train": 1, "validation": 1}
    out = capsys.readouterr().out
    assert "data: 2 train pairs from" in out
    assert "1 dropped (longer than 6 tokens)" in out


def test_only_pairs_with_the_long_response_are_dropped_from_a_ranking_cut_into_pairs(make, tokenizer):
    data = make(tokenizer, RANKINGS[:1], as_pairs=True, max_tokens=5, batch_size=1)
    (batch,) = data.val_dataloader()
    assert len(batch.mask) == 3
    assert data.dropped["validation"] == 3


def test_records_with_equal_responses_can_be_dropped(make, tokenizer, capsys):
    tied = {"prompt": "w1", "responses": [" w2", " w3", " w2"]}
    data = make(tokenizer, [tied, *PAIRS], ties="drop")
    (batch,) = data.val_dataloader()
    assert len(batch.mask) == len(PAIRS)
    assert data.tied == {"train": 1, "validation": 1}
    assert "1 dropped (equal responses)" in capsys.readouterr().out


def test_the_printed_messages(make, tokenizer, capsys):
    make(tokenizer, RANKINGS)
    assert "data: 3 train rankings from" in (out := capsys.readouterr().out)
    assert "dropped" not in out


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_other_file_formats(make, tokenizer, tmp_path, suffix):
    path = tmp_path / f"pairs.{suffix}"
    if suffix == "csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, ["prompt", "chosen", "rejected"])
            writer.writeheader()
            writer.writerows(PAIRS)
    else:
        import datasets

        datasets.Dataset.from_list(RANKINGS).to_parquet(path)
    (batch,) = make(tokenizer, train=str(path), validation=str(path)).val_dataloader()
    (expected,) = make(tokenizer, PAIRS if suffix == "csv" else RANKINGS).val_dataloader()
    assert torch.equal(batch.tokens, expected.tokens)
    assert torch.equal(batch.mask, expected.mask)


def test_conversations_from_parquet(make, chat_tokenizer, tmp_path):
    import datasets

    record = {"prompt": [USER], "responses": [[says("w3")], [says("w4 w5")], [says("w6")]]}
    datasets.Dataset.from_list([record]).to_parquet(path := tmp_path / "rankings.parquet")
    data = make(chat_tokenizer, train=str(path), validation=str(path), batch_size=1)
    assert [response for _, response in only_ranking(data, chat_tokenizer)] == ["w3 <eos>", "w4 w5 <eos>", "w6 <eos>"]


def test_training_batches_are_shuffled_and_contain_every_pair(make, tokenizer):
    records = [{"prompt": f"w{i}", "chosen": f" w{i + 1}", "rejected": f" w{i + 2}"} for i in range(20)]
    data = make(tokenizer, records, batch_size=5)
    loader = data.train_dataloader()
    batches = list(loader)
    numbers = [number for batch in batches for number in batch.number.tolist()]
    assert sorted(numbers) == list(range(20))
    assert numbers != list(range(20))
    for batch in batches:
        for number, ((prompt, chosen), (_, rejected)) in zip(
            batch.number.tolist(), words(batch, tokenizer), strict=True
        ):
            assert (prompt, chosen, rejected) == (f"<bos> w{number}", f"w{number + 1} <eos>", f"w{number + 2} <eos>")
    again = make(tokenizer, records, batch_size=5)
    again.load_state_dict({"yielded": 2})
    rest = [batch.number.tolist() for batch in islice(again.train_dataloader(), 2)]
    assert rest == [batch.number.tolist() for batch in batches[2:]]
    assert data.state_dict() == {"yielded": 4, "drawn": 0}


def test_once_gives_every_record_and_does_not_advance_the_loader(make, tokenizer):
    records = [{"prompt": f"w{i}", "chosen": f" w{i + 1}", "rejected": f" w{i + 2}"} for i in range(7)]
    loader = make(tokenizer, records, batch_size=3).train_dataloader()
    steps = iter(loader)
    trained = [next(steps).number.tolist()]
    for _ in range(2):
        assert [batch.number.tolist() for batch in loader.once()] == [[0, 1, 2], [3, 4, 5], [6]]
    assert loader.state_dict() == {"yielded": 1, "drawn": 0}
    trained.append(next(steps).number.tolist())
    undisturbed = make(tokenizer, records, batch_size=3).train_dataloader()
    assert trained == [batch.number.tolist() for batch in undisturbed]


@pytest.mark.parametrize("world_size", [2, 3])
def test_once_on_several_ranks(make, tokenizer, world_size):
    records = [{"prompt": f"w{i}", "chosen": f" w{i + 1}", "rejected": f" w{i + 2}"} for i in range(7)]
    shares, wholes = [], []
    for rank in range(world_size):
        data = make(tokenizer, records, batch_size=3, rank=rank, world_size=world_size, validation=None)
        loader = data.train_dataloader()
        shares += [number for batch in loader.once() for number in batch.number.tolist()]
        wholes.append([batch.number.tolist() for batch in loader.once(whole=True)])
    assert sorted(shares) == list(range(7))
    assert all(whole == [[0, 1, 2], [3, 4, 5], [6]] for whole in wholes)


def test_a_sample_depends_on_the_seed_alone(make, tokenizer, monkeypatch):
    records = [{"prompt": f"w{i}", "chosen": f" w{i + 1}", "rejected": f" w{i + 2}"} for i in range(17)]

    def loader(**options):
        return make(tokenizer, records, validation=None, batch_size=3, **options).train_dataloader()

    def numbers(batches):
        return [number for batch in batches for number in batch.number.tolist()]

    alone = loader()
    sample = numbers(alone.once(8))
    assert [len(batch.number) for batch in alone.once(8)] == [3, 3, 2]
    assert alone.batches_in_once(8) == 3
    assert sample == sorted(set(sample))
    assert len(sample) == 8
    assert max(sample) - min(sample) > 8  # from the whole file
    next(iter(alone))
    assert numbers(alone.once(8)) == sample
    for world_size in (2, 3):
        shares = (numbers(loader(rank=rank, world_size=world_size).once(8)) for rank in range(world_size))
        assert sorted(number for share in shares for number in share) == sample
    assert numbers(alone.once(100)) == list(range(17))
    assert alone.batches_in_once(100) == alone.batches_in_once() == 6
    monkeypatch.setenv("PL_GLOBAL_SEED", "1")
    assert numbers(alone.once(8)) != sample


def test_without_held_out_records(make, tokenizer):
    data = make(tokenizer, validation=None)
    assert data.val_dataloader() == []
    assert data.test_dataloader() == []


def test_a_stage_reads_only_the_files_that_it_needs(make, tokenizer):
    data = make(tokenizer, stage="test", train="there/is/none.jsonl")
    assert len(data.test_dataloader()) == 1


PLAIN = {"prompt": "w1", "chosen": " w2", "rejected": " w3"}


@pytest.mark.parametrize(
    ("record", "options", "found"),
    [
        (PLAIN | {"rejected": " w2"}, {}, r"two of its responses are equal.*' w2'"),
        ({"prompt": "w1", "responses": [" w2", " w3", " w2"]}, {}, r"two of its responses are equal.*' w2'"),
        ({"prompt": "w1", "responses": [" w2"]}, {}, r"responses should rank 2 responses or more.*ranks 1$"),
        ({"prompt": "w1", "responses": []}, {}, r"responses should rank 2 responses or more.*ranks 0$"),
        ({"prompt": "w1", "responses": " w2"}, {}, r"responses should rank 2 responses or more.*not a list$"),
        ({"prompt": "w1", "responses": {"a": " w2", "b": " w3"}}, {}, r"responses should rank.*not a list$"),
        ({"prompt": "w1", "responses": [" w2", [" w3", " w4"]]}, {}, r"responses has a tie .*list in the list"),
        ({"prompt": "w1", "chosen": " w2"}, {}, r"neither 'responses' nor a pair with 'rejected'; .*: chosen, prompt$"),
        ({"prompt": "w1", "rejected": " w2"}, {}, r"nor a pair with 'chosen'; it has: prompt, rejected$"),
        (PLAIN | {"chosen": None}, {}, r"nor a pair with 'chosen'; it has: prompt, rejected$"),
        (PLAIN | {"chosen": 7}, {}, r"the prompt is text, so a response is text too, not '7'$"),
        (PLAIN | {"chosen": [says("w2")]}, {}, r"the prompt is text, so a response is text too"),
        (PLAIN | {"prompt": 7}, {}, r"a prompt is text or a list of .*not '7'$"),
        (PLAIN | {"prompt": [USER]}, {}, r"tokenizer has no chat template"),
        ({"chosen": 7, "rejected": " w3"}, {}, r"'?7'?$"),
        (PLAIN | {"gap": "much"}, {"margin": "gap"}, r"data\.margin should be a finite number .*, not 'much'"),
        (PLAIN, {"margin": "gap"}, r"data\.margin should be a finite number beside a pair, not None"),
        ({"prompt": "w1", "responses": [" w2", " w3", " w4"], "gap": 1.0}, {"margin": "gap"}, r"not 1\.0 beside 3 "),
    ],
)
@pytest.mark.parametrize("split", ["train", "validation"])
def test_wrong_records_are_named(make, tokenizer, tmp_path, split, record, options, found):
    bad = tmp_path / "bad.jsonl"
    first = PLAIN | {"gap": 0.5}
    bad.write_text("".join(json.dumps(r) + "\n" for r in (first, first, record)))
    records = [first] * 2
    with pytest.raises(UserError, match=rf"^data\.{split}: record 3 of \S*/bad\.jsonl.*{found}") as error:
        make(tokenizer, records, **{split: str(bad)}, **options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("response", [7, {"role": "assistant", "content": "w2"}, [], [7], [{"role": "assistant"}]])
@pytest.mark.parametrize("name", ["chosen", "rejected"])
def test_a_response_that_is_neither_text_nor_a_list_of_turns(make, chat_tokenizer, name, response):
    record = {"prompt": [USER], "chosen": "w3", "rejected": "w4", name: response}
    with pytest.raises(UserError, match=r"^data\.train: record 1 of \S*preferences\.jsonl"):
        make(chat_tokenizer, [record], batch_size=1)


@pytest.mark.parametrize("gap", [float("nan"), float("inf"), True])
def test_a_margin_that_is_not_a_finite_number(make, tokenizer, gap):
    with pytest.raises(UserError, match=r"^data\.train: record 1 of \S*preferences\.jsonl.*data\.margin"):
        make(tokenizer, [PLAIN | {"gap": gap}], margin="gap", batch_size=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_tokens": 3}, r"^data\.train: no record of \S*jsonl is left: .*data\.max_tokens=3"),
        ({"train": None}, r"^data\.train is not set"),
        ({"train": None, "validation": None, "stage": "validate"}, r"^data\.validation is not set"),
        ({"train": "there/is/none.jsonl"}, r"^data\.train: there is no file there/is/none\.jsonl$"),
    ],
)
def test_wrong_options(make, tokenizer, options, message):
    with pytest.raises(UserError, match=message):
        make(tokenizer, **options)


def test_a_batch_that_is_larger_than_the_data(make, tokenizer):
    with pytest.raises(UserError, match=r"^data\.batch_size is 4, but data\.train has only 3 records$"):
        make(tokenizer, batch_size=4).train_dataloader()


def test_a_held_out_batch_with_fewer_records_than_processes(make, tokenizer):
    with pytest.raises(UserError, match=r"^data\.validation_batch_size is 2: a batch of the 3 records has 1.*2 proc"):
        make(tokenizer, validation_batch_size=2, world_size=2).val_dataloader()


@pytest.mark.parametrize("field", ["max_tokens", "batch_size", "validation_batch_size"])
def test_numbers_out_of_range(field):
    with pytest.raises(ValueError, match=rf"^data\.{field} must be 1 or more, not 0$"):
        Preferences(**{field: 0})
