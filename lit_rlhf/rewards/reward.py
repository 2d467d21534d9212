"""The protocol of rewards."""

from abc import ABC, abstractmethod

from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from lit_rlhf.types import RewardInputs


class Reward(nn.Module, ABC):
    """Gives each response a number; it takes no gradient and is not in checkpoints.

    Args:
        weight: Factor of this reward in the score.
    """

    def __init__(self, weight: float = 1.0) -> None:
        super().__init__()
        self.weight = weight

    @property
    def name(self) -> str:
        """What this reward is called in metrics and samples."""
        return type(self).__name__

    def prepare(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Load what must be loaded, once, before the first use; the actor's tokenizer is given."""

    @abstractmethod
    def forward(self, reward_inputs: RewardInputs) -> Tensor:
        """[B] float32, one number a response."""
