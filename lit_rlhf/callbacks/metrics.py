"""A callback that writes the metrics to ``metrics.csv`` in the run's folder."""

from pathlib import Path
from typing import Any

import lightning
from lightning.pytorch.trainer.states import TrainerFn

from lit_rlhf.callbacks.files import TableFile
from lit_rlhf.modules.module import iteration_of


class MetricsFile(lightning.Callback):
    """A callback that writes one row of metrics per iteration and one per validation, whichever loggers a run has.

    When a run is resumed, the file is first truncated to the checkpoint's rows, so that the final file is the same as
    without the interruption.

    Args:
        name: The name of the file in the run's folder.

    >>> MetricsFile(name="rows.csv").name
    'rows.csv'
    """

    def __init__(self, name: str = "metrics.csv") -> None:
        self.name = name
        self.file: TableFile | None = None
        self._restored: dict[str, Any] | None = None

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Open the file, and keep only the checkpoint's rows, or no rows if the run is new."""
        self.file = TableFile(Path(trainer.default_root_dir) / self.name)
        state = self._restored or {"columns": [], "rows": 0}
        if trainer.is_global_zero:
            self.file.restore(state["columns"], state["rows"])

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Write the iteration's row."""
        metrics = {k: v for k, v in trainer.callback_metrics.items() if not k.startswith("val/") and k != "step"}
        self._append(trainer, metrics)

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Write the validation's row."""
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            metrics = {k: v for k, v in trainer.callback_metrics.items() if k.startswith("val/")}
            self._append(trainer, {"progress/iteration": iteration_of(pl_module), **metrics})

    def state_dict(self) -> dict[str, Any]:
        """Return the names of the columns and the number of rows written so far."""
        return {"columns": self.file.columns, "rows": self.file.rows} if self.file else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Store the names of the columns and the number of rows that the file keeps when training starts."""
        self._restored = state_dict or None

    def _append(self, trainer: lightning.Trainer, metrics: dict[str, Any]) -> None:
        if trainer.is_global_zero and self.file is not None and metrics:
            self.file.append({name: float(metrics[name]) for name in sorted(metrics)})
