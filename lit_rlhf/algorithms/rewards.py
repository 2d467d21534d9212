"""Per-token rewards, computed from the score of a response and the KL to the reference model."""

import torch
from torch import Tensor
from torch.nn import functional as F

from lit_rlhf.types import check_shapes


def token_rewards(
    scores: Tensor,
    mask: Tensor,
    kl: Tensor | None = None,
    coef: float = 0.0,
    potentials: Tensor | None = None,
) -> Tensor:
    """Compute the reward of each token: −coef × KL, plus the score at the last token inside the mask.

    rₜ = score · 1[t is the last token inside the mask] − coef · KLₜ + Φₜ₊₁ − Φₜ, where Φ = 0 after the last token

    The sum of the rewards from a token on changes by −Φₜ, which does not depend on what the policy does from there on:
    the best policy remains the same. An advantage that is estimated from few of these rewards is less noisy.

    Source: Ziegler et al. 2019 (arXiv 1909.08593), equation 2; for the potentials Φ, Ng, Harada & Russell 1999, "Policy
    invariance under reward transformations", equation 2, with γ = 1.

    Args:
        scores: [B], the score of each response.
        mask: Bool [B, T], True at the tokens of the response.
        kl: [B, T], KL(π ‖ π_ref) of each token in nats; None for no KL in the reward.
        coef: The coefficient of the KL, in units of score per nat.
        potentials: [B, T], Φₜ of the state before each token, in units of score; None for 0.

    Returns:
        [B, T], 0 outside the mask.

    Raises:
        ValueError: if the shapes do not match.

    >>> mask = torch.tensor([[True, True, False]])
    >>> token_rewards(torch.tensor([1.0]), mask, kl=torch.tensor([[2.0, 4.0, 9.0]]), coef=0.1)
    tensor([[-0.2000,  0.6000,  0.0000]])
    >>> token_rewards(torch.tensor([1.0]), mask, potentials=torch.tensor([[0.25, 0.75, 0.0]]))
    tensor([[0.5000, 0.2500, 0.0000]])
    """
    check_shapes(mask=mask, kl=kl, potentials=potentials)
    check_shapes(rows=mask.any(1), scores=scores)
    rewards = torch.zeros(mask.shape, dtype=scores.dtype, device=mask.device)
    if kl is not None:
        rewards = torch.where(mask, -coef * kl, 0.0)
    if not mask.shape[1]:
        return rewards
    if potentials is not None:
        before, time = torch.where(mask, potentials, 0.0), mask.shape[1]
        tokens = torch.arange(time, device=mask.device).expand_as(mask).masked_fill(~mask, time)
        following = F.pad(tokens[:, 1:], (0, 1), value=time).flip(1).cummin(1).values.flip(1)  # the next token's index
        rewards = rewards + F.pad(before, (0, 1)).gather(1, following) - before
    last_token = mask.shape[1] - 1 - mask.flip(1).byte().argmax(1)
    rewards[torch.arange(len(mask), device=mask.device), last_token] += scores
    return torch.where(mask, rewards, 0.0)
