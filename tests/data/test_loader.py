from itertools import islice

import pytest
from datasets import Dataset

from lit_rlhf.data.loader import GlobalBatches, ResumableLoader

SIZE, BATCH = 22, 4


def loader(shuffle=True, **options) -> ResumableLoader:
    """Return a loader of the numbers 0 to 21."""
    rows = Dataset.from_dict({"number": range(SIZE)})
    return ResumableLoader(rows, lambda placed: placed, GlobalBatches(SIZE, BATCH, shuffle=shuffle, **options))


def play(made, epochs=1):
    """Return the records of each batch over this many epochs."""
    for _ in range(epochs):
        for batch in made:
            yield [record["number"] for _, record in batch]


def epoch(number, **options):
    made = loader(**options)
    return list(play(made, number + 1))[number * len(made) :]


def test_every_record_occurs_at_most_once_in_an_epoch():
    batches = epoch(0)
    seen = [record for batch in batches for record in batch]
    assert [len(batch) for batch in batches] == [BATCH] * 5  # the incomplete sixth is dropped
    assert len(loader()) == 5
    assert len(set(seen)) == 20
    assert set(seen) <= set(range(SIZE))


def test_validation_keeps_the_order_and_the_last_incomplete_batch():
    batches = epoch(3, shuffle=False)
    assert [record for batch in batches for record in batch] == list(range(SIZE))
    assert [len(batch) for batch in batches] == [4, 4, 4, 4, 4, 2]
    assert len(loader(shuffle=False)) == 6


def test_the_order_depends_on_seed_and_epoch_only(monkeypatch):
    monkeypatch.setenv("PL_GLOBAL_SEED", "7")
    first = epoch(0)
    assert epoch(0) == first
    assert epoch(1) != first
    monkeypatch.setenv("PL_GLOBAL_SEED", "8")
    assert epoch(0) != first
    monkeypatch.setenv("PL_GLOBAL_SEED", "7")
    assert epoch(0) == first


@pytest.mark.parametrize("given", range(1, 11))
def test_a_resumed_loader_continues_with_the_next_batch(given):
    first, second = loader(), loader()
    taken = list(islice(play(first, 2), given))
    second.load_state_dict(first.state_dict())
    rest = list(islice(play(second, 2), 10 - given))
    assert taken + rest == epoch(0) + epoch(1)


def test_a_state_can_be_resumed_twice():
    first, second, third = loader(), loader(), loader()
    next(iter(first))
    second.load_state_dict(first.state_dict())
    next(iter(second))
    third.load_state_dict(second.state_dict())
    assert list(islice(play(third), 3)) == epoch(0)[2:]


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ranks_share_the_same_global_batches(world_size, shuffle):
    shares = [list(loader(shuffle, rank=rank, world_size=world_size)) for rank in range(world_size)]
    whole = list(loader(shuffle))
    assert [len(share) for share in shares] == [len(whole)] * world_size
    for parts, batch in zip(zip(*shares, strict=True), whole, strict=True):
        assert [pair for part in parts for pair in part] == batch
        assert [place for place, _ in batch] == list(range(len(batch)))


@pytest.mark.parametrize(("batch_size", "world_size"), [(6, 4), (5, 3), (9, 8)])
def test_every_rank_gets_a_record(batch_size, world_size):
    shares = [
        [len(share) for share in GlobalBatches(18, batch_size, shuffle=True, rank=rank, world_size=world_size).epoch(0)]
        for rank in range(world_size)
    ]
    for sizes in zip(*shares, strict=True):
        assert min(sizes) >= 1
        assert max(sizes) - min(sizes) <= 1


def test_drawn_batches_take_the_places_of_later_ones():
    """On one rank and two: no batch is skipped or used twice, and each pass still has as many batches."""
    plain = [batch for number in range(4) for batch in epoch(number)]

    def draw(made):
        """Draw a further batch in most steps of two passes."""
        found = []
        for _ in range(2):
            for number, batch in enumerate(made):
                found.append(batch)
                assert made.upcoming(0) == batch
                if number != 1:
                    found.append(made.draw())
                    assert made.upcoming(0) == found[-1]
        return [[record["number"] for _, record in batch] for batch in found]

    assert draw(loader()) == plain[:18]
    ranks = [draw(loader(rank=rank, world_size=2)) for rank in range(2)]
    assert [first + second for first, second in zip(*ranks, strict=True)] == plain[:18]


def test_a_loader_resumes_after_the_batches_that_were_drawn():
    first, second = loader(), loader()
    batches = iter(first)
    next(batches), first.draw(), first.draw()
    second.load_state_dict(first.state_dict())
    rest = [*batches]
    assert [*islice(second, len(rest))] == rest
    assert [[record["number"] for _, record in batch] for batch in rest] == [*epoch(0)[3:], *epoch(1)[:2]]
