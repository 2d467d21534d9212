"""A callback that records the metrics, outputs and weights of a run."""

from typing import Any

import lightning
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


class Recorder(lightning.Callback):
    """A callback that keeps each iteration's metrics and ``training_step`` output, and the final weights."""

    def __init__(self) -> None:
        self.metrics: list[dict[str, float]] = []
        self.outputs: list[Any] = []
        self.weights: dict[str, Tensor] = {}

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Keep the iteration's metrics and the output of its ``training_step``."""
        self.metrics.append({name: float(value) for name, value in trainer.callback_metrics.items()})
        self.outputs.append(outputs)

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Keep an unsharded copy of the weights, except the weights of frozen models."""
        self.weights = {
            name: value.full_tensor() if isinstance(value, DTensor) else torch.clone(value)
            for name, value in pl_module.state_dict().items()
        }
