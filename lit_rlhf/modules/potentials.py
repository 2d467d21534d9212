"""Potential-based reward shaping: the score of the beginning of a response is the potential of the state after it."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lit_rlhf.modules.decoding import decode
from lit_rlhf.types import PromptBatch, Rollout


@torch.no_grad()
def potentials(module: Any, rollout: Rollout, batch: PromptBatch) -> Tensor | None:
    """Return the potential of the state before each token, [B, T], in units of the shaped score; 0 outside the mask.

    Every ``scores.potential_every`` tokens, from the first on, the potential is the score of what the response contains
    so far, and it stays the same until the next of these tokens. Responses that have ended are not scored again. All
    processes call this function together.

    Args:
        module: The `OnPolicy` module that trains.
        rollout: The responses.
        batch: The prompts that they answer.

    Returns:
        The potentials; None without ``scores.potential_every``.

    Raises:
        UserError: if a reward fails for the beginnings.
    """
    every = module.scores.shaping.potential_every
    if every is None:
        return None
    found = torch.zeros_like(rollout.rollout_logprobs)
    (longest,) = module.max_over_ranks(found.shape[1])  # each call of a sharded reward model gathers its weights
    for start in range(0, longest, every):
        rows = (rollout.response_lengths > start).nonzero().squeeze(1)
        rows = rows if len(rows) else rows.new_zeros(1)  # one row, whose score is not used, for the call
        beginnings = first_tokens(rollout, start, module.special_tokens.pad)
        inputs = decode(beginnings, batch, module.tokenizer, int(module.iteration)).select(rows)
        _, scores = module.scores.judge(inputs)
        found[rows, start : start + every] = module.scores.scale(scores)[:, None]
    return found.masked_fill(~rollout.response_mask, 0.0)


def first_tokens(rollout: Rollout, count: int, pad: int) -> Rollout:
    """Return the rollout with at most the first tokens of each response; a response that has more is truncated.

    Args:
        rollout: The responses, B rows.
        count: The number of tokens to keep, 0 or more.
        pad: The padding token.

    >>> rollout = Rollout(
    ...     tokens=torch.tensor([[5, 8, 9], [6, 7, 0]]),
    ...     prompt_lengths=torch.tensor([1, 1]),
    ...     response_lengths=torch.tensor([2, 1]),
    ...     rollout_logprobs=torch.zeros(2, 2),
    ...     rollout_entropy=torch.zeros(2, 2),
    ...     response_mask=torch.tensor([[True, True], [True, False]]),
    ...     terminated=torch.tensor([True, True]),
    ...     group=torch.tensor([0, 1]),
    ... )
    >>> beginnings = first_tokens(rollout, 1, pad=0)
    >>> beginnings.tokens, beginnings.terminated
    (tensor([[5, 8, 0],
            [6, 7, 0]]), tensor([False,  True]))
    """
    kept = rollout.response_lengths.clamp(max=count)
    ends, index = rollout.prompt_lengths + kept, torch.arange(rollout.tokens.shape[1], device=kept.device)
    time = torch.arange(rollout.response_mask.shape[1], device=kept.device)
    return replace(
        rollout,
        tokens=rollout.tokens.masked_fill(index >= ends[:, None], pad),
        response_lengths=kept,
        response_mask=rollout.response_mask & (time < count),
        terminated=rollout.terminated & (rollout.response_lengths <= count),
    )
