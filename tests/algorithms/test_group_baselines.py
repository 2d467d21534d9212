from dataclasses import replace
from functools import partial
from statistics import mean, stdev

import pytest
import torch

from lit_rlhf.algorithms.group_baselines import BestOfN, GroupNormalized, LeaveOneOut
from lit_rlhf.types import Trajectory

NAN = float("nan")
ESTIMATORS = [LeaveOneOut(), GroupNormalized(), GroupNormalized(divide_by_std=False), BestOfN(), BestOfN(centred=True)]
each_estimator = pytest.mark.parametrize("estimator", ESTIMATORS, ids=str)
assert_same = partial(torch.testing.assert_close, rtol=0, atol=1e-10)


def random_trajectory(seed, sizes=(2, 3, 5, 4), time=6, bootstrap=True):
    """Return groups of these sizes in random order and with arbitrary ids; the last group also has an empty row."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.tensor([10**12, 0, -3, 41])
    group = torch.cat([ids[: len(sizes)].repeat_interleave(torch.tensor(sizes)), ids[len(sizes) - 1][None]])
    mask = torch.rand(len(group), time, generator=g) < 0.5
    mask[:, 4] = True
    mask[-1] = False
    order = torch.randperm(len(group), generator=g)
    return Trajectory(
        rewards=torch.randn(len(group), time, generator=g, dtype=torch.float64)[order],
        mask=mask[order],
        bootstrap=torch.randn(len(group), generator=g, dtype=torch.float64)[order] if bootstrap else None,
        group=group[order],
    )


def scores(values, group):
    """Return one-token responses with these returns."""
    rewards = torch.as_tensor(values)[:, None]
    return Trajectory(rewards=rewards, mask=torch.ones_like(rewards, dtype=torch.bool), group=torch.tensor(group))


def sampled_return(trajectory, row, start=0):
    """Return the sum of the rewards from a token on and the bootstrap."""
    pairs = list(zip(trajectory.rewards[row].tolist(), trajectory.mask[row].tolist(), strict=True))
    after = 0.0 if trajectory.bootstrap is None else trajectory.bootstrap[row].item()
    return sum(reward for reward, counts in pairs[start:] if counts) + after


def advantage_by_definition(estimator, own, others):
    if estimator == LeaveOneOut():
        return own - mean(others)
    if isinstance(estimator, BestOfN):
        return (own > max(others)) - (1 / (len(others) + 1) if estimator.centred else 0)
    centred = own - mean([own, *others])
    return centred / (stdev([own, *others]) + 1e-8) if estimator.divide_by_std else centred


@pytest.mark.parametrize(
    ("estimator", "advantages"),
    [
        (LeaveOneOut(), [0, 2, 4.5, -2, -4.5]),
        (GroupNormalized(), [0, 0.5**0.5, 1, -(0.5**0.5), -1]),
        (GroupNormalized(divide_by_std=False), [0, 1, 3, -1, -3]),
        (BestOfN(), [0, 1, 1, 0, 0]),
    ],
)
def test_numbers_by_hand(estimator, advantages):
    trajectory = Trajectory(  # group 5 has the returns 3, 6 (of which 5 is the bootstrap) and 0, group 2 has 4 and 2
        rewards=torch.tensor([[1, NAN, 2], [0, 4, NAN], [1, NAN, NAN], [NAN, 2, NAN], [1, -1, 0], [NAN] * 3]),
        mask=torch.tensor([[1, 0, 1], [1, 1, 0], [1, 0, 0], [0, 1, 0], [1, 1, 1], [0] * 3]).bool(),
        bootstrap=torch.tensor([0, 0, 5.0, 0, 0, NAN]),
        values=torch.full((6, 3), NAN),
        group=torch.tensor([5, 2, 5, 2, 5, 5]),
    )
    estimates = estimator(trajectory)
    expected = torch.tensor([*advantages, 0.0])[:, None] * trajectory.mask
    torch.testing.assert_close(estimates.advantages, expected)
    assert estimates.returns.tolist() == [[3, 0, 2], [4, 4, 0], [6, 0, 0], [0, 2, 0], [0, -1, 0], [0] * 3]


@each_estimator
@pytest.mark.parametrize("bootstrap", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_equals_a_loop(estimator, bootstrap, seed):
    trajectory = random_trajectory(seed, bootstrap=bootstrap)
    estimates = estimator(trajectory)
    advantages, returns = torch.zeros(2, *trajectory.mask.shape, dtype=torch.float64)
    rows = [row for row, counts in enumerate(trajectory.mask) if counts.any()]
    for i in rows:
        others = [sampled_return(trajectory, j) for j in rows if j != i and trajectory.group[i] == trajectory.group[j]]
        for t in trajectory.mask[i].nonzero().flatten().tolist():
            advantages[i, t] = advantage_by_definition(estimator, sampled_return(trajectory, i), others)
            returns[i, t] = sampled_return(trajectory, i, start=t)
    assert_same(estimates.advantages, advantages)
    assert_same(estimates.returns, returns)


def test_leave_one_out_for_two_responses_is_their_difference():
    trajectory = replace(random_trajectory(0, sizes=(2, 2)), bootstrap=None)
    advantages = LeaveOneOut()(trajectory).advantages
    for group in trajectory.group.unique():
        i, j = ((trajectory.group == group) & trajectory.mask.any(1)).nonzero().flatten().tolist()
        difference = sampled_return(trajectory, i) - sampled_return(trajectory, j)
        assert_same(advantages[i], difference * trajectory.mask[i].double())
        assert_same(advantages[j], -difference * trajectory.mask[j].double())


@pytest.mark.parametrize("n", [2, 3, 7])
def test_leave_one_out_is_the_scaled_centred_return(n):
    trajectory = random_trajectory(n, sizes=(n, n, n))
    centred = GroupNormalized(divide_by_std=False)(trajectory)
    assert_same(LeaveOneOut()(trajectory).advantages, centred.advantages * n / (n - 1))


@each_estimator
def test_order_and_ids_of_the_groups_do_not_matter(estimator):
    trajectory, order = random_trajectory(0), torch.randperm(15, generator=torch.Generator().manual_seed(1))
    expected = estimator(trajectory).advantages
    renamed = replace(trajectory, group=trajectory.group.unique(return_inverse=True)[1] * -7)
    shuffled = {k: getattr(trajectory, k)[order] for k in ("rewards", "mask", "bootstrap", "group")}
    assert_same(estimator(renamed).advantages, expected)
    assert_same(estimator(Trajectory(**shuffled)).advantages, expected[order])


@each_estimator
@pytest.mark.parametrize("n", [2, 3, 6, 7])
def test_equal_returns_have_zero_advantage(estimator, n):
    trajectory = scores([0.1] * n + [0.7] * n, [0] * n + [1] * n)
    assert trajectory.rewards.dtype == torch.float32
    assert (estimator(trajectory).advantages == 0).all()


def test_the_deviation_is_the_sample_deviation():
    advantages = GroupNormalized()(scores([1.0, 2.0, 3.0, 4.0], [0] * 4)).advantages.flatten()
    assert advantages.std(unbiased=True).item() == pytest.approx(1)


def test_a_deviation_near_zero_does_not_inflate_the_advantages():
    score = torch.tensor([0.0, 2e-8], dtype=torch.float64)  # deviation √2 · 1e-8
    expected = 1e-8 / (2**0.5 * 1e-8 + 1e-8)
    assert GroupNormalized()(scores(score, [0, 0])).advantages.flatten().tolist() == pytest.approx(
        [-expected, expected]
    )


@each_estimator
@pytest.mark.parametrize("empty", [0, 1])
def test_a_single_response_is_refused(estimator, empty):
    """It is also refused if the other responses to its prompt are empty."""
    trajectory = scores([1.0, 2.0, 3.0] + [4.0] * empty, [0, 0, 1] + [1] * empty)
    trajectory.mask[3:] = False
    with pytest.raises(ValueError, match="2 or more"):
        estimator(trajectory)


@each_estimator
def test_missing_groups_are_refused(estimator):
    with pytest.raises(ValueError, match="group"):
        estimator(replace(scores([1.0, 2.0], [0, 0]), group=None))


@each_estimator
def test_a_group_of_empty_responses_is_ignored(estimator):
    trajectory = scores([1.0, 3.0, NAN, NAN, NAN], [0, 0, 1, 1, 2])
    trajectory.mask[2:] = False
    estimates = estimator(trajectory)
    assert torch.equal(estimates.advantages[:2], estimator(scores([1.0, 3.0], [0, 0])).advantages)
    assert (estimates.advantages[2:] == 0).all()
    assert (estimates.returns[2:] == 0).all()
