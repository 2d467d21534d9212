"""Checkpoints of any strategy, read by one process: a file, or a folder with each process's share."""

import shutil
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

from lit_rlhf.errors import UserError

REST = "meta.pt"
"""In a folder: all that is neither weights nor optimizer state. It is written last."""


def read_checkpoint(path: Path, weights_only: bool = True) -> dict[str, Any]:
    """What is in a checkpoint, as one process writes it. No process group is needed.

    Args:
        path: A file or folder.
        weights_only: As `torch.load` has it.

    Raises:
        UserError: for a folder that is no whole checkpoint.
    """
    if not path.is_dir():
        return torch.load(path, map_location="cpu", weights_only=weights_only, mmap=True)
    if not (path / REST).is_file():
        raise UserError(f"{path} is not a whole checkpoint: it has no {REST}")
    state: dict[str, Any] = {}
    _load_state_dict(state, FileSystemReader(path), planner=_EmptyStateDictLoadPlanner(), no_dist=True)
    checkpoint = torch.load(path / REST, map_location="cpu", weights_only=weights_only)
    numbers = sorted(int(name.removeprefix("optimizer_")) for name in state if name.startswith("optimizer_"))
    optimizers = [by_number(state[f"optimizer_{number}"]) for number in numbers]
    return checkpoint | {"state_dict": state["state_dict"], "optimizer_states": optimizers}


def by_number(optimizer: dict[str, Any]) -> dict[str, Any]:
    """An optimizer's state with its parameters numbered, as torch has it, in place of named."""
    names = [name for group in optimizer["param_groups"] for name in group["params"]]
    return _renamed(optimizer, dict(zip(names, range(len(names)), strict=True)))


def by_name(optimizer: dict[str, Any], names: list[list[str]]) -> dict[str, Any]:
    """The inverse: the names of each group's parameters are given, in their order."""
    numbers = [number for group in optimizer["param_groups"] for number in group["params"]]
    return _renamed(optimizer, dict(zip(numbers, (name for group in names for name in group), strict=True)))


def _renamed(optimizer: dict[str, Any], new: dict[Any, Any]) -> dict[str, Any]:
    return {
        "state": {new[name]: state for name, state in optimizer["state"].items()},
        "param_groups": [
            {**group, "params": [new[name] for name in group["params"]]} for group in optimizer["param_groups"]
        ],
    }


def remove(path: Path) -> None:
    """A file, a folder, or nothing."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


class AnyCheckpoint(TorchCheckpointIO):
    """Lets strategies that do not shard resume from a folder too, and put a file in its place."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """One file."""
        if Path(path).is_dir():
            remove(Path(path))
        super().save_checkpoint(checkpoint, path, storage_options)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """See `read_checkpoint`."""
        if Path(path).is_dir():
            return read_checkpoint(Path(path), weights_only is not False)
        return super().load_checkpoint(path, map_location, weights_only=weights_only)
