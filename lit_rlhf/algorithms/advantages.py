"""Advantage estimators: ``(Trajectory) -> Estimates``.

Index convention: ``rewards[:, t]`` follows response token t, ``values[:, t]`` is V of the state *before* token t, so
that the one-step error of token t is δₜ = rₜ + γ Vₜ₊₁ − Vₜ. Tokens outside the mask are skipped: the next token of t is
the next one *that counts*, without a further factor γλ, and after the last one stands the bootstrap (0 where there is
none). Without values, V = 0. Estimators do not whiten.

==================  ===============================  ======================  ==================
estimator           advantage of token t             variance                bias
==================  ===============================  ======================  ==================
`TD0`               δₜ                               least                   all of the critic's
`NStep`             Σ_{k<n} γᵏ δₜ₊ₖ                  grows with n            falls with n
`GAE`               Σₖ (γλ)ᵏ δₜ₊ₖ                    grows with λ            falls with λ
`MonteCarlo`        Σₖ γᵏ rₜ₊ₖ − Vₜ                  most                    none
`LeaveOneOut`       R − the others' mean R           as many as responses    none; no critic
`GroupNormalized`   (R − mean R) / deviation of R    the same                some; no critic
==================  ===============================  ======================  ==================
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from lit_rlhf.types import Estimates, Trajectory


class Estimator(ABC):
    """Anything that turns a trajectory into advantages and returns."""

    needs_group: ClassVar[bool] = False
    """Whether it compares the responses of a prompt, and so needs several, and no critic."""

    @abstractmethod
    def __call__(self, trajectory: Trajectory) -> Estimates:
        """Advantages and returns, each [B, T], 0 outside the mask."""


@dataclass(frozen=True)
class MonteCarlo(Estimator):
    """The sampled return, less the critic's value: Aₜ = Gₜ − Vₜ with Gₜ = Σₖ γᵏ rₜ₊ₖ (+ γ^{T−t} bootstrap).

    The critic's target is Gₜ. Unbiased whatever the critic says. Without values it is REINFORCE's return.

    Source: Sutton & Barto 2018, «Reinforcement Learning», section 13.4 (REINFORCE with baseline).

    Args:
        gamma: Discount γ in [0, 1].

    Raises:
        ValueError: if gamma lies outside [0, 1].

    >>> rewards = torch.tensor([[0.0, 1.0]])
    >>> MonteCarlo(gamma=0.5)(Trajectory(rewards=rewards, mask=rewards >= 0)).advantages
    tensor([[0.5000, 1.0000]])
    """

    gamma: float = 1.0

    def __post_init__(self) -> None:
        _check_unit_interval(gamma=self.gamma)

    def __call__(self, trajectory: Trajectory) -> Estimates:
        """Advantages and sampled returns, each [B, T]."""
        errors = _Errors(trajectory, self.gamma)
        return errors.estimates(errors.decayed(lam=1.0))


@dataclass(frozen=True)
class TD0(Estimator):
    """The one-step error: Aₜ = δₜ = rₜ + γ Vₜ₊₁ − Vₜ; the critic's target is rₜ + γ Vₜ₊₁.

    Source: Sutton & Barto 2018, equation 6.5, and one-step actor-critic, section 13.5.

    Args:
        gamma: Discount γ in [0, 1].

    Raises:
        ValueError: if gamma lies outside [0, 1].

    >>> rewards, values = torch.tensor([[0.0, 1.0]]), torch.tensor([[0.5, 0.75]])
    >>> TD0()(Trajectory(rewards=rewards, values=values, mask=rewards >= 0)).advantages
    tensor([[0.2500, 0.2500]])
    """

    gamma: float = 1.0

    def __post_init__(self) -> None:
        _check_unit_interval(gamma=self.gamma)

    def __call__(self, trajectory: Trajectory) -> Estimates:
        """Advantages and one-step returns, each [B, T]."""
        errors = _Errors(trajectory, self.gamma)
        return errors.estimates(errors.decayed(lam=0.0))


@dataclass(frozen=True)
class NStep(Estimator):
    """n sampled rewards, then the critic: Aₜ = Σ_{k<n} γᵏ rₜ₊ₖ + γⁿ Vₜ₊ₙ − Vₜ; the critic's target is Aₜ + Vₜ.

    Where fewer than n tokens are left, the return runs to the end and the bootstrap stands there.

    Source: Mnih et al. 2016 (arXiv 1602.01783), section 4 (A3C); Sutton & Barto 2018, equation 7.1.

    Args:
        n: Rewards before the critic is asked; 1 is `TD0`, the response's length or more is `MonteCarlo`.
        gamma: Discount γ in [0, 1].

    Raises:
        ValueError: if n is less than 1 or gamma lies outside [0, 1].

    >>> rewards, values = torch.tensor([[0.0, 0.0, 1.0]]), torch.tensor([[0.5, 0.5, 0.75]])
    >>> NStep(n=2)(Trajectory(rewards=rewards, values=values, mask=rewards >= 0)).advantages
    tensor([[0.2500, 0.5000, 0.2500]])
    """

    n: int = 8
    gamma: float = 1.0

    def __post_init__(self) -> None:
        if self.n < 1:
            raise ValueError(f"advantages.n must be 1 or more, not {self.n}")
        _check_unit_interval(gamma=self.gamma)

    def __call__(self, trajectory: Trajectory) -> Estimates:
        """Advantages and n-step returns, each [B, T]."""
        errors = _Errors(trajectory, self.gamma)
        return errors.estimates(errors.windowed(self.n))


@dataclass(frozen=True)
class GAE(Estimator):
    """Generalised advantage estimation.

    Aₜ = δₜ + γλ Aₜ₊₁ with δₜ = rₜ + γ Vₜ₊₁ − Vₜ, and the critic's target is the λ-return Rₜ = Aₜ + Vₜ.

    Two refinements for long responses: the critic's target may use a λ of its own (*decoupled* GAE), and the actor's λ
    may grow with the response's length l, so that the reward at the end reaches its beginning: λ = 1 − 1 / (α l).

    Source: Schulman et al. 2016 (arXiv 1506.02438), equation 16; ``critic_lam``: Yuan et al. 2025 (VC-PPO, arXiv
    2503.01491), section 3.3; ``length_alpha``: Yue et al. 2025 (VAPO, arXiv 2504.05118), section 4.2.

    Args:
        gamma: Discount γ in [0, 1]. Responses are short and the score comes last: 1 is usual.
        lam: λ in [0, 1]; 0 trusts the critic (low variance, biased), 1 trusts the sampled return (unbiased).
        critic_lam: λ of the critic's target, in [0, 1]; None: the advantages' own.
        length_alpha: α > 0: the advantages' λ is max(0, 1 − 1 / (α l)) and ``lam`` is not used; None: ``lam``.

    Raises:
        ValueError: if gamma, lam or critic_lam lies outside [0, 1], or length_alpha is not positive.

    >>> trajectory = Trajectory(
    ...     rewards=torch.tensor([[0.0, 1.0]]),
    ...     values=torch.tensor([[0.5, 0.5]]),
    ...     mask=torch.tensor([[True, True]]),
    ... )
    >>> GAE(gamma=1.0, lam=0.5)(trajectory).advantages
    tensor([[0.2500, 0.5000]])
    >>> GAE(gamma=1.0, lam=0.5, critic_lam=1.0)(trajectory).returns
    tensor([[1., 1.]])
    """

    gamma: float = 1.0
    lam: float = 0.95
    critic_lam: float | None = None
    length_alpha: float | None = None

    def __post_init__(self) -> None:
        _check_unit_interval(gamma=self.gamma, lam=self.lam)
        if self.critic_lam is not None:
            _check_unit_interval(critic_lam=self.critic_lam)
        if self.length_alpha is not None and not 0.0 < self.length_alpha < math.inf:
            raise ValueError(f"advantages.length_alpha must be positive, not {self.length_alpha}")

    def __call__(self, trajectory: Trajectory) -> Estimates:
        """Advantages and λ-returns, each [B, T]."""
        errors = _Errors(trajectory, self.gamma)
        length = trajectory.mask.sum(1).clamp(min=1).to(errors.delta.dtype)
        alpha = self.length_alpha
        lam = self.lam if alpha is None else (1.0 - 1.0 / (alpha * length)).clamp(min=0.0)
        advantages = errors.decayed(lam)
        return errors.estimates(advantages, None if self.critic_lam is None else errors.decayed(self.critic_lam))


@dataclass(frozen=True)
class LeaveOneOut(Estimator):
    """A response's return, less the mean return of the prompt's other responses; the same for each of its tokens.

    Aᵢ = Rᵢ − Σ_{j≠i} Rⱼ / (n − 1), with R = Σₜ rₜ (+ bootstrap). Unbiased: the baseline does not depend on response i.

    Source: Ahmadian et al. 2024 (RLOO, arXiv 2402.14740), section 3.2; Kool et al. 2019.

    Raises:
        ValueError: when called without groups, or with a prompt that has one response.

    >>> rewards = torch.tensor([[3.0], [1.0]])
    >>> LeaveOneOut()(Trajectory(rewards=rewards, mask=rewards > 0, group=torch.tensor([0, 0]))).advantages
    tensor([[ 2.],
            [-2.]])
    """

    needs_group: ClassVar[bool] = True

    def __call__(self, trajectory: Trajectory) -> Estimates:
        """Advantages and returns (the sampled, undiscounted rewards to go), each [B, T]."""
        group = _Group(trajectory)
        return group.estimates(group.centred * group.count / (group.count - 1))


@dataclass(frozen=True)
class GroupNormalized(Estimator):
    """A response's return in deviations from its prompt's mean; the same for each of its tokens.

    Aᵢ = (Rᵢ − mean R) / (std R + 1e-8), with R = Σₜ rₜ (+ bootstrap) and the sample deviation
    std R = √(Σᵢ (Rᵢ − mean R)² / (n − 1)). Where all responses of a prompt earn the same, A = 0.

    Source: Shao et al. 2024 (GRPO, arXiv 2402.03300), section 4.1.2; without the division: Liu et al. 2025 (Dr. GRPO,
    arXiv 2503.20783), section 3.1: dividing favours the prompts on which all responses earn nearly the same.

    Args:
        divide_by_std: False: only the mean is subtracted.

    Raises:
        ValueError: when called without groups, or with a prompt that has one response.

    >>> rewards = torch.tensor([[3.0], [1.0], [2.0]])
    >>> GroupNormalized()(Trajectory(rewards=rewards, mask=rewards > 0, group=torch.tensor([0, 0, 0]))).advantages
    tensor([[ 1.],
            [-1.],
            [ 0.]])
    """

    divide_by_std: bool = True
    needs_group: ClassVar[bool] = True

    def __call__(self, trajectory: Trajectory) -> Estimates:
        """Advantages and returns (the sampled, undiscounted rewards to go), each [B, T]."""
        group = _Group(trajectory)
        advantage = group.centred
        if self.divide_by_std:
            deviation = (group.total(advantage**2) / (group.count - 1)).sqrt()
            advantage = advantage / (deviation + 1e-8)
        return group.estimates(advantage)


class _Errors:
    """The one-step errors δ of the tokens that count, moved together to the left.

    Args:
        trajectory: Its mask may have holes.
        gamma: Discount.
    """

    def __init__(self, trajectory: Trajectory, gamma: float) -> None:
        self.mask, self.gamma = trajectory.mask, gamma
        rewards = torch.where(self.mask, trajectory.rewards, 0.0)
        values = torch.zeros_like(rewards) if trajectory.values is None else trajectory.values
        self.values = torch.where(self.mask, values, 0.0)
        self.order = torch.argsort((~self.mask).byte(), dim=1, stable=True)
        value = self.values.gather(1, self.order)
        following = torch.cat([value[:, 1:], torch.zeros_like(value[:, :1])], 1)
        if trajectory.bootstrap is not None:
            last = torch.arange(value.shape[1], device=value.device) == self.mask.sum(1, keepdim=True) - 1
            following = torch.where(last, trajectory.bootstrap[:, None], following)
        delta = rewards.gather(1, self.order) + gamma * following - value
        self.delta = torch.where(self.mask.gather(1, self.order), delta, 0.0)

    def decayed(self, lam: float | Tensor) -> Tensor:
        """Σₖ (γλ)ᵏ δₜ₊ₖ of each token, [B, T]; λ is a number or [B]."""
        total, sums = torch.zeros_like(self.delta.sum(1)), torch.zeros_like(self.delta)
        for t in reversed(range(self.delta.shape[1])):
            total = self.delta[:, t] + self.gamma * lam * total
            sums[:, t] = total
        return self._back(sums)

    def windowed(self, n: int) -> Tensor:
        """Σ_{k<n} γᵏ δₜ₊ₖ of each token, [B, T]."""
        total = torch.zeros_like(self.delta)
        for k in range(min(n, self.delta.shape[1])):
            total = total + pad(self.gamma**k * self.delta[:, k:], (0, k))
        return self._back(total)

    def estimates(self, advantages: Tensor, critic_advantages: Tensor | None = None) -> Estimates:
        """With the critic's targets Rₜ = Aₜ + Vₜ, of advantages of its own if given."""
        returns = (advantages if critic_advantages is None else critic_advantages) + self.values
        return Estimates(advantages=advantages, returns=returns)

    def _back(self, sums: Tensor) -> Tensor:
        """Each at its token's own place."""
        return torch.where(self.mask, torch.zeros_like(sums).scatter(1, self.order, sums), 0.0)


class _Group:
    """The return R of each response, beside those of its prompt's other responses.

    In float64: there the mean of equal float32 returns is that return exactly, and its advantage 0.

    Args:
        trajectory: With a group; rows in which nothing counts are left out.
    """

    def __init__(self, trajectory: Trajectory) -> None:
        if trajectory.group is None:
            raise ValueError("group baselines need the group of each row")
        self.mask = trajectory.mask
        self.to_go = _Errors(replace(trajectory, values=None), gamma=1.0).decayed(lam=1.0)
        self.counts = self.mask.any(1)
        self.place = trajectory.group.unique(return_inverse=True)[1]
        self.count = self.total(torch.ones_like(self.to_go[:, 0], dtype=torch.float64))
        if (self.count[self.counts] < 2).any():
            raise ValueError(
                "a group baseline compares the responses to a prompt: it needs 2 or more of each, not 1 "
                "(sampling.responses)"
            )
        first = self.mask.byte().argmax(1, keepdim=True)
        returns = self.to_go.gather(1, first).squeeze(1).double()
        self.centred = returns - self.total(returns) / self.count.clamp(min=1)  # [B]

    def total(self, x: Tensor) -> Tensor:
        """The sum over the row's group, [B]."""
        x = torch.where(self.counts, x, 0.0)
        return torch.zeros_like(x).index_add(0, self.place, x)[self.place]

    def estimates(self, advantage: Tensor) -> Estimates:
        """The row's advantage [B] at each of its tokens."""
        spread = torch.where(self.mask, advantage[:, None], 0.0).to(self.to_go.dtype)
        return Estimates(advantages=spread, returns=self.to_go)


def _check_unit_interval(**fields: float) -> None:
    for name, value in fields.items():
        if not 0.0 <= value <= 1.0:
            raise ValueError(f"advantages.{name} must lie in [0, 1], not {value}")
