"""A callback that saves checkpoints by iteration, not by epoch."""

import signal
import threading
from pathlib import Path
from typing import Any, Literal

import lightning
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn

from lit_rlhf.compat import validation_is_due
from lit_rlhf.errors import UserError
from lit_rlhf.modules.module import iteration_of


class IterationCheckpoint(ModelCheckpoint):
    """A callback that saves ``last.ckpt`` and numbered copies at intervals, and ``best.ckpt`` when a metric improves.

    A checkpoint is saved when an iteration is complete, which includes its validation if one is due. A run that is
    resumed with ``--ckpt_path last`` therefore continues exactly as if it had not been interrupted. On GPUs, exact
    continuation also needs ``--trainer.deterministic true``, because the backward pass of flash attention otherwise
    adds numbers in a varying order.

    Ctrl-C ends the run on all processes when the iteration is complete and ``last.ckpt`` is saved; a second Ctrl-C ends
    the run immediately.

    Args:
        every_n: The number of iterations between two saves of ``last.ckpt``, which is also saved at the end.
        keep_every_n: The number of iterations between two copies such as ``iteration-000010.ckpt``; None for no copies.
        monitor: The metric whose improvement saves ``best.ckpt``, for example ``val/score``; None for no ``best.ckpt``.
        mode: Whether the best value is the largest (``max``) or the smallest (``min``).
        dirpath: The folder of the checkpoints; None for ``checkpoints`` in the run's folder.

    Raises:
        ValueError: if ``every_n`` or ``keep_every_n`` is less than 1.
        UserError: during training, if there is no metric with the name ``monitor``.
        KeyboardInterrupt: after an iteration during which a process received Ctrl-C.

    >>> callback = IterationCheckpoint(every_n=20, monitor="val/loss", mode="min")
    >>> callback.every_n, callback.best is None
    (20, True)
    """

    def __init__(
        self,
        every_n: int = 10,
        keep_every_n: int | None = None,
        monitor: str | None = None,
        mode: Literal["max", "min"] = "max",
        dirpath: str | None = None,
    ) -> None:
        for name, value in (("every_n", every_n), ("keep_every_n", keep_every_n)):
            if value is not None and value < 1:
                raise ValueError(f"checkpoint.{name} must be 1 or more, not {value}")
        super().__init__(dirpath=dirpath, save_top_k=0, save_last=True)
        self.every_n = every_n
        self.keep_every_n = keep_every_n
        self.metric = monitor
        self.better = mode
        self.best: float | None = None
        self.saved_iteration = 0
        self.interrupted = False
        self._handler: Any = None  # the earlier handler of Ctrl-C, while this callback handles it

    def setup(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Set the folder to ``checkpoints`` in the run's folder if no folder was given."""
        if self.dirpath is None:
            self.dirpath = str(Path(trainer.default_root_dir) / "checkpoints")
        super().setup(trainer, pl_module, stage)

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Begin to handle Ctrl-C, which only the main thread can do."""
        self.interrupted = False
        if threading.current_thread() is threading.main_thread():
            self._handler = signal.signal(signal.SIGINT, self._interrupt)

    def _interrupt(self, *_: Any) -> None:
        self.interrupted = True
        self._restore_handler()
        print("Ctrl-C: the run ends after this iteration, with a checkpoint; a second Ctrl-C ends it now", flush=True)

    def _restore_handler(self) -> None:
        if self._handler is not None:
            signal.signal(signal.SIGINT, self._handler)
            self._handler = None

    def on_exception(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, exception: BaseException
    ) -> None:
        """Stop handling Ctrl-C."""
        self._restore_handler()

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save the checkpoints that are due after the iteration, unless a validation comes first."""
        if not validation_is_due(trainer):
            self._save(trainer, iteration_of(pl_module))

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Save the checkpoints that are due after the iteration and its validation, if the run is training."""
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            self._save(trainer, iteration_of(pl_module))

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Do nothing: checkpoints are saved by iteration, not by epoch."""

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Save ``last.ckpt`` if it does not contain the last iteration yet, and stop handling Ctrl-C."""
        self._restore_handler()
        if iteration_of(pl_module) > self.saved_iteration:
            self._write(trainer, "last.ckpt", iteration_of(pl_module))

    def state_dict(self) -> dict[str, Any]:
        """Return the best value of the metric so far, and the iteration of ``last.ckpt``."""
        return {"best": self.best, "saved_iteration": self.saved_iteration}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the best value of the metric, and the iteration of ``last.ckpt``."""
        self.best = state_dict["best"]
        self.saved_iteration = state_dict["saved_iteration"]

    def _save(self, trainer: lightning.Trainer, iteration: int) -> None:
        if self.metric is not None and self._is_best(trainer, self.metric):
            self._write(trainer, "best.ckpt", iteration)
        if self.keep_every_n is not None and iteration % self.keep_every_n == 0:
            self._write(trainer, f"iteration-{iteration:06d}.ckpt", iteration)
        interrupted = trainer.strategy.reduce_boolean_decision(self.interrupted, all=False)
        if iteration % self.every_n == 0 or trainer.should_stop or interrupted:
            self._write(trainer, "last.ckpt", iteration)
        if interrupted:
            raise KeyboardInterrupt

    def _is_best(self, trainer: lightning.Trainer, metric: str) -> bool:
        metrics = trainer.callback_metrics
        if metric not in metrics:
            validated = any(name.startswith("val/") for name in metrics)
            if metric.startswith("val/") and not validated:
                return False  # before the first validation
            raise UserError(f"checkpoint.monitor: there is no metric {metric!r}; the metrics are: {', '.join(metrics)}")
        value = float(metrics[metric])
        if self.best is not None and (value <= self.best if self.better == "max" else value >= self.best):
            return False
        self.best = value
        return True

    def _write(self, trainer: lightning.Trainer, name: str, iteration: int) -> None:
        assert self.dirpath is not None
        if name == "last.ckpt":
            self.saved_iteration = iteration
        trainer.save_checkpoint(str(Path(self.dirpath) / name))
