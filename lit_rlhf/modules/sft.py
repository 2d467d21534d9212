"""Supervised fine-tuning (SFT) of a language model on demonstrations."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor

from lit_rlhf.algorithms.masked import masked_mean
from lit_rlhf.batching import demonstration_micro_batches
from lit_rlhf.errors import UserError
from lit_rlhf.models.actor import Actor
from lit_rlhf.models.adapters import LoRA
from lit_rlhf.models.loading import ModelSource
from lit_rlhf.models.sharding import unsharded
from lit_rlhf.models.unpadded import keeps_texts_apart
from lit_rlhf.models.weights import with_weights
from lit_rlhf.modules.incident_rows import demonstration_records
from lit_rlhf.modules.module import AlignmentModule
from lit_rlhf.modules.roles import load_actor
from lit_rlhf.modules.steps import add_gradients, step_optimizers, within_memory
from lit_rlhf.modules.update import check_limits
from lit_rlhf.types import DemonstrationBatch


class SFT(AlignmentModule):
    """Maximises the likelihood of demonstrations.

    The loss is the mean of −log π(token | tokens before it) over the tokens to imitate, in nats per token; the metric
    ``perplexity`` is the exponential of the loss.

    Args:
        actor: The model to train: a folder, a hub id, or a configuration for random weights.
        max_tokens: The maximum number of tokens in a micro-batch; padding counts only if the model processes it. The
            number affects memory and speed only.
            On a single GPU, a step that runs out of memory halves this number for the rest of the run.
        clip_grad_norm: The maximum gradient norm, to which a larger gradient is scaled down; None for no clipping.
        optimizer: The optimizer of the model.
        scheduler: The learning-rate schedule, stepped after each optimizer step; None for a constant rate.
        iterations: The number of batches; None to leave the limit to the Trainer's max_epochs or max_steps.
        adapter: The options of a low-rank adapter to train instead of the whole model; None to train the whole model.

    Raises:
        ValueError: if a number is out of range.
        UserError: if no actor is given or iterations is less than 1; in ``configure_model``, if the actor cannot
            be loaded.

    >>> SFT(actor="Qwen/Qwen2.5-0.5B", iterations=100).iterations
    100
    """

    batch_type = DemonstrationBatch

    def __init__(
        self,
        actor: ModelSource = "",
        max_tokens: int = 8192,
        clip_grad_norm: float | None = 1.0,
        optimizer: OptimizerCallable = lambda p: torch.optim.AdamW(p, lr=1e-5, weight_decay=0.0, fused=True),
        scheduler: LRSchedulerCallable | None = None,
        iterations: int | None = None,
        adapter: LoRA | None = None,
    ) -> None:
        super().__init__(actor, iterations, {"actor": (optimizer, scheduler)}, adapter)
        check_limits(max_tokens, clip_grad_norm)
        self.automatic_optimization = False
        self.max_tokens = max_tokens
        self.clip_grad_norm = clip_grad_norm
        self._separates_packed_texts = False  # set by configure_model

    def configure_model(self) -> None:
        """Load the model; Lightning calls this method more than once, but only the first call loads the model.

        Raises:
            UserError: if the model cannot be loaded.
        """
        if not self.is_configured:
            self.actor = self.place(self._load_actor)
            self.train(self.training)

    def _load_actor(self) -> Actor:
        actor = load_actor(self.source, temperature=1.0, adapter=self.adapter)
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

    def training_step(self, batch: DemonstrationBatch, batch_idx: int) -> None:
        """Do one optimizer step on a batch; the loss is the mean over the tokens of all ranks.

        Raises:
            UserError: if the loss or the gradient norm is not finite, or if memory runs out (see `within_memory`).
        """
        part = within_memory(self, partial(self._add_gradients, batch), batch.lengths)
        records = partial(demonstration_records, self, batch)
        (norm,) = step_optimizers(self, self.clip_grad_norm, records, loss=part).values()
        self.step_schedulers()
        self.count_iteration()
        loss = self.sum_over_ranks(part)
        self.log_dict(
            {
                "train/grad_norm": norm,
                "train/perplexity": math.exp(min(float(loss), 50.0)),
                "progress/iteration": float(self.iteration),
            },
            batch_size=1,
        )
        self.log("train/loss", loss, prog_bar=True, batch_size=1)
        self.log_step()

    def _add_gradients(self, batch: DemonstrationBatch) -> Tensor:
        """Compute the gradient of a batch, and return this rank's part of the loss, [], in nats per token."""
        tokens = self.sum_over_ranks(batch.mask.sum().float()).clamp(min=1)

        def loss_of(micro_batch: DemonstrationBatch, counts: bool) -> Tensor:
            return -self._logprobs(micro_batch).sum() / tokens

        return add_gradients(self, demonstration_micro_batches(batch, self.max_tokens, self.actor.pads), loss_of)

    def _logprobs(self, batch: DemonstrationBatch) -> Tensor:
        return self.actor(batch.tokens, batch.mask, positions=batch.positions).logprobs

    @torch.no_grad()
    def validation_step(self, batch: DemonstrationBatch, batch_idx: int) -> None:
        """Add the loss of a batch to the held-out metrics."""
        with unsharded(self.actor):
            for micro_batch in demonstration_micro_batches(batch, self.max_tokens, self.actor.pads):
                loss = masked_mean(-self._logprobs(micro_batch), micro_batch.mask)
                self.held_out.add("loss", loss, micro_batch.mask.sum())

    def test_step(self, batch: DemonstrationBatch, batch_idx: int) -> None:
        """Add the loss of a batch to the test metrics, in the same way as ``validation_step``."""
        self.validation_step(batch, batch_idx)

    def summary(self, means: dict[str, float]) -> dict[str, float]:
        """Return the means with the perplexity, which is the exponential of the mean loss."""
        return means | {"perplexity": math.exp(min(means["loss"], 50.0))}
