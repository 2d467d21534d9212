"""The frontier of score and KL: what best-of-n and the tilted policy reach without training, and what recipes reach.

    python benchmarks/frontier.py --stories MODEL [--reviews REVIEWS.jsonl] [--seeds 3] [--jobs 1]
    python benchmarks/frontier.py --table [--plot frontier.png] [--json frontier.json]      # of what was measured

Every variant trains a small story model on the same number of responses; a run has one thread. Score, KL to the start
(the story model before training) in nats per response, length and diversity are measured on held-out prompts during the
run. The tasks:

happy      the reward function `happy_story`
sentiment  a reward model that this script trains on labelled sentences (``text``, and ``label`` 0 or 1, per line); it
           joins them to texts of one sentiment and any length, so that the length says nothing about the sentiment

*KL at equal score* compares a run with `ppo.yaml` of the same seed: the lowest KL at which it reaches the score that
`ppo.yaml` ends with, as a fraction of the KL of `ppo.yaml`.
"""

import argparse
import contextlib
import csv
import io
import itertools
import json
import math
import os
import random
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")
HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import lags  # noqa: E402
import lightning  # noqa: E402
import torch  # noqa: E402
import yaml  # noqa: E402
from frontier_curves import Point, best_of_n, kl_at_score, tilted  # noqa: E402

from lit_rlhf import LeaveOneOut, PolicyGradient, Prompts, RewardFunction, RewardModel, Sampling  # noqa: E402
from lit_rlhf.cli import main as command_line  # noqa: E402

RESPONSES, MAX_TOKENS = 3840, 64
"""Responses in a run, and tokens in a response."""
HELD_OUT, MEASUREMENTS = 576, 4
"""Held-out responses in a measurement, and the number of measurements during a run."""
SAMPLES = 64
"""Responses of the start to each held-out prompt, from which the curves without training are estimated."""
PAIRS, HELD_OUT_PAIRS = 7500, 500
"""Pairs of texts from which the reward model learns, and with which it is tested."""
RATE, CRITIC_RATE = 3e-4, 1e-3
STEPWISE = ("reinforce", "a2c", "rloo")
"""Recipes with one optimizer step in an iteration, which have three times the learning rate."""


class Variant(NamedTuple):
    """A recipe, and the options that differ from it."""

    recipe: str
    options: dict[str, Any]
    decays: bool = False  # whether the actor's learning rate falls to 0 over the run


VARIANTS = {
    **{f"{name}.yaml": Variant(name, {}) for name in ("ppo", "ppo_penalty", "a2c", "reinforce", "reinforce_pp")},
    **{f"{name}.yaml": Variant(name, {}) for name in ("grpo", "dr_grpo", "rloo", "trpo")},
    "ppo, decayed": Variant("ppo", {}, decays=True),
    "ppo, full KL": Variant("ppo", {"model.reference_kl.estimator": "full"}),
    "ppo, full KL, decayed": Variant("ppo", {"model.reference_kl.estimator": "full"}, decays=True),
    "ppo, λ = 1": Variant("ppo", {"model.advantages.lam": 1.0}),
    "ppo, 1 epoch": Variant("ppo", {"model.update.epochs": 1}),
    "ppo, batches of 256": Variant("ppo", {"data.batch_size": 256}),
}


def held_out_prompts() -> list[dict[str, str]]:
    """Return openings of stories to measure with; each occurs often, so that the scores are precise."""
    return lags.fresh_story_prompts() * 4


def train_reward_model(stories: str, reviews: Path, folder: Path, iterations: int | None = None) -> Path:
    """Train a reward model of sentiment on pairs of texts, and return its folder."""
    rng, texts = random.Random(1), {label: list[str]() for label in (0, 1)}
    for line in reviews.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        texts[record["label"]].append(record["text"])

    def text(label: int) -> str:
        words = " ".join(rng.choices(texts[label], k=5)).split()
        return " ".join(words[: rng.randint(5, 50)])

    pairs = [{"chosen": text(1), "rejected": text(0)} for _ in range(PAIRS + HELD_OUT_PAIRS)]
    train, test = folder / "pairs.jsonl", folder / "held_out_pairs.jsonl"
    train.write_text("\n".join(map(json.dumps, pairs[:PAIRS])))
    test.write_text("\n".join(map(json.dumps, pairs[PAIRS:])))
    values = {
        "config": "reward",
        "model.reward": stories,
        "model.optimizer.lr": 1e-3,
        "model.iterations": iterations or "null",
        "data.train": train,
        "data.validation": test,
        "trainer.default_root_dir": folder / "reward",
        "trainer.accelerator": "cpu",
    }
    quietly(["fit", *(f"--{name}={value}" for name, value in values.items())])
    return folder / "reward" / "export"


def quietly(words: list[str]) -> None:
    """Run a command of lit-rlhf without its output; print the output if the command fails."""
    output = io.StringIO()
    try:
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            command_line(words)
    except BaseException:
        print(output.getvalue(), file=sys.stderr)
        raise


def rewards(model: Path | None) -> list[dict[str, Any]]:
    """Return the rewards of a task: a reward model or, without one, the function `happy_story`."""
    if model is None:
        return [{"class_path": "RewardFunction", "init_args": {"function": "lit_rlhf.rewards.examples:happy_story"}}]
    return [{"class_path": "RewardModel", "init_args": {"model": str(model), "normalize": True}}]


class _Scores(lightning.Callback):
    """Collects the scores of held-out responses, [prompts, responses to each]."""

    def __init__(self) -> None:
        self.parts: list[torch.Tensor] = []

    def on_validation_batch_end(self, trainer: Any, module: Any, outputs: Any, *_: Any) -> None:
        """Collect the scores of a batch."""
        self.parts.append(outputs["scores"].view(-1, module.sampling.responses).cpu())


def scores_of_start(stories: str, model: Path | None, samples: int) -> torch.Tensor:
    """Return the scores of several responses of the start to each distinct held-out prompt, [prompts, samples]."""
    torch.set_num_threads(1)
    distinct = list({record["prompt"]: record for record in lags.fresh_story_prompts()}.values())
    reward = RewardFunction("lit_rlhf.rewards.examples:happy_story")
    module = PolicyGradient(
        actor=stories,
        critic=None,
        rewards=[reward if model is None else RewardModel(str(model), normalize=True)],
        sampling=Sampling(max_tokens=MAX_TOKENS, responses=samples),
        advantages=LeaveOneOut(),
    )
    collected = _Scores()
    trainer = lightning.Trainer(
        callbacks=[collected],
        logger=False,
        accelerator="cpu",
        inference_mode=False,
        enable_progress_bar=False,
        enable_checkpointing=False,
    )
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        path = Path(folder, "prompts.jsonl")
        path.write_text("\n".join(map(json.dumps, distinct)))
        trainer.validate(module, Prompts(train=str(path), validation=str(path), batch_size=8), verbose=False)
    return torch.cat(collected.parts)


def options(variant: Variant, model: Path | None, seed: int, responses: int, folder: str, stories: str) -> list[str]:
    """Return the arguments of the command line for a run."""
    text = (HERE.parent / "configs" / f"{variant.recipe}.yaml").read_text(encoding="utf-8")
    config = yaml.safe_load(text)
    batch = variant.options.get("data.batch_size", config["data"]["init_args"]["batch_size"])
    batch_responses = batch * config["model"]["init_args"]["sampling"].get("responses", 1)
    iterations = max(1, responses // batch_responses)
    rate = RATE * (3 if variant.recipe in STEPWISE else 1)
    values: dict[str, Any] = {
        "config": HERE.parent / "configs" / f"{variant.recipe}.yaml",
        "seed_everything": seed,
        "model.actor": stories,
        "model.rewards": json.dumps(rewards(model)),
        "model.sampling.max_tokens": MAX_TOKENS,
        "model.iterations": iterations,
        "data.train": f"{HERE}/lags.py:story_prompts",
        "data.validation": f"{__file__}:held_out_prompts",
        "trainer.val_check_interval": max(1, iterations // MEASUREMENTS),
        "trainer.limit_val_batches": max(1, HELD_OUT // batch_responses),
        "trainer.check_val_every_n_epoch": "null",
        "checkpoint.every_n": 1_000_000,
        "trainer.default_root_dir": folder,
        "trainer.accelerator": "cpu",
        "trainer.enable_progress_bar": "false",
        "report.at_end": "false",
    }
    if variant.recipe != "trpo":
        values["model.actor_optimizer.lr"] = rate
    if variant.decays:
        falling = {"start_factor": 1.0, "end_factor": 0.0, "total_iters": iterations}
        values["model.actor_scheduler"] = json.dumps({"class_path": "LinearLR", "init_args": falling})
    if config["model"]["init_args"].get("critic") is not None:
        values["model.critic_optimizer.lr"] = CRITIC_RATE
    return ["fit", *(f"--{name}={value}" for name, value in (values | variant.options).items())]


def run(task: str, name: str, seed: int, responses: int, model: Path | None, stories: str) -> dict[str, Any]:
    """Train, and return what was measured on held-out prompts along the run."""
    with tempfile.TemporaryDirectory() as folder:
        began = time.process_time()
        quietly(options(VARIANTS[name], model, seed, responses, folder, stories))
        seconds = time.process_time() - began
        with open(Path(folder, "metrics.csv"), encoding="utf-8") as file:
            rows = [row for row in csv.DictReader(file) if row.get("val/score")]
    kept = ("score", "kl_to_ref", "length", "distinct_2", "self_similarity")
    points = [{key: float(row[f"val/{key}"]) for key in kept} for row in rows]
    start = float(rows[0]["val/reference_score"])
    return {"task": task, "variant": name, "seed": seed, "seconds": seconds, "start": start, "points": points}


def measure(arguments: argparse.Namespace) -> None:
    """Measure what the file does not hold yet, and add each result to it."""
    path: Path = arguments.json
    results = read(path)
    with tempfile.TemporaryDirectory() as folder:
        models: dict[str, Path | None] = {}
        if "happy" in arguments.tasks:
            models["happy"] = None
        if "sentiment" in arguments.tasks and arguments.reviews:
            models["sentiment"] = train_reward_model(
                arguments.stories, arguments.reviews, Path(folder), arguments.reward_iterations
            )
        for task, model in models.items():
            if task not in results["start"]:
                results["start"][task] = scores_of_start(arguments.stories, model, arguments.samples).tolist()
                path.write_text(json.dumps(results))
        done = {(r["task"], r["variant"], r["seed"]) for r in results["runs"]}
        settings = itertools.product(range(1, arguments.seeds + 1), models, arguments.variants)
        wanted = [(task, name, seed) for seed, task, name in settings if (task, name, seed) not in done]
        with ProcessPoolExecutor(arguments.jobs) as pool:
            asked = [pool.submit(run, *s, arguments.responses, models[s[0]], arguments.stories) for s in wanted]
            for future in asked:
                results["runs"].append(future.result())
                path.write_text(json.dumps(results))
                print(json.dumps(results["runs"][-1]), file=sys.stderr, flush=True)


def read(path: Path) -> dict[str, Any]:
    """Return the results in a file; empty results if there is no file."""
    return json.loads(path.read_text()) if path.exists() else {"start": {}, "runs": []}


def path_of(result: dict[str, Any]) -> list[Point]:
    """Return the points of a run from the start on."""
    return [Point(0.0, result["start"]), *(Point(p["kl_to_ref"], p["score"]) for p in result["points"])]


def kl_ratio(result: dict[str, Any], rival: dict[str, Any]) -> float:
    """Return the KL at which a run reaches the rival's last score, as a fraction of the rival's last KL."""
    end = path_of(rival)[-1]
    return kl_at_score(path_of(result), end.score) / end.kl


def curve(scores: torch.Tensor) -> list[tuple[str, Point, str]]:
    """Return the points that need no training: of each its name, the point, and the effective samples if any."""
    sizes = [2**i for i in range(int(math.log2(scores.shape[1])) + 1)]
    found = [(f"best of {n}", best_of_n(scores, n), "") for n in sizes]
    for share in (4.0, 2.0, 1.0, 0.5):
        at = tilted(scores, share * float(scores.std(1).mean()))
        found.append((f"tilted, {share:g} standard deviations", Point(at.kl, at.score), f"{at.effective_samples:.1f}"))
    return found


def table(results: dict[str, Any]) -> str:
    """Return the means over the seeds in Markdown."""
    heads = ["task", "policy", "score", "KL", "length", "distinct bigrams", "self-similarity", "CPU s"]
    heads += ["KL at equal score (seeds)", "effective samples"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for task, scores in results["start"].items():
        for name, point, effective in curve(torch.tensor(scores)):
            lines.append(f"| {task} | {name} | {point.score:.3f} | {point.kl:.2f} | | | | | | {effective} |")
        runs = [result for result in results["runs"] if result["task"] == task]
        rivals = {result["seed"]: result for result in runs if result["variant"] == "ppo.yaml"}
        for name in dict.fromkeys(result["variant"] for result in runs):
            found = [result for result in runs if result["variant"] == name]
            last = [result["points"][-1] for result in found]
            cells = [f"{statistics.mean(p[key] for p in last):.{digits}f}" for key, digits in DIGITS.items()]
            cells.append(f"{statistics.mean(result['seconds'] for result in found):.0f}")
            ratios = [kl_ratio(result, rivals[result["seed"]]) for result in found if result["seed"] in rivals]
            reached = [ratio for ratio in ratios if ratio < math.inf]
            mean = f"{statistics.mean(reached):.2f} ({len(reached)} of {len(ratios)})" if reached else "not reached"
            lines.append(f"| {task} | {name} | {' | '.join(cells)} | {mean} | |")
    return "\n".join(lines)


DIGITS = {"score": 3, "kl_to_ref": 2, "length": 1, "distinct_2": 3, "self_similarity": 3}


def plot(results: dict[str, Any], path: Path) -> None:
    """Draw the scores against √KL, one panel for each task: best-of-n as a line, and the runs from the start on."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    tasks = list(results["start"])
    figure, axes = pyplot.subplots(1, len(tasks), figsize=(5.5 * len(tasks), 4), squeeze=False, layout="constrained")
    for axis, task in zip(axes[0], tasks, strict=True):
        best = [point for name, point, _ in curve(torch.tensor(results["start"][task])) if name.startswith("best")]
        axis.plot([p.kl**0.5 for p in best], [p.score for p in best], "k.-", label="best of n of the start")
        runs = [result for result in results["runs"] if result["task"] == task]
        for number, name in enumerate(dict.fromkeys(result["variant"] for result in runs)):
            for result in (result for result in runs if result["variant"] == name):
                points, label = path_of(result), name if result["seed"] == 1 else None
                roots = [max(point.kl, 0.0) ** 0.5 for point in points]
                axis.plot(roots, [point.score for point in points], color=f"C{number % 10}", alpha=0.6, label=label)
        axis.set(title=task, xlabel="√KL to the start, √nats per response")
    axes[0][0].set_ylabel("score on held-out prompts")
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside right center", fontsize=8)
    figure.savefig(path, dpi=150)


def main(words: list[str] | None = None) -> None:
    """Measure, and print the table of all that was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stories", help="the folder of a small language model of stories")
    parser.add_argument("--reviews", type=Path, help="labelled sentences, for the task sentiment")
    parser.add_argument("--tasks", nargs="*", default=["happy", "sentiment"])
    parser.add_argument("--variants", nargs="*", choices=tuple(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--responses", type=int, default=RESPONSES, help="the number of responses in a run")
    parser.add_argument("--samples", type=int, default=SAMPLES, help="responses of the start to each prompt")
    parser.add_argument("--reward-iterations", type=int, help="the training of the reward model; default: one epoch")
    parser.add_argument("--table", action="store_true", help="only print the table")
    parser.add_argument("--plot", type=Path, help="also draw the frontier to this file; needs matplotlib")
    parser.add_argument("--json", type=Path, default=Path("frontier.json"))
    arguments = parser.parse_args(words)
    if not arguments.table:
        measure(arguments)
    results = read(arguments.json)
    print(table(results))
    if arguments.plot:
        plot(results, arguments.plot)


if __name__ == "__main__":
    main()
