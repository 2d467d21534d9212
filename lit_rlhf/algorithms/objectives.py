"""Policy objectives: per-token losses [B, T] of log-probabilities and advantages.

They average nothing: the module weighs the tokens once, for the whole optimizer step (`masked.token_weights`).
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

MAX_LOG_RATIO = 20.0
"""exp(20) ≈ 5e8: beyond it a ratio says only «far too large», and its exponential would overflow."""


class Objective(ABC):
    """A policy loss to be minimised, token by token."""

    @abstractmethod
    def __call__(self, *, logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
        """The loss of each token, [B, T], 0 outside the mask; gradients flow into ``logprobs`` alone."""

    def clipped(self, *, logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
        """Bool [B, T]: tokens whose gradient the objective cuts off. None, unless it says otherwise."""
        return torch.zeros_like(mask)


def probability_ratio(logprobs: Tensor, old_logprobs: Tensor, mask: Tensor) -> Tensor:
    """ρₜ = π(aₜ|sₜ) / π_old(aₜ|sₜ), [B, T]; 1 outside the mask. The log-ratio is clamped to ±20 before exp.

    >>> probability_ratio(torch.tensor([[0.0]]), torch.tensor([[0.0]]), torch.tensor([[True]]))
    tensor([[1.]])
    """
    log_ratio = torch.where(mask, logprobs, 0.0) - torch.where(mask, old_logprobs.detach(), 0.0)
    return log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


@dataclass(frozen=True)
class Clip(Objective):
    """PPO's clipped surrogate.

    lossₜ = −min(ρₜ Aₜ, clip(ρₜ, 1 − ε, 1 + ε_high) Aₜ). With ``dual`` = c > 1 the loss of a token with Aₜ < 0 is at
    most −c Aₜ, so that one runaway ratio cannot dominate a step.

    Source: Schulman et al. 2017 (arXiv 1707.06347), equation 7; the dual clip: Ye et al. 2020 (arXiv 1912.09729),
    equation 5; asymmetric bounds: Yu et al. 2025 (arXiv 2503.14476).

    Args:
        eps: ε, the lower bound's distance from 1, in (0, 1).
        eps_high: ε_high, the upper bound's distance from 1; the same as ``eps`` if None.
        dual: c > 1, or None for no dual clip.

    Raises:
        ValueError: if a bound is out of range.

    >>> mask = torch.tensor([[True]])
    >>> Clip(0.2)(logprobs=torch.tensor([[0.5]]), old_logprobs=torch.tensor([[0.0]]),
    ...           advantages=torch.tensor([[1.0]]), mask=mask)
    tensor([[-1.2000]])
    """

    eps: float = 0.2
    eps_high: float | None = None
    dual: float | None = None

    def __post_init__(self) -> None:
        if not 0.0 < self.eps < 1.0:
            raise ValueError(f"eps must lie in (0, 1), not {self.eps}")
        if self.eps_high is not None and self.eps_high <= 0.0:
            raise ValueError(f"eps_high must be positive, not {self.eps_high}")
        if self.dual is not None and self.dual <= 1.0:
            raise ValueError(f"dual must be greater than 1, not {self.dual}")

    def __call__(self, *, logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
        """The clipped loss of each token, [B, T]."""
        ratio = probability_ratio(logprobs, old_logprobs, mask)
        advantages = torch.where(mask, advantages.detach(), 0.0)
        loss = -torch.minimum(ratio * advantages, self._clip(ratio) * advantages)
        if self.dual is not None:
            loss = torch.where(advantages < 0, torch.minimum(loss, -self.dual * advantages), loss)
        return torch.where(mask, loss, 0.0)

    def clipped(self, *, logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
        """Bool [B, T]: tokens that have already moved out of the trust interval in the direction of their advantage."""
        ratio = probability_ratio(logprobs, old_logprobs, mask)
        advantages = torch.where(mask, advantages, 0.0)
        cut = self._clip(ratio) * advantages < ratio * advantages
        if self.dual is not None:
            cut = cut | ((advantages < 0) & (ratio > self.dual))
        return cut & mask

    def _clip(self, ratio: Tensor) -> Tensor:
        high = self.eps if self.eps_high is None else self.eps_high
        return ratio.clamp(1.0 - self.eps, 1.0 + high)
