"""Advantage estimators that compare the responses to a prompt with one another and need no critic."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lit_rlhf.algorithms.advantages import AdvantageEstimator, discounted_sum, td_errors
from lit_rlhf.types import Estimates, Trajectory


@dataclass(frozen=True)
class LeaveOneOut(AdvantageEstimator):
    """Every token's advantage is the response's return minus the mean return of the other responses to the prompt.

    Aᵢ = Rᵢ − Σ_{j≠i} Rⱼ / (n − 1) for the n non-empty responses to a prompt, with R = Σₜ rₜ (+ bootstrap). The estimate
    is unbiased, because the baseline does not depend on response i.

    Source: Ahmadian et al. 2024 (RLOO, arXiv 2402.14740), section 3.2; Kool et al. 2019.

    Raises:
        ValueError: when called, if the trajectory has no ``group``, or a prompt has only one non-empty response.

    >>> rewards = torch.tensor([[3.0], [1.0]])
    >>> LeaveOneOut()(Trajectory(rewards=rewards, mask=rewards > 0, group=torch.tensor([0, 0]))).advantages
    tensor([[ 2.],
            [-2.]])
    """

    needs_group: ClassVar[bool] = True

    def __call__(self, trajectory: Trajectory) -> Estimates:
        """Return advantages and sampled, undiscounted returns, each [B, T]."""
        group = _Group(trajectory)
        return group.estimates(group.centred * group.size / (group.size - 1))


@dataclass(frozen=True)
class GroupNormalized(AdvantageEstimator):
    """Every token's advantage is the response's return, standardised over all responses to the prompt.

    Aᵢ = (Rᵢ − mean R) / (std R + 1e-8) for the n non-empty responses to a prompt, with R = Σₜ rₜ (+ bootstrap) and the
    sample standard deviation std R = √(Σᵢ (Rᵢ − mean R)² / (n − 1)). If all n returns are equal, A = 0.

    Source: Shao et al. 2024 (GRPO, arXiv 2402.03300), section 4.1.2. Liu et al. 2025 (Dr. GRPO, arXiv 2503.20783),
    section 3.1, omit the division, because it favours prompts whose responses have nearly equal returns.

    Args:
        divide_by_std: Whether to divide by the standard deviation; if False, only the mean is subtracted.

    Raises:
        ValueError: when called, if the trajectory has no ``group``, or a prompt has only one non-empty response.

    >>> rewards, group = torch.tensor([[3.0], [1.0], [2.0]]), torch.tensor([0, 0, 0])
    >>> GroupNormalized()(Trajectory(rewards=rewards, mask=rewards > 0, group=group)).advantages
    tensor([[ 1.],
            [-1.],
            [ 0.]])
    """

    divide_by_std: bool = True
    needs_group: ClassVar[bool] = True

    @property
    def keeps_scale(self) -> bool:
        """Whether the advantages are on the scale of the rewards: not if they are divided by a standard deviation."""
        return not self.divide_by_std

    def __call__(self, trajectory: Trajectory) -> Estimates:
        """Return advantages and sampled, undiscounted returns, each [B, T]."""
        group = _Group(trajectory)
        advantage = group.centred
        if self.divide_by_std:
            deviation = (group.sum(advantage**2) / (group.size - 1)).sqrt()
            advantage = advantage / (deviation + 1e-8)
        return group.estimates(advantage)


@dataclass(frozen=True)
class BestOfN(AdvantageEstimator):
    """Every token's advantage is 1 if the response has the highest return of all responses to the prompt, else 0.

    With `VanillaPG`, one epoch and no whitening, this is supervised training on the best of n responses (RAFT). Of
    several responses with the highest return, only the first counts as the best; if all returns are equal, A = 0.

    Source: Dong et al. 2023 (RAFT, arXiv 2304.06767), section 3.

    Args:
        centred: Whether to subtract the mean advantage 1/n, so that the other responses become less likely.

    Raises:
        ValueError: when called, if the trajectory has no ``group``, or a prompt has only one non-empty response.

    >>> rewards = torch.tensor([[3.0], [1.0], [2.0], [5.0]])
    >>> BestOfN()(Trajectory(rewards=rewards, mask=rewards > 0, group=torch.tensor([0, 0, 1, 1]))).advantages
    tensor([[1.],
            [0.],
            [0.],
            [1.]])
    """

    centred: bool = False
    needs_group: ClassVar[bool] = True

    @property
    def keeps_scale(self) -> bool:
        """False: the advantages say only which response is the best."""
        return False

    def __call__(self, trajectory: Trajectory) -> Estimates:
        """Return advantages and sampled, undiscounted returns, each [B, T]."""
        group = _Group(trajectory)
        best = group.is_best()
        baseline = group.sum(best) / group.size.clamp(min=1) if self.centred else 0.0
        return group.estimates(best - baseline)


class _Group:
    """The returns of the tokens, and each response's return minus the mean return of the prompt's non-empty responses.

    The mean is taken in float64, so that the mean of equal float32 returns is exact and the differences are 0.

    Raises:
        ValueError: if the trajectory has no ``group``, or a prompt has only one non-empty response.
    """

    def __init__(self, trajectory: Trajectory) -> None:
        if trajectory.group is None:
            raise ValueError("a group baseline needs the trajectory's group (the prompt of each row), which is None")
        self.mask = trajectory.mask
        deltas = td_errors(trajectory.rewards, None, self.mask, trajectory.bootstrap)
        self.returns = discounted_sum(deltas, self.mask, discount=1.0)
        self.nonempty = self.mask.any(1)
        self.index = trajectory.group.unique(return_inverse=True)[1]
        self.size = self.sum(torch.ones_like(self.returns[:, 0], dtype=torch.float64))
        if (self.size[self.nonempty] < 2).any():
            raise ValueError("a group baseline needs 2 or more responses to each prompt, not 1 (sampling.responses)")
        returns = self.returns.gather(1, self.mask.byte().argmax(1, keepdim=True)).squeeze(1).double()
        self.centred = returns - self.sum(returns) / self.size.clamp(min=1)  # [B]

    def sum(self, x: Tensor) -> Tensor:
        """Return, for each row, the sum of ``x`` [B] over the non-empty rows of the same group, [B]."""
        x = torch.where(self.nonempty, x, 0.0)
        return torch.zeros_like(x).index_add(0, self.index, x)[self.index]

    def is_best(self) -> Tensor:
        """Return 1 for the first non-empty row of each group that has the group's largest return, else 0, [B].

        No row is the best of a group whose returns are all equal.
        """
        rows = torch.arange(len(self.index), device=self.index.device)
        centred = torch.where(self.nonempty, self.centred, -torch.inf)
        largest = torch.full_like(centred, -torch.inf).scatter_reduce(0, self.index, centred, "amax")[self.index]
        is_largest = self.nonempty & (centred == largest) & (largest > 0)
        places = torch.where(is_largest, rows, len(rows))
        first = torch.full_like(places, len(rows)).scatter_reduce(0, self.index, places, "amin")[self.index]
        return (is_largest & (rows == first)).to(centred.dtype)

    def estimates(self, advantage: Tensor) -> Estimates:
        """Return estimates in which the advantage of every token is the ``advantage`` [B] of the token's row."""
        advantages = torch.where(self.mask, advantage[:, None], 0.0)
        return Estimates(advantages=advantages.to(self.returns.dtype), returns=self.returns)
