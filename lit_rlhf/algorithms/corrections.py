"""Corrections for responses that were not drawn from the actor: importance weights, masks, or another old policy.

The engine's policy μ, which drew the tokens, may differ from π_old, the actor at the start of the update: the engine
rounds differently, or it still had older weights. The ratio here is ρₜ = π_old(aₜ|sₜ) / μ(aₜ|sₜ), which is constant
during the update; the ratio of the objectives is π(aₜ|sₜ) / π_old(aₜ|sₜ), which starts at 1 (without ``bypass``).
"""

from dataclasses import dataclass
from math import inf
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from lit_rlhf.algorithms.kl import MAX_LOG_RATIO
from lit_rlhf.algorithms.masked import masked_mean, masked_sum
from lit_rlhf.algorithms.objectives import log_ratio

Level = Literal["token", "sequence", "geometric"]
_CHOICES = "token, sequence or geometric"


class PolicyWeights(NamedTuple):
    """The output of a correction for each token.

    >>> mask = torch.tensor([[True, True, False]])
    >>> old_logprobs, rollout_logprobs = torch.tensor([[0.8, 0.2, 0.5]]).log(), torch.tensor([[0.3, 0.4, 0.5]]).log()
    >>> Correction()(old_logprobs=old_logprobs, rollout_logprobs=rollout_logprobs, mask=mask).truncated
    tensor([[ True, False, False]])
    """

    weights: Tensor  # [B, T], the factor of the objective's loss, without gradient; 1 outside the mask
    truncated: Tensor  # bool [B, T], True where a bound has replaced the ratio as the weight
    masked: Tensor  # bool [B, T], True where the weight is 0 because the ratio is outside the mask's bounds


@dataclass(frozen=True)
class Correction:
    """The correction of the policy loss for responses drawn from the engine's policy μ instead of the actor's, π_old.

    The objective's loss of token t is multiplied by a constant weight: the ratio ρₜ = π_old / μ, clipped to
    [``truncate_below``, ``truncate_above``], or 0 if the ratio is outside [``mask_below``, ``mask_above``]. The weights
    do not apply to the entropy bonus, the KL to the reference or the critic, and tokens with a weight of 0 still count
    in the mean of the loss. The weight and the mask each use the ratio at one of three levels:

    - ``token``: ρₜ;
    - ``sequence``: ρ(y) = Πₜ ρₜ for all tokens of a response, which is usually further from 1 for longer responses;
    - ``geometric``: ρ(y)^{1/|y|}, the geometric mean of the ρₜ, for all tokens of a response.

    These are methods from the literature:

    - TIS, ``{}``, the default: min(ρₜ, 2). Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy
      RL training".
    - Decoupled PPO, ``{truncate_above: null}`` with the objective `Clip`: ρₜ. Hilton et al. 2021 (arXiv 2110.00641);
      Fu et al. 2025 (AReaL, arXiv 2505.24298).
    - IcePop, ``{truncate_above: null, mask_level: token, mask_below: 0.5, mask_above: 5}``: ρₜ if 0.5 ≤ ρₜ ≤ 5,
      otherwise 0. Ling Team 2025 (arXiv 2510.18855).
    - MIS, ``{level: sequence, truncate_above: null, mask_level: sequence, mask_above: 3}``: ρ(y) if ρ(y) ≤ 3, otherwise
      0. Liu et al. 2025, "When speed kills stability: demystifying RL collapse from the training-inference mismatch".
    - The geometric mask, ``{level: null, mask_level: geometric, mask_below: 0.99, mask_above: 1.01}``: 1 if
      0.99 ≤ ρ(y)^{1/|y|} ≤ 1.01, otherwise 0. Liu et al. 2025, part 3.
    - The bypass, ``{bypass: true}``: the objective's old policy is μ, so its ratio π / μ includes the correction.

    Args:
        level: The level of the ratio that serves as the weight; None for a weight of 1.
        truncate_above: The largest weight, to which larger ratios are clipped; None for no bound.
        truncate_below: The smallest weight, to which smaller ratios are clipped; None for no bound.
        mask_level: The level of the ratio that decides which tokens or responses get a weight of 0; None for no mask.
        mask_above: The ratio above which the weight is 0; None for no bound.
        mask_below: The ratio below which the weight is 0; None for no bound.
        bypass: Whether μ is the old policy in the objective, in ``policy/kl_to_old`` and in ``update.target_kl`` (with
            `TRPO`, in the surrogate only). With the bypass, there is no importance weight, so ``level`` and its bounds
            must be left out; a mask still applies.

    Raises:
        ValueError: if a level is unknown, a bound is not positive and finite, a lower bound is not less than the upper
            one, or options contradict each other or change nothing.

    >>> mask = torch.tensor([[True, True, False]])
    >>> old_logprobs, rollout_logprobs = torch.tensor([[0.8, 0.2, 0.5]]).log(), torch.tensor([[0.3, 0.4, 0.5]]).log()
    >>> Correction()(old_logprobs=old_logprobs, rollout_logprobs=rollout_logprobs, mask=mask).weights
    tensor([[2.0000, 0.5000, 1.0000]])
    >>> masked = Correction(truncate_above=None, mask_level="token", mask_below=0.6)
    >>> masked(old_logprobs=old_logprobs, rollout_logprobs=rollout_logprobs, mask=mask).weights
    tensor([[2.6667, 0.0000, 1.0000]])
    """

    level: Level | None = "token"
    truncate_above: float | None = 2.0
    truncate_below: float | None = None
    mask_level: Level | None = None
    mask_above: float | None = None
    mask_below: float | None = None
    bypass: bool = False

    def __post_init__(self) -> None:
        for name in ("level", "mask_level"):
            if getattr(self, name) not in (*get_args(Level), None):
                raise ValueError(f"correction.{name} must be {_CHOICES} or null, not {getattr(self, name)!r}")
        _check_bounds(truncate_above=self.truncate_above, truncate_below=self.truncate_below)
        _check_bounds(mask_above=self.mask_above, mask_below=self.mask_below)
        bounds = [name for name in ("mask_above", "mask_below") if getattr(self, name) is not None]
        if bounds and self.mask_level is None:
            raise ValueError(f"correction.{bounds[0]} needs a mask_level, {_CHOICES}, but mask_level is null")
        if self.mask_level is not None and not bounds:
            raise ValueError(f"correction.mask_level is {self.mask_level!r}, but mask_above and mask_below are null")
        self._check_weight()

    @property
    def uses_ratio(self) -> bool:
        """Whether the ratio to the engine's policy is a factor of the loss: as a weight, or in the objective."""
        return self.bypass or self.level is not None

    def _check_weight(self) -> None:
        """Check the options of the importance weight.

        Raises:
            ValueError: if an option of the importance weight is set although there is no weight, or if there is neither
                a weight nor a mask nor a bypass.
        """
        if not self.bypass and self.level is not None:
            return
        reason = "with bypass" if self.bypass else "without a level"
        for name in ("level", "truncate_above", "truncate_below"):
            value = getattr(self, name)
            if value not in (None, getattr(Correction, name)):
                raise ValueError(
                    f"correction.{name} is {value!r}, but {reason} there is no importance weight: leave it out"
                )
        if not self.bypass and self.mask_level is None:
            raise ValueError("correction.level and mask_level are null, which corrects nothing: set one of them")

    def __call__(self, *, old_logprobs: Tensor, rollout_logprobs: Tensor, mask: Tensor) -> PolicyWeights:
        """Return each token's weight, a mask of the truncated weights and a mask of the masked weights, each [B, T].

        Args:
            old_logprobs: [B, T], log π_old(aₜ|sₜ) of the actor at the start of the update.
            rollout_logprobs: [B, T], log μ(aₜ|sₜ) of the engine's policy.
            mask: Bool [B, T], True at the tokens that count; it may have holes.

        Raises:
            ValueError: if the shapes do not match, unless no ratio is used (``bypass`` without a mask).
        """
        weights = torch.ones_like(old_logprobs)
        truncated = masked = torch.zeros_like(mask)
        if self.level is not None and not self.bypass:
            ratio = importance_ratio(old_logprobs, rollout_logprobs, mask, self.level)
            weights = torch.where(mask, ratio.clamp(self.truncate_below or 0.0, self.truncate_above or inf), 1.0)
            truncated = weights != ratio
        if self.mask_level is not None:
            ratio = importance_ratio(old_logprobs, rollout_logprobs, mask, self.mask_level)
            masked = mask & ((ratio < (self.mask_below or 0.0)) | (ratio > (self.mask_above or inf)))
        return PolicyWeights(torch.where(masked, 0.0, weights), truncated & ~masked, masked)


def importance_ratio(old_logprobs: Tensor, rollout_logprobs: Tensor, mask: Tensor, level: Level = "token") -> Tensor:
    """Compute ρₜ = π_old(aₜ|sₜ) / μ(aₜ|sₜ), its product over the response, or its geometric mean over the response.

    The logarithm of the result, which for a whole response is a sum or a mean, is clamped to [−20, 20].

    Args:
        old_logprobs: [B, T], log π_old(aₜ|sₜ) of the actor at the start of the update; no gradient flows into them.
        rollout_logprobs: [B, T], log μ(aₜ|sₜ) of the engine's policy; no gradient flows into them.
        mask: Bool [B, T], True at the tokens that count; it may have holes.
        level: ``token`` for ρₜ, ``sequence`` for Πₜ ρₜ, or ``geometric`` for (Πₜ ρₜ)^{1/|y|}, where |y| is the number
            of tokens inside the mask.

    Returns:
        The ratios, [B, T], 1 outside the mask.

    Raises:
        ValueError: if the shapes do not match.

    >>> old, mask = torch.tensor([[0.7, 0.4, 0.5]]).log(), torch.tensor([[True, True, False]])
    >>> importance_ratio(old, torch.zeros(1, 3), mask)
    tensor([[0.7000, 0.4000, 1.0000]])
    >>> tuple(importance_ratio(old, torch.zeros(1, 3), mask, level) for level in ("sequence", "geometric"))
    (tensor([[0.2800, 0.2800, 1.0000]]), tensor([[0.5292, 0.5292, 1.0000]]))
    """
    logs = log_ratio(old_logprobs.detach(), rollout_logprobs, mask)
    if level != "token":
        over_response = masked_sum if level == "sequence" else masked_mean
        logs = torch.where(mask, over_response(logs, mask, 1)[:, None], 0.0)
    return logs.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


def _check_bounds(**bounds: float | None) -> None:
    """Check an upper and a lower bound, in this order; each may be None.

    Raises:
        ValueError: if a bound is not positive and finite, or if the lower bound is not less than the upper one.
    """
    for name, value in bounds.items():
        if value is not None and not 0.0 < value < inf:
            raise ValueError(f"correction.{name} must be positive and finite, or null for no bound, not {value}")
    (above, high), (below, low) = bounds.items()
    if high is not None and low is not None and not low < high:
        raise ValueError(f"correction.{below} must be less than {above}, which is {high}, not {low}")
