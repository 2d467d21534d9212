"""The interface of rewards, functions that several rewards use, and a function that makes inputs to try rewards out."""

from abc import ABC, abstractmethod
from collections.abc import Hashable, Sequence
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from lit_rlhf.data.columns import value_at
from lit_rlhf.errors import UserError
from lit_rlhf.types import Prompt, RewardInputs, Rollout

OnFailure: TypeAlias = Literal["stop", "leave_out"]
"""What happens to a run when a reward fails: it stops, or it leaves out the responses that have no score."""


class RewardError(UserError):
    """An error because a reward has no score for some responses, or for all of them.

    Args:
        message: What failed, and for which reason.
        scores: The scores of the B responses, [B], not finite for those that have none; None if none has one.

    >>> failure = RewardError("the judge answered 'perhaps'", scores=torch.tensor([1.0, torch.nan]))
    >>> str(failure), failure.scores
    ("the judge answered 'perhaps'", tensor([1., nan]))
    """

    def __init__(self, message: str, scores: Tensor | None = None) -> None:
        super().__init__(message)
        self.scores = scores


class NotFiniteError(RewardError):
    """A `RewardError` because some of the scores, one number for each response, are NaN or infinite."""


class Reward(nn.Module, ABC):
    """The interface of rewards, which assign a number to each response.

    The parameters of a reward are neither trained nor stored in checkpoints.

    A reward fails if it raises an exception, or if it does not return one finite number for each response. With
    ``on_failure="leave_out"``, the iteration then learns nothing from the responses without a finite number, nor from
    the other responses to their prompts. A `UserError` says that the configuration is wrong, and always stops the run.

    Args:
        weight: The factor of this reward in the score, which is the weighted sum of all rewards.
        on_failure: What happens when the reward fails: ``stop`` to end the run, ``leave_out`` to leave out the
            responses without a number. The failure of a reward of weight 0 leaves out numbers, but no responses.

    Raises:
        ValueError: if ``on_failure`` is neither of the two.

    >>> class Brevity(Reward):
    ...     def forward(self, reward_inputs):
    ...         return torch.tensor([-float(len(response.split())) for response in reward_inputs.responses])
    >>> Brevity()(make_reward_inputs(["yes", "yes of course"]))
    tensor([-1., -3.])
    """

    def __init__(self, weight: float = 1.0, on_failure: OnFailure = "stop") -> None:
        super().__init__()
        if on_failure not in get_args(OnFailure):
            raise ValueError(f"rewards.on_failure must be 'stop' or 'leave_out', not {on_failure!r}")
        self.weight = weight
        self.on_failure = on_failure

    @property
    def name(self) -> str:
        """The name of this reward in metrics and samples."""
        return type(self).__name__

    @property
    def description(self) -> str:
        """A short description of this reward, for the line that lists the rewards at the start of a run."""
        return type(self).__name__

    def prepare(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Load models and files before the reward is first used.

        Args:
            tokenizer: The actor's tokenizer.
        """

    @abstractmethod
    def forward(self, reward_inputs: RewardInputs) -> Tensor:
        """Compute one number for each response, [B] float32.

        The global random generators are seeded before this method is called, and restored after it.
        """

    def extract_answers(self, reward_inputs: RewardInputs) -> Sequence[Hashable] | None:
        """Return the answer that each response gives, for pass@k and majority@n on held-out prompts.

        A response is correct if its reward is 1.

        Returns:
            B answers, in a form in which equivalent answers compare equal; None for a response without an answer.
            If the reward does not check answers (the default), None in place of the list.
        """
        return None


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


def column_of(reward_inputs: RewardInputs, name: str) -> Sequence[Any]:
    """Return the values of a column of the prompts, one for each response.

    Args:
        reward_inputs: The inputs of the reward.
        name: The name of the column, or ``column.entry`` for an entry in a column of dictionaries; the value is None
            where the dictionary lacks the entry.

    Raises:
        UserError: if the prompts do not have the column.

    >>> column_of(make_reward_inputs(["72", "7"], answer=[72, 72]), "answer")
    [72, 72]
    """
    columns = reward_inputs.columns
    if name in columns:
        return columns[name]
    column, _, entry = name.partition(".")
    if column not in columns or not entry:
        raise UserError(f"the prompts have no column {name!r}; they have: {', '.join(columns)}")
    return [value_at(value, entry) if isinstance(value, dict) else None for value in columns[column]]


def checked_scores(scores: Any, responses: Sequence[str], source: str) -> Tensor:
    """Check the scores that code or a service outside this package computed, and return them as a tensor.

    Args:
        scores: The returned value, which should have one number for each response.
        responses: The B responses that were scored.
        source: The name of the code or the service that computed the scores, for messages.

    Returns:
        The scores, [B] float32.

    Raises:
        RewardError: if the scores are not one number for each response; it has the scores of the responses that have a
            number, unless there are more or fewer scores than responses.
        NotFiniteError: if there is one number for each response, but not all of them are finite.

    >>> checked_scores([1, 0.5], ["yes", "no"], "the judge")
    tensor([1.0000, 0.5000])
    >>> checked_scores([1, "high"], ["yes", "no"], "the judge")
    Traceback (most recent call last):
        ...
    lit_rlhf.rewards.reward.RewardError: the judge should return 2 numbers, but returned 'high' for the response 'no'
    """
    count, rows = len(responses), None
    try:
        tensor = torch.as_tensor(scores, dtype=torch.float32).detach()
    except Exception as error:
        if not isinstance(scores, list) or len(scores) != count:
            reason = f"not {type(scores).__name__}: {' '.join(str(error).split())}"
            raise RewardError(f"{source} should return {count} numbers, {reason}") from error
        rows = [row for row, score in enumerate(scores) if not _is_number(score)]
        tensor = torch.tensor([torch.nan if row in rows else float(score) for row, score in enumerate(scores)])
    if tensor.shape != (count,):
        returned = f"shape {tuple(tensor.shape)}" if tensor.ndim != 1 else f"{len(tensor)}"
        raise RewardError(f"{source} should return {count} numbers, not {returned}")
    if rows:
        returned = f"but returned {_shown(scores[rows[0]])} for the response {_shown(responses[rows[0]])}"
        raise RewardError(f"{source} should return {count} numbers, {returned}", tensor)
    check_finite_scores(tensor, responses, source)
    return tensor


def check_finite_scores(scores: Tensor, responses: Sequence[str], source: str) -> None:
    """Check that the scores, [B], are finite.

    Raises:
        NotFiniteError: if a score is not finite.
    """
    finite = scores.isfinite()
    if not finite.all():
        row = int((~finite).nonzero()[0])
        message = f"{source} returned {float(scores[row])} for the response {_shown(responses[row])}"
        raise NotFiniteError(message, scores)


def _is_number(value: Any) -> bool:
    try:
        return torch.as_tensor(value, dtype=torch.float32).ndim == 0
    except Exception:
        return False


def _shown(value: Any) -> str:
    """Return the beginning of a value's repr, on one line."""
    return repr(value[:80]) if isinstance(value, str) else " ".join(repr(value).split())[:80]
