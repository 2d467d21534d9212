"""The options of the update phase, and the checks around an optimizer step."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from lit_rlhf.algorithms.masked import Aggregation, Reduce
from lit_rlhf.errors import UserError


@dataclass(frozen=True)
class Update:
    """How the models learn from an iteration's experience. The defaults are those of PPO.

    Args:
        epochs: Passes over the experience.
        minibatches: Optimizer steps in each pass.
        max_tokens: The largest number of padded tokens of a micro-batch; it changes memory and speed, never the result.
        aggregation: How the losses of the tokens are averaged: ``token``, ``sequence`` or ``constant``.
        whiten_advantages: Whether to scale the iteration's advantages to mean 0 and variance 1, over all ranks.
        whiten_rewards: Whether to scale its rewards to variance 1 before the advantages; their mean is kept.
        value_clip: The clip range of the value loss around the old value; None for no clip.
        value_coef: The factor of the value loss.
        entropy_coef: The factor of the entropy bonus.
        clip_grad_norm: The largest gradient norm of each optimizer's parameters; None for no clipping.
        target_kl: Stop the epochs once the KL of a minibatch to the old policy exceeds this, in nats a token;
            None for no such stop.

    Raises:
        ValueError: if a number is out of range.

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
            if getattr(self, name) < 1:
                raise ValueError(f"update.{name} must be 1 or more, not {getattr(self, name)}")
        for name in ("value_clip", "clip_grad_norm", "target_kl"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"update.{name} must be positive or null, not {value}")


def check_finite(**values: Tensor) -> None:
    """Stop before the step if a loss or a gradient norm is not finite; the host waits once for all of them.

    Args:
        values: [] tensors of one device, by the names that the message uses.

    Raises:
        UserError: naming the first that is not finite.

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
    """Clip the norm of the parameters' gradients in place, and return the norm before, [].

    Args:
        parameters: The parameters of one optimizer.
        max_norm: The largest norm; None for no clipping.
        reduce: Sums a tensor over all ranks; needed where each rank holds a share that is a plain tensor (FSDP1).

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
