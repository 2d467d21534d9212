"""An iteration with generation in a process of its own, against the same iteration in one process.

    python benchmarks/ahead.py [--iterations 6]

One thread for each process, so that two cores suffice. The models and the geometric response lengths are those of
iteration.py. *PPO*: 64 responses, 4 epochs of 4 minibatches; learning takes most of the time. *Balanced*: 512 responses
and one epoch with the critic on the actor's trunk; generation takes about as long as learning. Prints medians over all
iterations but the first or, with a lag, the first two, which fill the pipeline.
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
SETTINGS = {
    "PPO, 64 responses": [],
    "balanced, 512 responses": ["--batch", "64", "--responses", "8", "--epochs", "1", "--critic", "shared"],
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
    print("| | lag | s per iteration | generate | judge and update | waits for rollouts | waits for the learner |")
    print("|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        models = write_models(Path(folder), mean_length=64.0)
        for name, words in SETTINGS.items():
            fixed = [str(models), "--iterations", str(options.iterations), "--max-tokens", "2048", *words]
            alone, ahead = run(*fixed), run(*fixed, "--lag", "1")
            learning = alone["judge"] + alone["update"]
            waits = [f"{ahead[f'wait_for_{side}']:.1f}" for side in ("rollouts", "learner")]
            print(f"| {name} | 0 | {alone['median']:.1f} | {alone['generate']:.1f} | {learning:.1f} | | |")
            cells = [name, "1", f"{ahead['median']:.1f}", "", f"{ahead['judge'] + ahead['update']:.1f}", *waits]
            print("| " + " | ".join(cells) + " |")
            longer = max(learning, alone["generate"])
            print(f"| | | {ahead['median'] / longer:.2f} of the longer part alone, ", end="")
            print(f"{alone['median'] / ahead['median']:.2f} times as fast | | | | |", flush=True)


if __name__ == "__main__":
    main()
