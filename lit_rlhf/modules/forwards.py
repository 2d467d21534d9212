"""Forward passes of the actor, the reference and the critic over a rollout, without gradients and in micro-batches.

The functions `actor_outputs`, `response_logprobs` and `critic_values` must be called on all processes at the same time,
because sharded weights are gathered first. The forward passes then need no communication, so the number of
micro-batches may differ between processes.
"""

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from lit_rlhf.batching import by_micro_batch
from lit_rlhf.models.actor import Actor
from lit_rlhf.models.scoring import ScalarModel
from lit_rlhf.models.sharding import unsharded
from lit_rlhf.types import Rollout


def rounds_float32(device: torch.device) -> bool:
    """Return whether matrix products of float32 numbers on this device round their factors (TF32 on CUDA).

    The answer holds for both of torch's interfaces to this setting. ``torch.get_float32_matmul_precision`` belongs to
    the older one, and raises an error after use of the newer one, ``torch.backends.fp32_precision``.
    """
    return device.type == "cuda" and torch.backends.cuda.matmul.fp32_precision not in ("none", "ieee")


class StateValues(NamedTuple):
    """The critic's values for a rollout."""

    before_tokens: Tensor  # [B, T], of the state before each response token
    after_last: Tensor  # [B], of the state after the last response token


class ActorOutputs(NamedTuple):
    """The actor's outputs for a rollout; an output that was not computed is None."""

    logprobs: Tensor  # [B, T]
    entropy: Tensor  # [B, T], in nats
    full_kl: Tensor | None = None  # [B, T], KL(π ‖ π_other) over the vocabulary, in nats
    values: Tensor | None = None  # [B, T], of a shared critic, as `StateValues.before_tokens`
    last_values: Tensor | None = None  # [B], as `StateValues.after_last`


@torch.no_grad()
def actor_outputs(actor: Actor, rollout: Rollout, max_tokens: int, other: Actor | None = None) -> ActorOutputs:
    """Compute the actor's log-probabilities and entropies, its full KL to another actor, and a shared critic's values.

    Args:
        actor: The actor, whose value head gives the values if it has one.
        rollout: The rollout, with B rows.
        max_tokens: The maximum number of tokens in a micro-batch, as for `pack`.
        other: The actor to which the KL over the vocabulary (the full KL) is computed; None to leave out this KL.
    """
    with unsharded(actor, other):
        return by_micro_batch(rollout, max_tokens, actor.pads, partial(_actor_outputs, actor, other))


@torch.no_grad()
def response_logprobs(actor: Actor, rollout: Rollout, max_tokens: int) -> Tensor:
    """Compute the log-probabilities of the response tokens, [B, T]; the arguments are those of `actor_outputs`."""
    return actor_outputs(actor, rollout, max_tokens).logprobs


@torch.no_grad()
def critic_values(critic: ScalarModel, rollout: Rollout, max_tokens: int) -> StateValues:
    """Compute the critic's values for a rollout; the other arguments are as in `actor_outputs`."""

    def values(rows: Rollout) -> StateValues:
        return _state_values(rows, critic(rows.tokens, rows.lengths, rows.shared))

    with unsharded(critic):
        return by_micro_batch(rollout, max_tokens, critic.pads, values)


def _actor_outputs(actor: Actor, other: Actor | None, rollout: Rollout) -> ActorOutputs:
    stats = actor(rollout.tokens, rollout.response_tokens_mask, other, shared=rollout.shared)
    outputs = ActorOutputs(rollout.at_responses(stats.logprobs), rollout.at_responses(stats.entropy))
    if stats.full_kl is not None:
        outputs = outputs._replace(full_kl=rollout.at_responses(stats.full_kl))
    if stats.values is not None:
        values = _state_values(rollout, stats.values)
        outputs = outputs._replace(values=values.before_tokens, last_values=values.after_last)
    return outputs


def _state_values(rollout: Rollout, values: Tensor) -> StateValues:
    """Return the values before each response token and after the last one, given the values after all tokens."""
    return StateValues(rollout.before_responses(values), rollout.at_end(values))
