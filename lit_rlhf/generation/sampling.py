"""One token for each row, from logits and one uniform number a row."""

import torch
from torch import Tensor

from lit_rlhf.generation.engine import Sampling


def sample(logits: Tensor, uniforms: Tensor, sampling: Sampling, forbidden: Tensor | None = None) -> Tensor:
    """Draw tokens by the inverse of the cumulative distribution: the first token whose F(token) > u.

    Args:
        logits: [R, V] float32, before the temperature.
        uniforms: [R] float64 in [0, 1).
        sampling: Temperature, top-k and top-p.
        forbidden: Token ids that may not be drawn, or None.

    Returns:
        [R] int64.
    """
    if forbidden is not None:
        logits = logits.index_fill(1, forbidden, -torch.inf)
    if sampling.temperature == 0:
        return logits.argmax(-1)
    logits = logits / sampling.temperature
    if 0 < sampling.top_k < logits.shape[-1]:
        smallest = logits.topk(sampling.top_k).values[:, -1:]
        logits = logits.masked_fill(logits < smallest, -torch.inf)
    if sampling.top_p < 1:
        logits = _keep_nucleus(logits, sampling.top_p)
    cumulative = logits.softmax(-1).double().cumsum(-1)
    return torch.searchsorted(cumulative, uniforms[:, None] * cumulative[:, -1:], right=True).squeeze(1)


def _keep_nucleus(logits: Tensor, top_p: float) -> Tensor:
    """The most likely tokens up to and with the one at which their probability reaches ``top_p``."""
    ordered, order = logits.sort(-1, descending=True)
    probabilities = ordered.softmax(-1)
    before = probabilities.cumsum(-1) - probabilities
    outside = torch.zeros_like(logits, dtype=torch.bool).scatter(1, order, before >= top_p)
    return logits.masked_fill(outside, -torch.inf)
