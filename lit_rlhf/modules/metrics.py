"""Metrics that are collected over micro-batches, epochs and ranks, and the timing of an iteration's phases."""

import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import cast

import torch
from torch import Tensor
from torchmetrics import MaxMetric, Metric

from lit_rlhf.algorithms.kl import k1
from lit_rlhf.algorithms.masked import masked_sum
from lit_rlhf.progress import tell
from lit_rlhf.types import ScoredRollout, Trajectory


class WeightedMean(Metric):
    """The weighted mean Σ wᵢ xᵢ / Σ wᵢ of all values that were added, on all ranks.

    The mean is computed in float64, and is NaN if any value is NaN. torchmetrics' MeanMetric computes in float32, and
    ignores the weights if its NaN check is disabled.

    >>> mean = WeightedMean()
    >>> mean.update(torch.tensor([1.0, 4.0]), torch.tensor([2.0, 1.0]))
    >>> mean.compute()
    tensor(2., dtype=torch.float64)
    """

    total: Tensor
    weight: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("total", "weight"):
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, value: Tensor, weight: Tensor) -> None:
        """Add values of any shape to the mean, with weights of the same shape or one weight, [], for all of them."""
        value, weight = torch.broadcast_tensors(value.double(), weight.double())
        self.total += (value * weight).sum()
        self.weight += weight.sum()

    def compute(self) -> Tensor:
        """Return the mean, or NaN if no value was added."""
        return self.total / self.weight


class EffectiveSampleSize(Metric):
    """The effective sample size (Σ wᵢ)² / (n Σ wᵢ²) of n weights on all ranks, as a fraction of n.

    It is 1 for equal weights, and 1/n if all but one are 0. It is computed in float64. Source: Kong 1992, "A note on
    importance sampling using standardized weights".

    >>> size = EffectiveSampleSize()
    >>> size.update(torch.tensor([1.0, 3.0, 9.0]), torch.tensor([True, True, False]))
    >>> size.compute()
    tensor(0.8000, dtype=torch.float64)
    """

    total: Tensor
    squares: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("total", "squares", "count"):
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, weights: Tensor, mask: Tensor) -> None:
        """Add the weights at which the mask, of the same shape, is True."""
        weights = torch.where(mask, weights.double(), 0.0)
        self.total += weights.sum()
        self.squares += weights.square().sum()
        self.count += mask.sum()

    def compute(self) -> Tensor:
        """Return the effective sample size, or NaN if no weight was added."""
        return self.total.square() / (self.count * self.squares)


class StandardDeviation(Metric):
    """The standard deviation of all values that were added, on all ranks, computed in float64.

    >>> deviation = StandardDeviation()
    >>> deviation.update(torch.tensor([1.0, 3.0, 9.0]), torch.tensor([True, True, False]))
    >>> deviation.compute()
    tensor(1., dtype=torch.float64)
    """

    sums: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("sums", torch.zeros(3, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, values: Tensor, mask: Tensor) -> None:
        """Add the values at which the mask, of the same shape, is True."""
        x = torch.where(mask, values.double(), 0.0)
        self.sums += torch.stack([mask.sum(dtype=x.dtype), x.sum(), x.square().sum()])

    def compute(self) -> Tensor:
        """Return the standard deviation, or NaN if fewer than two values were added."""
        count, total, squares = self.sums
        deviation = (squares / count - (total / count).square()).clamp(min=0).sqrt()
        return torch.where(count > 1, deviation, torch.nan)


class Metrics:
    """A collection of named metrics, mostly means and maxima, which are reduced over all ranks when they are computed.

    Args:
        device: The device of the metrics' tensors, which must be one that the communication backend supports.

    >>> metrics = Metrics(torch.device("cpu"))
    >>> metrics.add("loss", torch.tensor([1.0, 2.0]))
    >>> metrics.maximum("ratio", torch.tensor(1.5))
    >>> metrics.compute()
    {'loss': 1.5, 'ratio': 1.5}
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._metrics: dict[str, Metric] = {}
        self._unused: dict[str, Metric] = {}  # to reuse: the tensors of a metric are freed late, as it refers to itself

    def clear(self, device: torch.device) -> None:
        """Drop all names and values, and continue on the given device.

        >>> metrics = Metrics(torch.device("cpu"))
        >>> metrics.add("loss", 1.0)
        >>> metrics.clear(torch.device("cpu"))
        >>> metrics.add("score", 2.0)
        >>> metrics.compute()
        {'score': 2.0}
        """
        self._unused = self._unused | self._metrics if device == self.device else {}
        self._metrics, self.device = {}, device

    def add(self, name: str, value: Tensor | float, weight: Tensor | float = 1.0) -> None:
        """Add values of any shape to the mean of this name, with weights of the same shape or one weight for all."""
        self.update(name, WeightedMean, self._on_device(value), self._on_device(weight))

    def add_masked(self, name: str, values: Tensor, mask: Tensor) -> None:
        """Add the values at which the mask is True to the mean of this name; both have the same shape.

        The other values are replaced by 0 and have the weight 0. To leave them out, the host would have to wait for the
        device, because the number of remaining values would be the shape of a tensor.
        """
        self.add(name, torch.where(mask, values.detach(), 0.0), mask)

    def _on_device(self, value: Tensor | float) -> Tensor:
        """Return a value as a tensor on the metrics' device; for a number, the host does not wait for the device."""
        if isinstance(value, Tensor):
            return value.detach().to(self.device)
        return torch.full((), value, device=self.device)

    def maximum(self, name: str, value: Tensor) -> None:
        """Include a value, [], in the maximum of this name."""
        self.update(name, partial(MaxMetric, nan_strategy="disable"), value)

    def sample_size(self, name: str, weights: Tensor, mask: Tensor) -> None:
        """Include the weights at which the mask is True in the effective sample size of this name."""
        self.update(name, EffectiveSampleSize, weights, mask)

    def update(self, name: str, make: Callable[[], Metric], *values: Tensor) -> None:
        """Update the metric of this name with tensors; ``make`` makes the metric when the name is first used."""
        if name not in self._metrics:
            metric = self._unused.pop(name, None) or make().to(self.device)
            metric.reset()
            self._metrics[name] = metric
        self._metrics[name].update(*(value.detach().to(self.device) for value in values))

    def weight(self, name: str) -> float:
        """Return the total weight of the values that this rank added to a mean."""
        metric = self._metrics[name]
        assert isinstance(metric, WeightedMean)
        return float(metric.weight)

    def snapshot(self) -> dict[str, dict[str, Tensor]]:
        """Return a copy of this rank's tensors of all metrics, for `restore`."""
        return {
            name: {key: value.clone() for key, value in cast(Mapping[str, Tensor], metric.metric_state).items()}
            for name, metric in self._metrics.items()
        }

    def restore(self, snapshot: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Drop everything that was added after the given snapshot was taken."""
        self._metrics = {name: self._metrics[name] for name in snapshot}
        for name, state in snapshot.items():
            for key, value in state.items():
                setattr(self._metrics[name], key, value.clone())

    def state(self) -> list[Tensor]:
        """Return this rank's tensors of all metrics, before they are reduced over the ranks."""
        return [cast(Tensor, value) for metric in self._metrics.values() for value in metric.metric_state.values()]

    def compute(self) -> dict[str, float]:
        """Return each metric's value over all ranks; every rank must have added the same names in the same order."""
        return {name: float(metric.compute()) for name, metric in self._metrics.items()}


def measure_experience(
    scored: ScoredRollout, trajectory: Trajectory, responses: int, kl_coef: float, metrics: Metrics
) -> None:
    """Record the scores, rewards, KL to any reference, KL coefficient, entropies and lengths of an iteration.

    A score or a reward that is NaN, because the reward failed, does not count.

    Args:
        scored: The responses, in prompt-major order.
        trajectory: The reward of each token.
        responses: The number of responses to each prompt.
        kl_coef: The coefficient of the KL to the reference.
        metrics: Receives the metrics.
    """
    rollout, mask, has_score = scored.rollout, trajectory.mask, ~scored.scores.isnan()
    metrics.add_masked("objective/score", scored.scores, has_score)
    metrics.update("objective/score_std", StandardDeviation, scored.scores, has_score)
    if responses > 1:
        of_prompts = scored.shaped_scores.view(-1, responses)
        equal = (of_prompts.amax(1) == of_prompts.amin(1)).float()
        metrics.add_masked("objective/uninformative_fraction", equal, has_score.view(-1, responses).all(1))
    metrics.add_masked("objective/reward", trajectory.rewards.sum(1), has_score)
    if scored.ref_logprobs is not None:
        metrics.add("objective/kl_to_ref", masked_sum(k1(scored.old_logprobs, scored.ref_logprobs), mask, 1))
        metrics.add("objective/kl_coef", kl_coef)
    metrics.add_masked("objective/entropy", scored.entropy, mask)
    metrics.add("response/length", rollout.response_lengths)
    metrics.add("response/truncated_fraction", (~rollout.terminated).float())
    for name, value in scored.rewards.items():
        metrics.add_masked(f"rewards/{name}", value, ~value.isnan())


def pop_standard_deviation(means: dict[str, float]) -> float:
    """Return the standard deviation of the scores, and remove the mean of the squared scores from ``means``."""
    return max(means.pop("score_squared") - means["score"] ** 2, 0.0) ** 0.5


class Stopwatch:
    """A stopwatch that adds up the seconds of several named phases."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the duration of a ``with`` block to a phase; the host waits for the GPU before and after the block."""
        tell(name)
        _synchronize()
        start = time.perf_counter()
        yield
        _synchronize()
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def summary(self, tokens: float, responses: float) -> dict[str, float]:
        """Return the seconds of each phase, the tokens and responses per second overall, and the peak memory in GiB."""
        seconds = sum(self.seconds.values())
        return {f"time/{phase}": value for phase, value in self.seconds.items()} | {
            "perf/tokens_per_second": tokens / seconds,
            "perf/responses_per_second": responses / seconds,
            "perf/peak_memory_gib": peak_memory_gib(),
        }


def peak_memory_gib() -> float:
    """Return the peak memory so far, in GiB: allocated on the GPU or, without a GPU, resident in this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
