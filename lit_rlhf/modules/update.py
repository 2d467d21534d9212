"""The options of the update phase."""

import math
from dataclasses import dataclass
from typing import get_args

from torch import Tensor

from lit_rlhf.algorithms.masked import Aggregation


@dataclass(frozen=True)
class Update:
    """The options of the update, in which the models learn from an iteration's experience; the defaults are PPO's.

    Args:
        epochs: The number of passes over the experience.
        minibatches: The number of minibatches in each pass; each takes one optimizer step.
        shuffle: Whether the rows are shuffled before they are cut into minibatches. If not, each minibatch has
            consecutive rows, such as the responses that one worker process of `Ahead` drew.
        max_tokens: The maximum number of tokens in a micro-batch. A prompt counts once for all its responses, and
            padding only if the model processes it. The number affects memory and speed only.
            On a single GPU, an update that runs out of memory halves this number for the rest of the run.
        aggregation: How the losses of the tokens are averaged: ``token``, ``sequence`` or ``constant``.
        whiten_advantages: Whether to normalise the iteration's advantages to mean 0 and variance 1, over all ranks.
        whiten_rewards: Whether to scale the iteration's rewards to variance 1, over all ranks, before advantages are
            estimated; the mean of the rewards is kept.
        value_clip: The largest distance, in units of score, between a value and its old value in the clipped value
            loss; None for no clipping.
        value_coef: The factor of the value loss.
        entropy_coef: The factor of the entropy bonus, in units of advantage per nat.
        clip_grad_norm: The maximum gradient norm of each optimizer's parameters, to which a larger gradient is scaled
            down; None for no clipping.
        target_kl: The largest KL to the old policy, in nats per token; the first minibatch that exceeds it ends the
            update, without a step. None for no limit.
        critic_warmup: The number of iterations at the beginning of the run in which only the critic learns. The actor
            keeps its initial weights, and coefficients that adapt to the KL keep their values. Early advantages are
            noise if the critic knows nothing yet (Yuan et al. 2025, VC-PPO, arXiv 2503.01491, section 3.1). It needs a
            critic with its own weights.

    Raises:
        ValueError: if a number is out of range, or aggregation is not one of the three.

    >>> Update(epochs=1, minibatches=1).clip_grad_norm
    1.0
    """

    epochs: int = 4
    minibatches: int = 4
    shuffle: bool = True
    max_tokens: int = 8192
    aggregation: Aggregation = "token"
    whiten_advantages: bool = True
    whiten_rewards: bool = False
    value_clip: float | None = 0.2
    value_coef: float = 1.0
    entropy_coef: float = 0.0
    clip_grad_norm: float | None = 1.0
    target_kl: float | None = None
    critic_warmup: int = 0

    def trains_only_critic(self, iteration: Tensor) -> bool:
        """Return whether only the critic learns in an iteration, given the number of iterations before it, [] int64.

        The host waits for the device only in runs in which the critic is warmed up.
        """
        return self.critic_warmup > 0 and int(iteration) < self.critic_warmup

    def __post_init__(self) -> None:
        for name in ("epochs", "minibatches", "max_tokens"):
            if not getattr(self, name) >= 1:
                raise ValueError(f"update.{name} must be 1 or more, not {getattr(self, name)}")
        if self.aggregation not in get_args(Aggregation):
            choices = ", ".join(get_args(Aggregation))
            raise ValueError(f"update.aggregation must be one of {choices}, not {self.aggregation!r}")
        for name in ("value_clip", "clip_grad_norm", "target_kl"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"update.{name} must be positive or null, not {value}")
        if not self.critic_warmup >= 0:
            raise ValueError(f"update.critic_warmup must be 0 or more, not {self.critic_warmup}")
        for name in ("value_coef", "entropy_coef"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"update.{name} must be a finite number, not {getattr(self, name)}")


def check_limits(max_tokens: int, clip_grad_norm: float | None) -> None:
    """Check the options of the optimizer step that SFT, reward modelling and DPO share.

    Args:
        max_tokens: The maximum number of tokens in a micro-batch.
        clip_grad_norm: The maximum gradient norm; None for no clipping.

    Raises:
        ValueError: if a number is out of range.

    >>> check_limits(max_tokens=8192, clip_grad_norm=None)
    """
    if max_tokens < 1:
        raise ValueError(f"model.max_tokens must be 1 or more, not {max_tokens}")
    if clip_grad_norm is not None and not clip_grad_norm > 0:
        raise ValueError(f"model.clip_grad_norm must be positive or null, not {clip_grad_norm}")
