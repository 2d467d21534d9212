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
    positions: Tensor | None  # [B, S] int64, 0, 1, … in each text of a row; None: one text a row

    def to(self, device: torch.device) -> "DemonstrationBatch":
        """The same batch on another device (Lightning calls it)."""
        return _moved(self, device)


@dataclass(frozen=True, slots=True, kw_only=True)
class PreferenceBatch:
    """Responses to prompts, ranked; a pair is a ranking of two."""

    tokens: Tensor  # [N, S] int64, prompt and response contiguous, right-padded; the responses of all rankings
    prompt_lengths: Tensor  # [N] int64
    lengths: Tensor  # [N] int64, prompt and response
    ranking: Tensor  # [B, K] int64, rows of tokens, best first; 0 where there is none
    mask: Tensor  # [B, K] bool, whether there is one
    margin: Tensor | None  # [B] float32, by how much the better of a pair should be ahead
    number: Tensor  # [B] int64, each ranking's number in its split
    prompts: Sequence[list[int]]  # B, the prompts' tokens, ready to be continued; empty where records have no prompt

    @property
    def scored(self) -> Tensor:
        """Bool [N, S], True at the response's tokens."""
        place = torch.arange(self.tokens.shape[1], device=self.tokens.device)
        return (place >= self.prompt_lengths[:, None]) & (place < self.lengths[:, None])

    def to(self, device: torch.device) -> "PreferenceBatch":
        """The same batch on another device (Lightning calls it)."""
        return _moved(self, device)

    def by_ranking(self, x: Tensor) -> Tensor:
        """What ``x`` [N] holds of each ranked response, [B, K]; 0 where there is none."""
        return torch.where(self.mask, x[self.ranking], 0.0)

    def select(self, rankings: Tensor) -> "PreferenceBatch":
        """These rankings, cut to their longest response and their longest ranking."""
        mask = self.mask[rankings]
        mask = mask[:, : int(mask.sum(1).max())]
        rows = self.ranking[rankings][:, : mask.shape[1]][mask]
        ranking = torch.zeros_like(mask, dtype=torch.long)
        ranking[mask] = torch.arange(len(rows), device=rows.device)
        return PreferenceBatch(
            tokens=self.tokens[rows, : int(self.lengths[rows].max())],
            prompt_lengths=self.prompt_lengths[rows],
            lengths=self.lengths[rows],
            ranking=ranking,
            mask=mask,
            margin=None if self.margin is None else self.margin[rankings],
            number=self.number[rankings],
            prompts=[self.prompts[i] for i in rankings.tolist()],
        )

    def micro_batches(self, max_tokens: int) -> list["PreferenceBatch"]:
        """All rankings in micro-batches of similar length; the responses of a ranking stay together.

        Args:
            max_tokens: Padded tokens of a micro-batch at most (a larger single ranking goes alone).
        """
        longest = self.by_ranking(self.lengths).amax(1).cpu()
        groups = pack(longest, max_tokens, self.mask.sum(1).cpu())
        return [self.select(group.to(self.tokens.device)) for group in groups]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """Prompts with the responses that the actor gave; prompt and response stand contiguous, padding on the right."""

    tokens: Tensor  # [B, S] int64
    prompt_lengths: Tensor  # [B] int64
    response_lengths: Tensor  # [B] int64, the stop token included
    rollout_logprobs: Tensor  # [B, T] float32, the engine's own
    rollout_entropy: Tensor  # [B, T] float32, likewise, of the distribution that each token was drawn from, in nats
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
            rollout_entropy=picked.rollout_entropy[:, :time],
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
    reward_scale: Tensor  # [B, T], what whitening multiplied a reward by on its way to the advantages; 1 without

    def select(self, rows: Tensor) -> "Experience":
        """These rows, cut to their longest response."""
        rollout = self.rollout.select(rows)
        time = rollout.response_mask.shape[1]
        others: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "rollout"}
        cut: dict[str, Any] = {k: None if v is None else v[rows][:, :time] for k, v in others.items()}
        return Experience(rollout=rollout, **cut)

    def minibatches(
        self, count: int, max_tokens: int, generator: torch.Generator, rank: int = 0, world_size: int = 1
    ) -> Iterator[list["Experience"]]:
        """Cut the rows, shuffled, into ``count`` minibatches, each this process's share as a list of micro-batches.

        Args:
            count: Minibatches, each for one optimizer step; sizes differ by one row at most.
            max_tokens: Padded tokens of a micro-batch at most (a longer single row goes alone).
            generator: A CPU generator, the shuffle's only source of randomness.
            rank: This process.
            world_size: Processes; all of them hold the same rows.
        """
        order = torch.randperm(len(self.rollout.tokens), generator=generator)
        for rows in order.tensor_split(count):
            minibatch = self.select(rows.to(self.advantages.device))
            yield minibatch.micro_batches(max_tokens, rank, world_size)

    def micro_batches(self, max_tokens: int, rank: int = 0, world_size: int = 1) -> list["Experience"]:
        """This process's share of the rows, in as many micro-batches as any other's, of similar length each.

        Args:
            max_tokens: Padded tokens of a micro-batch at most (a longer single row goes alone).
            rank: This process.
            world_size: Processes; all of them hold the same rows.
        """
        lengths, device = self.rollout.lengths.cpu(), self.advantages.device
        groups = deal(lengths, max_tokens, world_size)[rank]
        nothing = lengths.argmin()[None]
        return [self.select(rows.to(device)) if len(rows) else self._uncounted(nothing.to(device)) for rows in groups]

    def _uncounted(self, rows: Tensor) -> "Experience":
        """These rows, none of whose tokens counts: work for a process that has no more, when others have."""
        some = self.select(rows)
        rollout = replace(some.rollout, response_mask=torch.zeros_like(some.rollout.response_mask))
        return replace(some, rollout=rollout)


def pack(lengths: Tensor, max_tokens: int, rows: Tensor | None = None) -> list[Tensor]:
    """Cut items into groups of similar length whose padded size, rows × longest, is at most ``max_tokens``.

    Args:
        lengths: [B] int64.
        max_tokens: The budget; an item larger than it makes a group alone.
        rows: [B] int64, how many rows of that length each item is; None: one.

    Returns:
        Indices of each group's items; together they are 0 … B − 1.

    >>> pack(torch.tensor([5, 1, 4, 2]), max_tokens=8)
    [tensor([0]), tensor([2, 3]), tensor([1])]
    """
    groups: list[list[int]] = []
    longest = taken = 0
    for item in torch.argsort(lengths, descending=True, stable=True).tolist():
        count = 1 if rows is None else int(rows[item])
        if groups and longest * (taken + count) <= max_tokens:
            groups[-1].append(item)
            taken += count
        else:
            groups.append([item])
            longest, taken = int(lengths[item]), count
    return [torch.tensor(group) for group in groups]


def deal(lengths: Tensor, max_tokens: int, hands: int) -> list[list[Tensor]]:
    """Deal items out to processes: about as many tokens for each, and equally many groups, as `pack` makes them.

    Args:
        lengths: [B] int64.
        max_tokens: A group's budget.
        hands: Processes.

    Returns:
        Each process's groups of indices, together 0 … B − 1; groups are empty where there are too few items.

    >>> deal(torch.tensor([5, 1, 4, 2]), max_tokens=8, hands=2)
    [[tensor([0]), tensor([1])], [tensor([2]), tensor([3])]]
    """
    held: list[list[int]] = [[] for _ in range(hands)]
    tokens = [0] * hands
    for item in torch.argsort(lengths, descending=True, stable=True).tolist():
        least = tokens.index(min(tokens))
        held[least].append(item)
        tokens[least] += int(lengths[item])
    dealt = []
    for items in held:
        rows = torch.tensor(items, dtype=torch.long)
        dealt.append([rows[group] for group in pack(lengths[rows], max_tokens)])
    most = max(len(groups) for groups in dealt)
    for groups in dealt:
        while len(groups) < most:
            largest = max(range(len(groups)), key=lambda i: len(groups[i]), default=None)
            if largest is None or len(groups[largest]) < 2:
                groups.append(torch.empty(0, dtype=torch.long))
            else:
                groups[largest : largest + 1] = groups[largest].tensor_split(2)
    return dealt


def by_micro_batch(
    rollout: Rollout, max_tokens: int, measure: Callable[[Rollout], tuple[Tensor | None, ...]]
) -> tuple[Any, ...]:
    """Measure a rollout by micro-batches of similar length, with the results back in order.

    Args:
        rollout: B rows.
        max_tokens: Padded tokens of a micro-batch at most.
        measure: Gives [b, t] or [b] tensors of some rows, t their longest response, or None for what there is not.

    Returns:
        The same tensors of all rows, [B, T] or [B], float32, 0 behind a row's own micro-batch; None where it gave None.
    """
    results: list[Tensor | None] = []
    for rows in pack(rollout.lengths.cpu(), max_tokens):
        rows = rows.to(rollout.tokens.device)
        pieces = measure(rollout.select(rows))
        if not results:
            shape = rollout.response_mask.shape
            results = [None if x is None else torch.zeros(shape[: x.ndim], device=x.device) for x in pieces]
        for result, piece in zip(results, pieces, strict=True):
            if result is None or piece is None:
                continue
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
