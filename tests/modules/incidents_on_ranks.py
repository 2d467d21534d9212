"""Fit on processes of which one has numbers that are not finite; each process writes the lines of its errors.

python -m torch.distributed.run --nproc-per-node 2 tests/modules/incidents_on_ranks.py STRATEGY ACTOR PROMPTS OUT
"""

import json
import os
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

import lightning
import torch
from torch.distributed.tensor import DTensor

from lit_rlhf import (
    DPO,
    FSDP,
    SFT,
    Clip,
    PolicyGradient,
    Prompts,
    Reward,
    RewardFunction,
    Sampling,
    Update,
    UserError,
)
from lit_rlhf.testing.runs import tiny_data

warnings.filterwarnings("ignore")
RANK, NAN = int(os.environ.get("RANK", "0")), float("nan")


class OnRankOne(Reward):
    """Returns NaN for the third response of process 1."""

    def forward(self, reward_inputs):
        scores = torch.zeros(len(reward_inputs.responses))
        if RANK == 1:
            scores[2] = NAN
        return scores


@dataclass(frozen=True)
class LossOnRankOne(Clip):
    """The clipped objective, with a loss on process 1 that is NaN, and that has no gradient."""

    def __call__(self, **inputs):
        result = super().__call__(**inputs)
        return result._replace(loss=result.loss.detach() * NAN + result.loss * 0) if RANK == 1 else result


class Poison(lightning.Callback):
    """Makes the local part of a weight, or of its gradient, NaN on process 1."""

    def __init__(self, kind):
        self.kind = kind

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if RANK != 1 and isinstance(self.weight(pl_module), DTensor):
            return
        weight = self.weight(pl_module)
        if self.kind == "gradient":
            weight.register_hook(lambda gradient: gradient * NAN)
        else:
            with torch.no_grad():
                (weight.to_local() if isinstance(weight, DTensor) else weight)[:] = NAN

    def weight(self, module):
        return module.actor.model.model.norm.weight


def fit(strategy, module, data, callbacks, folder):
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=2,
        strategy=FSDP() if strategy == "fsdp" else strategy,
        max_epochs=-1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        inference_mode=False,
        default_root_dir=folder,
        callbacks=callbacks,
    )
    trainer.fit(module, datamodule=data)


def main(strategy, actor, prompts, out):
    lightning.seed_everything(7, verbose=False)
    torch.set_num_threads(1)
    options = {"actor": actor, "iterations": 1, "critic": None, "sampling": Sampling(max_tokens=4)}
    options |= {"update": Update(epochs=1, minibatches=1, max_tokens=64)}
    low = options | {"rewards": [RewardFunction("lit_rlhf.testing.runs:low_words")]}
    data, weight = Prompts(train=prompts, batch_size=8), [Poison("weight")]
    cases = {
        "reward": (PolicyGradient(**options, rewards=[OnRankOne()]), data, []),
        "loss": (PolicyGradient(**low, objective=LossOnRankOne()), data, []),
        "weight": (PolicyGradient(**low), data, weight),
        "sft": (SFT(actor, iterations=1), tiny_data(SFT(actor)), weight),
        "dpo": (DPO(actor, iterations=1), tiny_data(DPO(actor)), weight),
    }
    if strategy == "ddp":
        cases["gradient"] = PolicyGradient(**low), data, [Poison("gradient")]
    lines = {}
    for name, case in cases.items():
        try:
            fit(strategy, *case, Path(out, name))
        except UserError as error:
            lines[name] = str(error)
    Path(out, f"lines-{RANK}.json").write_text(json.dumps(lines))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
