import torch

from lit_rlhf.modules.metrics import Metrics


def test_plain_numbers_are_held_on_the_device_too():
    """What the processes talk by (NCCL) may know no other."""
    means = Metrics(torch.device("meta"))
    means.add("kl_coef", 0.1)
    means.add("loss", torch.tensor(0.1), weight=2)
    means.maximum("ratio", torch.tensor(1.0))
    held = [getattr(metric, name) for metric in means._metrics.values() for name in metric._defaults]
    assert len(held) == 5
    assert {x.device.type for x in held} == {"meta"}
