"""One token for each row, from logits and one uniform number a row."""

import torch
from torch import Tensor

from lit_rlhf.generation.engine import Sampling


def draw(
    logits: Tensor, uniforms: Tensor, sampling: Sampling, forbidden: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Draw tokens by the inverse of the cumulative distribution: the first token whose F(token) > u.

    The vocabulary is sorted only where top-p asks for it.

    Args:
        logits: [R, V] float32, before the temperature.
        uniforms: [R] float64 in [0, 1).
        sampling: Temperature, top-k and top-p.
        forbidden: Bool [R, V], tokens that may not be drawn, or None.

    Returns:
        The tokens, [R] int64, and their log-probabilities in the whole distribution at the temperature, before anything
        was cut from it, [R].
    """
    logprobs = torch.log_softmax(logits if sampling.temperature in (0, 1) else logits / sampling.temperature, -1)
    left = logprobs if forbidden is None else logprobs.masked_fill(forbidden, -torch.inf)
    if sampling.temperature == 0:
        tokens = left.argmax(-1, keepdim=True)
    else:
        if 0 < sampling.top_k < left.shape[-1]:
            smallest = left.topk(sampling.top_k).values[:, -1:]
            left = left.masked_fill(left < smallest, -torch.inf)
        if sampling.top_p < 1:
            left = _keep_nucleus(left, sampling.top_p)
        cumulative = left.exp().cumsum(-1, dtype=torch.float64)
        tokens = torch.searchsorted(cumulative, uniforms[:, None] * cumulative[:, -1:], right=True)
    return tokens.squeeze(1), logprobs.gather(1, tokens).squeeze(1)


def _keep_nucleus(logits: Tensor, top_p: float) -> Tensor:
    """The most likely tokens up to and with the one at which their probability reaches ``top_p``."""
    ordered, order = logits.sort(-1, descending=True)
    probabilities = ordered.softmax(-1)
    before = probabilities.cumsum(-1) - probabilities
    outside = torch.zeros_like(logits, dtype=torch.bool).scatter(1, order, before >= top_p)
    return logits.masked_fill(outside, -torch.inf)
