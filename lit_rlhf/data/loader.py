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
        self.epoch = 0
        self.skip = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch's order; Lightning calls it, on a loader's ``sampler``."""
        self.epoch = epoch

    def __len__(self) -> int:
        full, rest = divmod(self.size, self.batch_size)
        return full if self.shuffle or not rest else full + 1

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order = (
            torch.randperm(self.size, generator=generator(Stream.DATA_ORDER, self.epoch)).tolist()
            if self.shuffle
            else list(range(self.size))
        )
        first, self.skip = self.skip, 0
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

    No torch DataLoader: the records are in memory, and Lightning rebuilds a DataLoader for predictions.

    Args:
        records: Indexed by number.
        collate: Makes a batch of (place in the global batch, record) pairs.
        sampler: Which records, in which order.
    """

    batch_sampler = None  # Lightning asks for it wherever there is a sampler

    def __init__(
        self, records: Sequence[Any], collate: Callable[[list[tuple[int, Any]]], Any], sampler: GlobalBatches
    ) -> None:
        self.records = records
        self.collate = collate
        self.sampler = sampler
        self.yielded = 0

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[Any]:
        self.yielded = self.sampler.skip
        for batch in self.sampler:
            self.yielded += 1
            yield self.collate([(place, self.records[number]) for place, number in batch])

    def state_dict(self) -> dict[str, int]:
        """Epoch and batches given out in it."""
        return {"epoch": self.sampler.epoch, "yielded": self.yielded}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on after the last batch given out."""
        self.sampler.epoch = state["epoch"]
        self.sampler.skip = state["yielded"] % len(self.sampler)
