"""Records (dictionaries of columns) from files, data sets of the Hugging Face hub, or a Python function.

The records of a file or of the hub stay in a memory-mapped Arrow file in the cache of `datasets`; a record becomes a
Python object when it is needed. The lines of a JSONL file are stored as they are, so that each record keeps its own
columns and types.
"""

import hashlib
import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import pyarrow

from lit_rlhf.compat import NO_RECORDS
from lit_rlhf.data.columns import filled_columns, value_at
from lit_rlhf.errors import UserError
from lit_rlhf.references import is_reference, load_reference

if TYPE_CHECKING:
    import datasets

Record: TypeAlias = dict[str, Any]
FORMATS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
LARGE_FILE = 32 * 2**20
"""The size of a file, in bytes, above which reading the file shows a progress bar."""
LONGEST_LINE = 32 * 2**20
"""The maximum number of bytes in a line of a JSONL file."""
BETWEEN_VALUES = re.compile(r"[ \t\r\n,]*")
"""The pattern of what may be between two values of a JSON file."""
SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
"""The pattern of an escape sequence in JSON for one half of a pair of UTF-16, which is no character by itself."""


Source: TypeAlias = str | dict[str, str]
"""A file, the name of a data set of the Hugging Face hub, or a Python function; or a dictionary with the ``path``
and, if needed, the ``name`` (the configuration) and the ``split`` of a data set of the hub (slices such as
``train[:1000]`` work)."""


class Records:
    """Records that are read from a memory-mapped table only when they are asked for.

    Args:
        table: A data set whose format is Arrow.
        parse: The function that makes records from a part of the table.

    >>> records = read_records("lit_rlhf.data.reviews:prompts", "data.train")
    >>> len(records)
    1000
    >>> records.__getitems__([2, 0])
    [{'prompt': 'my aunt and i tried the old garden .'}, {'prompt': 'my sister and i tried the golden spoon .'}]
    """

    def __init__(self, table: "datasets.Dataset", parse: Callable[[pyarrow.Table], list[Record]]) -> None:
        self.table = table
        self.parse = parse

    def __len__(self) -> int:
        return len(self.table)

    def __getitems__(self, numbers: Sequence[int]) -> list[Record]:
        return self.parse(self.table[list(numbers)])

    def __iter__(self) -> Iterator[Record]:
        for part in self.table.iter(1000):
            yield from self.parse(part)

    def with_column(self, name: str, path: str) -> "Records":
        """Return the records with one more column, which has the values at ``path`` (see `value_at`)."""
        return Records(self.table, partial(_parse_with_column, self.parse, name, path))

    @property
    def key(self) -> list[str] | None:
        """The strings that identify the records in the cache; None if the records are only in memory."""
        files = [str(file["filename"]) for file in self.table.cache_files]
        return [*files, str(self.table.split), str(len(self.table))] if files else None


def read_records(source: Source, field: str) -> Records:
    """Open a source of records and check it; each record is read only when it is asked for.

    Args:
        source: A ``.jsonl``, ``.json``, ``.csv`` or ``.parquet`` file; the name of a data set of the Hugging Face hub,
            or ``{path: openai/gsm8k, name: main, split: test}``; or a Python function that returns a list of
            dictionaries, named as ``module:function`` or ``file.py:function``.
        field: The configuration field, for messages.

    Raises:
        UserError: if the source does not exist or cannot be read, the function raises an exception, a line of a JSONL
            file is not a JSON object, there are no records, or the cache cannot be written or read.

    >>> next(iter(read_records("lit_rlhf.data.reviews:prompts", "data.train")))
    {'prompt': 'my sister and i tried the golden spoon .'}
    """
    if isinstance(source, str) and is_reference(source):
        records = _call(source, field)
    elif isinstance(source, str) and (Path(source).suffix in FORMATS or os.path.exists(source)):
        records = _read_file(Path(source), field)
    else:
        records = _read_hub({"path": source} if isinstance(source, str) else source, field)
    if not len(records):
        raise UserError(f"{field}: {source} has no records")
    return records


def value_of(record: Record, name: str, where: str) -> Any:
    """Return the value of a record in one column.

    Args:
        record: The record.
        name: The name of the column, or ``column.entry`` for an entry in a column of dictionaries.
        where: The field, number and source of the record, for the message.

    Raises:
        UserError: if the record has no value in that column; the message names the columns that have one.

    >>> value_of({"prompt": "Why?"}, "prompt", "data.train: record 1 of prompts.jsonl")
    'Why?'
    """
    value = value_at(record, name)
    if value is None:
        raise UserError(f"{where} has no column {name!r}; it has: {filled_columns(record)}")
    return value


@contextmanager
def progress_bars(shown: bool) -> Iterator[None]:
    """Hide the progress bars of `datasets` inside this context unless ``shown`` is True; bars that were off stay off.

    The bars are always hidden if standard error, where they are drawn, is not a terminal.
    """
    from datasets import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    if (shown and sys.stderr.isatty()) or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


@contextmanager
def _without_messages() -> Iterator[None]:
    """Hide the messages of `datasets` inside this context; it logs each error that it raises."""
    from datasets.utils import logging

    shown = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        logging.set_verbosity(shown)


@contextmanager
def cache_access(field: str) -> Iterator[None]:
    """Turn a cache failure inside this context into a one-line error, and unwrap a `UserError`; pass other errors on.

    Raises:
        UserError: if a `UserError` was raised inside the context, even if `datasets` wrapped it in another error, or if
            the cache cannot be written or read; in the second case, the message names the folder of the cache.
    """
    try:
        yield
    except Exception as error:
        causes = list(_causes(error))
        for cause in causes:
            if isinstance(cause, UserError):
                raise cause from None
        for cause in causes:
            if _is_of_system(cause):
                raise UserError(
                    f"{field}: the cache of tokens cannot be written or read: {type(cause).__name__}: {cause}; the "
                    f"environment variable HF_DATASETS_CACHE names its folder, now {_cache_folder()}"
                ) from error
        raise


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _is_of_system(error: BaseException) -> bool:
    """Return whether an error is the operating system's; pyarrow raises OSError for damaged files, too."""
    return isinstance(error, OSError) and error.errno is not None


def _cache_folder() -> str:
    import datasets

    return str(datasets.config.HF_DATASETS_CACHE)


def _parse_with_column(
    parse: Callable[[pyarrow.Table], list[Record]], name: str, path: str, table: pyarrow.Table
) -> list[Record]:
    return [record | {name: value_at(record, path)} for record in parse(table)]


def _call(source: str, field: str) -> Records:
    from datasets import Dataset

    function = load_reference(source, field)
    try:
        records = list(function())
    except Exception as error:
        raise UserError(f"{field}: {source} raised {type(error).__name__}: {error}") from error
    numbers = Dataset.from_dict({"number": range(len(records))}).with_format("arrow")
    return Records(numbers, partial(_pick, records))


def _pick(records: list[Record], numbers: pyarrow.Table) -> list[Record]:
    return [records[number] for number in numbers["number"].to_pylist()]


def _read_file(path: Path, field: str) -> Records:
    try:
        is_file = path.is_file()
    except OSError as error:  # its name is too long
        raise UserError(f"{field}: there is no file {path}: {error.strerror}") from error
    if not is_file:
        raise UserError(f"{field}: there is no file {path}")
    if path.suffix not in FORMATS:
        raise UserError(f"{field}: {path} should end in one of {', '.join(FORMATS)}")
    if path.stat().st_size == 0:
        raise UserError(f"{field}: the file {path} is empty")
    if path.suffix == ".jsonl":
        return _read_jsonl(path, field)
    if path.suffix == ".json":
        _check_json(path, field)
    import datasets

    # the folder is named after the file's content, because datasets compares only the path and modification time
    folder = os.path.join(datasets.config.HF_DATASETS_CACHE, f"lit-rlhf-{_digest(path, field)}")
    with cache_access(field), progress_bars(path.stat().st_size > LARGE_FILE), _without_messages():
        try:
            rows = datasets.load_dataset(FORMATS[path.suffix], data_files=str(path), split="train", cache_dir=folder)
        except Exception as error:  # datasets wraps every reader's own errors
            if any(_is_of_system(cause) for cause in _causes(error)):
                raise
            if NO_RECORDS in str(error):
                raise UserError(f"{field}: {path} has no records") from error
            cause = error.__cause__ or error
            raise UserError(f"{field}: {path} cannot be read as {path.suffix[1:]}: {cause}") from error
    return Records(rows.with_format("arrow"), pyarrow.Table.to_pylist)


def _check_json(path: Path, field: str) -> None:
    """Check that a JSON file holds objects only, in a list or one after the other; other values can crash pyarrow.

    Raises:
        UserError: if the file is not JSON, or if one of its values is not an object.
    """
    decoder, place, number = json.JSONDecoder(), 0, 0
    try:
        text = path.read_bytes().decode("utf-8-sig").strip()
        if text.startswith("["):
            place = 1
        while (place := BETWEEN_VALUES.match(text, place).end()) < len(text) and text[place] != "]":  # type: ignore[union-attr]
            value, place = decoder.raw_decode(text, place)
            number += 1
            if not isinstance(value, dict):
                what = type(value).__name__
                raise UserError(f"{field}: record {number} of {path} should be a JSON object, but it is {what}")
    except RecursionError as error:
        raise UserError(f"{field}: {path} cannot be read as json: it is nested too deeply") from error
    except ValueError as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{field}: {path} cannot be read as json: {error}") from error


def _read_jsonl(path: Path, field: str) -> Records:
    """Open a JSONL file; its lines are stored unparsed, because a single Arrow type per column could change values.

    Raises:
        UserError: if the file cannot be read, has no records or changes while it is read, if a line is not a JSON
            object, or if the cache cannot be written or read.
    """
    import datasets

    large, digest = path.stat().st_size > LARGE_FILE, _digest(path, field)
    with progress_bars(large), cache_access(field):
        lines = datasets.Dataset.from_generator(
            _lines,
            features=datasets.Features({"line": datasets.Value("large_binary")}),
            gen_kwargs={"path": str(path), "field": field, "digest": digest},
            fingerprint=digest,
        )
    return Records(lines.with_format("arrow"), _parse)


def _digest(path: Path, field: str) -> str:
    """Return a hash of a file's content, under which the cache stores the file's records.

    Raises:
        UserError: if the file cannot be read.
    """
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while block := file.read(2**20):
                digest.update(block)
    except OSError as error:
        raise UserError(f"{field}: {path} cannot be read: {error}") from error
    return digest.hexdigest()[:32]


def _lines(path: str, field: str, digest: str) -> Iterator[dict[str, bytes]]:
    """Check that each line that is not blank is a JSON object, and yield the line; an error names the line's number.

    Raises:
        UserError: if a line is not a JSON object, all lines are blank, or the file's content does not have the hash
            ``digest``.
    """
    empty, content = True, hashlib.sha256()
    with open(path, "rb") as file:
        for number, line in enumerate(iter(partial(file.readline, LONGEST_LINE + 1), b""), 1):
            content.update(line)
            where = f"{field}: {path}, line {number}"
            if len(line) > LONGEST_LINE:
                raise UserError(f"{where} has more than {LONGEST_LINE >> 20} MiB, which is too long for a record")
            if line.strip():
                _check_line(line, where)
                yield {"line": line}
                empty = False
    if content.hexdigest()[:32] != digest:  # the cached lines would not match the hash in their name
        raise UserError(f"{field}: {path} changed while it was read")
    if empty:  # datasets has no empty splits
        raise UserError(f"{field}: {path} has no records")


def _check_line(line: bytes, where: str) -> None:
    try:
        record = _record(line)
    except RecursionError as error:
        raise UserError(f"{where} is nested too deeply") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{where} is not UTF-8: {error}") from error
    except ValueError as error:
        raise UserError(f"{where} is not JSON: {error}") from error
    if not isinstance(record, dict):
        raise UserError(f"{where} should be a JSON object, but it is {type(record).__name__}")


def _parse(lines: pyarrow.Table) -> list[Record]:
    return [_record(line) for line in lines["line"].to_pylist()]


def _record(line: bytes) -> Any:
    """Return the value of a line of JSON; an escape sequence for half a character stands for U+FFFD.

    No text with such a half could be tokenized or written to a file.

    >>> _record(b'{"prompt": "\\\\ud83d\\\\ude00 \\\\ud83d"}')
    {'prompt': '😀 �'}
    """
    value = json.loads(line.decode("utf-8-sig"))
    if not SURROGATE.search(line):
        return value
    text = json.dumps(value, ensure_ascii=False)  # json.loads has joined the pairs, so that only halves are left
    return json.loads(text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"))


def _read_hub(source: dict[str, str], field: str) -> Records:
    if "path" not in source or not source.keys() <= {"path", "name", "split"}:
        raise UserError(f"{field}: a data set of the hub has path, name and split, not {', '.join(source)}")
    import datasets

    try:
        name, split = source.get("name"), source.get("split", "train")
        rows = datasets.load_dataset(source["path"], name, split=split)
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"{field}: {source['path']!r} is neither a file nor a data set of the hub: {reason}") from error
    return Records(rows.with_format("arrow"), pyarrow.Table.to_pylist)
