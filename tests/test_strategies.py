import pytest
import torch

from lit_rlhf.algorithms.objectives import Clip, KLPenalty
from lit_rlhf.callbacks import IterationCheckpoint
from lit_rlhf.checkpoints import read_checkpoint, read_weights
from lit_rlhf.compat import read_distributed_checkpoint
from lit_rlhf.modules import TRPO, PolicyGradient, Update
from lit_rlhf.rewards import RewardFunction
from lit_rlhf.strategies import FSDP
from lit_rlhf.testing import Recorder


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1)


def distinct_words(responses):
    return [len(set(response.split())) / 10 for response in responses]


def test_an_optimizer_that_has_not_stepped_is_saved_at_step_0(one_process, fit, make_module, tmp_path):
    """While only the critic learns, the actor's optimizer has no state; a checkpoint then leaves it at its start."""

    def finished(name, every_n):
        options = {"iterations": 2, "update": Update(epochs=1, minibatches=1, critic_warmup=1)}
        module, folder = make_module(**options), tmp_path / name
        checkpoint = IterationCheckpoint(every_n=every_n, keep_last=2, dirpath=str(folder))
        fit(module, [checkpoint], strategy="fsdp2", devices=1, inference_mode=False)
        return {key: value.full_tensor() for key, value in module.actor.state_dict().items()}, folder

    expected, _ = finished("whole", every_n=2)
    found, folder = finished("saved", every_n=1)
    saved = folder / "iteration-000002.ckpt"
    assert saved.is_dir()
    assert read_distributed_checkpoint(saved, {"state_dict"}).keys() == {"state_dict"}  # without the optimizers
    weights, state = read_weights(saved), read_checkpoint(saved)["state_dict"]
    assert weights.keys() == state.keys()
    assert all(torch.equal(weights[name], weight) for name, weight in state.items())
    resumed = make_module(iterations=2, update=Update(epochs=1, minibatches=1, critic_warmup=1))
    fit(resumed, strategy="fsdp2", devices=1, inference_mode=False, ckpt_path=str(folder / "iteration-000001.ckpt"))
    for name, weight in expected.items():
        assert torch.equal(found[name], weight), name
        assert torch.equal(resumed.actor.state_dict()[name].full_tensor(), weight), name


@pytest.mark.filterwarnings("ignore:FSDP is switching to use `NO_SHARD`")
@pytest.mark.parametrize(
    "objective", [Clip, pytest.param(KLPenalty, marks=pytest.mark.long), None], ids=["clip", "penalty", "trpo"]
)
def test_fsdp_and_fsdp2_compute_the_same_in_half_precision(one_process, fit, tiny_model, objective):
    """Both round the same weights and use those of the last step; TRPO's actor changes often within a training step."""
    options = {"actor": str(tiny_model("llama")), "rewards": [RewardFunction(f"{__file__}:distinct_words")]}
    options |= {"critic": None, "iterations": 2}
    found = []
    for strategy in ("fsdp2", FSDP()):
        recorder = Recorder()
        if objective is None:
            module = TRPO(**options)
        else:
            update = Update(epochs=1, minibatches=1)
            module = PolicyGradient(**options, objective=objective(), update=update, actor_optimizer=sgd)
        fit(
            module,
            [recorder],
            batch_size=24,
            strategy=strategy,
            devices=1,
            precision="bf16-mixed",
            inference_mode=False,
        )
        found.append([{k: v for k, v in m.items() if not k.startswith(("time/", "perf/"))} for m in recorder.metrics])
    for wanted, got in zip(*found, strict=True):
        assert got == pytest.approx(wanted, rel=1e-4, abs=1e-6)
        if objective is not None:  # one step per iteration
            assert got["policy/ratio_max"] == 1
