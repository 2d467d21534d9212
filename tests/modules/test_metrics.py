import torch

from lit_rlhf.modules.metrics import Metrics


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
