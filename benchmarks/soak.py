"""Train a tiny model for thousands of iterations: does memory, the number of files or threads, or the time grow?

    python benchmarks/soak.py                    # 5,000 iterations of PPO, some minutes
    python benchmarks/soak.py --iterations 400 --from 100

The run writes what every run writes: metrics, samples, checkpoints, validations. The exit status is 1 if, from the
iteration ``--from`` to the end, resident memory grows by more than 3 %, the number of open files or threads changes, or
the median time of an iteration in the last tenth exceeds that in the first tenth by more than a quarter.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import lightning
from faults_runs import Setting
from rich.console import Console
from rich.table import Table

from lit_rlhf.modules.module import iteration_of

MEMORY, TIME = 1.03, 1.25
"""The largest growth of memory and of the time of an iteration."""
PAGE = os.sysconf("SC_PAGE_SIZE")


class Watch(lightning.Callback):
    """Writes resident memory, open files, threads and times to a file, one line for every 50 iterations.

    Args:
        path: The file.
        every_n: The number of iterations between two lines.
    """

    def __init__(self, path: str, every_n: int = 50) -> None:
        self.path, self.every_n = path, every_n
        self.times: list[float] = []
        self.last = time.perf_counter()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Measure the time since the last iteration; write a line if one is due."""
        now = time.perf_counter()
        self.times, self.last = [*self.times, now - self.last], now
        if iteration_of(pl_module) % self.every_n == 0:
            resident = int(Path("/proc/self/statm").read_text().split()[1]) * PAGE / 2**20
            row = {
                "iteration": iteration_of(pl_module),
                "resident_mib": resident,
                "files": len(os.listdir("/proc/self/fd")),
                "threads": len(os.listdir("/proc/self/task")),
                "seconds": statistics.median(self.times),
            }
            self.times = []
            with open(self.path, "a") as file:
                file.write(json.dumps(row) + "\n")


def main() -> int:
    """Run, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--iterations", type=int, default=5000)
    parser.add_argument("--from", type=int, default=200, dest="start", help="the iteration to compare the end with")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        setting, path = Setting(Path(folder)), Path(folder, "soak.jsonl")
        watch = {"class_path": "soak.Watch", "init_args": {"path": str(path)}}
        words = ["--model.iterations", str(options.iterations), "--trainer.callbacks", json.dumps([watch])]
        words += [
            "--checkpoint.every_n",
            "20",
            "--checkpoint.keep_every_n",
            "1000",
            "--trainer.val_check_interval",
            "20",
        ]
        paths = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
        for done in setting.start("ppo", "soak", *words, PYTHONPATH=paths).wait(timeout=36_000):
            assert done.returncode == 0, done.stderr[-3000:]
        rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows = [row for row in rows if row["iteration"] >= options.start]
    tenth = max(1, len(rows) // 10)
    first, last = (statistics.median(row["seconds"] for row in part) for part in (rows[:tenth], rows[-tenth:]))
    table = Table("", f"iteration {rows[0]['iteration']}", f"iteration {rows[-1]['iteration']}", "largest")
    for name in ("resident_mib", "files", "threads"):
        table.add_row(name, *(f"{x:g}" for x in (rows[0][name], rows[-1][name], max(row[name] for row in rows))))
    table.add_row("seconds, median of a tenth", f"{first:.4f}", f"{last:.4f}", "")
    Console().print(table)
    same = all(rows[0][name] == rows[-1][name] for name in ("files", "threads"))
    grown = rows[-1]["resident_mib"] / rows[0]["resident_mib"]
    Console().print(
        f"memory × {grown:.3f}, time × {last / first:.3f}, files and threads {'constant' if same else 'vary'}"
    )
    return 0 if same and grown <= MEMORY and last / first <= TIME else 1


if __name__ == "__main__":
    sys.exit(main())
