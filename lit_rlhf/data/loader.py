"""A loader whose order is a function of the seed and the epoch, and whose position can be saved and restored."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch

from lit_rlhf.errors import UserError
from lit_rlhf.randomness import Stream, generator


class Fetchable(Protocol):
    """A sequence of rows that are read in batches, through the same two methods that torch's DataLoader uses."""

    def __len__(self) -> int: ...

    def __getitems__(self, numbers: list[int]) -> list[Any]: ...


class GlobalBatches:
    """This rank's share of each global batch, as (index in the global batch, row number) pairs.

    Args:
        size: The number of rows.
        batch_size: The number of rows in a global batch; if ``shuffle`` is True, an incomplete last batch is dropped.
        shuffle: Whether to shuffle the rows, in a new order for each epoch.
        rank: The index of this process.
        world_size: The number of processes.

    >>> list(GlobalBatches(5, 2, shuffle=False).epoch(0))
    [[(0, 0), (1, 1)], [(0, 2), (1, 3)], [(0, 4)]]
    >>> list(GlobalBatches(4, 4, shuffle=False, rank=1, world_size=2).epoch(0))
    [[(2, 2), (3, 3)]]
    """

    def __init__(self, size: int, batch_size: int, *, shuffle: bool, rank: int = 0, world_size: int = 1) -> None:
        self.size = size
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.rank = rank
        self.world_size = world_size
        self._shuffled = -1, torch.empty(0)  # an epoch, and the row numbers in the order of that epoch

    def __len__(self) -> int:
        full, rest = divmod(self.size, self.batch_size)
        return full if self.shuffle or not rest else full + 1

    def epoch(self, number: int, first: int = 0) -> Iterator[list[tuple[int, int]]]:
        """Yield this rank's share of each batch of epoch ``number``, beginning with batch ``first``."""
        order = self._order(number) if self.shuffle else torch.arange(self.size)
        for batch in range(first, len(self)):
            rows = list(enumerate(order[batch * self.batch_size : (batch + 1) * self.batch_size].tolist()))
            first_row, next_rank = (len(rows) * r // self.world_size for r in (self.rank, self.rank + 1))
            yield rows[first_row:next_rank]

    def _order(self, epoch: int) -> torch.Tensor:
        """Return the row numbers in the shuffled order of an epoch; the order of the last epoch asked for is kept."""
        if self._shuffled[0] != epoch:
            self._shuffled = epoch, torch.randperm(self.size, generator=generator(Stream.DATA_ORDER, epoch))
        return self._shuffled[1]


def check_shares(size: int, batch_size: int, *, shuffle: bool, world_size: int, option: str) -> None:
    """Check that every process gets at least one row of every batch.

    Args:
        size: The number of rows.
        batch_size: The number of rows in a global batch.
        shuffle: Whether the rows are shuffled, so that an incomplete last batch is dropped.
        world_size: The number of processes.
        option: The name of the option that sets the batch size, for the message.

    Raises:
        UserError: if a process would get no row of some batch.

    >>> check_shares(9, 4, shuffle=False, world_size=2, option="data.batch_size")
    Traceback (most recent call last):
        ...
    lit_rlhf.errors.UserError: data.batch_size is 4: a batch of the 9 records has 1, fewer than the 2 processes; ...
    """
    smallest = batch_size if shuffle or size % batch_size == 0 else size % batch_size
    if smallest < world_size:
        raise UserError(
            f"{option} is {batch_size}: a batch of the {size} records has {smallest}, fewer than the "
            f"{world_size} processes; choose another size"
        )


class ResumableLoader:
    """A loader that can resume after the last batch that it gave out; Lightning saves and restores its state.

    Only a loader that shuffles resumes; a loader that does not shuffle begins every pass with the first batch. A
    resumed pass yields as many batches as any other: Lightning, which knows how many of an epoch's batches it has had,
    and how many it may have (``limit_train_batches``), ends the pass after the last of them.

    A training step may `draw` further batches from a loader that shuffles. They advance the position in the order of
    the rows, but are not part of the pass: a complete pass yields ``len(loader)`` batches besides them. An epoch, which
    is one permutation of the rows, may then end, and the next one begin, in the middle of a pass.

    The loader counts its batches itself and does not rely on Lightning's epoch count, which is one behind in a run that
    was resumed from the end of an epoch. The loader is not a torch DataLoader, because worker processes would gain
    nothing with memory-mapped rows, and because Lightning may rebuild a DataLoader with another sampler.

    Args:
        records: The rows, which are read a batch at a time.
        collate: The function that makes a batch from a list of (index in the global batch, row) pairs.
        batches: This rank's share of the row numbers of each global batch, in order.

    >>> import datasets
    >>> rows = datasets.Dataset.from_dict({"text": ["a", "b", "c"]})
    >>> loader = ResumableLoader(rows, lambda placed: placed, GlobalBatches(3, 2, shuffle=False))
    >>> list(loader)
    [[(0, {'text': 'a'}), (1, {'text': 'b'})], [(0, {'text': 'c'})]]
    >>> loader.state_dict()
    {'yielded': 2, 'drawn': 0}
    """

    def __init__(
        self, records: Fetchable, collate: Callable[[list[tuple[int, Any]]], Any], batches: GlobalBatches
    ) -> None:
        self.records = records
        self.collate = collate
        self.batches = batches
        self.yielded = 0  # the number of batches that the passes of all epochs have yielded
        self.drawn = 0  # the number of further batches that draw() has returned

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        if not self.batches.shuffle:
            for batch in self.batches.epoch(0):
                self.yielded += 1
                yield self._load(batch)
            return
        for _ in range(len(self)):
            batch = self._at(self.yielded + self.drawn)
            self.yielded += 1
            yield self._load(batch)

    def upcoming(self, distance: int) -> Any:
        """Return the batch ``distance`` places after the last batch given out, without changing the loader's position.

        Args:
            distance: The number of places; 0 for the last batch given out.
        """
        return self._load(self._at(self.yielded + self.drawn - 1 + distance))

    def draw(self) -> Any:
        """Return the next batch, for the current training step; a loader that shuffles gives it to no later step."""
        batch = self._at(self.yielded + self.drawn)
        self.drawn += 1
        return self._load(batch)

    def once(self, rows: int | None = None, whole: bool = False) -> Iterator[Any]:
        """Yield batches of all rows or of a sample, in the source's order, without changing the loader's position.

        The sample is drawn without replacement; it depends only on the seed, and not on the number of processes.

        Args:
            rows: The size of the sample, which has all rows if there are no more; None for all rows.
            whole: Whether to yield whole batches instead of this rank's share of each batch.
        """
        size, rank, world_size = self.batches.batch_size, self.batches.rank, self.batches.world_size
        share = {} if whole else {"rank": rank, "world_size": world_size}
        drawn = torch.randperm(self.batches.size, generator=generator(Stream.TRAINING_SAMPLE))[:rows].sort().values
        for batch in GlobalBatches(len(drawn), size, shuffle=False, **share).epoch(0):
            if batch:
                yield self._load([(place, int(drawn[number])) for place, number in batch])

    def batches_in_once(self, rows: int | None = None) -> int:
        """Return the maximum number of batches that `once` yields, including an incomplete last batch."""
        size = self.batches.size if rows is None else min(rows, self.batches.size)
        return -(-size // self.batches.batch_size)

    def state_dict(self) -> dict[str, int]:
        """Return the state to save: the number of batches yielded and the number of batches drawn, in all epochs."""
        return {"yielded": self.yielded, "drawn": self.drawn}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Resume after the last batch that was given out before ``state`` was saved."""
        self.yielded, self.drawn = state["yielded"], state.get("drawn", 0)

    def _at(self, position: int) -> list[tuple[int, int]]:
        """Return this rank's share of the batch at a position in the order of all epochs."""
        epoch, number = divmod(position, len(self))
        return next(self.batches.epoch(epoch if self.batches.shuffle else 0, number))

    def _load(self, batch: Sequence[tuple[int, int]]) -> Any:
        rows = self.records.__getitems__([number for _, number in batch])
        return self.collate(list(zip([place for place, _ in batch], rows, strict=True)))
