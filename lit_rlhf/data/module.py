"""The base of the data modules: splits, loaders for the splits, and a training loader that resumes at its position."""

from abc import abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

import lightning
from transformers import PreTrainedTokenizerBase

from lit_rlhf.data.encoding import Encoder, Rows, encode
from lit_rlhf.data.loader import GlobalBatches, ResumableLoader, check_shares
from lit_rlhf.data.records import Records, Source, progress_bars, read_records
from lit_rlhf.errors import UserError

if TYPE_CHECKING:
    import datasets


class ResumableData(lightning.LightningDataModule):
    """A LightningDataModule that tokenizes each split once and saves the position of its training loader.

    Records and tokens are memory-mapped Arrow files in the cache of `datasets`: the folder that the environment
    variable ``HF_DATASETS_CACHE`` names, ``~/.cache/huggingface/datasets`` by default. The tokens of a split are made
    again only when the content of its source, the tokenizer, an option that affects tokens, the tokenizing code, or a
    library that this code uses has changed. The tokens of a CSV, JSON or Parquet file are also made again when its path
    or modification time has changed, and if the chat template contains the date, all tokens are made again on a new
    day. The records of a Python function and their tokens stay in memory. In a run with several processes, the first
    process of each node fills the cache while the others wait.

    Args:
        sources: The source of each split, by the split's name; None for a split without a source.
        contents: A plural noun for the contents of the sources, such as "prompts", for messages.
    """

    encoder: Encoder
    """The encoder that makes rows of tokens from the records, with the options as they were given."""

    def __init__(self, sources: Mapping[str, Source | None], contents: str) -> None:
        super().__init__()
        self.sources = dict(sources)
        self.contents = contents
        self._rows: dict[str, Rows] = {}
        self._told: set[str] = set()
        self._train_loader: ResumableLoader | None = None
        self._restored: dict[str, int] = {}

    @abstractmethod
    def collate(self, placed: list[tuple[int, Any]]) -> Any:
        """Return a batch made from a list of (index in the global batch, row) pairs."""

    @abstractmethod
    def rows_of(self, split: str, encoder: Any, records: Records, table: "datasets.Dataset") -> Rows:
        """Return the rows that the split's loader will give out, and report how many were dropped or cut.

        Args:
            split: The name of the split.
            encoder: The encoder with the columns of this split.
            records: The records of the split.
            table: All rows that the encoder made from the records.

        Raises:
            UserError: if the rows cannot be used, for example because none is left.
        """

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The trained model's tokenizer."""
        return cast(Any, self.trainer).lightning_module.tokenizer

    def prepare_data(self) -> None:
        """Fill the cache; Lightning calls this method in one process of each node, while the others wait.

        Raises:
            UserError: for the same reasons as ``setup``.
        """
        assert self.trainer is not None
        assert self.trainer.state.fn is not None
        self.setup(self.trainer.state.fn.value)

    def setup(self, stage: str) -> None:
        """Open the splits that the stage needs; Lightning calls this method in every process.

        Raises:
            UserError: if the stage needs a split that has no source, a source cannot be read, a record cannot be used,
                or the cache cannot be written or read.
        """
        held_out = stage if stage in self.sources else "validation"
        splits = ["train", "validation"] if stage == "fit" else [held_out]
        for split in splits:
            if split not in self._rows and self.sources[split] is not None:
                self._rows[split] = self._open(split)
        if splits[0] not in self._rows:
            wanted = f"a file, a data set of the hub or module:function with {self.contents}"
            raise UserError(f"data.{splits[0]} is not set: name {wanted}")

    def train_loader(self, batch_size: int) -> ResumableLoader:
        """Return the shuffled loader of the training split, whose order depends only on the seed and the epoch.

        Args:
            batch_size: The number of rows in a batch, over all processes.

        Raises:
            UserError: if the split has fewer rows than a batch, or a batch has fewer rows than there are processes.
        """
        rows = self._rows["train"]
        if len(rows) < batch_size:
            raise UserError(f"data.batch_size is {batch_size}, but data.train has only {len(rows)} records")
        self._train_loader = self._loader(rows, batch_size, "data.batch_size", shuffle=True)
        if self._restored:
            self._train_loader.load_state_dict(self._restored)
        return self._train_loader

    def held_out_loader(self, split: str, batch_size: int, option: str) -> ResumableLoader | list[Any]:
        """Return the loader of a split in the source's order, or an empty list if the split has no source.

        Args:
            split: The name of the split.
            batch_size: The number of rows in a batch, over all processes.
            option: The name of the option that sets the batch size, for messages.

        Raises:
            UserError: if a batch has fewer rows than there are processes.
        """
        return self._loader(self._rows[split], batch_size, option, shuffle=False) if split in self._rows else []

    def state_dict(self) -> dict[str, int]:
        """Return the training loader's state.

        Lightning also saves this state with the loader, but does not always restore it from there.
        """
        return self._train_loader.state_dict() if self._train_loader else {}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Set the position at which the training loader will resume."""
        self._restored = state_dict

    def report(self, message: str) -> None:
        """Print a message in the first process only."""
        if self._is_first:
            print(message)

    @property
    def _is_first(self) -> bool:
        return self.trainer is None or self.trainer.is_global_zero

    def _open(self, split: str) -> Rows:
        source, field = self.sources[split], f"data.{split}"
        assert source is not None
        with progress_bars(self._is_first):
            records = read_records(source, field)
            (first,) = records.__getitems__([0])
            encoder = self.encoder.recognised(first, f"{field}: record 1 of {source}")
            self._tell(encoder)
            table = encode(records, encoder, self.tokenizer, field=field, source=source)
        return self.rows_of(split, encoder, records, table)

    def _tell(self, encoder: Encoder) -> None:
        """Report which columns were recognised, unless they have their usual names or were reported before."""
        usual = type(encoder)().columns
        if encoder != self.encoder and encoder.columns not in {usual, *self._told}:
            self._told.add(encoder.columns)
            self.report(f"data: {encoder.columns}")

    def _loader(self, rows: Rows, batch_size: int, option: str, *, shuffle: bool) -> ResumableLoader:
        """Return a loader of this process's share of each batch.

        Raises:
            UserError: if a batch has fewer rows than there are processes.
        """
        world_size = self.trainer.world_size if self.trainer else 1
        rank = self.trainer.global_rank if self.trainer else 0
        check_shares(len(rows), batch_size, shuffle=shuffle, world_size=world_size, option=option)
        batches = GlobalBatches(len(rows), batch_size, shuffle=shuffle, rank=rank, world_size=world_size)
        return ResumableLoader(rows, self.collate, batches)


def check_positive(**numbers: int | None) -> None:
    """Check that each number is None or at least 1.

    Raises:
        ValueError: if a number is less than 1; the message names the option.

    >>> check_positive(max_tokens=512, batch_size=0)
    Traceback (most recent call last):
        ...
    ValueError: data.batch_size must be 1 or more, not 0
    """
    for name, value in numbers.items():
        if value is not None and value < 1:
            raise ValueError(f"data.{name} must be 1 or more, not {value}")
