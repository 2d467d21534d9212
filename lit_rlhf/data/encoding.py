"""Tokenized rows, which ``Dataset.map`` makes once and which are then memory-mapped from the cache of `datasets`."""

import hashlib
import inspect
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import date
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias
from uuid import uuid4

import numpy as np
import pyarrow
from pyarrow import compute
from transformers import PreTrainedTokenizerBase

from lit_rlhf.data.columns import value_at
from lit_rlhf.data.records import Record, Records, cache_access, progress_bars
from lit_rlhf.data.tokenize import token_rows

if TYPE_CHECKING:
    import datasets

Row: TypeAlias = dict[str, Any]
SHOWN_SPLIT = 2_000
"""The number of records above which tokenizing shows a progress bar."""
LARGE_SPLIT = 20_000
"""The minimum number of records for each of several processes."""
TRANSIENT = {"tokenizer.json": ("truncation", "padding"), "tokenizer_config.json": ("is_local", "local_files_only")}
"""The settings in a saved tokenizer's files that only say how it was last called or where it was loaded from."""


class Encoder(Protocol):
    """A frozen dataclass that makes token rows from records; its fields include all options that affect the rows."""

    @property
    def schema(self) -> pyarrow.Schema:
        """The columns of a row, one of which, ``kept``, says whether loaders use the row."""

    @property
    def columns(self) -> str:
        """The columns that the rows are made from, for a message, such as "prompts from `question`"."""

    def recognised(self, record: Record, where: str) -> "Encoder":
        """Return this encoder with the columns that its options do not name, as recognised in the first record.

        Args:
            record: The first record of the source.
            where: The record's field, number and source, for messages.

        Raises:
            UserError: if a column that is needed cannot be recognised, or if several columns qualify.
        """

    def __call__(
        self, tokenizer: PreTrainedTokenizerBase, records: Sequence[Record], where: Sequence[str]
    ) -> list[Row]:
        """Tokenize records and return their rows, in order: one or more for each record.

        Args:
            tokenizer: The trained model's tokenizer.
            records: The records to tokenize.
            where: For each record, a string with its field, number and source, for messages.

        Raises:
            UserError: if a record cannot be used.
        """


class Rows:
    """The rows of a split whose ``kept`` is True; each batch of them is read from the memory-mapped table when needed.

    Args:
        table: All rows of the split, as a data set whose format is Arrow.
        records: The records, one for each row of the table, to include as ``row["record"]``. If None,
            ``row["record"]`` is None.
        encoder: The encoder that made the rows, to include as ``row["encoder"]``.
    """

    def __init__(
        self, table: "datasets.Dataset", records: Records | None = None, encoder: Encoder | None = None
    ) -> None:
        self.table = table
        self.records = records
        self.encoder = encoder
        self.kept = np.flatnonzero(self.column("kept"))

    def __len__(self) -> int:
        return len(self.kept)

    def __getitems__(self, numbers: Sequence[int]) -> list[Row]:
        places = self.kept[np.asarray(numbers)].tolist()
        rows = self.table[places].to_pylist()
        records = self.records.__getitems__(places) if self.records is not None else [None] * len(rows)
        return [
            row | {"number": number, "record": record, "encoder": self.encoder}
            for row, number, record in zip(rows, numbers, records, strict=True)
        ]

    def column(self, name: str) -> np.ndarray:
        """Return the values of a column of numbers or flags, for all rows, kept or not."""
        return self.table.select_columns(name)[:][name].to_numpy()

    def lengths(self, name: str) -> np.ndarray:
        """Return the lengths of the lists in a column, for the rows that are kept."""
        return compute.list_value_length(self.table.select_columns(name)[:][name]).to_numpy()[self.kept]


def encode(
    records: Records, encoder: Encoder, tokenizer: PreTrainedTokenizerBase, *, field: str, source: Any
) -> "datasets.Dataset":
    """Tokenize records, in several processes if there are many, or open their rows if the cache already has them.

    Args:
        records: The records to tokenize.
        encoder: The encoder that makes the rows.
        tokenizer: The trained model's tokenizer.
        field: The configuration field, for messages.
        source: The source of the records, for messages.

    Returns:
        The encoder's rows, as a data set whose format is Arrow.

    Raises:
        UserError: if a record cannot be used, or if the cache cannot be written or read.
    """
    from datasets import Features

    with progress_bars(len(records) > SHOWN_SPLIT), cache_access(field), _same_environment():
        return records.table.map(
            partial(_encode_batch, records.parse, encoder, tokenizer, field, str(source)),
            batched=True,
            with_indices=True,
            remove_columns=records.table.column_names,
            features=Features.from_arrow_schema(encoder.schema),
            num_proc=_processes(len(records)) if records.key else None,
            new_fingerprint=_fingerprint(records.key, encoder, tokenizer) if records.key else uuid4().hex,
            desc=f"{field}: tokenizing",
        )


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a hash of everything that determines a tokenizer's output, such as its vocabulary and chat template.

    >>> from lit_rlhf.data.reviews import tokenizer
    >>> one, same, other = tokenizer(), tokenizer(), tokenizer()
    >>> other.chat_template = "{{ messages[0].content }}"
    >>> fingerprint = tokenizer_fingerprint(one)
    >>> fingerprint == tokenizer_fingerprint(same), fingerprint == tokenizer_fingerprint(other)
    (True, False)
    """
    digest = hashlib.sha256(type(tokenizer).__name__.encode())
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        for path in sorted(path for path in Path(folder).rglob("*") if path.is_file()):
            content = path.read_bytes()
            if path.name in TRANSIENT:
                settings = json.loads(content)
                content = json.dumps({k: v for k, v in settings.items() if k not in TRANSIENT[path.name]}).encode()
            digest.update(f"{path.relative_to(folder)}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()


def _fingerprint(key: list[str], encoder: Encoder, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the name under which the cache stores the rows: a hash of everything that the rows depend on.

    The rows depend on the key of the records, the encoder's options, the tokenizer, the tokenizing code, the versions
    of the libraries that this code uses and, if the chat template contains the date, today's date.
    """
    parts_of_code = (encode, token_rows, Records, value_at, *type(encoder).__mro__[:-1])  # the last one is object
    code = [inspect.getsource(module) for module in map(inspect.getmodule, parts_of_code) if module]
    versions = [version("transformers"), version("tokenizers")]
    today = [date.today().isoformat()] if "strftime_now" in str(tokenizer.chat_template) else []
    parts = [*key, repr(encoder), tokenizer_fingerprint(tokenizer), *code, *versions, *today]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def _encode_batch(
    parse: Callable[[pyarrow.Table], list[Record]],
    encoder: Encoder,
    tokenizer: PreTrainedTokenizerBase,
    field: str,
    source: str,
    table: pyarrow.Table,
    numbers: Sequence[int],
) -> pyarrow.Table:
    where = [f"{field}: record {number + 1} of {source}" for number in numbers]
    rows = encoder(tokenizer, parse(table), where)
    return pyarrow.Table.from_pylist(rows, schema=encoder.schema)


def _processes(records: int) -> int | None:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    processes = min(cores, 16, records // LARGE_SPLIT)
    return processes if processes > 1 else None


@contextmanager
def _same_environment() -> Iterator[None]:
    """Restore ``os.environ`` and the parallelism setting of `tokenizers` at the end of the context.

    With several processes, ``Dataset.map`` replaces ``os.environ`` with a copy and turns off the parallelism of
    `tokenizers`.
    """
    environment, threads = os.environ, os.environ.get("TOKENIZERS_PARALLELISM")
    try:
        yield
    finally:
        os.environ = environment  # noqa: B003
        environment.pop("TOKENIZERS_PARALLELISM", None)
        if threads is not None:
            environment["TOKENIZERS_PARALLELISM"] = threads
