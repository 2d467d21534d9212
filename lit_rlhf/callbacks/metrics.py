"""``metrics.csv`` in the run's folder."""

from pathlib import Path
from typing import Any

import lightning
from lightning.pytorch.trainer.states import TrainerFn

from lit_rlhf.callbacks.files import TableFile
from lit_rlhf.modules.module import iteration_of


class MetricsFile(lightning.Callback):
    """Writes a row an iteration, and one a validation, whatever logger is in use.

    A resumed run's file is cut back to the checkpoint's rows first, so it ends like that of a run never interrupted.

    Args:
        name: The file's name in the run's folder.
    """

    def __init__(self, name: str = "metrics.csv") -> None:
        self.name = name
        self.file: TableFile | None = None
        self._restored: dict[str, Any] | None = None

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Open the file, and cut it back if the run is resumed."""
        self.file = TableFile(Path(trainer.default_root_dir) / self.name)
        state = self._restored or {"columns": [], "rows": 0}
        if trainer.is_global_zero:
            self.file.restore(state["columns"], state["rows"])

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """A row of the iteration."""
        metrics = {k: v for k, v in trainer.callback_metrics.items() if not k.startswith("val/")}
        self._append(trainer, metrics)

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """A row of the validation."""
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            metrics = {k: v for k, v in trainer.callback_metrics.items() if k.startswith("val/")}
            self._append(trainer, {"progress/iteration": iteration_of(pl_module), **metrics})

    def state_dict(self) -> dict[str, Any]:
        """How much of the file belongs to the checkpoint."""
        return {"columns": self.file.columns, "rows": self.file.rows} if self.file else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Remember what to cut back to."""
        self._restored = state_dict or None

    def _append(self, trainer: lightning.Trainer, metrics: dict[str, Any]) -> None:
        if trainer.is_global_zero and self.file is not None and metrics:
            self.file.append({name: float(metrics[name]) for name in sorted(metrics)})
