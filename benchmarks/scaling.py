"""How the time of an iteration grows with the response length, its limit, the batch, the vocabulary and the model.

    python benchmarks/scaling.py

Each row increases one size. The exponent is the slope of log time over log size, by least squares; 1 is linear growth.
The last column is the exponent of the counted operations (floor.py), which is not always 1: those of attention grow
with the square of a text's length.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from floor import operations
from models import write_models

HERE = Path(__file__).resolve().parent
BASE = {"mean_length": 1e9, "response": 128, "batch": 16, "vocabulary": 4096, "hidden": 256, "layers": 6}
SWEEPS: dict[str, list[dict[str, Any]]] = {
    "response length": [{"response": n} for n in (128, 256, 512, 1024)],
    "length limit, mean 64": [{"mean_length": 64.0, "response": n, "batch": 64} for n in (512, 1024)],
    "batch": [{"batch": n} for n in (16, 32, 64)],
    "vocabulary": [{"vocabulary": n} for n in (4096, 16384, 65536)],
    "layers": [{"layers": n} for n in (3, 6, 12)],
}


def measure(setting: dict[str, Any]) -> tuple[float, float, float]:
    """Return the median seconds of an iteration, and the means of its response tokens and its operations."""
    with tempfile.TemporaryDirectory() as folder:
        shape = {name: setting[name] for name in ("hidden", "layers", "vocabulary", "mean_length")}
        models = write_models(Path(folder), **shape)
        words = [str(models), "--iterations", "3", "--epochs", "1", "--minibatches", "2", "--max-tokens", "2048"]
        words += ["--batch", str(setting["batch"]), "--response", str(setting["response"])]
        done = subprocess.run(
            [sys.executable, str(HERE / "ours_ppo.py"), *words], capture_output=True, text=True, env=os.environ
        )
        if done.returncode:
            raise SystemExit(done.stderr[-2000:])
        measured = json.loads(done.stdout.strip().splitlines()[-1])
        counted = [
            sum(operations(models / "policy", 32, lengths, epochs=1).values()) for lengths in measured["lengths"]
        ]
    return measured["median"], statistics.mean(measured["response_tokens"]), statistics.mean(counted)


def exponent(sizes: list[float], measured: list[float]) -> float:
    """Return the slope of the least-squares line through the logarithms."""
    return statistics.linear_regression([math.log(x) for x in sizes], [math.log(y) for y in measured]).slope


def main() -> None:
    """Measure each row and print a table."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    print(
        "| | sizes | seconds per iteration | exponent of the time | exponent of the operations |\n|---|---|---|---|---|"
    )
    for name, settings in SWEEPS.items():
        sizes, times, floors = [], [], []
        for setting in settings:
            took, tokens, counted = measure(BASE | setting)
            size = list(setting.values())[-1 if len(setting) == 1 else 1]
            scale = 4096 / tokens if "mean 64" in name else 1.0  # random lengths: scale to the same number of tokens
            sizes.append(float(size))
            times.append(took * scale)
            floors.append(counted * scale)
        shown = ", ".join(f"{size:.0f}" for size in sizes), ", ".join(f"{time:.2f}" for time in times)
        slopes = f"{exponent(sizes, times):.2f} | {exponent(sizes, floors):.2f}"
        print(f"| {name} | {shown[0]} | {shown[1]} | {slopes} |", flush=True)


if __name__ == "__main__":
    main()
