"""Policy objectives, which compute the loss of each token, [B, T], from log-probabilities and advantages.

Objectives do not average: the tokens are weighted once, for the whole optimizer step (`masked.token_weights`).

In the first step of an update, all ratios are 1 (unless `Correction.bypass` makes π_old the engine's policy), and every
objective with token-level ratios has the gradient −Aₜ ∇log π(aₜ|sₜ). The objectives differ in how they correct for a
policy that has moved since: `VanillaPG` does not; `Surrogate` uses importance weights; `KLPenalty` adds a KL penalty to
the surrogate; and `Clip` removes the gradient of tokens whose weight is beyond a bound. The module
`off_policy_objectives` has two more objectives, for responses from an older policy.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from lit_rlhf.algorithms.kl import MAX_LOG_RATIO, k3
from lit_rlhf.algorithms.masked import masked_mean
from lit_rlhf.types import check_shapes

MAX_BETA = 1e10
"""The upper bound of an adaptive β; the lower bound is 1 / MAX_BETA. An infinite or zero β could never change again."""

Level = Literal["token", "sequence"]


class PolicyLoss(NamedTuple):
    """The output of an objective for each token.

    >>> logprobs, mask = torch.tensor([[0.5, 0.0]]), torch.tensor([[True, True]])
    >>> result = Clip(0.2)(logprobs=logprobs, old_logprobs=torch.zeros(1, 2), advantages=torch.ones(1, 2), mask=mask)
    >>> result.loss, result.clipped
    (tensor([[-1.2000, -1.0000]]), tensor([[ True, False]]))
    """

    loss: Tensor  # [B, T], 0 outside the mask; gradients flow into the log-probabilities only
    ratio: Tensor  # [B, T], π / π_old before any clipping, 1 outside the mask
    clipped: Tensor  # bool [B, T], True where the objective removes the token's gradient or bounds the token's weight


class Objective(ABC):
    """The interface of policy objectives, which compute a loss to minimise for each token.

    >>> class CappedWeights(Objective):  # the policy gradient with constant importance weights of at most 5
    ...     def __call__(self, *, logprobs, old_logprobs, advantages, mask):
    ...         ratio = probability_ratio(logprobs.detach(), old_logprobs, mask)
    ...         weights = ratio.clamp(max=5.0) * torch.where(mask, advantages, 0.0)
    ...         return PolicyLoss(-weights * torch.where(mask, logprobs, 0.0), ratio, torch.zeros_like(mask))
    >>> logprobs, mask = torch.tensor([[-0.5, -1.0]]), torch.tensor([[True, True]])
    >>> CappedWeights()(logprobs=logprobs, old_logprobs=logprobs, advantages=torch.ones(1, 2), mask=mask).loss
    tensor([[0.5000, 1.0000]])
    """

    @property
    def follows_kl(self) -> bool:
        """Whether ``update`` uses the KL to the old policy; measuring this KL costs a forward pass."""
        return False

    @abstractmethod
    def __call__(self, *, logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor) -> PolicyLoss:
        """Return the loss and the probability ratio of each token, and a mask of the clipped tokens, each [B, T].

        Args:
            logprobs: [B, T], log π(aₜ|sₜ) of the current policy.
            old_logprobs: [B, T], log π_old(aₜ|sₜ) of the old policy; no gradient flows into them.
            advantages: [B, T]; no gradient flows into them.
            mask: Bool [B, T], True at the tokens that count.

        Raises:
            ValueError: if the shapes do not match.
        """

    def update(self, measured_kl: float) -> None:  # noqa: B027 (most objectives have no state to update)
        """Adapt the objective to the mean KL(π_old ‖ π), measured after an iteration's update, in nats per token.

        The default does nothing.
        """


def log_ratio(logprobs: Tensor, old_logprobs: Tensor, mask: Tensor) -> Tensor:
    """Compute log π(aₜ|sₜ) − log π_old(aₜ|sₜ) of each token.

    Args:
        logprobs: [B, T], log π(aₜ|sₜ).
        old_logprobs: [B, T], log π_old(aₜ|sₜ); no gradient flows into them.
        mask: Bool [B, T], True at the tokens that count.

    Returns:
        [B, T], in nats, 0 outside the mask.

    Raises:
        ValueError: if the shapes do not match.

    >>> log_ratio(torch.tensor([[-0.5, 9.0]]), torch.tensor([[-1.5, 9.0]]), torch.tensor([[True, False]]))
    tensor([[1., 0.]])
    """
    check_shapes(logprobs=logprobs, old_logprobs=old_logprobs, mask=mask)
    return torch.where(mask, logprobs, 0.0) - torch.where(mask, old_logprobs.detach(), 0.0)


def probability_ratio(logprobs: Tensor, old_logprobs: Tensor, mask: Tensor, level: Level = "token") -> Tensor:
    """Compute the importance ratio ρₜ = π(aₜ|sₜ) / π_old(aₜ|sₜ), with the log-ratio clamped to [−20, 20].

    With ``level="sequence"``, all tokens of a row have the length-normalised ratio of the response,
    (π(y|x) / π_old(y|x))^{1/|y|}, which is the exponential of the mean log-ratio.

    Source of the sequence level: Zheng et al. 2025 (GSPO, arXiv 2507.18071), equation 7.

    Args:
        logprobs: [B, T], log π(aₜ|sₜ) of the current policy.
        old_logprobs: [B, T], log π_old(aₜ|sₜ) of the old policy; no gradient flows into them.
        mask: Bool [B, T], True at the tokens that count.
        level: ``token`` for the ratio of each token, or ``sequence`` for the ratio of the whole response.

    Returns:
        The ratios, [B, T], 1 outside the mask.

    Raises:
        ValueError: if the shapes do not match.

    >>> mask, old = torch.tensor([[True, True]]), torch.zeros(1, 2)
    >>> probability_ratio(torch.tensor([[0.0, 0.693147]]), old, mask)
    tensor([[1.0000, 2.0000]])
    >>> probability_ratio(torch.tensor([[0.0, 0.693147]]), old, mask, level="sequence")
    tensor([[1.4142, 1.4142]])
    """
    logs = log_ratio(logprobs, old_logprobs, mask)
    if level == "sequence":
        logs = torch.where(mask, masked_mean(logs, mask, 1)[:, None], 0.0)
    return logs.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


@dataclass(frozen=True)
class VanillaPG(Objective):
    """The plain policy gradient: lossₜ = −Aₜ log π(aₜ|sₜ).

    This loss is correct only on-policy: use one epoch and one minibatch, since later steps are off-policy and nothing
    corrects for that.

    Source: Williams 1992 (REINFORCE); Sutton & Barto 2018, equation 13.11.

    >>> mask = torch.tensor([[True]])
    >>> VanillaPG()(logprobs=torch.tensor([[-0.5]]), old_logprobs=torch.tensor([[-0.5]]),
    ...             advantages=torch.tensor([[2.0]]), mask=mask).loss
    tensor([[1.]])
    """

    def __call__(self, *, logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor) -> PolicyLoss:
        """Return the loss and the ratio of each token, both [B, T]; no token is clipped."""
        check_shapes(logprobs=logprobs, old_logprobs=old_logprobs, advantages=advantages, mask=mask)
        loss = -torch.where(mask, advantages.detach(), 0.0) * torch.where(mask, logprobs, 0.0)
        return PolicyLoss(loss, probability_ratio(logprobs.detach(), old_logprobs, mask), torch.zeros_like(mask))


@dataclass(frozen=True)
class Surrogate(Objective):
    """The importance-sampled objective of TRPO and PPO without a bound on the step: lossₜ = −ρₜ Aₜ.

    Source: Schulman et al. 2015 (TRPO, arXiv 1502.05477), equation 14; Schulman et al. 2017 (arXiv 1707.06347),
    equation 6.

    Args:
        ratio: ``token``, or ``sequence`` for the length-normalised ratio of the response (see `probability_ratio`).

    Raises:
        ValueError: if ratio is neither ``token`` nor ``sequence``.

    >>> mask = torch.tensor([[True]])
    >>> Surrogate()(logprobs=torch.tensor([[0.5]]), old_logprobs=torch.tensor([[0.5]]),
    ...             advantages=torch.tensor([[2.0]]), mask=mask).loss
    tensor([[-2.]])
    """

    ratio: Level = "token"

    def __post_init__(self) -> None:
        _check_level(self.ratio)

    def __call__(self, *, logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor) -> PolicyLoss:
        """Return the loss and the ratio of each token, both [B, T]; no token is clipped."""
        check_shapes(logprobs=logprobs, old_logprobs=old_logprobs, advantages=advantages, mask=mask)
        ratio = probability_ratio(logprobs, old_logprobs, mask, self.ratio)
        return PolicyLoss(-torch.where(mask, advantages.detach(), 0.0) * ratio, ratio, torch.zeros_like(mask))


class KLPenalty(nn.Module, Objective):
    """The surrogate with a penalty on the KL from the old policy: lossₜ = −ρₜ Aₜ + β KLₜ(π_old ‖ π).

    KLₜ is estimated by ρₜ − 1 − log ρₜ ≥ 0 (k3), whose value and gradient are unbiased for KL(π_old ‖ π), since the old
    policy drew the tokens. With ``adaptive``, β follows the KL measured after each iteration's update: β is multiplied
    by ``factor`` if the KL is above ``high`` × target, and divided by ``factor`` if the KL is below target / ``low``. β
    is saved in the checkpoint.

    Source: Schulman et al. 2017 (arXiv 1707.06347), equation 8 and section 4.

    Args:
        beta: The initial β, in units of advantage per nat; positive, or 0 for no penalty if ``adaptive`` is False.
        target: The mean KL to the old policy that an iteration should reach, in nats per token.
        adaptive: Whether β is adapted; if False, β is constant.
        high: The factor by which the KL must exceed the target for β to grow, 1 or more.
        low: The factor by which the KL must fall below the target for β to shrink, 1 or more.
        factor: The factor by which β grows or shrinks, greater than 1.
        ratio: ``token``, or ``sequence`` for the length-normalised ratio of the response; the KL is always per token.

    Raises:
        ValueError: if a number is out of range or infinite, or ratio is neither ``token`` nor ``sequence``.

    >>> objective = KLPenalty(beta=1.0, target=0.01)
    >>> objective.update(0.02)
    >>> objective.beta
    2.0
    """

    def __init__(
        self,
        beta: float = 1.0,
        target: float = 0.01,
        adaptive: bool = True,
        high: float = 1.5,
        low: float = 1.5,
        factor: float = 2.0,
        ratio: Level = "token",
    ) -> None:
        super().__init__()
        infinity = float("inf")
        if not 0.0 <= beta < infinity or (adaptive and beta == 0.0):
            right = "positive and finite (or 0 with adaptive: false, for no penalty)"
            raise ValueError(f"objective.beta must be {right}, not {beta}")
        if not 0.0 < target < infinity:
            raise ValueError(f"objective.target must be positive and finite, not {target}")
        for name, value in (("high", high), ("low", low)):
            if not 1.0 <= value < infinity:
                raise ValueError(f"objective.{name} must be 1 or more and finite, not {value}")
        if not 1.0 < factor < infinity:
            raise ValueError(f"objective.factor must be greater than 1 and finite, not {factor}")
        _check_level(ratio)
        self.beta = beta
        self.target = target
        self.adaptive = adaptive
        self.high, self.low, self.factor = high, low, factor
        self.ratio = ratio

    @property
    def follows_kl(self) -> bool:
        """Whether β is adaptive, so that ``update`` uses the KL to the old policy."""
        return self.adaptive

    def forward(self, *, logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor) -> PolicyLoss:
        """Return the loss and the ratio of each token, both [B, T]; no token is clipped."""
        surrogate = Surrogate(self.ratio)(
            logprobs=logprobs, old_logprobs=old_logprobs, advantages=advantages, mask=mask
        )
        kl_to_old = k3(torch.where(mask, old_logprobs.detach(), 0.0), torch.where(mask, logprobs, 0.0))
        return surrogate._replace(loss=surrogate.loss + self.beta * kl_to_old)

    def update(self, measured_kl: float) -> None:
        """Adapt β to the mean KL(π_old ‖ π), measured after an iteration's update, in nats per token.

        Without ``adaptive``, β stays unchanged.
        """
        if not self.adaptive:
            return
        if measured_kl > self.high * self.target:
            self.beta = min(self.beta * self.factor, MAX_BETA)
        elif measured_kl < self.target / self.low:
            self.beta = max(self.beta / self.factor, 1.0 / MAX_BETA)

    def get_extra_state(self) -> Tensor:
        """Return β for the checkpoint (a buffer would be rounded in half precision)."""
        return torch.tensor(self.beta, dtype=torch.float64)

    def set_extra_state(self, state: Tensor) -> None:
        """Restore β from a checkpoint, if it is adaptive."""
        if self.adaptive:
            self.beta = float(state)


@dataclass(frozen=True)
class Clip(Objective):
    """The clipped surrogate objective of PPO.

    lossₜ = −min(ρₜ Aₜ, clip(ρₜ, 1 − ε, 1 + ε_high) Aₜ). With ``dual`` = c > 1, the loss of a token with Aₜ < 0 is at
    most −c Aₜ, so that a single very large ratio cannot dominate a step.

    Source: Schulman et al. 2017 (arXiv 1707.06347), equation 7; dual clip: Ye et al. 2020 (arXiv 1912.09729),
    equation 5; asymmetric bounds: Yu et al. 2025 (arXiv 2503.14476); sequence-level ratio: Zheng et al. 2025 (GSPO,
    arXiv 2507.18071), equation 5, with ε of the order of 1e-4.

    Args:
        eps: ε, the distance of the lower bound from 1, in (0, 1).
        eps_high: ε_high > 0, the distance of the upper bound from 1; None for the value of ``eps``.
        dual: c > 1, the factor of the dual clip; None for no dual clip.
        ratio: ``token``, or ``sequence`` for the length-normalised ratio of the response (see `probability_ratio`).

    Raises:
        ValueError: if a number is out of range, or ratio is neither ``token`` nor ``sequence``.

    >>> mask = torch.tensor([[True]])
    >>> Clip(0.2)(logprobs=torch.tensor([[0.5]]), old_logprobs=torch.tensor([[0.0]]),
    ...           advantages=torch.tensor([[1.0]]), mask=mask).loss
    tensor([[-1.2000]])
    """

    eps: float = 0.2
    eps_high: float | None = None
    dual: float | None = None
    ratio: Level = "token"

    def __post_init__(self) -> None:
        if not 0.0 < self.eps < 1.0:
            raise ValueError(f"objective.eps must be in (0, 1), not {self.eps}")
        if self.eps_high is not None and not self.eps_high > 0.0:
            raise ValueError(f"objective.eps_high must be positive, not {self.eps_high}")
        if self.dual is not None and not self.dual > 1.0:
            raise ValueError(f"objective.dual must be greater than 1, not {self.dual}")
        _check_level(self.ratio)

    def __call__(self, *, logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor) -> PolicyLoss:
        """Return the clipped loss and the ratio of each token, and a mask of the clipped tokens, each [B, T].

        A token is clipped if its advantage is positive and its ratio is above the upper bound, or if its advantage is
        negative and its ratio is below the lower bound or, with a dual clip, above ``dual``.
        """
        check_shapes(logprobs=logprobs, old_logprobs=old_logprobs, advantages=advantages, mask=mask)
        ratio = probability_ratio(logprobs, old_logprobs, mask, self.ratio)
        advantages = torch.where(mask, advantages.detach(), 0.0)
        unclipped, clipped = ratio * advantages, self._clip(ratio) * advantages
        loss, is_clipped = -torch.minimum(unclipped, clipped), clipped < unclipped
        if self.dual is not None:
            loss = torch.where(advantages < 0, torch.minimum(loss, -self.dual * advantages), loss)
            is_clipped = is_clipped | ((advantages < 0) & (ratio > self.dual))
        return PolicyLoss(torch.where(mask, loss, 0.0), ratio, is_clipped & mask)

    def _clip(self, ratio: Tensor) -> Tensor:
        high = self.eps if self.eps_high is None else self.eps_high
        return ratio.clamp(1.0 - self.eps, 1.0 + high)


def _check_level(ratio: str) -> None:
    if ratio not in ("token", "sequence"):
        raise ValueError(f"objective.ratio must be 'token' or 'sequence', not {ratio!r}")
