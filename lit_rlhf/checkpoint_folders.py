"""Checkpoint folders, which have a shard for each process: their checksums, and a check that they hold no code."""

import io
import json
import pickle
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from lit_rlhf.files import write_text

CHECKSUMS = "checksums.json"
"""The file in a checkpoint folder with the size and the CRC-32 of every other file; it is written last."""
CHUNK = 1 << 22
"""The number of bytes that are read at a time."""
NAMES = {
    "torch.distributed.checkpoint.metadata": (
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "torch.serialization": ("_get_layout",),
    "pathlib": ("Path", "PosixPath", "PurePosixPath", "WindowsPath"),
    "collections": ("OrderedDict",),
}
"""The classes and functions that a folder's index may name, by their modules, besides ``torch.Size`` and data types."""


class DamagedError(Exception):
    """A part of a checkpoint is missing, differs from what was written, or could run code."""


def checksum(path: Path) -> list[int]:
    """Return the size of a file in bytes and the CRC-32 of its content."""
    size = crc = 0
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            size, crc = size + len(chunk), zlib.crc32(chunk, crc)
    return [size, crc]


def write_checksums(folder: Path, checksums: dict[str, list[int]]) -> None:
    """Write the checksums of a folder's files, by their names."""
    write_text(folder / CHECKSUMS, json.dumps(checksums, indent=1))


def check_files(folder: Path, share: int = 0, shares: int = 1) -> None:
    """Compare the files of a folder with their checksums.

    Args:
        folder: The checkpoint folder.
        share: The number of this process's share of the files, from 0.
        shares: The number of shares, of which each process reads one.

    Raises:
        DamagedError: if the folder is incomplete or a file differs.
    """
    try:
        expected = json.loads((folder / CHECKSUMS).read_text(encoding="utf-8"))
        names = sorted(expected)
    except FileNotFoundError:
        raise DamagedError(f"it has no {CHECKSUMS}") from None
    except (ValueError, TypeError, RecursionError):
        raise DamagedError(f"{CHECKSUMS} differs from what was written") from None
    if extra := sorted({path.name for path in folder.iterdir()} - {*names, CHECKSUMS}):
        raise DamagedError(f"{extra[0]} does not belong to it")
    for name in names[share::shares]:
        if Path(name).name != name or not (folder / name).is_file():
            raise DamagedError(f"{name} is missing")
        if checksum(folder / name) != expected[name]:
            raise DamagedError(f"{name} differs from what was written")


class _Index(pickle.Unpickler):
    """Reads a folder's index, without any class or function that does not belong there."""

    def find_class(self, module: str, name: str) -> Any:
        is_type = module == "torch" and (name == "Size" or isinstance(getattr(torch, name, None), torch.dtype))
        if not is_type and name not in NAMES.get(module, ()):
            raise DamagedError(f"its index names {module}.{name}, which could run code")
        return super().find_class(module, name)


def read_index(folder: Path) -> Any:
    """Return the index of a folder, ``torch.distributed.checkpoint.metadata.Metadata``, after a check for code.

    torch reads the index, and the values in the shards that are not tensors, with ``pickle``, which can run code. This
    function reads both without running any.

    Raises:
        DamagedError: if the index cannot be read, or if it or a value could run code.
    """
    from torch.distributed.checkpoint.metadata import BytesStorageMetadata

    try:
        with (folder / ".metadata").open("rb") as file:
            index = _Index(file).load()
        places = {place.fqn: stored for place, stored in index.storage_data.items()}
        for name in {stored.relative_path for stored in index.storage_data.values()}:
            if not (folder / name).resolve().is_relative_to(folder.resolve()):
                raise DamagedError(f"its index names the file {name} outside of it")
        kinds = index.state_dict_metadata.items()
        values = [places[name] for name, kind in kinds if isinstance(kind, BytesStorageMetadata)]
        _check_values(folder, values)
    except DamagedError:
        raise
    except Exception as error:  # pickle raises almost any error for other bytes
        raise DamagedError(f"its index cannot be read ({type(error).__name__})") from error
    return index


def _check_values(folder: Path, values: Iterable[Any]) -> None:
    for value in values:
        with (folder / value.relative_path).open("rb") as file:
            file.seek(value.offset)
            data = file.read(value.length)
        try:
            torch.load(io.BytesIO(data), weights_only=True)
        except pickle.UnpicklingError as error:
            raise DamagedError(f"{value.relative_path} holds an object that could run code") from error
