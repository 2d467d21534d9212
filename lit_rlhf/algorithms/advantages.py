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
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from lit_rlhf.types import Estimates, Trajectory


class AdvantageEstimator(ABC):
    """Anything that turns a trajectory into advantages and returns."""

    needs_group: ClassVar[bool] = False
    """Whether it compares the responses of a prompt, and so needs several, and no critic."""

    @abstractmethod
    def __call__(self, trajectory: Trajectory) -> Estimates:
        """Advantages and returns, each [B, T], 0 outside the mask."""


@dataclass(frozen=True)
class MonteCarlo(AdvantageEstimator):
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
        deltas = _deltas(trajectory, self.gamma)
        return _estimates(discounted_sum(deltas, trajectory.mask, self.gamma), trajectory)


@dataclass(frozen=True)
class TD0(AdvantageEstimator):
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
        return _estimates(_deltas(trajectory, self.gamma), trajectory)


@dataclass(frozen=True)
class NStep(AdvantageEstimator):
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
        deltas = _deltas(trajectory, self.gamma)
        return _estimates(n_step_sum(deltas, trajectory.mask, self.n, self.gamma), trajectory)


@dataclass(frozen=True)
class GAE(AdvantageEstimator):
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
        mask, gamma, lam = trajectory.mask, self.gamma, self._lam(trajectory)
        deltas = _deltas(trajectory, gamma)
        advantages = discounted_sum(deltas, mask, gamma * lam)
        if self.critic_lam is None:
            return _estimates(advantages, trajectory)
        return _estimates(advantages, trajectory, discounted_sum(deltas, mask, gamma * self.critic_lam))

    def _lam(self, trajectory: Trajectory) -> float | Tensor:
        """λ of the advantages: a number, or [B] by the responses' lengths."""
        if self.length_alpha is None:
            return self.lam
        length = trajectory.mask.sum(1).clamp(min=1).to(trajectory.rewards.dtype)
        return (1.0 - 1.0 / (self.length_alpha * length)).clamp(min=0.0)


@dataclass(frozen=True)
class LeaveOneOut(AdvantageEstimator):
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
        return group.estimates(group.centred * group.size / (group.size - 1))


@dataclass(frozen=True)
class GroupNormalized(AdvantageEstimator):
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
            deviation = (group.sum(advantage**2) / (group.size - 1)).sqrt()
            advantage = advantage / (deviation + 1e-8)
        return group.estimates(advantage)


def td_errors(
    rewards: Tensor, values: Tensor | None, mask: Tensor, bootstrap: Tensor | None = None, gamma: float = 1.0
) -> Tensor:
    """The one-step errors δₜ = rₜ + γ Vₜ₊₁ − Vₜ, where t + 1 is the next token that counts.

    Source: Sutton & Barto 2018, equation 6.5.

    Args:
        rewards: [B, T].
        values: [B, T], V of the state before each token; None for V = 0.
        mask: Bool [B, T]; True counts, and there may be holes.
        bootstrap: [B], V after the last token that counts; None for 0.
        gamma: Discount γ.

    Returns:
        [B, T], 0 outside the mask.

    >>> mask = torch.tensor([[True, False, True]])
    >>> td_errors(torch.tensor([[0.0, 9.0, 1.0]]), torch.tensor([[0.5, 9.0, 0.75]]), mask)
    tensor([[0.2500, 0.0000, 0.2500]])
    """
    rewards = torch.where(mask, rewards, 0.0)
    values = torch.zeros_like(rewards) if values is None else torch.where(mask, values, 0.0)
    last = values.new_zeros(len(values)) if bootstrap is None else bootstrap
    next_values = torch.cat([values, last[:, None]], 1).gather(1, _next_token(mask))
    return torch.where(mask, rewards + gamma * next_values - values, 0.0)


def discounted_sum(x: Tensor, mask: Tensor, discount: float | Tensor) -> Tensor:
    """The discounted sum to the end, Gₜ = xₜ + discount · Gₜ₊₁, over the tokens that count.

    Args:
        x: [B, T].
        mask: Bool [B, T]; True counts, and there may be holes.
        discount: A number, or [B].

    Returns:
        [B, T], 0 outside the mask.

    >>> discounted_sum(torch.tensor([[1.0, 9.0, 1.0]]), torch.tensor([[True, False, True]]), discount=0.5)
    tensor([[1.5000, 0.0000, 1.0000]])
    """
    x = torch.where(mask, x, 0.0)
    total, sums = x.new_zeros(len(x)), torch.zeros_like(x)
    for t in reversed(range(x.shape[1])):
        total = torch.where(mask[:, t], x[:, t] + discount * total, total)
        sums[:, t] = total
    return torch.where(mask, sums, 0.0)


def n_step_sum(x: Tensor, mask: Tensor, n: int, discount: float) -> Tensor:
    """The discounted sum of n tokens, Σ_{k<n} discountᵏ xₜ₊ₖ, over the tokens that count.

    Args:
        x: [B, T].
        mask: Bool [B, T]; True counts, and there may be holes.
        n: The number of terms; fewer at the end.
        discount: A number.

    Returns:
        [B, T], 0 outside the mask.

    >>> n_step_sum(torch.tensor([[1.0, 2.0, 4.0]]), torch.tensor([[True, True, True]]), n=2, discount=0.5)
    tensor([[2., 4., 4.]])
    """
    x = torch.where(mask, x, 0.0)
    beyond = x.shape[1]  # the index of a column of zeros after the last token
    padded, following = pad(x, (0, 1)), pad(_next_token(mask), (0, 1), value=beyond)
    index = torch.arange(beyond, device=x.device).expand_as(x)
    total = torch.zeros_like(x)
    for k in range(min(n, beyond)):
        total = total + discount**k * padded.gather(1, index)
        index = following.gather(1, index)
    return torch.where(mask, total, 0.0)


def _next_token(mask: Tensor) -> Tensor:
    """The index of the next token after t that counts, [B, T]; T after the last one."""
    length = mask.shape[1]
    index = torch.where(mask, torch.arange(length, device=mask.device), length)
    return pad(index[:, 1:].flip(1).cummin(1).values.flip(1), (0, 1), value=length)


def _estimates(advantages: Tensor, trajectory: Trajectory, critic_advantages: Tensor | None = None) -> Estimates:
    """The advantages with the critic's targets Rₜ = Aₜ + Vₜ, from the critic's own advantages if given."""
    targets = advantages if critic_advantages is None else critic_advantages
    if trajectory.values is not None:
        targets = targets + torch.where(trajectory.mask, trajectory.values, 0.0)
    return Estimates(advantages=advantages, returns=targets)


def _deltas(trajectory: Trajectory, gamma: float) -> Tensor:
    return td_errors(trajectory.rewards, trajectory.values, trajectory.mask, trajectory.bootstrap, gamma)


class _Group:
    """The return R of each response, centred among the responses to its prompt.

    It is computed in float64, where the mean of equal float32 returns is exactly that return, and its advantage 0.

    Args:
        trajectory: A trajectory with groups; rows in which no token counts are left out.

    Raises:
        ValueError: without groups, or for a prompt with one response.
    """

    def __init__(self, trajectory: Trajectory) -> None:
        if trajectory.group is None:
            raise ValueError("group baselines need the group of each row")
        self.mask = trajectory.mask
        deltas = td_errors(trajectory.rewards, None, trajectory.mask, trajectory.bootstrap)
        self.returns = discounted_sum(deltas, trajectory.mask, discount=1.0)
        self.counts = self.mask.any(1)
        self.index = trajectory.group.unique(return_inverse=True)[1]
        self.size = self.sum(torch.ones_like(self.returns[:, 0], dtype=torch.float64))
        if (self.size[self.counts] < 2).any():
            raise ValueError(
                "a group baseline compares the responses to a prompt: it needs 2 or more of each, not 1 "
                "(sampling.responses)"
            )
        first = self.mask.byte().argmax(1, keepdim=True)
        returns = self.returns.gather(1, first).squeeze(1).double()
        self.centred = returns - self.sum(returns) / self.size.clamp(min=1)  # [B]

    def sum(self, x: Tensor) -> Tensor:
        """Return the sum of ``x`` [B] over the row's group, [B]."""
        x = torch.where(self.counts, x, 0.0)
        return torch.zeros_like(x).index_add(0, self.index, x)[self.index]

    def estimates(self, advantage: Tensor) -> Estimates:
        """Return the row's advantage [B] at each of its tokens."""
        advantages = torch.where(self.mask, advantage[:, None], 0.0).to(self.returns.dtype)
        return Estimates(advantages=advantages, returns=self.returns)


def _check_unit_interval(**fields: float) -> None:
    for name, value in fields.items():
        if not 0.0 <= value <= 1.0:
            raise ValueError(f"advantages.{name} must be in [0, 1], not {value}")
