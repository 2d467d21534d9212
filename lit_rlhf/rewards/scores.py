"""The combination of several rewards into one score, and the shaping of this score."""

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from lit_rlhf.algorithms.masked import Reduce, masked_sum
from lit_rlhf.errors import UserError
from lit_rlhf.randomness import Stream, row_seeds
from lit_rlhf.rewards.calls import isolated
from lit_rlhf.rewards.reward import NotFiniteError, Reward, RewardError, check_finite_scores
from lit_rlhf.types import RewardInputs


@dataclass(frozen=True)
class ScoreShaping:
    """The operations that are applied to the score, in the order of the arguments.

    Args:
        normalize: Whether to subtract the running mean and divide by the running standard deviation of all scores of
            the run so far.
        clip: The limit of the score, which is clipped to [−clip, clip]; None for no limit.
        truncation_penalty: The amount that is subtracted from the score of a truncated response; 0 or more.
        potential_every: The number of tokens after which the beginning of a response is scored again. The rewards of
            its tokens are then the differences of these scores, instead of one score at the end: potential-based
            shaping (see `token_rewards`). Each token is so rewarded for what it changes, which makes advantages less
            noisy if the rewards can judge unfinished responses. The rewards compute T / potential_every scores for a
            response of T tokens. None for no potentials.

    Raises:
        ValueError: if clip is not positive, truncation_penalty is negative, or potential_every is less than 1.

    >>> shaping = ScoreShaping(clip=5.0, truncation_penalty=1.0)
    >>> scores, terminated = torch.tensor([7.0, 7.0]), torch.tensor([True, False])
    >>> Scores([], shaping).shape(scores, terminated, reduce=lambda x: x)
    tensor([5., 4.])
    """

    normalize: bool = False
    clip: float | None = None
    truncation_penalty: float = 0.0
    potential_every: int | None = None

    def __post_init__(self) -> None:
        if self.clip is not None and self.clip <= 0:
            raise ValueError(f"scores.clip must be positive, not {self.clip}")
        if self.truncation_penalty < 0:
            raise ValueError(
                f"scores.truncation_penalty must be 0 or more (it is subtracted), not {self.truncation_penalty}"
            )
        if self.potential_every is not None and self.potential_every < 1:
            raise ValueError(f"scores.potential_every must be 1 or more, or null, not {self.potential_every}")


class CheckedAnswers(NamedTuple):
    """The answer of each response, and whether that answer is correct."""

    answers: Sequence[Hashable]  # B answers, equal if they mean the same; None for a response without an answer
    correct: Tensor  # [B] bool


class Failures(NamedTuple):
    """The failures of one reward."""

    responses: int  # the number of responses without a score
    reason: str  # of the first failure


class Scores(nn.Module):
    """The rewards of a run and their weighted sum, the score, whose running statistics are stored in checkpoints.

    Args:
        rewards: The rewards; a run needs at least one.
        shaping: The operations that are applied to the weighted sum.

    >>> from lit_rlhf.rewards import ExactAnswer, NumericAnswer, make_reward_inputs
    >>> scores = Scores([ExactAnswer(weight=0.5), NumericAnswer()], ScoreShaping())
    >>> rewards, total = scores.judge(make_reward_inputs(["#### 72", "72"], answer=["72", "72"]))
    >>> rewards
    {'ExactAnswer': tensor([0., 1.]), 'NumericAnswer': tensor([1., 0.])}
    >>> total
    tensor([1.0000, 0.5000])
    """

    count: Tensor
    mean: Tensor
    squares: Tensor

    def __init__(self, rewards: Sequence[Reward], shaping: ScoreShaping) -> None:
        super().__init__()
        self.rewards = nn.ModuleList(rewards)
        self.shaping = shaping
        self.failures: dict[str, Failures] = {}  # by the reward's name, since `take_failures` was called last
        self.told: set[str] = set()  # the names of the rewards of which a failure was printed
        for name in ("count", "mean", "squares"):  # squares: the sum of squared deviations from the mean
            self.register_buffer(name, torch.zeros((), dtype=torch.float64))

    @property
    def can_fail(self) -> bool:
        """Whether a reward leaves out responses when it fails, so that scores can be NaN."""
        return any(reward.on_failure == "leave_out" for reward in self._iterate())

    @property
    def description(self) -> str:
        """The rewards in one line, each with its weight unless the weight is 1.

        >>> from lit_rlhf.rewards import ExactAnswer, NumericAnswer
        >>> Scores([NumericAnswer(), ExactAnswer(weight=0.0)], ScoreShaping()).description
        'NumericAnswer, ExactAnswer (weight 0: only measured)'
        """
        notes = {1.0: "", 0.0: " (weight 0: only measured)"}
        return ", ".join(
            reward.description + notes.get(reward.weight, f" (weight {reward.weight:g})") for reward in self._iterate()
        )

    def prepare(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Prepare and freeze the rewards.

        Models that a reward loads here are loaded on the CPU; Lightning moves them to the process's device afterwards.
        A reward model that is already loaded stays on its device.

        Args:
            tokenizer: The actor's tokenizer.

        Raises:
            UserError: if the model, the function or a file of a reward cannot be loaded, or if the address, key or
                token of a service cannot be used.
        """
        with torch.device("cpu"):  # from_pretrained would use another default device as a device_map
            for reward in self._iterate():
                reward.prepare(tokenizer)
        self.rewards.requires_grad_(False).eval()

    @torch.no_grad()
    def judge(self, reward_inputs: RewardInputs) -> tuple[dict[str, Tensor], Tensor]:
        """Compute the rewards and the score of each response.

        Rewards change no global state (see `isolated`). The random numbers that they draw from the global generators
        depend on the run's seed, the iteration and the first prompt, so that a resumed run repeats them.

        Returns:
            The unweighted rewards by name, and the score, which is their weighted sum; each [B]. Where a reward with
            ``on_failure="leave_out"`` failed, this reward and, unless its weight is 0, the score are NaN; the numbers
            of a reward with ``on_failure="stop"`` are not finite where its code returned such numbers.

        Raises:
            UserError: if a reward with ``on_failure="stop"`` fails, or does not return a tensor of B numbers.
        """
        rewards: dict[str, Tensor] = {}
        score = torch.zeros(len(reward_inputs.responses), device=reward_inputs.rollout.tokens.device)
        for reward in self._iterate():
            name = reward.name if reward.name not in rewards else f"{reward.name}_{len(rewards)}"
            rewards[name] = self._values(reward, name, reward_inputs).to(score.device)
            if reward.weight:
                score = score + reward.weight * rewards[name]
        return rewards, score

    def left_out(self, rewards: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return, for each reward, a bool mask, [B], of the responses that it failed to score and that are left out.

        Args:
            rewards: The rewards by name, as `judge` returns them.
        """
        pairs = zip(self._iterate(), rewards.items(), strict=True)
        return {name: values.isnan() & (reward.on_failure == "leave_out") for reward, (name, values) in pairs}

    def take_failures(self) -> dict[str, Failures]:
        """Return the failures since this method was called last, by the reward's name, and forget them."""
        failures, self.failures = self.failures, {}
        return failures

    def _values(self, reward: Reward, name: str, reward_inputs: RewardInputs) -> Tensor:
        """Return what the reward gives to each response, [B] float32; NaN where it failed, if the run continues then.

        Raises:
            Exception: if the reward fails, and the run stops then.
        """
        try:
            with isolated(_seed(reward_inputs)):
                values = reward(reward_inputs)
            _check_rewards(reward, values, reward_inputs.responses)
            return values.float()
        except Exception as error:
            is_failure = isinstance(error, RewardError) or not isinstance(error, UserError)
            scores = getattr(error, "scores", None)
            if reward.on_failure == "stop" and isinstance(error, NotFiniteError) and scores is not None:
                return scores.float()
            if reward.on_failure == "stop" or not is_failure:
                raise
            values = torch.full((len(reward_inputs.responses),), torch.nan) if scores is None else scores.float()
            values = values.masked_fill(~values.isfinite(), torch.nan)
            told = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
            before = self.failures.get(name, Failures(0, " ".join(told.split())))
            self.failures[name] = before._replace(responses=before.responses + int(values.isnan().sum()))
            return values

    def check_answers(self, reward_inputs: RewardInputs, rewards: Mapping[str, Tensor]) -> CheckedAnswers | None:
        """Return the answer of each response, and whether it is correct; None if no reward checks answers.

        If several rewards check answers, the first of them decides.

        Args:
            reward_inputs: The responses.
            rewards: The unweighted rewards of these responses by name, as `judge` returns them.

        Raises:
            UserError: if that reward does not give one answer for each response.
        """
        for reward, values in zip(self._iterate(), rewards.values(), strict=True):
            answers = reward.extract_answers(reward_inputs)
            if answers is not None:
                count = len(reward_inputs.responses)
                if len(answers) != count:
                    raise UserError(f"the reward {reward.name} should extract {count} answers, not {len(answers)}")
                return CheckedAnswers(answers, values == 1)
        return None

    @torch.no_grad()
    def shape(self, scores: Tensor, terminated: Tensor, reduce: Reduce) -> Tensor:
        """Normalise and clip the scores, and penalise truncated responses, as ``shaping`` specifies.

        Normalisation first updates the running statistics with these scores, except those that are NaN.

        Args:
            scores: [B], the score of each response; NaN stays NaN.
            terminated: Bool [B], True if a stop token ended the response.
            reduce: A function that sums a tensor over all ranks.

        Returns:
            The shaped scores, [B].
        """
        if self.shaping.normalize:
            self._update_statistics(scores.double(), reduce)
        scores = self.scale(scores)
        return torch.where(terminated, scores, scores - self.shaping.truncation_penalty)

    def scale(self, scores: Tensor) -> Tensor:
        """Return scores, [B], normalised by the statistics so far, and clipped, as ``shaping`` specifies."""
        if self.shaping.normalize:
            std = (self.squares / self.count).sqrt()
            differ = std > 1e-6 * self.mean.abs()  # by more than rounding; else the scores are only centred
            scores = ((scores.double() - self.mean) / torch.where(differ, std + 1e-8, 1.0)).to(scores.dtype)
        if self.shaping.clip is not None:
            scores = scores.clamp(-self.shaping.clip, self.shaping.clip)
        return scores

    def _iterate(self) -> Iterator[Reward]:
        return iter(self.rewards)  # type: ignore[arg-type]

    def _update_statistics(self, scores: Tensor, reduce: Reduce) -> None:
        """Merge the scores of all ranks that are not NaN into the running statistics.

        Source: Chan, Golub & LeVeque 1983, "Algorithms for computing the sample variance: analysis and
        recommendations", for merging the means and sums of squared deviations of two samples.
        """
        mask = ~scores.isnan()
        count = reduce(mask.sum(dtype=torch.float64))
        mean = reduce(masked_sum(scores, mask)) / count.clamp(min=1)
        squares = reduce(masked_sum((scores - mean) ** 2, mask))
        total = (self.count + count).clamp(min=1)
        delta = mean - self.mean
        self.squares += squares + delta**2 * self.count * count / total
        self.mean += delta * count / total
        self.count += count


def _seed(reward_inputs: RewardInputs) -> int | None:
    seeds = row_seeds(Stream.REWARDS, reward_inputs.iteration, reward_inputs.rollout.group[:1])
    return seeds[0] if seeds else None


def _check_rewards(reward: Reward, values: Any, responses: Sequence[str]) -> None:
    count = len(responses)
    if not isinstance(values, Tensor) or values.shape != (count,):
        returned = f"shape {tuple(values.shape)}" if isinstance(values, Tensor) else type(values).__name__
        raise RewardError(f"the reward {reward.name} should return a tensor of {count} numbers, not {returned}")
    check_finite_scores(values, responses, f"the reward {reward.name}")
