import pytest
import torch

from lit_rlhf.models.adapters import LoRA
from lit_rlhf.modules import Update
from lit_rlhf.testing import Recorder


def adam(lr):
    return lambda p: torch.optim.AdamW(p, lr=lr, weight_decay=0.0)


ONE_STEP = Update(epochs=1, minibatches=1, max_tokens=64)


@pytest.mark.parametrize("critic", ["actor", "shared", None])
def test_the_actor_starts_as_the_reference(make_module, fit, critic):
    """B is 0: KL is 0 and every ratio is 1, and both stay so in the first minibatch of each later iteration."""
    recorder = Recorder()
    options = {"advantages": __import__("lit_rlhf").MonteCarlo()} if critic is None else {}
    module = make_module(critic=critic, adapter=LoRA(rank=4), update=ONE_STEP, actor_optimizer=adam(1e-2), **options)
    fit(module, [recorder])
    assert abs(recorder.metrics[0]["objective/kl_to_ref"]) < 1e-6
    for metrics in recorder.metrics:
        assert abs(metrics["policy/ratio_max"] - 1) < 1e-5
    assert recorder.metrics[-1]["objective/kl_to_ref"] > 1e-5
