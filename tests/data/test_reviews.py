import random

import pytest

from lit_rlhf.data import reviews

DEMONSTRATIONS = reviews.demonstrations() + reviews.validation_demonstrations()
WHOLE = [record["prompt"] + record["response"] for record in DEMONSTRATIONS]


def test_every_demonstration_is_grammatical():
    assert len(WHOLE) > 1000
    assert all(reviews.grammatical(text) for text in WHOLE)


def test_an_opening_alone_is_not_a_review():
    assert not any(reviews.grammatical(text) for text in reviews.openings())


def swapped(words, rng):
    i = rng.randrange(len(words) - 1)
    words[i], words[i + 1] = words[i + 1], words[i]


def dropped(words, rng):
    del words[rng.randrange(len(words))]


def doubled(words, rng):
    i = rng.randrange(len(words))
    words.insert(i, words[i])


def foreign(words, rng):
    words[rng.randrange(len(words))] = "xylophone"


@pytest.mark.parametrize(("corrupt", "share"), [(swapped, 0.99), (dropped, 0.85), (doubled, 0.99), (foreign, 1.0)])
def test_corrupted_reviews_are_not_grammatical(corrupt, share):
    rng = random.Random(0)
    refused = changed = 0
    for text in rng.sample(WHOLE, 300):
        words = text.split()
        corrupt(words, rng)
        changed += words != text.split()
        refused += not reviews.grammatical(" ".join(words)) and words != text.split()
    assert refused >= share * changed > 0  # dropping an optional word (a degree) leaves the review grammatical


@pytest.mark.parametrize("change", ["{} .", "{} the end", "so {}", "{0} {0}"])
def test_text_before_or_after_a_review_is_refused(change):
    assert not any(reviews.grammatical(change.format(text)) for text in WHOLE[:50])


def test_positivity():
    good, bad, part = reviews.GOOD, reviews.BAD, reviews.PARTS[0]
    assert reviews.positivity(f"the {part} was {good[0]} .") == 1.0
    assert reviews.positivity(f"the {part} was {bad[0]} .") == -1.0
    assert reviews.positivity(f"the {part} was {good[0]} and {bad[0]} .") == 0.0
    assert reviews.positivity(f"the {part} was {good[0]} . {reviews.GOOD_VERDICTS[0]} {bad[0]}") == pytest.approx(1 / 3)
    assert reviews.positivity(f"the {part} was {bad[0]} . {reviews.BAD_VERDICTS[0]}") == -1.0
    assert reviews.positivity("") == reviews.positivity(reviews.openings()[0]) == 0.0


def test_the_reward_is_the_positivity_and_both_signs_occur():
    scores = reviews.reward([record["response"] for record in DEMONSTRATIONS])
    assert scores == [reviews.positivity(record["response"]) for record in DEMONSTRATIONS]
    assert min(scores) == -1.0
    assert max(scores) == 1.0
    assert abs(sum(scores) / len(scores)) < 0.1  # so that there is something to learn


def test_fresh_prompts_do_not_occur_in_any_training_set():
    train = {record["prompt"] for record in reviews.prompts()}
    fresh = {record["prompt"] for record in reviews.fresh_prompts()}
    assert train
    assert fresh
    assert not train & fresh
    assert {record["prompt"] for record in reviews.demonstrations()} <= train
    assert {record["prompt"] for record in reviews.validation_demonstrations()} <= fresh
    assert len(set(reviews.openings())) == len(reviews.openings()) == len(train) + len(fresh)


def test_the_data_are_deterministic():
    assert reviews.demonstrations() == reviews.demonstrations()
    assert reviews.validation_demonstrations() == reviews.validation_demonstrations()
    assert reviews.openings() == reviews.openings()


def test_the_tokenizer_knows_every_word():
    tokenizer = reviews.tokenizer()
    for text, ids in zip(WHOLE, tokenizer(WHOLE)["input_ids"], strict=True):
        assert tokenizer.unk_token_id not in ids
        assert len(ids) == len(text.split())
        assert tokenizer.decode(ids) == text
    ids = tokenizer("xylophone")["input_ids"]
    assert ids == [tokenizer.unk_token_id]
    assert len({tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id}) == 3
