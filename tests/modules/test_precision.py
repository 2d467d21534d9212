"""Precisions that are refused, and frozen models under ``bf16-mixed``."""

import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from torch import nn

from lit_rlhf.errors import UserError
from lit_rlhf.generation import Sampling
from lit_rlhf.models.scoring import load_reward_model
from lit_rlhf.modules import DPO, SFT, TRPO, PolicyGradient, RewardModeling, Update
from lit_rlhf.rewards import RewardFunction, RewardModel
from lit_rlhf.strategies import FSDP
from lit_rlhf.testing import Recorder

MODULES = {
    "policy gradient": lambda actor: PolicyGradient(actor=actor, rewards=[RewardFunction("math:sqrt")]),
    "trpo": lambda actor: TRPO(actor=actor, rewards=[RewardFunction("math:sqrt")]),
    "sft": lambda actor: SFT(actor=actor),
    "reward": lambda actor: RewardModeling(reward=actor),
    "dpo": lambda actor: DPO(actor=actor),
}
RANKINGS = [{"prompt": f"w{i}", "chosen": f" w{i} w{i + 1}", "rejected": f" w{i + 2} w3 w4"} for i in range(16)]


def refusal(trainer, module) -> str:
    """Return the message with which a run is refused before any model is loaded."""
    with pytest.raises(UserError) as error:
        trainer.fit(module, train_dataloaders=[0])
    assert not module.is_configured
    return str(error.value)


@pytest.mark.parametrize("name", MODULES)
def test_half_precision_weights_are_refused(make_trainer, tiny_model, name):
    message = refusal(make_trainer(precision="bf16-true"), MODULES[name](str(tiny_model("llama"))))
    assert message == "trainer.precision must be 32-true or bf16-mixed, not 'bf16-true'"


@pytest.mark.parametrize(
    "options",
    [{"precision": "16-true"}, {"precision": "64-true"}, {"plugins": [MixedPrecision("16-mixed", "cpu")]}],
    ids=["16-true", "64-true", "16-mixed"],
)
def test_other_precisions_are_refused(make_trainer, tiny_model, options):
    message = refusal(make_trainer(**options), MODULES["policy gradient"](str(tiny_model("llama"))))
    assert message.startswith("trainer.precision must be 32-true or bf16-mixed, not ")


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", FSDP()], ids=["ddp", "fsdp2", "fsdp"])
def test_every_strategy_refuses(one_process, make_trainer, tiny_model, strategy):
    trainer = make_trainer(precision="bf16-true", strategy=strategy, devices=1, inference_mode=False)
    assert "'bf16-true'" in refusal(trainer, MODULES["policy gradient"](str(tiny_model("llama"))))


# ------------------------------------------------------------------------------------------ frozen models


def stored(model: nn.Module) -> int:
    """Return the bytes of a model's parameters."""
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


def results(recorder: Recorder) -> tuple[list[dict[str, float]], dict[str, torch.Tensor]]:
    timed = ("time/", "perf/")
    return [{k: v for k, v in row.items() if not k.startswith(timed)} for row in recorder.metrics], recorder.weights


def assert_identical(one: Recorder, two: Recorder) -> None:
    (metrics, weights), (other_metrics, other_weights) = results(one), results(two)
    assert len(metrics) == 2
    assert metrics == other_metrics
    assert weights.keys() == other_weights.keys()
    assert all(torch.equal(weights[name], other_weights[name]) for name in weights)


@pytest.fixture
def both(monkeypatch):
    """Return a function that calls another twice: with frozen models in float32, and with bfloat16 where possible."""

    def run(train):
        with monkeypatch.context() as patched:
            patched.setattr("lit_rlhf.modules.module.store_in_bfloat16", lambda *_, **__: None)
            wide = train()
        return wide, train()

    return run


@pytest.mark.filterwarnings("ignore:FSDP is switching to use `NO_SHARD`")
@pytest.mark.parametrize("strategy", ["auto", "fsdp2", pytest.param("fsdp", marks=pytest.mark.long)])
def test_half_the_bytes_give_the_same_bits(request, both, make_module, fit, tiny_model, strategy):
    """Reference and reward model hold fewer bytes; metrics, weights and held-out scores do not change."""
    if strategy != "auto":
        request.getfixturevalue("one_process")
    scorer = str(tiny_model("llama", task="score"))

    def train():
        module, recorder = (
            make_module(
                iterations=2, rewards=[RewardModel(scorer)], critic="reward", reference=str(tiny_model("llama", seed=1))
            ),
            Recorder(),
        )
        chosen = FSDP() if strategy == "fsdp" else strategy
        validated = {"validation": strategy == "auto", "val_check_interval": 1}
        fit(module, [recorder], strategy=chosen, devices=1, precision="bf16-mixed", inference_mode=False, **validated)
        return recorder, stored(module.reference), stored(module.scores.rewards[0].model)

    (wide, *wide_bytes), (narrow, *narrow_bytes) = both(train)
    assert_identical(wide, narrow)
    for before, after in zip(wide_bytes, narrow_bytes, strict=True):
        if strategy == "auto":  # embeddings and norms, the smaller part, stay in float32
            assert before / 2 < after < 0.7 * before
        else:
            assert after == before / 2


def test_dpo_gives_the_same_bits(both, fit_preferences, tiny_model):
    def train():
        module, recorder = (
            DPO(
                actor=str(tiny_model("gpt2")),
                reference=str(tiny_model("gpt2", seed=1)),
                sampling=Sampling(max_tokens=6),  # the model has few positions
                iterations=2,
            ),
            Recorder(),
        )
        fit_preferences(module, RANKINGS, RANKINGS, [recorder], precision="bf16-mixed")
        return recorder, stored(module.reference), stored(module.actor)

    (wide, before, actor), (narrow, after, same) = both(train)
    assert_identical(wide, narrow)
    assert before / 2 < after < 0.7 * before
    assert actor == same == before


def test_a_critic_from_the_reward_model_has_its_float32_weights(make_module, fit, tiny_model):
    scorer = str(tiny_model("llama", task="score"))
    frozen = {
        "actor_optimizer": lambda p: torch.optim.SGD(p, lr=0.0),
        "critic_optimizer": lambda p: torch.optim.SGD(p, lr=0.0),
    }
    module = make_module(
        iterations=1, rewards=[RewardModel(scorer)], critic="reward", update=Update(epochs=1), **frozen
    )
    fit(module, precision="bf16-mixed")
    expected = load_reward_model(scorer).state_dict()
    assert all(torch.equal(weight, expected[name]) for name, weight in module.critic.state_dict().items())
    assert module.scores.rewards[0].model.head.weight.dtype == torch.bfloat16
