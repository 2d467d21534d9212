import math

import pytest
import torch

from lit_rlhf.algorithms.objectives import Clip, Objective, probability_ratio

NAN = float("nan")
SETTINGS = [
    {},
    {"eps": 0.1},
    {"eps": 0.2, "eps_high": 0.5},
    {"dual": 3.0},
    {"eps": 0.1, "eps_high": 0.28, "dual": 1.2},
]


def random_case(seed=0, shape=(30, 20)):
    """Ratios well on both sides of every bound; 0 stands nowhere among the advantages."""
    g = torch.Generator().manual_seed(seed)
    old = -torch.rand(shape, generator=g, dtype=torch.float64) * 5
    logprobs = old + torch.randn(shape, generator=g, dtype=torch.float64)
    advantages = torch.randn(shape, generator=g, dtype=torch.float64)
    return {
        "logprobs": logprobs.requires_grad_(),
        "old_logprobs": old,
        "advantages": advantages,
        "mask": torch.rand(shape, generator=g) < 0.7,
    }


def clip_by_definition(ratio, advantage, eps=0.2, eps_high=None, dual=None):
    bounded = max(1 - eps, min(1 + (eps_high or eps), ratio))
    objective = min(ratio * advantage, bounded * advantage)
    return -max(objective, dual * advantage) if dual and advantage < 0 else -objective


def one(objective, ratio, advantage):
    mask = torch.tensor([[True]])
    log_ratio = torch.tensor([[math.log(ratio)]], dtype=torch.float64)
    terms = {"old_logprobs": torch.zeros_like(log_ratio), "advantages": torch.full_like(log_ratio, advantage)}
    return objective(logprobs=log_ratio, mask=mask, **terms).item()


@pytest.mark.parametrize(
    ("setting", "ratio", "advantage", "loss"),
    [
        ({}, 1.0, 2.0, -2.0),
        ({}, 1.5, 2.0, -2.4),  # cut at 1.2
        ({}, 0.5, 2.0, -1.0),  # moved the wrong way: not cut
        ({}, 0.5, -2.0, 1.6),  # cut at 0.8
        ({}, 5.0, -2.0, 10.0),  # moved the wrong way: not cut
        ({"eps_high": 0.4}, 1.5, 2.0, -2.8),
        ({"eps_high": 0.4}, 0.5, -2.0, 1.6),
        ({"dual": 3.0}, 5.0, -2.0, 6.0),  # at most −3 A
        ({"dual": 3.0}, 2.0, -2.0, 4.0),
        ({"dual": 3.0}, 5.0, 2.0, -2.4),  # dual only where A < 0
    ],
)
def test_numbers_by_hand(setting, ratio, advantage, loss):
    assert one(Clip(**setting), ratio, advantage) == pytest.approx(loss)
    assert clip_by_definition(ratio, advantage, **setting) == pytest.approx(loss)


@pytest.mark.parametrize("setting", SETTINGS)
def test_equals_a_loop(setting):
    case = random_case()
    loss = Clip(**setting)(**case)
    for row, column in case["mask"].nonzero().tolist():
        ratio = math.exp((case["logprobs"] - case["old_logprobs"])[row, column].item())
        expected = clip_by_definition(ratio, case["advantages"][row, column].item(), **setting)
        assert loss[row, column].item() == pytest.approx(expected)
    assert (loss[~case["mask"]] == 0).all()


@pytest.mark.parametrize("setting", SETTINGS)
def test_clipped_marks_the_tokens_without_gradient(setting):
    case, objective = random_case(), Clip(**setting)
    objective(**case).sum().backward()
    clipped = objective.clipped(**case)
    assert torch.equal(clipped, (case["logprobs"].grad == 0) & case["mask"])
    assert 0 < clipped.sum() < case["mask"].sum()


@pytest.mark.parametrize("setting", SETTINGS)
def test_gradient_at_ratio_one_is_minus_the_advantage(setting):
    case = random_case()
    case["logprobs"] = case["old_logprobs"].clone().requires_grad_()
    Clip(**setting)(**case).sum().backward()
    torch.testing.assert_close(case["logprobs"].grad, torch.where(case["mask"], -case["advantages"], 0.0))
    assert not Clip(**setting).clipped(**case).any()


def test_gradients_flow_into_logprobs_alone():
    case = random_case()
    case["old_logprobs"].requires_grad_()
    case["advantages"].requires_grad_()
    Clip()(**case).sum().backward()
    assert case["logprobs"].grad.abs().sum() > 0
    assert case["old_logprobs"].grad is None
    assert case["advantages"].grad is None


@pytest.mark.parametrize("garbage", [NAN, float("inf"), -float("inf"), 1e30])
@pytest.mark.parametrize("name", ["logprobs", "old_logprobs", "advantages"])
def test_garbage_outside_changes_neither_value_nor_gradient(name, garbage):
    objective, results = Clip(dual=3.0), []
    for outside in (0.0, garbage):
        case = random_case()
        case[name] = torch.where(case["mask"], case[name].detach(), outside)
        case["logprobs"] = case["logprobs"].detach().requires_grad_()
        loss = objective(**case)
        loss.sum().backward()
        results.append((loss.detach(), case["logprobs"].grad, objective.clipped(**case)))
    for expected, spoilt in zip(*results, strict=True):
        torch.testing.assert_close(spoilt, expected)
        assert (spoilt[~case["mask"]] == 0).all()


def test_ratio():
    mask = torch.tensor([[True, True, True, False]])
    ratio = probability_ratio(torch.tensor([[-1.0, 900.0, -900.0, NAN]]), torch.tensor([[-2.0, 0.0, 0.0, 1.0]]), mask)
    torch.testing.assert_close(ratio, torch.tensor([[math.e, math.exp(20), math.exp(-20), 1.0]]))


@pytest.mark.parametrize("log_ratio", [-1e4, 1e4])
@pytest.mark.parametrize("advantage", [-1.0, 1.0])
def test_a_runaway_ratio_stays_finite(log_ratio, advantage):
    logprobs = torch.tensor([[log_ratio]], requires_grad=True)
    terms = {"advantages": torch.tensor([[advantage]]), "mask": torch.tensor([[True]])}
    loss = Clip()(logprobs=logprobs, old_logprobs=torch.zeros(1, 1), **terms)
    loss.sum().backward()
    assert torch.isfinite(loss).all()
    assert torch.isfinite(logprobs.grad).all()


def test_an_objective_clips_nothing_unless_it_says_so():
    class Plain(Objective):
        def __call__(self, *, logprobs, old_logprobs, advantages, mask):
            return torch.where(mask, -logprobs * advantages, 0.0)

    assert not Plain().clipped(**random_case()).any()


@pytest.mark.parametrize(
    ("field", "value"),
    [("eps", 0.0), ("eps", 1.0), ("eps", NAN), ("eps_high", 0.0), ("eps_high", -0.2), ("dual", 1.0), ("dual", 0.5)],
)
def test_out_of_range(field, value):
    with pytest.raises(ValueError, match=f"^{field} must .*{value}"):
        Clip(**{field: value})
