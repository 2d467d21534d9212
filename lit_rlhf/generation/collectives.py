"""Collective operations on Python objects, for engines; in a run of one process, nothing is communicated."""

from typing import Any, TypeVar

import torch.distributed as dist

T = TypeVar("T")


def rank() -> int:
    """Return the rank of this process, which is its index among all processes; 0 in a run of one process."""
    return dist.get_rank() if dist.is_initialized() else 0


def gather(value: T) -> list[T]:
    """Return the list of the processes' values, in the order of the ranks, on every process.

    All processes call this function together.

    Args:
        value: This process's value, any object that can be pickled.
    """
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def broadcast(value: T) -> T:
    """Return process 0's value on every process; all processes call this function together.

    Args:
        value: On process 0, any object that can be pickled; on the other processes, it is ignored.
    """
    values = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(values, src=0)
    return values[0]
