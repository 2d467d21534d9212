"""One token for each row, from logits and one uniform number a row."""

import torch
from torch import Tensor

from lit_rlhf.generation.engine import Sampling


def draw(
    logits: Tensor, uniforms: Tensor, sampling: Sampling, forbidden: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw tokens by the inverse of the cumulative distribution: the first token whose F(token) > u.

    The vocabulary is sorted only where top-p asks for it.

    Args:
        logits: [R, V] float32, before the temperature.
        uniforms: [R] float64 in [0, 1).
        sampling: Temperature, top-k and top-p.
        forbidden: Bool [R, V], tokens that may not be drawn, or None.

    Returns:
        The tokens, [R] int64; their log-probabilities in the whole distribution at the temperature, before anything was
        cut from it, [R]; and that distribution's entropy in nats, [R].
    """
    logprobs = torch.log_softmax(logits if sampling.temperature in (0, 1) else logits / sampling.temperature, -1)
    probabilities = logprobs.exp()
    if sampling.temperature == 0:
        allowed = logits if forbidden is None else logits.masked_fill(forbidden, -torch.inf)
        tokens = allowed.argmax(-1, keepdim=True)
    else:
        left = probabilities if forbidden is None else probabilities.masked_fill(forbidden, 0.0)
        if 0 < sampling.top_k < left.shape[-1]:
            smallest = left.topk(sampling.top_k).values[:, -1:]
            left = left.masked_fill(left < smallest, 0.0)
        if sampling.top_p < 1:
            left = _keep_nucleus(left, sampling.top_p)
        cumulative = left.cumsum(-1, dtype=torch.float64)
        tokens = torch.searchsorted(cumulative, uniforms[:, None] * cumulative[:, -1:], right=True)
    entropy = -(probabilities * logprobs).sum(-1)
    return tokens.squeeze(1), logprobs.gather(1, tokens).squeeze(1), entropy


def _keep_nucleus(probabilities: Tensor, top_p: float) -> Tensor:
    """The most likely tokens up to and with the one at which their share of the whole reaches ``top_p``."""
    ordered, order = probabilities.sort(-1, descending=True)
    ordered = ordered / ordered.sum(-1, keepdim=True)
    before = ordered.cumsum(-1) - ordered
    outside = torch.zeros_like(probabilities, dtype=torch.bool).scatter(1, order, before >= top_p)
    return probabilities.masked_fill(outside, 0.0)
