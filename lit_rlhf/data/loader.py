"""A loader whose order is a function of seed and epoch, and which knows where it stands."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from lit_rlhf.errors import UserError
from lit_rlhf.randomness import Stream, generator


class GlobalBatches:
    """This rank's share of each global batch, as (place in the global batch, index of the record).

    Args:
        size: Records.
        batch_size: Records of a global batch; an incomplete last one is dropped when shuffling.
        shuffle: Whether each epoch has an order of its own.
        rank: This process.
        world_size: Processes.
    """

    def __init__(self, size: int, batch_size: int, *, shuffle: bool, rank: int = 0, world_size: int = 1) -> None:
        self.size = size
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.rank = rank
        self.world_size = world_size

    def __len__(self) -> int:
        full, rest = divmod(self.size, self.batch_size)
        return full if self.shuffle or not rest else full + 1

    def epoch(self, number: int, first: int = 0) -> Iterator[list[tuple[int, int]]]:
        """The batches of an epoch, from the ``first`` on."""
        order = (
            torch.randperm(self.size, generator=generator(Stream.DATA_ORDER, number)).tolist()
            if self.shuffle
            else list(range(self.size))
        )
        for batch in range(first, len(self)):
            rows = list(enumerate(order[batch * self.batch_size : (batch + 1) * self.batch_size]))
            first_row, next_rank = (len(rows) * r // self.world_size for r in (self.rank, self.rank + 1))
            yield rows[first_row:next_rank]


def check_shares(size: int, batch_size: int, *, shuffle: bool, world_size: int, option: str) -> None:
    """Every process must get a record of every batch.

    Args:
        size: Records.
        batch_size: Records of a global batch.
        shuffle: Whether an incomplete last batch is dropped.
        world_size: Processes.
        option: What the batch size is called, for the message.

    Raises:
        UserError: if one would get none.
    """
    smallest = batch_size if shuffle or size % batch_size == 0 else size % batch_size
    if smallest < world_size:
        raise UserError(
            f"{option} is {batch_size}: a batch of the {size} records has {smallest}, fewer than the "
            f"{world_size} processes; choose another size"
        )


class ResumableLoader:
    """A loader that goes on where it stood: Lightning saves and restores its state.

    It counts its batches itself and asks nobody for the epoch: Lightning's own count is one behind in a run that was
    resumed from an epoch's end. No torch DataLoader: the records are in memory, and Lightning rebuilds a DataLoader.

    Args:
        records: Indexed by number.
        collate: Makes a batch of (place in the global batch, record) pairs.
        batches: Which records, in which order.
    """

    def __init__(
        self, records: Sequence[Any], collate: Callable[[list[tuple[int, Any]]], Any], batches: GlobalBatches
    ) -> None:
        self.records = records
        self.collate = collate
        self.batches = batches
        self.yielded = 0  # in all epochs

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        epoch, first = divmod(self.yielded, len(self)) if self.batches.shuffle else (0, 0)
        for batch in self.batches.epoch(epoch, first):
            self.yielded += 1
            yield self.collate([(place, self.records[number]) for place, number in batch])

    def once(self, whole: bool = False) -> Iterator[Any]:
        """Every record once, in batches of the file's order; where the loader stands does not change.

        Args:
            whole: The whole batches, not this rank's share of each.
        """
        size, rank, world_size = self.batches.batch_size, self.batches.rank, self.batches.world_size
        share = {} if whole else {"rank": rank, "world_size": world_size}
        for batch in GlobalBatches(self.batches.size, size, shuffle=False, **share).epoch(0):
            if batch:
                yield self.collate([(place, self.records[number]) for place, number in batch])

    def state_dict(self) -> dict[str, int]:
        """Batches given out so far."""
        return {"yielded": self.yielded}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on after the last batch given out."""
        self.yielded = state["yielded"]
