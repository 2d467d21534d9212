"""The loss of an optimizer step: the actor's and the critic's, and the metrics of both."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, cast, final

import torch
from torch import Tensor

from lit_rlhf.algorithms.kl import ReferenceKL, k3
from lit_rlhf.algorithms.masked import masked_mean, masked_sum, token_weights
from lit_rlhf.algorithms.objectives import Objective, PolicyLoss
from lit_rlhf.algorithms.values import value_loss
from lit_rlhf.models.actor import Actor, TokenStats
from lit_rlhf.models.scoring import ScalarModel
from lit_rlhf.modules.metrics import Metrics
from lit_rlhf.modules.update import Update, check_finite
from lit_rlhf.types import Experience


class StepLoss(NamedTuple):
    """A micro-batch's part of an optimizer step."""

    loss: Tensor  # [], its part of the step's loss; the parts of all micro-batches and ranks add up to it
    kl_to_old: Tensor  # [], Σₜ KLₜ(π_old ‖ π) in nats, without gradient


class PolicyTerms(NamedTuple):
    """The policy loss of each token, with what it was computed from."""

    loss: Tensor  # [b, t], of the objective, entropy bonus and KL to the reference
    objective: PolicyLoss
    stats: TokenStats


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Losses:
    """The losses of actor and critic on the models as they are now; no Trainer.

    loss = Σₜ wₜ (policyₜ + value_coef · valueₜ), with the weights wₜ of `token_weights` over the whole optimizer step,

    policyₜ = objectiveₜ − entropy_coef · H(π(·|sₜ)) [+ coef · KLₜ(π ‖ π_ref)] and
    valueₜ = ½ (V(sₜ) − Rₜ)², clipped around the old value.

    Args:
        actor: The policy π, with the value head of a shared critic.
        critic: The critic; None if there is none, or if it is the actor's value head.
        reference: π_ref.
        objective: The objective of the policy.
        reference_kl: Where the KL to the reference enters.
        kl_coef: Its coefficient now, in units of score a nat.
        update: The coefficients, the clip range of the value loss, and the aggregation.
        max_tokens: The longest response allowed, for ``aggregation: constant``.
    """

    actor: Actor
    critic: ScalarModel | None
    reference: Actor
    objective: Objective
    reference_kl: ReferenceKL
    kl_coef: float
    update: Update
    max_tokens: int

    def __call__(self, micro_batch: Experience, totals: Tensor, metrics: Metrics) -> StepLoss:
        """Return the loss of a micro-batch, and record its metrics.

        Args:
            micro_batch: b rows of the step.
            totals: [2], tokens and sequences of the whole step; see `step_totals`.
            metrics: Receives ``policy/…`` and ``value/…``.

        Raises:
            UserError: if a loss is not finite.
        """
        mask = micro_batch.rollout.response_mask
        policy = self.policy(micro_batch, metrics)
        finite, total = {"policy_loss": masked_mean(policy.loss, mask)}, policy.loss
        if micro_batch.values is not None:
            value = self.value(micro_batch, policy.stats, metrics)
            finite["value_loss"] = masked_mean(value, mask)
            total = total + self.update.value_coef * value
        loss = self.weighted_sum(total, micro_batch, totals)
        check_finite(**finite, loss=loss)
        with torch.no_grad():
            logprobs = micro_batch.rollout.at_responses(policy.stats.logprobs)
            kl_to_old = torch.where(mask, k3(micro_batch.old_logprobs, logprobs), 0.0)
        metrics.add_masked("policy/kl_to_old", kl_to_old, mask)
        metrics.add_masked("policy/clip_fraction", policy.objective.clipped.float(), mask)
        metrics.maximum("policy/ratio_max", policy.objective.ratio.max())
        return StepLoss(loss, kl_to_old.sum())

    def policy(self, micro_batch: Experience, metrics: Metrics) -> PolicyTerms:
        """Return the policy loss of each token."""
        rollout, mask, kl = micro_batch.rollout, micro_batch.rollout.response_mask, self.reference_kl
        stats = self.actor(rollout.tokens, rollout.response_tokens_mask, self.reference if kl.is_full else None)
        logprobs, entropy = rollout.at_responses(stats.logprobs), rollout.at_responses(stats.entropy)
        objective = self.objective(
            logprobs=logprobs, old_logprobs=micro_batch.old_logprobs, advantages=micro_batch.advantages, mask=mask
        )
        metrics.add_masked("policy/loss", objective.loss, mask)
        metrics.add_masked("policy/entropy", entropy, mask)
        loss = objective.loss
        if self.update.entropy_coef:
            loss = loss - self.update.entropy_coef * entropy
        if kl.in_loss:
            full_kl = None if stats.full_kl is None else rollout.at_responses(stats.full_kl)
            coef = self.kl_coef * (micro_batch.reward_scale if kl.where == "reward" else 1.0)
            loss = loss + coef * kl.estimate(logprobs, micro_batch.ref_logprobs, full_kl)
        return PolicyTerms(loss, objective, stats)

    def value(self, micro_batch: Experience, stats: TokenStats | None, metrics: Metrics) -> Tensor:
        """Return the value loss of each token, [b, t].

        Args:
            micro_batch: b rows with the critic's old values.
            stats: The actor's outputs, which hold a shared critic's values; None if the critic has its own weights.
            metrics: Receives ``value/…``.
        """
        rollout, mask, clip = micro_batch.rollout, micro_batch.rollout.response_mask, self.update.value_clip
        if self.critic is not None:
            after_tokens = self.critic(rollout.tokens, rollout.lengths)
        else:
            after_tokens = cast(TokenStats, stats).values
        values, old_values = rollout.before_responses(after_tokens), cast(Tensor, micro_batch.values)
        loss = value_loss(values, old_values, micro_batch.returns, mask, clip)
        metrics.add_masked("value/loss", loss, mask)
        if clip is not None:
            metrics.add_masked("value/clip_fraction", ((values - old_values).abs() > clip).float(), mask)
        return loss

    def weighted_sum(self, loss: Tensor, micro_batch: Experience, totals: Tensor) -> Tensor:
        """Return Σₜ wₜ lossₜ over a micro-batch, [], for a loss of each token, [b, t]."""
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
    """Count the tokens, and the sequences with at least one token, of this process's micro-batches, [2] float32."""
    masks = [micro_batch.rollout.response_mask for micro_batch in minibatch]
    return torch.stack([torch.stack([mask.sum(), mask.any(1).sum()]) for mask in masks]).sum(0).float()
