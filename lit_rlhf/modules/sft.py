"""Supervised fine-tuning: the model that everything else starts from."""

from __future__ import annotations

import math

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor

from lit_rlhf.algorithms.masked import masked_mean
from lit_rlhf.models.actor import Actor
from lit_rlhf.models.loading import ModelSource, load_model
from lit_rlhf.models.sharding import unsharded
from lit_rlhf.modules.module import AlignmentModule
from lit_rlhf.modules.update import check_finite
from lit_rlhf.types import DemonstrationBatch


class SFT(AlignmentModule):
    """Maximum likelihood on demonstrations: loss = −mean over the tokens that count of log π(token | those before).

    The loss is in nats a token; ``perplexity`` is its exponential.

    Args:
        actor: The model to train: a folder or hub id, or a configuration for random weights.
        optimizer: Its optimizer.
        scheduler: Its learning rate, stepped after each batch; None: constant.
        iterations: Stop after so many batches; None: the Trainer's max_epochs or max_steps decides.

    Raises:
        UserError: if the actor is not named, and in ``configure_model`` if it does not load.
    """

    batch_type = DemonstrationBatch

    def __init__(
        self,
        actor: ModelSource = "",
        optimizer: OptimizerCallable = lambda p: torch.optim.AdamW(p, lr=1e-5, weight_decay=0.0, fused=True),
        scheduler: LRSchedulerCallable | None = None,
        iterations: int | None = None,
    ) -> None:
        super().__init__(actor, iterations, {"actor": (optimizer, scheduler)})
        self._keeps_apart = False  # packed texts; checked once

    def configure_model(self) -> None:
        """Load the model; Lightning calls it, more than once."""
        if not self.is_configured:
            self.actor = self.shard(Actor(load_model(self.source, "causal", "model.actor")))
            self.train(self.training)

    def on_train_batch_start(self, batch: DemonstrationBatch, batch_idx: int) -> None:
        """Before the first step on packed texts: see that the model keeps them apart.

        Raises:
            UserError: if it does not.
        """
        super().on_train_batch_start(batch, batch_idx)
        if batch.positions is not None and not self._keeps_apart:
            with unsharded(self.actor):
                self.actor.check_packing()
            self._keeps_apart = True

    def training_step(self, batch: DemonstrationBatch, batch_idx: int) -> Tensor:
        """The batch's mean loss, in nats a token."""
        logprobs = self.actor(batch.tokens, batch.mask, positions=batch.positions).logprobs
        tokens = batch.mask.sum().float()
        if self.trainer.world_size > 1:  # each rank's share of the mean over all ranks' tokens
            tokens = self.trainer.strategy.reduce(tokens, reduce_op="mean")
        loss = -logprobs.sum() / tokens.clamp(min=1)
        check_finite(loss=loss)
        self.count_iteration()
        mean = self.trainer.strategy.reduce(loss.detach(), reduce_op="mean")
        self.log_dict(
            {"train/perplexity": math.exp(min(float(mean), 50.0)), "progress/iteration": float(self.iteration)},
            batch_size=1,
        )
        self.log("train/loss", mean, prog_bar=True, batch_size=1)
        return loss

    def validation_step(self, batch: DemonstrationBatch, batch_idx: int) -> None:
        """Add to the held-out loss."""
        loss = -self.actor(batch.tokens, batch.mask, positions=batch.positions).logprobs
        self.held_out.add("loss", masked_mean(loss, batch.mask), batch.mask.sum())

    def summary(self, means: dict[str, float]) -> dict[str, float]:
        """Loss and perplexity."""
        return means | {"perplexity": math.exp(min(means["loss"], 50.0))}
