"""A callback that saves checkpoints by iteration and by time, and when a signal asks for one."""

import math
import os
import signal
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import lightning
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.trainer.states import TrainerFn

from lit_rlhf.checkpoints import AnyCheckpoint, link
from lit_rlhf.compat import validation_is_due
from lit_rlhf.errors import UserError
from lit_rlhf.files import remove
from lit_rlhf.modules.module import AlignmentModule, iteration_of

TERMINATED = 143
"""The exit status of a run that SIGTERM has ended after a checkpoint: 128 + 15, as shells report it."""

# what a signal, or the clock, asks for when the iteration is complete; the highest of all processes counts
_NOTHING, _SAVE, _INTERRUPT, _TERMINATE = range(4)
_REQUESTS = {signal.SIGUSR1: _SAVE, signal.SIGINT: _INTERRUPT, signal.SIGTERM: _TERMINATE}


class IterationCheckpoint(ModelCheckpoint):
    """A callback that saves checkpoints such as ``iteration-000010.ckpt``, of which ``last.ckpt`` names the newest.

    A checkpoint is saved when an iteration is complete, which includes its validation if one is due. A run that is
    resumed with ``--ckpt_path last`` therefore continues exactly as if it had not been interrupted. On GPUs, exact
    continuation also needs ``--trainer.deterministic true``, because the backward pass of flash attention otherwise
    adds numbers in a varying order.

    ``last.ckpt`` and ``best.ckpt`` are symbolic links to numbered checkpoints. They change only when the new checkpoint
    is whole and on the disk, and older checkpoints are removed only after that.

    These signals, sent to any process of the run, take effect on all processes when the iteration is complete:

    ===========  ====================================================================================
    SIGUSR1      a checkpoint is saved, and the run continues
    SIGTERM      a checkpoint is saved, and the run ends with exit status 143
    Ctrl-C       a checkpoint is saved, and the run ends; a second Ctrl-C ends the run immediately
    ===========  ====================================================================================

    A run that gets SIGTERM after its last iteration writes its export and ends as usual, with exit status 0.

    Args:
        every_n: The number of iterations between two checkpoints; there is also one at the end.
        every_minutes: The number of minutes after the latest checkpoint when another one is saved; None for no limit.
        keep_last: The number of the latest checkpoints to keep.
        keep_every_n: The number of iterations between two checkpoints that are kept for good; None for none.
        monitor: The metric whose improvement saves a checkpoint with the name ``best.ckpt``, for example ``val/score``,
            which is kept until the next improvement; None for no ``best.ckpt``.
        mode: Whether the best value is the largest (``max``) or the smallest (``min``).
        dirpath: The folder of the checkpoints; None for ``checkpoints`` in the run's folder.

    Raises:
        ValueError: if ``every_n``, ``keep_last`` or ``keep_every_n`` is less than 1, or if ``every_minutes`` is not
            positive.
        UserError: if ``monitor`` is a metric of the validation, but there is no data for validation; during training,
            if there is no metric with this name.
        KeyboardInterrupt: after an iteration during which a process received Ctrl-C.
        SystemExit: after an iteration during which a process received SIGTERM.

    >>> callback = IterationCheckpoint(every_n=20, monitor="val/loss", mode="min")
    >>> callback.every_n, callback.best is None
    (20, True)
    """

    def __init__(
        self,
        every_n: int = 10,
        every_minutes: float | None = None,
        keep_last: int = 2,
        keep_every_n: int | None = None,
        monitor: str | None = None,
        mode: Literal["max", "min"] = "max",
        dirpath: str | None = None,
    ) -> None:
        for name, value in (("every_n", every_n), ("keep_last", keep_last), ("keep_every_n", keep_every_n)):
            if value is not None and value < 1:
                raise ValueError(f"checkpoint.{name} must be 1 or more, not {value}")
        if every_minutes is not None and not every_minutes > 0:
            raise ValueError(f"checkpoint.every_minutes must be positive or null, not {every_minutes}")
        super().__init__(dirpath=dirpath, save_top_k=0, save_last=True)
        self.every_n = every_n
        self.every_minutes = every_minutes
        self.keep_last = keep_last
        self.keep_every_n = keep_every_n
        self.metric = monitor
        self.better = mode
        self.best: float | None = None
        self.best_iteration = 0
        self.saved_iteration = 0
        self.files: list[int] = []  # the iterations of the latest checkpoints and of the best one
        self._request = _NOTHING  # the highest request of the signals since the last iteration
        self._handlers: dict[int, Any] = {}  # the earlier handlers of the signals that this callback handles
        self._process = 0  # the process that handles the signals
        self._saved_at = time.monotonic()

    def setup(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Set the folder to ``checkpoints`` in the run's folder if none was given; write as `AnyCheckpoint` does.

        A plugin of the user's own for checkpoints is left as it is.

        Raises:
            UserError: if ``monitor`` is a metric of the validation, but the data module has no data for that.
        """
        sources = getattr(trainer.datamodule, "sources", {})  # type: ignore[attr-defined]
        without_validation = "validation" in sources and sources["validation"] is None
        if stage == "fit" and without_validation and self.metric is not None and self.metric.startswith("val/"):
            raise UserError(f"checkpoint.monitor is {self.metric!r}, but data.validation is not set")
        if self.dirpath is None:
            self.dirpath = str(Path(trainer.default_root_dir) / "checkpoints")
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = AnyCheckpoint()
        super().setup(trainer, pl_module, stage)

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Begin to handle signals.

        Raises:
            SystemExit: if the Trainer has received SIGTERM before; there is nothing new to save yet.
        """
        if trainer.received_sigterm:
            raise SystemExit(TERMINATED)
        self._request, self._process, self._saved_at = _NOTHING, os.getpid(), time.monotonic()
        if threading.current_thread() is threading.main_thread():  # no other thread may set handlers
            self._handlers = {number: signal.signal(number, self._note) for number in _REQUESTS}

    def teardown(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Forget the earlier handlers of the signals, which the Trainer has set again."""
        self._handlers = {}

    def on_exception(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, exception: BaseException
    ) -> None:
        """Stop handling signals."""
        self._restore_handlers(*self._handlers)

    def _note(self, number: int, _: Any) -> None:
        """Note what a signal asks for; a handler must not use ``print``, which the signal may have interrupted."""
        if os.getpid() != self._process:  # a process that the run has forked does what it would do otherwise
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        self._request = max(self._request, _REQUESTS[signal.Signals(number)])
        if number == signal.SIGINT:
            self._restore_handlers(number)
            with suppress(OSError):  # if the output is closed
                os.write(1, b"Ctrl-C: the run ends after this iteration, with a checkpoint; a second one ends it now\n")

    def _restore_handlers(self, *signals: int) -> None:
        for number in signals:
            if number in self._handlers:
                signal.signal(number, self._handlers.pop(number))

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save a checkpoint if one is due after the iteration, unless a validation comes first."""
        if not validation_is_due(trainer):
            self._save(trainer, pl_module)

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Save a checkpoint if one is due after the iteration and its validation, if the run is training."""
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            self._save(trainer, pl_module)

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Save a checkpoint if ``EarlyStopping`` ends the run here, and the last one lacks what an export needs."""
        assert isinstance(pl_module, AlignmentModule)
        if trainer.should_stop and pl_module.prepare_export():
            self._write(trainer, iteration_of(pl_module))

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Save a checkpoint of the last iteration unless there is one, and stop handling Ctrl-C."""
        self._restore_handlers(signal.SIGINT)
        if iteration_of(pl_module) > self.saved_iteration:
            self._write(trainer, iteration_of(pl_module))

    def state_dict(self) -> dict[str, Any]:
        """Return the metric, its best value so far with its iteration, and the iterations of the checkpoints."""
        return {
            "best": self.best,
            "metric": self.metric,
            "better": self.better,
            "best_iteration": self.best_iteration,
            "saved_iteration": self.saved_iteration,
            "files": list(self.files),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned; of another metric or mode, the best value says nothing."""
        own = self.metric, self.better
        if own == (state_dict.get("metric", self.metric), state_dict.get("better", self.better)):
            self.best = state_dict["best"]
        self.best_iteration = state_dict["best_iteration"]
        self.saved_iteration = state_dict["saved_iteration"]
        self.files = list(state_dict["files"])

    def _save(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        assert isinstance(module, AlignmentModule)
        iteration = iteration_of(module)
        improved = self.metric is not None and self._is_best(trainer, self.metric)
        if improved:
            self.best_iteration = iteration
        own, self._request = self._request, _NOTHING  # a signal during the save below counts in the next iteration
        if self.every_minutes is not None and time.monotonic() - self._saved_at >= 60 * self.every_minutes:
            own = max(own, _SAVE)
        request = module.max_over_ranks(own)[0] if trainer.world_size > 1 else own
        due = iteration % self.every_n == 0 or self._is_kept(iteration) or trainer.should_stop
        if improved or trainer.should_stop:
            module.prepare_export()
        if due or improved or request:
            self._write(trainer, iteration)
        if request == _INTERRUPT:
            raise KeyboardInterrupt
        if request == _TERMINATE:
            if trainer.is_global_zero:
                print(f"SIGTERM: ended after iteration {iteration}; --ckpt_path last resumes the run", flush=True)
            raise SystemExit(TERMINATED)

    def _is_kept(self, iteration: int) -> bool:
        return self.keep_every_n is not None and iteration % self.keep_every_n == 0

    def _is_best(self, trainer: lightning.Trainer, metric: str) -> bool:
        metrics = trainer.callback_metrics
        if metric not in metrics:
            validated = any(name.startswith("val/") for name in metrics)
            if metric.startswith("val/") and not validated:
                return False  # before the first validation
            raise UserError(f"checkpoint.monitor: there is no metric {metric!r}; the metrics are: {', '.join(metrics)}")
        value = float(metrics[metric])
        if math.isnan(value):  # a reward failed for all responses, for example
            return False
        if self.best is not None and (value <= self.best if self.better == "max" else value >= self.best):
            return False
        self.best = value
        return True

    def _write(self, trainer: lightning.Trainer, iteration: int) -> None:
        """Save a checkpoint, then let the links name it, then remove the checkpoints that are no longer needed."""
        assert self.dirpath is not None
        folder = Path(self.dirpath)
        self.saved_iteration = iteration
        self.files = [number for number in self.files if number != iteration] + [iteration]
        trainer.save_checkpoint(folder / _name(iteration))
        self._saved_at = time.monotonic()
        needed = {self.best_iteration, *self.files[-self.keep_last :]}
        old = [number for number in self.files if number not in needed and not self._is_kept(number)]
        self.files = [number for number in self.files if number in needed]
        if trainer.is_global_zero:
            link(folder / "last.ckpt", _name(iteration))
            if self.best_iteration == iteration:
                link(folder / "best.ckpt", _name(iteration))
            for number in old:
                remove(folder / _name(number))


def _name(iteration: int) -> str:
    return f"iteration-{iteration:06d}.ckpt"
