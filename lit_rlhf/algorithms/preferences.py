"""Preference losses for pairs of a better and a worse response, and for rankings of several responses.

Both losses are negative log-likelihoods under a model in which each response has a score: the output of a reward model,
or the implicit reward of a policy (DPO). The losses depend only on score differences.
"""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from lit_rlhf.types import check_shapes


def bradley_terry(
    chosen: Tensor, rejected: Tensor, margin: Tensor | None = None, label_smoothing: float = 0.0
) -> Tensor:
    """Compute the Bradley–Terry loss of each pair, −log σ(d) with d = s_chosen − s_rejected − margin.

    With label smoothing ε, the loss is −(1 − ε) log σ(d) − ε log σ(−d): each label is assumed to be wrong with
    probability ε.

    Source: Bradley & Terry 1952; margin: Touvron et al. 2023 (Llama 2, arXiv 2307.09288), equation 2; label smoothing:
    Mitchell 2023, "A note on DPO with noisy preferences" (cDPO).

    Args:
        chosen: [B], scores of the better responses.
        rejected: [B], scores of the worse responses.
        margin: [B], the amount by which the better score should exceed the worse one; None for 0.
        label_smoothing: ε, the assumed probability of a wrong label, in [0, 0.5).

    Returns:
        The loss of each pair, [B], in nats.

    Raises:
        ValueError: if the shapes do not match, or label_smoothing is outside [0, 0.5).

    >>> bradley_terry(torch.tensor([0.0]), torch.tensor([0.0]))
    tensor([0.6931])
    """
    if not 0.0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing must be in [0, 0.5), not {label_smoothing}")
    check_shapes(chosen=chosen, rejected=rejected, margin=margin)
    difference = chosen - rejected - (0.0 if margin is None else margin)
    loss = -(1.0 - label_smoothing) * logsigmoid(difference)
    return loss - label_smoothing * logsigmoid(-difference) if label_smoothing else loss


def plackett_luce(scores: Tensor, mask: Tensor | None = None) -> Tensor:
    """Compute the Plackett–Luce loss of each ranking, −log P with P = Π_k exp(s_k) / Σ_{j≥k} exp(s_j).

    P is the probability of the ranking if the responses are drawn one after another, the best first, each from a
    softmax over the scores of the responses that remain. For K = 2, this is the Bradley–Terry loss.

    Source: Plackett 1975; Rafailov et al. 2023 (DPO, arXiv 2305.18290), equation 18 with scores as rewards.

    Args:
        scores: [B, K], the scores of the responses in each ranking, the best response first.
        mask: Bool [B, K], True where there is a response; rankings may differ in length. None if all have K responses.

    Returns:
        The loss of each ranking, [B], in nats; 0 for a ranking of one response or none.

    Raises:
        ValueError: if scores is not [B, K], or mask has another shape.

    >>> plackett_luce(torch.tensor([[0.0, 0.0, 0.0]]))  # log 3!
    tensor([1.7918])
    """
    if scores.ndim != 2:
        raise ValueError(f"scores must be [B, K], not {list(scores.shape)}")
    check_shapes(scores=scores, mask=mask)
    mask = torch.ones_like(scores, dtype=torch.bool) if mask is None else mask
    scores = torch.where(mask, scores, 0.0)
    ranks = scores.shape[1]
    not_before = torch.ones(ranks, ranks, dtype=torch.bool, device=scores.device).triu()
    diagonal = torch.eye(ranks, dtype=torch.bool, device=scores.device)  # keeps the softmax of a masked rank finite
    remaining = not_before & (mask[:, None, :] | diagonal)  # [B, k, j]: response j can still be drawn at rank k
    normalizer = torch.where(remaining, scores[:, None, :], -torch.inf).logsumexp(-1)
    return torch.where(mask, normalizer - scores, 0.0).sum(1)


def implicit_reward(logprobs: Tensor, ref_logprobs: Tensor, beta: float) -> Tensor:
    """Compute the implicit reward r(x, y) = β (log π(y|x) − log π_ref(y|x)) of a policy.

    π is the optimal policy for r at a KL coefficient of β, and r is unique up to a constant per prompt. DPO applies
    `bradley_terry` or `plackett_luce` to r.

    Source: Rafailov et al. 2023 (arXiv 2305.18290), equation 5.

    Args:
        logprobs: [B], the log-probabilities of whole responses under the policy.
        ref_logprobs: [B], the log-probabilities of the same responses under the reference model.
        beta: β > 0, in units of reward per nat.

    Returns:
        The implicit rewards, [B].

    Raises:
        ValueError: if the shapes do not match.

    >>> implicit_reward(torch.tensor([-10.0]), torch.tensor([-12.0]), beta=0.1)
    tensor([0.2000])
    """
    check_shapes(logprobs=logprobs, ref_logprobs=ref_logprobs)
    return beta * (logprobs - ref_logprobs)
