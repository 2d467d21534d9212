"""PPO with LoRA against full PPO on stories: the score at the same KL to the reference, and the time.

    python benchmarks/adapters.py --stories MODEL [--seeds 3] [--jobs 1] [--json adapters.json]
    python benchmarks/adapters.py --stories MODEL --pairs 5 [--json adapters.json]    # time per iteration, in turns
    python benchmarks/adapters.py --table [--json adapters.json]                      # the table of what was measured

Trains PPO (configs/ppo.yaml) on a small story model with the reward `happy_story`, as lags.py does, with one
thread for each run. The critic starts from the actor's base: with LoRA, it is a second adapter. During a run, the score
and the KL to the reference, in nats per response, are measured on held-out prompts. The rise in score is close to
c √KL (Gao et al. 2022, arXiv 2210.10760, write it as a function of √KL); c is fitted to the points of each run, so that
the ratio of two runs' c is the ratio of their rises at the same KL. Each run is compared with the full run of the same
seed and the learning rate with which full PPO reaches the highest score. Times are seconds of CPU time, so that other
jobs on the machine count less.
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
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")
HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import lags  # noqa: E402
import lightning  # noqa: E402
import recipes  # noqa: E402

ITERATIONS, EVERY = 20, 4
KL_COEF = 0.02
VALUE_RATE = 10 / 3
"""The critic's learning rate, in units of the actor's."""


class Setting(NamedTuple):
    """What is trained, and how fast."""

    rank: int  # 0 to train whole models
    rate: float  # the learning rate of the actor

    @property
    def name(self) -> str:
        """The setting's name in the table."""
        return f"LoRA, rank {self.rank}" if self.rank else "full"


RATES = {
    0: (1e-4, 3e-4, 3e-5),
    64: (3e-4,),
    32: (3e-4,),
    16: (3e-4, 4e-4, 5e-4, 1e-4, 1e-3, 3e-3),
    8: (3e-4, 4e-4, 1e-3),
    4: (3e-4, 1e-3),
}
SETTINGS = tuple(Setting(rank, rate) for rank, rates in RATES.items() for rate in rates)


def held_out_prompts() -> list[dict[str, str]]:
    """Return openings of stories to measure with, 864 in all, so that the scores are precise."""
    return lags.fresh_story_prompts() * 6


class Clock(lightning.Callback):
    """A callback that writes the CPU seconds of each iteration to ``seconds.json`` in the run's folder."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_train_batch_start(self, trainer: lightning.Trainer, *_: Any) -> None:
        """Start the clock."""
        self.seconds.append(-time.process_time())

    def on_train_batch_end(self, trainer: lightning.Trainer, *_: Any) -> None:
        """Stop the clock."""
        self.seconds[-1] += time.process_time()
        Path(trainer.default_root_dir, "seconds.json").write_text(json.dumps(self.seconds))


def options(setting: Setting, seed: int, iterations: int, folder: str, stories: str) -> list[str]:
    """Return the arguments of the command line."""
    values: dict[str, Any] = {
        "model.iterations": iterations,
        "model.kl.coef": KL_COEF,
        "model.actor_optimizer.lr": setting.rate,
        "model.critic_optimizer.lr": VALUE_RATE * setting.rate,
        "trainer.val_check_interval": min(EVERY, iterations),
        "data.validation": f"{__file__}:held_out_prompts",
        "trainer.callbacks+": json.dumps({"class_path": "adapters.Clock"}),
    }
    if setting.rank:
        lora = {"rank": setting.rank, "alpha": 2 * setting.rank}
        values["model.adapter"] = json.dumps({"class_path": "LoRA", "init_args": lora})
    with_lag = lags.options("stories", "none", 0, seed, folder, stories)
    arguments = [argument for argument in with_lag if not argument.startswith("--model.engine")]
    return [*arguments, *(f"--{name}={value}" for name, value in values.items())]


def fit(setting: Setting, seed: int, iterations: int, stories: str) -> tuple[list[dict[str, float]], list[float]]:
    """Train, and return the measurements on held-out prompts and the CPU seconds of each iteration."""
    with tempfile.TemporaryDirectory() as folder:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            recipes.main(options(setting, seed, iterations, folder, stories))
        with open(Path(folder, "metrics.csv"), encoding="utf-8") as file:
            rows = [row for row in csv.DictReader(file) if row["val/score"]]
        seconds = json.loads(Path(folder, "seconds.json").read_text())
    points = [{"score": float(rows[0]["val/reference_score"]), "kl": 0.0, "seconds": 0.0}]
    for row in rows:
        spent = sum(seconds[: int(float(row["progress/iteration"]))])
        points.append({"score": float(row["val/score"]), "kl": float(row["val/kl_to_ref"]), "seconds": spent})
    return points, seconds


def run(setting: Setting, seed: int, stories: str) -> dict[str, Any]:
    """Train, and return the setting with what was measured along the run, from the reference on."""
    points, _ = fit(setting, seed, ITERATIONS, stories)
    return {"rank": setting.rank, "rate": setting.rate, "seed": seed, "points": points}


def measure(stories: str, seeds: int, jobs: int, path: Path) -> None:
    """Run what the file does not hold yet, and add each result to it."""
    results = read(path)
    done = {(r["rank"], r["rate"], r["seed"]) for r in results["runs"]}
    wanted = [(s, seed) for s, seed in itertools.product(SETTINGS, range(1, seeds + 1)) if (*s, seed) not in done]
    with ProcessPoolExecutor(jobs) as pool:
        for future in [pool.submit(run, *setting, stories) for setting in wanted]:
            results["runs"].append(future.result())
            path.write_text(json.dumps(results))
            print(json.dumps(results["runs"][-1]), file=sys.stderr, flush=True)


def measure_pairs(stories: str, pairs: int, path: Path) -> None:
    """Fit full models and every rank in turns, and add the median CPU seconds of an iteration of each to the file."""
    results = read(path)
    for seed in range(1, pairs + 1):
        for rank in sorted({setting.rank for setting in SETTINGS}):
            seconds = statistics.median(fit(Setting(rank, 1e-4), seed, 4, stories)[1][1:])
            results["pairs"].setdefault(str(rank), []).append(seconds)
            path.write_text(json.dumps(results))
            print(rank, seconds, file=sys.stderr, flush=True)


def read(path: Path) -> dict[str, Any]:
    """Return the results in a file; empty results if there is no file."""
    return json.loads(path.read_text()) if path.exists() else {"runs": [], "pairs": {}}


def rise_per_root(points: list[dict[str, float]]) -> float:
    """Return the coefficient c of the rise in score = c √KL, the least-squares fit to the points of a run."""
    start = points[0]["score"]
    product = sum((point["score"] - start) * abs(point["kl"]) ** 0.5 for point in points)
    return product / sum(abs(point["kl"]) for point in points)


def score_at(points: list[dict[str, float]], kl: float) -> float:
    """Return the score at a KL, interpolated between the two points with the next smaller and the next larger KL."""
    points = sorted(points, key=lambda point: point["kl"])
    for low, high in itertools.pairwise(points):
        if kl < high["kl"]:
            return low["score"] + (kl - low["kl"]) / (high["kl"] - low["kl"]) * (high["score"] - low["score"])
    return points[-1]["score"]


def rise_at_common_kl(points: list[dict[str, float]], rival: list[dict[str, float]]) -> float:
    """Return the rise at the largest KL that both runs reach, relative to the rival's rise, without a fit."""
    kl = min(max(point["kl"] for point in run) for run in (points, rival))
    return (score_at(points, kl) - points[0]["score"]) / (score_at(rival, kl) - rival[0]["score"])


def seconds_to(points: list[dict[str, float]], score: float) -> float:
    """Return the seconds until a score is reached, interpolated between points in time; infinity if it never is."""
    for before, after in itertools.pairwise(points):
        if after["score"] >= score:
            share = (score - before["score"]) / (after["score"] - before["score"])
            return before["seconds"] + share * (after["seconds"] - before["seconds"])
    return float("inf")


def objective(run: dict[str, Any]) -> float:
    """Return the score at the end of a run less the cost of its KL."""
    return run["points"][-1]["score"] - KL_COEF * run["points"][-1]["kl"]


def table(results: dict[str, Any]) -> str:
    """Return the means over the seeds in Markdown; a rise is compared with that of the best full run of its seed."""
    runs: dict[Setting, list[dict[str, Any]]] = {}
    for result in results["runs"]:
        runs.setdefault(Setting(result["rank"], result["rate"]), []).append(result)
    full = [setting for setting in runs if not setting.rank]
    best = max(full, key=lambda setting: statistics.mean(r["points"][-1]["score"] for r in runs[setting]))
    rivals = {result["seed"]: result["points"] for result in runs[best]}
    heads = ["", "learning rate", "score at the end", "KL at the end", f"score − {KL_COEF} KL"]
    heads += ["rise at the same KL, fitted", "rise at the largest common KL, interpolated"]
    heads += ["time to 0.9 of the full run's rise (seeds)"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for setting in sorted(runs):
        found = [result for result in runs[setting] if result["seed"] in rivals]
        last = [result["points"][-1] for result in found]
        cells = [f"{statistics.mean(point['score'] for point in last):.3f}"]
        cells += [f"{statistics.mean(point['kl'] for point in last):.1f}"]
        cells += [f"{statistics.mean(map(objective, found)):.3f}"]
        rises = [rise_per_root(r["points"]) / rise_per_root(rivals[r["seed"]]) for r in found]
        cells.append(f"{statistics.mean(rises):.2f} ({min(rises):.2f}–{max(rises):.2f})")
        rises = [rise_at_common_kl(r["points"], rivals[r["seed"]]) for r in found]
        cells.append(f"{statistics.mean(rises):.2f} ({min(rises):.2f}–{max(rises):.2f})")
        times = [time_of(r["points"], rivals[r["seed"]]) for r in found]
        times = [time for time in times if time < float("inf")]
        cells.append(f"{statistics.mean(times):.2f} ({len(times)} of {len(found)})" if times else "not reached")
        lines.append(f"| {setting.name} | {setting.rate:g} | {' | '.join(cells)} |")
    lines += ["", "| | CPU seconds of an iteration, median | ratio to full, median of pairs (range) |", "|---|---|---|"]
    for rank, seconds in results["pairs"].items():
        if rank == "0":
            lines.append(f"| full | {statistics.median(seconds):.2f} | 1 |")
            continue
        ratios = [mine / other for mine, other in zip(seconds, results["pairs"]["0"], strict=False)]
        cells = [f"{statistics.median(seconds):.2f}", f"{statistics.median(ratios):.2f}"]
        lines.append(
            f"| {Setting(int(rank), 0.0).name} | {cells[0]} | {cells[1]} ({min(ratios):.2f}–{max(ratios):.2f}) |"
        )
    return "\n".join(lines)


def time_of(points: list[dict[str, float]], rival: list[dict[str, float]]) -> float:
    """Return the time to 0.9 of the rival's rise at its end, as a fraction of the rival's time to the same score."""
    score = rival[0]["score"] + 0.9 * (rival[-1]["score"] - rival[0]["score"])
    return seconds_to(points, score) / seconds_to(rival, score)


def main() -> None:
    """Measure, and print the table of all that was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stories", help="the folder of a small language model of stories")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--pairs", type=int, default=0, help="measure the time per iteration this many times instead")
    parser.add_argument("--table", action="store_true", help="only print the table")
    parser.add_argument("--json", type=Path, default=Path("adapters.json"))
    arguments = parser.parse_args()
    if not arguments.table and arguments.pairs:
        measure_pairs(arguments.stories, arguments.pairs, arguments.json)
    elif not arguments.table:
        measure(arguments.stories, arguments.seeds, arguments.jobs, arguments.json)
    print(table(read(arguments.json)))


if __name__ == "__main__":
    main()
