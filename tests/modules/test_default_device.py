"""Lightning makes its device the default one in `configure_model`: models are loaded on the CPU, and moved later."""

from contextlib import contextmanager

import pytest
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy
from transformers import AutoModelForSequenceClassification

from lit_rlhf.data import Demonstrations, Preferences, Prompts
from lit_rlhf.models.actor import Actor
from lit_rlhf.models.adapters import LoRA
from lit_rlhf.models.loading import RandomWeights, load_model
from lit_rlhf.models.scoring import load_critic, load_reward_model
from lit_rlhf.modules import DPO, SFT, TRPO, PolicyGradient, RewardModeling, Update
from lit_rlhf.rewards import Reward, RewardModel

CONFIG = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
          "num_attention_heads": 4}  # fmt: skip
GPU = torch.device("cuda")
"""As the default device, it makes every tensor that is created without a device an error where there is no GPU."""


class InitsOnGPU(SingleDeviceStrategy):
    """Trains on the CPU, and gives `configure_model` the default device that it has on a GPU."""

    @contextmanager
    def tensor_init_context(self, empty_init=None):
        with GPU:
            yield


class OwnModel(Reward):
    """A user's reward, which loads a model of transformers as its documentation says."""

    def __init__(self, folder):
        super().__init__()
        self.folder = folder

    def prepare(self, tokenizer):
        self.model = AutoModelForSequenceClassification.from_pretrained(self.folder)

    def forward(self, reward_inputs):
        return self.model(reward_inputs.rollout.tokens[:, :1]).logits[:, 0]


def on_cpu(module):
    return {x.device.type for x in (*module.parameters(), *module.buffers())} == {"cpu"}


@pytest.fixture
def folders(tiny_model):
    return str(tiny_model("llama")), str(tiny_model("llama", task="score"))


@pytest.mark.parametrize("case", ["actor", "shared critic", "new critic", "critic with a bias", "reward model"])
def test_models_are_loaded_on_the_cpu(folders, tmp_path, case):
    folder, scorer = folders
    classifier = load_model(scorer, "score")
    classifier.config.value_bias = 0.5
    classifier.save_pretrained(tmp_path)
    with GPU:
        model = {
            "actor": lambda: Actor(load_model(folder)),
            "shared critic": lambda: Actor(load_model(folder), shared_critic=True),
            "new critic": lambda: load_critic(folder),
            "critic with a bias": lambda: load_critic(str(tmp_path)),
            "reward model": lambda: load_reward_model(scorer),
        }[case]()
    assert on_cpu(model)


def test_random_weights_are_the_same_whatever_the_default_device(folders):
    source = RandomWeights(CONFIG, folders[0], seed=3)
    with GPU:
        weights = load_model(source).state_dict()
    torch.testing.assert_close(weights, load_model(source).state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize(
    "case", ["actor", "shared", "reward", "random", "trpo", "sft", "dpo", "reward modelling", "adapters"]
)
def test_a_fit_whose_default_device_is_another(folders, prompt_file, make_trainer, tmp_path, case):
    folder, scorer = folders
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "w1 w2", "chosen": " w3", "rejected": " w4 w5"}\n' * 8)
    (tmp_path / "texts.jsonl").write_text('{"text": "w1 w2 w3"}\n' * 8)
    online = {"actor": folder, "rewards": [RewardModel(scorer), OwnModel(scorer)], "iterations": 1}
    online["update"], random = Update(epochs=1, minibatches=1), RandomWeights(CONFIG, folder)
    module, data = {
        "actor": lambda: (PolicyGradient(**online), Prompts(str(prompt_file), batch_size=8)),
        "shared": lambda: (PolicyGradient(**online, critic="shared"), Prompts(str(prompt_file), batch_size=8)),
        "reward": lambda: (PolicyGradient(**online, critic="reward"), Prompts(str(prompt_file), batch_size=8)),
        "random": lambda: (PolicyGradient(**online | {"actor": random}), Prompts(str(prompt_file), batch_size=8)),
        "adapters": lambda: (
            PolicyGradient(**online, critic="shared", adapter=LoRA(rank=2)),
            Prompts(str(prompt_file), batch_size=8),
        ),
        "trpo": lambda: (TRPO(**online), Prompts(str(prompt_file), batch_size=8)),
        "sft": lambda: (SFT(folder, iterations=1), Demonstrations(str(tmp_path / "texts.jsonl"), batch_size=8)),
        "dpo": lambda: (DPO(folder, iterations=1), Preferences(str(tmp_path / "pairs.jsonl"), batch_size=8)),
        "reward modelling": lambda: (
            RewardModeling(folder, iterations=1),
            Preferences(str(tmp_path / "pairs.jsonl"), batch_size=8),
        ),
    }[case]()
    make_trainer(strategy=InitsOnGPU(device="cpu"), max_epochs=-1).fit(module, datamodule=data)
    assert int(module.iteration) == 1
