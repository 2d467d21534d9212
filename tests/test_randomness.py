import itertools

import pytest
import torch

from lit_rlhf.randomness import Stream, generator, global_seed, row_seeds, uniforms


@pytest.fixture(autouse=True)
def seed(monkeypatch):
    monkeypatch.setenv("PL_GLOBAL_SEED", "3")


def draw(rows, stream=Stream.ROLLOUT, iteration=5, width=8):
    return uniforms(stream, iteration, torch.tensor(rows), width)


def test_a_row_does_not_depend_on_its_batch():
    whole = draw(range(10))
    assert torch.equal(torch.cat([draw(range(4)), draw(range(4, 10))]), whole)
    assert torch.equal(draw([7, 0, 7]), whole[[7, 0, 7]])
    assert torch.equal(draw(range(10), width=3), whole[:, :3])


def test_every_key_has_its_own_numbers(monkeypatch):
    seen = []
    for seed, stream, iteration in itertools.product(["0", "1"], Stream, range(3)):
        monkeypatch.setenv("PL_GLOBAL_SEED", seed)
        seen += draw(range(4), stream, iteration).tolist()
    assert len({tuple(row) for row in seen}) == 2 * len(Stream) * 3 * 4
    assert len({number for row in seen for number in row}) > 0.99 * 8 * len(seen)


def test_seeds_of_rows(monkeypatch):
    rows = torch.arange(10)
    assert row_seeds(Stream.ROLLOUT, 5, rows[[7, 0]]) == [row_seeds(Stream.ROLLOUT, 5, rows)[i] for i in (7, 0)]
    seen = []
    for seed, stream, iteration in itertools.product(["0", "1"], Stream, range(3)):
        monkeypatch.setenv("PL_GLOBAL_SEED", seed)
        seen += row_seeds(stream, iteration, rows)
    assert len(set(seen)) == 2 * len(Stream) * 3 * 10
    assert 2**61 < max(seen) < 2**63
    assert 0 <= min(seen) < 2**60


def test_uniform():
    u = draw(range(100), width=200)
    assert u.shape == (100, 200)
    assert u.dtype == torch.float32
    assert 0 <= u.min() < 0.001
    assert 0.999 < u.max() < 1
    assert torch.equal(u * 2**24, (u * 2**24).round())
    counts = (u.flatten() * 10).long().bincount(minlength=10) / u.numel()
    torch.testing.assert_close(counts, torch.full((10,), 0.1), rtol=0, atol=0.01)
    assert u.T.corrcoef().fill_diagonal_(0).abs().max() < 0.55  # 5 standard deviations of 100 rows
    assert u.corrcoef().fill_diagonal_(0).abs().max() < 0.4  # between rows of 200 numbers


def test_generators():
    def first(*key):
        return torch.rand(3, generator=generator(*key)).tolist()

    keys = [(stream, i, j) for stream in Stream for i in range(3) for j in range(3)]
    assert first(*keys[4]) == first(*keys[4])
    assert len({tuple(first(*key)) for key in keys}) == len(keys)


def test_seed(monkeypatch):
    numbers = draw([0])
    assert global_seed() == 3
    monkeypatch.setenv("PL_GLOBAL_SEED", "4")
    assert not torch.equal(draw([0]), numbers)
    monkeypatch.setenv("PL_GLOBAL_SEED", "3")
    assert torch.equal(draw([0]), numbers)
    monkeypatch.delenv("PL_GLOBAL_SEED")
    assert global_seed() == 0


def test_global_generators_are_not_used():
    state = torch.random.get_rng_state()
    draw(range(4))
    generator(Stream.MINIBATCHES, 1, 2)
    assert torch.equal(torch.random.get_rng_state(), state)
