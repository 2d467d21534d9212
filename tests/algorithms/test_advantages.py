from functools import partial

import pytest
import torch

from lit_rlhf.algorithms.advantages import (
    GAE,
    TD0,
    MonteCarlo,
    NStep,
    discounted_sum,
    n_step_sum,
    td_errors,
)
from lit_rlhf.algorithms.group_baselines import GroupNormalized, LeaveOneOut
from lit_rlhf.algorithms.vtrace import VTrace
from lit_rlhf.testing import assert_gradient_matches
from lit_rlhf.types import Trajectory

NAN = float("nan")
GAMMAS = [1.0, 0.9, 0.3, 0.0]
BY_TIME = [
    MonteCarlo(0.9),
    MonteCarlo(1.0),
    MonteCarlo(0.0),
    TD0(0.9),
    NStep(2, 0.9),
    NStep(3, 1.0),
    NStep(3, 0.0),
    GAE(1.0, 0.95),
    GAE(0.9, 0.5),
    GAE(0.0, 0.7),
    GAE(0.9, 0.5, critic_lam=0.8),
    GAE(0.9, length_alpha=0.4),  # λ = 0 for responses of one and two tokens
    GAE(1.0, critic_lam=0.0, length_alpha=2.0),
    VTrace(gamma=0.9, lam=0.5),  # on-policy, since these trajectories have no ratios
]
ALL = [*BY_TIME, LeaveOneOut(), GroupNormalized(), GroupNormalized(divide_by_std=False)]
assert_same = partial(torch.testing.assert_close, rtol=0, atol=1e-10)


def random_trajectory(seed, rows=6, time=8, values=True, bootstrap=True):
    """Return random rewards with a mask that has holes, a full row and an empty row."""
    g = torch.Generator().manual_seed(seed)
    mask = torch.rand(rows, time, generator=g) < 0.6
    mask[0], mask[1], mask[2] = True, False, torch.arange(time) == 3
    return Trajectory(
        rewards=torch.randn(rows, time, generator=g, dtype=torch.float64),
        values=torch.randn(rows, time, generator=g, dtype=torch.float64) if values else None,
        mask=mask,
        bootstrap=torch.randn(rows, generator=g, dtype=torch.float64) if bootstrap else None,
        group=torch.tensor([7, 3, -2, 7, -2, 7])[:rows],
    )


def n_step_return(r, v, gamma, t, n):
    """Return Σ_{k<n} γᵏ rₜ₊ₖ + γⁿ V(t+n), with n limited to the tokens that are left; v ends with the bootstrap."""
    n = min(n, len(r) - t)
    return sum(gamma**k * r[t + k] for k in range(n)) + gamma**n * v[t + n]


def lambda_return(r, v, gamma, t, lam):
    """Return (1 − λ) Σₙ λⁿ⁻¹ G⁽ⁿ⁾, with the remaining weight on the longest return."""
    longest = len(r) - t
    mixed = sum((1 - lam) * lam ** (n - 1) * n_step_return(r, v, gamma, t, n) for n in range(1, longest))
    return mixed + lam ** (longest - 1) * n_step_return(r, v, gamma, t, longest)


def targets(estimator, r, v, t):
    """Return, for token t of one response, the return whose excess over V is the advantage, and the critic's target."""
    n_step, mixed = (partial(f, r, v, estimator.gamma, t) for f in (n_step_return, lambda_return))
    match estimator:
        case MonteCarlo():
            return n_step(len(r)), n_step(len(r))
        case TD0():
            return n_step(1), n_step(1)
        case NStep(n=n):
            return n_step(n), n_step(n)
        case GAE(lam=lam, critic_lam=critic_lam, length_alpha=alpha):
            lam = lam if alpha is None else max(0.0, 1 - 1 / (alpha * len(r)))
            return mixed(lam), mixed(lam if critic_lam is None else critic_lam)
        case VTrace(lam=lam):
            return mixed(lam), mixed(lam)


def by_definition(estimator, trajectory):
    """Return advantages and returns, computed with Python floats in a loop over the tokens inside the mask."""
    advantages, returns = torch.zeros(2, *trajectory.mask.shape, dtype=torch.float64)
    for row, counts in enumerate(trajectory.mask):
        steps = counts.nonzero().flatten().tolist()
        r = [trajectory.rewards[row, t].item() for t in steps]
        v = [0.0 if trajectory.values is None else trajectory.values[row, t].item() for t in steps]
        v.append(0.0 if trajectory.bootstrap is None else trajectory.bootstrap[row].item())
        for k, t in enumerate(steps):
            target, returns[row, t] = targets(estimator, r, v, k)
            advantages[row, t] = target - v[k]
    return advantages, returns


def test_td_errors_by_hand():
    """With a hole and a bootstrap of 16, they are 1 + ½ · 8 − 4, 2 + ½ · 2 − 8 and 4 + ½ · 16 − 2."""
    rewards, values = torch.tensor([[1.0, NAN, 2.0, 4.0, NAN]]), torch.tensor([[4.0, NAN, 8.0, 2.0, NAN]])
    mask, bootstrap = torch.tensor([[True, False, True, True, False]]), torch.tensor([16.0])
    assert td_errors(rewards, values, mask, bootstrap, gamma=0.5).tolist() == [[1.0, 0.0, -5.0, 10.0, 0.0]]
    assert td_errors(rewards, values, mask, gamma=0.5).tolist() == [[1.0, 0.0, -5.0, 2.0, 0.0]]
    assert td_errors(rewards, None, mask, bootstrap, gamma=0.5).tolist() == [[1.0, 0.0, 2.0, 12.0, 0.0]]


@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("seed", range(3))
def test_sums_equal_a_loop(gamma, seed):
    trajectory = random_trajectory(seed)
    x, mask = trajectory.rewards, trajectory.mask
    by_row = gamma * torch.linspace(0.1, 1.0, len(x), dtype=torch.float64)
    whole, scaled, of_3 = torch.zeros(3, *x.shape, dtype=torch.float64)
    for row, counts in enumerate(mask):
        tokens = counts.nonzero().flatten().tolist()
        for k, t in enumerate(tokens):
            following = [x[row, s].item() for s in tokens[k:]]
            whole[row, t] = sum(gamma**j * value for j, value in enumerate(following))
            scaled[row, t] = sum(by_row[row].item() ** j * value for j, value in enumerate(following))
            of_3[row, t] = sum(gamma**j * value for j, value in enumerate(following[:3]))
    spoilt = torch.where(mask, x, NAN)
    assert_same(discounted_sum(spoilt, mask, gamma), whole)
    assert_same(discounted_sum(spoilt, mask, by_row), scaled)
    assert_same(n_step_sum(spoilt, mask, 3, gamma), of_3)
    assert_same(n_step_sum(spoilt, mask, x.shape[1] + 1, gamma), whole)


@pytest.mark.parametrize(
    ("estimator", "advantages", "returns"),
    [
        (MonteCarlo(0.5), [[-1, 0, -4, 2], [2, 2, 0, 0]], [[3, 0, 4, 4], [6, 10, 0, 0]]),
        (TD0(0.5), [[1, 0, -5, 2], [1, 2, 0, 0]], [[5, 0, 3, 4], [5, 10, 0, 0]]),
        (NStep(2, 0.5), [[-1.5, 0, -4, 2], [2, 2, 0, 0]], [[2.5, 0, 4, 4], [6, 10, 0, 0]]),
        (GAE(0.5, 0.5), [[-0.125, 0, -4.5, 2], [1.5, 2, 0, 0]], [[3.875, 0, 3.5, 4], [5.5, 10, 0, 0]]),
        (GAE(0.5, 0.5, critic_lam=1.0), [[-0.125, 0, -4.5, 2], [1.5, 2, 0, 0]], [[3, 0, 4, 4], [6, 10, 0, 0]]),
        # λ = 1 − 1 / (⅔ · 3) = ½ and 1 − 1 / (⅔ · 2) = ¼
        (GAE(0.5, length_alpha=2 / 3), [[-0.125, 0, -4.5, 2], [1.25, 2, 0, 0]], [[3.875, 0, 3.5, 4], [5.25, 10, 0, 0]]),
    ],
)
def test_numbers_by_hand(estimator, advantages, returns):
    """The rows are three tokens with a hole, two tokens of a truncated response, and an empty response."""
    trajectory = Trajectory(
        rewards=torch.tensor([[1.0, NAN, 2.0, 4.0], [1.0, 2.0, NAN, NAN], [NAN] * 4]),
        values=torch.tensor([[4.0, NAN, 8.0, 2.0], [4.0, 8.0, NAN, NAN], [NAN] * 4]),
        mask=torch.tensor([[True, False, True, True], [True, True, False, False], [False] * 4]),
        bootstrap=torch.tensor([0.0, 16.0, NAN]),
    )
    estimates = estimator(trajectory)
    torch.testing.assert_close(estimates.advantages, torch.tensor([*advantages, [0] * 4], dtype=torch.float32))
    torch.testing.assert_close(estimates.returns, torch.tensor([*returns, [0] * 4], dtype=torch.float32))


@pytest.mark.parametrize("estimator", BY_TIME, ids=str)
@pytest.mark.parametrize("values", [True, False])
@pytest.mark.parametrize("bootstrap", [True, False])
def test_equals_the_definition(estimator, values, bootstrap):
    for seed in range(3):
        trajectory = random_trajectory(seed, values=values, bootstrap=bootstrap)
        estimates = estimator(trajectory)
        advantages, returns = by_definition(estimator, trajectory)
        assert_same(estimates.advantages, advantages)
        assert_same(estimates.returns, returns)


@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("values", [True, False])
@pytest.mark.parametrize("bootstrap", [True, False])
@pytest.mark.parametrize("seed", range(2))
def test_limits_of_lambda_and_of_n(gamma, values, bootstrap, seed):
    trajectory = random_trajectory(seed, values=values, bootstrap=bootstrap)
    one_step = TD0(gamma), GAE(gamma, lam=0.0), NStep(1, gamma)
    sampled = MonteCarlo(gamma), GAE(gamma, lam=1.0), NStep(8, gamma), NStep(9, gamma), NStep(1000, gamma)
    for first, *others in (one_step, sampled):
        expected = first(trajectory)
        for estimator in others:
            assert_same(estimator(trajectory).advantages, expected.advantages)
            assert_same(estimator(trajectory).returns, expected.returns)


@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("actor", [{"lam": 0.0}, {"lam": 0.7}, {"length_alpha": 0.3}])
@pytest.mark.parametrize("critic_lam", [0.0, 0.7, 1.0])
def test_decoupled(gamma, actor, critic_lam):
    trajectory = random_trajectory(0)
    both = GAE(gamma, **actor, critic_lam=critic_lam)(trajectory)
    assert_same(both.advantages, GAE(gamma, **actor)(trajectory).advantages)
    assert_same(both.returns, GAE(gamma, critic_lam)(trajectory).returns)


@pytest.mark.parametrize("alpha", [0.05, 0.3, 1.0, 20.0])
@pytest.mark.parametrize("gamma", GAMMAS)
def test_lambda_of_the_length(alpha, gamma):
    trajectory = random_trajectory(1)
    estimates = GAE(gamma, lam=0.123, length_alpha=alpha)(trajectory)
    for row, length in enumerate(trajectory.mask.sum(1).tolist()):
        expected = GAE(gamma, lam=max(0.0, 1 - 1 / (alpha * max(1, length))))(trajectory)
        assert_same(estimates.advantages[row], expected.advantages[row])
        assert_same(estimates.returns[row], expected.returns[row])


@pytest.mark.parametrize("estimator", ALL, ids=str)
def test_garbage_outside_the_mask_changes_neither_value_nor_gradient(estimator):
    assert_gradient_matches(estimator, mask=random_trajectory(1).mask)


@pytest.mark.parametrize("estimator", BY_TIME, ids=str)
def test_holes_and_padding_are_skipped(estimator):
    holes = random_trajectory(2)
    full = estimator(holes)
    for row, counts in enumerate(holes.mask):
        dense = Trajectory(
            rewards=holes.rewards[row, counts][None],
            values=holes.values[row, counts][None],
            mask=torch.ones(1, int(counts.sum()), dtype=torch.bool),
            bootstrap=holes.bootstrap[row][None],
        )
        assert full.advantages[row, counts].tolist() == estimator(dense).advantages[0].tolist()
        assert full.returns[row, counts].tolist() == estimator(dense).returns[0].tolist()


@pytest.mark.parametrize("estimator", ALL, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtype_is_that_of_the_rewards(estimator, dtype):
    t = random_trajectory(0, bootstrap=False)
    estimates = estimator(
        Trajectory(rewards=t.rewards.to(dtype), values=t.values.to(dtype), mask=t.mask, group=t.group)
    )
    assert estimates.advantages.dtype == estimates.returns.dtype == dtype
    assert estimator.needs_group == isinstance(estimator, LeaveOneOut | GroupNormalized)


@pytest.mark.parametrize(
    ("estimator", "field", "value"),
    [(kind, "gamma", value) for kind in (MonteCarlo, TD0, NStep, GAE) for value in (-0.01, 1.01, NAN)]
    + [(GAE, field, value) for field in ("lam", "critic_lam") for value in (-0.01, 1.01, NAN)]
    + [(GAE, "length_alpha", value) for value in (0.0, -1.0, NAN, float("inf"))]
    + [(NStep, "n", value) for value in (0, -3)],
)
def test_out_of_range(estimator, field, value):
    with pytest.raises(ValueError, match=rf"^advantages\.{field} must .*{value}$"):
        estimator(**{field: value})
