"""Advantage estimators, which compute the `Estimates` of a `Trajectory`.

Index convention: ``rewards[:, t]`` follows response token t, and ``values[:, t]`` is V of the state *before* token t;
the TD error of token t is δₜ = rₜ + γ Vₜ₊₁ − Vₜ. Tokens outside the mask are skipped: t + 1 is the next token inside
the mask, one factor γλ away, however many tokens were skipped. The value after the last token is the bootstrap (0 by
default). Without values, V = 0. Estimators do not whiten the advantages.

==================  ===============================  =======================  ==================
estimator           advantage of token t             variance                 bias
==================  ===============================  =======================  ==================
`TD0`               δₜ                               lowest                   the critic's error
`NStep`             Σ_{k<n} γᵏ δₜ₊ₖ                  grows with n             falls with n
`GAE`               Σₖ (γλ)ᵏ δₜ₊ₖ                    grows with λ             falls with λ
`MonteCarlo`        Σₖ γᵏ rₜ₊ₖ − Vₜ                  highest                  none
`VTrace`            min(ρ̄, ρₜ) (rₜ + γ vₜ₊₁ − Vₜ)    grows with ρ̄ and c̄       falls with ρ̄ and c̄
`LeaveOneOut`       R − mean of the other R          falls with group size    none; no critic
`GroupNormalized`   (R − mean R) / std R             falls with group size    some; no critic
`BestOfN`           1 if R is the group's largest    grows with group size    some; no critic
==================  ===============================  =======================  ==================

R is the return of a whole response. `VTrace`, whose docstring explains its symbols, is in the module `vtrace`, and the
last three estimators are in `group_baselines`.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from lit_rlhf.types import Estimates, Trajectory, check_shapes


class AdvantageEstimator(ABC):
    """The interface of advantage estimators, which compute advantages and returns from a trajectory.

    >>> class RewardToGo(AdvantageEstimator):
    ...     def __call__(self, trajectory: Trajectory) -> Estimates:
    ...         returns = discounted_sum(trajectory.rewards, trajectory.mask, discount=0.9)
    ...         return Estimates(advantages=returns, returns=returns)
    >>> RewardToGo()(Trajectory(rewards=torch.tensor([[0.0, 1.0]]), mask=torch.tensor([[True, True]]))).advantages
    tensor([[0.9000, 1.0000]])
    """

    needs_group: ClassVar[bool] = False
    """Whether the estimator compares the responses to a prompt, and thus needs 2 or more of them, but no critic."""
    weights_by_ratio: ClassVar[bool] = False
    """Whether the advantages include importance weights for responses drawn from a policy other than the actor's."""

    @property
    def keeps_scale(self) -> bool:
        """Whether the advantages are on the scale of the rewards, the same for every prompt; by default, they are."""
        return True

    @abstractmethod
    def __call__(self, trajectory: Trajectory) -> Estimates:
        """Return advantages and returns, each [B, T] and 0 outside the mask."""


@dataclass(frozen=True)
class MonteCarlo(AdvantageEstimator):
    """The sampled return minus the critic's value: Aₜ = Gₜ − Vₜ with Gₜ = Σₖ γᵏ rₜ₊ₖ (+ discounted bootstrap).

    The critic's target is Gₜ. Without a bootstrap, Aₜ is unbiased for any critic; without values, Aₜ = Gₜ (REINFORCE).

    Source: Sutton & Barto 2018, "Reinforcement Learning", section 13.4 (REINFORCE with baseline).

    Args:
        gamma: The discount γ, in [0, 1].

    Raises:
        ValueError: if gamma is outside [0, 1].

    >>> rewards = torch.tensor([[0.0, 1.0]])
    >>> MonteCarlo(gamma=0.5)(Trajectory(rewards=rewards, mask=rewards >= 0)).advantages
    tensor([[0.5000, 1.0000]])
    """

    gamma: float = 1.0

    def __post_init__(self) -> None:
        _check_unit_interval(gamma=self.gamma)

    def __call__(self, trajectory: Trajectory) -> Estimates:
        """Return advantages and sampled returns, each [B, T]."""
        deltas = _deltas(trajectory, self.gamma)
        return _estimates(discounted_sum(deltas, trajectory.mask, self.gamma), trajectory)


@dataclass(frozen=True)
class TD0(AdvantageEstimator):
    """The one-step TD error as the advantage: Aₜ = δₜ = rₜ + γ Vₜ₊₁ − Vₜ; the critic's target is rₜ + γ Vₜ₊₁.

    Source: Sutton & Barto 2018, equation 6.5 and section 13.5 (one-step actor-critic).

    Args:
        gamma: The discount γ, in [0, 1].

    Raises:
        ValueError: if gamma is outside [0, 1].

    >>> rewards, values = torch.tensor([[0.0, 1.0]]), torch.tensor([[0.5, 0.75]])
    >>> TD0()(Trajectory(rewards=rewards, values=values, mask=rewards >= 0)).advantages
    tensor([[0.2500, 0.2500]])
    """

    gamma: float = 1.0

    def __post_init__(self) -> None:
        _check_unit_interval(gamma=self.gamma)

    def __call__(self, trajectory: Trajectory) -> Estimates:
        """Return advantages and one-step returns, each [B, T]."""
        return _estimates(_deltas(trajectory, self.gamma), trajectory)


@dataclass(frozen=True)
class NStep(AdvantageEstimator):
    """The n-step advantage Aₜ = Σ_{k<n} γᵏ rₜ₊ₖ + γⁿ Vₜ₊ₙ − Vₜ; the critic's target is the n-step return Aₜ + Vₜ.

    Source: Mnih et al. 2016 (arXiv 1602.01783), section 4 (A3C); Sutton & Barto 2018, equation 7.1.

    Args:
        n: The number of sampled rewards; 1 gives `TD0`, and the response's length or more gives `MonteCarlo`. Where
            only m < n tokens are left, the sum runs to the last one, and γᵐ times the bootstrap value replaces γⁿ Vₜ₊ₙ.
        gamma: The discount γ, in [0, 1].

    Raises:
        ValueError: if n is less than 1 or gamma is outside [0, 1].

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
        """Return advantages and n-step returns, each [B, T]."""
        deltas = _deltas(trajectory, self.gamma)
        return _estimates(n_step_sum(deltas, trajectory.mask, self.n, self.gamma), trajectory)


@dataclass(frozen=True)
class GAE(AdvantageEstimator):
    """Generalised advantage estimation.

    Aₜ = δₜ + γλ Aₜ₊₁ with δₜ = rₜ + γ Vₜ₊₁ − Vₜ, and the critic's target is the λ-return Rₜ = Aₜ + Vₜ.

    With ``length_alpha``, λ grows with the response's length l, so that the reward at the end reaches the first tokens.

    Source: Schulman et al. 2016 (arXiv 1506.02438), equation 16; ``critic_lam``: Yuan et al. 2025 (VC-PPO, arXiv
    2503.01491), section 3.3; ``length_alpha``: Yue et al. 2025 (VAPO, arXiv 2504.05118), section 4.2.

    Args:
        gamma: The discount γ, in [0, 1]; 1 is usual, since responses are short and the score comes at the end.
        lam: The λ of the advantages, in [0, 1]; 0 trusts the critic (low variance), 1 the sampled return (no bias).
        critic_lam: The λ of the critic's target, in [0, 1] (*decoupled* GAE); None for the λ of the advantages.
        length_alpha: α > 0, for λ = max(0, 1 − 1 / (α l)) in the advantages instead of ``lam``; None to use ``lam``.

    Raises:
        ValueError: if gamma, lam or critic_lam is outside [0, 1], or length_alpha is not positive and finite.

    >>> rewards, values = torch.tensor([[0.0, 1.0]]), torch.tensor([[0.5, 0.5]])
    >>> trajectory = Trajectory(rewards=rewards, values=values, mask=rewards >= 0)
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
        _check_unit_interval(gamma=self.gamma, lam=self.lam, critic_lam=self.critic_lam)
        if self.length_alpha is not None and not 0.0 < self.length_alpha < float("inf"):
            raise ValueError(f"advantages.length_alpha must be positive and finite, not {self.length_alpha}")

    def __call__(self, trajectory: Trajectory) -> Estimates:
        """Return advantages and λ-returns, each [B, T]."""
        deltas, mask = _deltas(trajectory, self.gamma), trajectory.mask
        advantages = discounted_sum(deltas, mask, self.gamma * self._lam(trajectory))
        if self.critic_lam is None:
            return _estimates(advantages, trajectory)
        return _estimates(advantages, trajectory, discounted_sum(deltas, mask, self.gamma * self.critic_lam))

    def _lam(self, trajectory: Trajectory) -> float | Tensor:
        """Return the λ of the advantages: a number, or a tensor [B] if λ depends on the response's length."""
        if self.length_alpha is None:
            return self.lam
        length = trajectory.mask.sum(1).clamp(min=1).to(trajectory.rewards.dtype)  # [B]
        return (1.0 - 1.0 / (self.length_alpha * length)).clamp(min=0.0)


def td_errors(
    rewards: Tensor, values: Tensor | None, mask: Tensor, bootstrap: Tensor | None = None, gamma: float = 1.0
) -> Tensor:
    """Compute the TD errors δₜ = rₜ + γ Vₜ₊₁ − Vₜ, where t + 1 is the next token inside the mask.

    Source: Sutton & Barto 2018, equation 6.5.

    Args:
        rewards: [B, T], the reward after each token.
        values: [B, T], V of the state before each token; None for V = 0.
        mask: Bool [B, T], True at the tokens that count; it may have holes.
        bootstrap: [B], the value V after the last token inside the mask; None for 0.
        gamma: The discount γ.

    Returns:
        [B, T], 0 outside the mask.

    Raises:
        ValueError: if the shapes do not match.

    >>> mask = torch.tensor([[True, False, True]])
    >>> td_errors(torch.tensor([[0.0, 9.0, 1.0]]), torch.tensor([[0.5, 9.0, 0.75]]), mask)
    tensor([[0.2500, 0.0000, 0.2500]])
    """
    check_shapes(rewards=rewards, values=values, mask=mask)
    check_shapes(rows=mask.any(1), bootstrap=bootstrap)
    rewards = torch.where(mask, rewards, 0.0)
    values = torch.zeros_like(rewards) if values is None else torch.where(mask, values, 0.0)
    final_value = values.new_zeros(len(values)) if bootstrap is None else bootstrap
    next_values = torch.cat([values, final_value[:, None]], 1).gather(1, _next_token(mask))
    return torch.where(mask, rewards + gamma * next_values - values, 0.0)


def discounted_sum(x: Tensor, mask: Tensor, discount: float | Tensor) -> Tensor:
    """Compute the sums Gₜ = xₜ + discount · Gₜ₊₁ from each token to the last; t + 1 is the next token inside the mask.

    Args:
        x: [B, T], the terms of the sum.
        mask: Bool [B, T], True at the tokens that count; it may have holes.
        discount: The discount factor: one number, or one for each row, [B].

    Returns:
        [B, T], 0 outside the mask.

    Raises:
        ValueError: if the shapes do not match.

    >>> discounted_sum(torch.tensor([[1.0, 9.0, 1.0]]), torch.tensor([[True, False, True]]), discount=0.5)
    tensor([[1.5000, 0.0000, 1.0000]])
    """
    check_shapes(x=x, mask=mask)
    check_shapes(rows=mask.any(1), discount=discount if isinstance(discount, Tensor) else None)
    x = torch.where(mask, x, 0.0)
    total, sums = x.new_zeros(len(x)), torch.zeros_like(x)
    for t in reversed(range(x.shape[1])):  # cheap: a few operations per step; a decoding step takes hundreds
        total = torch.where(mask[:, t], x[:, t] + discount * total, total)
        sums[:, t] = total
    return torch.where(mask, sums, 0.0)


def n_step_sum(x: Tensor, mask: Tensor, n: int, discount: float) -> Tensor:
    """Compute the sums Σ_{k<n} discountᵏ xₜ₊ₖ of n terms, where t + k is the k-th token after t inside the mask.

    Args:
        x: [B, T], the terms of the sum.
        mask: Bool [B, T], True at the tokens that count; it may have holes.
        n: The number of terms; a sum has fewer where fewer tokens are left.
        discount: The discount factor.

    Returns:
        [B, T], 0 outside the mask.

    Raises:
        ValueError: if the shapes do not match.

    >>> n_step_sum(torch.tensor([[1.0, 2.0, 4.0]]), torch.tensor([[True, True, True]]), n=2, discount=0.5)
    tensor([[2., 4., 4.]])
    """
    check_shapes(x=x, mask=mask)
    x, end = torch.where(mask, x, 0.0), x.shape[1]  # ``pad`` adds column ``end``: zeros, and its own successor
    padded, successor = pad(x, (0, 1)), pad(_next_token(mask), (0, 1), value=end)
    index, total = torch.arange(end, device=x.device).expand_as(x), torch.zeros_like(x)
    for k in range(min(n, end)):
        total = total + discount**k * padded.gather(1, index)
        index = successor.gather(1, index)
    return torch.where(mask, total, 0.0)


def _next_token(mask: Tensor) -> Tensor:
    """Return, for each token, the index of the next token inside the mask, [B, T]; the index is T if there is none."""
    length = mask.shape[1]
    index = torch.where(mask, torch.arange(length, device=mask.device), length)
    return pad(index[:, 1:].flip(1).cummin(1).values.flip(1), (0, 1), value=length)


def _estimates(advantages: Tensor, trajectory: Trajectory, critic_advantages: Tensor | None = None) -> Estimates:
    """Return the advantages, and the critic's targets: the values plus ``critic_advantages``.

    None for ``critic_advantages`` stands for ``advantages``. Without values, V = 0.
    """
    targets = advantages if critic_advantages is None else critic_advantages
    if trajectory.values is not None:
        targets = targets + torch.where(trajectory.mask, trajectory.values, 0.0)
    return Estimates(advantages=advantages, returns=targets)


def _deltas(trajectory: Trajectory, gamma: float) -> Tensor:
    return td_errors(trajectory.rewards, trajectory.values, trajectory.mask, trajectory.bootstrap, gamma)


def _check_unit_interval(**fields: float | None) -> None:
    for name, value in fields.items():
        if value is not None and not 0.0 <= value <= 1.0:
            raise ValueError(f"advantages.{name} must be in [0, 1], not {value}")
