"""Generation with the actor's own weights: a KV cache, and rows leave the batch when they have ended."""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache

from lit_rlhf.generation.engine import Engine, Sampling, Vocabulary, join_responses
from lit_rlhf.generation.sampling import sample
from lit_rlhf.models.actor import Actor
from lit_rlhf.randomness import Stream, uniforms
from lit_rlhf.types import PromptBatch, Rollout

COMPACT_BELOW = 0.75
"""Ended rows leave the cache once fewer than this share of its rows is alive: each time costs one copy of it."""


@dataclass(frozen=True)
class NativeEngine(Engine):
    """Decodes in this process; a prompt's keys and values are computed once for all its responses.

    Args:
        batch_size: Rows decoded at a time, to bound the cache's memory; None: all. The responses to
            one prompt stay together. The samples do not depend on it.
    """

    batch_size: int | None = None

    def __post_init__(self) -> None:
        if self.batch_size is not None and self.batch_size < 1:
            raise ValueError(f"batch_size must be 1 or more, or null for all rows, not {self.batch_size}")

    @torch.no_grad()
    def generate(
        self,
        actor: Actor,
        prompts: PromptBatch,
        sampling: Sampling,
        vocabulary: Vocabulary,
        *,
        stream: Stream,
        iteration: int,
    ) -> Rollout:
        """See `Engine.generate`."""
        n = sampling.responses
        rows = prompts.group.repeat_interleave(n) * n + torch.arange(n, device=prompts.group.device).repeat(
            len(prompts.group)
        )
        draws = uniforms(stream, iteration, rows, sampling.max_tokens)
        at_a_time = len(prompts.group) if self.batch_size is None else max(1, self.batch_size // n)
        tokens = torch.full_like(draws, vocabulary.pad, dtype=torch.long)
        logprobs = torch.zeros_like(draws, dtype=torch.float32)
        lengths = torch.full_like(rows, sampling.max_tokens)
        terminated = torch.zeros_like(rows, dtype=torch.bool)
        for start in range(0, len(prompts.group), at_a_time):
            chunk = slice(start * n, (start + at_a_time) * n)
            some = slice(start, start + at_a_time)
            _decode(
                actor,
                prompts.tokens[some],
                prompts.mask[some],
                draws[chunk],
                sampling,
                vocabulary,
                tokens=tokens[chunk],
                logprobs=logprobs[chunk],
                lengths=lengths[chunk],
                terminated=terminated[chunk],
            )
        longest = int(lengths.max())
        return join_responses(
            prompts,
            sampling,
            vocabulary.pad,
            tokens=tokens[:, :longest],
            logprobs=logprobs[:, :longest],
            lengths=lengths,
            terminated=terminated,
        )


def _decode(
    actor: Actor,
    prompt_tokens: Tensor,
    prompt_mask: Tensor,
    draws: Tensor,
    sampling: Sampling,
    vocabulary: Vocabulary,
    *,
    tokens: Tensor,
    logprobs: Tensor,
    lengths: Tensor,
    terminated: Tensor,
) -> None:
    """Fill the last four, views of the rollout's rows, token by token."""
    stop = torch.tensor(vocabulary.stop, device=tokens.device)
    temperature = sampling.temperature or 1.0
    cache = DynamicCache(config=actor.model.config)
    positions = (prompt_mask.long().cumsum(1) - 1).clamp(min=0)
    logits = actor.next_logits(prompt_tokens, prompt_mask.long(), positions, cache)
    if sampling.responses > 1:
        cache.batch_repeat_interleave(sampling.responses)
    logits = logits.repeat_interleave(sampling.responses, 0)
    mask = prompt_mask.long().repeat_interleave(sampling.responses, 0)
    position = positions[:, -1:].repeat_interleave(sampling.responses, 0)
    row = torch.arange(len(tokens), device=tokens.device)  # which row of the rollout each row of the cache is
    ended = torch.zeros_like(terminated)  # of the rows in the cache
    for t in range(sampling.max_tokens):
        new = sample(logits, draws[row, t], sampling, forbidden=stop if t < sampling.min_tokens else None)
        new_logprobs = torch.log_softmax(logits / temperature, -1).gather(1, new[:, None]).squeeze(1)
        tokens[row, t] = torch.where(ended, tokens[row, t], new)
        logprobs[row, t] = torch.where(ended, 0.0, new_logprobs)
        stops = torch.isin(new, stop) & ~ended
        lengths[row] = torch.where(stops, t + 1, lengths[row])
        terminated[row] |= stops
        ended = ended | stops
        alive = int((~ended).sum())
        if alive == 0 or t + 1 == sampling.max_tokens:
            return
        if alive < COMPACT_BELOW * len(row):
            keep = (~ended).nonzero().squeeze(1)
            cache.batch_select_indices(keep)
            row, new, mask, position, ended = row[keep], new[keep], mask[keep], position[keep], ended[keep]
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
        position = position + 1
        logits = actor.next_logits(new[:, None], mask, position, cache)
