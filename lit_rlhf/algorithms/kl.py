"""Estimators of KL(π ‖ π_ref) from samples of π, and controllers of the coefficient of this KL.

All values are in nats. With x drawn from π and r = log π_ref(x) − log π(x), the estimators are (Schulman 2020,
"Approximating KL divergence", joschu.net/blog/kl-approx.html):

====  ===================  =========  ===================================  ==============================
name  value                unbiased?  gradient as a loss term              gradient in the reward
====  ===================  =========  ===================================  ==============================
k1    −r                   yes        0 on average                         unbiased
k2    r² / 2               no         unbiased for each state              biased
k3    exp(r) − 1 − r       yes, ≥ 0   that of KL(π_ref ‖ π) on average     biased
full  Σₓ π(x) log π/π_ref  exact      exact for each state                 omits the token's own state
====  ===================  =========  ===================================  ==============================

Each estimator gives the KL of one token; ``full`` needs the logits of both models. The controllers take the KL of a
response, which is the sum over its tokens.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from lit_rlhf.types import check_shapes

MAX_LOG_RATIO = 20.0
"""The bound on log-ratios: exp(20) ≈ 5e8 already means "far too large", and exp(89) would overflow in float32."""


def k1(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Estimate KL(π ‖ π_ref) of each token by log π − log π_ref, which is unbiased and may be negative.

    Args:
        logprobs: [B, T], log π of the sampled tokens.
        ref_logprobs: [B, T], log π_ref of the same tokens.

    Returns:
        [B, T], in nats.

    Raises:
        ValueError: if the shapes do not match.

    >>> k1(torch.tensor([-1.0]), torch.tensor([-1.5]))
    tensor([0.5000])
    """
    check_shapes(logprobs=logprobs, ref_logprobs=ref_logprobs)
    return logprobs - ref_logprobs


def k2(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Estimate KL(π ‖ π_ref) of each token by (log π − log π_ref)² / 2, which is biased and has low variance.

    Args:
        logprobs: [B, T], log π of the sampled tokens.
        ref_logprobs: [B, T], log π_ref of the same tokens.

    Returns:
        [B, T], in nats.

    Raises:
        ValueError: if the shapes do not match.

    >>> k2(torch.tensor([-1.0]), torch.tensor([-1.5]))
    tensor([0.1250])
    """
    check_shapes(logprobs=logprobs, ref_logprobs=ref_logprobs)
    return 0.5 * (logprobs - ref_logprobs) ** 2


def k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Estimate KL(π ‖ π_ref) of each token by exp(r) − 1 − r with r = log π_ref − log π: unbiased and never negative.

    Args:
        logprobs: [B, T], log π of the sampled tokens.
        ref_logprobs: [B, T], log π_ref of the same tokens.

    Returns:
        [B, T], in nats; r is clamped to at most 20.

    Raises:
        ValueError: if the shapes do not match.

    >>> k3(torch.tensor([-1.0]), torch.tensor([-1.5]))
    tensor([0.1065])
    """
    check_shapes(logprobs=logprobs, ref_logprobs=ref_logprobs)
    r = (ref_logprobs - logprobs).clamp(max=MAX_LOG_RATIO)
    return torch.expm1(r) - r


def full_kl(logits: Tensor, ref_logits: Tensor) -> Tensor:
    """Compute KL(π ‖ π_ref) = Σₓ π(x) (log π(x) − log π_ref(x)) of next-token distributions over the vocabulary.

    Args:
        logits: [..., V], the logits of π, already divided by the temperature; they need not be normalised.
        ref_logits: [..., V], the logits of π_ref, in the same form.

    Returns:
        [...], in nats. A token outside the support of π (logit −∞) contributes 0.

    Raises:
        ValueError: if the shapes do not match.

    >>> full_kl(torch.tensor([0.0, 0.0]), torch.tensor([0.0, 1.0986]))
    tensor(0.1438)
    """
    check_shapes(logits=logits, ref_logits=ref_logits)
    logprobs, ref_logprobs = torch.log_softmax(logits, -1), torch.log_softmax(ref_logits, -1)
    support = torch.isfinite(logprobs)
    log_ratio = torch.where(support, logprobs, 0.0) - torch.where(support, ref_logprobs, 0.0)
    return (logprobs.exp() * log_ratio).sum(-1)


class KLController(ABC):
    """The coefficient of the KL to the reference model, and the rule that adapts this coefficient to the measured KL.

    >>> class Halving(KLController):
    ...     coef = 0.1
    ...     def update(self, kl: float, n: int) -> None:
    ...         self.coef /= 2
    >>> controller = Halving()
    >>> controller.update(kl=6.0, n=64)
    >>> controller.coef
    0.05
    """

    coef: float
    """The current coefficient, in units of score per nat."""

    @abstractmethod
    def update(self, kl: float, n: int) -> None:
        """Update the coefficient after an iteration.

        Args:
            kl: The iteration's mean KL to the reference, in nats per *response*.
            n: The number of responses in the mean.
        """


@dataclass(frozen=True)
class FixedKL(KLController):
    """A constant coefficient of the KL to the reference model.

    Args:
        coef: The coefficient, in units of score per nat; 0 or more.

    Raises:
        ValueError: if coef is negative or not finite.

    >>> FixedKL(coef=0.05).coef
    0.05
    """

    coef: float = 0.05

    def __post_init__(self) -> None:
        if not 0.0 <= self.coef < float("inf"):
            raise ValueError(f"kl.coef must be 0 or more and finite, not {self.coef}")

    def update(self, kl: float, n: int) -> None:
        """Leave the coefficient unchanged."""


class AdaptiveKL(nn.Module, KLController):
    """A coefficient that is adapted so that the KL to the reference model stays near a target.

    An iteration of n responses multiplies the coefficient by 1 + e min(n / horizon, 1), where e is the clipped relative
    error of the KL: e = clip(KL / target − 1, −0.2, 0.2). The coefficient is saved in the checkpoint.

    Source: Ziegler et al. 2019 (arXiv 1909.08593), section 2.2.

    Args:
        coef: The initial coefficient, in units of score per nat; positive.
        target: The KL to aim for, in nats per *response* (not per token).
        horizon: The number of responses within which the coefficient changes by a factor of at most about exp(0.2).

    Raises:
        ValueError: if coef, target or horizon is not positive and finite.

    >>> kl = AdaptiveKL(coef=0.2, target=6.0, horizon=640)
    >>> kl.update(12.0, n=64)
    >>> round(kl.coef, 6)
    0.204
    """

    def __init__(self, coef: float = 0.2, target: float = 6.0, horizon: float = 10000.0) -> None:
        super().__init__()
        for name, value in (("coef", coef), ("target", target), ("horizon", horizon)):
            if not 0.0 < value < float("inf"):
                raise ValueError(f"kl.{name} must be positive and finite, not {value}")
        self.coef = coef
        self.target = target
        self.horizon = horizon

    def update(self, kl: float, n: int) -> None:
        """Adapt the coefficient to ``kl``, the mean KL of n responses, in nats per response."""
        error = min(max(kl / self.target - 1.0, -0.2), 0.2)
        self.coef *= 1.0 + error * min(n / self.horizon, 1.0)

    def get_extra_state(self) -> Tensor:
        """Return the coefficient for the checkpoint (a buffer would be rounded in half precision)."""
        return torch.tensor(self.coef, dtype=torch.float64)

    def set_extra_state(self, state: Tensor) -> None:
        """Restore the coefficient from a checkpoint."""
        self.coef = float(state)


@dataclass(frozen=True)
class ReferenceKL:
    """How the KL to the reference model is used in training: in the reward or in the loss, and with which estimator.

    The gradient of E[Σₜ KLₜ] has two parts: the effect of a token on the KL of the states after it, and the effect of
    the policy on the KL of the token's own state. Any estimator in the reward gives the first part (k2, whose value is
    biased, only approximately). k1 in the reward also gives the second part (k2 and k3 do not), because the expected
    gradient of k1 itself is 0. ``full`` depends on the state and not on the sampled token, so in the reward it gives
    only the first part; the second part is added to the loss, on the scale of the advantages. With ``where="loss"``,
    the coefficient is in units of advantage per nat, whether the advantages are whitened or not.

    Args:
        where: ``reward`` subtracts coef × estimate from the reward of every token; ``loss`` adds coef × estimate to the
            loss of each token, so that a token is not charged for the KL of later tokens.
        estimator: ``k1``, ``k2`` or ``k3`` of the sampled token, or ``full`` over the vocabulary, which costs further
            forward passes of the reference model. Use k1 or full in the reward, and k2 or full in the loss; as a loss
            term, k1 has no gradient on average, and k3 has the gradient of the opposite KL, KL(π_ref ‖ π). ``full`` in
            the reward does not go with advantages on another scale than the rewards (`GroupNormalized`, `BestOfN`).

    Raises:
        ValueError: if where is ``loss`` and estimator is ``k1``.

    >>> kl = ReferenceKL(where="loss", estimator="k2")
    >>> kl.estimate(torch.tensor([[-1.0]]), torch.tensor([[-1.5]]), full_kl=None)
    tensor([[0.1250]])
    >>> kl.in_loss, kl.is_full
    (True, False)
    """

    where: Literal["reward", "loss"] = "reward"
    estimator: Literal["k1", "k2", "k3", "full"] = "k1"

    def __post_init__(self) -> None:
        if self.where == "loss" and self.estimator == "k1":
            raise ValueError("reference_kl.estimator k1 in the loss has an expected gradient of 0; use k2, k3 or full")

    @property
    def is_full(self) -> bool:
        """Whether the KL over the whole vocabulary is used."""
        return self.estimator == "full"

    @property
    def in_loss(self) -> bool:
        """Whether the loss has a KL term."""
        return self.where == "loss" or self.is_full

    def estimate(self, logprobs: Tensor, ref_logprobs: Tensor, full_kl: Tensor | None) -> Tensor:
        """Estimate KL(π ‖ π_ref) of each token.

        Args:
            logprobs: [B, T], log π of the sampled tokens.
            ref_logprobs: [B, T], log π_ref of the same tokens.
            full_kl: [B, T], the KL over the vocabulary; needed only if the estimator is ``full``.

        Returns:
            [B, T], in nats.

        Raises:
            ValueError: if the shapes of ``logprobs`` and ``ref_logprobs`` do not match, unless the estimator is
                ``full``.
        """
        if self.estimator == "full":
            assert full_kl is not None
            return full_kl
        return {"k1": k1, "k2": k2, "k3": k3}[self.estimator](logprobs, ref_logprobs)
