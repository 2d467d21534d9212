import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch

from lit_rlhf.algorithms.masked import masked_mean, masked_sum, masked_var, masked_whiten, token_weights
from lit_rlhf.testing import assert_gradient_matches

NAN, INF = float("nan"), float("inf")
STATISTICS = {
    "sum": masked_sum,
    "sum of rows": partial(masked_sum, dim=1),
    "mean": masked_mean,
    "mean of rows": partial(masked_mean, dim=1),
    "var": masked_var,
    "whiten": lambda x, mask, **options: masked_whiten(x, mask, **options).values,
    "scale": lambda x, mask, **options: masked_whiten(x, mask, shift_mean=False, **options).values,
}


def random_case(seed=0, shape=(4, 6)):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=g, dtype=torch.float64) + 3, torch.rand(shape, generator=g) < 0.6


def kept(x, mask):
    return [v for v, counts in zip(x.flatten().tolist(), mask.flatten().tolist(), strict=True) if counts]


def on_two_ranks(function, inputs):
    """Run ``function(*inputs[rank], reduce=…)`` in two threads; ``reduce`` sums the arguments of both."""
    barrier, shelf = threading.Barrier(2, timeout=10), [None, None]

    def run(rank):
        def reduce(x):
            shelf[rank] = x
            barrier.wait()
            total = shelf[0] + shelf[1]
            barrier.wait()
            return total

        return function(*inputs[rank], reduce=reduce)

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(run, range(2)))


def test_numbers_by_hand():
    x = torch.tensor([[1.0, NAN, 3.0], [5.0, 7.0, INF]])
    mask = torch.tensor([[True, False, True], [True, True, False]])
    assert masked_sum(x, mask) == 16
    assert masked_mean(x, mask) == 4
    assert masked_mean(x, mask, dim=1).tolist() == [2, 6]
    assert masked_var(x, mask) == 5  # (9 + 1 + 1 + 9) / 4
    whitened = torch.tensor([[-3.0, 0.0, -1.0], [1.0, 3.0, 0.0]]) / 5**0.5
    torch.testing.assert_close(masked_whiten(x, mask).values, whitened)
    torch.testing.assert_close(masked_whiten(x, mask, shift_mean=False).values, torch.where(mask, whitened + 4, 0.0))


@pytest.mark.parametrize("seed", range(3))
def test_equals_a_loop(seed):
    x, mask = random_case(seed)
    values = kept(x, mask)
    mean = sum(values) / len(values)
    var = sum((v - mean) ** 2 for v in values) / len(values)
    assert masked_sum(x, mask).item() == pytest.approx(sum(values))
    assert masked_mean(x, mask).item() == pytest.approx(mean)
    assert masked_var(x, mask).item() == pytest.approx(var)
    for shift_mean, offset in ((True, 0.0), (False, mean)):
        expected = [(v - mean) / (var + 1e-8) ** 0.5 + offset for v in values]
        whitened = masked_whiten(x, mask, shift_mean=shift_mean).values
        assert kept(whitened, mask) == pytest.approx(expected)
        assert masked_mean(whitened, mask).item() == pytest.approx(offset, abs=1e-12)
        assert masked_var(whitened, mask).item() == pytest.approx(1)
    for row, (line, counts) in enumerate(zip(x, mask, strict=True)):
        assert masked_sum(x, mask, dim=1)[row].item() == pytest.approx(sum(kept(line, counts)))


@pytest.mark.parametrize("name", STATISTICS)
def test_garbage_outside_the_mask_changes_neither_value_nor_gradient(name):
    x, mask = random_case()
    assert_gradient_matches(STATISTICS[name], x, mask=mask)


@pytest.mark.parametrize(("count", "mean"), [(0, 0.0), (1, 5.0)])
def test_one_element_or_none_does_not_divide_by_zero(count, mean):
    x, mask = torch.tensor([NAN, 5.0, NAN]), torch.tensor([False, count == 1, False])
    assert masked_mean(x, mask) == mean
    assert masked_var(x, mask) == 0
    assert masked_whiten(x, mask).values.tolist() == [0, 0, 0]
    assert masked_whiten(x, mask, shift_mean=False).values.tolist() == [0, mean, 0]


def test_the_variance_is_accurate_for_a_large_mean():
    x = torch.tensor([1e4 + 0.5, 1e4 - 0.5], dtype=torch.float32)
    assert masked_var(x, torch.tensor([True, True])).item() == pytest.approx(0.25)


@pytest.mark.parametrize("shift_mean", [True, False])
def test_two_ranks_whiten_like_one(shift_mean):
    x, mask = random_case()
    shares = [(x[:1], mask[:1]), (x[1:], mask[1:])]
    whitened = on_two_ranks(partial(masked_whiten, shift_mean=shift_mean), shares)
    expected = masked_whiten(x, mask, shift_mean=shift_mean)
    torch.testing.assert_close(torch.cat([part.values for part in whitened]), expected.values)
    for part in whitened:
        torch.testing.assert_close((part.var, part.scale), (expected.var, expected.scale))
    for var in on_two_ranks(masked_var, shares):
        torch.testing.assert_close(var, masked_var(x, mask))


def aggregate(loss, mask, aggregation, max_tokens=10):
    """Return the loss of an optimizer step, computed in a loop."""
    rows = [kept(line, counts) for line, counts in zip(loss, mask, strict=True) if counts.any()]
    if aggregation == "token":
        return sum(map(sum, rows)) / sum(map(len, rows))
    if aggregation == "sequence":
        return sum(sum(row) / len(row) for row in rows) / len(rows)
    return sum(map(sum, rows)) / (len(rows) * max_tokens)


@pytest.mark.parametrize("aggregation", ["token", "sequence", "constant"])
@pytest.mark.parametrize("splits", [[7], [3, 4], [1, 1, 5], [1] * 7])
def test_token_weights_do_not_depend_on_micro_batches(aggregation, splits):
    loss, mask = random_case(shape=(7, 5))
    mask[2] = False  # a row without a token inside the mask
    totals = {"total_tokens": mask.sum(), "total_sequences": mask.any(1).sum(), "max_tokens": 10}
    parts = zip(loss.split(splits), mask.split(splits), strict=True)
    weights = [(token_weights(m, aggregation, **totals), x) for x, m in parts]
    total = sum((w * x).sum() for w, x in weights)
    assert total.item() == pytest.approx(aggregate(loss, mask, aggregation), rel=1e-6)
    assert (torch.cat([w for w, _ in weights])[~mask] == 0).all()


def test_token_weights_by_hand():
    mask = torch.tensor([[True, False, True], [False, True, False]])
    totals = {"total_tokens": 3, "total_sequences": 2, "max_tokens": 4}
    third, eighth = pytest.approx(1 / 3), 1 / 8
    assert token_weights(mask, "token", **totals).tolist() == [[third, 0, third], [0, third, 0]]
    assert token_weights(mask, "sequence", **totals).tolist() == [[0.25, 0, 0.25], [0, 0.5, 0]]
    assert token_weights(mask, "constant", **totals).tolist() == [[eighth, 0, eighth], [0, eighth, 0]]


def test_unknown_aggregation():
    with pytest.raises(ValueError, match=r"^aggregation must be .*'mean'$"):
        token_weights(torch.ones(1, 1, dtype=torch.bool), "mean", total_tokens=1, total_sequences=1, max_tokens=1)
