"""The runs that faults.py interrupts: their models, data and options, and the comparison with an uninterrupted run."""

from __future__ import annotations

import csv
import json
import os
import random
import signal
import sys
import time
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from lit_rlhf.checkpoints import read_checkpoint
from lit_rlhf.testing.models import WORDS, make_tiny_model
from lit_rlhf.testing.resuming import MEASURED, differences

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
import preloaded  # its processes are forks of one that has imported the package, and start at once

KINDS = ("ppo", "trpo", "dpo", "reward", "sft", "ppo-fsdp2")
ITERATIONS = 11
EVERY_N = 3
REWARD = "def reward(responses):\n    return [len(set(response.split())) / 10 for response in responses]\n"
COMMON = {
    "trainer.accelerator": "cpu",
    "trainer.enable_progress_bar": "false",
    "trainer.check_val_every_n_epoch": "null",
    "trainer.val_check_interval": "4",
    "checkpoint.every_n": str(EVERY_N),
    "checkpoint.keep_every_n": "5",
    "report.at_end": "false",
    "model.iterations": str(ITERATIONS),
    "data.train": "data.jsonl",
    "data.validation": "data.jsonl",
    "data.batch_size": "12",  # of 48 rows: iterations 4 and 8 end an epoch
}
ON_POLICY = {
    "data": "Prompts",
    "model.sampling.max_tokens": "8",
    "model.scores.normalize": "true",
    "model.rewards": '[{"class_path": "RewardFunction", "init_args": {"function": "reward.py:reward"}}]',
    "checkpoint.monitor": "val/score",
}
PPO = {
    "model": "PolicyGradient",
    **ON_POLICY,
    "model.kl": "AdaptiveKL",
    "model.update.epochs": "2",
    "model.update.minibatches": "2",
    "model.actor_optimizer": "AdamW",
    "model.actor_optimizer.lr": "0.001",
    "model.actor_scheduler": "ExponentialLR",
    "model.actor_scheduler.gamma": "0.9",
}
SCHEDULED = {
    "model.optimizer": "AdamW",
    "model.optimizer.lr": "0.001",
    "model.scheduler": "ExponentialLR",
    "model.scheduler.gamma": "0.9",
    "checkpoint.monitor": "val/loss",
    "checkpoint.mode": "min",
}
OPTIONS: dict[str, dict[str, str]] = {
    "ppo": PPO,
    "trpo": {"model": "TRPO", **ON_POLICY},
    "dpo": {"model": "DPO", "data": "Preferences", **SCHEDULED},
    "reward": {"model": "RewardModeling", "data": "Preferences", **SCHEDULED},
    "sft": {"model": "SFT", "data": "Demonstrations", "data.packing": "true", "data.max_tokens": "32", **SCHEDULED},
    "ppo-fsdp2": {**PPO, "trainer.strategy": "fsdp2", "trainer.devices": "2"},
}
PROCESSES = {"ppo-fsdp2": 2}


@dataclass(frozen=True)
class Setting:
    """A folder with a tiny model, data, and runs."""

    folder: Path
    seconds: dict[str, float] = field(default_factory=dict)
    """The duration of the uninterrupted run of each kind, in seconds."""

    @cached_property
    def model(self) -> Path:
        """The folder of the tiny model; the data of all kinds of runs are written beside it."""
        draw = random.Random(0)

        def text(low: int, high: int) -> str:
            return " ".join(f"w{draw.randrange(WORDS)}" for _ in range(draw.randint(low, high)))

        lengths = {"prompt": (2, 8), "chosen": (3, 10), "rejected": (3, 10), "response": (3, 10)}
        rows = [{name: text(*bounds) for name, bounds in lengths.items()} for _ in range(48)]
        (self.folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (self.folder / "reward.py").write_text(REWARD)
        return make_tiny_model(self.folder / "model")

    @cached_property
    def reward_model(self) -> Path:
        """The folder of the reward model from which the critics start."""
        return self.whole("reward") / "export"

    def words(self, kind: str, run: str) -> list[str]:
        """Return the command of a run of a kind in the folder ``run``."""
        options = COMMON | OPTIONS[kind] | {"trainer.default_root_dir": run}
        options["model.reward" if kind == "reward" else "model.actor"] = str(self.model)
        if OPTIONS[kind]["model"] == "PolicyGradient":
            options["model.critic"] = str(self.reward_model)
        first = ("model", "data", "model.kl", *(name for name in options if name.endswith(("optimizer", "scheduler"))))
        names = sorted(options, key=lambda name: name not in first)  # a class before its options
        return ["fit", *(word for name in names for word in (f"--{name}", options[name]))]

    def start(self, kind: str, run: str, *more: str, **environment: str) -> Run:
        """Start a run; with ``--ckpt_path last`` among ``more``, it resumes if it has begun before."""
        return Run(self.words(kind, run) + list(more), self.folder, PROCESSES.get(kind, 1), environment)

    def whole(self, kind: str) -> Path:
        """Return the folder of the run of a kind that is not interrupted, which runs when it is first asked for."""
        folder = self.folder / f"whole-{kind}"
        if not (folder / "export").exists():
            self.seconds[kind] = self.start(kind, folder.name).end_well()
        return folder


class Run:
    """A run in one process or several."""

    def __init__(self, words: list[str], folder: Path, processes: int, environment: dict[str, str]) -> None:
        shared = {preloaded.WITHOUT_PLANS: "1", **environment}
        if processes > 1:
            port = str(preloaded.free_port())
            shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "faults"}
            shared |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes), "GROUP_RANK": "0"}
        self.start = time.monotonic()
        self.processes = [
            preloaded.Program(
                *("-m", "lit_rlhf.cli"),
                *words,
                cwd=folder,
                **shared,
                **({"RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else {}),
            )
            for rank in range(processes)
        ]

    def send_at(self, number: int, second: float, rank: int = 0) -> bool:
        """Send a signal to a process when the run is so many seconds old; return whether the process still ran."""
        process = self.processes[rank]
        while process.is_running():
            if (late := time.monotonic() - self.start - second) >= 0:
                signal.pidfd_send_signal(os.pidfd_open(process.pid), number)
                return True
            time.sleep(min(0.02, -late))
        return False

    def end_like_torchrun(self, patience: float = 10.0) -> None:
        """Wait until the processes have ended; those that have not some seconds later are killed, as torchrun does."""
        end = time.monotonic() + patience
        while any(process.is_running() for process in self.processes) and time.monotonic() < end:
            time.sleep(0.05)
        for process in self.processes:
            process.kill()

    def wait(self, timeout: float = 240.0) -> list[preloaded.subprocess.CompletedProcess]:
        """Wait for the end of all processes, and return what each has done."""
        return [process.wait(timeout) for process in self.processes]

    def end_well(self) -> float:
        """Wait for the end, which must have the status 0, and return the duration in seconds."""
        for done in self.wait():
            assert done.returncode == 0, done.stderr[-3000:]
        return time.monotonic() - self.start


def messages(stderr: str) -> list[str]:
    """Return the lines of an output, except those that every run writes."""
    usual = (
        "Seed set to",
        "[rank: 0] Seed",
        "[rank: 1] Seed",
        "Restoring states from",
        "Restored all states from",
        "-----",
    )
    usual += ("Initializing distributed", "distributed_backend", "All distributed processes registered")
    return [line for line in stderr.splitlines() if line and not line.startswith(usual)]


def metrics(run: Path) -> list[dict[str, str]]:
    """Return the rows of a run's metrics, without times, speeds and memory; none if there is no file yet."""
    if not (run / "metrics.csv").exists():
        return []
    with (run / "metrics.csv").open(newline="") as file:
        return [{k: v for k, v in row.items() if not k.startswith(MEASURED)} for row in csv.DictReader(file)]


def unequal(run: Path, whole: Path) -> list[str]:
    """Return what differs between a run and the uninterrupted one: weights, optimizers, metrics, samples, export."""
    rows = metrics(run), metrics(whole)
    found = [f"metrics.csv has {len(rows[0])} rows, not {len(rows[1])}"] if len(rows[0]) != len(rows[1]) else []
    found += [text for pair in zip(*rows, strict=False) for text in differences(*pair, "metrics.csv")]
    names = sorted(path.name for path in (whole / "checkpoints").iterdir())
    others = sorted(path.name for path in (run / "checkpoints").iterdir())
    found += differences(others, names, "checkpoints")
    for name in set(names) & set(others):
        one, other = (read_checkpoint(folder / "checkpoints" / name) for folder in (run, whole))
        for part in ("state_dict", "optimizer_states", "lr_schedulers"):
            found += differences(one[part], other[part], f"{name} {part}")
    for path in [whole / "samples.jsonl", *(whole / "export").glob("*.safetensors")]:
        twin = run / path.relative_to(whole)
        if path.exists() and (not twin.exists() or path.read_bytes() != twin.read_bytes()):
            found.append(f"{path.name} differs")
    return found
