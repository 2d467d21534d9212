"""Functions that cut batches into minibatches and micro-batches, and divide rows among processes or gather them."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, replace
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from lit_rlhf.errors import UserError
from lit_rlhf.progress import track
from lit_rlhf.types import DemonstrationBatch, Experience, PreferenceBatch, Rollout, shared_beginnings

Outputs = TypeVar("Outputs", bound=tuple[Tensor | None, ...])


class Item(NamedTuple):
    """Rows of a batch that belong together, such as those with the responses to one prompt."""

    rows: list[int]
    tokens: int  # in all rows, their common beginning counted once
    longest: int  # the number of tokens in the longest row


def pack(items: Sequence[Item], max_tokens: int, pads: bool) -> list[Tensor]:
    """Divide items among micro-batches of at most ``max_tokens`` tokens.

    Args:
        items: The items.
        max_tokens: The maximum number of tokens in a micro-batch; a larger item becomes a micro-batch by itself.
        pads: Whether the model processes padding and every row alone, so that the number of tokens is the number of
            rows × that of tokens in the longest one. The micro-batches then have rows of similar length.

    Returns:
        The rows of each micro-batch, [b] int64 each; rows of an item follow one another.

    >>> items = [Item([0, 1], tokens=5, longest=4), Item([2], tokens=1, longest=1), Item([3], tokens=2, longest=2)]
    >>> pack(items, max_tokens=8, pads=False), pack(items, max_tokens=8, pads=True)
    ([tensor([0, 1, 3, 2])], [tensor([0, 1]), tensor([3, 2])])
    """
    groups: list[list[int]] = []
    room = longest = 0
    for item in sorted(items, key=lambda item: -(item.longest if pads else item.tokens)):
        size = longest * len(item.rows) if pads else item.tokens
        if groups and size <= room:
            groups[-1] += item.rows
            room -= size
        else:
            longest = item.longest
            groups.append(list(item.rows))
            room = max_tokens - (longest * len(item.rows) if pads else item.tokens)
    return [torch.tensor(group) for group in groups]


def items_of(tokens: Tensor, lengths: Tensor, group: Tensor, max_tokens: int, pads: bool) -> list[Item]:
    """Return the rows of each group as an item, or as several if they have more than ``max_tokens`` tokens together.

    Args:
        tokens: Token ids, [B, S] int64, right-padded.
        lengths: The number of tokens in each row, [B] int64.
        group: The group of each row, [B] int64, such as the prompt that it answers.
        max_tokens: The maximum number of tokens in an item of several rows, their common beginning counted once.
        pads: Whether the model processes every row alone; each row is then an item.
    """
    order = group.argsort(stable=True)
    shared = shared_beginnings(tokens[order], lengths[order], group[order])
    items: list[Item] = []
    for row, length, beginning in torch.stack([order, lengths[order], shared], 1).tolist():
        if beginning and not pads and items[-1].tokens + length - beginning <= max_tokens:
            rows, size, longest = items[-1]
            items[-1] = Item([*rows, row], size + length - beginning, max(longest, length))
        else:
            items.append(Item([row], length, length))
    return items


def balance(items: Sequence[Item], max_tokens: int, world_size: int, pads: bool) -> list[list[Tensor]]:
    """Distribute items over processes, so that all get equally many micro-batches and about the same number of tokens.

    The largest remaining item always goes to the process with the fewest tokens (greedy number partitioning; Graham
    1969). Then `pack` makes the micro-batches of each process. If a process has fewer than another, its micro-batches
    are halved, or empty ones are added, until it has as many.

    Args:
        items: The items.
        max_tokens: As for `pack`.
        world_size: The number of processes.
        pads: As for `pack`.

    Returns:
        For each process, the rows of each micro-batch; some micro-batches are empty if there are too few items.

    >>> balance([Item([row], size, size) for row, size in enumerate([5, 1, 4, 2])], 8, world_size=2, pads=True)
    [[tensor([0]), tensor([1])], [tensor([2]), tensor([3])]]
    """
    parts: list[list[Item]] = [[] for _ in range(world_size)]
    totals = [0] * world_size
    for item in sorted(items, key=lambda item: -item.tokens):
        rank = totals.index(min(totals))
        parts[rank].append(item)
        totals[rank] += item.tokens
    by_rank = [pack(part, max_tokens, pads) for part in parts]
    count = max(len(groups) for groups in by_rank)
    for groups in by_rank:
        _split_until(groups, count)
    return by_rank


def _split_until(groups: list[Tensor], count: int) -> None:
    """Halve the group with the most items, in place, until there are ``count`` groups; if none can be halved, append
    empty groups.
    """
    while len(groups) < count:
        largest = max(range(len(groups)), key=lambda i: len(groups[i]), default=None)
        if largest is None or len(groups[largest]) < 2:
            groups.append(torch.empty(0, dtype=torch.long))
        else:
            groups[largest : largest + 1] = groups[largest].tensor_split(2)


def minibatches(experience: Experience, count: int, generator: torch.Generator | None) -> Iterator[Experience]:
    """Divide the rows of an iteration into ``count`` minibatches, and yield them.

    Args:
        experience: The rows of all processes, the same on every process.
        count: The number of minibatches, each for one optimizer step; their sizes differ by one row at most.
        generator: The CPU generator that shuffles the prompts, the only source of randomness here: the responses to a
            prompt stay together. None to keep the order of the rows, so that each minibatch has consecutive rows.

    Raises:
        UserError: if there are fewer rows than ``count``, the value of the option ``model.update.minibatches``.
    """
    rows_in_all = len(experience.advantages)
    if count > rows_in_all:
        raise UserError(f"model.update.minibatches is {count}, but an iteration has only {rows_in_all} responses")
    order = torch.arange(rows_in_all)
    if generator is not None:
        prompts, prompt = experience.rollout.group.cpu().unique(return_inverse=True)
        order = torch.randperm(len(prompts), generator=generator).argsort()[prompt].argsort(stable=True)
    for rows in order.tensor_split(count):
        yield experience.select(rows.to(experience.advantages.device))


def micro_batches(
    experience: Experience, max_tokens: int, *, pads: bool, rank: int = 0, world_size: int = 1
) -> list[Experience]:
    """Return this process's share of the rows, cut into micro-batches.

    Every process gets the same number of micro-batches. The responses to a prompt stay together, unless they are too
    many for a micro-batch or for half the share of a process.

    Args:
        experience: The rows of all processes, the same on every process.
        max_tokens: As for `pack`.
        pads: As for `pack`.
        rank: The rank of this process.
        world_size: The number of processes.

    Returns:
        The micro-batches. A micro-batch whose ``rollout.response_mask`` is False everywhere only keeps this process in
        step with the others.
    """
    rollout, device = experience.rollout, experience.advantages.device
    tokens, lengths, group = rollout.tokens.cpu(), rollout.lengths.cpu(), rollout.group.cpu()
    items, shortest = items_of(tokens, lengths, group, max_tokens, pads), lengths.argmin()[None]
    if world_size > 1:
        share = sum(item.tokens for item in items) // (2 * world_size)
        items = items_of(tokens, lengths, group, min(max_tokens, share), pads)
    return [
        experience.select(rows[group[rows].argsort(stable=True)].to(device))
        if len(rows)
        else _uncounted(experience.select(shortest.to(device)))
        for rows in balance(items, max_tokens, world_size, pads)[rank]
    ]


def _uncounted(experience: Experience) -> Experience:
    rollout = experience.rollout
    return replace(experience, rollout=replace(rollout, response_mask=torch.zeros_like(rollout.response_mask)))


def preference_micro_batches(batch: PreferenceBatch, max_tokens: int, pads: bool) -> list[PreferenceBatch]:
    """Cut a batch into micro-batches of rankings; the responses of a ranking stay together.

    Args:
        batch: The rankings.
        max_tokens: As for `pack`.
        pads: As for `pack`.
    """
    own, longest = batch.by_ranking(batch.lengths - batch.shared).sum(1), batch.by_ranking(batch.lengths).amax(1)
    counts, own, longest = torch.stack([batch.mask.sum(1), own, longest]).long().cpu()
    ranking, row = torch.repeat_interleave(counts), torch.arange(len(batch.lengths))
    of_rankings = zip(row.split(counts.tolist()), own.tolist(), longest.tolist(), strict=True)
    items = [Item(rows.tolist(), tokens, most) for rows, tokens, most in of_rankings]
    groups = [ranking[rows].unique_consecutive() for rows in pack(items, max_tokens, pads)]
    return [batch.select(group.to(batch.tokens.device)) for group in groups]


def demonstration_micro_batches(batch: DemonstrationBatch, max_tokens: int, pads: bool) -> list[DemonstrationBatch]:
    """Cut a batch into micro-batches; each micro-batch keeps its rows in the batch's order.

    Args:
        batch: The rows.
        max_tokens: As for `pack`.
        pads: As for `pack`.
    """
    items = [Item([row], length, length) for row, length in enumerate(batch.lengths.tolist())]
    groups = pack(items, max_tokens, pads)
    return [batch.select(group.sort().values.to(batch.tokens.device)) for group in groups]


def by_micro_batch(rollout: Rollout, max_tokens: int, pads: bool, compute: Callable[[Rollout], Outputs]) -> Outputs:
    """Apply a function to a rollout in micro-batches, and return the results in the order of the rows.

    Args:
        rollout: The rollout, of B rows.
        max_tokens: As for `pack`.
        pads: As for `pack`.
        compute: A function of a rollout of b rows. It returns a named tuple whose fields are [b, t] or [b] tensors or
            None, where t is the length of the longest response in these rows.

    Returns:
        A named tuple of the type that ``compute`` returns, with the results for all rows; its fields are [B, T] or [B]
        float32 tensors, padded with 0 on the right, or None.
    """
    results: list[Tensor | None] = []
    texts = rollout.tokens.cpu(), rollout.lengths.cpu(), rollout.group.cpu()
    for indices in track(pack(items_of(*texts, max_tokens, pads), max_tokens, pads), "judge", "micro-batches"):
        rows = indices.to(rollout.tokens.device)
        outputs = compute(rollout.select(rows))
        if not results:
            shape = rollout.response_mask.shape
            results = [None if x is None else torch.zeros(shape[: x.ndim], device=x.device) for x in outputs]
        for result, output in zip(results, outputs, strict=True):
            if result is None or output is None:
                continue
            if output.ndim == 1:
                result[rows] = output
            else:
                result[rows, : output.shape[1]] = output
    return type(outputs)(*results)  # type: ignore[arg-type]  # a named tuple takes its fields


def gather_experience(
    experience: Experience,
    responses: int,
    sum_over_ranks: Callable[[Tensor], Tensor],
    max_over_ranks: Callable[..., list[int]],
) -> Experience:
    """Gather the rows of all processes, in the order of the global batch.

    Args:
        experience: This process's rows: all responses to this process's prompts in the global batch, prompt-major.
        responses: The number of responses to each prompt.
        sum_over_ranks: A function that returns the sum of a tensor over all processes.
        max_over_ranks: A function that returns the maximum of each of its arguments over all processes.
    """
    table = _Table(experience.rollout, responses, sum_over_ranks, max_over_ranks)
    return Experience(rollout=table.rollout(experience.rollout), **table.gather_fields(experience, "rollout"))


def gather_rollout(
    rollout: Rollout,
    responses: int,
    sum_over_ranks: Callable[[Tensor], Tensor],
    max_over_ranks: Callable[..., list[int]],
) -> Rollout:
    """Gather the rollouts of all processes, in the order of the global batch, as `gather_experience` does."""
    return _Table(rollout, responses, sum_over_ranks, max_over_ranks).rollout(rollout)


class _Table:
    """A table of zeros for the rows of all processes: each process fills in its own rows, and the tables are summed."""

    def __init__(
        self,
        rollout: Rollout,
        responses: int,
        sum_over_ranks: Callable[[Tensor], Tensor],
        max_over_ranks: Callable[..., list[int]],
    ) -> None:
        self.sum = sum_over_ranks
        number = torch.arange(len(rollout.group), device=rollout.group.device) % responses
        self.places = rollout.group * responses + number  # [B], the index of each row in the global batch
        shape = rollout.tokens.shape[1], rollout.response_mask.shape[1]
        self.rows, self.width, self.time = max_over_ranks(int(self.places.max()) + 1, *shape)

    def gather(self, x: Tensor, columns: int) -> Tensor:
        dtype = torch.int32 if x.dtype == torch.bool else x.dtype
        shape = (self.rows,) if x.ndim == 1 else (self.rows, columns)
        table = torch.zeros(shape, dtype=dtype, device=x.device)
        padded = x if x.ndim == 1 else torch.nn.functional.pad(x, (0, columns - x.shape[1]))
        table[self.places] = padded.to(dtype)
        return self.sum(table).to(x.dtype)

    def gather_fields(self, batch: Any, skip: str) -> dict[str, Any]:
        tensors = {f.name: getattr(batch, f.name) for f in fields(batch) if f.name != skip}
        return {name: None if x is None else self.gather(x, self.time) for name, x in tensors.items()}

    def rollout(self, rollout: Rollout) -> Rollout:
        return Rollout(tokens=self.gather(rollout.tokens, self.width), **self.gather_fields(rollout, "tokens"))
