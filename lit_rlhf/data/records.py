"""Records, dictionaries of columns, from files, hub names or a Python function."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

from lit_rlhf.errors import UserError
from lit_rlhf.references import is_reference, load_reference

Record: TypeAlias = dict[str, Any]
FORMATS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}


Source: TypeAlias = str | dict[str, str]
"""A file, a hub name, or a Python function; or of a hub's data set ``path``, ``name`` (its configuration) and ``split``
(slices such as ``train[:1000]`` work)."""


def read_records(source: Source, field: str) -> list[Record]:
    """All records of a source.

    Args:
        source: A ``.jsonl``, ``.csv`` or ``.parquet`` file, a hub name (or ``{path: openai/gsm8k, name: main, split:
            test}``), or ``module:function`` / ``file.py:function`` that returns a list of dictionaries.
        field: The configuration field, for messages.

    Raises:
        UserError: if there is no such source, a line is no JSON object, or there are no records.
    """
    if isinstance(source, str) and is_reference(source):
        records = _call(source, field)
    elif isinstance(source, str) and (Path(source).suffix in FORMATS or os.path.exists(source)):
        records = _read_file(Path(source), field)
    else:
        records = _read_hub({"path": source} if isinstance(source, str) else source, field)
    if not records:
        raise UserError(f"{field}: {source} has no records")
    return records


def column(records: Sequence[Record], name: str, field: str, source: Source) -> list[Any]:
    """One column of all records.

    Raises:
        UserError: if a record lacks it; the columns that exist are named.
    """
    for number, record in enumerate(records, 1):
        if record.get(name) is None:
            there = ", ".join(sorted(k for k, v in record.items() if v is not None)) or "nothing"
            raise UserError(f"{field}: record {number} of {source} has no column {name!r}; it has: {there}")
    return [record[name] for record in records]


def _call(source: str, field: str) -> list[Record]:
    function = load_reference(source, field)
    try:
        return list(function())
    except Exception as error:
        raise UserError(f"{field}: {source} raised {type(error).__name__}: {error}") from error


def _read_file(path: Path, field: str) -> list[Record]:
    if not path.is_file():
        raise UserError(f"{field}: there is no file {path}")
    if path.suffix not in FORMATS:
        raise UserError(f"{field}: {path} should be one of {', '.join(FORMATS)}")
    if path.stat().st_size == 0:
        raise UserError(f"{field}: the file {path} is empty")
    if path.suffix == ".jsonl":
        return _read_jsonl(path, field)
    import datasets

    datasets.disable_progress_bars()

    try:
        rows = datasets.load_dataset(FORMATS[path.suffix], data_files=str(path), split="train")
    except Exception as error:  # datasets wraps every reader's own errors
        if "corresponds to no data" in str(error):
            return []
        cause = error.__cause__ or error
        raise UserError(f"{field}: {path} cannot be read as {path.suffix[1:]}: {cause}") from error
    return rows.to_list()


def _read_jsonl(path: Path, field: str) -> list[Record]:
    """Line by line, so that a mistake can be named by its line."""
    records = []
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line.decode("utf-8"))
            except UnicodeDecodeError as error:
                raise UserError(f"{field}: {path}, line {number} is no UTF-8: {error}") from error
            except ValueError as error:
                raise UserError(f"{field}: {path}, line {number} is no JSON: {error}") from error
            if not isinstance(record, dict):
                raise UserError(
                    f"{field}: {path}, line {number} should be a JSON object, it is {type(record).__name__}"
                )
            records.append(record)
    return records


def _read_hub(source: dict[str, str], field: str) -> list[Record]:
    if "path" not in source or not source.keys() <= {"path", "name", "split"}:
        raise UserError(f"{field}: a hub's data set has path, name and split, not {', '.join(source)}")
    import datasets

    datasets.disable_progress_bars()

    try:
        name, split = source.get("name"), source.get("split", "train")
        return datasets.load_dataset(source["path"], name, split=split).to_list()
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"{field}: {source['path']!r} is neither a file nor a data set of the hub: {reason}") from error
