import atexit
import os
import shutil
import tempfile

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if "HF_DATASETS_CACHE" not in os.environ:  # not the user's cache; processes started by tests share this one
    os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp(prefix="lit-rlhf-tests-")
    atexit.register(shutil.rmtree, os.environ["HF_DATASETS_CACHE"], ignore_errors=True)


import functools
import json
import logging
import sys
from pathlib import Path

import lightning
import pytest
import torch

from lit_rlhf.data import Preferences, Prompts
from lit_rlhf.generation import Sampling
from lit_rlhf.models.actor import new_value_head
from lit_rlhf.models.adapted import load_adapted
from lit_rlhf.models.adapters import LoRA, adapter_parameters
from lit_rlhf.models.loading import load_tokenizer
from lit_rlhf.models.trained_adapter import TrainedAdapter
from lit_rlhf.modules import PolicyGradient, Update
from lit_rlhf.rewards import RewardFunction

sys.path.append(str(Path(__file__).parent))  # for the tests that import `preloaded`, and for its processes
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
torch.set_num_threads(1)


LEFT_BEHIND = ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "LOCAL_RANK", "WORLD_SIZE")
"""Environment variables that Lightning's strategies set; processes that a later test starts would inherit them."""


LONGEST = ("test_faults", "test_many_processes", "test_ranks", "test_pages", "test_hostile_input")


def pytest_collection_modifyitems(items):
    """Begin with the files that take longest, so that the workers end at about the same time."""
    items.sort(key=lambda item: item.path.stem not in LONGEST)


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """Set the seed that `lit_rlhf.randomness` reads, and remove what earlier tests left in the environment."""
    monkeypatch.setenv("PL_GLOBAL_SEED", "7")
    for name in LEFT_BEHIND:
        os.environ.pop(name, None)


@pytest.fixture(scope="session")
def prompt_file(tiny_prompts) -> Path:
    """Return a file of 48 prompts of one to six words."""
    return tiny_prompts


@pytest.fixture(scope="session")
def tiny_adapter(tiny_model, tmp_path_factory):
    """Return a function that lets peft write an adapter of a tiny model, with random weights and without tokenizer.

    Args of the function: the architecture, the task (causal or score), the seed, and options of peft's LoraConfig.
    """
    made = {}

    def make(architecture="llama", task="causal", seed=0, scale=None, base=None, **options) -> Path:
        key = (architecture, task, seed, scale, base, str(options))
        if key not in made:
            from peft import LoraConfig, get_peft_model
            from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

            auto, kind = {
                "causal": (AutoModelForCausalLM, "CAUSAL_LM"),
                "score": (AutoModelForSequenceClassification, "SEQ_CLS"),
            }[task]
            labels = {"num_labels": 1} if task == "score" else {}
            made[key] = tmp_path_factory.mktemp(f"adapter_{task}")
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                model = auto.from_pretrained(base or tiny_model(architecture), **labels)
                common = {"r": 3, "lora_alpha": 4, "target_modules": "all-linear", "init_lora_weights": False}
                get_peft_model(model, LoraConfig(task_type=kind, **common | options)).save_pretrained(made[key])
            if scale is not None:
                model.config.score_mean, model.config.score_std = scale
                model.config.save_pretrained(made[key])
        return made[key]

    return make


@pytest.fixture(scope="session")
def exported_adapter(tiny_model, tmp_path_factory):
    """Return a function that writes an adapter of the tiny Llama with random weights, as a run exports one.

    The adapter is that of a language model or, with a head for scores, that of a reward model.
    """

    @functools.cache
    def make(is_reward: bool = False) -> Path:
        base, lora, name = str(tiny_model("llama")), LoRA(rank=2), "reward" if is_reward else "actor"
        generator = torch.Generator().manual_seed(3 + is_reward)
        model, head = load_adapted(base, lora, "base", trained=[name]), None
        shapes = {key: parameter.shape for key, parameter in adapter_parameters(model, name).items()}
        weights = {key: 0.1 * torch.randn(shape, generator=generator) for key, shape in shapes.items()}
        if is_reward:
            head = new_value_head(model, bias=False)
            head.weight.data.normal_(generator=generator)
        folder = tmp_path_factory.mktemp(name)
        adapter = TrainedAdapter(source=base, lora=lora, name=name, weights=weights, head=head)
        adapter.save(load_tokenizer(base), folder, card="")
        return folder

    return make


@pytest.fixture
def make_module(tiny_model):
    """Return a function that makes a PolicyGradient on a tiny Llama; its reward is the share of low words."""

    def make(**options) -> PolicyGradient:
        defaults = {
            "actor": str(tiny_model("llama")),
            "rewards": [RewardFunction("lit_rlhf.testing.runs:low_words")],
            "sampling": Sampling(max_tokens=12),
            "update": Update(epochs=2, minibatches=2, max_tokens=64),
            "actor_optimizer": lambda p: torch.optim.AdamW(p, lr=1e-3),
            "critic_optimizer": lambda p: torch.optim.AdamW(p, lr=1e-3),
        }
        return PolicyGradient(**(defaults | options))

    return make


@pytest.fixture(scope="module")
def without_plans():
    """Let the command's runs in a file begin without a plan."""
    import preloaded

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(preloaded.WITHOUT_PLANS, "yes")
        preloaded.leave_out_plans(patch.setattr)
        yield


@pytest.fixture
def make_trainer(tmp_path):
    """Return a function that makes a quiet one-epoch CPU Trainer; it saves checkpoints only if a callback does."""

    def make(callbacks=(), **options) -> lightning.Trainer:
        defaults = {
            "default_root_dir": tmp_path,
            "accelerator": "cpu",
            "max_epochs": 1,
            "logger": False,
            "enable_checkpointing": any(isinstance(c, lightning.pytorch.callbacks.Checkpoint) for c in callbacks),
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "num_sanity_val_steps": 0,
            "use_distributed_sampler": False,
            "log_every_n_steps": 1,
        }
        return lightning.Trainer(callbacks=list(callbacks), **(defaults | options))

    return make


@pytest.fixture
def one_process():
    """Destroy the process group that Lightning leaves behind."""
    yield
    torch.distributed.destroy_process_group()


@pytest.fixture
def fit(prompt_file, make_trainer):
    """Return a function that runs a real `Trainer.fit` and returns the trainer."""

    def run(module, callbacks=(), *, batch_size=8, validation=False, ckpt_path=None, **options) -> lightning.Trainer:
        data = Prompts(
            train=str(prompt_file), validation=str(prompt_file) if validation else None, batch_size=batch_size
        )
        trainer = make_trainer(callbacks, **options)
        trainer.fit(module, datamodule=data, ckpt_path=ckpt_path)
        return trainer

    return run


@pytest.fixture
def fit_preferences(make_trainer, tmp_path):
    """Return a function that runs a real fit (or another Trainer method) on these records and returns the trainer."""

    def run(
        module, train, validation=None, callbacks=(), *, ckpt_path=None, method="fit", data=None, **options
    ) -> lightning.Trainer:
        files = {}
        for split, records in {"train": train, "validation": validation}.items():
            if records is not None:
                files[split] = str(tmp_path / f"{split}.jsonl")
                (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
        trainer = make_trainer(callbacks, **options)
        made = Preferences(**files, **({"batch_size": 8} | (data or {})))
        getattr(trainer, method)(module, datamodule=made, ckpt_path=ckpt_path)
        return trainer

    return run
