import itertools
import math
import random
from collections import Counter
from fractions import Fraction

import pytest
import torch

from lit_rlhf.algorithms.pass_rates import majority_correct, pass_at_k


def test_pass_at_k_by_hand():
    """Of the 10 pairs of 5 responses, 7 contain one of 2 correct ones; the others are the 3 pairs of the wrong ones."""
    assert pass_at_k(torch.tensor([2]), 5, 2).tolist() == pytest.approx([0.7])
    assert pass_at_k(torch.tensor([0, 2, 5]), 5, 1).tolist() == pytest.approx([0, 0.4, 1])
    assert pass_at_k(torch.tensor([0, 1, 5]), 5, 5).tolist() == [0, 1, 1]


def test_pass_at_k_is_the_share_of_subsets_with_a_correct_response():
    for n in range(1, 7):
        for k in range(1, n + 1):
            shares = []
            for c in range(n + 1):
                subsets = list(itertools.combinations([True] * c + [False] * (n - c), k))
                shares.append(sum(any(subset) for subset in subsets) / len(subsets))
            assert pass_at_k(torch.arange(n + 1), n, k).tolist() == pytest.approx(shares, abs=1e-12)


def test_pass_at_k_of_many_responses():
    """The binomial coefficients have up to 300 digits; fractions of integers compute them exactly."""
    n, counts = 1024, torch.tensor([0, 1, 3, 500, 1000, 1024])
    for k in (1, 8, 512, 1024):
        exact = [float(1 - Fraction(math.comb(n - c, k), math.comb(n, k))) for c in counts.tolist()]
        assert pass_at_k(counts, n, k).tolist() == pytest.approx(exact, rel=1e-10, abs=1e-12)


@pytest.mark.parametrize("k", [0, 5])
def test_k_is_between_1_and_the_number_of_responses(k):
    with pytest.raises(ValueError, match=f"k must be from 1 to total=4, not {k}"):
        pass_at_k(torch.tensor([1]), 4, k)


def test_majority_by_hand():
    """A majority, a tie of three of which one is correct, a majority of no answers, and no answer at all."""
    answers = torch.tensor([[3, 1, 3, 2], [1, 2, 3, -1], [-1, -1, 1, -1], [-1, -1, -1, -1]])
    correct = answers == torch.tensor([[3], [2], [1], [0]])
    assert majority_correct(answers, correct).tolist() == pytest.approx([1, 1 / 3, 1, 0])
    assert majority_correct(answers, ~correct & (answers >= 0)).tolist() == pytest.approx([0, 2 / 3, 0, 0])


def test_majority_equals_counting():
    rng = random.Random(0)
    for _ in range(200):
        n, right = rng.randint(1, 6), rng.randrange(3)
        answers = [rng.randrange(-1, 3) for _ in range(n)]
        counts = Counter(answer for answer in answers if answer >= 0)
        most = [answer for answer, count in counts.items() if count == max(counts.values())]
        expected = (right in most) / len(most) if most else 0.0
        rows = torch.tensor([answers])
        assert float(majority_correct(rows, rows == right)) == pytest.approx(expected)
