"""Reading checkpoints of all strategies in one process, whether they are files or folders with a shard per process."""

import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import Tensor, nn

from lit_rlhf import __version__
from lit_rlhf.checkpoint_folders import DamagedError, check_files, read_index
from lit_rlhf.compat import METADATA_FILE, read_distributed_checkpoint
from lit_rlhf.errors import UserError, some_of
from lit_rlhf.files import remove, replacing

NUMBERED = re.compile(r"iteration-(\d+)\.ckpt")
"""The pattern of the name of a checkpoint with the iteration after which it was saved."""


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint, without a process group, into the dictionary that a run on one process would have saved.

    The checksums are compared first. Only tensors, plain values and collections of these are read, never code.

    Args:
        path: The checkpoint, a file or a folder.

    Raises:
        UserError: if the checkpoint is damaged, incomplete or not a checkpoint; the message names the one before it.
    """
    verify(path)
    if not path.is_dir():
        return read_plain(path, path)
    state = read_distributed_checkpoint(path)
    checkpoint = read_plain(path / METADATA_FILE, path)
    numbers = sorted(int(name.removeprefix("optimizer_")) for name in state if name.startswith("optimizer_"))
    optimizers = [by_number(state[f"optimizer_{number}"]) for number in numbers]
    return checkpoint | {"state_dict": state["state_dict"], "optimizer_states": optimizers}


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read only the weights of a checkpoint; the states of optimizers, which are larger, need no memory.

    Args:
        path: The checkpoint, a file or a folder.

    Raises:
        UserError: as listed in `read_checkpoint`.
    """
    verify(path)
    if path.is_dir():
        return read_distributed_checkpoint(path, {"state_dict"})["state_dict"]
    return read_plain(path, path)["state_dict"]


def verify(path: Path, share: int = 0, shares: int = 1) -> None:
    """Check that a checkpoint has the content that was written: compare the checksums, and look for code in a folder.

    A file has the CRC-32 of each of its records, as every file that ``torch.save`` writes.

    Args:
        path: The checkpoint, a file or a folder.
        share: The number of this process's share of a folder's files, from 0.
        shares: The number of shares, of which each process reads one.

    Raises:
        UserError: if the checkpoint is damaged, incomplete or not a checkpoint; the message names the one before it.
    """
    try:
        if path.is_dir():
            check_files(path, share, shares)
            read_index(path)
        else:
            _check_records(path)
    except DamagedError as error:
        raise refusal(path, str(error)) from error


def _check_records(path: Path) -> None:
    """Compare the records of a file with their checksums.

    Raises:
        DamagedError: if a record differs, or if the file is not a checkpoint.
    """
    with path.open("rb") as file:
        if file.read(4) != b"PK\x03\x04":
            raise DamagedError("it does not begin as a checkpoint does")
    try:
        with zipfile.ZipFile(path) as records:
            if not any(name.endswith("/data.pkl") for name in records.namelist()):
                raise DamagedError("it is an archive of something else")
            damaged = records.testzip()
    except (zipfile.BadZipFile, EOFError, OSError, ValueError, NotImplementedError, RuntimeError) as error:
        raise DamagedError("its end is missing, or its table of contents differs from what was written") from error
    if damaged is not None:
        raise DamagedError(f"{damaged.partition('/')[2]} differs from what was written")


def read_plain(path: Path, checkpoint: Path) -> dict[str, Any]:
    """Read a dictionary of tensors and plain values from a file, without running code.

    Args:
        path: The file.
        checkpoint: The checkpoint that the file belongs to, for messages.

    Raises:
        UserError: if the file has anything else.
    """
    try:
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError, ValueError, EOFError) as error:
        raise refusal(
            checkpoint, "it holds objects other than tensors and plain values, which could run code"
        ) from error
    if not isinstance(found, dict) or "pytorch-lightning_version" not in found:
        raise refusal(checkpoint, "it is not the checkpoint of a run")
    return found


def shapes_in(folder: Path) -> dict[str, torch.Size]:
    """Return the shapes of the weights in a checkpoint folder, by name."""
    start = "state_dict."
    tensors = {name: entry for name, entry in read_index(folder).state_dict_metadata.items() if hasattr(entry, "size")}
    return {name.removeprefix(start): entry.size for name, entry in tensors.items() if name.startswith(start)}


def identity(module: nn.Module) -> dict[str, str]:
    """Return what a checkpoint belongs to: the class of the module, and the versions of lit-rlhf and torch."""
    return {"module": type(module).__name__, "version": __version__, "torch": str(torch.__version__)}


def check_belongs(module: Any, checkpoint: dict[str, Any], shapes: dict[str, torch.Size], path: Any) -> None:
    """Check that a checkpoint is one of this module, and of models with these shapes.

    Args:
        module: The LightningModule that is about to load the checkpoint.
        checkpoint: The checkpoint, at least without weights and the state of optimizers.
        shapes: The shapes of the weights in the checkpoint, by name.
        path: The checkpoint, for messages.

    Raises:
        UserError: if the module is another one, or if a weight is missing, is new, or has another shape.
    """
    saved, own = checkpoint.get("lit_rlhf", {}).get("module"), type(module).__name__
    if saved not in (None, own):
        raise UserError(f"ckpt_path: {path} is a checkpoint of {saved}, not of {own}")
    here = {name: x.shape for name, x in module.state_dict().items() if isinstance(x, torch.Tensor)}
    for names in (here, shapes):  # parts with a state of their own, such as `kl`, may be another part now
        for name in [name for name in names if name.endswith("_extra_state")]:
            del names[name]
    fits = f"ckpt_path: {path} does not fit this run's options"
    for name in sorted(shapes.keys() & here.keys()):
        if tuple(shapes[name]) != tuple(here[name]):
            raise UserError(f"{fits}: {name} has the shape {list(shapes[name])} there, and {list(here[name])} here")
    if module.strict_loading and (missing := sorted(here.keys() - shapes.keys())):
        raise UserError(f"{fits}: it has no {some_of(missing)}")
    if module.strict_loading and (further := sorted(shapes.keys() - here.keys())):
        raise UserError(f"{fits}: it also has {some_of(further)}")


def numbered(folder: Path) -> dict[int, Path]:
    """Return the numbered checkpoints in a folder, by the iteration after which each was saved."""
    return {int(match[1]): path for path in folder.glob("*.ckpt") if (match := NUMBERED.fullmatch(path.name))}


def refusal(path: Path, reason: str) -> UserError:
    """Return the error that a checkpoint cannot be used, which names the newest one before it, if there is one.

    >>> str(refusal(Path("runs/ppo/checkpoints/iteration-000010.ckpt"), "its end is missing"))
    'the checkpoint runs/ppo/checkpoints/iteration-000010.ckpt cannot be used: its end is missing'
    """
    path = path.with_name(path.readlink().name) if path.is_symlink() else path
    match, numbers = NUMBERED.fullmatch(path.name), numbered(path.parent)
    earlier = [number for number in numbers if match is None or number < int(match[1])]
    advice = f"; --ckpt_path {numbers[max(earlier)]} resumes from the one before it" if earlier else ""
    return UserError(f"the checkpoint {path} cannot be used: {reason}{advice}")


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


def link(path: Path, target: str) -> None:
    """Let ``path`` be a symbolic link to ``target``, in the same folder; an older link is replaced in one step."""
    new = path.with_name(f".{target}.link")
    remove(new)
    new.symlink_to(target)
    if path.is_dir() and not path.is_symlink():  # written by an older version
        remove(path)
    new.replace(path)


class AnyCheckpoint(TorchCheckpointIO):
    """A Trainer plugin that reads files and folders of all strategies, and writes files that are whole or absent.

    With it, unsharded strategies resume from a checkpoint folder. A file is written without a copy of its content in
    memory, flushed to the disk, and then renamed. For example, to continue a sharded run under DDP::

        trainer = lightning.Trainer(strategy="ddp", plugins=[AnyCheckpoint()])
        trainer.fit(module, data, ckpt_path="runs/sharded/checkpoints/last.ckpt")
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Write the checkpoint to one file, which replaces any file or folder of the same name.

        Raises:
            OSError: if the file cannot be written, for example because the disk is full.
        """
        with replacing(Path(path)) as new, new.open("wb") as file:
            try:
                torch.save(checkpoint, file)
            except RuntimeError as error:  # torch reports an error of the file as one of its own
                if isinstance(error.__context__, OSError):
                    raise error.__context__ from error
                raise

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint from a file or a folder with `read_checkpoint`.

        Raises:
            UserError: if the checkpoint is damaged, incomplete or not a checkpoint.
        """
        return read_checkpoint(Path(path))
