"""Estimators of KL(π ‖ π_ref) from samples of π, and the coefficients that weigh it.

Units: nats. With x drawn from π and r = log π_ref(x) − log π(x) (Schulman 2020, «Approximating KL divergence»,
joschu.net/blog/kl-approx.html):

====  ===================  =========  ==================================  ==========================
name  value                unbiased?  as a loss term                      in the reward
====  ===================  =========  ==================================  ==========================
k1    −r                   yes        its expected gradient is 0          right
k2    r² / 2               no         right for each state                biased
k3    exp(r) − 1 − r       yes, ≥ 0   on average that of KL(π_ref ‖ π)    biased
full  Σₓ π(x) log π/π_ref  exact      right; needs both models' logits    lacks its own state's part
====  ===================  =========  ==================================  ==========================

All of them are of one token. The KL of a response is the sum over its tokens, and that is what the controllers take.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

MAX_LOG_RATIO = 20.0
"""exp(20) ≈ 5e8: beyond it a ratio says only «far too large», and its exponential would overflow."""


def k1(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """log π − log π_ref: unbiased, of either sign.

    >>> k1(torch.tensor([-1.0]), torch.tensor([-1.5]))
    tensor([0.5000])
    """
    return logprobs - ref_logprobs


def k2(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """(log π − log π_ref)² / 2: biased, low variance.

    >>> k2(torch.tensor([-1.0]), torch.tensor([-1.5]))
    tensor([0.1250])
    """
    return 0.5 * (logprobs - ref_logprobs) ** 2


def k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """exp(r) − 1 − r with r = log π_ref − log π: unbiased and never negative. Where r > 20 it counts as 20.

    >>> k3(torch.tensor([-1.0]), torch.tensor([-1.5]))
    tensor([0.1065])
    """
    r = (ref_logprobs - logprobs).clamp(max=MAX_LOG_RATIO)
    return torch.expm1(r) - r


def full_kl(logits: Tensor, ref_logits: Tensor) -> Tensor:
    """KL(π ‖ π_ref) of two next-token distributions, Σₓ π(x) (log π(x) − log π_ref(x)), over the whole vocabulary.

    Args:
        logits: [..., V], divided by the temperature; need not be normalised.
        ref_logits: [..., V].

    Returns:
        [...], in nats. A token that π never takes (logit −∞) adds 0.

    >>> full_kl(torch.tensor([0.0, 0.0]), torch.tensor([0.0, 1.0986]))
    tensor(0.1438)
    """
    logprobs, ref_logprobs = torch.log_softmax(logits, -1), torch.log_softmax(ref_logits, -1)
    taken = torch.isfinite(logprobs)
    difference = torch.where(taken, logprobs, 0.0) - torch.where(taken, ref_logprobs, 0.0)
    return (logprobs.exp() * difference).sum(-1)


class KLController(ABC):
    """The coefficient of the KL to the reference, and how it follows what is measured."""

    coef: float
    """The coefficient now, in units of score a nat."""

    @abstractmethod
    def update(self, kl: float, n: int) -> None:
        """Take notice of an iteration's mean KL to the reference, in nats a *response*, over n responses."""


@dataclass(frozen=True)
class FixedKL(KLController):
    """A constant coefficient.

    Args:
        coef: The weight of the KL, in units of score a nat; 0 or more.

    Raises:
        ValueError: if coef is negative.

    >>> FixedKL(coef=0.05).coef
    0.05
    """

    coef: float = 0.05

    def __post_init__(self) -> None:
        if not 0.0 <= self.coef < float("inf"):
            raise ValueError(f"kl.coef must be 0 or more, not {self.coef}")

    def update(self, kl: float, n: int) -> None:
        """Nothing: the coefficient is fixed."""


class AdaptiveKL(nn.Module, KLController):
    """A coefficient that holds the KL to the reference at a target.

    After an iteration of n responses: coef ← coef (1 + e min(n / horizon, 1)), e = clip(KL / target − 1, −0.2, 0.2).
    The coefficient is in the checkpoint.

    Source: Ziegler et al. 2019 (arXiv 1909.08593), section 2.2.

    Args:
        coef: The coefficient at the start, in units of score a nat; positive.
        target: The KL to hold, in nats a *response* (not a token).
        horizon: In responses: in so many the coefficient moves by a factor of about e^{0.2} at most.

    Raises:
        ValueError: if a number is not positive.

    >>> kl = AdaptiveKL(coef=0.2, target=6.0, horizon=640)
    >>> kl.update(12.0, n=64)
    >>> round(kl.coef, 6)
    0.204
    """

    def __init__(self, coef: float = 0.2, target: float = 6.0, horizon: float = 10000.0) -> None:
        super().__init__()
        for name, value in (("coef", coef), ("target", target), ("horizon", horizon)):
            if not 0.0 < value < float("inf"):
                raise ValueError(f"kl.{name} must be positive, not {value}")
        self.coef = coef
        self.target = target
        self.horizon = horizon

    def update(self, kl: float, n: int) -> None:
        """Follow an iteration's mean KL to the reference, in nats a response, over n responses."""
        error = min(max(kl / self.target - 1.0, -0.2), 0.2)
        self.coef *= 1.0 + error * min(n / self.horizon, 1.0)

    def get_extra_state(self) -> Tensor:
        """The coefficient, for the checkpoint (a buffer would be rounded in half precision)."""
        return torch.tensor(self.coef, dtype=torch.float64)

    def set_extra_state(self, state: Tensor) -> None:
        """Go on with this coefficient."""
        self.coef = float(state)


@dataclass(frozen=True)
class ReferenceKL:
    """How the KL to the reference enters.

    The gradient of E[Σₜ KLₜ] has two parts: a token's effect on the KL of the states after it, which a reward carries,
    and on that of its own state. In the reward, k1 carries both, as its own expected gradient is 0; k2 and k3 do not.
    ``full`` depends on the state alone, so its second part is added to the loss, in the advantages' scale. In ``loss``
    the coefficient is in units of the advantages as they are, whitened or not.

    Args:
        where: ``reward``: on every token, minus coef × estimate; ``loss``: as a term of the loss, each token by itself.
        estimator: ``k1``, ``k2``, ``k3`` of the sampled token, or ``full`` over the vocabulary, which costs a forward
            of the reference in the update. Right are k1 and full in the reward, k2 and full in the loss; k1 in the loss
            has no gradient on average, k3 that of the reverse KL.

    Raises:
        ValueError: for k1 in the loss.
    """

    where: Literal["reward", "loss"] = "reward"
    estimator: Literal["k1", "k2", "k3", "full"] = "k1"

    def __post_init__(self) -> None:
        if self.where == "loss" and self.estimator == "k1":
            raise ValueError("reference_kl.estimator k1 in the loss has an expected gradient of 0; take k2, k3 or full")

    @property
    def is_full(self) -> bool:
        """Whether the full KL is wanted."""
        return self.estimator == "full"

    @property
    def in_loss(self) -> bool:
        """Whether the loss has a term of it."""
        return self.where == "loss" or self.is_full

    def estimate(self, logprobs: Tensor, ref_logprobs: Tensor, full_kl: Tensor | None) -> Tensor:
        """KL(π ‖ π_ref) of each token, [B, T], in nats.

        Args:
            logprobs: [B, T], of the sampled tokens.
            ref_logprobs: [B, T].
            full_kl: [B, T], over the vocabulary; only ``full`` needs it.
        """
        if self.estimator == "full":
            assert full_kl is not None
            return full_kl
        return {"k1": k1, "k2": k2, "k3": k3}[self.estimator](logprobs, ref_logprobs)
