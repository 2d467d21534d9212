"""The interface of rewards, and a function that makes inputs for trying them out."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from lit_rlhf.types import Prompt, RewardInputs, Rollout


class Reward(nn.Module, ABC):
    """The interface of rewards, which assign a number to each response.

    The parameters of a reward are neither trained nor stored in checkpoints.

    Args:
        weight: The factor of this reward in the score, which is the weighted sum of all rewards.

    >>> class Brevity(Reward):
    ...     def forward(self, reward_inputs):
    ...         return torch.tensor([-float(len(response.split())) for response in reward_inputs.responses])
    >>> Brevity()(make_reward_inputs(["yes", "yes of course"]))
    tensor([-1., -3.])
    """

    def __init__(self, weight: float = 1.0) -> None:
        super().__init__()
        self.weight = weight

    @property
    def name(self) -> str:
        """The name of this reward in metrics and samples."""
        return type(self).__name__

    def prepare(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Load models and files before the reward is first used.

        Args:
            tokenizer: The actor's tokenizer.
        """

    @abstractmethod
    def forward(self, reward_inputs: RewardInputs) -> Tensor:
        """Compute one number for each response, [B] float32."""


def make_reward_inputs(
    responses: Sequence[str], prompts: Sequence[Prompt] | None = None, **columns: Sequence[Any]
) -> RewardInputs:
    """Return reward inputs made from the given texts, to try out a reward without a training run.

    Args:
        responses: B responses; all of them count as terminated, and their tokens are 0.
        prompts: B prompts; None for empty ones.
        columns: Further columns of the prompts, B values each.

    Returns:
        The inputs, for rewards that do not use the tokens.

    >>> make_reward_inputs(["72", "7"], answer=[72, 72]).columns
    {'answer': [72, 72]}
    """
    rows = len(responses)
    ones = torch.ones(rows, dtype=torch.long)
    rollout = Rollout(
        tokens=torch.zeros(rows, 2, dtype=torch.long),
        prompt_lengths=ones,
        response_lengths=ones,
        rollout_logprobs=torch.zeros(rows, 1),
        rollout_entropy=torch.zeros(rows, 1),
        response_mask=torch.ones(rows, 1, dtype=torch.bool),
        terminated=torch.ones(rows, dtype=torch.bool),
        group=torch.arange(rows),
    )
    return RewardInputs(prompts=prompts or [""] * rows, responses=responses, columns=columns, rollout=rollout)
