"""Checkpoint folders of several processes, checked before they are read: torch would execute code in their files."""

import io
import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata

from lit_rlhf.errors import UserError

METADATA = ".metadata"
"""The name of the pickled file in which ``torch.distributed.checkpoint`` lists the parts of a folder."""
CLASSES = {
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
"""The classes and functions that this file may name, by their modules, besides ``torch.Size`` and data types."""


def check_distributed_checkpoint(folder: Path) -> None:
    """Check that reading a checkpoint folder executes no code from its files, and reads no file outside the folder.

    ``torch.distributed.checkpoint`` unpickles the list of the folder's parts and every part that is not a tensor, and
    has no option to restrict this.

    Args:
        folder: The checkpoint.

    Raises:
        UserError: if one of the files names anything but tensors, primitive types and the classes of this list, or if
            the list names a file outside the folder.
    """
    path = folder / METADATA
    if not path.is_file():  # torch says what is missing
        return
    try:
        with path.open("rb") as file:
            metadata: Metadata = _Unpickler(file).load()
        for index, place in metadata.storage_data.items():
            if not (folder / place.relative_path).resolve().is_relative_to(folder.resolve()):
                raise pickle.UnpicklingError(f"the file {place.relative_path} is not in the folder")
            if isinstance(metadata.state_dict_metadata.get(index.fqn), BytesStorageMetadata):
                with (folder / place.relative_path).open("rb") as file:
                    file.seek(place.offset)
                    torch.load(io.BytesIO(file.read(place.length)), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"the checkpoint {folder} is refused, because it could execute code: {reason}") from error


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        """Return a class that the list of a checkpoint's parts may name.

        Raises:
            UnpicklingError: if it may not.
        """
        known = name in CLASSES.get(module, ())
        is_type = module == "torch" and (name == "Size" or isinstance(getattr(torch, name, None), torch.dtype))
        if not known and not is_type:
            raise pickle.UnpicklingError(f"{METADATA} names {module}.{name}")
        return super().find_class(module, name)
