"""Means over micro-batches, epochs and ranks; logged once an iteration."""

import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torchmetrics import MaxMetric, MeanMetric, Metric


class Means:
    """Metrics by name, each a (sum, count) pair that is reduced over all ranks when it is read."""

    def __init__(self) -> None:
        self._metrics: dict[str, Metric] = {}

    def add(self, name: str, value: Tensor | float, weight: Tensor | float = 1.0) -> None:
        """Take a value into the mean, ``weight`` times."""
        value = torch.as_tensor(value, dtype=torch.float64)
        metric = self._metrics.setdefault(name, MeanMetric(nan_strategy="disable").to(value.device))
        metric.update(value, torch.as_tensor(weight, dtype=torch.float64, device=value.device))

    def add_masked(self, name: str, values: Tensor, mask: Tensor) -> None:
        """Take all values that the mask counts into the mean."""
        self.add(name, values.detach()[mask])

    def maximum(self, name: str, value: Tensor) -> None:
        """Take a value into the maximum."""
        metric = self._metrics.setdefault(name, MaxMetric(nan_strategy="disable").to(value.device))
        metric.update(value.detach())

    def compute(self) -> dict[str, float]:
        """All of them over all ranks."""
        return {name: float(metric.compute()) for name, metric in self._metrics.items()}


class Stopwatch:
    """Seconds that named phases took."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time what happens inside."""
        _synchronize()
        start = time.perf_counter()
        yield
        _synchronize()
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


def peak_memory_gib() -> float:
    """The most memory held so far: the GPU's allocated, or this process's resident memory on a CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
