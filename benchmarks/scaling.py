"""How the time of an iteration grows: with the responses' length, their limit, the batch, the vocabulary, the model.

    python benchmarks/scaling.py

Each line doubles one thing. The exponent is the slope of log time over log size, by least squares; 1 is linear.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from models import write_models

HERE = Path(__file__).resolve().parent
BASE = {"mean_length": 1e9, "response": 128, "batch": 16, "vocabulary": 4096, "hidden": 256, "layers": 6}
SWEEPS: dict[str, list[dict[str, Any]]] = {
    "response length": [{"response": n} for n in (128, 256, 512, 1024)],
    "limit of the length, mean 64": [{"mean_length": 64.0, "response": n, "batch": 64} for n in (512, 1024)],
    "batch": [{"batch": n} for n in (16, 32, 64)],
    "vocabulary": [{"vocabulary": n} for n in (4096, 16384, 65536)],
    "layers": [{"layers": n} for n in (3, 6, 12)],
}


def seconds(setting: dict[str, Any]) -> tuple[float, int]:
    """The median of an iteration, and its response tokens."""
    with tempfile.TemporaryDirectory() as folder:
        shape = {name: setting[name] for name in ("hidden", "layers", "vocabulary", "mean_length")}
        models = write_models(Path(folder), **shape)
        words = [str(models), "--iterations", "3", "--epochs", "1", "--minibatches", "2"]
        words += ["--batch", str(setting["batch"]), "--response", str(setting["response"])]
        done = subprocess.run(
            [sys.executable, str(HERE / "ours_ppo.py"), *words], capture_output=True, text=True, env=os.environ
        )
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    found = json.loads(done.stdout.strip().splitlines()[-1])
    return found["median"], sum(found["response_tokens"]) // len(found["response_tokens"])


def main() -> None:
    """Measure, and print a table."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    print("| | sizes | seconds an iteration | exponent |\n|---|---|---|---|")
    for name, settings in SWEEPS.items():
        sizes, times = [], []
        for setting in settings:
            took, tokens = seconds(BASE | setting)
            grown = list(setting.values())[-1 if len(setting) == 1 else 1]
            sizes.append(float(grown))
            times.append(took)
            if "mean 64" in name:
                times[-1] = took / tokens * 4096  # random lengths: for as many tokens
        x, y = [math.log(size) for size in sizes], [math.log(time) for time in times]
        mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
        slope = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / sum((a - mean_x) ** 2 for a in x)
        shown = ", ".join(f"{size:.0f}" for size in sizes), ", ".join(f"{time:.2f}" for time in times)
        print(f"| {name} | {shown[0]} | {shown[1]} | {slope:.2f} |", flush=True)


if __name__ == "__main__":
    main()
