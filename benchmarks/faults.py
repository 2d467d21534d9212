"""Interrupt runs in many ways, resume them, and count those that end with the bits of an uninterrupted run.

    python benchmarks/faults.py                    # everything: 200 SIGKILLs and the other faults
    python benchmarks/faults.py --only kill --kinds ppo --times 20 --seed 1

Runs are of a tiny model on a CPU. *Survived* counts the times after which a resumed run ended with the same weights,
optimizer state, metrics, samples and export as the uninterrupted one, bit for bit; for damaged checkpoints, the times
at which the checkpoint was refused in one line that names the file. *Worst loss* is the largest number of complete
iterations that had to be repeated. The exit status is 1 if not all survived. The fault ``disk`` needs the right to
mount a file system in memory.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from faults_damage import damages
from faults_disk import fill, small_disk
from faults_phases import PHASES
from faults_runs import KINDS, PROCESSES, Setting, messages, metrics, unequal
from rich.console import Console
from rich.table import Table

from lit_rlhf.callbacks.checkpoint import TERMINATED
from lit_rlhf.checkpoints import numbered

TIMES = {"ppo": 100, **{kind: 20 for kind in KINDS if kind != "ppo"}}
"""The number of SIGKILLs for each kind of run."""
AGAIN = 0.3
"""The probability that a resumed run is killed again."""


@dataclass
class Row:
    """What one fault did to one kind of run."""

    fault: str
    kind: str
    tried: int = 0
    survived: int = 0
    worst_loss: int = 0
    failures: list[str] = field(default_factory=list)

    def add(self, failures: list[str], loss: int = 0) -> None:
        """Count one time."""
        self.tried += 1
        self.survived += not failures
        self.worst_loss = max(self.worst_loss, loss)
        self.failures += failures


def lost(run: Path) -> int:
    """Return the number of complete iterations in a run's metrics that come after its last checkpoint."""
    done = max((float(row["progress/iteration"]) for row in metrics(run)), default=0.0)
    return int(done) - max(numbered(run / "checkpoints"), default=0)


def kill(setting: Setting, kind: str, times: int, draw: random.Random) -> Row:
    """Kill runs at random moments with SIGKILL, some of them again after they were resumed."""
    row, whole = Row("SIGKILL", kind), setting.whole(kind)
    while row.tried < times:
        name, killed, loss = f"{kind}-{row.tried}", False, 0
        while not killed or draw.random() < AGAIN:
            run = setting.start(kind, name, "--ckpt_path", "last")
            second, rank = draw.uniform(0.0, setting.seconds[kind]), draw.randrange(PROCESSES.get(kind, 1))
            sent = run.send_at(signal.SIGKILL, second, rank)
            if not sent:  # the machine is faster now
                setting.seconds[kind] = time.monotonic() - run.start
            elif len(run.processes) > 1:
                run.end_like_torchrun()
            run.wait()
            killed = killed or sent
            loss = max(loss, lost(setting.folder / name))
            if not sent and not killed:
                break
        if killed:
            setting.start(kind, name, "--ckpt_path", "last").end_well()
            row.add([f"{name}: {text}" for text in unequal(setting.folder / name, whole)], loss)
        _clear(setting.folder / name)
    return row


def in_phases(setting: Setting, kind: str, number: int, phases: Sequence[str] = PHASES) -> Row:
    """Send a signal in each phase of a run: it must end with the right status, and resume exactly."""
    row, whole = Row(signal.Signals(number).name + ", in each phase", kind), setting.whole(kind)
    for phase in phases:
        if phase in ("decoding", "judging", "updating") and not kind.startswith(("ppo", "trpo")):
            continue
        name = f"{kind}-{phase.replace(' ', '-')}-{number}"
        callback = {"class_path": "faults_phases.SignalIn", "init_args": {"phase": phase, "number": number}}
        words = ["--trainer.callbacks", json.dumps([callback]), "--checkpoint.every_n", "100"]
        words = words[:2] if number == signal.SIGKILL or phase == "saving" else words
        done = setting.start(kind, name, *words, PYTHONPATH=path_here()).wait()
        late = number == signal.SIGTERM and phase == "exporting"  # the run is complete
        status = 0 if late else TERMINATED if number == signal.SIGTERM else -number
        right = {status} if number == signal.SIGTERM or len(done) == 1 else {status, 1}  # 1: another process has died
        failures = [
            f"{name}: status {one.returncode}, {one.stderr[-300:]}" for one in done if one.returncode not in right
        ]
        loss = lost(setting.folder / name)
        if number == signal.SIGTERM and loss:
            failures.append(f"{name}: no checkpoint of the iteration in which the signal came")
        setting.start(kind, name, "--ckpt_path", "last").end_well()
        differing = unequal(setting.folder / name, whole)
        if number == signal.SIGTERM:  # which has saved one more checkpoint
            differing = [text for text in differing if not text.startswith("checkpoints")]
        row.add(failures + [f"{name}: {text}" for text in differing], loss)
        _clear(setting.folder / name)
    return row


def damage(setting: Setting, kind: str, draw: random.Random) -> Row:
    """Resume from damaged checkpoints: each must be refused in one line that names it."""
    row = Row("damaged checkpoint", kind)
    for what, path in damages(setting, kind, draw):
        failures = []
        for one in setting.start(kind, f"damaged-{kind}", "--ckpt_path", str(path)).wait():
            lines = messages(one.stderr)
            if one.returncode != 1 or len(lines) != 1 or path.name not in lines[0]:
                failures.append(f"{what}: status {one.returncode}: {lines}")
        if (path.parent / "ran").exists():
            failures.append(f"{what}: code from the checkpoint has run")
        row.add(failures)
    return row


def disk(setting: Setting, kind: str, times: int, draw: random.Random) -> Row:
    """Let the disk be full at random points: the run must end in one line, and resume exactly when there is room."""
    row, whole = Row("full disk", kind), setting.whole(kind)
    with small_disk(setting.folder / "disk") as folder:
        while row.tried < times:
            full, failures = fill(setting, kind, folder, draw)
            if full:
                row.add(failures + unequal(folder / "run", whole))
            shutil.rmtree(folder / "run")
    return row


def path_here() -> str:
    """Return a PYTHONPATH with which processes find the callback of this folder."""
    return os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])


def _clear(folder: Path) -> None:
    for one in folder.parent.glob(f"{folder.name}*"):
        shutil.rmtree(one, ignore_errors=True)


def table(rows: list[Row]) -> Table:
    """Return the rows as a table."""
    shown = Table("fault", "run", "times tried", "times survived", "worst loss, iterations")
    for row in rows:
        shown.add_row(row.fault, row.kind, str(row.tried), str(row.survived), str(row.worst_loss))
    return shown


def main() -> int:
    """Run the faults that the command line asks for, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    faults = ("kill", "phases", "damage", "disk")
    parser.add_argument("--only", nargs="+", choices=faults, default=faults, help="the faults to try")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS, help="the kinds of runs to interrupt")
    parser.add_argument("--times", type=int, help="the number of SIGKILLs for each kind, and of full disks")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="a file for the results, which is written after every row")
    options = parser.parse_args()
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        setting = Setting(Path(folder))
        for fault in options.only:
            for kind in options.kinds:
                draw = random.Random(f"{options.seed} {fault} {kind}")
                for row in run(setting, fault, kind, options.times, draw):
                    rows.append(row)
                    Console().print(
                        table(rows[-1:]), *(text[:400] for text in row.failures[:5]), sep="\n", markup=False
                    )
                    if options.json is not None:
                        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1))
    Console().print(table(rows))
    return 0 if all(row.survived == row.tried for row in rows) else 1


def run(setting: Setting, fault: str, kind: str, times: int | None, draw: random.Random) -> list[Row]:
    """Try one fault on one kind of run; some faults are tried on some kinds only."""
    if fault == "kill":
        return [kill(setting, kind, times or TIMES[kind], draw)]
    if fault == "phases":
        return [in_phases(setting, kind, number) for number in (signal.SIGKILL, signal.SIGTERM)]
    if fault == "damage" and kind in ("ppo", "ppo-fsdp2"):
        return [damage(setting, kind, draw)]
    if fault == "disk" and kind == "ppo":
        return [disk(setting, kind, times or 20, draw)]
    return []


if __name__ == "__main__":
    sys.exit(main())
