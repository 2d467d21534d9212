"""Check that a refactoring changes no number: train the recipes on two checkouts and compare the files they wrote.

Usage::

    git worktree add ../before COMMIT
    python benchmarks/same_numbers.py run ../before before.out
    python benchmarks/same_numbers.py run . after.out
    python benchmarks/same_numbers.py compare before.out after.out

Each recipe does eight iterations on the quickstart's corpus, with the models of the SFT run. The comparison covers
``metrics.csv`` without times and rates, ``samples.jsonl``, and the weights of the last checkpoint.
"""

import argparse
import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import torch

STAGES = ("sft", "reward", "ppo", "dpo")
RECIPES = ("trpo", "grpo", "a2c", "ppo_penalty")
ITERATIONS = "8"


def options(name: str, out: Path) -> list[str]:
    """Return the command-line options of a run of eight iterations."""
    sft, reward = str(out / "sft" / "export"), str(out / "reward" / "export")
    common = ["--trainer.default_root_dir", str(out / name), "--model.iterations", ITERATIONS]
    common += ["--checkpoint.every_n", "4", "--data.batch_size", "8", "--trainer.accelerator", "cpu"]
    true_reward = '{"class_path": "RewardFunction", "init_args": {"function": "lit_rlhf.data.reviews:reward"}}'
    if name == "sft":
        return [*common, "--trainer.val_check_interval", "4"]
    if name == "reward":
        return [*common, "--model.reward", sft, "--model.max_tokens", "256"]
    common += ["--model.actor", sft]
    if name == "dpo":
        return [*common, "--model.max_tokens", "256"]
    common += ["--model.sampling.max_tokens", "32", "--model.update.max_tokens", "256"]
    if name == "ppo":
        learned = f'{{"class_path": "RewardModel", "init_args": {{"model": "{reward}", "normalize": true}}}}'
        return [*common, "--model.rewards", f"[{learned}, {true_reward}]", "--trainer.val_check_interval", "4"]
    return [*common, "--model.rewards", f"[{true_reward}]", "--data.train", "lit_rlhf.data.reviews:prompts"]


def run(checkout: Path, out: Path) -> None:
    """Train every recipe with a checkout's code."""
    environment = {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    for name in (*STAGES, *RECIPES):
        config = checkout / "configs" / ("quickstart" if name in STAGES else "") / f"{name}.yaml"
        command = [sys.executable, "-m", "lit_rlhf.cli", "fit", "--config", str(config), *options(name, out)]
        command += ["--trainer.enable_progress_bar", "false"]
        print(f"{name} …", flush=True)
        subprocess.run(command, env=environment, cwd=checkout, check=True, stdout=subprocess.DEVNULL)


def metrics(folder: Path) -> list[dict[str, float]]:
    """Return the rows of ``metrics.csv`` without times and rates."""
    with (folder / "metrics.csv").open(encoding="utf-8") as lines:
        rows = list(csv.DictReader(lines))
    return [
        {name: float(value) for name, value in row.items() if value and not name.startswith(("time/", "perf/"))}
        for row in rows
    ]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of the last checkpoint's state."""
    state = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    return {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}


def largest_difference(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> float:
    """Return the largest absolute difference between two sets of tensors with the same names."""
    assert before.keys() == after.keys(), before.keys() ^ after.keys()
    pairs = [(before[name].double(), after[name].double()) for name in before if before[name].numel()]
    return max(float((a.nan_to_num() - b.nan_to_num()).abs().max()) for a, b in pairs)


def compare(before: Path, after: Path) -> bool:
    """Print one line per run, and return whether all of them are bit-identical."""
    same = True
    for name in (*STAGES, *RECIPES):
        rows, other_rows = metrics(before / name), metrics(after / name)
        assert len(rows) == len(other_rows), (len(rows), len(other_rows))
        names = {key for row in (*rows, *other_rows) for key in row}
        differ = sorted(
            {key for a, b in zip(rows, other_rows, strict=True) for key in names if a.get(key) != b.get(key)}
        )
        files = [folder / name / "samples.jsonl" for folder in (before, after)]
        texts = [[json.loads(line) for line in file.open()] if file.exists() else [] for file in files]
        difference = largest_difference(weights(before / name), weights(after / name))
        identical = not differ and texts[0] == texts[1] and difference == 0.0
        same &= identical
        print(
            f"{name:12} {len(rows)} rows of metrics, {len(texts[0])} samples: "
            + ("identical" if identical else f"metrics differ in {differ}, samples {texts[0] == texts[1]}")
            + f", weights differ by {difference:.2g}"
        )
    return same


def main() -> None:
    """Train the recipes of a checkout, or compare the results of two checkouts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("run", "compare"))
    parser.add_argument("first", type=Path, help="run: a checkout; compare: the output folder of one checkout")
    parser.add_argument(
        "second", type=Path, help="run: the output folder; compare: the output folder of the other checkout"
    )
    parsed = parser.parse_args()
    first, second = parsed.first.resolve(), parsed.second.resolve()
    if parsed.command == "run":
        run(first, second)
    elif not compare(first, second):
        sys.exit(1)


if __name__ == "__main__":
    main()
