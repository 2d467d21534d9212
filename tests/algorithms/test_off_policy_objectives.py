"""What is particular to CISPO and DPPO; what holds for every objective is in test_objectives.py."""

import pytest
import torch

from lit_rlhf.algorithms.off_policy_objectives import CISPO, DPPO

NAN, INFINITY = float("nan"), float("inf")


def terms(probabilities, old, advantages):
    """Return the arguments of an objective for one response, with a gradient for the log-probabilities."""
    logprobs, old_logprobs = (torch.tensor([p], dtype=torch.float64).log() for p in (probabilities, old))
    return {
        "logprobs": logprobs.requires_grad_(),
        "old_logprobs": old_logprobs,
        "advantages": torch.tensor([advantages], dtype=torch.float64),
        "mask": torch.ones(1, len(old), dtype=torch.bool),
    }


def gradient(objective, case):
    return torch.autograd.grad(objective(**case).loss.sum(), case["logprobs"])[0][0].tolist()


@pytest.mark.parametrize(
    ("objective", "weights", "clipped"),
    [
        (CISPO(), [0.1, 2.0, 5.0], [False, False, True]),
        (CISPO(eps_high=0.5), [0.1, 1.5, 1.5], [False, True, True]),
        (CISPO(eps_low=0.25, eps_high=7.0), [0.75, 2.0, 8.0], [True, False, False]),
    ],
)
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_every_token_keeps_a_gradient_of_bounded_weight(objective, weights, clipped, sign):
    """The ratios are 0.1, 2 and 8; the derivative of the loss to a log-probability is −weight · advantage."""
    case = terms([0.01, 0.2, 0.8], [0.1, 0.1, 0.1], [sign, 2 * sign, sign])
    result = objective(**case)
    expected = [-weight * a for weight, a in zip(weights, case["advantages"][0].tolist(), strict=True)]
    assert gradient(objective, case) == pytest.approx(expected)
    assert result.ratio[0].tolist() == pytest.approx([0.1, 2.0, 8.0])
    assert result.clipped[0].tolist() == clipped


@pytest.mark.parametrize(
    ("probability", "old", "advantage", "dropped"),
    [
        (0.75, 0.5, 1.0, True),  # it has grown by more than 0.2, and should grow
        (0.75, 0.5, -1.0, False),  # it has grown, but should shrink
        (0.25, 0.5, -1.0, True),
        (0.25, 0.5, 1.0, False),
        (0.65, 0.5, 1.0, False),  # a ratio of 1.3, which the clip of PPO would remove
        (0.10, 0.001, 1.0, False),  # a ratio of 100
        (0.99, 0.75, 1.0, True),  # a ratio of 1.32 only
        (0.75, 0.5, 0.0, False),
        (0.25, 0.5, 0.0, False),
    ],
)
def test_tokens_whose_probability_has_moved_far_are_dropped(probability, old, advantage, dropped):
    case, ratio = terms([probability], [old], [advantage]), probability / old
    result = DPPO(coef=0.0)(**case)
    assert result.clipped.tolist() == [[dropped]]
    assert result.loss.tolist() == [[pytest.approx(0.0 if dropped else -ratio * advantage)]]
    assert gradient(DPPO(coef=0.0), case) == [pytest.approx(0.0 if dropped else -ratio * advantage)]


def test_the_penalty_pulls_dropped_tokens_back():
    """Its gradient is 2 c log ρ."""
    case = terms([0.75, 0.25], [0.5, 0.5], [1.0, -1.0])
    logs = torch.tensor([1.5, 0.5], dtype=torch.float64).log()
    assert gradient(DPPO(coef=3.0), case) == pytest.approx((6.0 * logs).tolist())
    assert DPPO(coef=3.0)(**case).loss[0].tolist() == pytest.approx((3.0 * logs**2).tolist())


@pytest.mark.parametrize(
    ("objective", "field", "value"),
    [(CISPO, "eps_low", value) for value in (0.0, 1.1, NAN)]
    + [(CISPO, "eps_high", value) for value in (0.0, -1.0, NAN)]
    + [(DPPO, "delta", value) for value in (0.0, 1.0, NAN)]
    + [(DPPO, "coef", value) for value in (-1.0, INFINITY, NAN)],
)
def test_out_of_range(objective, field, value):
    with pytest.raises(ValueError, match=rf"^objective\.{field} must .*not {value}$"):
        objective(**{field: value})
