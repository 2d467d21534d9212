"""Responses that a reward failed to score: what an iteration learns from without them, and what is said about them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lit_rlhf.errors import UserError
from lit_rlhf.rewards.scores import Failures
from lit_rlhf.types import ScoredRollout

FAILED_FRACTION = "rewards/failed_fraction"


def has_failed(rewards: Mapping[str, Tensor]) -> Tensor:
    """Return a bool mask, [B], that is True for the responses that a reward failed to score, whatever its weight is.

    Args:
        rewards: The rewards by name, [B] each, NaN where they failed.

    >>> has_failed({"kind": torch.tensor([1.0, torch.nan, 0.5]), "short": torch.tensor([torch.nan, 0.0, 1.0])})
    tensor([ True,  True, False])
    """
    return torch.stack(list(rewards.values())).isnan().any(0)


def failed_prompts(scores: Tensor, responses: int) -> Tensor:
    """Return a bool mask, [P], that is True for the prompts of which a response has no score.

    Args:
        scores: The scores of the responses, [P n], in prompt-major order; NaN without a score.
        responses: n, the number of responses to each prompt.

    >>> failed_prompts(torch.tensor([1.0, torch.nan, 0.0, 1.0]), responses=2)
    tensor([ True, False])
    """
    return scores.view(-1, responses).isnan().any(1)


def leave_out_failed(module: Any, scored: ScoredRollout, rows: Tensor | None) -> Tensor | None:
    """Leave out the prompts of which a response has no score; all processes call this function together.

    The first failure of each reward is printed.

    Args:
        module: The `OnPolicy` module that trains.
        scored: This process's responses, B rows.
        rows: The rows to learn from otherwise, [B] bool; None for all.

    Returns:
        The rows to learn from, [B] bool; None for all, on all processes or on none.

    Raises:
        UserError: if fewer responses are left, over all processes, than ``update.minibatches``.
    """
    if not module.scores.can_fail:
        return rows
    failed = failed_prompts(scored.scores, module.sampling.responses)
    kept = ~failed.repeat_interleave(module.sampling.responses)
    kept = kept if rows is None else kept & rows
    ones = torch.ones_like(kept)
    counts = torch.stack([mask.sum() for mask in (has_failed(scored.rewards), failed, kept, ones)])
    failures, prompts, left, responses = (int(count) for count in module.sum_over_ranks(counts.double()).tolist())
    if not failures:
        return rows
    iteration, needed = int(module.iteration) + 1, module.update.minibatches
    reasons = tell_failures(module, f"iteration {iteration}", responses)
    if reasons and left < needed:
        raise UserError(
            f"iteration {iteration} has {left} of {responses} responses left, and its update needs {needed} or more "
            f"(model.update.minibatches): {reasons}"
        )
    return kept if prompts else rows


def tell_failures(module: Any, when: str, responses: int | None = None) -> str:
    """Print a line for each reward that failed for the first time in this process; all processes call this function.

    Args:
        module: The `OnPolicy` module.
        when: The iteration or the stage in which the rewards failed, for the lines.
        responses: The number of responses of all processes; None to leave it out.

    Returns:
        The reasons of the failures since this function was called last, in one line.
    """
    own, scores = module.scores.take_failures(), module.scores
    every: list[Any] = [own]
    if module.trainer.world_size > 1:
        every = [None] * module.trainer.world_size
        torch.distributed.all_gather_object(every, own)
    failures: dict[str, Failures] = {}
    for name, (count, reason) in (item for part in every for item in part.items()):
        before = failures.get(name, Failures(0, reason))
        failures[name] = before._replace(responses=before.responses + count)
    for name in [name for name in failures if name not in scores.told]:
        count, reason = failures[name]
        amount = f"{count} responses" if responses is None else f"{count} of {responses} responses"
        more = f"later ones are only counted, in {FAILED_FRACTION}"
        module.print(f"reward {name}: {amount} left out in {when}: {reason}; {more}")  # the first process prints
    scores.told |= failures.keys()
    return "; ".join(reason for _, reason in failures.values())
