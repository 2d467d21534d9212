"""Devices that a plan can be made for: public peak rates of GPUs, and the rates of this machine's CPU, measured."""

import os
import time
from dataclasses import dataclass, replace

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
    bandwidth: float | None  # bytes a second, reading and writing together; None if it is not known
    half: float | None  # FLOPs a second of products of dense bfloat16 matrices; None if it is not known
    single: float | None  # FLOPs a second of float32 matrices, on GPUs by TF32; None if it is not known

    @property
    def is_cpu(self) -> bool:
        """Whether the device is a CPU, whose memory is that of the host."""
        return self.name == "cpu"


GPUS = (
    Device("h200", 141 * GB, 4.8e12, 989e12, 494e12),
    Device("h100", 80 * GB, 3.35e12, 989e12, 494e12),
    Device("a100-80", 80 * GB, 2.039e12, 312e12, 156e12),
    Device("a100-40", 40 * GB, 1.555e12, 312e12, 156e12),
    Device("l40s", 48 * GB, 0.864e12, 362e12, 183e12),
    Device("l4", 24 * GB, 0.3e12, 121e12, 60e12),
    Device("rtx-4090", 24 * GB, 1.008e12, 165e12, 82.6e12),
)
"""NVIDIA's data sheets; H100, H200 and A100 are the SXM modules, and rates with sparsity are halved."""


def find_gpu(name: str) -> Device:
    """Return a GPU of the table `GPUS` by its name, in any case.

    Raises:
        UserError: if the table has no such GPU; the message names those that it has.
    """
    for gpu in GPUS:
        if gpu.name == name.lower():
            return gpu
    raise UserError(f"gpu: {name!r} is not in the table; it has {', '.join(gpu.name for gpu in GPUS)}, and cpu")


def this_gpu() -> Device:
    """Return this process's GPU: its own name and memory, with the rates of the table if the table has the GPU."""
    name, memory = torch.cuda.get_device_name(), float(torch.cuda.get_device_properties().total_memory)
    words = name.lower().replace("geforce ", "").replace(" ", "-")
    # of two GPUs with the same first word, the one whose memory is nearest
    known = [gpu for gpu in GPUS if gpu.name.split("-80")[0].split("-40")[0] in words.split("-") or gpu.name in words]
    if not known:
        return Device(name, memory, None, None, None)
    return replace(min(known, key=lambda gpu: abs(gpu.memory - memory)), name=name, memory=memory)


def this_cpu() -> Device:
    """Return this machine's CPU, with the rates that a product of matrices and a copy reach now, in half a second."""
    memory = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    source = torch.ones(2**24)
    target = torch.empty_like(source)
    seconds = _fastest(lambda: target.copy_(source))
    rates = []
    for dtype in (torch.bfloat16, torch.float32):
        matrix = torch.ones(1024, 1024, dtype=dtype)
        rates.append(2 * 1024**3 / _fastest(lambda matrix=matrix: matrix @ matrix))
    return Device("cpu", memory, 2 * source.nbytes / seconds, *rates)


def _fastest(work, repetitions: int = 4) -> float:
    times = []
    for _ in range(repetitions):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)
