"""The iteration's experience, whole on every process, so that minibatches are those of the global batch."""

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from lit_rlhf.algorithms.masked import Reduce
from lit_rlhf.types import Experience


def everyones(
    experience: Experience, responses: int, sum_over_ranks: Reduce, max_over_ranks: Callable[..., list[int]]
) -> Experience:
    """The rows of all processes, in the order of the global batch.

    Each writes its own rows into a table of zeros, and the tables are added.

    Args:
        experience: This process's rows: those of a range of prompts, prompt-major.
        responses: Rows of a prompt.
        sum_over_ranks: Sums a tensor over all processes.
        max_over_ranks: The largest of some numbers over all processes.
    """
    rollout = experience.rollout
    first = int(rollout.group[0]) * responses
    rows, width, time = max_over_ranks(first + len(rollout.tokens), *rollout.tokens.shape[1:], *_time(rollout))

    def whole(x: Tensor, columns: int = time) -> Tensor:
        dtype = torch.int32 if x.dtype == torch.bool else x.dtype
        table = torch.zeros((rows, columns)[: x.ndim], dtype=dtype, device=x.device)
        place = (slice(first, first + len(x)), slice(0, x.shape[-1]))[: x.ndim]
        table[place] = x.to(dtype)
        return sum_over_ranks(table).to(x.dtype)

    gathered: dict[str, Any] = {f.name: whole(getattr(rollout, f.name)) for f in fields(rollout) if f.name != "tokens"}
    others: dict[str, Any] = {
        f.name: None if (x := getattr(experience, f.name)) is None else whole(x)
        for f in fields(experience)
        if f.name != "rollout"
    }
    return Experience(rollout=replace(rollout, tokens=whole(rollout.tokens, width), **gathered), **others)


def _time(rollout: Any) -> torch.Size:
    return rollout.response_mask.shape[1:]
