"""Checkpoints by iteration."""

from pathlib import Path
from typing import Any, Literal

import lightning
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn

from lit_rlhf.errors import UserError
from lit_rlhf.modules.module import iteration_of


class IterationCheckpoint(ModelCheckpoint):
    """Saves ``last.ckpt`` every n iterations and at the end, ``best.ckpt`` by a metric, and copies to keep.

    A checkpoint is taken after an iteration is complete: after its validation, where one is due. So what is resumed
    goes on exactly where the run stood, and ``--ckpt_path last`` finds it.

    Args:
        every_n: Iterations between two ``last.ckpt``.
        keep_every_n: Iterations between two ``iteration-000010.ckpt`` that stay; None: none stay.
        monitor: The metric of ``best.ckpt``, ``val/score`` for example; None: no best.
        mode: Whether more is better.
        dirpath: Where; None: ``checkpoints`` in the run's folder.
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

    def setup(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Find the folder."""
        if self.dirpath is None:
            self.dirpath = str(Path(trainer.default_root_dir) / "checkpoints")
        super().setup(trainer, pl_module, stage)

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save, unless the iteration's validation is still to come."""
        if not _validation_is_due(trainer):
            self._save(trainer, iteration_of(pl_module))

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Save after the iteration's validation."""
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            self._save(trainer, iteration_of(pl_module))

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Nothing: iterations count, not epochs."""

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Save what is not saved yet."""
        if iteration_of(pl_module) > self.saved_iteration:
            self._write(trainer, "last.ckpt", iteration_of(pl_module))

    def state_dict(self) -> dict[str, Any]:
        """The best so far."""
        return {"best": self.best, "saved_iteration": self.saved_iteration}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from the best so far."""
        self.best = state_dict["best"]
        self.saved_iteration = state_dict["saved_iteration"]

    def _save(self, trainer: lightning.Trainer, iteration: int) -> None:
        if self.metric is not None and self._is_best(trainer, self.metric):
            self._write(trainer, "best.ckpt", iteration)
        if self.keep_every_n is not None and iteration % self.keep_every_n == 0:
            self._write(trainer, f"iteration-{iteration:06d}.ckpt", iteration)
        if iteration % self.every_n == 0 or trainer.should_stop:
            self._write(trainer, "last.ckpt", iteration)

    def _is_best(self, trainer: lightning.Trainer, metric: str) -> bool:
        metrics = trainer.callback_metrics
        if metric not in metrics:
            validated = any(name.startswith("val/") for name in metrics)
            if metric.startswith("val/") and not validated:
                return False  # the first validation is still to come
            raise UserError(f"checkpoint.monitor: there is no metric {metric!r}; there are: {', '.join(metrics)}")
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


def _validation_is_due(trainer: lightning.Trainer) -> bool:
    """Whether Lightning will validate after this batch; it has no public question for it."""
    loop = trainer.fit_loop
    return any(trainer.num_val_batches) and bool(loop.epoch_loop._should_check_val_fx(loop._data_fetcher))  # type: ignore[arg-type]
