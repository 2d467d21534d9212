"""Direct preference optimization: the policy itself is the reward model."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor
from torch.nn.functional import pad

from lit_rlhf.algorithms.kl import k1
from lit_rlhf.algorithms.masked import masked_sum
from lit_rlhf.algorithms.preferences import implicit_reward
from lit_rlhf.batching import preference_micro_batches
from lit_rlhf.data.prompts import left_pad
from lit_rlhf.generation import Engine, NativeEngine, Sampling
from lit_rlhf.generation.engine import SpecialTokens, find_special_tokens
from lit_rlhf.models.actor import Actor
from lit_rlhf.models.loading import ModelSource
from lit_rlhf.models.sharding import unsharded
from lit_rlhf.modules.module import keep_out_of_checkpoints
from lit_rlhf.modules.preference import PreferenceModule
from lit_rlhf.modules.roles import load_roles
from lit_rlhf.randomness import Stream
from lit_rlhf.types import PreferenceBatch, PromptBatch


class DPO(PreferenceModule):
    """Raises the likelihood of better responses against worse ones, held to a reference.

    A response's score is its implicit reward, β (log π(y|x) − log π_ref(y|x)); the loss on pairs is
    −log σ(score_chosen − score_rejected), on rankings Plackett–Luce's. Held-out metrics are those of reward modelling
    on implicit rewards, and the KL to the reference, in nats a response, on responses to the held-out prompts that
    the actor samples.

    Source: Rafailov et al. 2023 (arXiv 2305.18290), equation 7 and, for rankings, equation 20.

    Args:
        actor: The model to train: a folder or hub id, or a configuration for random weights.
        reference: The frozen model; None: the actor as it is at the start.
        beta: β > 0, in units of reward a nat: larger stays nearer to the reference.
        label_smoothing: ε in [0, 0.5): the share of pairs taken to be the wrong way round.
        cache_reference: Compute the reference's log-probabilities of all training responses once, before the first
            step; False: on the fly, every epoch again.
        sampling: How responses to held-out prompts are drawn; the temperature divides all logits.
        engine: What draws them.
        max_tokens: Padded tokens of a micro-batch at most; changes memory and speed, never the result.
        clip_grad_norm: Largest gradient norm; None: unbounded.
        optimizer: Its optimizer.
        scheduler: Its learning rate, stepped after each batch; None: constant.
        iterations: Stop after so many batches; None: the Trainer's max_epochs decides.

    Raises:
        ValueError: if a number is out of range.
        UserError: if the actor is not named, and in ``configure_model`` for models that do not load.
    """

    reference: Actor  # there from configure_model on, frozen

    def __init__(
        self,
        actor: ModelSource = "",
        reference: ModelSource | None = None,
        beta: float = 0.1,
        label_smoothing: float = 0.0,
        cache_reference: bool = True,
        sampling: Sampling = Sampling(),
        engine: Engine = NativeEngine(),
        max_tokens: int = 8192,
        clip_grad_norm: float | None = 1.0,
        optimizer: OptimizerCallable = lambda p: torch.optim.AdamW(p, lr=1e-6, weight_decay=0.0, fused=True),
        scheduler: LRSchedulerCallable | None = None,
        iterations: int | None = None,
    ) -> None:
        super().__init__(
            source=actor,
            label_smoothing=label_smoothing,
            max_tokens=max_tokens,
            clip_grad_norm=clip_grad_norm,
            optimizer=optimizer,
            scheduler=scheduler,
            iterations=iterations,
        )
        if not 0.0 < beta < float("inf"):
            raise ValueError(f"model.beta must be positive, not {beta}")
        if not sampling.temperature > 0:
            raise ValueError("model.sampling.temperature must be positive: it divides the logits of both models")
        self.reference_source = reference
        self.beta = beta
        self.cache_reference = cache_reference
        self.sampling = sampling
        self.engine = engine
        self._cached: Tensor | None = None  # [rankings of the training set, K], the responses' log-probabilities
        keep_out_of_checkpoints(self, ("reference.",))

    def configure_model(self) -> None:
        """Load actor and reference; Lightning calls it, more than once."""
        if self.is_configured:
            return
        roles = load_roles(
            self.source,
            None,
            self.reference_source,
            rewards=[],
            temperature=self.sampling.temperature or 1.0,
            value_grad_scale=1.0,
        )
        self.actor, self.reference = self.shard(roles.actor), self.shard(roles.reference)
        self.train(self.training)

    @cached_property
    def special_tokens(self) -> SpecialTokens:
        """The tokens that end a response, and the padding token."""
        return find_special_tokens(self.actor, self.tokenizer, self.sampling.stop)

    def scores(self, batch: PreferenceBatch) -> Tensor:
        """The implicit reward of each response, [N]."""
        logprobs = self.actor(batch.tokens, batch.response_tokens_mask).logprobs.sum(1)
        return implicit_reward(logprobs, self._reference_logprobs(batch), self.beta)

    @torch.no_grad()
    def _reference_logprobs(self, batch: PreferenceBatch) -> Tensor:
        """Of each response, [N]."""
        if self._cached is not None and self.trainer.training:
            return self._cached[batch.number, : batch.mask.shape[1]][batch.mask]
        return self._reference_forward(batch)

    def _reference_forward(self, batch: PreferenceBatch) -> Tensor:
        return self.reference(batch.tokens, batch.response_tokens_mask).logprobs.sum(1)

    @torch.no_grad()
    def on_train_start(self) -> None:
        """Fill the cache, in batches of the file's order: the same bits on any number of ranks and after a resume."""
        if not self.cache_reference:
            return
        loader: Any = self.trainer.train_dataloader
        table = torch.zeros(len(loader.records), 2, device=self.device)
        with unsharded(self.reference):
            for number, batch in enumerate(loader.once(whole=True)):
                self.check_batch(batch)
                table = pad(table, (0, max(0, batch.mask.shape[1] - table.shape[1])))
                if number % self.trainer.world_size != self.trainer.global_rank:
                    continue
                for micro_batch in preference_micro_batches(batch.to(self.device), self.max_tokens):
                    logprobs = micro_batch.by_ranking(self._reference_forward(micro_batch))
                    table[micro_batch.number, : logprobs.shape[1]] = logprobs
        self._cached = self.sum_over_ranks(table)

    @torch.no_grad()
    def validation_step(self, batch: PreferenceBatch, batch_idx: int) -> None:
        """The held-out preferences, and the KL on responses that the actor draws to their prompts."""
        super().validation_step(batch, batch_idx)
        (without,) = self.max_over_ranks(sum(not prompt for prompt in batch.prompts))
        if without:
            return
        tokens, mask = left_pad(batch.prompts, self.special_tokens.pad)
        prompts = PromptBatch(
            tokens=tokens.to(self.device),
            mask=mask.to(self.device),
            group=batch.number,
            prompts=["" for _ in batch.prompts],
            columns={},
        )
        rollout = self.engine.generate(
            self.actor, prompts, self.sampling, self.special_tokens, stream=Stream.VALIDATION, iteration=0
        )
        with unsharded(self.actor, self.reference):
            ours, theirs = (
                rollout.at_responses(model(rollout.tokens, rollout.response_tokens_mask).logprobs)
                for model in (self.actor, self.reference)
            )
        self.held_out.add("kl_to_ref", masked_sum(k1(ours, theirs), rollout.response_mask, 1))
        self.held_out.add("length", rollout.response_lengths)
