"""Metrics of how different responses are from one another, which show whether the policy collapses."""

import torch
from torch import Tensor
from torchmetrics import Metric

BUCKETS = 2**18
"""The number of buckets into which n-grams are hashed, so that the metrics' states have a fixed size on all ranks."""


def ngram_buckets(tokens: Tensor, mask: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Return the bucket of each n-gram of tokens, [B, T − n + 1] int64, and a bool mask of the n-grams that count.

    Args:
        tokens: [B, T] int64, the tokens of the responses.
        mask: Bool [B, T], True at the tokens of the responses; an n-gram counts if the mask is True at all its tokens.
        n: The number of consecutive tokens.

    >>> buckets, inside = ngram_buckets(torch.tensor([[5, 6, 5, 6]]), torch.tensor([[True] * 4]), n=2)
    >>> bool(buckets[0, 0] == buckets[0, 2]), bool(buckets[0, 0] == buckets[0, 1]), inside.sum().item()
    (True, False, 3)
    """
    width = max(0, tokens.shape[1] - n + 1)
    hashed, inside = torch.zeros_like(tokens[:, :width]), torch.ones_like(mask[:, :width])
    for offset in range(n):  # int64 arithmetic wraps around
        hashed = (hashed + tokens[:, offset : offset + width] + 1) * -7046029254386353131
        hashed = (hashed ^ (hashed >> 29)) * -4658895280553007687  # mixes the bits, as in splitmix64
        inside = inside & mask[:, offset : offset + width]
    return (hashed >> 40) % BUCKETS, inside


class DistinctNGrams(Metric):
    """The number of different n-grams in the responses of all ranks, as a fraction of the number of all n-grams.

    The fraction falls when responses repeat themselves or one another, and also when they become longer or more
    numerous. The number of different n-grams is estimated from the hash table by linear counting: −m log(1 − d / m) if
    d of the m buckets are in use.

    Source: Li et al. 2016 (distinct-n, arXiv 1510.03055), section 5.3; Whang et al. 1990 (linear counting).

    Args:
        n: The number of consecutive tokens in an n-gram.

    >>> distinct = DistinctNGrams(n=2)
    >>> distinct.update(torch.tensor([[5, 6, 5, 6]]), torch.tensor([[True, True, True, True]]))
    >>> round(float(distinct.compute()), 3)
    0.667
    """

    counts: Tensor

    def __init__(self, n: int) -> None:
        super().__init__()
        self.n = n
        self.add_state("counts", torch.zeros(BUCKETS, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, tokens: Tensor, mask: Tensor) -> None:
        """Add responses: the ``tokens``, [B, T] int64, at which the bool ``mask``, [B, T], is True."""
        buckets, inside = ngram_buckets(tokens, mask, self.n)
        self.counts.index_add_(0, buckets.flatten(), inside.flatten().double())

    def compute(self) -> Tensor:
        """Return the fraction, or NaN if there was no n-gram."""
        in_use = (self.counts > 0).double().mean()
        return -BUCKETS * torch.log1p(-in_use) / self.counts.sum()


class SelfSimilarity(Metric):
    """The similarity of the n-grams of two different responses, averaged over all pairs of responses of all ranks.

    Let c_i(g) be the number of times that the n-gram g occurs in response i, and f_i = c_i / |c_i|. The similarity is
    the mean of the cosine Σ_g f_i(g) f_j(g) over all pairs i ≠ j: 1 if all responses are equal, 0 if no two of them
    share an n-gram. It is computed from the sum of the vectors f_i, because Σ_{i≠j} f_i · f_j = |Σ_i f_i|² − N for N
    vectors of length 1.

    Args:
        n: The number of consecutive tokens in an n-gram.

    >>> similarity = SelfSimilarity(n=1)
    >>> similarity.update(torch.tensor([[5, 6], [5, 7]]), torch.ones(2, 2, dtype=torch.bool))
    >>> round(float(similarity.compute()), 3)
    0.5
    """

    total: Tensor
    responses: Tensor

    def __init__(self, n: int) -> None:
        super().__init__()
        self.n = n
        self.add_state("total", torch.zeros(BUCKETS, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("responses", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, tokens: Tensor, mask: Tensor) -> None:
        """Add responses: the ``tokens``, [B, T] int64, at which the bool ``mask``, [B, T], is True.

        Responses with fewer than n tokens are left out.
        """
        buckets, inside = ngram_buckets(tokens, mask, self.n)
        rows = torch.arange(len(tokens), device=tokens.device)[:, None].expand_as(buckets)
        in_row, count = torch.unique((rows * BUCKETS + buckets)[inside], return_counts=True)
        row, count = in_row // BUCKETS, count.double()
        lengths = torch.zeros(len(tokens), dtype=torch.float64, device=tokens.device).index_add(0, row, count**2).sqrt()
        self.total.index_add_(0, in_row % BUCKETS, count / lengths[row])
        self.responses += (lengths > 0).sum()

    def compute(self) -> Tensor:
        """Return the mean cosine, or NaN if there were fewer than two responses of at least n tokens."""
        pairs = self.responses * (self.responses - 1)
        return (self.total.square().sum() - self.responses) / torch.where(pairs > 0, pairs, torch.nan)
