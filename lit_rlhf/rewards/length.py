"""A penalty for responses that come close to the maximum length."""

from torch import Tensor

from lit_rlhf.rewards.reward import Reward
from lit_rlhf.types import RewardInputs


class OverlongPenalty(Reward):
    """A reward of 0 for short responses, which falls to −1 over the last ``buffer`` tokens before the maximum length.

    For a response of |y| tokens, the reward is max(−1, min(0, (L − b − |y|) / b)) with L = ``max_tokens`` and
    b = ``buffer``. The penalty warns the model before a response is truncated; a low score that a good response gets
    only because it was truncated would be noise.

    Source: Yu et al. 2025 (DAPO, arXiv 2503.14476), equation 13.

    Args:
        max_tokens: L, the maximum length in tokens, usually ``sampling.max_tokens``.
        buffer: b, the number of tokens before the maximum length over which the penalty grows, from 1 to L.
        weight: The factor of this reward in the score.

    Raises:
        ValueError: if ``buffer`` is not from 1 to ``max_tokens``.

    >>> from lit_rlhf.rewards import make_reward_inputs
    >>> OverlongPenalty(max_tokens=2, buffer=2)(make_reward_inputs(["one token"]))
    tensor([-0.5000])
    """

    def __init__(self, max_tokens: int, buffer: int, weight: float = 1.0) -> None:
        super().__init__(weight)
        if not 1 <= buffer <= max_tokens:
            raise ValueError(f"buffer must be from 1 to max_tokens, {max_tokens}, not {buffer}")
        self.max_tokens = max_tokens
        self.buffer = buffer

    def forward(self, reward_inputs: RewardInputs) -> Tensor:
        """Return the penalty of each response, [B], from −1 to 0."""
        lengths = reward_inputs.rollout.response_lengths.float()
        return ((self.max_tokens - self.buffer - lengths) / self.buffer).clamp(min=-1.0, max=0.0)
