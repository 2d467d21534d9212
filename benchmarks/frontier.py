"""The frontier of score and KL: what best-of-n and the tilted policy reach without training, and what recipes reach.

    python benchmarks/frontier.py --stories MODEL [--reviews REVIEWS.jsonl] [--trl-python ENV/bin/python] [--seeds 3]
    python benchmarks/frontier.py --table [--plot frontier.png] [--json frontier.json]   # only show what was measured

Every variant trains a small model on the same number of responses; a run has one thread. Score, KL to the start (the
model before training) in nats per response, length and diversity are measured on held-out prompts during the run.
frontier_tasks.py describes the tasks. With --trl-python, TRL's trainers run, too: their policies are measured in the
same way, with the random numbers of the recipes that have batches of 64 prompts and one response to each, such as
`ppo.yaml` (frontier_trl.py).

*Needed / KL* is the least KL with which any policy could have the score of a run's last policy, that of the tilted
policy, as a fraction of the run's KL; it is empty where the samples of the start do not reach the score. *KL at the
score of* another run, `ppo.yaml` or a trainer of TRL with the same seed, is the lowest KL at which a run reaches the
score that the other ends with, as a fraction of the other's KL. The CPU seconds of TRL are those of its training alone;
ours include loading and the measurements during the run.
"""

import argparse
import contextlib
import csv
import io
import json
import math
import os
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")
HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import frontier_tasks  # noqa: E402
import frontier_trl  # noqa: E402
import lightning  # noqa: E402
import torch  # noqa: E402
import yaml  # noqa: E402
from frontier_curves import Point, best_of_n, kl_at_score, least_kl, tilted  # noqa: E402
from frontier_tasks import Task  # noqa: E402

from lit_rlhf import LeaveOneOut, PolicyGradient, Prompts, Sampling  # noqa: E402
from lit_rlhf.references import load_reference  # noqa: E402

RESPONSES = 3840
"""The number of responses in a run."""
HELD_OUT, MEASUREMENTS = 576, 4
"""The numbers of held-out responses in a measurement (rounded down to whole batches) and of measurements in a run.

A run whose number of iterations is not a multiple of the number of measurements has more measurements.
"""
SAMPLES = 256
"""The number of responses of the start to each held-out prompt; they give the curves of what needs no training."""
TASKS = ("happy", "sentiment", "randomwalks", "quickstart")
STEPWISE = ("reinforce", "a2c", "a3c", "rloo")
"""Recipes with the vanilla policy gradient, one step on each response, which have three times the learning rate."""


class Variant(NamedTuple):
    """A recipe, and the options in which the variant differs from it."""

    recipe: str
    options: dict[str, Any]


POTENTIALS = {"model.advantages.lam": 0.7, "model.critic": "actor", "model.scores.potential_every": 4}
"""The options of PPO with potential-based shaping; its critic predicts only what is still to be gained, at first 0."""
VARIANTS = {
    **{f"{name}.yaml": Variant(name, {}) for name in ("ppo", "ppo_penalty", "a2c", "reinforce", "reinforce_pp")},
    **{f"{name}.yaml": Variant(name, {}) for name in ("grpo", "dr_grpo", "rloo", "trpo")},
    "a3c.yaml": Variant("a3c", {"model.engine.workers": 0}),  # the same weights as with workers
    "ppo, λ = 0.7": Variant("ppo", {"model.advantages.lam": 0.7}),
    "ppo, λ = 0.7, kl 0.2": Variant("ppo", {"model.advantages.lam": 0.7, "model.kl.coef": 0.2}),
    **{f"ppo, potentials, kl {kl}": Variant("ppo", POTENTIALS | {"model.kl.coef": kl}) for kl in (0.1, 0.2, 0.3, 0.5)},
    "ppo, λ = 0.95": Variant("ppo", {"model.advantages.lam": 0.95}),
    "ppo, 4 × 4 steps": Variant("ppo", {"model.update.epochs": 4, "model.update.minibatches": 4}),
    "ppo, constant rate": Variant("ppo", {"model.actor_scheduler": "null"}),
    "ppo, full KL": Variant("ppo", {"model.reference_kl.estimator": "full"}),
    "ppo, critic warmed up": Variant("ppo", {"model.update.critic_warmup": 5}),
    "ppo, batches of 256": Variant("ppo", {"data.batch_size": 256}),
}
RECIPES = [name for name in VARIANTS if name.endswith(".yaml")]
"""The variants that run by default."""


class _Scores(lightning.Callback):
    """A callback that collects the scores of held-out responses, [prompts, responses to each]."""

    def __init__(self) -> None:
        self.parts: list[torch.Tensor] = []

    def on_validation_batch_end(self, trainer: Any, module: Any, outputs: Any, *_: Any) -> None:
        """Collect the scores of a batch."""
        self.parts.append(outputs["scores"].view(-1, module.sampling.responses).cpu())


def scores_of_start(task: Task, samples: int) -> torch.Tensor:
    """Return the scores of several responses of the start to each distinct held-out prompt, [prompts, samples]."""
    torch.set_num_threads(1)
    distinct = list({record["prompt"]: record for record in load_reference(task.held_out, "prompts")()}.values())
    module = PolicyGradient(
        actor=task.start,
        critic=None,
        rewards=[task.reward()],
        sampling=Sampling(max_tokens=task.max_tokens, responses=samples),
        advantages=LeaveOneOut(),
    )
    collected = _Scores()
    trainer = frontier_trl.validator(callbacks=[collected])
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        path = Path(folder, "prompts.jsonl")
        path.write_text("\n".join(map(json.dumps, distinct)))
        trainer.validate(module, Prompts(train=str(path), validation=str(path), batch_size=8), verbose=False)
    return torch.cat(collected.parts)


def options(variant: Variant, task: Task, seed: int, responses: int, folder: str) -> list[str]:
    """Return the arguments of the command line for a run."""
    text = (HERE.parent / "configs" / f"{variant.recipe}.yaml").read_text(encoding="utf-8")
    config = yaml.safe_load(text)
    batch = variant.options.get("data.batch_size", config["data"]["init_args"]["batch_size"])
    batch_responses = batch * config["model"]["init_args"]["sampling"].get("responses", 1)
    iterations = max(1, responses // batch_responses)
    rate = task.rate * (3 if variant.recipe in STEPWISE else 1)
    values: dict[str, Any] = {
        "config": HERE.parent / "configs" / f"{variant.recipe}.yaml",
        "seed_everything": seed,
        "model.actor": task.start,
        "model.rewards": json.dumps(task.rewards()),
        "model.scores.truncation_penalty": task.truncation_penalty,
        "model.sampling.max_tokens": task.max_tokens,
        "model.iterations": iterations,
        "data.train": task.prompts,
        "data.validation": task.held_out,
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
    critic = config["model"]["init_args"].get("critic")
    if critic == "shared":
        values["model.critic_optimizer.lr"] = 10 * task.critic_rate  # of its head alone
    elif critic is not None:
        values["model.critic_optimizer.lr"] = task.critic_rate
        values["model.critic"] = "actor" if task.reward_model is None else "reward"  # as in TRL
    return ["fit", *(f"--{name}={value}" for name, value in (values | variant.options).items())]


def run(task: Task, name: str, seed: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Train, and return what was measured on held-out prompts along the run, and the scores of the iterations."""
    if name in frontier_trl.TRAINERS:
        sizes = arguments.responses, MEASUREMENTS, HELD_OUT
        return frontier_trl.run(task, name, seed, *sizes, arguments.trl_python)
    with tempfile.TemporaryDirectory() as folder:
        began = time.process_time()
        frontier_tasks.quietly(options(VARIANTS[name], task, seed, arguments.responses, folder))
        seconds = time.process_time() - began
        with open(Path(folder, "metrics.csv"), encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    held_out = [row for row in rows if row.get("val/score")]
    return {
        "seconds": seconds,
        "start": float(held_out[0]["val/reference_score"]),
        "scores": [float(row["objective/score"]) for row in rows if row.get("objective/score")],
        "points": [{key: float(row[f"val/{key}"]) for key in frontier_trl.MEASURED} for row in held_out],
    }


def make_tasks(arguments: argparse.Namespace, folder: Path) -> dict[str, Task]:
    """Return the tasks by name, and train the models that they need and the folder does not hold."""
    made = {
        "happy": lambda: frontier_tasks.happy(arguments.stories),
        "sentiment": lambda: frontier_tasks.sentiment(
            arguments.stories, arguments.reviews, folder / "sentiment", arguments.model_iterations
        ),
        "randomwalks": lambda: frontier_tasks.randomwalks(folder / "randomwalks", arguments.model_iterations),
        "quickstart": lambda: frontier_tasks.quickstart(folder / "quickstart", arguments.model_iterations),
    }
    return {name: made[name]() for name in arguments.tasks}


def variants_of(task: Task, arguments: argparse.Namespace) -> list[str]:
    """Return the variants that run on a task: those asked for or, by default, the recipes and the task's rivals."""
    return arguments.variants or [*RECIPES, *(task.rivals if arguments.trl_python else ())]


def measure(arguments: argparse.Namespace) -> None:
    """Measure what the file does not hold yet, and add each result to it."""
    path: Path = arguments.json
    results = read(path)
    with tempfile.TemporaryDirectory() as folder:
        tasks = make_tasks(arguments, arguments.models or Path(folder))
        for name, task in tasks.items():
            if name not in results["start"]:
                results["start"][name] = scores_of_start(task, arguments.samples).tolist()
                path.write_text(json.dumps(results))
        done = {(r["task"], r["variant"], r["seed"]) for r in results["runs"]}
        chosen = [(name, variant) for name, task in tasks.items() for variant in variants_of(task, arguments)]
        settings = [(*names, seed) for seed in range(1, arguments.seeds + 1) for names in chosen]
        wanted = [setting for setting in settings if setting not in done]
        with ProcessPoolExecutor(arguments.jobs) as pool:
            asked = {
                pool.submit(run, tasks[task], name, seed, arguments): (task, name, seed) for task, name, seed in wanted
            }
            for future in as_completed(asked):
                task_name, name, seed = asked[future]
                results["runs"].append({"task": task_name, "variant": name, "seed": seed} | future.result())
                path.write_text(json.dumps(results))
                print(json.dumps(results["runs"][-1]), file=sys.stderr, flush=True)


def read(path: Path) -> dict[str, Any]:
    """Return the results in a file; empty results if there is no file."""
    return json.loads(path.read_text()) if path.exists() else {"start": {}, "runs": []}


def path_of(result: dict[str, Any]) -> list[Point]:
    """Return the points of a run in their order, beginning with the start."""
    return [Point(0.0, result["start"]), *(Point(p["kl_to_ref"], p["score"]) for p in result["points"])]


def kl_ratio(result: dict[str, Any], rival: dict[str, Any]) -> float:
    """Return the KL at which a run reaches the rival's last score, divided by the rival's last KL; inf if never."""
    end = path_of(rival)[-1]
    return kl_at_score(path_of(result), end.score) / end.kl


def needed_share(result: dict[str, Any], scores: torch.Tensor) -> float:
    """Return the least KL with which a policy could have a run's last score, divided by the run's KL.

    Args:
        result: The run.
        scores: [P, k], the scores of k responses of the start to each prompt.
    """
    end = path_of(result)[-1]
    return least_kl(scores, end.score) / max(end.kl, 1e-6)


def curve(scores: torch.Tensor) -> list[tuple[str, Point, str]]:
    """Return the points that need no training, each as (name, point, effective samples, which are text or empty).

    The coefficients of the tilted policies are multiples of the mean standard deviation of the scores of a prompt.

    Args:
        scores: [P, k], the scores of k responses of the start to each prompt.
    """
    sizes = [2**i for i in range(int(math.log2(scores.shape[1])) + 1)]
    found = [(f"best of {n}", best_of_n(scores, n), "") for n in sizes]
    for share in (4.0, 2.0, 1.0, 0.5, 0.25):
        at = tilted(scores, share * float(scores.std(1).mean()))
        found.append((f"tilted, {share:g} standard deviations", Point(at.kl, at.score), f"{at.effective_samples:.1f}"))
    return found


def names_of(runs: list[dict[str, Any]]) -> list[str]:
    """Return the names of the variants and trainers that have runs, in the order in which they are listed above."""
    found = {result["variant"] for result in runs}
    return [name for name in (*VARIANTS, *frontier_trl.TRAINERS) if name in found]


def table(results: dict[str, Any]) -> str:
    """Return the means over the seeds in Markdown."""
    rivals = [name for name in names_of(results["runs"]) if name == "ppo.yaml" or name in frontier_trl.TRAINERS]
    heads = ["task", "policy", "score", "KL", "length", "distinct bigrams", "self-similarity", "needed / KL", "CPU s"]
    heads += [*(f"KL at the score of {rival} (seeds)" for rival in rivals), "effective samples"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for task, scores in results["start"].items():
        for name, point, effective in curve(torch.tensor(scores)):
            cells = [task, name, f"{point.score:.3f}", f"{point.kl:.2f}", *[""] * (5 + len(rivals)), effective]
            lines.append(f"| {' | '.join(cells)} |")
        runs = [result for result in results["runs"] if result["task"] == task]
        for name in names_of(runs):
            found = [result for result in runs if result["variant"] == name]
            last = [result["points"][-1] for result in found]
            cells = [f"{statistics.mean(p[key] for p in last):.{digits}f}" for key, digits in DIGITS.items()]
            share = statistics.mean(needed_share(result, torch.tensor(scores)) for result in found)
            cells.append(f"{share:.2f}" if share < math.inf else "")
            cells.append(f"{statistics.mean(result['seconds'] for result in found):.0f}")
            cells += [compared(found, [result for result in runs if result["variant"] == rival]) for rival in rivals]
            lines.append(f"| {' | '.join([task, name, *cells, ''])} |")
    return "\n".join(lines)


def compared(found: list[dict[str, Any]], rivals: list[dict[str, Any]]) -> str:
    """Return the mean of `kl_ratio` over the seeds that reach the rival's score, and the number of these seeds."""
    of_seed = {rival["seed"]: rival for rival in rivals}
    ratios = [kl_ratio(result, of_seed[result["seed"]]) for result in found if result["seed"] in of_seed]
    reached = [ratio for ratio in ratios if ratio < math.inf]
    if not reached:
        return "not reached" if ratios else ""
    return f"{statistics.mean(reached):.2f} ({len(reached)} of {len(ratios)})"


LABELS = {"best": "best of n of the start", "tilted": "tilted: the best policy at its KL"}
DIGITS = {"score": 3, "kl_to_ref": 2, "length": 1, "distinct_2": 3, "self_similarity": 3}


def plot(results: dict[str, Any], path: Path) -> None:
    """Draw the scores against √KL, one panel for each task, with a line for best-of-n and a line for each run."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    tasks = list(results["start"])
    figure, axes = pyplot.subplots(1, len(tasks), figsize=(5.5 * len(tasks), 4), squeeze=False, layout="constrained")
    for axis, task in zip(axes[0], tasks, strict=True):
        points = curve(torch.tensor(results["start"][task]))
        for kind, style in (("best", "k.-"), ("tilted", "k.:")):
            best = [point for name, point, _ in points if name.startswith(kind)]
            axis.plot([p.kl**0.5 for p in best], [p.score for p in best], style, label=LABELS[kind])
        runs = [result for result in results["runs"] if result["task"] == task]
        for number, name in enumerate(names_of(results["runs"])):  # one colour in all panels
            for result in (result for result in runs if result["variant"] == name):
                points, label = path_of(result), name if result["seed"] == 1 else None
                roots = [max(point.kl, 0.0) ** 0.5 for point in points]
                style = {"color": f"C{number % 10}", "linestyle": ("-", "--", ":")[number // 10 % 3]}
                axis.plot(roots, [point.score for point in points], **style, alpha=0.6, label=label)
        axis.set(title=task, xlabel="√KL to the start, √nats per response")
    axes[0][0].set_ylabel("score on held-out prompts")
    lines = {line.get_label(): line for axis in reversed(axes[0]) for line in axis.get_lines()}
    shown = [lines[name] for name in (*LABELS.values(), *names_of(results["runs"])) if name in lines]
    figure.legend(handles=shown, loc="outside right center", fontsize=8)
    figure.savefig(path, dpi=150)


def main(words: list[str] | None = None) -> None:
    """Measure, unless only the table is wanted, and print the table of all that was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stories", help="the folder of a small language model of stories, for happy and sentiment")
    parser.add_argument("--reviews", type=Path, help="labelled sentences, for the task sentiment")
    parser.add_argument("--models", type=Path, help="keep the models of the tasks in this folder, and use those in it")
    parser.add_argument("--trl-python", type=Path, help="the Python of an environment with TRL (README.md)")
    parser.add_argument(
        "--tasks", nargs="*", choices=TASKS, help="default: sentiment (happy without --reviews) and randomwalks"
    )
    parser.add_argument(
        "--variants",
        nargs="*",
        choices=(*VARIANTS, *frontier_trl.TRAINERS),
        help="default: the recipes and, with --trl-python, TRL's PPO or, for randomwalks, its GRPO and RLOO",
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--responses", type=int, default=RESPONSES, help="the number of responses in a run")
    parser.add_argument("--samples", type=int, default=SAMPLES, help="responses of the start to each prompt")
    parser.add_argument("--model-iterations", type=int, help="iterations in training a task's model, for trials")
    parser.add_argument("--table", action="store_true", help="only print the table")
    parser.add_argument("--plot", type=Path, help="also draw the frontier to this file; needs matplotlib")
    parser.add_argument("--json", type=Path, default=Path("frontier.json"))
    arguments = parser.parse_args(words)
    arguments.tasks = arguments.tasks or ["sentiment" if arguments.reviews else "happy", "randomwalks"]
    if not arguments.table:
        needed = [name for name in arguments.variants or () if name in frontier_trl.TRAINERS]
        if needed and not arguments.trl_python:
            parser.error(f"--trl-python is missing: {needed[0]} needs it")
        if not arguments.stories and {"happy", "sentiment"} & set(arguments.tasks):
            parser.error("--stories is missing: the tasks happy and sentiment need it")
        measure(arguments)
    results = read(arguments.json)
    print(table(results))
    if arguments.plot:
        plot(results, arguments.plot)


if __name__ == "__main__":
    main()
