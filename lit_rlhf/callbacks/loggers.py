"""A callback that passes more than metrics to the loggers: samples, histograms, and the exported model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from lit_rlhf.callbacks.details import Detail
from lit_rlhf.callbacks.export import ExportAtEnd
from lit_rlhf.callbacks.logged_rows import continue_logs, read_rows
from lit_rlhf.callbacks.logged_runs import LOGGED, note_logged
from lit_rlhf.modules.hooks import OnPolicyCallback
from lit_rlhf.modules.module import iteration_of
from lit_rlhf.types import Experience, ScoredRollout, Trajectory

COLUMNS = ("iteration", "stage", "prompt", "response", "terminated", "score")
BINS = 64
RECENT = 32
"""The number of tables and histograms that a checkpoint holds, because a killed process may not have logged them."""


class LogDetails(OnPolicyCallback):
    """A callback that gives the loggers more than metrics: samples, histograms and, on request, the exported model.

    ==============  ============================  ===============================  ==================
    logger          samples                       histograms                       exported model
    ==============  ============================  ===============================  ==================
    W&B             a table                       yes                              an artifact
    TensorBoard     a table, as text              yes                              no
    MLflow          a table, as a Markdown file   no                               no
    ==============  ============================  ===============================  ==================

    Each sample has its score, every reward, and the KL to any reference. The samples are the responses of process 0
    that the callback `Samples` writes. The histograms show the scores, the lengths, the advantages and, if they are
    computed, the ratios π_actor / π_engine of the responses on all processes. The x-axis is the iteration.

    A run that is resumed continues in the loggers without gaps and without doubles: TensorBoard and CSV files drop what
    was logged after the checkpoint, and W&B and MLflow get only what they do not have.

    Args:
        every_n: The number of iterations between two logs of samples and histograms, which are also logged in the first
            iteration; samples are logged in every validation too. 0 to log no samples and no histograms.
        model: Whether to upload the exported model or adapter to W&B at the end, as an artifact.

    Raises:
        ValueError: if ``every_n`` is negative.

    >>> LogDetails(every_n=50).model
    False
    """

    def __init__(self, every_n: int = 10, model: bool = False) -> None:
        if every_n < 0:
            raise ValueError(f"details.every_n must be 1 or more, or 0 for nothing, not {every_n}")
        self.every_n = every_n
        self.model = model
        self._recent: list[Detail] = []
        self._continued: list[Logger] = []  # the loggers that continue what they had of the run

    # ------------------------------------------------------------------ the x-axis

    def setup(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Make the iteration the x-axis in W&B, and store the ids of the loggers' runs in a file."""
        if stage != "fit" or not trainer.is_global_zero:
            return
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.experiment.define_metric("progress/iteration")
                logger.experiment.define_metric("*", step_metric="progress/iteration", step_sync=True)
        self._continued = note_logged(Path(trainer.default_root_dir) / LOGGED, trainer.loggers)

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Make the loggers continue without gaps and without doubles, if the run is resumed."""
        if trainer.is_global_zero and trainer.ckpt_path is not None and self._continued:
            rows = read_rows(Path(trainer.default_root_dir, "metrics.csv"))
            continue_logs(self._continued, rows, self._recent, iteration_of(pl_module))

    def state_dict(self) -> dict[str, Any]:
        """Return the latest samples and histograms."""
        return {"recent": [tuple(detail) for detail in self._recent]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the latest samples and histograms."""
        self._recent = [Detail(*values) for values in state_dict["recent"]]

    # ----------------------------------------------------------- samples, histograms

    def on_samples(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, records: Sequence[Mapping[str, Any]]
    ) -> None:
        """Log the samples that the callback `Samples` writes; training samples are logged only if they are due."""
        if not records or not self.every_n or not trainer.is_global_zero:
            return
        iteration, stage = records[0]["iteration"], records[0]["stage"]
        if stage == "train" and not self._is_due(iteration):
            return
        columns, rows = table(records)
        self._log(trainer, Detail("table", f"samples/{stage}", columns, rows, iteration))

    def on_rewards(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        scored: ScoredRollout,
        trajectory: Trajectory,
    ) -> None:
        """Log histograms of the scores, the response lengths and the ratios π_actor / π_engine, if they are due."""
        if self._draws(trainer, pl_module):
            self._log_histogram(trainer, pl_module, "scores", scored.scores)
            self._log_histogram(trainer, pl_module, "lengths", scored.rollout.response_lengths)
            if trajectory.ratios is not None:
                self._log_histogram(trainer, pl_module, "actor_to_engine", trajectory.ratios, trajectory.mask)

    def on_advantages(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, experience: Experience
    ) -> None:
        """Log a histogram of the advantages, if histograms are due."""
        if self._draws(trainer, pl_module):
            mask = experience.rollout.response_mask
            self._log_histogram(trainer, pl_module, "advantages", experience.advantages, mask)

    def _is_due(self, iteration: int) -> bool:
        return iteration == 1 or iteration % self.every_n == 0

    def _draws(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> bool:
        """Return whether histograms are due in this iteration; the answer is the same on all processes."""
        if not self.every_n or not any(isinstance(x, WandbLogger | TensorBoardLogger) for x in trainer.loggers):
            return False
        return self._is_due(iteration_of(module) + 1)

    def _log_histogram(
        self,
        trainer: lightning.Trainer,
        module: lightning.LightningModule,
        name: str,
        values: Tensor,
        mask: Tensor | None = None,
    ) -> None:
        values = values.detach().float()
        valid = values.isfinite() if mask is None else values.isfinite() & mask
        counts, edges = histogram(values[valid], trainer.strategy)
        if trainer.is_global_zero and any(counts):
            self._log(trainer, Detail("histogram", f"histograms/{name}", counts, edges, iteration_of(module) + 1))

    def _log(self, trainer: lightning.Trainer, detail: Detail) -> None:
        for logger in trainer.loggers:
            detail.log(logger)
        self._recent = [*self._recent, detail][-RECENT:] if trainer.loggers else []

    # ------------------------------------------------------------------- the model

    def on_fit_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Upload the exported model or adapter to W&B, if the option ``model`` is set."""
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        exports = [Path(trainer.default_root_dir) / c.name for c in callbacks if isinstance(c, ExportAtEnd)]
        if not self.model or trainer.state.fn != TrainerFn.FITTING or not trainer.is_global_zero:
            return
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger) and exports and exports[0].exists():
                import wandb

                artifact = wandb.Artifact(
                    f"model-{logger.version}", type="model", metadata={"iterations": iteration_of(pl_module)}
                )
                artifact.add_dir(str(exports[0]))
                logger.experiment.log_artifact(artifact, aliases=["latest"])


def table(records: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[Any]]]:
    """Return the column names and the rows of a table of samples; each reward has a column of its own.

    >>> sample = {"iteration": 1, "stage": "val", "prompt": "2 + 2", "response": " 4", "terminated": True, "score": 1.0}
    >>> columns, rows = table([sample | {"rewards": {"exact": 1.0}, "kl_to_ref": 0.5}])
    >>> columns[5:], rows[0][5:]
    (['score', 'rewards/exact', 'kl_to_ref'], [1.0, 1.0, 0.5])
    """
    names, kl = list(records[0]["rewards"]), [name for name in ("kl_to_ref",) if name in records[0]]
    columns = [*COLUMNS, *(f"rewards/{name}" for name in names), *kl]
    rows = [
        [
            *(record[column] if column != "prompt" else str(record[column]) for column in COLUMNS),
            *(record["rewards"][name] for name in names),
            *(record[name] for name in kl),
        ]
        for record in records
    ]
    return columns, rows


def histogram(values: Tensor, strategy: Any) -> tuple[list[float], list[float]]:
    """Count the values of all processes in bins of equal width; all processes call this function together.

    Args:
        values: The values of this process, a tensor of one dimension, possibly empty.
        strategy: The Trainer's strategy.

    Returns:
        The counts of the ``BINS`` bins, and the ``BINS`` + 1 edges of the bins.
    """
    empty = torch.full((1,), -torch.inf, device=values.device)
    ends = torch.stack([torch.cat([-values, empty]).max(), torch.cat([values, empty]).max()])
    low, high = strategy.reduce(ends, reduce_op="max").tolist()
    low, high = (0.0, 0.0) if high == -torch.inf else (-low, high)
    margin = 0.5 if low == high else 0.0
    low, high = low - margin, high + margin
    places = ((values - low) / (high - low) * BINS).long().clamp(0, BINS - 1)
    counts = torch.zeros(BINS, device=values.device).scatter_add_(0, places, torch.ones_like(values))
    return strategy.reduce(counts, reduce_op="sum").tolist(), torch.linspace(low, high, BINS + 1).tolist()
