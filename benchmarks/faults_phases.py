"""A callback that sends its own process a signal in a given phase of a run."""

import os
import signal
import threading
from typing import Any

import lightning

from lit_rlhf.modules.hooks import OnPolicyCallback
from lit_rlhf.modules.module import iteration_of

PHASES = ("decoding", "judging", "updating", "validating", "saving", "epoch end", "exporting")


class SignalIn(OnPolicyCallback):
    """Sends a signal once, in a phase of a given iteration.

    Args:
        phase: One of `PHASES`.
        number: The number of the signal.
        iteration: The number of complete iterations after which the signal is due.
    """

    def __init__(self, phase: str, number: int = signal.SIGKILL, iteration: int = 4) -> None:
        assert phase in PHASES, phase
        self.phase, self.number, self.iteration = phase, number, iteration
        self.sent = False

    def _now(self, phase: str, module: lightning.LightningModule, delay: float = 0.0) -> None:
        due = self.phase == "exporting" or iteration_of(module) >= self.iteration
        if phase == self.phase and due and not self.sent:
            self.sent = True
            if delay:
                threading.Timer(delay, os.kill, (os.getpid(), self.number)).start()
            else:
                os.kill(os.getpid(), self.number)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Decoding begins."""
        self._now("decoding", pl_module, delay=0.01)

    def on_rollout_end(self, trainer: Any, pl_module: Any, rollout: Any) -> None:
        """Judging begins."""
        self._now("judging", pl_module)

    def on_advantages(self, trainer: Any, pl_module: Any, experience: Any) -> None:
        """The update begins."""
        self._now("updating", pl_module, delay=0.01)

    def on_validation_batch_start(self, trainer: Any, pl_module: Any, *batch: Any) -> None:
        """A validation begins."""
        self._now("validating", pl_module, delay=0.01)

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: Any) -> None:
        """A checkpoint is about to be written."""
        self._now("saving", pl_module, delay=0.002)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """An epoch has ended."""
        self._now("epoch end", pl_module)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """The export begins."""
        self._now("exporting", pl_module, delay=0.005)
