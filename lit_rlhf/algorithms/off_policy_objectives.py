"""Policy objectives for responses that were drawn several updates ago, so that many ratios are far from 1.

`Clip` removes the gradient of every token whose ratio is beyond a bound in the direction of its advantage. The
objectives in this module do so less often: `CISPO` never does, because it bounds the weight of the gradient instead,
and `DPPO` does so only where the probability itself has changed a lot.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lit_rlhf.algorithms.kl import MAX_LOG_RATIO
from lit_rlhf.algorithms.objectives import Objective, PolicyLoss, log_ratio, probability_ratio
from lit_rlhf.types import check_shapes


@dataclass(frozen=True)
class CISPO(Objective):
    """The policy gradient with clipped importance weights.

    lossₜ = −sg(clip(ρₜ, 1 − ε_low, 1 + ε_high)) Aₜ log π(aₜ|sₜ), where sg is the stop-gradient: the weight is a
    constant, so that every token keeps a gradient.

    Source: MiniMax 2025 (MiniMax-M1, arXiv 2506.13585), equations 4 and 5. As in that paper, there is no lower
    bound by default.

    Args:
        eps_low: ε_low, the distance of the lower bound from 1, in (0, 1]; 1 for no lower bound.
        eps_high: ε_high > 0, the distance of the upper bound from 1.

    Raises:
        ValueError: if a number is out of range.

    >>> logprobs, mask = torch.tensor([[-0.5, -0.5]]), torch.tensor([[True, True]])
    >>> CISPO(eps_high=1.0)(logprobs=logprobs, old_logprobs=torch.tensor([[-0.5, -9.0]]),
    ...                     advantages=torch.ones(1, 2), mask=mask).loss
    tensor([[0.5000, 1.0000]])
    """

    eps_low: float = 1.0
    eps_high: float = 4.0

    def __post_init__(self) -> None:
        if not 0.0 < self.eps_low <= 1.0:
            raise ValueError(f"objective.eps_low must be in (0, 1], not {self.eps_low}")
        if not self.eps_high > 0.0:
            raise ValueError(f"objective.eps_high must be positive, not {self.eps_high}")

    def __call__(self, *, logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor) -> PolicyLoss:
        """Return the loss and the unclipped ratio of each token, and a mask of the clipped weights, each [B, T]."""
        check_shapes(logprobs=logprobs, old_logprobs=old_logprobs, advantages=advantages, mask=mask)
        ratio = probability_ratio(logprobs.detach(), old_logprobs, mask)
        weights = ratio.clamp(1.0 - self.eps_low, 1.0 + self.eps_high)
        loss = -weights * torch.where(mask, advantages.detach(), 0.0) * torch.where(mask, logprobs, 0.0)
        return PolicyLoss(loss, ratio, (weights != ratio) & mask)


@dataclass(frozen=True)
class DPPO(Objective):
    """The surrogate without the tokens whose probability has already changed a lot: lossₜ = −keepₜ ρₜ Aₜ + c (log ρₜ)².

    keepₜ is 0 if Aₜ > 0 and π(aₜ|sₜ) − π_old(aₜ|sₜ) > δ, or if Aₜ < 0 and π(aₜ|sₜ) − π_old(aₜ|sₜ) < −δ, and 1
    otherwise. A bound on the difference between the probabilities allows a large factor of change for a rare token but
    only a small one for a common token; a bound on the ratio allows the same factor for all tokens.

    The difference should be measured from the policy that drew the tokens: use ``correction: {bypass: true}``, so that
    π_old is the engine's policy.

    Source: Qi et al. 2026 (arXiv 2602.04879), the binary approximation of the total variation; the penalty is from
    the default loss of prime-rl.

    Args:
        delta: δ, in (0, 1); a token is dropped if its probability has changed by more than δ in the direction of its
            advantage.
        coef: c ≥ 0, the factor of the squared log-ratio, a penalty that pulls π towards π_old; 0 for no penalty.

    Raises:
        ValueError: if a number is out of range.

    >>> logprobs, mask = torch.tensor([[0.9, 0.02]]).log(), torch.tensor([[True, True]])
    >>> DPPO(coef=0.0)(logprobs=logprobs, old_logprobs=torch.tensor([[0.6, 0.01]]).log(),
    ...                advantages=torch.ones(1, 2), mask=mask).loss
    tensor([[ 0., -2.]])
    """

    delta: float = 0.2
    coef: float = 1e-3

    def __post_init__(self) -> None:
        if not 0.0 < self.delta < 1.0:
            raise ValueError(f"objective.delta must be in (0, 1), not {self.delta}")
        if not 0.0 <= self.coef < float("inf"):
            raise ValueError(f"objective.coef must be 0 or more and finite, not {self.coef}")

    def __call__(self, *, logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor) -> PolicyLoss:
        """Return the loss and the ratio of each token, and a mask of the dropped tokens, each [B, T]."""
        check_shapes(logprobs=logprobs, old_logprobs=old_logprobs, advantages=advantages, mask=mask)
        logs = log_ratio(logprobs, old_logprobs, mask).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
        ratio, advantages = logs.exp(), torch.where(mask, advantages.detach(), 0.0)
        change = logprobs.detach().exp() - old_logprobs.detach().exp()
        dropped = mask & torch.where(advantages > 0, change > self.delta, (advantages < 0) & (change < -self.delta))
        surrogate = torch.where(dropped, 0.0, -ratio * advantages)
        return PolicyLoss(surrogate + self.coef * logs**2, ratio, dropped)
