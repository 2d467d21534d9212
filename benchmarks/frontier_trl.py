"""Policies that TRL's trainers train on the tasks of frontier.py, measured as lit-rlhf's own runs are."""

import contextlib
import io
import json
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import lightning
import torch
from frontier_tasks import HERE, Task

from lit_rlhf import MonteCarlo, PolicyGradient, Prompts, Sampling
from lit_rlhf.references import load_reference

MEASURED = ("score", "kl_to_ref", "length", "distinct_2", "self_similarity")
"""The metrics of responses to held-out prompts; ``kl_to_ref`` in nats per response, ``length`` in tokens."""


class TRL(NamedTuple):
    """A trainer of TRL with its options; those that are not here are TRL's defaults."""

    method: str  # ppo, grpo or rloo
    kl_coef: float
    batch: int  # responses in an iteration
    group: int  # responses to a prompt
    epochs: int
    minibatches: int
    rate_factor: float = 1.0  # the learning rate divided by the task's


TRAINERS = {
    "TRL PPO, kl 0.05": TRL("ppo", kl_coef=0.05, batch=64, group=1, epochs=4, minibatches=1),
    "TRL PPO, kl 0.2": TRL("ppo", kl_coef=0.2, batch=64, group=1, epochs=4, minibatches=1),
    "TRL GRPO": TRL("grpo", kl_coef=0.02, batch=128, group=8, epochs=2, minibatches=4),
    "TRL RLOO": TRL("rloo", kl_coef=0.02, batch=128, group=4, epochs=1, minibatches=1, rate_factor=3.0),
}
"""Batches, groups, epochs, minibatches, KL coefficients and rates of GRPO and RLOO are those of the recipes."""


def run(task: Task, name: str, seed: int, responses: int, saves: int, held_out: int, python: Path) -> dict[str, Any]:
    """Train with TRL, and return what was measured of the saved policies.

    Args:
        task: The task.
        name: The name of the trainer in `TRAINERS`.
        seed: The seed of TRL's run.
        responses: The number of responses in the run.
        saves: The number of policies that are saved along the run and measured.
        held_out: The number of held-out responses in a measurement.
        python: The Python of TRL's environment.
    """
    with tempfile.TemporaryDirectory() as folder:
        prompts, log = Path(folder, "prompts.jsonl"), Path(folder, "log.txt")
        prompts.write_text("\n".join(json.dumps(record) for record in load_reference(task.prompts, "prompts")()))
        words = options(task, TRAINERS[name], seed, responses, saves, prompts, Path(folder, "run"))
        with log.open("w") as output:
            done = subprocess.run([python, f"{HERE}/trl_train.py", *words], stdout=output, stderr=subprocess.STDOUT)
        if done.returncode:
            raise RuntimeError(f"TRL failed; the end of its output:\n{log.read_text()[-3000:]}")
        return measured(task, Path(folder, "run"), held_out)


def options(task: Task, trainer: TRL, seed: int, responses: int, saves: int, prompts: Path, output: Path) -> list[str]:
    """Return the arguments of trl_train.py."""
    values: dict[str, Any] = {
        "model": task.start,
        "prompts": prompts,
        "output": output,
        "seed": seed,
        "responses": responses,
        "batch": trainer.batch,
        "group": trainer.group,
        "epochs": trainer.epochs,
        "minibatches": trainer.minibatches,
        "max-tokens": task.max_tokens,
        "kl-coef": trainer.kl_coef,
        "rate": task.rate * trainer.rate_factor,
        "saves": saves,
    }
    values |= {"reward": task.reward_model} if task.reward_model else {"function": task.function}
    values |= {"truncation-penalty": task.truncation_penalty} if task.truncation_penalty else {}
    return [trainer.method, *(f"--{name}={value}" for name, value in values.items())]


def measured(task: Task, output: Path, held_out: int) -> dict[str, Any]:
    """Return the measurements of the policies that trl_train.py saved, with the CPU seconds and scores in its log."""
    log = json.loads((output / "log.json").read_text())
    saved = sorted((path for path in output.iterdir() if path.is_dir()), key=lambda path: int(path.name))
    found = [measure_policy(task, str(path), held_out) for path in saved]
    return {
        "seconds": log["seconds"],
        "start": found[-1]["reference_score"],
        "scores": log["scores"],
        "points": [{key: point[key] for key in MEASURED} for point in found],
    }


def measure_policy(task: Task, policy: str, held_out: int, batch_size: int = 64) -> dict[str, float]:
    """Return the ``val/`` metrics of a policy, measured as in a run from the task's start with one response per prompt.

    Args:
        task: The task.
        policy: The folder of the policy.
        held_out: The number of held-out responses.
        batch_size: The number of prompts in a batch, on which the random numbers of the samples depend.
    """
    torch.set_num_threads(1)
    module = PolicyGradient(
        actor=policy,
        reference=task.start,
        critic=None,
        rewards=[task.reward()],
        sampling=Sampling(max_tokens=task.max_tokens),
        advantages=MonteCarlo(),
    )
    data = Prompts(train=task.prompts, validation=task.held_out, batch_size=batch_size)
    trainer = validator(limit_val_batches=max(1, held_out // batch_size))
    with contextlib.redirect_stdout(io.StringIO()):
        (means,) = trainer.validate(module, data, verbose=False)
    return {name.removeprefix("val/"): value for name, value in means.items() if name.startswith("val/")}


def validator(**settings: Any) -> lightning.Trainer:
    """Return a Trainer that only measures."""
    return lightning.Trainer(
        logger=False,
        accelerator="cpu",
        inference_mode=False,
        enable_progress_bar=False,
        enable_checkpointing=False,
        **settings,
    )
