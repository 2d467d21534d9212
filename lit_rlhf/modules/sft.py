"""Supervised fine-tuning (SFT) of a language model on demonstrations."""

from __future__ import annotations

import math
from typing import Any

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor

from lit_rlhf.algorithms.masked import masked_mean
from lit_rlhf.errors import UserError
from lit_rlhf.models.actor import Actor
from lit_rlhf.models.attention import keeps_texts_apart
from lit_rlhf.models.loading import ModelSource, load_model
from lit_rlhf.models.weights import with_weights
from lit_rlhf.modules.module import AlignmentModule
from lit_rlhf.modules.update import check_finite
from lit_rlhf.types import DemonstrationBatch


class SFT(AlignmentModule):
    """Maximises the likelihood of demonstrations.

    The loss is the mean of −log π(token | tokens before it) over the tokens to imitate, in nats per token; the metric
    ``perplexity`` is the exponential of the loss.

    Args:
        actor: The model to train: a folder, a hub id, or a configuration for random weights.
        optimizer: The optimizer of the model.
        scheduler: The learning-rate schedule, stepped after each optimizer step; None for a constant rate.
        iterations: The number of batches; None to leave the limit to the Trainer's max_epochs or max_steps.

    Raises:
        UserError: if the actor is not named or iterations is less than 1; in ``configure_model``, if the actor cannot
            be loaded.

    >>> SFT(actor="Qwen/Qwen2.5-0.5B", iterations=100).iterations
    100
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
        self._separates_packed_texts = False  # set by configure_model

    def configure_model(self) -> None:
        """Load the model; Lightning calls this method more than once, but only the first call loads the model."""
        if not self.is_configured:
            self.actor = self.place(self._load_actor)
            self.train(self.training)

    def _load_actor(self) -> Actor:
        actor = Actor(load_model(self.source, "causal", "model.actor"))
        self._separates_packed_texts = keeps_texts_apart(with_weights(actor.model))  # before a strategy rounds weights
        return actor

    def check_batch(self, batch: Any) -> None:
        """Check the type of the batch and, if its rows may hold several texts, that the model keeps those texts apart.

        Raises:
            UserError: if the batch has the wrong type, or if the model does not keep the texts of a row apart.
        """
        super().check_batch(batch)
        if batch.positions is not None and not self._separates_packed_texts:
            raise UserError(
                f"data.packing: {type(self.actor.model).__name__} does not keep packed texts apart; set it to false"
            )

    def training_step(self, batch: DemonstrationBatch, batch_idx: int) -> Tensor:
        """Return this rank's loss in nats; the mean over the ranks is the mean loss of the tokens of all ranks."""
        logprobs = self.actor(batch.tokens, batch.mask, positions=batch.positions).logprobs
        tokens = batch.mask.sum().float()
        if self.trainer.world_size > 1:  # the mean is over the tokens of all ranks
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
        """Add the loss of a batch to the held-out metrics."""
        loss = -self.actor(batch.tokens, batch.mask, positions=batch.positions).logprobs
        self.held_out.add("loss", masked_mean(loss, batch.mask), batch.mask.sum())

    def summary(self, means: dict[str, float]) -> dict[str, float]:
        """Return the means with the perplexity, which is the exponential of the mean loss."""
        return means | {"perplexity": math.exp(min(means["loss"], 50.0))}
