"""Rewards for checkable answers: exact text, and numbers in the format of GSM8K."""

import re
from collections.abc import Sequence
from decimal import Decimal, InvalidOperation

import torch
from torch import Tensor

from lit_rlhf.errors import UserError
from lit_rlhf.rewards.reward import Reward, column_of
from lit_rlhf.types import RewardInputs

NUMBER = re.compile(r"(?:(?<!\w)-)?\$?\d[\d,]*(?:\.\d+)?")


class ExactAnswer(Reward):
    """A reward of 1 if the response equals the answer, apart from surrounding white space, and 0 otherwise.

    Args:
        column: The column of the prompts that contains the correct answer.
        ignore_case: Whether to ignore case, so that "Paris" equals "paris".
        weight: The factor of this reward in the score.

    >>> from lit_rlhf.rewards import make_reward_inputs
    >>> ExactAnswer(ignore_case=True)(make_reward_inputs([" paris", "Rome"], answer=["Paris", "Paris"]))
    tensor([1., 0.])
    """

    def __init__(self, column: str = "answer", ignore_case: bool = False, weight: float = 1.0) -> None:
        super().__init__(weight)
        self.column = column
        self.ignore_case = ignore_case

    def forward(self, reward_inputs: RewardInputs) -> Tensor:
        """Return 1 for each response that equals its answer, and 0 for every other response, [B].

        Raises:
            UserError: if the prompts do not have the column.
        """
        answers = [str(answer).strip() for answer in column_of(reward_inputs, self.column)]
        if self.ignore_case:
            answers = [answer.casefold() for answer in answers]
        scores = [float(a == r) for a, r in zip(answers, self.extract_answers(reward_inputs), strict=True)]
        return torch.tensor(scores, device=reward_inputs.rollout.tokens.device)

    def extract_answers(self, reward_inputs: RewardInputs) -> Sequence[str]:
        """Return each response without surrounding white space, and case-folded if case is ignored."""
        responses = [response.strip() for response in reward_inputs.responses]
        return [response.casefold() for response in responses] if self.ignore_case else responses


class NumericAnswer(Reward):
    """A reward of 1 for a correct final number, ``format_score`` for a wrong one in the right format, and 0 otherwise.

    The final number is the number after the last marker (``#### 72``). Thousands separators and a dollar sign are
    ignored, and 72 equals 72.0.

    Args:
        column: The column of the prompts that contains the correct answer: a number, or a text in which the number
            follows the marker or is the last number.
        marker: The text before the final number.
        anywhere: Whether to use the last number of a response in which no number follows the last marker.
        format_score: The reward of a response in which a wrong number follows the marker.
        weight: The factor of this reward in the score.

    >>> from lit_rlhf.rewards import make_reward_inputs
    >>> responses = ["70 + 2 = 72\\n#### 72.0", "#### 71", "It is 72."]
    >>> NumericAnswer(format_score=0.1)(make_reward_inputs(responses, answer=[72, 72, 72]))
    tensor([1.0000, 0.1000, 0.0000])
    """

    def __init__(
        self,
        column: str = "answer",
        marker: str = "####",
        anywhere: bool = False,
        format_score: float = 0.0,
        weight: float = 1.0,
    ) -> None:
        super().__init__(weight)
        self.column = column
        self.marker = marker
        self.anywhere = anywhere
        self.format_score = format_score

    def forward(self, reward_inputs: RewardInputs) -> Tensor:
        """Compare the final number of each response with the correct answer, and return the rewards, [B].

        Raises:
            UserError: if the prompts do not have the column, or an answer in the column contains no number.
        """
        scores, answers = [], column_of(reward_inputs, self.column)
        predictions = self.extract_answers(reward_inputs)
        for response, predicted, answer in zip(reward_inputs.responses, predictions, answers, strict=True):
            text = str(answer)
            candidates = (_decimal(text), final_number(text, self.marker), last_number(text))
            correct = next((number for number in candidates if number is not None), None)
            if correct is None:
                raise UserError(f"the column {self.column} contains no number in {text[:80]!r}")
            has_format = final_number(response, self.marker) is not None
            scores.append(1.0 if predicted == correct else self.format_score if has_format else 0.0)
        return torch.tensor(scores, device=reward_inputs.rollout.tokens.device)

    def extract_answers(self, reward_inputs: RewardInputs) -> Sequence[Decimal | None]:
        """Return the final number of each response, or None for a response without a final number; 72 equals 72.0."""
        numbers = [final_number(response, self.marker) for response in reward_inputs.responses]
        if not self.anywhere:
            return numbers
        pairs = zip(numbers, reward_inputs.responses, strict=True)
        return [last_number(response) if number is None else number for number, response in pairs]


def final_number(text: str, marker: str = "####") -> Decimal | None:
    """Return the number that follows the last marker, or None if there is no marker or no number after it.

    >>> final_number("so 70 + 2 = 72\\n#### $1,072.0")
    Decimal('1072.0')
    """
    _, separator, after = text.rpartition(marker)
    match = re.match(rf"\s*({NUMBER.pattern})", after) if separator else None
    return _decimal(match.group(1)) if match else None


def last_number(text: str) -> Decimal | None:
    """Return the last number in a text, or None if the text contains no number.

    >>> last_number("between 3 and 4,000 apples")
    Decimal('4000')
    """
    numbers = NUMBER.findall(text)
    return _decimal(numbers[-1]) if numbers else None


def _decimal(text: str) -> Decimal | None:
    try:
        number = Decimal(text.replace(",", "").replace("$", ""))
    except InvalidOperation:
        return None
    return number if number.is_finite() else None
