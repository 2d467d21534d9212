"""Losses of preferences: which of two responses is better, or the order of several.

Both are negative log-likelihoods of a model in which each response has a score: a reward model's, or the implicit
reward of a policy (DPO). Only differences of scores count.
"""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


def bradley_terry(
    chosen: Tensor, rejected: Tensor, margin: Tensor | None = None, label_smoothing: float = 0.0
) -> Tensor:
    """−log P(chosen beats rejected) with P = σ(s_chosen − s_rejected − margin), in nats.

    With label smoothing ε the loss is −(1 − ε) log σ(d) − ε log σ(−d): a pair is taken to be the wrong way round with
    probability ε.

    Source: Bradley & Terry 1952; the margin: Touvron et al. 2023 (Llama 2, arXiv 2307.09288), equation 2; label
    smoothing: Mitchell 2023, «A note on DPO with noisy preferences» (cDPO).

    Args:
        chosen: [B], scores of the better responses.
        rejected: [B].
        margin: [B], by how much the better should be ahead; None: 0.
        label_smoothing: ε in [0, 0.5).

    Returns:
        [B].

    Raises:
        ValueError: if label_smoothing is out of range.

    >>> bradley_terry(torch.tensor([0.0]), torch.tensor([0.0]))
    tensor([0.6931])
    """
    if not 0.0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing must be in [0, 0.5), not {label_smoothing}")
    difference = chosen - rejected - (0.0 if margin is None else margin)
    loss = -(1.0 - label_smoothing) * logsigmoid(difference)
    return loss - label_smoothing * logsigmoid(-difference) if label_smoothing else loss


def plackett_luce(scores: Tensor, mask: Tensor | None = None) -> Tensor:
    """−log P(this order), in nats: the best is drawn first, then the best of the rest, each by a softmax of scores.

    P = Π_k exp(s_k) / Σ_{j≥k} exp(s_j). At K = 2 this is Bradley–Terry.

    Source: Plackett 1975; Rafailov et al. 2023 (DPO, arXiv 2305.18290), equation 18 with scores as rewards.

    Args:
        scores: [B, K], best first.
        mask: Bool [B, K], True where there is a response; rows may have different numbers of them. None: everywhere.

    Returns:
        [B]; 0 for a row of one response or none.

    >>> plackett_luce(torch.tensor([[0.0, 0.0, 0.0]]))  # log 3!
    tensor([1.7918])
    """
    mask = torch.ones_like(scores, dtype=torch.bool) if mask is None else mask
    scores = torch.where(mask, scores, 0.0)
    places = scores.shape[1]
    later = torch.ones(places, places, dtype=torch.bool, device=scores.device).triu()
    itself = torch.eye(places, dtype=torch.bool, device=scores.device)
    remaining = later & (mask[:, None, :] | itself)  # [B, k, j]: j is still there when k is drawn
    normalizer = torch.where(remaining, scores[:, None, :], -torch.inf).logsumexp(-1)
    return torch.where(mask, normalizer - scores, 0.0).sum(1)


def implicit_reward(logprobs: Tensor, ref_logprobs: Tensor, beta: float) -> Tensor:
    """The reward for which the policy is the optimum at a KL coefficient of β, up to a constant of the prompt.

    r(x, y) = β (log π(y|x) − log π_ref(y|x)). DPO is the two losses above on it.

    Source: Rafailov et al. 2023 (arXiv 2305.18290), equation 5.

    Args:
        logprobs: [B], of whole responses under the policy.
        ref_logprobs: [B], under the reference.
        beta: β > 0, in units of reward a nat.

    Returns:
        [B].

    >>> implicit_reward(torch.tensor([-10.0]), torch.tensor([-12.0]), beta=0.1)
    tensor([0.2000])
    """
    return beta * (logprobs - ref_logprobs)
