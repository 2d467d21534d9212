"""The update phase: from experience to optimizer steps."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from lit_rlhf.algorithms.kl import k1, k2, k3
from lit_rlhf.algorithms.masked import Aggregation, Reduce
from lit_rlhf.errors import UserError


@dataclass(frozen=True)
class Update:
    """How an iteration's experience is learnt from. The defaults are PPO's.

    Args:
        epochs: Passes over the experience.
        minibatches: Optimizer steps a pass.
        max_tokens: Padded tokens of a micro-batch at most; changes memory and speed, never the result.
        aggregation: How token losses become one: ``token``, ``sequence`` or ``constant`` means.
        whiten_advantages: Scale the iteration's advantages to mean 0 and variance 1, over all ranks.
        whiten_rewards: Scale its rewards to variance 1 before the advantages; their mean stays.
        value_clip: Clip range of the value loss around the old value; None: plain.
        value_coef: Factor of the value loss.
        entropy_coef: Factor of the entropy bonus.
        clip_grad_norm: Largest gradient norm of each optimizer's parameters; None: unbounded.
        target_kl: Stop the iteration's epochs once a minibatch's KL to the old policy exceeds it (nats a token).

    Raises:
        ValueError: if a number is out of range.
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


def check_finite(**values: Tensor) -> None:
    """Stop before the step if a loss or gradient is not a number.

    Raises:
        UserError: naming what is not finite.
    """
    for name, value in values.items():
        if not torch.isfinite(value).all():
            raise UserError(
                f"the {name.replace('_', ' ')} is {value.item():g}: stopped before the step, and the last checkpoint "
                "is good. A smaller learning rate, a value_clip or a score clip usually helps"
            )


def clip_gradients(parameters: Sequence[Tensor], max_norm: float | None, reduce: Reduce | None = None) -> Tensor:
    """Clip the parameters' gradient norm in place, and return what it was, [].

    Args:
        parameters: Those of one optimizer.
        max_norm: The largest norm; None: unbounded.
        reduce: Sums a tensor over all ranks, where each holds a share that torch does not know to be one (FSDP1).

    Raises:
        UserError: if it is not finite.
    """
    found = [p.grad for p in parameters if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(found) if found else torch.zeros((), device=parameters[0].device)
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    if reduce is not None:
        norm = reduce(norm.square()).sqrt()
    check_finite(gradient_norm=norm)
    if max_norm is not None:
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm
