"""The guard, which stops a run if the engine's log-probabilities differ from the actor's."""

from dataclasses import dataclass
from typing import NamedTuple

import torch

from lit_rlhf.algorithms.masked import masked_sum
from lit_rlhf.models.actor import Actor
from lit_rlhf.modules.forwards import response_logprobs, rounds_float32
from lit_rlhf.modules.module import AlignmentModule
from lit_rlhf.types import Rollout

FLOAT32_BOUND, ROUNDED_BOUND = 1e-4, 0.1
"""The default bounds, in nats per token: for matrix products in float32, and for those in bfloat16 or TF32."""


class Mismatch(NamedTuple):
    """The mean and maximum of |log π − log μ| over tokens of all ranks, in nats; π is the actor and μ the engine."""

    mean: float
    maximum: float


@dataclass(frozen=True)
class Guard:
    """A check, before each update, that the engine draws responses from the actor's policy.

    In every iteration, the actor that should have drawn the responses computes the log-probabilities of a sample of
    these responses. If the mean distance between the actor's and the engine's log-probabilities exceeds the bound, the
    run stops. The usual causes are stale or damaged weights, another temperature, and another prompt template.

    Args:
        responses: The number of responses that each process checks; 0 for no check.
        bound: The largest mean of |log π − log μ|, in nats per token, where μ is the engine's policy and π the actor's;
            None for 1e-4 with matrix products in float32, or 0.1 with matrix products in bfloat16 or TF32.

    Raises:
        ValueError: if ``responses`` is negative or ``bound`` is not positive.

    >>> Guard(bound=0.1).responses
    8
    """

    responses: int = 8
    bound: float | None = None

    def __post_init__(self) -> None:
        if self.responses < 0:
            raise ValueError(f"guard.responses must be 0 (no check) or more, not {self.responses}")
        if self.bound is not None and not self.bound > 0:
            raise ValueError(f"guard.bound must be positive or null, not {self.bound}")

    def bound_for(self, precision: str | int, device: torch.device) -> float:
        """Return the bound for a precision of the Trainer and the device of the actor, in nats per token.

        >>> Guard().bound_for("bf16-mixed", torch.device("cpu"))
        0.1
        """
        if self.bound is not None:
            return self.bound
        return FLOAT32_BOUND if precision == "32-true" and not rounds_float32(device) else ROUNDED_BOUND


def measure_mismatch(module: AlignmentModule, actor: Actor, rollout: Rollout, responses: int) -> Mismatch:
    """Return the `Mismatch` on a sample of each process's responses; all processes call this function together.

    Args:
        module: The module that trains.
        actor: The actor, with the weights that should have drawn the responses.
        rollout: This process's responses.
        responses: The number of responses to measure on each process, at least one, spread evenly over the rows.
    """
    count = len(rollout.tokens)
    rows = torch.arange(min(responses, count), device=rollout.tokens.device) * count // min(responses, count)
    sample = rollout.select(rows)
    logprobs = response_logprobs(actor, sample, module.max_tokens)
    mask = sample.response_mask
    distance = torch.where(mask, (logprobs - sample.rollout_logprobs).abs(), 0.0)
    total, tokens = module.sum_over_ranks(torch.stack([masked_sum(distance, mask), mask.sum()])).tolist()
    largest = distance.max()
    if module.trainer.world_size > 1:
        largest = module.trainer.strategy.reduce(largest, reduce_op="max")
    return Mismatch(total / tokens, float(largest))
