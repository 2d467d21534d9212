"""Precisions that are refused."""

import pytest
from lightning.pytorch.plugins import MixedPrecision

from lit_rlhf.errors import UserError
from lit_rlhf.modules import DPO, SFT, TRPO, PolicyGradient, RewardModeling
from lit_rlhf.rewards import RewardFunction
from lit_rlhf.strategies import FSDP

MODULES = {
    "policy gradient": lambda actor: PolicyGradient(actor=actor, rewards=[RewardFunction("math:sqrt")]),
    "trpo": lambda actor: TRPO(actor=actor, rewards=[RewardFunction("math:sqrt")]),
    "sft": lambda actor: SFT(actor=actor),
    "reward": lambda actor: RewardModeling(reward=actor),
    "dpo": lambda actor: DPO(actor=actor),
}


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
