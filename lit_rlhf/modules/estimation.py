"""The experience that the update learns from, computed from the rewards: advantages, returns, and corrections."""

from dataclasses import replace

import torch
from torch import Tensor

from lit_rlhf.algorithms.advantages import AdvantageEstimator
from lit_rlhf.algorithms.corrections import Correction
from lit_rlhf.algorithms.masked import Reduce, masked_var, masked_whiten
from lit_rlhf.modules.metrics import Metrics
from lit_rlhf.modules.off_policy import corrected
from lit_rlhf.modules.update import Update
from lit_rlhf.types import Experience, ScoredRollout, Trajectory


def bootstrap_values(last_values: Tensor | None, terminated: Tensor) -> Tensor | None:
    """Return the critic's values that replace the rewards after the last tokens of truncated responses.

    Args:
        last_values: [B], the value after the last token of each response; None without a critic.
        terminated: Bool [B], True if a stop token ended the response.

    Returns:
        The values, [B], which are 0 for terminated responses; None without a critic.

    >>> bootstrap_values(torch.tensor([2.0, 3.0]), torch.tensor([True, False]))
    tensor([0., 3.])
    """
    return None if last_values is None else torch.where(terminated, 0.0, last_values)


def estimate_experience(
    scored: ScoredRollout,
    trajectory: Trajectory,
    estimator: AdvantageEstimator,
    correction: Correction | None,
    update: Update,
    *,
    reduce: Reduce,
    metrics: Metrics,
) -> Experience:
    """Estimate advantages and returns, and weight the tokens that another policy drew.

    Args:
        scored: The responses, with the outputs of all models.
        trajectory: The reward of each token, and the critic's values.
        estimator: The advantage estimator.
        correction: The correction for responses that the engine's policy drew; None for no correction.
        update: The options of the update, which say whether rewards and advantages are whitened.
        reduce: A function that returns the sum of a tensor over all processes.
        metrics: Receives the standard deviation of the advantages before they are whitened, the explained variance of
            the critic, and the metrics ``off_policy/…``.

    Returns:
        The experience, with the rows of ``scored``.
    """
    mask, scale = trajectory.mask, torch.ones_like(trajectory.rewards)
    if update.whiten_rewards:
        whitened = masked_whiten(trajectory.rewards, mask, shift_mean=False, reduce=reduce)
        trajectory, scale = replace(trajectory, rewards=whitened.values), scale * whitened.scale
    estimates = estimator(trajectory)
    advantages, whitened = estimates.advantages, masked_whiten(estimates.advantages, mask, reduce=reduce)
    metrics.add("objective/advantage_std", whitened.var.sqrt())
    if scored.values is not None:
        unexplained = masked_var(estimates.returns - scored.values, mask, reduce)
        total = masked_var(estimates.returns, mask, reduce)
        metrics.add("value/explained_variance", 1 - unexplained / total.clamp(min=1e-8))
    if update.whiten_advantages:
        advantages, scale = whitened.values, scale * whitened.scale
    old_logprobs, policy_weights = corrected(scored, correction, metrics)
    return Experience(
        rollout=scored.rollout,
        old_logprobs=old_logprobs,
        ref_logprobs=scored.ref_logprobs,
        values=scored.values,
        policy_weights=policy_weights,
        advantages=advantages,
        returns=estimates.returns,
        reward_scale=scale,
    )
