"""The loss of the critic."""

import torch
from torch import Tensor

from lit_rlhf.types import check_shapes


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, clip: float | None = None) -> Tensor:
    """Compute each token's value loss: half the squared error, optionally with PPO's clipping around the old value.

    lossₜ = ½ (Vₜ − Rₜ)², or, with a clip range c, ½ max((Vₜ − Rₜ)², (V_old,t + clip(Vₜ − V_old,t, −c, c) − Rₜ)²).
    Old values and returns are constants: no gradient flows into them.

    Source: the clipped form is from OpenAI's baselines (ppo2), described in Huang et al. 2022,
    "The 37 implementation details of PPO", detail 9.

    Args:
        values: [B, T], the values Vₜ of the current critic.
        old_values: [B, T], the values of the critic at the start of the update.
        returns: [B, T], the critic's targets Rₜ.
        mask: Bool [B, T], True at the tokens that count.
        clip: The clip range c > 0, in units of the score; None for no clipping.

    Returns:
        The loss of each token, [B, T], 0 outside the mask.

    Raises:
        ValueError: if clip is not positive, or the shapes do not match.

    >>> values, returns, mask = torch.tensor([[2.0, 9.0]]), torch.tensor([[3.0, 0.0]]), torch.tensor([[True, False]])
    >>> value_loss(values, torch.zeros(1, 2), returns, mask, clip=0.5)
    tensor([[3.1250, 0.0000]])
    """
    check_shapes(values=values, old_values=old_values, returns=returns, mask=mask)
    values, old_values, returns = (torch.where(mask, x, 0.0) for x in (values, old_values.detach(), returns.detach()))
    loss = (values - returns) ** 2
    if clip is not None:
        if clip <= 0:
            raise ValueError(f"clip must be positive, not {clip}")
        clipped_values = old_values + (values - old_values).clamp(-clip, clip)
        loss = torch.maximum(loss, (clipped_values - returns) ** 2)
    return 0.5 * loss
