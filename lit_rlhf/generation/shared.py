"""Weights in memory that several processes share."""

import mmap
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from lit_rlhf.models.actor import Actor

ALIGNMENT = 64
"""The address of each tensor is a multiple of this number of bytes, as vector instructions prefer."""


@dataclass(frozen=True, slots=True)
class Layout:
    """The names, shapes and data types of tensors that follow each other in memory.

    >>> layout = Layout.of({"weight": torch.zeros(2, 3), "bias": torch.zeros(3, dtype=torch.bfloat16)})
    >>> layout.shapes, layout.size
    (((2, 3), (3,)), 128)
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[torch.dtype, ...]

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> "Layout":
        """Return the layout for copies of these tensors."""
        shapes = tuple(tuple(tensor.shape) for tensor in tensors.values())
        return cls(tuple(tensors), shapes, tuple(tensor.dtype for tensor in tensors.values()))

    @property
    def sizes(self) -> list[int]:
        """The number of bytes of each tensor, rounded up to a multiple of ``ALIGNMENT``."""
        bytes_of = [
            torch.Size(shape).numel() * dtype.itemsize for shape, dtype in zip(self.shapes, self.dtypes, strict=True)
        ]
        return [-(-size // ALIGNMENT) * ALIGNMENT for size in bytes_of]

    @property
    def size(self) -> int:
        """The sum of `sizes`: the number of bytes that all tensors take together."""
        return sum(self.sizes)


def open_shared_memory() -> int:
    """Return the file descriptor of new, empty shared memory; child processes can inherit it.

    The memory (a temporary file, on systems without ``memfd_create``) has no name in a file system, so that it is
    freed when the last process that uses it has ended.
    """
    if hasattr(os, "memfd_create"):
        return os.memfd_create("lit-rlhf-weights", 0)
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def map_tensors(descriptor: int, layout: Layout) -> dict[str, Tensor]:
    """Return tensors in shared memory, which is made large enough for them.

    Args:
        descriptor: The file descriptor of the memory, from `open_shared_memory`.
        layout: The names, shapes and data types of the tensors.

    Returns:
        The tensors by name. Every process that maps the same memory sees the same contents.

    >>> memory, layout = open_shared_memory(), Layout.of({"weight": torch.zeros(2)})
    >>> one, other = map_tensors(memory, layout), map_tensors(memory, layout)
    >>> one["weight"][1] = 5.0
    >>> other["weight"]
    tensor([0., 5.])
    """
    size = max(layout.size, ALIGNMENT)
    if os.fstat(descriptor).st_size < size:
        os.ftruncate(descriptor, size)
    memory = torch.frombuffer(mmap.mmap(descriptor, size), dtype=torch.uint8)
    starts = accumulate(layout.sizes, initial=0)
    tensors = {}
    for name, shape, dtype, start in zip(layout.names, layout.shapes, layout.dtypes, starts, strict=False):
        count = torch.Size(shape).numel()
        tensors[name] = memory[start : start + count * dtype.itemsize].view(dtype).view(shape)
    return tensors


def trained_weights(actor: Actor) -> dict[str, Tensor]:
    """Return an actor's own parameters except the value head's, by name; the names are those of the unsharded model.

    Tied parameters are returned once. Inside `unsharded`, the parameters of a sharded model are full tensors.
    """
    own = actor.own_parameters()
    return {
        name.replace("_fsdp_wrapped_module.", ""): parameter.detach()
        for name, parameter in own.items()
        if not name.startswith("value_head.")
    }
