"""Folders through which a server gets weights; each folder exists only until the server has read its files."""

import glob
import json
import os
import shutil
import socket
import tempfile
import weakref
from collections.abc import Mapping
from itertools import count
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from lit_rlhf.errors import UserError

PREFIX = "lit-rlhf-weights"
SHARED_MEMORY = Path("/dev/shm")
COPIES = 3
"""The number of sets of weights that must fit into shared memory: one in use, one waiting, and one being written."""
OPTION = "model.engine.weights_dir"


class WeightsFolder:
    """The folder of one run, in which each set of weights has a folder of its own.

    The folder is removed when this object is closed or when the process exits. A process that is killed leaves the
    folder behind. The keeper of the process's server (``keeper.py``) then removes the folder; without a keeper, the
    next run with the same parent folder on the same machine does so.

    Args:
        parent: The parent folder; None for shared memory if there is room for several sets of weights, and for the
            directory of temporary files otherwise.
        size: The number of bytes of one set of weights.

    Raises:
        UserError: if the folder cannot be made.

    >>> folder = WeightsFolder(None, size=0)
    >>> folder.path.is_dir()
    True
    >>> folder.close()
    >>> folder.path.is_dir()
    False
    """

    def __init__(self, parent: str | None, size: int) -> None:
        place = _roomy(size) if parent is None else Path(parent)
        try:
            place.mkdir(parents=True, exist_ok=True)
            _remove_stale(place)
            self.path = Path(tempfile.mkdtemp(prefix=f"{_owner(os.getpid())}-", dir=place)).absolute()
        except OSError as error:
            raise UserError(f"{OPTION}: no folder for weights can be made in {place} ({error.strerror})") from error
        self.close = weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)
        self._names = count()

    def new(self) -> Path:
        """Return a new path, at which the caller makes the folder of one set of weights."""
        return self.path / str(next(self._names))

    def write(self, model: PreTrainedModel, weights: Mapping[str, Tensor], dtype: torch.dtype) -> Path:
        """Write a model with the given weights to a new folder, and return the folder.

        The arguments are those of `save_untied`, which writes the files.

        Raises:
            UserError: if the folder cannot be written; no part of it is left.
        """
        folder = self.new()
        try:
            save_untied(model, weights, folder, dtype)
        except BaseException as error:
            shutil.rmtree(folder, ignore_errors=True)
            if isinstance(error, OSError) or "I/O error" in str(error):  # safetensors' own error
                raise UserError(f"{OPTION}: the weights cannot be written to {self.path} ({error})") from error
            raise
        return folder


def save_untied(model: PreTrainedModel, weights: Mapping[str, Tensor], folder: Path, dtype: torch.dtype) -> None:
    """Write a model as a Hugging Face folder, with the language-model head's weight even if the head is tied.

    vLLM on a CPU keeps a packed copy of the head, and does not renew this copy when it loads new weights into a model
    whose head is tied to the embeddings. The configuration in the folder therefore says that the head is not tied.

    Args:
        model: A causal language model, of which only the configuration and the names of the weights are used.
        weights: The model's full ``state_dict``.
        folder: The folder to write.
        dtype: The floating-point type of the weights in the file.
    """
    copies = {
        name: (weight.to(dtype) if weight.is_floating_point() else weight).cpu() for name, weight in weights.items()
    }
    names = {id(module): f"{name}.weight" for name, module in model.named_modules()}
    head, embeddings = (names[id(m)] for m in (model.get_output_embeddings(), model.get_input_embeddings()))
    if copies.get(head, copies[embeddings]).data_ptr() == copies[embeddings].data_ptr():
        copies[head] = copies[embeddings].clone()
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        model.save_pretrained(folder, state_dict=copies)
    finally:
        if shown:
            transformers_logging.enable_progress_bar()
    file = folder / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    config |= {"tie_word_embeddings": False, "dtype": str(dtype).removeprefix("torch.")}
    file.write_text(json.dumps(config, indent=2), encoding="utf-8")


def _roomy(size: int) -> Path:
    """Return shared memory's folder if it has room for several sets of weights, otherwise the temporary directory.

    Args:
        size: The number of bytes of one set of weights.
    """
    if SHARED_MEMORY.is_dir() and shutil.disk_usage(SHARED_MEMORY).free >= COPIES * size:
        return SHARED_MEMORY
    return Path(tempfile.gettempdir())


def _owner(process: int | str) -> str:
    """Return the beginning of the name of a process's folder, which identifies the process.

    This beginning consists of a prefix, the machine's name, the namespace of process ids, and the process's id.

    Args:
        process: The id of the process; an empty string for the part that all processes of the namespace have in common.
    """
    namespace = Path("/proc/self/ns/pid")  # a container has its own
    number = namespace.stat().st_ino if namespace.exists() else 0
    return f"{PREFIX}-{socket.gethostname()}-{number}-{process}"


def _remove_stale(place: Path) -> None:
    """Remove the folders in ``place`` whose processes ran on this machine (or in this container) and have ended."""
    prefix = _owner("")
    for folder in place.glob(f"{glob.escape(prefix)}*"):
        process = folder.name.removeprefix(prefix).partition("-")[0]
        if process.isdecimal() and not _is_running(int(process)):
            shutil.rmtree(folder, ignore_errors=True)


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # the process is another user's
        pass
    return True
