"""Reading checkpoints of all strategies in one process, whether they are files or folders with a shard per process."""

import shutil
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

from lit_rlhf.compat import METADATA_FILE, read_distributed_checkpoint
from lit_rlhf.distributed_files import check_distributed_checkpoint
from lit_rlhf.errors import UserError


def read_checkpoint(path: Path, weights_only: bool = True) -> dict[str, Any]:
    """Read a checkpoint, without a process group, into the dictionary that a run on one process would have saved.

    Args:
        path: The checkpoint, a file or a folder.
        weights_only: Whether `torch.load` restricts unpickling to tensors, primitive types and dictionaries.

    Raises:
        UserError: if a folder is not a complete checkpoint, or could execute code.
    """
    if not path.is_dir():
        return torch.load(path, map_location="cpu", weights_only=weights_only, mmap=True)
    if not (path / METADATA_FILE).is_file():
        raise UserError(f"{path} is not a complete checkpoint: it has no {METADATA_FILE}")
    check_distributed_checkpoint(path)
    state = read_distributed_checkpoint(path)
    checkpoint = torch.load(path / METADATA_FILE, map_location="cpu", weights_only=weights_only)
    numbers = sorted(int(name.removeprefix("optimizer_")) for name in state if name.startswith("optimizer_"))
    optimizers = [by_number(state[f"optimizer_{number}"]) for number in numbers]
    return checkpoint | {"state_dict": state["state_dict"], "optimizer_states": optimizers}


def by_number(optimizer: dict[str, Any]) -> dict[str, Any]:
    """Return an optimizer's state with parameters identified by number, as in ``Optimizer.state_dict``, not by name.

    >>> by_number({"state": {"w": {"step": 3}}, "param_groups": [{"lr": 0.1, "params": ["b", "w"]}]})
    {'state': {1: {'step': 3}}, 'param_groups': [{'lr': 0.1, 'params': [0, 1]}]}
    """
    names = [name for group in optimizer["param_groups"] for name in group["params"]]
    return _renamed(optimizer, dict(zip(names, range(len(names)), strict=True)))


def by_name(optimizer: dict[str, Any], names: list[list[str]]) -> dict[str, Any]:
    """Return an optimizer's state with parameters identified by name, not by number; the inverse of `by_number`.

    Args:
        optimizer: The optimizer's state, as returned by ``Optimizer.state_dict``.
        names: For each parameter group, the names of its parameters in order.

    >>> by_name({"state": {1: {"step": 3}}, "param_groups": [{"lr": 0.1, "params": [0, 1]}]}, [["b", "w"]])
    {'state': {'w': {'step': 3}}, 'param_groups': [{'lr': 0.1, 'params': ['b', 'w']}]}
    """
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
    """Delete a file or a folder, if it exists."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


class AnyCheckpoint(TorchCheckpointIO):
    """A Trainer plugin with which unsharded strategies resume from a checkpoint folder and replace it with a file.

    For example, to continue a sharded run under DDP::

        trainer = lightning.Trainer(strategy="ddp", plugins=[AnyCheckpoint()])
        trainer.fit(module, data, ckpt_path="runs/sharded/checkpoints/last.ckpt")
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Write the checkpoint to one file, which replaces any folder of the same name."""
        if Path(path).is_dir():
            remove(Path(path))
        super().save_checkpoint(checkpoint, path, storage_options)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint from a file or, with `read_checkpoint`, from a folder.

        Raises:
            UserError: if a folder is not a complete checkpoint.
        """
        if Path(path).is_dir():
            return read_checkpoint(Path(path), weights_only is not False)
        return super().load_checkpoint(path, map_location, weights_only=weights_only is not False)
