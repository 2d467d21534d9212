"""The same iteration on one process and, under ``ddp`` and ``fsdp2``, on two, each with one thread and the same batch.

    python benchmarks/processes.py [--iterations 4] [--processes 2] [--precision bf16-mixed]

Uses the models and prompts of iteration.py, with responses of geometric length. Prints medians over all iterations but
the first, the speed-up over one process, and the peak memory of process 0 (on a GPU: allocated).
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


def run(strategy: str, processes: int, *words: str) -> dict[str, Any]:
    """Run ours_ppo.py and return its JSON line."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    done = subprocess.run(
        [sys.executable, *launch, str(HERE / "ours_ppo.py"), *words, "--strategy", strategy],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    if done.returncode:
        raise SystemExit(f"{strategy} on {processes} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def main() -> None:
    """Measure each strategy and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--iterations", type=int, default=4, help="iterations of each strategy; the first is not counted"
    )
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--precision", default="32-true")
    options = parser.parse_args()
    print("| | s per iteration | speed-up | generate | judge | update | peak GiB |\n|---" + "|---" * 6 + "|")
    with tempfile.TemporaryDirectory() as folder:
        models = str(write_models(Path(folder), mean_length=64.0))
        words = (models, "--iterations", str(options.iterations), "--precision", options.precision)
        alone = None
        for strategy, processes in (("auto", 1), ("ddp", options.processes), ("fsdp2", options.processes)):
            measured = run(strategy, processes, *words)
            alone = alone or measured["median"]
            cells = [f"{strategy} on {processes}" if processes > 1 else "one process"]
            cells += [f"{measured['median']:.1f}", f"{alone / measured['median']:.2f}"]
            cells += [f"{measured[phase]:.1f}" for phase in ("generate", "judge", "update")]
            print("| " + " | ".join([*cells, f"{measured['peak_memory_gib']:.2f}"]) + " |", flush=True)


if __name__ == "__main__":
    main()
