"""Direct preference optimization (DPO): the policy itself is the reward model."""

from __future__ import annotations

from functools import cached_property, partial
from typing import Any

import lightning
import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor
from torch.nn.functional import pad

from lit_rlhf.algorithms.kl import k1
from lit_rlhf.algorithms.masked import masked_sum
from lit_rlhf.algorithms.preference_losses import PreferenceLoss
from lit_rlhf.algorithms.preferences import implicit_reward
from lit_rlhf.data.loader import ResumableLoader
from lit_rlhf.data.prompts import left_pad
from lit_rlhf.errors import UserError
from lit_rlhf.generation import Engine, NativeEngine, Sampling
from lit_rlhf.generation.engine import SpecialTokens, find_special_tokens
from lit_rlhf.models.actor import Actor
from lit_rlhf.models.adapters import LoRA
from lit_rlhf.models.loading import ModelSource
from lit_rlhf.models.sharding import unsharded
from lit_rlhf.modules.adapted_roles import load_adapted_roles
from lit_rlhf.modules.engine_run import EngineRun
from lit_rlhf.modules.forwards import response_logprobs
from lit_rlhf.modules.frozen import keep_out_of_checkpoints
from lit_rlhf.modules.incidents import check_sampled
from lit_rlhf.modules.preference import PreferenceModule, pairs
from lit_rlhf.modules.roles import RoleSources, load_actor, load_roles
from lit_rlhf.progress import track
from lit_rlhf.randomness import Stream
from lit_rlhf.types import PreferenceBatch, PromptBatch


class DPO(PreferenceModule):
    """Makes better responses more likely relative to worse ones, and keeps the policy close to a reference.

    The score of a response is its implicit reward, β (log π(y|x) − log π_ref(y|x)). The loss of a pair is
    −log σ(score_chosen − score_rejected − margin), where the margin is 0 unless the data has one; the loss of a ranking
    is the Plackett–Luce loss. The option ``loss`` selects another loss. The held-out metrics are the same as in reward
    modelling, computed from these scores. In addition, the actor samples responses to the held-out prompts; further
    metrics are the length of these responses in tokens and their KL to the reference in nats per response.

    Source: Rafailov et al. 2023 (arXiv 2305.18290), equation 7 and, for rankings, equation 20.

    Args:
        actor: The model to train: a folder, a hub id, or a configuration for random weights.
        reference: The frozen reference model, given in the same way as the actor; None for the initial actor.
        beta: β > 0, in units of reward per nat; a larger value keeps the policy closer to the reference.
        loss: The loss of a pair: ``IPO``, ``Hinge`` or ``SimPO``; the loss of a ranking is then the mean over all its
            pairs. None for the Bradley–Terry loss on pairs and the Plackett–Luce loss on rankings.
        label_smoothing: ε in [0, 0.5), the assumed fraction of pairs that are in the wrong order.
        cache_reference: Whether to compute the reference's log-probabilities of all training responses once, before the
            first step, instead of in every epoch.
        sampling: How responses to held-out prompts are sampled. The temperature divides the logits in training too.
        engine: The engine that samples the responses to held-out prompts.
        max_tokens: The maximum number of tokens in a micro-batch. A prompt counts once for all its responses, and
            padding only if the model processes it. The number affects memory and speed only.
            On a single GPU, a step that runs out of memory halves this number for the rest of the run.
        clip_grad_norm: The maximum gradient norm, to which a larger gradient is scaled down; None for no clipping.
        optimizer: The optimizer of the actor.
        scheduler: The learning-rate schedule, stepped after each batch; None for a constant rate.
        iterations: The number of batches; None to leave the limit to the Trainer's max_epochs.
        adapter: The options of a low-rank adapter to train instead of the whole model; None to train the whole model.

    Raises:
        ValueError: if a number is out of range, or if label smoothing is combined with ``loss``.
        UserError: if the actor is not named or iterations is less than 1; in ``configure_model``, if a model cannot be
            loaded or the two vocabularies differ in size.

    >>> DPO(actor="runs/sft/export", beta=0.05).beta
    0.05
    """

    reference: Actor  # set by configure_model, frozen

    def __init__(
        self,
        actor: ModelSource = "",
        reference: ModelSource | None = None,
        beta: float = 0.1,
        loss: PreferenceLoss | None = None,
        label_smoothing: float = 0.0,
        cache_reference: bool = True,
        sampling: Sampling = Sampling(),
        engine: Engine = NativeEngine(),
        max_tokens: int = 8192,
        clip_grad_norm: float | None = 1.0,
        optimizer: OptimizerCallable = lambda p: torch.optim.AdamW(p, lr=1e-6, weight_decay=0.0, fused=True),
        scheduler: LRSchedulerCallable | None = None,
        iterations: int | None = None,
        adapter: LoRA | None = None,
    ) -> None:
        super().__init__(
            source=actor,
            adapter=adapter,
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
        if loss is not None and label_smoothing:
            raise ValueError(
                f"model.label_smoothing must be 0 with model.loss {type(loss).__name__}, not {label_smoothing}"
            )
        self.reference_source = reference
        self.beta = beta
        self.preference_loss = loss
        self.cache_reference = cache_reference
        self.sampling = sampling
        self.engine = engine
        self.engine_run = EngineRun(engine, partial(load_actor, actor, sampling.temperature, adapter))
        self._cached: Tensor | None = None  # [rankings of the training set, K], the reference's log-probabilities
        keep_out_of_checkpoints(self, ("reference.",))

    def configure_callbacks(self) -> list[lightning.Callback]:
        """Return the module's callback, which starts and closes the engine."""
        return [self.engine_run]

    def configure_model(self) -> None:
        """Load the actor and the reference.

        Lightning calls this method more than once, but only the first call loads the models.

        Raises:
            UserError: if a model cannot be loaded, or the two models have vocabularies of different sizes.
        """
        if self.is_configured:
            return
        sources = RoleSources(
            actor=self.source,
            critic=None,
            reference=self.reference_source,
            temperature=self.sampling.temperature,
            adapter=self.adapter,
        )
        roles = (load_roles if self.adapter is None else load_adapted_roles)(sources, place=self.place)
        assert roles.reference is not None
        self.actor, self.reference = roles.actor, roles.reference
        self.train(self.training)

    @property
    def uses_reference(self) -> bool:
        """Whether the loss depends on the reference; if not, the reference only serves to measure the KL."""
        return self.preference_loss is None or self.preference_loss.uses_reference

    @cached_property
    def special_tokens(self) -> SpecialTokens:
        """The tokens that end a response, and the padding token.

        Raises:
            UserError: if a string in ``sampling.stop`` is not exactly one token of the tokenizer.
        """
        return find_special_tokens(self.actor, self.tokenizer, self.sampling.stop)

    def scores(self, batch: PreferenceBatch) -> Tensor:
        """Return the score of each response, [N]: its implicit reward or, for `SimPO`, (β / |y|) log π(y|x)."""
        logprobs = self.actor(batch.tokens, batch.response_tokens_mask, shared=batch.shared).logprobs.sum(1)
        if self.uses_reference:
            return implicit_reward(logprobs, self._reference_logprobs(batch), self.beta)
        return self.beta * logprobs / (batch.lengths - batch.prompt_lengths)

    def numbers_of(self, batch: PreferenceBatch) -> dict[str, Tensor]:
        """Return the log-probabilities of each response under both models, and its score, [N] each."""
        logprobs = self.actor(batch.tokens, batch.response_tokens_mask, shared=batch.shared).logprobs.sum(1)
        reference = {"ref_logprobs": self._reference_logprobs(batch)} if self.uses_reference else {}
        return {"logprobs": logprobs} | reference | super().numbers_of(batch)

    def loss(self, scores: Tensor, batch: PreferenceBatch) -> Tensor:
        """Return the loss of each ranking, [B].

        Args:
            scores: The scores, [B, K], best response first; 0 where a ranking has fewer than K responses.
            batch: The rankings.

        Raises:
            UserError: if the data has margins and the option ``loss`` is set, or if label smoothing or a margin is used
                with rankings of more than two responses.
        """
        if self.preference_loss is None:
            return super().loss(scores, batch)
        if batch.margin is not None:
            raise UserError(f"model.loss {type(self.preference_loss).__name__} has no place for the data's margins")
        ahead, _, both = pairs(scores, batch)
        losses = self.preference_loss(torch.where(both, ahead, 0.0), self.beta)
        return torch.where(both, losses, 0.0).sum(1) / both.sum(1).clamp(min=1)

    @torch.no_grad()
    def _reference_logprobs(self, batch: PreferenceBatch) -> Tensor:
        """Return the reference's log-probability of each response, [N]: in training, from the cache if there is one."""
        if self._cached is not None and self.trainer.training:
            return self._cached[batch.number, : batch.mask.shape[1]][batch.mask]
        return self._reference_forward(batch)

    def _reference_forward(self, batch: PreferenceBatch) -> Tensor:
        return self.reference(batch.tokens, batch.response_tokens_mask, shared=batch.shared).logprobs.sum(1)

    @torch.no_grad()
    def on_train_start(self) -> None:
        """Compute the reference's log-probabilities of all training responses, if they are to be cached.

        They are cached if ``cache_reference`` is set and the loss uses the reference. Each whole batch is computed by a
        single rank, and the batches are in file order, so that the results are the same, bit for bit, on any number of
        ranks and after a resume. Lightning does not set the precision of the training step for this hook, so this
        method sets it.

        Raises:
            UserError: if the batches do not come from one of this package's data modules, or if that data module is for
                another kind of training.
        """
        super().on_train_start()
        if not (self.cache_reference and self.uses_reference):
            return
        loader: Any = self.trainer.train_dataloader
        if not isinstance(loader, ResumableLoader):
            raise UserError(
                "model.cache_reference takes its batches from the data module Preferences, not from a "
                f"{type(loader).__name__}; set it to false"
            )
        table = torch.zeros(len(loader.records), 2, device=self.device)
        with self.trainer.precision_plugin.forward_context(), unsharded(self.reference):
            batches = loader.once(whole=True)
            for number, batch in enumerate(track(batches, "cache the reference", "batches", loader.batches_in_once())):
                self.check_batch(batch)
                table = pad(table, (0, max(0, batch.mask.shape[1] - table.shape[1])))
                if number % self.trainer.world_size != self.trainer.global_rank:
                    continue
                for micro_batch in self.micro_batches(batch.to(self.device)):
                    logprobs = micro_batch.by_ranking(self._reference_forward(micro_batch))
                    table[micro_batch.number, : logprobs.shape[1]] = logprobs
        self._cached = self.sum_over_ranks(table)

    @torch.no_grad()
    def validation_step(self, batch: PreferenceBatch, batch_idx: int) -> None:
        """Add a batch to the held-out metrics, including the KL to the reference on responses that the actor samples.

        No responses are sampled for a batch in which a record, on any rank, has no prompt.
        """
        super().validation_step(batch, batch_idx)
        (without_prompt,) = self.max_over_ranks(sum(not prompt for prompt in batch.prompts))
        if without_prompt:
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
        check_sampled(rollout)
        logprobs, ref_logprobs = (
            response_logprobs(model, rollout, self.max_tokens) for model in (self.actor, self.reference)
        )
        self.held_out.add("kl_to_ref", masked_sum(k1(logprobs, ref_logprobs), rollout.response_mask, 1))
        self.held_out.add("length", rollout.response_lengths)
