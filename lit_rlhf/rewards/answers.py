"""Answers that can be checked: exact text, and numbers in the manner of GSM8K."""

import re
from collections.abc import Sequence
from decimal import Decimal, InvalidOperation
from typing import Any

import torch
from torch import Tensor

from lit_rlhf.errors import UserError
from lit_rlhf.rewards.reward import Reward
from lit_rlhf.types import RewardInputs

NUMBER = re.compile(r"(?:(?<!\w)-)?\$?\d[\d,]*(?:\.\d+)?")


class ExactAnswer(Reward):
    """1 if the response, without surrounding white space, equals the column's text, else 0.

    Args:
        column: The prompts' column with the right answer.
        ignore_case: Whether «Paris» and «paris» are the same.
        weight: Factor of this reward in the score.
    """

    def __init__(self, column: str = "answer", ignore_case: bool = False, weight: float = 1.0) -> None:
        super().__init__(weight)
        self.column = column
        self.ignore_case = ignore_case

    def forward(self, reward_inputs: RewardInputs) -> Tensor:
        """0 or 1 a response, [B].

        Raises:
            UserError: if the column does not exist.
        """
        answers = [str(answer).strip() for answer in _column(reward_inputs, self.column)]
        responses = [response.strip() for response in reward_inputs.responses]
        if self.ignore_case:
            answers, responses = [a.casefold() for a in answers], [r.casefold() for r in responses]
        right = [float(a == r) for a, r in zip(answers, responses, strict=True)]
        return torch.tensor(right, device=reward_inputs.rollout.tokens.device)


class NumericAnswer(Reward):
    """1 if the response's final number equals the answer's, ``format_score`` if it only has the form, else 0.

    The final number is the one after the last marker (``#### 72``). Thousands separators and a dollar sign do not
    count, and 72 equals 72.0.

    Args:
        column: The prompts' column with the right answer: a number, or a text with the marker.
        marker: What stands before the final number.
        anywhere: Also take the last number of a response without marker.
        format_score: For a response with a marker and a wrong number.
        weight: Factor of this reward in the score.
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
        """One number a response, [B].

        Raises:
            UserError: if the column does not exist, or an answer in it has no number.
        """
        scores = []
        for response, answer in zip(reward_inputs.responses, _column(reward_inputs, self.column), strict=True):
            text = str(answer)
            candidates = (_decimal(text), final_number(text, self.marker), last_number(text))
            right = next((number for number in candidates if number is not None), None)
            if right is None:
                raise UserError(f"the column {self.column} has no number in {str(answer)[:80]!r}")
            given = final_number(response, self.marker)
            marked = given is not None
            if given is None and self.anywhere:
                given = last_number(response)
            scores.append(1.0 if given == right else self.format_score if marked else 0.0)
        return torch.tensor(scores, device=reward_inputs.rollout.tokens.device)


def final_number(text: str, marker: str = "####") -> Decimal | None:
    """The first number after the last marker, or None.

    >>> final_number("so 70 + 2 = 72\\n#### $1,072.0")
    Decimal('1072.0')
    """
    _, found, after = text.rpartition(marker)
    match = re.match(rf"\s*({NUMBER.pattern})", after) if found else None
    return _decimal(match.group(1)) if match else None


def last_number(text: str) -> Decimal | None:
    """The last number of a text, or None.

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


def _column(reward_inputs: RewardInputs, column: str) -> Sequence[Any]:
    if column not in reward_inputs.columns:
        raise UserError(f"the prompts have no column {column!r}; they have: {', '.join(reward_inputs.columns)}")
    return reward_inputs.columns[column]
