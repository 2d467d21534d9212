import math
from itertools import permutations

import pytest
import torch

from lit_rlhf.algorithms.preferences import bradley_terry, implicit_reward, plackett_luce

NAN, INF = float("nan"), float("inf")
LOG = math.log


def double(*rows):
    return torch.tensor(rows, dtype=torch.float64)


def random_case(seed=0, rows=9, places=5):
    """Return scores and a mask of 0 to ``places`` responses per row."""
    g = torch.Generator().manual_seed(seed)
    scores = 2 * torch.randn(rows, places, generator=g, dtype=torch.float64)
    counts = torch.arange(rows) % (places + 1)
    return scores, torch.arange(places) < counts[:, None]


def by_choices(scores):
    """Return −log of the product of softmax choices among the remaining responses, computed with Python floats."""
    probability = 1.0
    for place in range(len(scores)):
        remaining = [math.exp(score) for score in scores[place:]]
        probability *= remaining[0] / sum(remaining)
    return -math.log(probability)


def value_and_gradient(loss, scores, *others):
    scores = scores.detach().clone().requires_grad_()
    value = loss(scores, *others)
    value.sum().backward()
    return value.detach(), scores.grad


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


@pytest.mark.parametrize(
    ("chosen", "rejected", "margin", "smoothing", "loss"),
    [
        (0.0, 0.0, None, 0.0, LOG(2)),
        (LOG(3), 0.0, None, 0.0, LOG(4 / 3)),  # σ = 3/4
        (0.0, LOG(3), None, 0.0, LOG(4)),
        (5 + LOG(3), 5.0, None, 0.0, LOG(4 / 3)),
        (LOG(3), 0.0, LOG(3), 0.0, LOG(2)),  # ahead by exactly the margin
        (LOG(3), 0.0, -LOG(3), 0.0, LOG(10 / 9)),  # σ = 9/10
        (LOG(3), 0.0, None, 0.25, 0.75 * LOG(4 / 3) + 0.25 * LOG(4)),
        (LOG(9), 0.0, LOG(3), 0.25, 0.75 * LOG(4 / 3) + 0.25 * LOG(4)),
        (1000.0, 0.0, None, 0.0, 0.0),
        (0.0, 1000.0, None, 0.0, 1000.0),
        (1000.0, 0.0, None, 0.25, 250.0),
    ],
)
def test_bradley_terry_by_hand(chosen, rejected, margin, smoothing, loss):
    margin = None if margin is None else double(margin)
    found = bradley_terry(double(chosen), double(rejected), margin, smoothing)
    assert found.tolist() == pytest.approx([loss], abs=1e-12)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.49])
@pytest.mark.parametrize("with_margin", [False, True])
def test_bradley_terry_equals_a_loop(smoothing, with_margin):
    chosen, rejected, margins = torch.randn(3, 20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = bradley_terry(chosen, rejected, margins if with_margin else None, smoothing)
    expected = []
    for c, r, m in zip(chosen.tolist(), rejected.tolist(), margins.tolist(), strict=True):
        p = sigmoid(c - r - (m if with_margin else 0.0))
        expected.append(-(1 - smoothing) * math.log(p) - smoothing * math.log(1 - p))
    assert found.tolist() == pytest.approx(expected, rel=1e-10)


def test_zero_smoothing_and_zero_margin_are_bitwise_exact():
    chosen, rejected = torch.randn(2, 20, generator=torch.Generator().manual_seed(0))
    plain = bradley_terry(chosen, rejected)
    assert torch.equal(plain, bradley_terry(chosen, rejected, label_smoothing=0.0))
    assert torch.equal(plain, bradley_terry(chosen, rejected, torch.zeros(20)))


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_gradient_of_bradley_terry(smoothing):
    """It is σ(d) − 1 + ε, so the smoothed loss is smallest where σ(d) = 1 − ε."""
    chosen = double(-2.0, 0.0, LOG(4)).requires_grad_()
    rejected = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    bradley_terry(chosen, rejected, label_smoothing=smoothing).sum().backward()
    expected = [sigmoid(d) - 1 + smoothing for d in chosen.tolist()]
    assert chosen.grad.tolist() == pytest.approx(expected, abs=1e-12)
    assert rejected.grad.tolist() == pytest.approx([-g for g in expected], abs=1e-12)
    assert (abs(float(chosen.grad[2])) < 1e-12) is (smoothing == 0.2)  # σ(log 4) = 0.8


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_gradcheck_of_bradley_terry(smoothing):
    x = torch.randn(3, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda c, r, m: bradley_terry(c, r, m, smoothing), tuple(x))


@pytest.mark.parametrize("smoothing", [-0.1, 0.5, 1.0, NAN])
def test_label_smoothing_out_of_range(smoothing):
    with pytest.raises(ValueError, match=rf"^label_smoothing must be in \[0, 0\.5\), not {smoothing}$"):
        bradley_terry(torch.zeros(1), torch.zeros(1), label_smoothing=smoothing)


@pytest.mark.parametrize(
    ("scores", "loss"),
    [
        ([LOG(3), LOG(2), LOG(1)], LOG(2) + LOG(3 / 2)),  # 3/6 · 2/3
        ([LOG(1), LOG(2), LOG(3)], LOG(6) + LOG(5 / 2)),  # 1/6 · 2/5
        ([LOG(2), LOG(3), LOG(1)], LOG(3) + LOG(4 / 3)),  # 2/6 · 3/4
        ([LOG(3), 0.0], LOG(4 / 3)),
        ([7.0], 0.0),
        ([1000.0, 0.0, -1000.0], 0.0),
        ([-1000.0, 0.0, 1000.0], 3000.0),
    ],
)
def test_plackett_luce_by_hand(scores, loss):
    assert plackett_luce(double(scores)).tolist() == pytest.approx([loss], abs=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_plackett_luce_equals_a_loop(seed):
    scores, mask = random_case(seed)
    expected = [by_choices(row[: int(there.sum())].tolist()) for row, there in zip(scores, mask, strict=True)]
    assert plackett_luce(scores, mask).tolist() == pytest.approx(expected, rel=1e-10, abs=1e-12)
    assert mask.sum(1).tolist()[:3] == [0, 1, 2]
    assert plackett_luce(scores, mask)[:2].tolist() == [0, 0]


def test_a_hole_in_the_mask():
    scores = double([LOG(3), NAN, LOG(2), LOG(1)])
    mask = torch.tensor([[True, False, True, True]])
    assert plackett_luce(scores, mask).tolist() == pytest.approx([LOG(3)])
    value, gradient = value_and_gradient(plackett_luce, scores, mask)
    without = value_and_gradient(plackett_luce, scores[:, [0, 2, 3]])
    assert torch.equal(value, without[0])
    torch.testing.assert_close(gradient[:, [0, 2, 3]], without[1])
    assert gradient[0, 1] == 0


@pytest.mark.parametrize("places", range(1, 7))
def test_equal_scores(places):
    assert plackett_luce(torch.full((1, places), 3.0)).item() == pytest.approx(LOG(math.factorial(places)), rel=1e-6)


@pytest.mark.parametrize("places", [2, 3, 4, 5])
def test_the_probabilities_of_all_orders_sum_to_1(places):
    scores = torch.randn(places, generator=torch.Generator().manual_seed(places), dtype=torch.float64)
    orders = torch.tensor(list(permutations(range(places))))
    assert plackett_luce(scores[orders]).neg().exp().sum().item() == pytest.approx(1, abs=1e-12)


def test_plackett_luce_of_two_places_is_bradley_terry():
    scores = 5 * torch.randn(200, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    of_rankings = value_and_gradient(plackett_luce, scores)
    of_pairs = value_and_gradient(lambda s: bradley_terry(s[:, 0], s[:, 1]), scores)
    for found, expected in zip(of_rankings, of_pairs, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("garbage", [0.0, 1e30, INF, -INF, NAN])
@pytest.mark.parametrize("more", [0, 1, 4])
def test_padding_changes_neither_value_nor_gradient(garbage, more):
    scores, mask = random_case()
    value, gradient = value_and_gradient(plackett_luce, torch.where(mask, scores, 0.0), mask)
    wide = torch.nn.functional.pad(torch.where(mask, scores, garbage), (0, more), value=garbage)
    wide_value, wide_gradient = value_and_gradient(plackett_luce, wide, torch.nn.functional.pad(mask, (0, more)))
    torch.testing.assert_close(wide_value, value, rtol=0, atol=1e-12)
    torch.testing.assert_close(wide_gradient[:, :5], gradient, rtol=0, atol=1e-12)
    assert (wide_gradient[:, :5][~mask] == 0).all()
    assert (wide_gradient[:, 5:] == 0).all()


@pytest.mark.parametrize("swapped", [(0, 1), (1, 2), (2, 3), (0, 3)])
def test_swapping_two_ranks_changes_the_loss(swapped):
    scores = double([2.0, 1.0, 0.5, -1.0])
    order = list(range(4))
    first, second = swapped
    order[first], order[second] = second, first
    assert plackett_luce(scores[:, order]).item() > plackett_luce(scores).item() + 0.1


def test_only_score_differences_matter():
    scores, mask = random_case()
    shift = 10 * torch.randn(len(scores), 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for found, expected in zip(
        value_and_gradient(plackett_luce, scores + shift, mask),
        value_and_gradient(plackett_luce, scores, mask),
        strict=True,
    ):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    chosen, rejected = scores[:, 0], scores[:, 1]
    moved = bradley_terry(chosen + shift[:, 0], rejected + shift[:, 0])
    torch.testing.assert_close(moved, bradley_terry(chosen, rejected), rtol=0, atol=1e-10)


def test_gradients_of_a_row_sum_to_0():
    scores, mask = random_case()
    gradient = value_and_gradient(plackett_luce, scores, mask)[1]
    assert (gradient.sum(1).abs() < 1e-12).all()
    assert (gradient[mask.sum(1) > 1].abs().sum(1) > 0.01).all()


def test_gradcheck_of_plackett_luce():
    scores, mask = random_case(rows=6, places=4)
    assert torch.autograd.gradcheck(lambda s: plackett_luce(s, mask), scores.requires_grad_())
    assert torch.autograd.gradgradcheck(lambda s: plackett_luce(s, mask), scores)


def test_far_apart_scores_stay_finite():
    scores = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 1e4, 0.0]])
    assert all(torch.isfinite(x).all() for x in value_and_gradient(plackett_luce, scores))
    pairs = value_and_gradient(lambda s: bradley_terry(s[:, 0], s[:, 1], label_smoothing=0.1), scores)
    assert all(torch.isfinite(x).all() for x in pairs)


def test_implicit_reward():
    logprobs = double(-10.0, -3.0).requires_grad_()
    reward = implicit_reward(logprobs, double(-12.0, -1.0), beta=0.25)
    assert reward.tolist() == [0.5, -0.5]
    reward.sum().backward()
    assert logprobs.grad.tolist() == [0.25, 0.25]


def test_the_optimum_of_the_expected_loss_is_the_true_reward():
    """Gradient descent on all orders, each weighted by its probability, finds the differences of the rewards."""
    truth = double([1.0, 0.0, -0.5])
    orders = torch.tensor(list(permutations(range(3))))
    weights = plackett_luce(truth[0][orders]).neg().exp()
    scores = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([scores], max_iter=200, tolerance_grad=1e-12, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = (weights * plackett_luce(scores[orders])).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    torch.testing.assert_close(scores - scores.mean(), truth[0] - truth.mean(), rtol=0, atol=1e-5)
