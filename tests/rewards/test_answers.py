import pytest
import torch

from lit_rlhf.errors import UserError
from lit_rlhf.rewards import ExactAnswer, NumericAnswer
from lit_rlhf.rewards.answers import final_number, last_number
from lit_rlhf.types import RewardInputs, Rollout


def reward_inputs(responses, **columns) -> RewardInputs:
    count = len(responses)
    rollout = Rollout(
        tokens=torch.zeros(count, 2, dtype=torch.long),
        prompt_lengths=torch.ones(count, dtype=torch.long),
        response_lengths=torch.ones(count, dtype=torch.long),
        rollout_logprobs=torch.zeros(count, 1),
        rollout_entropy=torch.zeros(count, 1),
        response_mask=torch.ones(count, 1, dtype=torch.bool),
        terminated=torch.ones(count, dtype=torch.bool),
        group=torch.arange(count),
    )
    return RewardInputs(prompts=["q"] * count, responses=responses, columns=columns, rollout=rollout)


def numeric(response, answer, **options) -> float:
    return float(NumericAnswer(**options)(reward_inputs([response], answer=[answer])))


def test_exact_answer():
    given = reward_inputs([" Paris\n", "paris", "Paris, France", "7"], answer=["Paris", "Paris", "Paris", 7])
    assert ExactAnswer()(given).tolist() == [1, 0, 0, 1]
    assert ExactAnswer(ignore_case=True)(given).tolist() == [1, 1, 0, 1]


@pytest.mark.parametrize(
    ("response", "answer", "right"),
    [
        ("so it is\n#### 72", "70 + 2\n#### 72", True),
        ("####72.", "72", True),
        ("#### 72.0", 72, True),
        ("#### 72", 72.0, True),
        ("#### $1,072.0", "#### 1072", True),
        ("#### -5", "-5", True),
        ("#### -$5", -5, True),
        ("#### 5", "-5", False),
        ("#### 3\nno: #### 4", "4", True),
        ("#### 3\nno: #### 4", "3", False),
        ("#### 71", "72", False),
        ("72", "72", False),
        ("#### seventy", "72", False),
        ("", "72", False),
        ("#### 0.00001", 1e-05, True),
        ("#### 0", 0, True),
        ("#### 0", "3 - 3 = 0\n#### 0 (not 3)", True),
    ],
)
def test_numeric_answer(response, answer, right):
    assert numeric(response, answer) == float(right)


@pytest.mark.parametrize(
    ("response", "score"), [("#### 72", 1.0), ("#### 71", 0.1), ("72", 0.0), ("#### none", 0.0), ("none", 0.0)]
)
def test_a_marked_but_wrong_number_gets_the_format_score(response, score):
    assert numeric(response, "72", format_score=0.1) == pytest.approx(score)


@pytest.mark.parametrize(
    ("response", "score"), [("first 3, then 72 apples", 1.0), ("72, then 3", 0.0), ("#### 3, not 72", 0.1)]
)
def test_anywhere_takes_the_last_number_of_a_response_without_a_marker(response, score):
    assert numeric(response, "72", anywhere=True, format_score=0.1) == pytest.approx(score)


def test_another_marker():
    assert numeric("The answer is: 72", "72", marker="answer is:") == 1.0
    assert numeric("#### 72", "72", marker="answer is:") == 0.0


@pytest.mark.parametrize(
    ("text", "number"),
    [("1,234,567", 1234567), ("it costs $3.50.", 3.5), ("−", None), ("pages 5-10", 10), ("from 3 to -4", -4)],
)
def test_last_number(text, number):
    assert last_number(text) == number


def test_final_number_requires_the_marker():
    assert final_number("72") is None
    assert final_number("#### 72") == 72


@pytest.mark.parametrize("reward", [ExactAnswer(column="solution"), NumericAnswer(column="solution")])
def test_the_error_for_a_missing_column_names_the_existing_columns(reward):
    with pytest.raises(UserError, match=r"'solution'.*prompt, answer"):
        reward(reward_inputs(["72"], prompt=["q"], answer=["72"]))


@pytest.mark.parametrize("answer", ["seventy two", "", float("nan"), None])
def test_an_answer_without_a_number(answer):
    with pytest.raises(UserError, match=rf"answer.*'{answer}'"):
        numeric("#### 72", answer)


def test_extracted_answers():
    given = reward_inputs([" Paris\n", "#### 1,072.0", "#### 1072", "it is 7", ""])
    assert ExactAnswer().extract_answers(given) == ["Paris", "#### 1,072.0", "#### 1072", "it is 7", ""]
    assert ExactAnswer(ignore_case=True).extract_answers(given)[0] == "paris"
    assert NumericAnswer().extract_answers(given) == [None, 1072, 1072, None, None]
    assert len(set(NumericAnswer().extract_answers(given))) == 2
    assert NumericAnswer(anywhere=True).extract_answers(given) == [None, 1072, 1072, 7, None]
