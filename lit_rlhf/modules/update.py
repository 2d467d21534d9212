"""The options of the update phase, and the checks around an optimizer step."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, get_args

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
            On a single GPU, an update that runs out of memory halves it for the rest of the run.
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


def check_limits(max_tokens: int, clip_grad_norm: float | None) -> None:
    """Check the options of the step of SFT, reward modelling and DPO.

    Raises:
        ValueError: if a number is out of range.

    >>> check_limits(max_tokens=8192, clip_grad_norm=None)
    """
    if max_tokens < 1:
        raise ValueError(f"model.max_tokens must be 1 or more, not {max_tokens}")
    if clip_grad_norm is not None and not clip_grad_norm > 0:
        raise ValueError(f"model.clip_grad_norm must be positive or null, not {clip_grad_norm}")


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


def gradient_norm(parameters: Sequence[Tensor], reduce: Reduce | None = None) -> Tensor:
    """Return the norm of the parameters' gradients, [], without waiting for the device.

    Args:
        parameters: The parameters of one optimizer.
        reduce: A function that sums a tensor over all ranks; needed if each rank holds its shards of the gradients as
            plain tensors (FSDP1).

    >>> weight = torch.zeros(2, requires_grad=True)
    >>> (3.0 * weight[0] + 4.0 * weight[1]).backward()
    >>> gradient_norm([weight])
    tensor(5.)
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients) if gradients else torch.zeros((), device=parameters[0].device)
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    return norm if reduce is None else reduce(norm.square()).sqrt()


def reach(loss: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    """Return the loss, [], with a backward pass that also gives each of these parameters a gradient of 0.

    The zeros are one number in memory. DDP averages the gradients over the ranks in the last backward pass of a step,
    and waits until that pass has given a gradient to every trained parameter.

    Args:
        loss: The loss.
        parameters: Parameters on which the loss does not depend.

    >>> weight, other = torch.tensor(2.0, requires_grad=True), torch.ones(3, requires_grad=True)
    >>> reach(weight**2, [other]).backward()
    >>> weight.grad, other.grad
    (tensor(4.), tensor([0., 0., 0.]))
    """
    return _Reach.apply(loss, *parameters) if parameters else loss


class _Reach(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: Tensor, *parameters: Tensor) -> Tensor:
        ctx.shapes = [parameter.shape for parameter in parameters]
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        zero = torch.zeros_like(grad)
        return (grad, *(zero.expand(shape) for shape in ctx.shapes))
