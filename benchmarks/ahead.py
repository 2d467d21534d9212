"""An iteration with generation in a process of its own, against the same iteration in one process.

    python benchmarks/ahead.py [--iterations 6]

Each process has one thread, so that two cores suffice. The models are those of iteration.py, with geometric response
lengths. *PPO*: 64 responses of 64 tokens on average, 4 epochs of 4 minibatches; learning takes most of the time.
*Balanced*: 16 responses of 256 tokens on average and at most 1,024, one epoch, the critic on the actor's trunk;
generation takes about as long as learning. *Lag 1, one process* does the work of lag 1 without overlap, so that
generation and learning are measured alone. Prints medians over all iterations but the first or, with a lag, the first
two, which fill the pipeline.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from models import write_models

HERE = Path(__file__).resolve().parent
SETTINGS: dict[str, tuple[float, list[str]]] = {  # the mean length of the responses, and options of ours_ppo.py
    "PPO": (64.0, ["--batch", "64", "--response", "256"]),
    "balanced": (256.0, ["--batch", "16", "--response", "1024", "--epochs", "1", "--critic", "shared"]),
}


def run(*words: str) -> dict[str, Any]:
    """Run ours_ppo.py with one thread for each process, and return the JSON of its last line."""
    command = [sys.executable, str(HERE / "ours_ppo.py"), *words]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    if done.returncode:
        raise SystemExit(f"ours_ppo.py failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def main() -> None:
    """Measure both settings with and without lag, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--iterations", type=int, default=6)
    options = parser.parse_args()
    print("| | | s per iteration | generate | judge and update | waits for rollouts | waits for the learner |")
    print("|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for name, (mean_length, words) in SETTINGS.items():
            models = write_models(Path(folder, name), mean_length=mean_length)
            fixed = [str(models), "--iterations", str(options.iterations), "--max-tokens", "2048", *words]
            synchronous = run(*fixed)
            alone = run(*fixed, "--lag", "1", "--workers", "0")
            ahead = run(*fixed, "--lag", "1")
            for label, measured in (("lag 0", synchronous), ("lag 1, one process", alone), ("lag 1", ahead)):
                learning = measured["judge"] + measured["update"]
                cells = [name, label, f"{measured['median']:.1f}", f"{measured['generate']:.1f}", f"{learning:.1f}"]
                cells += [f"{measured.get(f'wait_for_{side}', 0):.1f}" for side in ("rollouts", "learner")]
                print("| " + " | ".join(cells) + " |")
            longer = max(alone["judge"] + alone["update"], alone["generate"])
            print(f"{name}: {ahead['median'] / longer:.2f} of the longer part alone, ", end="")
            print(f"{synchronous['median'] / ahead['median']:.2f} times as fast as lag 0", flush=True)


if __name__ == "__main__":
    main()
