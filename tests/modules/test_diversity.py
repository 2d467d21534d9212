import itertools
import math
from collections import Counter

import pytest
import torch

from lit_rlhf.modules.diversity import DistinctNGrams, SelfSimilarity


def random_responses(seed, rows=40, longest=30, words=50):
    g = torch.Generator().manual_seed(seed)
    tokens = torch.randint(words, (rows, longest), generator=g)
    lengths = torch.randint(1, longest + 1, (rows, 1), generator=g)
    return tokens, torch.arange(longest) < lengths


def ngrams(tokens, mask, n):
    """Return the n-grams of each response."""
    texts = [row[counts].tolist() for row, counts in zip(tokens, mask, strict=True)]
    return [Counter(zip(*(text[i:] for i in range(n)), strict=False)) for text in texts]


def cosine(one, other):
    return sum(one[g] * other[g] for g in one) / math.prod(sum(c * c for c in x.values()) ** 0.5 for x in (one, other))


@pytest.mark.parametrize("n", [1, 2, 3])
def test_they_are_those_of_a_loop_in_any_number_of_batches(n):
    tokens, mask = random_responses(n)
    counters = ngrams(tokens, mask, n)
    together = sum(counters, Counter())
    distinct, similarity = DistinctNGrams(n), SelfSimilarity(n)
    for part in torch.arange(len(tokens)).split(7):
        longest = int(mask[part].sum(1).max())  # batches are cut to their longest response
        for metric in (distinct, similarity):
            metric.update(tokens[part, :longest], mask[part, :longest])
    assert float(distinct.compute()) == pytest.approx(len(together) / together.total(), rel=2e-3)
    cosines = [cosine(a, b) for a, b in itertools.combinations([c for c in counters if c], 2)]
    assert float(similarity.compute()) == pytest.approx(sum(cosines) / len(cosines), abs=1e-4)


def test_many_different_ngrams_are_counted_though_some_share_a_bucket():
    tokens = torch.arange(100_000)[None]
    distinct = DistinctNGrams(1)
    distinct.update(tokens, torch.ones_like(tokens, dtype=torch.bool))
    assert float(distinct.compute()) == pytest.approx(1, abs=0.01)


def test_equal_responses():
    tokens, mask = random_responses(0, rows=1)
    tokens, mask = tokens.repeat(9, 1), mask.repeat(9, 1)
    distinct, similarity = DistinctNGrams(2), SelfSimilarity(2)
    distinct.update(tokens, mask)
    similarity.update(tokens, mask)
    assert float(similarity.compute()) == pytest.approx(1)
    assert float(distinct.compute()) <= 1 / 9 + 1e-3


def test_without_ngrams():
    similarity, distinct = SelfSimilarity(2), DistinctNGrams(2)
    for metric in (similarity, distinct):
        metric.update(torch.tensor([[3], [4]]), torch.ones(2, 1, dtype=torch.bool))
        assert math.isnan(float(metric.compute()))
