"""What can be reached from a start at a KL without training: best-of-n and the exponentially tilted policy.

Both are estimated from k scored responses to each of P prompts, drawn from the start, which is the policy before
training. The KL is KL(policy ‖ start) over whole responses, in nats per response.
"""

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Point(NamedTuple):
    """The KL of a policy to the start, and its score."""

    kl: float  # nats per response
    score: float


def best_of_n_kl(n: int) -> float:
    """Return KL(best of n ‖ start) = log n − (n − 1)/n, in nats; an upper bound if scores can be equal.

    Source: Beirami et al. 2024 (arXiv 2401.01879), equation 2 (which they show to be a bound).

    >>> round(best_of_n_kl(4), 3)
    0.636
    """
    return math.log(n) - (n - 1) / n


def best_of_n(scores: Tensor, n: int) -> Point:
    """Return the KL and the expected score of the best of n responses of the start.

    With a prompt's scores in ascending order s₁ ≤ … ≤ s_k, the mean of the maximum over all subsets of n of them is
    Σᵢ sᵢ C(i − 1, n − 1) / C(k, n), an unbiased estimate of the expected maximum; it is averaged over the prompts.

    Args:
        scores: [P, k], the scores of k responses to each prompt.
        n: The number of responses of which the best is taken, from 1 to k.

    Raises:
        ValueError: if n is not from 1 to k.

    >>> round(best_of_n(torch.tensor([[0.0, 1.0, 2.0]]), 2).score, 3)  # the maxima are 1, 2 and 2
    1.667
    """
    count = scores.shape[1]
    if not 1 <= n <= count:
        raise ValueError(f"n must be from 1 to the number of responses, {count}, not {n}")
    weights = [math.comb(i, n - 1) / math.comb(count, n) for i in range(count)]
    ascending = scores.double().sort(1).values
    return Point(best_of_n_kl(n), float((ascending @ torch.tensor(weights, dtype=torch.float64)).mean()))


class Tilted(NamedTuple):
    """An estimate of the exponentially tilted policy, with the number of samples that it is worth."""

    kl: float  # nats per response
    score: float
    effective_samples: float  # (Σ w)² / Σ w² for a prompt, averaged over the prompts; at most k


def tilted(scores: Tensor, coef: float) -> Tilted:
    """Return the KL and the score of p(y) ∝ start(y) exp(score(y) / coef), the best policy at its KL.

    No policy has a higher score − coef · KL. The estimate reweights the samples of each prompt with wᵢ ∝ exp(sᵢ / coef)
    and is too low where few samples bear most of the weight: the effective number of samples is then small.

    Source: Rafailov et al. 2023 (arXiv 2305.18290), equation 4; effective sample size: Kong 1992.

    Args:
        scores: [P, k], the scores of k responses to each prompt.
        coef: The coefficient of the KL, in units of score per nat; positive.

    >>> point = tilted(torch.tensor([[0.0, 1.0]]), coef=1.0)
    >>> round(point.score, 3), round(point.kl, 3), round(point.effective_samples, 2)
    (0.731, 0.111, 1.65)
    """
    log_weights = torch.log_softmax(scores.double() / coef, 1)
    weights = log_weights.exp()
    kl = (weights * (log_weights + math.log(scores.shape[1]))).sum(1)
    return Tilted(
        kl=float(kl.mean()),
        score=float((weights * scores).sum(1).mean()),
        effective_samples=float((1 / weights.square().sum(1)).mean()),
    )


def least_kl(scores: Tensor, score: float) -> float:
    """Return the KL of the tilted policy that has a score: every policy with this score has at least this KL.

    The coefficient is found by bisection. The estimate is too high where the tilted policy is worth few samples.

    Args:
        scores: [P, k], the scores of k responses of the start to each prompt.
        score: The score to reach.

    Returns:
        The KL in nats per response; 0 up to the start's score, and infinity if the samples do not reach the score.

    >>> round(least_kl(torch.tensor([[0.0, 1.0]]), score=0.731), 3)
    0.111
    """
    if score <= float(scores.double().mean()):
        return 0.0
    low, high = 1e-3, 1e3  # of the coefficient, in standard deviations
    unit = float(scores.double().std(1).mean())
    if unit == 0 or tilted(scores, low * unit).score < score:
        return math.inf
    for _ in range(50):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if tilted(scores, middle * unit).score > score else (low, middle)
    return tilted(scores, high * unit).kl


def kl_at_score(points: Sequence[Point], score: float) -> float:
    """Return the lowest KL at which the points reach a score, interpolated over √KL; infinity if they do not.

    A rise in score is nearly linear in √KL near the start (Gao et al. 2022, arXiv 2210.10760), so two points of a run
    that are far apart in KL can be joined.

    Args:
        points: The measurements of a run in their order, beginning with the start at a KL of 0.
        score: The score to reach.

    >>> kl_at_score([Point(0.0, 1.0), Point(4.0, 2.0)], 1.5)
    1.0
    """
    found = math.inf
    for before, after in itertools.pairwise(points):
        if min(before.score, after.score) <= score <= max(before.score, after.score) and before.score != after.score:
            share = (score - before.score) / (after.score - before.score)
            root = (1 - share) * math.sqrt(max(before.kl, 0.0)) + share * math.sqrt(max(after.kl, 0.0))
            found = min(found, root**2)
    return found
