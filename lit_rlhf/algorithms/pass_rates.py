"""Pass@k (is at least one of k responses correct?) and majority@n (is the most frequent of n answers correct?)."""

import torch
from torch import Tensor

from lit_rlhf.types import check_shapes


def pass_at_k(correct: Tensor, total: int, k: int) -> Tensor:
    """Compute pass@k, the probability that at least one of k responses to a prompt is correct.

    The unbiased estimate from n responses, c of which are correct, is 1 − C(n − c, k) / C(n, k): the share of the
    subsets of k responses that contain a correct response. The quotient is Π_{j<k} (n − c − j) / (n − j), with factors
    below 0 replaced by 0.

    Source: Chen et al. 2021 (arXiv 2107.03374), equation 1.

    Args:
        correct: c, the number of correct responses to each prompt, [P].
        total: n, the number of responses to each prompt.
        k: The number of responses of which at least one should be correct, from 1 to n.

    Returns:
        The estimate for each prompt, [P] float64.

    Raises:
        ValueError: if k is less than 1 or more than n.

    >>> pass_at_k(torch.tensor([0, 1, 3]), total=4, k=2)
    tensor([0.0000, 0.5000, 1.0000], dtype=torch.float64)
    """
    if not 1 <= k <= total:
        raise ValueError(f"k must be from 1 to total={total}, not {k}")
    others = torch.arange(k, dtype=torch.float64, device=correct.device)
    return 1 - ((total - correct[:, None] - others).clamp(min=0) / (total - others)).prod(1)


def majority_correct(answers: Tensor, correct: Tensor) -> Tensor:
    """Compute majority@n: whether the most frequent of the answers to a prompt is correct.

    If m answers tie for the most frequent, each correct one counts 1/m. Responses without an answer do not vote; a
    prompt without any answer counts 0.

    Source: Wang et al. 2023, "Self-consistency improves chain of thought reasoning in language models" (arXiv
    2203.11171), section 2 (majority vote).

    Args:
        answers: A number that identifies the answer of each of the n responses to a prompt, [P, n] int64. Equal answers
            to a prompt have equal numbers; −1 stands for no answer.
        correct: Bool [P, n], True for each response whose answer is correct.

    Returns:
        The share of correct answers among the most frequent ones, [P] float64; it is 0 or 1 without ties.

    Raises:
        ValueError: if the shapes do not match.

    >>> answers = torch.tensor([[7, 7, 8], [7, 8, -1]])
    >>> majority_correct(answers, correct=answers == 7)
    tensor([1.0000, 0.5000], dtype=torch.float64)
    """
    check_shapes(answers=answers, correct=correct)
    votes = (answers[:, :, None] == answers[:, None, :]).sum(2)
    votes = torch.where(answers >= 0, votes, 0)
    most = (votes == votes.amax(1, keepdim=True)) & (votes > 0)  # tied answers have equally many responses
    return (most & correct).sum(1).double() / most.sum(1).clamp(min=1)
