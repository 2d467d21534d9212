"""The losses of the actor and the critic in an optimizer step, and their metrics."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias, cast, final

import torch
from torch import Tensor

from lit_rlhf.algorithms.kl import ReferenceKL, k3
from lit_rlhf.algorithms.masked import masked_mean, masked_sum, token_weights
from lit_rlhf.algorithms.objectives import Objective, PolicyLoss
from lit_rlhf.algorithms.values import value_loss
from lit_rlhf.models.actor import Actor, TokenStats
from lit_rlhf.models.scoring import ScalarModel
from lit_rlhf.modules.metrics import Metrics
from lit_rlhf.modules.update import Update
from lit_rlhf.types import Experience


class StepLoss(NamedTuple):
    """A part of a micro-batch's contribution to the loss of an optimizer step, with values to measure and to check."""

    loss: Tensor  # []; the losses of all parts, micro-batches and ranks add up to the loss of the step
    kl_to_old: Tensor  # [], Σₜ KLₜ(π_old ‖ π) in nats, without gradient; 0 for the critic's part
    means: Mapping[str, Tensor]  # [] each, without gradient: the mean loss of the tokens, to check that it is finite


LossPart: TypeAlias = Callable[[Experience, Tensor, Metrics], StepLoss]
"""A function that takes b rows of the step's minibatch, the step's totals, [2] (`step_totals`, summed over all ranks),
and the metrics to add to, and returns one part of the rows' contribution to the loss."""


class PolicyTerms(NamedTuple):
    """The policy loss of each token, with the outputs of the objective and the actor that it was computed from."""

    loss: Tensor  # [b, t], the objective's weighted loss with the entropy bonus and the KL to the reference
    objective: PolicyLoss
    stats: TokenStats


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Losses:
    """The losses of the actor and the critic, computed with the models' current weights and without a Trainer.

    loss = Σₜ wₜ (policyₜ + value_coef · valueₜ), with the weights wₜ of `token_weights` over the whole optimizer step,

    policyₜ = uₜ · objectiveₜ − entropy_coef · H(π(·|sₜ)) [+ c · KLₜ(π ‖ π_ref)] and
    valueₜ = ½ (V(sₜ) − Rₜ)², where Rₜ is the return and V(sₜ) may be clipped around its old value.

    uₜ is the weight of a `Correction`, or 1 without a correction. The term in brackets applies if the loss has a KL
    term; c is kl_coef, rescaled like the advantages if the KL is also part of the reward.

    Args:
        actor: The policy π, with the value head of a shared critic.
        critic: The critic; None if there is none, or if it is the actor's value head.
        reference: The reference model π_ref; None without one.
        objective: The objective, which gives each token's policy loss.
        reference_kl: Where the KL to the reference enters the training, and how it is estimated; None without it.
        kl_coef: The current coefficient of the KL to the reference, in units of score per nat.
        update: The coefficients, the clip range of the value loss, and the aggregation.
        max_tokens: The maximum number of tokens in a response, for ``aggregation: constant``.
        only_critic: Whether only the critic, which then has its own weights, learns in this step.
    """

    actor: Actor
    critic: ScalarModel | None
    reference: Actor | None
    objective: Objective
    reference_kl: ReferenceKL | None
    kl_coef: float
    update: Update
    max_tokens: int
    only_critic: bool = False

    @property
    def parts(self) -> dict[str, LossPart]:
        """The parts of the loss: ``policy``, and ``value`` for a critic with its own weights.

        Each part has the name of the optimizer that updates its model. The loss of a shared critic belongs to the part
        ``policy``, although the optimizer ``value`` updates the critic's head. If each part is differentiated before
        the next is computed, the activations of the actor and the critic are never in memory together.
        """
        if self.only_critic:
            return {"value": self.of_critic}
        return {"policy": self.of_actor} if self.critic is None else {"policy": self.of_actor, "value": self.of_critic}

    def of_actor(self, micro_batch: Experience, totals: Tensor, metrics: Metrics) -> StepLoss:
        """Return the actor's part of the loss of a micro-batch: the policy loss, and the value loss of a shared critic.

        Args:
            micro_batch: b rows of the step's minibatch.
            totals: [2], the numbers of tokens and sequences in the whole step: the sum of `step_totals` over all ranks.
            metrics: Receives the metrics ``policy/…``, and ``value/…`` for a shared critic.
        """
        mask = micro_batch.rollout.response_mask
        policy = self.policy(micro_batch, metrics)
        means, total = {"policy_loss": masked_mean(policy.loss.detach(), mask)}, policy.loss
        if self.critic is None and micro_batch.values is not None:
            value = self.value(micro_batch, policy.stats, metrics)
            means["value_loss"] = masked_mean(value.detach(), mask)
            total = total + self.update.value_coef * value
        with torch.no_grad():
            logprobs = micro_batch.rollout.at_responses(policy.stats.logprobs)
            kl_to_old = torch.where(mask, k3(micro_batch.old_logprobs, logprobs), 0.0)
        metrics.add_masked("policy/kl_to_old", kl_to_old, mask)
        metrics.add_masked("policy/clip_fraction", policy.objective.clipped.float(), mask)
        metrics.maximum("policy/ratio_max", policy.objective.ratio.detach().max())
        return StepLoss(self.weighted_sum(total, micro_batch, totals), kl_to_old.sum(), means)

    def of_critic(self, micro_batch: Experience, totals: Tensor, metrics: Metrics) -> StepLoss:
        """Return the part of the loss for a critic with its own weights; the arguments are those of `of_actor`."""
        value = self.value(micro_batch, None, metrics)
        loss = self.weighted_sum(self.update.value_coef * value, micro_batch, totals)
        mean = masked_mean(value.detach(), micro_batch.rollout.response_mask)
        return StepLoss(loss, torch.zeros_like(mean), {"value_loss": mean})

    def policy(self, micro_batch: Experience, metrics: Metrics) -> PolicyTerms:
        """Compute the policy loss of each token, [b, t], and record the objective's weighted loss and the entropy."""
        rollout, mask, kl = micro_batch.rollout, micro_batch.rollout.response_mask, self.reference_kl
        other = self.reference if kl and kl.is_full else None
        stats = self.actor(rollout.tokens, rollout.response_tokens_mask, other, shared=rollout.shared)
        logprobs, entropy = rollout.at_responses(stats.logprobs), rollout.at_responses(stats.entropy)
        objective = self.objective(
            logprobs=logprobs, old_logprobs=micro_batch.old_logprobs, advantages=micro_batch.advantages, mask=mask
        )
        loss = micro_batch.policy_weights * objective.loss
        metrics.add_masked("policy/loss", loss, mask)
        metrics.add_masked("policy/entropy", entropy, mask)
        if self.update.entropy_coef:
            loss = loss - self.update.entropy_coef * entropy
        if kl and kl.in_loss:
            full_kl = None if stats.full_kl is None else rollout.at_responses(stats.full_kl)
            coef = self.kl_coef * (micro_batch.reward_scale if kl.where == "reward" else 1.0)
            loss = loss + coef * kl.estimate(logprobs, cast(Tensor, micro_batch.ref_logprobs), full_kl)
        return PolicyTerms(loss, objective, stats)

    def value(self, micro_batch: Experience, stats: TokenStats | None, metrics: Metrics) -> Tensor:
        """Return the value loss of each token, [b, t], and record its metrics.

        Args:
            micro_batch: b rows with the critic's old values.
            stats: The actor's outputs, which hold a shared critic's values; None if the critic has its own weights.
            metrics: Receives the metrics ``value/…``.
        """
        rollout, mask, clip = micro_batch.rollout, micro_batch.rollout.response_mask, self.update.value_clip
        if self.critic is not None:
            after_tokens = self.critic(rollout.tokens, rollout.lengths, rollout.shared)
        else:
            after_tokens = cast(TokenStats, stats).values
        values, old_values = rollout.before_responses(after_tokens), cast(Tensor, micro_batch.values)
        loss = value_loss(values, old_values, micro_batch.returns, mask, clip)
        metrics.add_masked("value/loss", loss, mask)
        if clip is not None:
            metrics.add_masked("value/clip_fraction", ((values - old_values).abs() > clip).float(), mask)
        return loss

    def weighted_sum(self, loss: Tensor, micro_batch: Experience, totals: Tensor) -> Tensor:
        """Return Σₜ wₜ lossₜ over a micro-batch, [], given per-token losses, [b, t], and the step's totals, [2]."""
        mask = micro_batch.rollout.response_mask
        weights = token_weights(
            mask,
            self.update.aggregation,
            total_tokens=totals[0],
            total_sequences=totals[1],
            max_tokens=self.max_tokens,
        )
        return masked_sum(weights * loss, mask)


def step_totals(minibatch: Sequence[Experience]) -> Tensor:
    """Return the numbers of response tokens and of rows that have any, in this process's micro-batches, [2] float32."""
    masks = [micro_batch.rollout.response_mask for micro_batch in minibatch]
    return torch.stack([torch.stack([mask.sum(), mask.any(1).sum()]) for mask in masks]).sum(0).float()
