"""A PPO iteration of lit-rlhf and of TRL, on the same models, one after the other in the same run.

    python benchmarks/iteration.py [--trl-python ENV/bin/python] [--iterations 4] [--compile]

An iteration has 64 prompts of 32 tokens, 4 epochs of 4 minibatches, and four models of 7 million parameters. It is
measured once with responses of geometric length (mean 64, at most 256 tokens), and once with responses of 128 tokens.
Prints medians over all iterations but the first, ratios to TRL, the time of each phase, and the floor (floor.py) at the
matrix-multiplication rate measured in the same run. Without --trl-python only lit-rlhf runs.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from floor import matrix_rate, operations
from models import write_models

HERE = Path(__file__).resolve().parent
SETTINGS = {  # mean length, longest response
    "geometric lengths, mean 64, at most 256": (64.0, 256),
    "all 128 tokens long": (1e9, 128),
}
VARIANTS: dict[str, list[str]] = {
    "fp32": [],
    "bf16": ["--precision", "bf16-mixed"],
    "bf16, critic on the actor's trunk": ["--precision", "bf16-mixed", "--critic", "shared"],
}
COLUMNS = [
    "",
    "s per iteration",
    "response tokens",
    "TRL's time / this",
    "generate",
    "judge",
    "update",
    "floor",
    "time / floor",
    "peak GiB",
]


def run(python: str, script: str, *words: str) -> dict[str, Any]:
    """Run a script and return the JSON of its last line."""
    done = subprocess.run(
        [python, str(HERE / script), *words],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())},
    )
    if done.returncode:
        raise SystemExit(f"{script} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def main() -> None:
    """Measure each setting and print its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trl-python", help="the Python of an environment with trl 1.12.0")
    parser.add_argument(
        "--iterations", type=int, default=4, help="iterations of each variant; the first is not counted"
    )
    parser.add_argument("--compile", action="store_true", help="use CompileLayers in lit-rlhf")
    parser.add_argument("--max-tokens", type=int, default=2048, help="the limit of lit-rlhf's micro-batches")
    options = parser.parse_args()
    rates: dict[torch.dtype, list[float]] = {torch.float32: [], torch.bfloat16: []}
    with tempfile.TemporaryDirectory() as folder:
        for name, (mean_length, longest) in SETTINGS.items():
            models = write_models(Path(folder, str(longest)), mean_length=mean_length)
            rows: list[tuple[str, dict[str, Any], list[str] | None]] = []
            fixed = [str(models), "--iterations", str(options.iterations), "--response", str(longest)]
            if options.trl_python:
                rows.append(("TRL, fp32", run(options.trl_python, "trl_ppo.py", *fixed), None))
            for variant, words in VARIANTS.items():
                for dtype, measured in rates.items():
                    measured.append(matrix_rate(dtype))
                more = ["--max-tokens", str(options.max_tokens), *(["--compile"] if options.compile else [])]
                rows.append((f"lit-rlhf, {variant}", run(sys.executable, "ours_ppo.py", *fixed, *words, *more), words))
            print_table(name, rows, models / "policy", {k: max(v) for k, v in rates.items()})


def print_table(
    name: str, rows: list[tuple[str, dict[str, Any], list[str] | None]], policy: Path, rates: dict[torch.dtype, float]
) -> None:
    """Print one row per variant."""
    print(
        f"\n{name} (matrix-multiplication rate: "
        + ", ".join(f"{k} {v / 1e9:.0f} GFLOP/s" for k, v in rates.items())
        + ")\n"
    )
    print("| " + " | ".join(COLUMNS) + " |")
    print("|---" * len(COLUMNS) + "|")
    base = rows[0][1]["median"] if rows[0][2] is None else None
    for label, measured, words in rows:
        tokens = statistics.median(measured["response_tokens"])
        ratio = "" if base is None else f"{base / measured['median']:.2f}"
        cells = [label, f"{measured['median']:.1f}", f"{tokens:.0f}", ratio]
        cells += [f"{measured[phase]:.1f}" if phase in measured else "" for phase in ("generate", "judge", "update")]
        if words is None:
            cells += ["", ""]
        else:
            rate = rates[torch.bfloat16 if "bf16-mixed" in words else torch.float32]
            counted = [operations(policy, 32, lengths, shared="shared" in words) for lengths in measured["lengths"]]
            floors = [sum(phases.values()) / rate for phases in counted]
            times = [took / floor for took, floor in zip(measured["seconds"][-len(floors) :], floors, strict=True)]
            cells += [f"{statistics.median(floors):.1f}", f"{statistics.median(times):.2f}"]
        print("| " + " | ".join([*cells, f"{measured['peak_memory_gib']:.2f}"]) + " |", flush=True)


if __name__ == "__main__":
    main()
