"""From several rewards to one score, and from the score to what enters the reward."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from lit_rlhf.algorithms.masked import Reduce
from lit_rlhf.rewards.reward import Reward
from lit_rlhf.types import RewardInputs


@dataclass(frozen=True)
class ScoreShaping:
    """What happens to the score, in this order.

    Args:
        normalize: Subtract the running mean and divide by the running deviation, over all scores of the run so far.
        clip: Then clip to [−clip, clip]; None: not at all.
        truncation_penalty: Then subtract this, 0 or more, from responses that did not end by themselves.

    Raises:
        ValueError: if clip is not positive, or the penalty negative.
    """

    normalize: bool = False
    clip: float | None = None
    truncation_penalty: float = 0.0

    def __post_init__(self) -> None:
        if self.clip is not None and self.clip <= 0:
            raise ValueError(f"scores.clip must be positive, not {self.clip}")
        if self.truncation_penalty < 0:
            raise ValueError(
                f"scores.truncation_penalty must be 0 or more (it is subtracted), not {self.truncation_penalty}"
            )


class Scores(nn.Module):
    """The rewards, their weighted sum, and the running statistics of it (in the checkpoint).

    Args:
        rewards: At least one.
        shaping: What happens to their sum.
    """

    count: Tensor
    mean: Tensor
    squares: Tensor

    def __init__(self, rewards: Sequence[Reward], shaping: ScoreShaping) -> None:
        super().__init__()
        self.rewards = nn.ModuleList(rewards)
        self.shaping = shaping
        for name in ("count", "mean", "squares"):  # of Welford's algorithm: squares is the sum of squared deviations
            self.register_buffer(name, torch.zeros((), dtype=torch.float64))

    def prepare(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Load what the rewards need on the CPU; Lightning moves the models to its device afterwards.

        Args:
            tokenizer: The actor's.
        """
        with torch.device("cpu"):  # from_pretrained takes another default device for a device_map
            for reward in self._each():
                reward.prepare(tokenizer)
        self.rewards.requires_grad_(False).eval()

    @torch.no_grad()
    def judge(self, reward_inputs: RewardInputs) -> tuple[dict[str, Tensor], Tensor]:
        """Each reward by name, unweighted, and the score, their weighted sum; each [B]."""
        parts: dict[str, Tensor] = {}
        total = torch.zeros(len(reward_inputs.responses), device=reward_inputs.rollout.tokens.device)
        for reward in self._each():
            value = reward(reward_inputs).float()
            name = reward.name if reward.name not in parts else f"{reward.name}_{len(parts)}"
            parts[name] = value
            total = total + reward.weight * value
        return parts, total

    @torch.no_grad()
    def shape(self, scores: Tensor, terminated: Tensor, reduce: Reduce) -> Tensor:
        """Normalise, clip, penalise truncation; [B]. The running statistics take these scores in first.

        Args:
            scores: [B].
            terminated: Bool [B].
            reduce: Sums a tensor over all ranks.
        """
        if self.shaping.normalize:
            self._observe(scores.double(), reduce)
            deviation = (self.squares / self.count).sqrt()
            scores = ((scores.double() - self.mean) / (deviation + 1e-8)).to(scores.dtype)
        if self.shaping.clip is not None:
            scores = scores.clamp(-self.shaping.clip, self.shaping.clip)
        return torch.where(terminated, scores, scores - self.shaping.truncation_penalty)

    def _each(self) -> Iterator[Reward]:
        return iter(self.rewards)  # type: ignore[arg-type]

    def _observe(self, scores: Tensor, reduce: Reduce) -> None:
        """Chan et al.'s merge of two samples' means and sums of squared deviations."""
        count = reduce(torch.tensor(float(len(scores)), dtype=torch.float64, device=scores.device))
        mean = reduce(scores.sum()) / count
        squares = reduce(((scores - mean) ** 2).sum())
        total = self.count + count
        delta = mean - self.mean
        self.squares += squares + delta**2 * self.count * count / total
        self.mean += delta * count / total
        self.count += count
