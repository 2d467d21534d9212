"""The distance between the actor and the policy that drew the responses, and the correction for this distance."""

from typing import NamedTuple

import torch
from torch import Tensor

from lit_rlhf.algorithms.corrections import Correction, importance_ratio
from lit_rlhf.algorithms.kl import k3
from lit_rlhf.modules.metrics import Metrics
from lit_rlhf.types import ScoredRollout


class Corrected(NamedTuple):
    """The inputs that a correction provides for the objective."""

    old_logprobs: Tensor  # [B, T], of the objective's old policy: π_old of the actor or, with bypass, μ of the engine
    policy_weights: Tensor  # [B, T], the factor of the objective's loss


def corrected(scored: ScoredRollout, correction: Correction | None, metrics: Metrics) -> Corrected:
    """Return the old policy's log-probabilities and the weights of the tokens, and record the metrics ``off_policy/…``.

    Args:
        scored: The responses, with the log-probabilities of the engine and of the actor.
        correction: The correction; None for the actor as the old policy and weights of 1.
        metrics: Receives the metrics of the distance between the engine's and the actor's policies and, with a
            correction, the fractions of truncated and masked tokens.
    """
    rollout, mask = scored.rollout, scored.rollout.response_mask
    measure_off_policy(scored.old_logprobs, rollout.rollout_logprobs, mask, metrics)
    if correction is None:
        return Corrected(scored.old_logprobs, torch.ones_like(scored.old_logprobs))
    weights = correction(old_logprobs=scored.old_logprobs, rollout_logprobs=rollout.rollout_logprobs, mask=mask)
    metrics.add_masked("off_policy/truncated_fraction", weights.truncated.float(), mask)
    metrics.add_masked("off_policy/masked_fraction", weights.masked.float(), mask)
    return Corrected(rollout.rollout_logprobs if correction.bypass else scored.old_logprobs, weights.weights)


def measure_off_policy(old_logprobs: Tensor, rollout_logprobs: Tensor, mask: Tensor, metrics: Metrics) -> None:
    """Record how far the engine's policy μ is from the actor π_old at the start of the update.

    ``off_policy/logprob_diff_mean`` and ``off_policy/logprob_diff_max`` are the mean and the maximum of
    |log π_old − log μ| over the tokens, in nats. ``off_policy/kl`` is KL(μ ‖ π_old) in nats per token, estimated by k3
    from the tokens, which μ drew. ``off_policy/effective_sample_size`` is the effective sample size of the tokens with
    the weights π_old / μ, as a fraction of the number of tokens.

    Args:
        old_logprobs: [B, T], log π_old of the tokens.
        rollout_logprobs: [B, T], log μ of the tokens.
        mask: Bool [B, T], True at the tokens that count.
        metrics: Receives the metrics.
    """
    difference = torch.where(mask, (old_logprobs - rollout_logprobs).abs(), 0.0)
    metrics.add_masked("off_policy/logprob_diff_mean", difference, mask)
    metrics.maximum("off_policy/logprob_diff_max", difference.max())
    metrics.add_masked("off_policy/kl", k3(rollout_logprobs, old_logprobs), mask)
    ratio = importance_ratio(old_logprobs, rollout_logprobs, mask)
    metrics.sample_size("off_policy/effective_sample_size", ratio, mask)
