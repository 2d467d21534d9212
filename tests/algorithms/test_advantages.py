import pytest
import torch

from lit_rlhf.algorithms.advantages import GAE
from lit_rlhf.types import Trajectory

NAN = float("nan")
CASES = [(1.0, 0.95), (1.0, 1.0), (0.9, 0.5), (0.99, 0.0), (0.0, 0.7)]  # gamma, lam


def random_trajectory(seed, rows=6, time=8, values=True, bootstrap=True):
    """Random rewards, and a mask with holes, one row full and one empty."""
    g = torch.Generator().manual_seed(seed)
    mask = torch.rand(rows, time, generator=g) < 0.6
    mask[0], mask[1] = True, False
    return Trajectory(
        rewards=torch.randn(rows, time, generator=g, dtype=torch.float64),
        values=torch.randn(rows, time, generator=g, dtype=torch.float64) if values else None,
        mask=mask,
        bootstrap=torch.randn(rows, generator=g, dtype=torch.float64) if bootstrap else None,
    )


def gae_by_definition(trajectory, gamma, lam):
    """Aₖ = Σⱼ (γλ)ʲ δₖ₊ⱼ over the tokens that count, as a double loop of Python floats."""
    rows, time = trajectory.mask.shape
    advantages, returns = torch.zeros(2, rows, time, dtype=torch.float64)
    for row in range(rows):
        steps = [t for t in range(time) if trajectory.mask[row, t]]
        values = [0.0 if trajectory.values is None else trajectory.values[row, t].item() for t in steps]
        after = [*values, 0.0 if trajectory.bootstrap is None else trajectory.bootstrap[row].item()][1:]
        rewards = [trajectory.rewards[row, t].item() for t in steps]
        deltas = [r + gamma * v1 - v0 for r, v0, v1 in zip(rewards, values, after, strict=True)]
        for k, t in enumerate(steps):
            advantages[row, t] = sum((gamma * lam) ** j * delta for j, delta in enumerate(deltas[k:]))
            returns[row, t] = advantages[row, t] + values[k]
    return advantages, returns


def test_numbers_by_hand():
    estimates = GAE(gamma=0.5, lam=0.5)(
        Trajectory(
            rewards=torch.tensor([[1.0, NAN, 2.0], [1.0, 2.0, NAN]]),
            values=torch.tensor([[4.0, NAN, 8.0], [4.0, 8.0, NAN]]),
            mask=torch.tensor([[True, False, True], [True, True, False]]),
            bootstrap=torch.tensor([0.0, 16.0]),
        )
    )
    # δ of row 0: 1 + 0.5 · 8 − 4 = 1, 2 − 8 = −6; of row 1, truncated: 1, 2 + 0.5 · 16 − 8 = 2; A₀ = δ₀ + 0.25 δ₁
    assert estimates.advantages.tolist() == [[-0.5, 0, -6], [1.5, 2, 0]]
    assert estimates.returns.tolist() == [[3.5, 0, 2], [5.5, 10, 0]]


@pytest.mark.parametrize(("gamma", "lam"), CASES)
@pytest.mark.parametrize("values", [True, False])
@pytest.mark.parametrize("bootstrap", [True, False])
def test_equals_the_definition(gamma, lam, values, bootstrap):
    for seed in range(3):
        trajectory = random_trajectory(seed, values=values, bootstrap=bootstrap)
        estimates = GAE(gamma, lam)(trajectory)
        advantages, returns = gae_by_definition(trajectory, gamma, lam)
        torch.testing.assert_close(estimates.advantages, advantages)
        torch.testing.assert_close(estimates.returns, returns)


def test_ends_of_lambda():
    gamma, t = 0.9, random_trajectory(0)
    t = Trajectory(rewards=t.rewards, values=t.values, mask=torch.ones_like(t.mask), bootstrap=t.bootstrap)
    following = torch.cat([t.values[:, 1:], t.bootstrap[:, None]], 1)
    torch.testing.assert_close(GAE(gamma, lam=0.0)(t).returns, t.rewards + gamma * following)
    sampled, expected = t.bootstrap, []
    for reward in reversed(t.rewards.unbind(1)):
        sampled = reward + gamma * sampled
        expected.insert(0, sampled)
    torch.testing.assert_close(GAE(gamma, lam=1.0)(t).returns, torch.stack(expected, 1))


@pytest.mark.parametrize("garbage", [NAN, float("inf"), -1e30])
def test_garbage_outside_changes_neither_value_nor_gradient(garbage):
    clean, results = random_trajectory(1), []
    for outside in (0.0, garbage):
        rewards, values = (torch.where(clean.mask, x, outside).requires_grad_() for x in (clean.rewards, clean.values))
        trajectory = Trajectory(rewards=rewards, values=values, mask=clean.mask, bootstrap=clean.bootstrap)
        estimates = GAE(0.9, 0.8)(trajectory)
        (estimates.advantages**2 + estimates.returns).sum().backward()
        results.append((estimates.advantages.detach(), estimates.returns.detach(), rewards.grad, values.grad))
    for expected, spoilt in zip(*results, strict=True):
        torch.testing.assert_close(spoilt, expected)
        assert expected[clean.mask].abs().sum() > 0
        assert (spoilt[~clean.mask] == 0).all()


def test_holes_and_padding_are_skipped():
    holes = random_trajectory(2, rows=3)
    full = GAE(0.9, 0.8)(holes)
    for row, counts in enumerate(holes.mask):
        dense = Trajectory(
            rewards=holes.rewards[row, counts][None],
            values=holes.values[row, counts][None],
            mask=torch.ones(1, int(counts.sum()), dtype=torch.bool),
            bootstrap=holes.bootstrap[row][None],
        )
        assert full.advantages[row, counts].tolist() == GAE(0.9, 0.8)(dense).advantages[0].tolist()


@pytest.mark.parametrize("field", ["gamma", "lam"])
@pytest.mark.parametrize("value", [-0.01, 1.01, NAN])
def test_out_of_range(field, value):
    with pytest.raises(ValueError, match=f"{field} must lie in .*{value}"):
        GAE(**{field: value})
