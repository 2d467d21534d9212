"""The score that PPO reaches with responses from an older policy, with each correction and without any.

    python benchmarks/lags.py [--stories MODEL] [--seeds 3] [--jobs 2] [--json lags.json]
    python benchmarks/lags.py --json lags.json --write     # puts the table and the plot into docs/algorithms.md

Trains PPO (configs/ppo.yaml) with `Ahead` on the two toy languages of worlds.py and, with --stories, on a small story
model with the reward `happy_story`; every run learns from the same number of responses. The score of a language
is the exact expected score of the final policy as a fraction of the optimum, averaged over the last five iterations;
that of the stories is the mean score of responses to held-out prompts at the end. `Ahead` has no workers here: the
samples are the same.
"""

import argparse
import contextlib
import csv
import io
import itertools
import json
import os
import statistics
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import recipes  # noqa: E402

LAGS = (0, 1, 2, 4, 8)
ITERATIONS = {"bandit": 25, "chain": 50, "stories": 30}
CORRECTIONS: dict[str, dict[str, Any] | None] = {
    "none": None,
    "TIS": {},
    "decoupled PPO": {"truncate_above": None},
    "IcePop": {"truncate_above": None, "mask_level": "token", "mask_below": 0.5, "mask_above": 5.0},
    "MIS": {"level": "sequence", "truncate_above": None, "mask_level": "sequence", "mask_above": 3.0},
    "bypass": {"bypass": True},
    "V-trace": None,
}
WITH_STORIES = ("none", "TIS", "bypass")
"""The corrections that are also measured on the stories, whose runs take longer."""
OPENINGS = ("Once upon a time", "One day,", "There was a little", "In a big house,", "It was a sunny day.", "Long ago,")
NAMES = ("a dog", "Lily", "Tom", "a cat", "Sue", "Ben", "a bird", "Mia", "a bear", "Max", "Anna", "a fish")


def story_prompts() -> list[dict[str, str]]:
    """Return the openings of stories to train on."""
    return [{"prompt": " ".join(words)} for words in itertools.product(OPENINGS[:4], NAMES)] * 8


def fresh_story_prompts() -> list[dict[str, str]]:
    """Return other openings of stories, to measure with; each occurs several times."""
    return [{"prompt": " ".join(words)} for words in itertools.product(OPENINGS[4:], NAMES)] * 6


def options(task: str, correction: str, lag: int, seed: int, folder: str, stories: str | None) -> list[str]:
    """Return the arguments of the command line."""
    iterations = ITERATIONS[task]
    if task == "stories":
        values = {
            "config": HERE.parent / "configs" / "ppo.yaml",
            "seed_everything": seed,
            "model.actor": stories,
            "model.critic": "actor",
            "model.rewards": json.dumps(
                [
                    {
                        "class_path": "RewardFunction",
                        "init_args": {"function": "lit_rlhf.rewards.examples:happy_story"},
                    }
                ]
            ),
            "model.sampling.max_tokens": 40,
            "model.update.epochs": 2,
            "model.update.minibatches": 2,
            "model.kl.coef": 0.02,
            "model.iterations": iterations,
            "model.actor_optimizer.lr": 3e-4,
            "model.critic_optimizer.lr": 1e-3,
            "data.train": f"{__file__}:story_prompts",
            "data.validation": f"{__file__}:fresh_story_prompts",
            "data.batch_size": 48,
            "trainer.val_check_interval": iterations,
            "trainer.check_val_every_n_epoch": "null",
            "checkpoint.every_n": 1_000_000,
            "trainer.default_root_dir": folder,
            "trainer.accelerator": "cpu",
            "trainer.enable_progress_bar": "false",
        }
        arguments = ["fit", *(f"--{name}={value}" for name, value in values.items())]
    else:
        arguments = recipes.options("ppo", task, seed, iterations, folder, goal=2.0)  # never reached: all iterations
    arguments.append(f"--model.engine={json.dumps({'class_path': 'Ahead', 'init_args': {'lag': lag, 'workers': 0}})}")
    if CORRECTIONS[correction] is not None:
        chosen = {"class_path": "Correction", "init_args": CORRECTIONS[correction]}
        arguments.append(f"--model.correction={json.dumps(chosen)}")
    if correction == "V-trace":
        arguments.append(f"--model.advantages={json.dumps({'class_path': 'VTrace', 'init_args': {'lam': 0.95}})}")
    return arguments


def run(task: str, correction: str, lag: int, seed: int, stories: str | None) -> dict[str, Any]:
    """Train, and return the setting with the score."""
    with tempfile.TemporaryDirectory() as folder:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            recipes.main(options(task, correction, lag, seed, folder, stories))
        with open(Path(folder, "metrics.csv"), encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        if task == "stories":
            score = float([row["val/score"] for row in rows if row["val/score"]][-1])
        else:
            score = statistics.mean(json.loads(Path(folder, "shares.json").read_text())[-5:])
        sizes = [float(row["off_policy/effective_sample_size"]) for row in rows if row["off_policy/logprob_diff_mean"]]
    setting = {"task": task, "correction": correction, "lag": lag, "seed": seed}
    return setting | {"score": score, "effective_sample_size": statistics.mean(sizes)}


def measure(tasks: list[str], stories: str | None, seeds: int, jobs: int, path: Path) -> None:
    """Run what the file does not hold yet, and add each result to it."""
    results = json.loads(path.read_text()) if path.exists() else []
    done = {(r["task"], r["correction"], r["lag"], r["seed"]) for r in results}
    settings = itertools.product(tasks, CORRECTIONS, LAGS, range(1, seeds + 1))
    wanted = [
        s
        for s in settings
        if s not in done and (s[2] or s[1] in ("none", "V-trace")) and (s[0] != "stories" or s[1] in WITH_STORIES)
    ]
    with ProcessPoolExecutor(jobs) as pool:
        for future in [pool.submit(run, *setting, stories) for setting in wanted]:
            results.append(future.result())
            path.write_text(json.dumps(results, indent=0))
            print(results[-1], file=sys.stderr, flush=True)


def table(results: list[dict[str, Any]]) -> str:
    """Return the mean scores as a Markdown table; without lag, only V-trace differs from no correction."""
    lines = [f"| task | correction | {' | '.join(f'lag {lag}' for lag in LAGS)} |", "|---" * (2 + len(LAGS)) + "|"]
    for task in dict.fromkeys(result["task"] for result in results):
        for correction in CORRECTIONS:
            scores = [scores_of(results, task, correction, lag) for lag in LAGS]
            if not scores[1]:
                continue
            cells = [f"{statistics.mean(of_seeds):.3f}" if of_seeds else "" for of_seeds in scores]
            lines.append(f"| {task} | {correction} | {' | '.join(cells)} |")
    return "\n".join(lines)


def scores_of(results: list[dict[str, Any]], task: str, correction: str, lag: int) -> list[float]:
    """Return the scores of all seeds; without lag, every method but V-trace is the same as no correction."""
    method = correction if lag or correction == "V-trace" else "none"
    return [r["score"] for r in results if (r["task"], r["correction"], r["lag"]) == (task, method, lag)]


def plot(results: list[dict[str, Any]], path: Path) -> None:
    """Draw the scores over the lag, one panel for each task, with the range over the seeds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    tasks = list(dict.fromkeys(result["task"] for result in results))
    figure, axes = pyplot.subplots(1, len(tasks), figsize=(4 * len(tasks), 3.2), squeeze=False, layout="constrained")
    for axis, task in zip(axes[0], tasks, strict=True):
        for correction in CORRECTIONS:
            means, lows, highs = [], [], []
            for lag in LAGS:
                scores = scores_of(results, task, correction, lag) or [float("nan")]
                means.append(statistics.mean(scores))
                lows.append(statistics.mean(scores) - min(scores))
                highs.append(max(scores) - statistics.mean(scores))
            axis.errorbar(range(len(LAGS)), means, [lows, highs], label=correction, capsize=2, marker="o", markersize=3)
        axis.set(title=task, xlabel="lag", xticks=range(len(LAGS)), xticklabels=LAGS, ylim=(0, None))
    axes[0][0].set_ylabel("score after equal responses")
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside right center", fontsize=8)
    figure.savefig(path, dpi=150)


def main() -> None:
    """Measure, or write what was measured into the docs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stories", help="the folder of a small language model of stories")
    parser.add_argument("--tasks", nargs="*", choices=tuple(ITERATIONS), help="the default is all that are possible")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--json", type=Path, default=Path("lags.json"))
    parser.add_argument("--write", action="store_true", help="put the table and the plot into docs/ instead of running")
    arguments = parser.parse_args()
    if not arguments.write:
        tasks = arguments.tasks or ["bandit", "chain", *(["stories"] if arguments.stories else [])]
        measure(tasks, arguments.stories, arguments.seeds, arguments.jobs, arguments.json)
    results = json.loads(arguments.json.read_text())
    print(table(results))
    if arguments.write:
        docs = HERE.parent / "docs"
        page = (docs / "algorithms.md").read_text(encoding="utf-8")
        start, end = "<!-- lags -->\n", "<!-- /lags -->"
        before, after = page.split(start)[0], page.split(end)[1]
        (docs / "algorithms.md").write_text(f"{before}{start}{table(results)}\n{end}{after}", encoding="utf-8")
        plot(results, docs / "images" / "lags.png")


if __name__ == "__main__":
    main()
