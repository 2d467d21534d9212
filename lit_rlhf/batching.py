"""Functions that cut batches into minibatches and micro-batches, and divide rows among processes or gather them."""

from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from lit_rlhf.errors import UserError
from lit_rlhf.progress import track
from lit_rlhf.types import DemonstrationBatch, Experience, PreferenceBatch, Rollout

Outputs = TypeVar("Outputs", bound=tuple[Tensor | None, ...])


def pack(lengths: Tensor, max_tokens: int, rows: Tensor | None = None) -> list[Tensor]:
    """Group items of similar length so that a group's padded size, rows × longest length, is at most ``max_tokens``.

    Args:
        lengths: [B] int64, the number of tokens in the longest row of each item.
        max_tokens: The largest padded size of a group; an item that is larger becomes a group of its own.
        rows: [B] int64, the number of rows in each item; None if every item is one row.

    Returns:
        One tensor of item indices for each group; every index from 0 to B − 1 occurs once.

    >>> pack(torch.tensor([5, 1, 4, 2]), max_tokens=8)
    [tensor([0]), tensor([2, 3]), tensor([1])]
    """
    groups: list[list[int]] = []
    longest = size = 0
    for item in torch.argsort(lengths, descending=True, stable=True).tolist():
        count = 1 if rows is None else int(rows[item])
        if groups and longest * (size + count) <= max_tokens:
            groups[-1].append(item)
            size += count
        else:
            groups.append([item])
            longest, size = int(lengths[item]), count
    return [torch.tensor(group) for group in groups]


def balance(lengths: Tensor, max_tokens: int, world_size: int) -> list[list[Tensor]]:
    """Distribute items over processes, so that all get equally many groups and about the same number of tokens.

    The longest remaining item always goes to the process with the fewest tokens (greedy number partitioning; Graham
    1969). Then `pack` groups the items of each process. If a process has fewer groups than another, its groups are
    halved, or empty groups are added, until it has as many.

    Args:
        lengths: [B] int64, the number of tokens in each item, which is one row.
        max_tokens: The largest padded size of a group; an item that is larger becomes a group of its own.
        world_size: The number of processes.

    Returns:
        For each process, the item indices of each group; some groups are empty if there are too few items.

    >>> balance(torch.tensor([5, 1, 4, 2]), max_tokens=8, world_size=2)
    [[tensor([0]), tensor([1])], [tensor([2]), tensor([3])]]
    """
    items: list[list[int]] = [[] for _ in range(world_size)]
    tokens = [0] * world_size
    for item in torch.argsort(lengths, descending=True, stable=True).tolist():
        rank = tokens.index(min(tokens))
        items[rank].append(item)
        tokens[rank] += int(lengths[item])
    groups_by_rank = []
    for indices in items:
        rows = torch.tensor(indices, dtype=torch.long)
        groups_by_rank.append([rows[group] for group in pack(lengths[rows], max_tokens)])
    count = max(len(groups) for groups in groups_by_rank)
    for groups in groups_by_rank:
        _split_until(groups, count)
    return groups_by_rank


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
        generator: The CPU generator that shuffles the rows, the only source of randomness here; None to keep the order
            of the rows, so that each minibatch has consecutive rows.

    Raises:
        UserError: if there are fewer rows than ``count``, the value of the option ``model.update.minibatches``.
    """
    rows_in_all = len(experience.advantages)
    if count > rows_in_all:
        raise UserError(f"model.update.minibatches is {count}, but an iteration has only {rows_in_all} responses")
    order = torch.arange(rows_in_all) if generator is None else torch.randperm(rows_in_all, generator=generator)
    for rows in order.tensor_split(count):
        yield experience.select(rows.to(experience.advantages.device))


def micro_batches(experience: Experience, max_tokens: int, *, rank: int = 0, world_size: int = 1) -> list[Experience]:
    """Return this process's share of the rows, cut into micro-batches of rows of similar length.

    Every process gets the same number of micro-batches.

    Args:
        experience: The rows of all processes, the same on every process.
        max_tokens: The maximum number of tokens in a micro-batch, including padding; a longer row becomes a
            micro-batch by itself.
        rank: The rank of this process.
        world_size: The number of processes.

    Returns:
        The micro-batches. A micro-batch whose ``rollout.response_mask`` is False everywhere only keeps this process in
        step with the others.
    """
    lengths, device = experience.rollout.lengths.cpu(), experience.advantages.device
    shortest = lengths.argmin()[None]
    return [
        experience.select(rows.to(device)) if len(rows) else _uncounted(experience.select(shortest.to(device)))
        for rows in balance(lengths, max_tokens, world_size)[rank]
    ]


def _uncounted(experience: Experience) -> Experience:
    rollout = experience.rollout
    return replace(experience, rollout=replace(rollout, response_mask=torch.zeros_like(rollout.response_mask)))


def preference_micro_batches(batch: PreferenceBatch, max_tokens: int) -> list[PreferenceBatch]:
    """Cut a batch into micro-batches of rankings of similar length; the responses of a ranking stay together.

    Args:
        batch: The rankings.
        max_tokens: The maximum number of tokens in a micro-batch, including padding; a larger ranking becomes a
            micro-batch by itself.
    """
    longest = batch.by_ranking(batch.lengths).amax(1).cpu()
    groups = pack(longest, max_tokens, batch.mask.sum(1).cpu())
    return [batch.select(group.to(batch.tokens.device)) for group in groups]


def demonstration_micro_batches(batch: DemonstrationBatch, max_tokens: int) -> list[DemonstrationBatch]:
    """Cut a batch into micro-batches of rows of similar length; each micro-batch keeps its rows in the batch's order.

    Args:
        batch: The rows.
        max_tokens: The maximum number of tokens in a micro-batch, including padding; a longer row becomes a
            micro-batch by itself.
    """
    groups = pack(batch.lengths.cpu(), max_tokens)
    return [batch.select(group.sort().values.to(batch.tokens.device)) for group in groups]


def by_micro_batch(rollout: Rollout, max_tokens: int, compute: Callable[[Rollout], Outputs]) -> Outputs:
    """Apply a function to a rollout in micro-batches of rows of similar length; return the results in row order.

    Args:
        rollout: The rollout, of B rows.
        max_tokens: The maximum number of tokens in a micro-batch, including padding; a longer row becomes a
            micro-batch by itself.
        compute: A function of a rollout of b rows. It returns a named tuple whose fields are [b, t] or [b] tensors or
            None, where t is the length of the longest response in these rows.

    Returns:
        A named tuple of the type that ``compute`` returns, with the results for all rows; its fields are [B, T] or [B]
        float32 tensors, padded with 0 on the right, or None.
    """
    results: list[Tensor | None] = []
    for indices in track(pack(rollout.lengths.cpu(), max_tokens), "judge", "micro-batches"):
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
