"""Statistics of the elements of a tensor inside a boolean mask, and the weights of the tokens in a loss.

Elements outside the mask, NaN included, affect neither values nor gradients: they are replaced *before* any
arithmetic, because ``NaN * 0`` is NaN in both the forward and the backward pass.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from lit_rlhf.types import check_shapes

Reduce = Callable[[Tensor], Tensor]
Aggregation = Literal["token", "sequence", "constant"]


def _no_reduction(x: Tensor) -> Tensor:
    return x


def masked_sum(x: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Sum the elements inside the mask, Σ mₜ xₜ.

    Args:
        x: The elements, in any shape.
        mask: Bool, of the same shape as ``x``, True at the elements that count.
        dim: The only dimension to sum over; None for all.

    Returns:
        [], or the shape of ``x`` without ``dim``; 0 where no element is inside the mask.

    Raises:
        ValueError: if the shapes do not match.

    >>> masked_sum(torch.tensor([1.0, float("nan"), 3.0]), torch.tensor([True, False, True]))
    tensor(4.)
    """
    check_shapes(x=x, mask=mask)
    x = torch.where(mask, x, torch.zeros_like(x))
    return x.sum() if dim is None else x.sum(dim)


def masked_mean(x: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Average the elements inside the mask, Σ mₜ xₜ / Σ mₜ.

    Args:
        x: The elements, in any shape.
        mask: Bool, of the same shape as ``x``, True at the elements that count.
        dim: The only dimension to average over; None for all.

    Returns:
        [], or the shape of ``x`` without ``dim``; 0 where no element is inside the mask.

    Raises:
        ValueError: if the shapes do not match.

    >>> masked_mean(torch.tensor([1.0, float("nan"), 3.0]), torch.tensor([True, False, True]))
    tensor(2.)
    """
    count = mask.sum() if dim is None else mask.sum(dim)
    return masked_sum(x, mask, dim) / count.clamp(min=1)


def masked_var(x: Tensor, mask: Tensor, reduce: Reduce = _no_reduction) -> Tensor:
    """Compute the population variance of the elements inside the mask, Σ mₜ (xₜ − x̄)² / Σ mₜ.

    Args:
        x: The elements, in any shape.
        mask: Bool, of the same shape as ``x``, True at the elements that count.
        reduce: A function that sums a tensor over all ranks; by default, only this process is counted.

    Returns:
        []; 0 if at most one element is inside the mask.

    Raises:
        ValueError: if the shapes do not match.

    >>> masked_var(torch.tensor([1.0, 9.0, 3.0]), torch.tensor([True, False, True]))
    tensor(1.)
    """
    check_shapes(x=x, mask=mask)
    return _moments(x, mask, reduce)[1]


class Whitened(NamedTuple):
    """The result of `masked_whiten`: the whitened elements, the variance before whitening, and the scale.

    >>> whitened = masked_whiten(torch.tensor([1.0, 5.0]), torch.tensor([True, True]))
    >>> whitened.values, whitened.var, whitened.scale
    (tensor([-1.,  1.]), tensor(4.), tensor(0.5000))
    """

    values: Tensor  # the shape of x, 0 outside the mask
    var: Tensor  # [], the variance of x before whitening
    scale: Tensor  # [], the factor that x − x̄ was multiplied by, 1 / √(var + 1e-8)


def masked_whiten(x: Tensor, mask: Tensor, shift_mean: bool = True, reduce: Reduce = _no_reduction) -> Whitened:
    """Shift the elements inside the mask to mean 0 and scale them to variance 1, (xₜ − x̄) / √(var + 1e-8).

    Args:
        x: The elements, in any shape.
        mask: Bool, of the same shape as ``x``, True at the elements that count.
        shift_mean: Whether to make the mean 0; if False, x̄ is added back, which preserves the mean.
        reduce: A function that sums a tensor over all ranks; by default, only this process is counted.

    Returns:
        The whitened elements, 0 outside the mask, with the variance before whitening and the scale.

    Raises:
        ValueError: if the shapes do not match.

    >>> masked_whiten(torch.tensor([1.0, 9.0, 3.0]), torch.tensor([True, False, True])).values
    tensor([-1.,  0.,  1.])
    """
    check_shapes(x=x, mask=mask)
    x = torch.where(mask, x, torch.zeros_like(x))
    mean, var = _moments(x, mask, reduce)
    scale = torch.rsqrt(var + 1e-8)
    whitened = (x - mean) * scale
    if not shift_mean:
        whitened = whitened + mean
    return Whitened(torch.where(mask, whitened, torch.zeros_like(x)), var, scale)


def _moments(x: Tensor, mask: Tensor, reduce: Reduce) -> tuple[Tensor, Tensor]:
    """Return the mean and the population variance inside the mask; two passes keep them accurate for a large mean."""
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
    r"""Compute the weight wₜ of each token, such that Σₜ wₜ lossₜ over an optimizer step is the loss of the step.

    ====================  ==============================================  ==================================
    aggregation           weight of a token inside the mask               loss of the step
    ====================  ==============================================  ==================================
    ``token``             1 / (tokens of the step)                        mean over tokens
    ``sequence``          1 / (sequences of the step × sequence length)   mean of sequence means
    ``constant``          1 / (sequences of the step × max_tokens)        mean of sequence sums / max_tokens
    ====================  ==============================================  ==================================

    ``constant`` has no length bias (Dr. GRPO). The totals are those of the whole step, so that the loss does not depend
    on the number of micro-batches or ranks.

    Args:
        mask: Bool [B, T], True at the tokens that count.
        aggregation: ``token``, ``sequence`` or ``constant``, as in the table.
        total_tokens: The number of tokens inside the mask in the whole optimizer step, over all ranks.
        total_sequences: The number of sequences with tokens inside the mask in the whole step, over all ranks.
        max_tokens: The fixed length by which ``constant`` divides, in tokens.

    Returns:
        The weights, [B, T] float32, 0 outside the mask.

    Raises:
        ValueError: if the mask is not [B, T], or the aggregation is not in the table.

    >>> mask = torch.tensor([[True, True], [True, False]])
    >>> token_weights(mask, "sequence", total_tokens=3, total_sequences=2, max_tokens=2)
    tensor([[0.2500, 0.2500],
            [0.5000, 0.0000]])
    """
    if mask.ndim != 2:
        raise ValueError(f"mask must be [B, T], not {list(mask.shape)}")
    if aggregation == "token":
        per_row = torch.ones(len(mask), 1, device=mask.device) / total_tokens
    elif aggregation == "sequence":
        per_row = 1.0 / (mask.sum(1, keepdim=True).clamp(min=1) * total_sequences)
    elif aggregation == "constant":
        per_row = torch.ones(len(mask), 1, device=mask.device) / (total_sequences * max_tokens)
    else:
        raise ValueError(f"aggregation must be 'token', 'sequence' or 'constant', not {aggregation!r}")
    return torch.where(mask, per_row.float(), torch.zeros((), device=mask.device))
