"""What travels through an iteration, stage by stage; each stage is a type of its own.

``B`` responses (prompt-major: the n responses of prompt 0, then of prompt 1, …), ``P`` tokens of the longest prompt,
``T`` of the longest response, ``S`` of the longest prompt with its response. Masks are bool and **True counts**.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor

Conversation: TypeAlias = list[dict[str, str]]
"""``[{"role": "user", "content": "…"}, …]``"""
Prompt: TypeAlias = str | Conversation


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptBatch:
    """A batch of prompts, this process's share of the global batch."""

    tokens: Tensor  # [B, P] int64, left-padded
    mask: Tensor  # [B, P] bool
    group: Tensor  # [B] int64, the prompt's place in the global batch
    prompts: Sequence[Prompt]  # B, as read
    columns: Mapping[str, Sequence[Any]]  # the records' columns, B values each

    def to(self, device: torch.device) -> "PromptBatch":
        """The same batch on another device (Lightning calls it)."""
        return _moved(self, device)


@dataclass(frozen=True, slots=True, kw_only=True)
class DemonstrationBatch:
    """A batch of texts to imitate."""

    tokens: Tensor  # [B, S] int64, right-padded
    mask: Tensor  # [B, S] bool, tokens whose prediction is trained

    def to(self, device: torch.device) -> "DemonstrationBatch":
        """The same batch on another device (Lightning calls it)."""
        return _moved(self, device)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """Prompts with the responses that the actor gave; prompt and response stand contiguous, padding on the right."""

    tokens: Tensor  # [B, S] int64
    prompt_lengths: Tensor  # [B] int64
    response_lengths: Tensor  # [B] int64, the stop token included
    rollout_logprobs: Tensor  # [B, T] float32, the engine's own
    response_mask: Tensor  # [B, T] bool
    terminated: Tensor  # [B] bool, the actor ended the response by itself (not by the limit)
    group: Tensor  # [B] int64, which prompt of the global batch

    @property
    def lengths(self) -> Tensor:
        """Tokens of prompt and response, [B]."""
        return self.prompt_lengths + self.response_lengths

    @property
    def scored(self) -> Tensor:
        """Bool [B, S], True at the response's tokens."""
        place = torch.arange(self.tokens.shape[1], device=self.tokens.device)
        return (place >= self.prompt_lengths[:, None]) & (place < self.lengths[:, None])

    def at_responses(self, x: Tensor) -> Tensor:
        """What ``x`` [B, S] holds at each response token, [B, T]; what stands outside the mask is without meaning."""
        return self._gather(x, self.prompt_lengths)

    def before_responses(self, x: Tensor) -> Tensor:
        """What ``x`` [B, S] holds one token *before* each response token, [B, T]: a state's value, for example."""
        return self._gather(x, self.prompt_lengths - 1)

    def at_end(self, x: Tensor) -> Tensor:
        """What ``x`` [B, S] holds at the last token of each response, [B]."""
        return x.gather(1, self.lengths[:, None] - 1).squeeze(1)

    def select(self, rows: Tensor) -> "Rollout":
        """These rows, cut to their longest sequence and longest response."""
        picked = _rows(self, rows)
        width, time = int(picked.lengths.max()), int(picked.response_lengths.max())
        return replace(
            picked,
            tokens=picked.tokens[:, :width],
            rollout_logprobs=picked.rollout_logprobs[:, :time],
            response_mask=picked.response_mask[:, :time],
        )

    def _gather(self, x: Tensor, start: Tensor) -> Tensor:
        place = start[:, None] + torch.arange(self.response_mask.shape[1], device=x.device)
        return x.gather(1, place.clamp(max=x.shape[1] - 1))


@dataclass(frozen=True, slots=True, kw_only=True)
class Completions:
    """What a reward sees: the responses as text, the prompts and their other columns, and the tokens."""

    prompts: Sequence[Prompt]  # B
    responses: Sequence[str]  # B, without special tokens
    columns: Mapping[str, Sequence[Any]]  # B values each
    rollout: Rollout


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """A rollout with what the actor, the reference, the critic and the rewards say of it."""

    rollout: Rollout
    completions: Completions
    old_logprobs: Tensor  # [B, T], the actor's at the start of the update
    entropy: Tensor  # [B, T], of the actor's next-token distribution, in nats
    ref_logprobs: Tensor  # [B, T]
    full_kl: Tensor | None  # [B, T], KL to the reference over the vocabulary, in nats; None: the reward needs it not
    values: Tensor | None  # [B, T]; None: no critic
    bootstrap: Tensor | None  # [B], the value after the last token of a truncated response; None: 0 everywhere
    rewards: Mapping[str, Tensor]  # [B] for each reward, unweighted
    scores: Tensor  # [B], their weighted sum
    shaped_scores: Tensor  # [B], after normalisation, clipping and the penalty for responses that did not end


@dataclass(frozen=True, slots=True, kw_only=True)
class Trajectory:
    """What an estimator sees."""

    rewards: Tensor  # [B, T]
    mask: Tensor  # [B, T] bool
    values: Tensor | None = None  # [B, T], V of the state before each token; None: a baseline of 0
    bootstrap: Tensor | None = None  # [B], the value after the last token; None: 0
    group: Tensor | None = None  # [B] int64, which prompt a row answers


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimates:
    """What an estimator returns; 0 outside the mask."""

    advantages: Tensor  # [B, T]
    returns: Tensor  # [B, T], the critic's targets


@dataclass(frozen=True, slots=True, kw_only=True)
class Experience:
    """What the update learns from."""

    rollout: Rollout
    old_logprobs: Tensor  # [B, T]
    ref_logprobs: Tensor  # [B, T]
    values: Tensor | None  # [B, T], the critic's at the start of the update
    advantages: Tensor  # [B, T]
    returns: Tensor  # [B, T]

    def select(self, rows: Tensor) -> "Experience":
        """These rows, cut to their longest response."""
        rollout = self.rollout.select(rows)
        time = rollout.response_mask.shape[1]
        others: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "rollout"}
        cut: dict[str, Any] = {k: None if v is None else v[rows][:, :time] for k, v in others.items()}
        return Experience(rollout=rollout, **cut)

    def minibatches(self, count: int, max_tokens: int, generator: torch.Generator) -> Iterator[list["Experience"]]:
        """Cut the rows, shuffled, into ``count`` minibatches, each a list of micro-batches.

        Args:
            count: Minibatches, each for one optimizer step; sizes differ by one row at most.
            max_tokens: Padded tokens of a micro-batch at most (a longer single row goes alone).
            generator: A CPU generator, the shuffle's only source of randomness.
        """
        order = torch.randperm(len(self.rollout.tokens), generator=generator)
        for rows in order.tensor_split(count):
            yield self.select(rows.to(self.advantages.device)).micro_batches(max_tokens)

    def micro_batches(self, max_tokens: int) -> list["Experience"]:
        """All rows in micro-batches of similar length, of at most ``max_tokens`` padded tokens each."""
        device = self.advantages.device
        return [self.select(rows.to(device)) for rows in pack(self.rollout.lengths.cpu(), max_tokens)]


def pack(lengths: Tensor, max_tokens: int) -> list[Tensor]:
    """Cut rows into groups of similar length whose padded size, rows × longest, is at most ``max_tokens``.

    Args:
        lengths: [B] int64.
        max_tokens: The budget; a row longer than it makes a group alone.

    Returns:
        Row indices of each group; together they are 0 … B − 1.

    >>> pack(torch.tensor([5, 1, 4, 2]), max_tokens=8)
    [tensor([0]), tensor([2, 3]), tensor([1])]
    """
    groups: list[list[int]] = []
    longest = 0
    for row in torch.argsort(lengths, descending=True, stable=True).tolist():
        if groups and longest * (len(groups[-1]) + 1) <= max_tokens:
            groups[-1].append(row)
        else:
            groups.append([row])
            longest = int(lengths[row])
    return [torch.tensor(group) for group in groups]


def by_micro_batch(
    rollout: Rollout, max_tokens: int, measure: Callable[[Rollout], tuple[Tensor, ...]]
) -> tuple[Tensor, ...]:
    """Measure a rollout by micro-batches of similar length, with the results back in order.

    Args:
        rollout: B rows.
        max_tokens: Padded tokens of a micro-batch at most.
        measure: Gives [b, t] or [b] tensors of some rows, t their longest response.

    Returns:
        The same tensors of all rows, [B, T] or [B], float32, 0 behind a row's own micro-batch.
    """
    results: list[Tensor] = []
    for rows in pack(rollout.lengths.cpu(), max_tokens):
        rows = rows.to(rollout.tokens.device)
        pieces = measure(rollout.select(rows))
        if not results:
            shape = rollout.response_mask.shape
            results = [torch.zeros(shape[: piece.ndim], device=piece.device) for piece in pieces]
        for result, piece in zip(results, pieces, strict=True):
            if piece.ndim == 1:
                result[rows] = piece
            else:
                result[rows, : piece.shape[1]] = piece
    return tuple(results)


def _moved(batch: Any, device: torch.device) -> Any:
    tensors = {f.name: getattr(batch, f.name) for f in fields(batch)}
    return replace(batch, **{k: v.to(device) for k, v in tensors.items() if isinstance(v, Tensor)})


def _rows(batch: Any, rows: Tensor) -> Any:
    return replace(batch, **{f.name: getattr(batch, f.name)[rows] for f in fields(batch)})
