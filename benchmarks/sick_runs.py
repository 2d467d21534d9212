"""A healthy run and seven sick ones, each really trained: the pictures and the numbers of docs/metrics.md.

    pip install -e ".[benchmarks]" && python benchmarks/sick_runs.py     # four minutes on one core

The actor is the tiny random Llama of `lit_rlhf.testing`, which knows 32 words and writes at most 16 of them. The goal
is to say as many different words of w0 … w7 as possible (`variety`). Each sick run differs from the healthy one only in
the options that are given here.
"""

import argparse
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch

from lit_rlhf import Engine, FixedKL, Guard, NativeEngine, Prompts, Sampling, Update, UserError
from lit_rlhf.models.actor import Actor
from lit_rlhf.testing import tiny_ppo
from lit_rlhf.testing.runs import as_reward, train

IMAGES = Path(__file__).resolve().parent.parent / "docs" / "images"
ITERATIONS = 80
WORDS = [f"w{i}" for i in range(8)]
Row = dict[str, float]


def variety(responses: list[str]) -> list[float]:
    """Return the share of the words w0 … w7 that occur in each response: what the runs should maximise."""
    return [len(set(response.split()) & set(WORDS)) / 8 for response in responses]


def count(responses: list[str]) -> list[float]:
    """Return the number of words of each response that are among w0 … w7, divided by 8: repetitions pay."""
    return [sum(word in WORDS for word in response.split()) / 8 for response in responses]


def constant(responses: list[str]) -> list[float]:
    """Return the same score for every response, as a reward whose pattern never matches does."""
    return [0.0 for _ in responses]


class Stale(Engine):
    """An engine that never gets new weights: it draws with those of the first iteration, as a broken server would."""

    def __init__(self) -> None:
        self.weights: dict[str, torch.Tensor] = {}

    def generate(self, actor: Actor, *inputs: Any, **options: Any) -> Any:
        """Return a rollout that is drawn with the first weights."""
        current = {name: value.clone() for name, value in actor.state_dict().items()}
        self.weights = self.weights or current
        actor.load_state_dict(self.weights)
        rollout = NativeEngine().generate(actor, *inputs, **options)
        actor.load_state_dict(current)
        return rollout


def adam(rate: float) -> Callable[..., torch.optim.Optimizer]:
    """Return the optimizer at a learning rate."""
    return partial(torch.optim.AdamW, lr=rate, weight_decay=0.0, eps=1e-5)


def measured(reward: Callable[..., list[float]]) -> list[Any]:
    """Return a reward, and `variety` as a second reward of weight 0, which is only measured."""
    true = as_reward(variety)
    true.weight = 0.0
    return [as_reward(reward), true]


HEALTHY: dict[str, Any] = {
    "rewards": [variety],
    "sampling": Sampling(max_tokens=16, responses=2),
    "kl": FixedKL(coef=0.02),
    "update": Update(epochs=2, minibatches=2, max_tokens=2048),
    "actor_optimizer": adam(1e-3),
    "critic_optimizer": adam(3e-3),
}
PROMPTS = {"train": "lit_rlhf.testing.data:prompts", "batch_size": 16}


@dataclass(frozen=True)
class Case:
    """A sick run: what differs from the healthy one, and the metrics that show it."""

    options: dict[str, Any]
    shown: tuple[str, str, str]


CASES = {
    "kl_runaway": Case(
        {"actor_optimizer": adam(3e-2)}, ("objective/score", "objective/kl_to_ref", "policy/clip_fraction")
    ),
    "reward_hacking": Case(
        {"rewards": measured(count), "kl": FixedKL(coef=0.0), "actor_optimizer": adam(5e-3)},
        ("objective/score", "rewards/variety", "response/length"),
    ),
    "entropy_collapse": Case(
        {"kl": FixedKL(coef=0.0), "actor_optimizer": adam(2e-2)},
        ("objective/score", "objective/entropy", "policy/kl_to_old"),
    ),
    "blind_critic": Case(
        {"critic_optimizer": adam(1e-6)}, ("objective/score", "value/explained_variance", "value/loss")
    ),
    "strong_kl": Case({"kl": FixedKL(coef=1.0)}, ("objective/score", "objective/kl_to_ref", "objective/reward")),
    "stale_engine": Case(
        {"engine": Stale(), "guard": Guard(bound=100.0)},
        ("objective/score", "engine/mismatch_mean", "objective/kl_to_ref"),
    ),
    "dead_reward": Case(
        {"rewards": measured(constant)}, ("objective/score", "objective/advantage_std", "objective/kl_to_ref")
    ),
}


def run(options: dict[str, Any], iterations: int) -> list[Row]:
    """Train, and return the metrics of each iteration."""
    with tempfile.TemporaryDirectory() as folder:
        module = tiny_ppo(**HEALTHY | options, iterations=iterations)
        return train(module, Prompts(**PROMPTS), folder=folder, seed=1).metrics


def draw(name: str, shown: tuple[str, ...], runs: dict[str, list[Row]], folder: Path) -> None:
    """Draw one panel for each metric, with a curve for each run."""
    figure, panels = plt.subplots(1, len(shown), figsize=(8, 2.1), layout="constrained")
    for panel, metric in zip(panels, shown, strict=True):
        for (label, rows), color in zip(runs.items(), ("#0072B2", "#D55E00"), strict=False):
            points = [(i + 1, row[metric]) for i, row in enumerate(rows) if metric in row]
            if metric == "rewards/variety" and not points:
                points = [(i + 1, row["objective/score"]) for i, row in enumerate(rows)]
            panel.plot(*zip(*points, strict=True), color=color, label=label, linewidth=1.4)
        panel.set_title(metric, fontsize=9)
        panel.set_xlabel("iteration", fontsize=8)
        panel.tick_params(labelsize=8)
        panel.grid(color="0.92")
        panel.spines[["top", "right"]].set_visible(False)
    if len(runs) > 1:
        panels[0].legend(frameon=False, fontsize=8)
    figure.savefig(folder / f"{name}.png", dpi=90)
    plt.close(figure)


def table(name: str, rows: list[Row], shown: tuple[str, ...]) -> str:
    """Return, as text, the first value of each metric, its mean over the last ten iterations, and its extremes."""
    cells = []
    for metric in shown:
        values = [row[metric] for row in rows if metric in row]
        if values:
            mean = sum(values[-10:]) / len(values[-10:])
            cells.append(f"{metric} {values[0]:.3g} → {mean:.3g} (max {max(values):.3g}, min {min(values):.3g})")
    return f"{name}: " + "; ".join(cells)


def guarded() -> str:
    """Return what the guard says of the stale engine, with the guard's default bound."""
    try:
        run({"engine": Stale()}, 5)
    except UserError as error:
        return str(error)
    return "nothing"


def main(iterations: int, folder: Path, names: list[str]) -> None:
    """Train all runs, draw the pictures, and print the numbers of the page."""
    healthy = run({}, iterations)
    shown = ("objective/score", "objective/kl_to_ref", "objective/entropy", "value/explained_variance")
    draw("healthy", shown, {"healthy": healthy}, folder)
    every = sorted({metric for case in CASES.values() for metric in case.shown} | set(shown))
    print(table("healthy", healthy, tuple(every)), flush=True)
    for name in names:
        rows = run(CASES[name].options, iterations)
        draw(name, CASES[name].shown, {"healthy": healthy, name.replace("_", " "): rows}, folder)
        print(table(name, rows, tuple(every)), flush=True)
    print("guard:", guarded())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--iterations", type=int, default=ITERATIONS)
    parser.add_argument("--folder", type=Path, default=IMAGES)
    parser.add_argument("--only", nargs="*", default=list(CASES))
    arguments = parser.parse_args()
    main(arguments.iterations, arguments.folder, arguments.only)
