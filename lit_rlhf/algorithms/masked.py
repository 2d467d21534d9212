"""Statistics of the elements that a boolean mask counts (True counts).

What stands outside the mask, NaN included, changes neither a value nor a gradient: it is replaced *before* any
arithmetic, because ``NaN * 0`` is NaN, and so is its gradient.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Reduce = Callable[[Tensor], Tensor]
Aggregation = Literal["token", "sequence", "constant"]


def _this_process(x: Tensor) -> Tensor:
    return x


def masked_sum(x: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Sum of the elements that count, Σ mₜ xₜ.

    Args:
        x: Any shape.
        mask: Bool of the same shape; True counts.
        dim: Sum over this dimension only.

    >>> masked_sum(torch.tensor([1.0, float("nan"), 3.0]), torch.tensor([True, False, True]))
    tensor(4.)
    """
    kept = torch.where(mask, x, torch.zeros_like(x))
    return kept.sum() if dim is None else kept.sum(dim)


def masked_mean(x: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Mean of the elements that count, Σ mₜ xₜ / Σ mₜ; 0 where nothing counts.

    Args:
        x: Any shape.
        mask: Bool of the same shape; True counts.
        dim: Average over this dimension only.

    >>> masked_mean(torch.tensor([1.0, float("nan"), 3.0]), torch.tensor([True, False, True]))
    tensor(2.)
    """
    count = mask.sum() if dim is None else mask.sum(dim)
    return masked_sum(x, mask, dim) / count.clamp(min=1)


def masked_var(x: Tensor, mask: Tensor, reduce: Reduce = _this_process) -> Tensor:
    """Variance Σ mₜ (xₜ − x̄)² / Σ mₜ (population form: divided by the count); 0 for one element or none.

    Args:
        x: Any shape.
        mask: Bool of the same shape; True counts.
        reduce: Sums a tensor over all ranks; by default the statistics are those of this process.

    >>> masked_var(torch.tensor([1.0, 9.0, 3.0]), torch.tensor([True, False, True]))
    tensor(1.)
    """
    return _moments(x, mask, reduce)[1]


class Whitened(NamedTuple):
    """The result of `masked_whiten`."""

    values: Tensor  # like x, 0 outside the mask
    var: Tensor  # [], the variance of x before
    scale: Tensor  # [], the factor that x was multiplied by, 1 / √(var + 1e-8)


def masked_whiten(x: Tensor, mask: Tensor, shift_mean: bool = True, reduce: Reduce = _this_process) -> Whitened:
    """Scale the elements that count to variance 1: (xₜ − x̄) / √(var + 1e-8), and 0 outside the mask.

    Args:
        x: Any shape.
        mask: Bool of the same shape; True counts.
        shift_mean: Whether the mean becomes 0; False adds x̄ again, so that the mean stays as it was.
        reduce: Sums a tensor over all ranks; by default the statistics are those of this process.

    >>> masked_whiten(torch.tensor([1.0, 9.0, 3.0]), torch.tensor([True, False, True])).values
    tensor([-1.,  0.,  1.])
    """
    x = torch.where(mask, x, torch.zeros_like(x))
    mean, var = _moments(x, mask, reduce)
    scale = torch.rsqrt(var + 1e-8)
    whitened = (x - mean) * scale
    if not shift_mean:
        whitened = whitened + mean
    return Whitened(torch.where(mask, whitened, torch.zeros_like(x)), var, scale)


def _moments(x: Tensor, mask: Tensor, reduce: Reduce) -> tuple[Tensor, Tensor]:
    """Mean and population variance; two passes, so that a large mean does not cancel the variance."""
    x = torch.where(mask, x, torch.zeros_like(x))
    count = reduce(mask.sum().to(x.dtype)).clamp(min=1)
    mean = reduce(masked_sum(x, mask)) / count
    return mean, reduce(masked_sum((x - mean) ** 2, mask)) / count


def token_weights(
    mask: Tensor,
    aggregation: Aggregation = "token",
    *,
    total_tokens: Tensor | float,
    total_sequences: Tensor | float,
    max_tokens: int,
) -> Tensor:
    r"""Weights that turn a per-token loss into its share of one optimizer step's loss, ``(weights * loss).sum()``.

    ====================  ==============================================  ======================
    aggregation           weight of a token that counts                   the sum over the step
    ====================  ==============================================  ======================
    ``token``             1 / (tokens of the step)                        mean over tokens
    ``sequence``          1 / (sequences of the step × its own length)    mean of means
    ``constant``          1 / (sequences of the step × max_tokens)        no length bias (Dr. GRPO)
    ====================  ==============================================  ======================

    As the totals are those of the whole step, the result depends neither on micro-batches nor on ranks.

    Args:
        mask: Bool [B, T].
        aggregation: The row of the table.
        total_tokens: Tokens that count in the whole optimizer step, all ranks.
        total_sequences: Sequences with at least one token that counts, in the whole step, all ranks.
        max_tokens: The fixed length of ``constant``.

    Returns:
        [B, T], 0 outside the mask.

    Raises:
        ValueError: for an aggregation that is not in the table.

    >>> mask = torch.tensor([[True, True], [True, False]])
    >>> token_weights(mask, "sequence", total_tokens=3, total_sequences=2, max_tokens=2)
    tensor([[0.2500, 0.2500],
            [0.5000, 0.0000]])
    """
    if aggregation == "token":
        per_row = torch.ones(len(mask), 1, device=mask.device) / total_tokens
    elif aggregation == "sequence":
        per_row = 1.0 / (mask.sum(1, keepdim=True).clamp(min=1) * total_sequences)
    elif aggregation == "constant":
        per_row = torch.ones(len(mask), 1, device=mask.device) / (total_sequences * max_tokens)
    else:
        raise ValueError(f"aggregation must be 'token', 'sequence' or 'constant', not {aggregation!r}")
    return torch.where(mask, per_row.float(), torch.zeros((), device=mask.device))
