"""Per-token rewards, computed from the score of a response and the KL to the reference model."""

import torch
from torch import Tensor

from lit_rlhf.types import check_shapes


def token_rewards(scores: Tensor, mask: Tensor, kl: Tensor | None = None, coef: float = 0.0) -> Tensor:
    """Compute the reward of each token: −coef × KL, plus the score at the last token inside the mask.

    rₜ = score · 1[t is the last token inside the mask] − coef · KLₜ

    Source: Ziegler et al. 2019 (arXiv 1909.08593), equation 2.

    Args:
        scores: [B], the score of each response.
        mask: Bool [B, T], True at the tokens of the response.
        kl: [B, T], KL(π ‖ π_ref) of each token in nats; None for no KL in the reward.
        coef: The coefficient of the KL, in units of score per nat.

    Returns:
        [B, T], 0 outside the mask.

    Raises:
        ValueError: if the shapes do not match.

    >>> mask = torch.tensor([[True, True, False]])
    >>> token_rewards(torch.tensor([1.0]), mask, kl=torch.tensor([[2.0, 4.0, 9.0]]), coef=0.1)
    tensor([[-0.2000,  0.6000,  0.0000]])
    """
    check_shapes(mask=mask, kl=kl)
    check_shapes(rows=mask.any(1), scores=scores)
    rewards = torch.zeros(mask.shape, dtype=scores.dtype, device=mask.device)
    if kl is not None:
        rewards = torch.where(mask, -coef * kl, 0.0)
    if not mask.shape[1]:
        return rewards
    last_token = mask.shape[1] - 1 - mask.flip(1).byte().argmax(1)
    rewards[torch.arange(len(mask), device=mask.device), last_token] += scores
    return torch.where(mask, rewards, 0.0)
