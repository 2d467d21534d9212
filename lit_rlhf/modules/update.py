"""The options of the update phase, and the checks around an optimizer step."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from lit_rlhf.algorithms.masked import Aggregation, Reduce
from lit_rlhf.errors import UserError


@dataclass(frozen=True)
class Update:
    """The options of the update, in which the models learn from an iteration's experience; the defaults are PPO's.

    Args:
        epochs: The number of passes over the experience.
        minibatches: The number of minibatches in each pass; each takes one optimizer step.
        max_tokens: The maximum number of tokens in a micro-batch, including padding. It affects memory and speed only.
        aggregation: How the losses of the tokens are averaged: ``token``, ``sequence`` or ``constant``.
        whiten_advantages: Whether to normalise the iteration's advantages to mean 0 and variance 1, over all ranks.
        whiten_rewards: Whether to scale the iteration's rewards to variance 1, over all ranks, before advantages are
            estimated; the mean of the rewards is kept.
        value_clip: The largest distance from the old value, in units of score, to which the value loss clips a value;
            None for no clipping.
        value_coef: The factor of the value loss.
        entropy_coef: The factor of the entropy bonus.
        clip_grad_norm: The maximum gradient norm of each optimizer's parameters, to which a larger gradient is scaled
            down; None for no clipping.
        target_kl: The largest KL to the old policy, in nats per token; the first minibatch that exceeds it ends the
            update, without a step. None for no limit.

    Raises:
        ValueError: if a number is out of range, or aggregation is not one of the three.

    >>> Update(epochs=1, minibatches=1).clip_grad_norm
    1.0
    """

    epochs: int = 4
    minibatches: int = 4
    max_tokens: int = 8192
    aggregation: Aggregation = "token"
    whiten_advantages: bool = True
    whiten_rewards: bool = False
    value_clip: float | None = 0.2
    value_coef: float = 1.0
    entropy_coef: float = 0.0
    clip_grad_norm: float | None = 1.0
    target_kl: float | None = None

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
        for name in ("value_coef", "entropy_coef"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"update.{name} must be a finite number, not {getattr(self, name)}")


def check_finite(**values: Tensor) -> None:
    """Check that losses and gradient norms are finite before a step; the host waits for the device only once.

    Args:
        values: Tensors of shape [] on one device, keyed by the names to use in the message.

    Raises:
        UserError: if a value is not finite; the message names the first such value.

    >>> check_finite(policy_loss=torch.tensor(0.5), value_loss=torch.tensor(float("nan")))  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ...
    lit_rlhf.errors.UserError: the value loss is nan: stopped before the step, and the last checkpoint is good. ...
    """
    if torch.stack([value.detach().float() for value in values.values()]).isfinite().all():
        return
    name, value = next((name, value) for name, value in values.items() if not torch.isfinite(value))
    raise UserError(
        f"the {name.replace('_', ' ')} is {value.item():g}: stopped before the step, and the last checkpoint is good. "
        "A smaller learning rate, a value_clip or a score clip usually helps"
    )


def clip_gradients(parameters: Sequence[Tensor], max_norm: float | None, reduce: Reduce | None = None) -> Tensor:
    """Clip the norm of the parameters' gradients in place, and return the norm before clipping, [].

    Args:
        parameters: The parameters of one optimizer.
        max_norm: The norm to which a larger gradient is scaled down; None for no clipping.
        reduce: A function that sums a tensor over all ranks; needed if each rank holds its shards of the gradients as
            plain tensors (FSDP1).

    Raises:
        UserError: if the norm is not finite.

    >>> weight = torch.zeros(2, requires_grad=True)
    >>> (3.0 * weight[0] + 4.0 * weight[1]).backward()
    >>> clip_gradients([weight], max_norm=1.0), weight.grad
    (tensor(5.), tensor([0.6000, 0.8000]))
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients) if gradients else torch.zeros((), device=parameters[0].device)
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    if reduce is not None:
        norm = reduce(norm.square()).sqrt()
    check_finite(gradient_norm=norm)
    if max_norm is not None:
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm
