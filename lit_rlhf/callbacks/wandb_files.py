"""The rows in the files that W&B keeps of a run, which hold what W&B has got even if the process was killed."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BLOCK, FRAGMENT_HEADER = 32768, 7
WHOLE, FIRST, LAST = 1, 2, 4
"""The types of fragments that are a whole record, the beginning of a record, and the end of a record."""
TAIL = 64 * 2**20
"""The number of bytes at the end of a file that are read; what was logged last is there."""


def files(folder: Path, run: str) -> list[Path]:
    """Return the files that W&B has on this machine for a run: one for each part of the run, in order.

    Args:
        folder: W&B's folder, which contains a folder for each part of each run.
        run: The id of the run.
    """
    return sorted(folder.glob(f"*run-*-{run}/run-{run}.wandb"), key=lambda file: file.parent.name.partition("run-")[2])


def rows(file: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of metrics in a file; a value that is not a number, such as a table or a histogram, is None."""
    for record in _records(file):
        if record.WhichOneof("record_type") == "history":
            yield {item.key or item.nested_key[0]: _number(item.value_json) for item in record.history.item}


def _number(text: str) -> float | None:
    value = json.loads(text)
    return value if isinstance(value, int | float) else None


def _records(path: Path) -> Iterator[Any]:
    """Yield the complete records at the end of a file.

    The file is a LevelDB log: after a header, blocks that contain the fragments of records, each with a header of
    checksum, length and type. wandb has no reader for it.
    """
    from google.protobuf.message import DecodeError
    from wandb.proto import wandb_internal_pb2

    messages: Any = wandb_internal_pb2
    with path.open("rb") as file:
        start = max(0, path.stat().st_size - TAIL) // BLOCK * BLOCK
        file.seek(start)
        data = file.read()
    at, record, begun = 0 if start else FRAGMENT_HEADER, b"", not start  # the file's header is as long
    while at + FRAGMENT_HEADER <= len(data):
        if BLOCK - at % BLOCK < FRAGMENT_HEADER:
            at += BLOCK - at % BLOCK
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + FRAGMENT_HEADER])
        at += FRAGMENT_HEADER + length
        if kind == 0 or at > len(data):  # the process was killed while it wrote this
            return
        begun = begun or kind in (WHOLE, FIRST)
        record += data[at - length : at] if begun else b""
        if begun and kind in (WHOLE, LAST):
            try:
                yield messages.Record.FromString(record)
            except DecodeError:
                return
            record = b""
