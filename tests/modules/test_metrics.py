import math

import pytest
import torch
from torch.overrides import TorchFunctionMode

from lit_rlhf.modules.metrics import Metrics, StandardDeviation


def test_plain_numbers_are_kept_on_the_device_of_the_communication_backend():
    """NCCL reduces only GPU tensors; here the meta device stands in for the GPU, and adding a CPU tensor fails."""
    metrics = Metrics(torch.device("meta"))
    metrics.add("kl_coef", 0.1)
    metrics.add("loss", torch.tensor(0.1), weight=2)
    metrics.maximum("ratio", torch.tensor(1.0))
    assert {tensor.device.type for tensor in metrics.state()} == {"meta"}
    assert len(metrics.state()) == 5


def test_means_weights_and_maxima():
    metrics = Metrics(torch.device("cpu"))
    metrics.add("loss", torch.tensor([1.0, 2.0]))
    metrics.add("loss", 6.0, weight=2.0)
    metrics.add_masked("kl", torch.tensor([[1.0, float("nan")]]), torch.tensor([[True, False]]))
    metrics.maximum("ratio", torch.tensor(1.5))
    metrics.maximum("ratio", torch.tensor(0.5))
    assert metrics.compute() == {"loss": 3.75, "kl": 1.0, "ratio": 1.5}
    assert metrics.weight("loss") == 4.0


def test_the_effective_sample_size():
    """The weights are 1, 2 and 0 in two parts: 3² / (3 · 5); many equal ones, large or small, have a size of 1."""
    metrics = Metrics(torch.device("cpu"))
    mask = torch.tensor([[True, False, True]])
    metrics.sample_size("size", torch.tensor([[1.0, float("nan"), 2.0]]), mask)
    metrics.sample_size("size", torch.tensor([[0.0, 9.0, 9.0]]), torch.tensor([[True, False, False]]))
    metrics.sample_size("equal", torch.full((1, 3), 4e8), mask)
    metrics.sample_size("equal", torch.full((1, 3), 4e8), mask)
    assert metrics.compute() == {"size": 0.6, "equal": 1.0}


def test_the_standard_deviation_in_two_parts():
    """Of 1, 2, 3 and 6 it is √3.5; large equal numbers have none, up to rounding, and one number has no deviation."""
    metrics = Metrics(torch.device("cpu"))
    for values in ([1.0, 2.0], [3.0, 6.0]):
        counts = torch.tensor([True, True, False])
        metrics.update("std", StandardDeviation, torch.tensor([*values, torch.nan]), counts)
        metrics.update("equal", StandardDeviation, torch.full((3,), 1234.1), torch.ones(3, dtype=torch.bool))
    metrics.update("one", StandardDeviation, torch.ones(1), torch.ones(1, dtype=torch.bool))
    found = metrics.compute()
    assert found["std"] == pytest.approx(3.5**0.5)
    assert found["equal"] < 1e-6 * 1234.1
    assert math.isnan(found["one"])


def test_restore_drops_what_was_added_since_the_snapshot():
    metrics = Metrics(torch.device("cpu"))
    metrics.add("loss", 2.0)
    metrics.maximum("ratio", torch.tensor(1.5))
    before = metrics.snapshot()
    for _ in range(2):  # a snapshot can be restored more than once
        metrics.add("loss", float("nan"))
        metrics.maximum("ratio", torch.tensor(7.0))
        metrics.add("kl", 1.0)
        metrics.restore(before)
    assert metrics.compute() == {"loss": 2.0, "ratio": 1.5}


def test_numbers_are_filled_in_on_the_device():
    """A copy to the GPU would wait for it."""
    called = []

    class Calls(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            called.append(function)
            return function(*args, **(kwargs or {}))

    metrics = Metrics(torch.device("cpu"))
    with Calls():
        metrics.add("loss", torch.ones(2))
        metrics.add("kl_coef", 0.1)
    assert torch.full in called
    assert not {torch.tensor, torch.as_tensor} & set(called)
