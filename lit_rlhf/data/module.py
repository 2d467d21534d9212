"""What all data modules share: a training loader that goes on where it stood."""

from collections.abc import Callable, Sequence
from typing import Any, cast

import lightning
from transformers import PreTrainedTokenizerBase

from lit_rlhf.data.loader import GlobalBatches, ResumableLoader, check_shares
from lit_rlhf.errors import UserError


class ResumableData(lightning.LightningDataModule):
    """A LightningDataModule that saves where its training loader stands."""

    def __init__(self) -> None:
        super().__init__()
        self._train_loader: ResumableLoader | None = None
        self._restored: dict[str, int] = {}

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The trained model's."""
        return cast(Any, self.trainer).lightning_module.tokenizer

    def train_loader(self, rows: Sequence[Any], batch_size: int, collate: Callable[..., Any]) -> ResumableLoader:
        """Shuffled, the same order for the same seed and epoch.

        Raises:
            UserError: if there is no whole batch.
        """
        if len(rows) < batch_size:
            raise UserError(f"data.batch_size is {batch_size}, but data.train has only {len(rows)} records")
        self._train_loader = self.loader(rows, batch_size, collate, "data.batch_size", shuffle=True)
        if self._restored:
            self._train_loader.load_state_dict(self._restored)
        return self._train_loader

    def loader(
        self, rows: Sequence[Any], batch_size: int, collate: Callable[..., Any], option: str, shuffle: bool = False
    ) -> ResumableLoader:
        """This process's share of each batch.

        Args:
            rows: What to load.
            batch_size: Rows of a batch, over all processes.
            collate: Makes a batch of (place in the global batch, row) pairs.
            option: What the batch size is called, for messages.
            shuffle: In an order of the epoch's own; else in the file's order.
        """
        world_size = self.trainer.world_size if self.trainer else 1
        rank = self.trainer.global_rank if self.trainer else 0
        check_shares(len(rows), batch_size, shuffle=shuffle, world_size=world_size, option=option)
        batches = GlobalBatches(len(rows), batch_size, shuffle=shuffle, rank=rank, world_size=world_size)
        return ResumableLoader(rows, collate, batches)

    def state_dict(self) -> dict[str, int]:
        """Where the training loader stands. Lightning keeps the loader's own state too, but does not always load it."""
        return self._train_loader.state_dict() if self._train_loader else {}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Go on from there."""
        self._restored = state_dict

    def say(self, message: str) -> None:
        """Print a line, from one process."""
        if self.trainer is None or self.trainer.is_global_zero:
            print(message)


def check_positive(**numbers: int | None) -> None:
    """All of them are 1 or more, or None.

    Raises:
        ValueError: naming the one that is not.
    """
    for name, value in numbers.items():
        if value is not None and value < 1:
            raise ValueError(f"data.{name} must be 1 or more, not {value}")
