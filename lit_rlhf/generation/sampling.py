"""Sampling of one token for each row, from the row's logits and one uniform random number."""

import torch
from torch import Tensor

from lit_rlhf.generation.engine import Sampling


def draw(
    logits: Tensor, uniforms: Tensor, sampling: Sampling, forbidden: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Sample one token for each row: the first one at which the row's cumulative probability exceeds u.

    The number u is the row's entry of ``uniforms``. The temperature, ``forbidden``, top-k and top-p are applied to the
    distribution first, and the result is normalized. At temperature 0, the most likely token that is not forbidden is
    selected instead. The vocabulary is sorted only if top-p is used.

    Args:
        logits: The logits of R rows, [R, V] float32, before division by the temperature.
        uniforms: The random numbers u, one for each row, [R] in [0, 1).
        sampling: The options for sampling, of which the temperature, top-k and top-p are used.
        forbidden: Bool [R, V], True for tokens that must not be sampled; None to allow all tokens.

    Returns:
        The tokens, [R] int64; the log-probabilities of the tokens in nats, [R]; and the entropies of the rows'
        distributions in nats, [R]. The log-probabilities and the entropies refer to the full distribution at the
        sampling temperature (at temperature 1 if the sampling temperature is 0), before ``forbidden``, top-k and top-p
        are applied.

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
        tokens = tokens.clamp(max=logits.shape[-1] - 1)  # of a row with NaN, which no index may leave on a GPU
    entropy = -(probabilities * logprobs).sum(-1)
    return tokens.squeeze(1), logprobs.gather(1, tokens).squeeze(1), entropy


def _keep_nucleus(probabilities: Tensor, top_p: float) -> Tensor:
    """Return the probabilities, [R, V], with those outside each row's nucleus set to 0; the others are not rescaled.

    The nucleus is the smallest set of most likely tokens whose probabilities add up to at least the share ``top_p`` of
    the row's sum. This sum may be less than 1.
    """
    ordered, order = probabilities.sort(-1, descending=True)
    ordered = ordered / ordered.sum(-1, keepdim=True)
    before = _cumulative(ordered, ordered.dtype) - ordered
    removed = torch.zeros_like(probabilities, dtype=torch.bool).scatter(1, order, before >= top_p)
    return probabilities.masked_fill(removed, 0.0)


def _cumulative(probabilities: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the cumulative sums of each row's probabilities, [R, V], in the data type ``dtype``.

    A GPU adds floating-point numbers in a varying order, so PyTorch refuses to compute their cumulative sums if
    deterministic algorithms are enabled. In this case, the probabilities are rounded down to multiples of 2⁻⁵², which
    are added as integers.

    Args:
        probabilities: [R, V], floating-point numbers.
        dtype: The data type of the result.
    """
    if not torch.are_deterministic_algorithms_enabled():
        return probabilities.cumsum(-1, dtype=dtype)
    return ((probabilities.double() * 2.0**52).long().cumsum(-1).double() / 2.0**52).to(dtype)
