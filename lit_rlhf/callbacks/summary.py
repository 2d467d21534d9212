"""A callback that prints a run's metrics, its files, and the commands that come next, at the end of the run."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import lightning
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.trainer.states import TrainerFn
from rich.console import Console
from rich.text import Text

from lit_rlhf.callbacks.checkpoint import IterationCheckpoint
from lit_rlhf.callbacks.export import ExportAtEnd
from lit_rlhf.callbacks.progress import number
from lit_rlhf.callbacks.terminal import clock, is_terminal
from lit_rlhf.modules import DPO, SFT, RewardModeling
from lit_rlhf.modules.module import AlignmentModule, iteration_of
from lit_rlhf.modules.on_policy import OnPolicy

SHOWN = {
    "score": ("objective/score", "val/score"),
    "KL": ("objective/kl_to_ref", "val/kl_to_ref"),
    "length": ("response/length", "val/length"),
    "loss": ("train/loss", "val/loss"),
    "accuracy": ("train/accuracy", "val/accuracy"),
    "win rate": ("val/win_rate",),
}
"""The training and validation metrics that each line of the summary shows, by the line's label."""
BOUNDS = {"val/win_rate_low", "val/win_rate_high", "val/reference_score"}
"""Further metrics on which the lines of the summary depend."""
UNITS = {"KL": "nats per response", "length": "tokens", "win rate": "against the reference"}
FILES = ("metrics.csv", "samples.jsonl", "report.html", "config.yaml", "checkpoints")


class Summary(lightning.Callback):
    """A callback that prints a few lines at the end of ``fit``: the metrics, the files, and the next commands.

    Each metric is given for the first and the last iteration, and for the first and the last validation. If the
    reference has the actor's initial weights, as it does by default, the first held-out values are the reference's: its
    score, and a KL of 0. In a resumed run, the first values are those from before the interruption.

    Args:
        next: Whether to print the commands that come next.

    >>> Summary(next=False).next
    False
    """

    def __init__(self, next: bool = True) -> None:  # noqa: A002 (the name of the option)
        self.next = next
        self.first: dict[str, float] = {}
        self._last: dict[str, float] = {}  # those of the checkpoint from which the run was resumed
        self._start, self._from = time.monotonic(), 0

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Store the time and the iteration at which this part of the run begins."""
        self._start, self._from = time.monotonic(), iteration_of(pl_module)

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Keep the metrics of the first iteration."""
        if iteration_of(pl_module) == 1:
            self._keep(trainer, "train")

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Keep the metrics of the first validation."""
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            self._keep(trainer, "val")

    def on_fit_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Print the summary on process 0."""
        assert isinstance(pl_module, AlignmentModule)
        if trainer.is_global_zero and trainer.state.fn == TrainerFn.FITTING:
            show([*self.reached(trainer, pl_module), *self.files(trainer, pl_module)])

    def on_exception(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, exception: BaseException
    ) -> None:
        """Print the checkpoint from which the run can be resumed, if the user has interrupted the run."""
        if not (isinstance(exception, KeyboardInterrupt) and trainer.is_global_zero):
            return
        saved = max((c.saved_iteration for c in _checkpoints(trainer)), default=0)
        last = f"the last checkpoint is that of iteration {saved}; --ckpt_path last resumes from it"
        none = "there is no checkpoint yet, since fewer than checkpoint.every_n iterations are complete"
        done = iteration_of(pl_module)
        when = f"after iteration {done}" if saved == done else f"in iteration {done + 1}"
        print(f"interrupted {when}: {last if saved else none}", flush=True)

    def state_dict(self) -> dict[str, Any]:
        """Return the metrics of the first iteration and the first validation."""
        return {"first": self.first}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the metrics of the first iteration and the first validation."""
        self.first = dict(state_dict["first"])

    def on_save_checkpoint(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Save the metrics of the last iteration and the last validation."""
        checkpoint["last_metrics"] = self.last(trainer)

    def on_load_checkpoint(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Restore the metrics of the last iteration and the last validation."""
        self._last = dict(checkpoint.get("last_metrics", {}))

    def last(self, trainer: lightning.Trainer) -> dict[str, float]:
        """Return the metrics of the last iteration and the last validation, those before the checkpoint included."""
        names = {name for names in SHOWN.values() for name in names} | BOUNDS
        found = {name: value for name, value in trainer.callback_metrics.items() if name in names}
        return self._last | {name: float(value) for name, value in found.items()}

    def reached(self, trainer: lightning.Trainer, module: AlignmentModule) -> list[tuple[str, str]]:
        """Return the lines about the training and its metrics, each as a label and a text."""
        last = self.last(trainer)
        done, seconds = iteration_of(module), time.monotonic() - self._start
        begun = "" if self._from == 0 else f" (after iteration {self._from})"
        lines = [("done", f"{type(module).__name__}, {done} iterations in {clock(seconds)}{begun}")]
        first = self.first | initial(module, last)
        for label, names in SHOWN.items():
            changes = [_change(name, first.get(name), last) for name in names if name in last]
            if changes and (label != "score" or "objective/score" in last):  # not a reward model's own scores
                lines.append((label, ", ".join(changes) + (f"  ({UNITS[label]})" if label in UNITS else "")))
        return lines

    def files(self, trainer: lightning.Trainer, module: AlignmentModule) -> list[tuple[str, str]]:
        """Return the lines about the run's model, its files and the next commands, each as a label and a text."""
        run, callbacks = Path(trainer.default_root_dir), trainer.callbacks  # type: ignore[attr-defined]
        found = ", ".join(name for name in FILES if (run / name).exists())
        lines = [("files", f"{run}: {found}")] if found else []
        export = next((run / c.name for c in callbacks if isinstance(c, ExportAtEnd)), None)
        if export is None or not export.exists():
            return lines
        lines.insert(0, ("model", str(export)))
        return [*lines, *(("next", command) for command in (following(trainer, module, export) if self.next else ()))]

    def _keep(self, trainer: lightning.Trainer, stage: str) -> None:
        names = [name for names in SHOWN.values() for name in names if name.startswith("val/") == (stage == "val")]
        for name in names:
            if name in trainer.callback_metrics:
                self.first.setdefault(name, float(trainer.callback_metrics[name]))


def _checkpoints(trainer: lightning.Trainer) -> list[IterationCheckpoint]:
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    return [callback for callback in callbacks if isinstance(callback, IterationCheckpoint)]


def initial(module: AlignmentModule, last: dict[str, float]) -> dict[str, float]:
    """Return the held-out metrics of the actor before the first iteration, which equal those of the reference.

    Args:
        module: The module that was trained.
        last: The metrics at the end.

    Returns:
        The metrics by name; none if the weights of the reference are not those of the initial actor, if the method is
        not on-policy, or if there was no validation.
    """
    same = isinstance(module, OnPolicy) and module.reference_source in (None, module.source)
    if not same or "val/reference_score" not in last:
        return {}
    return {"val/score": last["val/reference_score"], "val/kl_to_ref": 0.0}


def _change(name: str, first: float | None, last: dict[str, float]) -> str:
    if name == "val/win_rate":
        low, high = (number(last[f"{name}_{bound}"]) for bound in ("low", "high"))
        return f"{number(last[name])} held out, 95 % interval {low}–{high}"
    values = [number(last[name])] if first in (None, last[name]) else [number(first), number(last[name])]
    return " → ".join(values) + (" held out" if name.startswith("val/") else "")


def following(trainer: lightning.Trainer, module: AlignmentModule, export: Path) -> list[str]:
    """Return the commands that usually follow a run, except those that need a configuration that was not saved.

    Args:
        trainer: The Trainer; if the command line started the run, it has the callback that saves the configuration.
        module: The module that was trained.
        export: The folder of the exported model or adapter.
    """
    run, callbacks = Path(trainer.default_root_dir), trainer.callbacks  # type: ignore[attr-defined]
    adapter = "" if module.adapter is None else "_lora"
    if isinstance(module, SFT):
        return [
            f"lit-rlhf fit --config reward{adapter} --model.reward {export} --data.train pairs.jsonl",
            f"lit-rlhf fit --config dpo{adapter} --model.actor {export} --data.train pairs.jsonl",
        ]
    if isinstance(module, RewardModeling):
        reward = f"[{{class_path: RewardModel, init_args: {{model: {export}, normalize: true}}}}]"
        return [
            f"lit-rlhf fit --config ppo{adapter} --model.actor {module.source} --data.train prompts.jsonl "
            f"--model.critic reward --model.rewards '{reward}'"
        ]
    serve = [f"vllm serve {export if module.adapter is None else run / 'export_merged'}"]
    if not any(isinstance(callback, SaveConfigCallback) for callback in callbacks):
        return serve if module.adapter is None else []
    commands = [] if module.adapter is None else [f"lit-rlhf export {run} --merge"]
    last = next((path for c in _checkpoints(trainer) if (path := Path(str(c.dirpath), "last.ckpt")).exists()), None)
    if last is not None and not isinstance(module, DPO):
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        prompts = "" if getattr(data, "sources", {}).get("predict") else " --data.predict prompts.jsonl"
        commands.append(f"lit-rlhf predict --config {run / 'config.yaml'} --ckpt_path {last}{prompts}")
    return [*commands, *serve]


def show(lines: list[tuple[str, str]]) -> None:
    """Print lines, each with a label and a text; in a terminal, they are in colour, and long lines are not broken.

    >>> show([("done", "3 iterations"), ("model", "runs/ppo/export")])
    done      3 iterations
    model     runs/ppo/export
    """
    if not is_terminal():
        print(*(f"{label:<9} {text}" for label, text in lines), sep="\n", flush=True)
        return
    console = Console()
    for label, text in lines:
        style = {"done": "bold green", "next": "cyan"}.get(label, "")
        console.print(Text.assemble((f"{label:<9} ", "bold"), (text, style)), soft_wrap=True)
