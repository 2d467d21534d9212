"""The sampling of one token for each row, from the row's logits and one uniform random number."""

import torch
from torch import Tensor

from lit_rlhf.generation.engine import Sampling


def draw(
    logits: Tensor, uniforms: Tensor, sampling: Sampling, forbidden: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Sample one token for each row by inverting the cumulative distribution F: the first token with F(token) > u.

    At temperature 0, the most likely token is selected instead. The vocabulary is sorted only for top-p.

    Args:
        logits: [R, V] float32, before division by the temperature.
        uniforms: The random numbers u, [R] in [0, 1).
        sampling: The sampling options, of which temperature, top-k and top-p are used.
        forbidden: Bool [R, V], True for tokens that must not be sampled; None to allow all tokens.

    Returns:
        The tokens, [R] int64; their log-probabilities, [R]; and the entropies of the distributions in nats, [R]. Both
        refer to the full distribution at the sampling temperature (at 1 if the sampling temperature is 0), before
        top-k, top-p and ``forbidden`` are applied.

    >>> logits = torch.tensor([0.5, 0.2, 0.3]).log().expand(3, 3)
    >>> tokens, logprobs, entropy = draw(logits, torch.tensor([0.1, 0.6, 0.9], dtype=torch.float64), Sampling())
    >>> tokens
    tensor([0, 1, 2])
    >>> logprobs.exp()
    tensor([0.5000, 0.2000, 0.3000])
    """
    logprobs = torch.log_softmax(logits if sampling.temperature in (0, 1) else logits / sampling.temperature, -1)
    probabilities = logprobs.exp()
    if sampling.temperature == 0:
        allowed = logits if forbidden is None else logits.masked_fill(forbidden, -torch.inf)
        tokens = allowed.argmax(-1, keepdim=True)
    else:
        kept = probabilities if forbidden is None else probabilities.masked_fill(forbidden, 0.0)
        if 0 < sampling.top_k < kept.shape[-1]:
            smallest = kept.topk(sampling.top_k).values[:, -1:]
            kept = kept.masked_fill(kept < smallest, 0.0)
        if sampling.top_p < 1:
            kept = _keep_nucleus(kept, sampling.top_p)
        cumulative = _cumulative(kept, torch.float64)
        tokens = torch.searchsorted(cumulative, uniforms[:, None] * cumulative[:, -1:], right=True)
    entropy = -(probabilities * logprobs).sum(-1)
    return tokens.squeeze(1), logprobs.gather(1, tokens).squeeze(1), entropy


def _keep_nucleus(probabilities: Tensor, top_p: float) -> Tensor:
    """Set the probabilities, [R, V], to 0 outside each row's smallest set of most likely tokens that reaches top-p.

    The set has at least the share ``top_p`` of the row's sum, which may be less than 1; the result is not rescaled.
    """
    ordered, order = probabilities.sort(-1, descending=True)
    ordered = ordered / ordered.sum(-1, keepdim=True)
    before = _cumulative(ordered, ordered.dtype) - ordered
    removed = torch.zeros_like(probabilities, dtype=torch.bool).scatter(1, order, before >= top_p)
    return probabilities.masked_fill(removed, 0.0)


def _cumulative(probabilities: Tensor, dtype: torch.dtype) -> Tensor:
    """Compute the cumulative sums of each row's probabilities, with integers if results must be deterministic.

    A GPU adds floating-point numbers in an order that varies, which PyTorch refuses to do in that case. Probabilities
    are then rounded down to multiples of 2⁻⁵², and added as integers.
    """
    if not torch.are_deterministic_algorithms_enabled():
        return probabilities.cumsum(-1, dtype=dtype)
    return ((probabilities.double() * 2.0**52).long().cumsum(-1).double() / 2.0**52).to(dtype)
