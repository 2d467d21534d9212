"""Short runs for tests: a tiny PPO, tiny data for any module, and a quiet Trainer."""

from __future__ import annotations

import functools
import logging
import os
import tempfile
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.utilities.seed import isolate_rng

from lit_rlhf.algorithms.kl import FixedKL
from lit_rlhf.data import Demonstrations, Preferences, Prompts
from lit_rlhf.generation import Sampling
from lit_rlhf.modules import SFT, PolicyGradient, Update
from lit_rlhf.modules.module import AlignmentModule
from lit_rlhf.modules.on_policy import OnPolicy
from lit_rlhf.rewards import Reward, RewardFunction
from lit_rlhf.testing.models import make_tiny_model
from lit_rlhf.testing.recorder import Recorder

RewardOrFunction = Reward | Callable[..., Sequence[float]]


def tiny_ppo(
    rewards: Sequence[RewardOrFunction] | None = None, *, words: Sequence[str] = (), **options: Any
) -> PolicyGradient:
    """Return a PPO module whose actor is a tiny Llama with random weights.

    It trains for 10 iterations, with two responses of at most 8 tokens to each prompt. A run takes seconds on a CPU. No
    KL to the reference enters the reward.

    Args:
        rewards: Rewards, or functions as `RewardFunction` calls them; None for the share of the words w0 … w7.
        words: Words that the model can say besides w0 … w31; each is one token.
        options: Options of `PolicyGradient`, in place of the defaults of this function.

    Raises:
        TypeError: if one of the rewards is neither a reward nor a function.

    >>> tiny_ppo([lambda responses: [float("yes" in response) for response in responses]], words=["yes"]).iterations
    10
    """
    defaults: dict[str, Any] = {
        "actor": str(_tiny_model(tuple(words))),
        "sampling": Sampling(max_tokens=8, responses=2),
        "kl": FixedKL(coef=0.0),
        "update": Update(epochs=1, minibatches=2, max_tokens=1024),
        "actor_optimizer": _adam,
        "critic_optimizer": _adam,
        "iterations": 10,
    }
    made = [as_reward(reward) for reward in (rewards or [low_words])]
    return PolicyGradient(**defaults | options, rewards=made)


def _adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.0, eps=1e-5)


def low_words(responses: Sequence[str]) -> list[float]:
    """Return the share of the words w0 … w7 in each response, a reward that is learned quickly.

    >>> low_words(["w3 w12", ""])
    [0.5, 0.0]
    """
    low = {f"w{i}" for i in range(8)}
    return [sum(word in low for word in r.split()) / max(1, len(r.split())) for r in responses]


def as_reward(reward: RewardOrFunction) -> Reward:
    """Return a reward unchanged, or a `RewardFunction` that calls a function, which need not be importable.

    Raises:
        TypeError: if ``reward`` is neither a reward nor a function.
    """
    if isinstance(reward, Reward):
        return reward
    if not callable(reward):
        raise TypeError(f"rewards: {reward!r} is neither a Reward nor a function of responses")
    return RewardFunction(reward)


@functools.cache
def _tiny_model(words: tuple[str, ...]) -> Path:
    """Write the tiny Llama with these words, once per process, to a folder that is removed when the process ends."""
    folder = tempfile.TemporaryDirectory(prefix="lit-rlhf-tiny-")
    weakref.finalize(_tiny_model, folder.cleanup)
    return make_tiny_model(Path(folder.name), words=words)


def tiny_data(module: AlignmentModule) -> lightning.LightningDataModule:
    """Return tiny data of the kind that a module trains on, with 16 records in a batch."""
    source = "lit_rlhf.testing.data"
    if isinstance(module, OnPolicy):
        return Prompts(train=f"{source}:prompts", validation=f"{source}:prompts", batch_size=16)
    if isinstance(module, SFT):
        return Demonstrations(train=f"{source}:demonstrations", batch_size=16)
    return Preferences(train=f"{source}:preferences", batch_size=16)


def train(
    module: lightning.LightningModule,
    data: lightning.LightningDataModule,
    callbacks: Sequence[lightning.Callback] = (),
    *,
    folder: Path | str,
    ckpt_path: str | None = None,
    seed: int = 0,
    **options: Any,
) -> Recorder:
    """Train on a CPU without a progress bar, a logger or validation, and return the `Recorder` of the run.

    Args:
        module: The module.
        data: The data module.
        callbacks: The callbacks; checkpoints are saved only if one of the callbacks saves them.
        folder: The folder of the run.
        ckpt_path: A checkpoint to resume from.
        seed: The seed of the run; the caller's environment and random states, except CUDA's, are restored afterwards.
        options: Options of the Trainer, in place of the defaults of this function.
    """
    recorder = Recorder()
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": -1,
        "limit_val_batches": 0,
        "logger": False,
        "enable_checkpointing": any(isinstance(c, lightning.pytorch.callbacks.Checkpoint) for c in callbacks),
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "use_distributed_sampler": False,
        "inference_mode": False,
        "log_every_n_steps": 1,
        "default_root_dir": folder,
    }
    with _quiet(), _seeded(seed):
        trainer = lightning.Trainer(callbacks=[*callbacks, recorder], **defaults | options)
        trainer.fit(module, datamodule=data, ckpt_path=ckpt_path)
    return recorder


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide Lightning's messages about the hardware and checkpoints inside this context."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed all random generators for this context; at its end, restore the environment and all states but CUDA's."""
    environment = dict(os.environ)
    with isolate_rng(include_cuda=False):
        lightning.seed_everything(seed, verbose=False)
        try:
            yield
        finally:
            for name in os.environ.keys() - environment.keys():
                del os.environ[name]
            os.environ.update(environment)
