import re

import pytest
import torch

from lit_rlhf.errors import UserError
from lit_rlhf.rewards import RewardFunction
from lit_rlhf.types import RewardInputs, Rollout

FUNCTIONS = """\
import json

SEEN = {}
NUMBER = 5

def named(responses, answer):
    return [float(r == a) for r, a in zip(responses, answer)]

def everything(**given):
    SEEN.update(given)
    return [0.5] * len(given["responses"])

def optional(prompts, terminated, tone="calm"):
    return [len(p) + ended + (tone == "calm") for p, ended in zip(prompts, terminated)]

def spare(responses, *prompts):
    return [float(len(prompts)) for _ in responses]

def as_tensor(responses):
    import torch
    return torch.arange(len(responses), dtype=torch.float64, requires_grad=True)

def as_array(responses):
    import numpy
    return numpy.array([len(r) for r in responses])

def wants_more(responses, difficulty):
    return [0.0, 0.0]

def divides(responses):
    return [1 / 0]  # divides

def inside_a_library(responses):
    return [json.loads("{") for _ in responses]  # inside_a_library

def many_lines(responses):
    raise RuntimeError("first\\nsecond")

def few(responses): return [1.0]
def scalar(responses): return 1.0
def table(responses): return [[1.0], [2.0]]
def nothing(responses): return None
def words(responses): return ["good", "bad"]
def gaps(responses): return [1.0, None]
"""


def line(comment) -> int:
    return next(number for number, text in enumerate(FUNCTIONS.splitlines(), 1) if text.endswith(f"# {comment}"))


def reward_inputs(responses, terminated=(True, False), **columns) -> RewardInputs:
    count = len(responses)
    rollout = Rollout(
        tokens=torch.zeros(count, 2, dtype=torch.long),
        prompt_lengths=torch.ones(count, dtype=torch.long),
        response_lengths=torch.ones(count, dtype=torch.long),
        rollout_logprobs=torch.zeros(count, 1),
        rollout_entropy=torch.zeros(count, 1),
        response_mask=torch.ones(count, 1, dtype=torch.bool),
        terminated=torch.tensor(terminated),
        group=torch.arange(count),
    )
    return RewardInputs(
        prompts=[f"prompt {i}" for i in range(count)], responses=responses, columns=columns, rollout=rollout
    )


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "rewards.py"
    path.write_text(FUNCTIONS)
    return path


@pytest.fixture
def score(file):
    def run(name, responses=("yes", "no"), **columns):
        reward = RewardFunction(f"{file}:{name}")
        reward.prepare(None)
        return reward(reward_inputs(list(responses), **columns))

    return run


def test_a_function_gets_only_the_columns_that_it_names(score):
    assert score("named", answer=["yes", "yes"], other=[1, 2]).tolist() == [1.0, 0.0]


def test_keyword_arguments_receive_every_column(score, file):
    reward = RewardFunction(f"{file}:everything")
    reward.prepare(None)
    scores = reward(reward_inputs(["a", "b"], answer=["x", "y"]))
    seen = reward._call.__globals__["SEEN"]
    assert scores.tolist() == [0.5, 0.5]
    assert seen == {
        "prompts": ["prompt 0", "prompt 1"],
        "responses": ["a", "b"],
        "terminated": [True, False],
        "answer": ["x", "y"],
    }


def test_a_parameter_with_a_default_needs_no_column(score):
    assert score("optional").tolist() == [10.0, 9.0]
    assert score("optional", tone="harsh").tolist() == [9.0, 8.0]


def test_positional_arguments_receive_nothing(score):
    """A parameter such as ``*prompts`` takes no keyword argument, even if there are prompts."""
    assert score("spare").tolist() == [0.0, 0.0]


@pytest.mark.parametrize(("name", "expected"), [("as_tensor", [0.0, 1.0]), ("as_array", [3.0, 2.0])])
def test_tensors_and_arrays_are_accepted_as_numbers(score, name, expected):
    scores = score(name)
    assert scores.tolist() == expected
    assert scores.dtype == torch.float32
    assert not scores.requires_grad


def test_from_a_module():
    reward = RewardFunction("lit_rlhf.data.reviews:reward", weight=2.0)
    reward.prepare(None)
    assert reward.name == "reward"
    assert reward.weight == 2.0
    assert torch.equal(reward(reward_inputs(["nothing", "nothing"])), torch.zeros(2))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (
            "divides",
            ["rewards.py:divides", "ZeroDivisionError", "division by zero", f"rewards.py, line {line('divides')}"],
        ),
        (
            "inside_a_library",
            ["rewards.py:inside_a_library", "JSONDecodeError", f"rewards.py, line {line('inside_a_library')}"],
        ),
        ("many_lines", ["RuntimeError", "first", "second"]),
        ("few", ["few", "2 numbers", "1"]),
        ("scalar", ["scalar", "2 numbers"]),
        ("table", ["table", "2 numbers", "(2, 1)"]),
        ("nothing", ["nothing", "2 numbers", "NoneType"]),
        ("words", ["words", "2 numbers"]),
        ("gaps", ["gaps", "2 numbers"]),
        ("wants_more", ["wants_more", "difficulty", "prompts", "responses", "terminated", "answer"]),
    ],
)
def test_errors_are_reported_in_one_line(score, name, words):
    with pytest.raises(UserError) as error:
        score(name, answer=["x", "y"])
    message = str(error.value)
    assert all(word in message for word in words), message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("reference", "words"),
    [
        ("{folder}/nowhere.py:f", ["nowhere.py", "no file"]),
        ("{folder}/rewards.py:nmed", ["'nmed'", "named", "everything"]),
        ("{folder}/rewards.py:NUMBER", ["NUMBER", "named"]),
        ("{folder}/broken.py:f", ["broken.py", "SyntaxError", "line 2"]),
        ("lit_rlhf.nowhere:f", ["lit_rlhf.nowhere", "ModuleNotFoundError"]),
        ("rewards.py", ["'rewards.py'", "module:name"]),
    ],
)
def test_references_that_cannot_be_resolved(file, reference, words):
    (file.parent / "broken.py").write_text("def f(responses):\n    return [\n")
    reward = RewardFunction(reference.format(folder=file.parent))
    with pytest.raises(UserError) as error:
        reward.prepare(None)
    assert all(re.search(re.escape(word), str(error.value)) for word in words), str(error.value)


def test_the_file_is_imported_once(file):
    reward = RewardFunction(f"{file}:named")
    reward.prepare(None)
    file.write_text("raise RuntimeError")
    reward.prepare(None)
    assert reward(reward_inputs(["a", "b"], answer=["a", "a"])).tolist() == [1.0, 0.0]
