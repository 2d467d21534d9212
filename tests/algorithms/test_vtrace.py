"""V-trace with ratios; without them it is in test_advantages.py, among the other estimators."""

from dataclasses import replace
from functools import partial
from itertools import product
from math import inf, prod

import pytest
import torch

from lit_rlhf.algorithms.advantages import GAE, MonteCarlo
from lit_rlhf.algorithms.vtrace import VTrace
from lit_rlhf.testing import assert_gradient_matches
from lit_rlhf.types import Trajectory

NAN = float("nan")
SETTINGS = [
    VTrace(),
    VTrace(gamma=0.9, lam=0.7),
    VTrace(2.0, 0.5, 0.9, 1.0),
    VTrace(inf, inf, 1.0, 0.95),
    VTrace(inf, 1.0, 0.5, 0.0),
    VTrace(0.7, 0.6, 0.0, 0.5),
]
assert_same = partial(torch.testing.assert_close, rtol=0, atol=1e-10)


def random_trajectory(seed, rows=6, time=8, values=True, bootstrap=True):
    """Return random rewards and ratios on both sides of 1, with holes in the mask, a full row and an empty row."""
    g = torch.Generator().manual_seed(seed)
    mask = torch.rand(rows, time, generator=g) < 0.6
    mask[0], mask[1], mask[2] = True, False, torch.arange(time) == 3
    numbers = torch.randn(3, rows, time, generator=g, dtype=torch.float64)
    return Trajectory(
        rewards=numbers[0],
        values=numbers[1] if values else None,
        mask=mask,
        bootstrap=torch.randn(rows, generator=g, dtype=torch.float64) if bootstrap else None,
        ratios=numbers[2].exp(),
    )


def by_definition(estimator, trajectory):
    """Return advantages and targets by the sums of IMPALA's equation 1, in a loop with Python floats."""
    gamma, lam = estimator.gamma, estimator.lam
    advantages, returns = torch.zeros(2, *trajectory.mask.shape, dtype=torch.float64)
    for row, counts in enumerate(trajectory.mask):
        steps = counts.nonzero().flatten().tolist()
        r, ratios = ([x[row, t].item() for t in steps] for x in (trajectory.rewards, trajectory.ratios))
        v = [0.0 if trajectory.values is None else trajectory.values[row, t].item() for t in steps]
        v.append(0.0 if trajectory.bootstrap is None else trajectory.bootstrap[row].item())
        rho = [min(estimator.rho_bar, ratio) for ratio in ratios]
        c = [lam * min(estimator.c_bar, ratio) for ratio in ratios]
        n = len(steps)
        delta = [rho[t] * (r[t] + gamma * v[t + 1] - v[t]) for t in range(n)]
        target = [v[s] + sum(gamma ** (t - s) * prod(c[s:t]) * delta[t] for t in range(s, n)) for s in range(n)]
        target.append(v[n])
        for k, t in enumerate(steps):
            following = lam * target[k + 1] + (1 - lam) * v[k + 1]
            returns[row, t], advantages[row, t] = target[k], rho[k] * (r[k] + gamma * following - v[k])
    return advantages, returns


def test_numbers_by_hand():
    """The second row has a hole; its bootstrap is 16.

    In the first row, δ = 1 + 2 − 4 = −1 and 3 − 2 = 1; with ratios of ½ and 4 the errors are v₁ − V₁ = 1 · 1 and
    v₀ − V₀ = ½ · −1 + ½ · 1 = 0, and A = ½ · (−1 + 1) and 1 · 1. In the second row, δ = 0 + 8 − 4 = 4 and
    2 + 16 − 8 = 10, with ratios of 3 and 0.1.
    """
    trajectory = Trajectory(
        rewards=torch.tensor([[1.0, 3.0, NAN], [0.0, NAN, 2.0]]),
        values=torch.tensor([[4.0, 2.0, NAN], [4.0, NAN, 8.0]]),
        mask=torch.tensor([[True, True, False], [True, False, True]]),
        bootstrap=torch.tensor([0.0, 16.0]),
        ratios=torch.tensor([[0.5, 4.0, NAN], [3.0, NAN, 0.1]]),
    )
    estimates = VTrace()(trajectory)
    torch.testing.assert_close(estimates.returns, torch.tensor([[4.0, 3.0, 0.0], [9.0, 0.0, 9.0]]))
    torch.testing.assert_close(estimates.advantages, torch.tensor([[0.0, 1.0, 0.0], [5.0, 0.0, 1.0]]))
    estimates = VTrace(rho_bar=2.0)(trajectory)
    torch.testing.assert_close(estimates.returns, torch.tensor([[4.5, 4.0, 0.0], [13.0, 0.0, 9.0]]))
    torch.testing.assert_close(estimates.advantages, torch.tensor([[0.5, 2.0, 0.0], [10.0, 0.0, 1.0]]))


@pytest.mark.parametrize("estimator", SETTINGS, ids=str)
@pytest.mark.parametrize("values", [True, False])
@pytest.mark.parametrize("bootstrap", [True, False])
def test_equals_the_definition(estimator, values, bootstrap):
    for seed in range(3):
        trajectory = random_trajectory(seed, values=values, bootstrap=bootstrap)
        estimates = estimator(trajectory)
        advantages, returns = by_definition(estimator, trajectory)
        assert_same(estimates.advantages, advantages)
        assert_same(estimates.returns, returns)


@pytest.mark.parametrize("gamma", [1.0, 0.9, 0.0])
@pytest.mark.parametrize("lam", [1.0, 0.7, 0.0])
@pytest.mark.parametrize("bound", [1.0, 3.0, inf])
def test_on_policy_it_is_gae(gamma, lam, bound):
    on_policy = replace(random_trajectory(0), ratios=torch.ones(6, 8, dtype=torch.float64))
    others = [GAE(gamma, lam), *([MonteCarlo(gamma)] if lam == 1.0 else [])]
    for trajectory in (on_policy, replace(on_policy, ratios=None)):
        estimates = VTrace(bound, min(bound, 2.0), gamma, lam)(trajectory)
        for other in others:
            assert_same(estimates.advantages, other(trajectory).advantages)
            assert_same(estimates.returns, other(trajectory).returns)


@pytest.mark.parametrize("estimator", SETTINGS, ids=str)
def test_garbage_outside_the_mask_changes_neither_value_nor_gradient(estimator):
    assert_gradient_matches(estimator, mask=random_trajectory(1).mask)


STATES = [word for length in range(3) for word in product(range(3), repeat=length)]  # at most two tokens of three


def decisions(seed):
    """Return two policies and the rewards of every state, each a distribution or numbers for three tokens."""
    g = torch.Generator().manual_seed(seed)
    numbers = torch.randn(3, len(STATES), 3, generator=g, dtype=torch.float64)
    return [dict(zip(STATES, x, strict=True)) for x in (numbers[0].softmax(1), numbers[1].softmax(1), numbers[2])]


def exact_value(policy, rewards, state=(), steps=3):
    """Return the expected sum of the rewards of ``steps`` tokens in all."""
    if len(state) == steps:
        return 0.0
    following = [exact_value(policy, rewards, (*state, token), steps) for token in range(3)]
    return float((policy[state] * (rewards[state] + torch.tensor(following))).sum())


def all_responses(policy, behaviour, rewards, values):
    """Return every response of three tokens as a trajectory, and its probability under the behaviour policy."""
    rows = [[(word[:t], word[t]) for t in range(3)] for word in product(range(3), repeat=3)]

    def table(x):
        return torch.stack([torch.stack([x[state][token] for state, token in row]) for row in rows])

    drawn = table(behaviour)
    trajectory = Trajectory(
        rewards=table(rewards),
        values=torch.tensor([[values[state] for state, _ in row] for row in rows], dtype=torch.float64),
        mask=torch.ones(len(rows), 3, dtype=torch.bool),
        ratios=table(policy) / drawn,
    )
    return trajectory, drawn.prod(1)


@pytest.mark.parametrize("seed", range(3))
def test_without_bounds_the_targets_are_the_values_of_the_actor_on_average(seed):
    """Whatever the critic says, the mean over the engine's responses is the actor's expected return."""
    policy, behaviour, rewards = decisions(seed)
    trajectory, probability = all_responses(policy, behaviour, rewards, dict.fromkeys(STATES, 0.7))
    mean = (probability * VTrace(inf, inf)(trajectory).returns[:, 0]).sum()
    assert float(mean) == pytest.approx(exact_value(policy, rewards))
    assert float(mean) != pytest.approx(exact_value(behaviour, rewards), abs=0.01)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("c_bar", [0.4, 1.0])
def test_the_fixed_point_is_the_policy_of_rho_bar(seed, c_bar):
    """Section 4.1 of IMPALA: the targets are on average the values of the policy ∝ min(ρ̄ μ, π), once V holds these."""
    policy, behaviour, rewards = decisions(seed)
    between = {state: torch.minimum(behaviour[state], policy[state]) for state in STATES}
    between = {state: x / x.sum() for state, x in between.items()}
    values = {state: exact_value(between, rewards, state) for state in STATES}
    trajectory, probability = all_responses(policy, behaviour, rewards, values)
    mean = (probability * VTrace(1.0, c_bar)(trajectory).returns[:, 0]).sum()
    assert float(mean) == pytest.approx(values[()])
    assert abs(values[()] - exact_value(policy, rewards)) > 0.01


@pytest.mark.parametrize(
    ("field", "value"),
    [("rho_bar", value) for value in (0.0, -1.0, NAN)]
    + [("c_bar", value) for value in (0.0, 1.5, NAN)]
    + [(field, value) for field in ("gamma", "lam") for value in (-0.01, 1.01, NAN)],
)
def test_out_of_range(field, value):
    with pytest.raises(ValueError, match=rf"^advantages\.{field} must .*not {value}$"):
        VTrace(**{field: value})


def test_ratios_of_another_shape_are_refused():
    x = torch.ones(2, 3)
    with pytest.raises(ValueError, match=r"^shapes differ: .*ratios \[2, 1\]$"):
        Trajectory(rewards=x, mask=x.bool(), ratios=x[:, :1])
