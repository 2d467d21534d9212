"""Estimators of KL(π ‖ π_ref) from samples of π, and the coefficients that weigh it.

With x drawn from π and r = log π_ref(x) − log π(x) (Schulman 2020, «Approximating KL divergence»,
joschu.net/blog/kl-approx.html):

====  ==============  =========  ==========================================================
name  value           unbiased?  as a loss term
====  ==============  =========  ==========================================================
k1    −r              yes        its expected gradient is 0: put it into the reward instead
k2    r² / 2          no         its expected gradient is the KL's
k3    exp(r) − 1 − r  yes, ≥ 0   its gradient is biased
====  ==============  =========  ==========================================================
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from lit_rlhf.algorithms.objectives import MAX_LOG_RATIO


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
    """exp(r) − 1 − r with r = log π_ref − log π: unbiased and never negative. r is clamped to ±20 before exp.

    >>> k3(torch.tensor([-1.0]), torch.tensor([-1.5]))
    tensor([0.1065])
    """
    r = ref_logprobs - logprobs
    return torch.expm1(r.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)) - r


class KLController(ABC):
    """The coefficient of the KL to the reference, and how it follows what is measured."""

    coef: float
    """The coefficient now, in units of score a nat."""

    @abstractmethod
    def update(self, kl: float, n: int) -> None:
        """Take notice of an iteration's mean KL a response, in nats, over n responses."""


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
        if self.coef < 0:
            raise ValueError(f"coef must be 0 or more, not {self.coef}")

    def update(self, kl: float, n: int) -> None:
        """Nothing: the coefficient is fixed."""
