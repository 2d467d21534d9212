"""Advantage estimators: ``(Trajectory) -> Estimates``.

Index convention: ``rewards[:, t]`` follows response token t, ``values[:, t]`` is V of the state *before* token t, so
that the one-step error of token t is δₜ = rₜ + γ Vₜ₊₁ − Vₜ. Tokens outside the mask are skipped: the next token of t is
the next one *that counts*, without a further factor γλ, and after the last one stands the bootstrap (0 where there is
none). Estimators do not whiten.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from lit_rlhf.types import Estimates, Trajectory


class Estimator(ABC):
    """Anything that turns a trajectory into advantages and returns."""

    @abstractmethod
    def __call__(self, trajectory: Trajectory) -> Estimates:
        """Advantages and returns, each [B, T], 0 outside the mask."""


@dataclass(frozen=True)
class GAE(Estimator):
    """Generalised advantage estimation.

    Aₜ = δₜ + γλ Aₜ₊₁ with δₜ = rₜ + γ Vₜ₊₁ − Vₜ, and the critic's target is the λ-return Rₜ = Aₜ + Vₜ.

    Without values, V = 0. Source: Schulman et al. 2016 (arXiv 1506.02438), equation 16.

    Args:
        gamma: Discount γ in [0, 1]. Responses are short and the score comes last: 1 is usual.
        lam: λ in [0, 1]; 0 trusts the critic (low variance, biased), 1 trusts the sampled return (unbiased).

    Raises:
        ValueError: if gamma or lam lies outside [0, 1].

    >>> trajectory = Trajectory(
    ...     rewards=torch.tensor([[0.0, 1.0]]),
    ...     values=torch.tensor([[0.5, 0.5]]),
    ...     mask=torch.tensor([[True, True]]),
    ... )
    >>> GAE(gamma=1.0, lam=0.5)(trajectory).advantages
    tensor([[0.2500, 0.5000]])
    """

    gamma: float = 1.0
    lam: float = 0.95

    def __post_init__(self) -> None:
        _check_unit_interval(gamma=self.gamma, lam=self.lam)

    def __call__(self, trajectory: Trajectory) -> Estimates:
        """Advantages and λ-returns, each [B, T]."""
        rewards, values, mask, after = _clean(trajectory)
        advantage, next_value = torch.zeros_like(after), after
        advantages = torch.zeros_like(rewards)
        for t in reversed(range(rewards.shape[1])):
            delta = rewards[:, t] + self.gamma * next_value - values[:, t]
            counts = mask[:, t]
            advantage = torch.where(counts, delta + self.gamma * self.lam * advantage, advantage)
            next_value = torch.where(counts, values[:, t], next_value)
            advantages[:, t] = torch.where(counts, advantage, 0.0)
        return Estimates(advantages=advantages, returns=torch.where(mask, advantages + values, 0.0))


def _check_unit_interval(**fields: float) -> None:
    for name, value in fields.items():
        if not 0.0 <= value <= 1.0:
            raise ValueError(f"advantages.{name} must lie in [0, 1], not {value}")


def _clean(trajectory: Trajectory) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rewards, values (0 without a critic), mask and the value after the last token, with 0 outside the mask."""
    mask = trajectory.mask
    rewards = torch.where(mask, trajectory.rewards, 0.0)
    values = torch.zeros_like(rewards) if trajectory.values is None else torch.where(mask, trajectory.values, 0.0)
    after = torch.zeros_like(rewards[:, 0]) if trajectory.bootstrap is None else trajectory.bootstrap
    return rewards, values, mask, after
