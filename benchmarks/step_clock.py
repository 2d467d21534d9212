"""A callback that writes the time and the loss of each training step to a file; against_trl.py adds it to a run."""

import itertools
import json
import time
from pathlib import Path
from typing import Any

import lightning


class StepClock(lightning.Callback):
    """A callback that writes a JSON file with the seconds and the losses of the steps.

    The seconds of a step are those since the end of the step before, or, for the first step, since the start.

    Args:
        file: The path of the file.
    """

    def __init__(self, file: str) -> None:
        self.file = Path(file)
        self.ends: list[float] = []
        self.losses: list[float] = []

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Start the clock."""
        self.ends.append(time.perf_counter())

    def on_train_batch_end(self, trainer: lightning.Trainer, *_: Any) -> None:
        """Note the time and the loss."""
        self.ends.append(time.perf_counter())
        if "train/loss" in trainer.callback_metrics:
            self.losses.append(float(trainer.callback_metrics["train/loss"]))

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Write the file; the tokens are counted from the data."""
        seconds = [after - before for before, after in itertools.pairwise(self.ends)]
        self.file.write_text(json.dumps({"seconds": seconds, "losses": self.losses, "tokens": []}))
