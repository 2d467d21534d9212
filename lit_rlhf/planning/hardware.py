"""Devices that a plan can be made for: GPUs with public peak rates, and this machine's CPU with measured rates."""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch

from lit_rlhf.errors import UserError

GB = 10**9


@dataclass(frozen=True, slots=True)
class Device:
    """The memory and the peak rates of a device.

    >>> find_gpu("H100").memory == 80 * GB
    True
    """

    name: str
    memory: float  # bytes
    bandwidth: float | None  # bytes per second, reading and writing together; None if it is not known
    half: float | None  # FLOPs per second in products of dense bfloat16 matrices; None if it is not known
    single: float | None  # FLOPs per second in products of float32 matrices (TF32 on GPUs); None if it is not known

    @property
    def is_cpu(self) -> bool:
        """Whether the device is a CPU, whose memory is that of the host."""
        return self.name == "cpu"


GPUS = (
    Device("h200", 141 * GB, 4.8e12, 989e12, 494e12),
    Device("h100", 80 * GB, 3.35e12, 989e12, 494e12),
    Device("h100-pcie", 80 * GB, 2.0e12, 756e12, 378e12),
    Device("a100-80gb", 80 * GB, 2.039e12, 312e12, 156e12),
    Device("a100-40gb", 40 * GB, 1.555e12, 312e12, 156e12),
    Device("l40s", 48 * GB, 0.864e12, 362e12, 183e12),
    Device("l4", 24 * GB, 0.3e12, 121e12, 60e12),
    Device("rtx-4090", 24 * GB, 1.008e12, 165e12, 82.6e12),
)
"""The GPUs' memory and rates from NVIDIA's data sheets; rates that assume sparsity are halved.

H200, H100 and A100 are the SXM modules, except ``h100-pcie``.
"""


def find_gpu(name: str) -> Device:
    """Return the GPU with this name, in upper or lower case, from the table `GPUS`.

    Raises:
        UserError: if the table has no such GPU; the message names the GPUs of the table.
    """
    for gpu in GPUS:
        if gpu.name == name.lower():
            return gpu
    raise UserError(f"gpu: {name!r} is not in the table; it has {', '.join(gpu.name for gpu in GPUS)}, and cpu")


def this_gpu() -> Device:
    """Return this process's GPU, with its own name and memory, and with the rates that `known_rates` returns."""
    found = torch.cuda.get_device_properties(torch.cuda.current_device())
    return replace(known_rates(found.name), name=found.name, memory=float(found.total_memory))


def known_rates(name: str) -> Device:
    """Return the GPU of the table `GPUS` that matches a name reported by CUDA.

    A GPU matches if all words of its own name occur in the reported name. If several match, the one with the most
    words is returned; if none matches, a device with the reported name, memory 0 and rates of None is returned.

    >>> known_rates("NVIDIA A100-SXM4-80GB").name, known_rates("NVIDIA H100 80GB HBM3").name
    ('a100-80gb', 'h100')
    >>> known_rates("NVIDIA T4").half is None
    True
    """
    words = set(name.lower().replace("-", " ").split())
    known = [gpu for gpu in GPUS if words.issuperset(gpu.name.split("-"))]
    return max(known, key=lambda gpu: len(gpu.name.split("-")), default=Device(name, 0.0, None, None, None))


def this_cpu() -> Device:
    """Return this machine's CPU, with the rates of matrix products and of a copy, measured in about half a second."""
    source = torch.ones(2**24)
    target = torch.empty_like(source)
    seconds = _fastest(partial(target.copy_, source))
    rates = []
    for dtype in (torch.bfloat16, torch.float32):
        matrix = torch.ones(1024, 1024, dtype=dtype)
        rates.append(2 * 1024**3 / _fastest(partial(torch.mm, matrix, matrix)))
    return Device("cpu", memory_of_host(), 2 * source.nbytes / seconds, *rates)


def memory_of_host() -> float:
    """Return the size of this machine's memory, in bytes."""
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def _fastest(work: Callable[[], object], repetitions: int = 4) -> float:
    times = []
    for _ in range(repetitions):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)
