"""Training steps of lit-rlhf and of TRL, side by side on the same models and data, and the losses of both.

    python benchmarks/against_trl.py --trl-python ENV/bin/python --pairs PAIRS.jsonl --stories MODEL [--tasks dpo …]

Prints a Markdown table. Every run is a process of its own, lit-rlhf's by its command line (``lit-rlhf fit``), TRL's by
trl_steps.py; the two take turns. They have the same weights, records, batches and numbers of steps, AdamW with the same
options, gradients clipped to a norm of 1, float32, and no dropout; both save the model at the end. The columns are:

- tokens of a step, without padding: with the prompt once for each response, with each prompt once, and as TRL counts
  them, with the padding of its batches;
- the median seconds from the end of a step to the end of the next, without the first two steps and the last;
- the peak of the process's resident memory;
- the seconds of the whole process, from its start to its exit. In reward modelling, lit-rlhf's include the measurement
  of the scores of the training set, which follows the last step.

A ratio is the median of the ratios of the repeats. Packed rows differ between the two, so the ratio of SFT's steps is
that of the seconds per token. TRL runs without gradient checkpointing, and with the micro-batches that made it fastest
on a CPU (``--trl-micro-batch`` sets another size): those of one pair have the least padding. lit-rlhf's micro-batches
have at most ``--max-tokens`` tokens.

Then DPO and reward modelling are run for 16 steps of 8 pairs each, and the losses of each step are compared: they are
those of the same batches, so the exit status is 1 if a difference is larger than 1e-5. ``--repeats 0`` does only this.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from against_trl_runs import HERE, WARMUP, Measured, environment, measure

CHECK_STEPS = 16
CHECK_BATCH = 8  # pairs
TOLERANCE = 1e-5  # of a loss, between lit-rlhf and TRL
MAX_TOKENS = 512  # of a text; longer pairs are left out


@dataclass(frozen=True)
class Task:
    """A row of the table."""

    name: str  # in the table
    method: str  # dpo, reward, sft or grpo
    model: str  # 7.2M or 260K
    batch: int  # pairs, texts, or responses
    rate: float  # the learning rate
    prompt: int = 0  # tokens of each prompt (GRPO)
    response: int = 0  # tokens of each response (GRPO)
    group: int = 8  # responses to a prompt (GRPO)
    micro_batch: int | None = None  # pairs, rows or responses in a micro-batch of TRL's; None for the whole batch
    times: int = 1  # how many times as many steps as other tasks


TASKS = {
    "dpo": Task("DPO, 32 pairs", "dpo", "7.2M", batch=32, rate=1e-5, micro_batch=1),
    "reward": Task("reward modelling, 32 pairs", "reward", "7.2M", batch=32, rate=1e-5, micro_batch=1),
    "grpo": Task("GRPO, 64 responses of 64, prompts of 16", "grpo", "260K", 64, 1e-4, prompt=16, response=64, times=4),
    "grpo_long": Task(
        "GRPO, 64 responses of 32, prompts of 256", "grpo", "260K", 64, 1e-4, 256, response=32, micro_batch=8, times=2
    ),
    "grpo_large": Task(
        "GRPO, 64 responses of 32, prompts of 256", "grpo", "7.2M", 64, 1e-5, 256, response=32, micro_batch=8
    ),
    "sft": Task("SFT, 32 texts in packed rows of 512", "sft", "7.2M", batch=32, rate=1e-5, micro_batch=1),
}
COLUMNS = [
    "",
    "model",
    "tokens",
    "each prompt once",
    "TRL, padded",
    "s per step",
    "TRL",
    "TRL / lit-rlhf",
    "peak GiB",
    "TRL",
    "TRL / lit-rlhf",
    "process s",
    "TRL",
    "TRL / lit-rlhf",
]


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the options of the command line; exit with a message if one is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trl-python", type=Path, required=True, help="the Python of an environment with trl 1.16")
    parser.add_argument("--pairs", type=Path, required=True, help="JSON lines with prompt, chosen and rejected")
    parser.add_argument("--stories", type=Path, help="the folder of a small pretrained language model")
    parser.add_argument(
        "--tasks", nargs="+", choices=list(TASKS), default=list(TASKS), metavar="TASK", help=", ".join(TASKS)
    )
    parser.add_argument("--steps", type=int, default=5, help="the first two and the last are not counted")
    parser.add_argument("--repeats", type=int, default=2, help="0 only compares the losses")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of each process")
    parser.add_argument("--max-tokens", type=int, default=2048, help="the limit of lit-rlhf's micro-batches")
    parser.add_argument("--trl-micro-batch", type=int, help="pairs, rows or responses in a micro-batch of TRL's")
    parser.add_argument("--json", type=Path, help="a file for the measurements of all runs")
    options = parser.parse_args(words)
    if options.steps < WARMUP + 2:
        parser.error(f"--steps must be {WARMUP + 2} or more, not {options.steps}")
    for name in options.tasks:
        if options.stories is None and TASKS[name].model == "260K":
            parser.error(f"--stories is missing: {name} needs it")
    for name in ("trl_python", "pairs", "stories"):
        if getattr(options, name) is not None and not getattr(options, name).exists():
            parser.error(f"--{name.replace('_', '-')}: there is no {getattr(options, name)}")
    return options


def prepare(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Write the models and the records, and return the descriptions of the runs, by task, and "NAME check"."""
    words = [str(folder), "--pairs", options.pairs, "--steps", str(options.steps), "--tasks", *options.tasks]
    words += ["--stories", options.stories] if options.stories else []
    subprocess.run(
        [sys.executable, HERE / "against_trl_files.py", *words], check=True, env=environment(options, folder)
    )
    return json.loads((folder / "jobs.json").read_text())


def table(jobs: dict[str, Any], runs: dict[str, list[tuple[Measured, Measured]]]) -> str:
    """Return the table, a row for each task.

    Args:
        jobs: The description of each run, by task.
        runs: What was measured of lit-rlhf and of TRL in each repeat, by task.
    """
    lines = ["| " + " | ".join(COLUMNS) + " |", "|---" * len(COLUMNS) + "|"]
    for name, pairs in runs.items():
        task, job = TASKS[name], jobs[name]
        work = pairs[0][1].tokens / job["tokens"] if task.method == "sft" else 1.0  # TRL's tokens / lit-rlhf's
        cells = [task.name, task.model, f"{job['tokens']:.0f}", f"{job['once']:.0f}", f"{pairs[0][1].tokens:.0f}"]
        for field, digits, scale in (("step", 3, work), ("peak", 2, 1.0), ("process", 1, 1.0)):
            ours, trl = ([getattr(pair[side], field) for pair in pairs] for side in (0, 1))
            ratio = statistics.median(b / a for a, b in zip(ours, trl, strict=True)) / scale
            cells += [f"{statistics.median(ours):.{digits}f}", f"{statistics.median(trl):.{digits}f}", f"{ratio:.2f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def largest_difference(ours: Sequence[float], trl: Sequence[float]) -> float:
    """Return the largest absolute difference between the losses of two runs; infinite if their numbers differ.

    >>> largest_difference([0.5, 0.25], [0.5, 0.5]), largest_difference([0.5], [])
    (0.25, inf)
    """
    if len(ours) != len(trl) or not ours:
        return float("inf")
    return max(abs(a - b) if a == a and b == b else float("inf") for a, b in zip(ours, trl, strict=True))


def same_losses(name: str, ours: Sequence[float], trl: Sequence[float]) -> bool:
    """Print the largest difference between the losses of two runs, and return whether it is within the tolerance."""
    difference = largest_difference(ours, trl)
    verdict = "the same" if difference <= TOLERANCE else f"DIFFERENT, more than {TOLERANCE:g} apart"
    path = f"lit-rlhf's from {ours[0]:.6f} to {ours[-1]:.6f}" if ours else "no losses"
    print(f"{name}: losses of {len(ours)} and {len(trl)} steps, {path}: at most {difference:.1e} apart: {verdict}")
    return difference <= TOLERANCE


def main(words: Sequence[str] | None = None) -> None:
    """Measure, print the table, and compare the losses.

    Raises:
        SystemExit: if a run fails, or with status 1 if losses differ.
    """
    options = parse(words)
    runs: dict[str, list[tuple[Measured, Measured]]] = {}
    checks: dict[str, tuple[list[float], list[float]]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        jobs = prepare(options, folder)

        def both(key: str, repeat: int) -> tuple[Measured, Measured]:
            print(f"{key}, {repeat + 1} …", file=sys.stderr, flush=True)
            places = {side: folder / "runs" / f"{key}_{repeat}_{side}" for side in ("ours", "trl")}
            ours, trl = (measure(jobs[key], side, options, place) for side, place in places.items())
            return ours, trl

        for task in options.tasks if options.repeats else ():
            runs[task] = [both(task, repeat) for repeat in range(options.repeats)]
            _save(options.json, jobs, runs, checks)
        for key in (key for key in jobs if key.endswith(" check")):
            ours, trl = both(key, 0)
            checks[key] = ours.losses, trl.losses
            _save(options.json, jobs, runs, checks)
    if runs:
        print(table(jobs, runs) + "\n")
    same = [same_losses(key.removesuffix(" check"), *losses) for key, losses in checks.items()]  # prints all of them
    if not all(same):
        sys.exit(1)


def _save(path: Path | None, jobs: dict[str, Any], runs: dict[str, Any], checks: dict[str, Any]) -> None:
    """Write all that has been measured so far to a JSON file, if one is wanted."""
    if path is not None:
        measured = {key: [[run._asdict() for run in pair] for pair in pairs] for key, pairs in runs.items()}
        path.write_text(json.dumps({"jobs": jobs, "runs": measured, "losses": checks}, indent=1))


if __name__ == "__main__":
    main()
