"""Measurements of held-out evaluation that compare all responses to a prompt."""

from collections.abc import Hashable, Mapping

import torch
from torch import Tensor

from lit_rlhf.algorithms.pass_rates import majority_correct, pass_at_k
from lit_rlhf.modules.metrics import Metrics
from lit_rlhf.rewards import Scores
from lit_rlhf.types import RewardInputs


def measure_answers(
    metrics: Metrics, scores: Scores, reward_inputs: RewardInputs, rewards: Mapping[str, Tensor], responses: int
) -> None:
    """Record pass@k for k = 1, 2, 4, … and n, and majority@n, if a reward checks answers and n is more than 1.

    Args:
        metrics: Receives the metrics, which are means over prompts.
        scores: The rewards of the run, the first of which that checks answers decides what is correct.
        reward_inputs: n responses to each prompt, in prompt-major order.
        rewards: The unweighted rewards of these responses by name, as `Scores.judge` returns them.
        responses: n, the number of responses to each prompt.

    Raises:
        UserError: if a reward does not give one answer for each response.
    """
    checked = scores.check_answers(reward_inputs, rewards) if responses > 1 else None
    if checked is None:
        return
    numbers: dict[Hashable, int] = {None: -1}
    answers = [numbers.setdefault(answer, len(numbers)) for answer in checked.answers]
    correct = checked.correct.view(-1, responses)
    for k in [*(2**i for i in range(responses.bit_length()) if 2**i < responses), responses]:
        metrics.add(f"pass_at_{k}", pass_at_k(correct.sum(1), responses, k))
    voted = majority_correct(torch.tensor(answers, device=correct.device).view_as(correct), correct)
    metrics.add(f"majority_at_{responses}", voted)
