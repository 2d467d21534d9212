"""Rewards that raise, hang, or return something else than one finite number per response."""

import asyncio
import math
import random
import threading
import time
from pathlib import Path

import numpy as np
import preloaded
import pytest
import torch
from json_service import serving

from lit_rlhf.errors import UserError
from lit_rlhf.rewards import (
    ChatEndpoint,
    Judge,
    PairwiseJudge,
    RemoteReward,
    Reward,
    RewardFunction,
    Scores,
    ScoreShaping,
    make_reward_inputs,
)
from lit_rlhf.rewards.calls import CallTimeoutError, call_in_thread, isolated
from lit_rlhf.rewards.reward import RewardError

NAN = math.nan
RESPONSES = ("one", "three", "")


def length(responses):
    return [float(len(response)) for response in responses]


class Failing:
    """A function that does one thing after the other, and scores by length when it has done them all."""

    def __init__(self, *before):
        self.before = list(before)
        self.calls = 0

    def __call__(self, responses):
        self.calls += 1
        return self.before.pop(0)(responses) if self.before else length(responses)


def raises(responses):
    raise KeyError("no such word")  # raises


def leaves(responses):
    raise SystemExit(1)


def sleeps(responses):
    time.sleep(30)  # sleeps


def loops(responses):
    while True:  # loops
        pass


def waits_in_c(responses):
    lock = threading.Lock()
    lock.acquire()
    lock.acquire(timeout=30)  # waits_in_c


async def sleeps_async(responses):
    await asyncio.sleep(30)  # sleeps_async


def line(comment) -> str:
    lines = Path(__file__).read_text().splitlines()
    return f"{__file__}, line {next(n for n, text in enumerate(lines, 1) if text.endswith(f'# {comment}'))}"


def judge(*rewards, responses=RESPONSES, **columns):
    """Return the rewards by name, the score, and the failures."""
    scores = Scores(rewards, ScoreShaping())
    for reward in rewards:
        reward.prepare(None)
    parts, score = scores.judge(make_reward_inputs(list(responses), **columns))
    return parts, score.tolist(), scores.take_failures()


def same(found, expected) -> bool:
    return np.array_equal(found, expected, equal_nan=True)


# ------------------------------------------------------------------ attempts


def test_a_function_that_fails_once_is_called_again():
    function = Failing(raises)
    assert judge(RewardFunction(function, retries=1))[1] == [3.0, 5.0, 0.0]
    assert function.calls == 2
    for nonsense in (lambda r: [1.0], lambda r: None, lambda r: [NAN] * len(r), lambda r: "high", leaves):
        assert judge(RewardFunction(Failing(nonsense), retries=1))[1] == [3.0, 5.0, 0.0]


def test_the_pauses_grow():
    function, start = Failing(raises, raises), time.monotonic()
    with pytest.raises(RewardError, match="no such word"):
        judge(RewardFunction(function, retries=1))
    assert time.monotonic() - start < 0.5
    assert judge(RewardFunction(Failing(raises, raises), retries=2))[1] == [3.0, 5.0, 0.0]
    assert time.monotonic() - start > 1.0


@pytest.mark.parametrize("function", [sleeps, loops, waits_in_c, sleeps_async], ids=lambda f: f.__name__)
def test_a_function_that_hangs_is_given_up(function):
    start = time.monotonic()
    with pytest.raises(RewardError) as error:
        judge(RewardFunction(function, timeout=0.2))
    assert time.monotonic() - start < 5
    where = "" if function is sleeps_async else f" ({line(function.__name__)})"
    assert str(error.value).startswith(
        f"the reward function {__name__}:{function.__name__} took more than 0.2 s (rewards.timeout)" + where
    )


def test_the_call_after_one_that_hangs():
    function = Failing(sleeps)
    assert judge(RewardFunction(function, timeout=0.2, retries=1))[1] == [3.0, 5.0, 0.0]
    assert judge(RewardFunction(function, timeout=10.0))[1] == [3.0, 5.0, 0.0]


def test_an_endless_loop_ends_when_it_is_given_up():
    before = set(threading.enumerate())
    with pytest.raises(CallTimeoutError):
        call_in_thread(lambda: loops(()), 0.1)
    (thread,) = set(threading.enumerate()) - before
    thread.join(10)
    assert not thread.is_alive()


def test_a_process_ends_although_functions_hang(tmp_path):
    (tmp_path / "script.py").write_text(
        "import sys, time\n"
        "from lit_rlhf.rewards import RewardFunction, make_reward_inputs\n"
        f"sys.path.append({str(Path(__file__).parent)!r})\n"
        "from test_failures import sleeps, sleeps_async\n"
        "for function in (sleeps, sleeps_async):\n"
        "    try:\n"
        "        RewardFunction(function, timeout=0.2)(make_reward_inputs(['yes']))\n"
        "    except ValueError as error:\n"
        "        print(error)\n"
    )
    start = time.monotonic()
    done = preloaded.run(str(tmp_path / "script.py"), timeout=25)
    assert time.monotonic() - start < 20
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("took more than 0.2 s") == 2


def test_a_function_with_a_time_limit_runs_as_one_without():
    def seen(responses):
        return [float(torch.is_grad_enabled()), *map(float, torch.rand(2))]

    assert judge(RewardFunction(seen))[1] == judge(RewardFunction(seen, timeout=10.0))[1]
    assert judge(RewardFunction(raises, timeout=10.0, on_failure="leave_out"))[2]["raises"].reason.endswith(
        f"raised KeyError: 'no such word' ({line('raises')})"
    )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"timeout": 0}, "rewards.timeout must be positive, or null for no limit, not 0"),
        ({"retries": -1}, "rewards.retries must be 0 or more, not -1"),
        ({"on_failure": "ignore"}, "rewards.on_failure must be 'stop' or 'leave_out', not 'ignore'"),
    ],
)
def test_values_out_of_range(options, words):
    with pytest.raises(ValueError, match=words):
        RewardFunction(length, **options)


# ------------------------------------------------------------------ what is left out


@pytest.mark.parametrize(
    ("returned", "expected", "reason"),
    [
        ([1.0, None, 2.0], [1.0, NAN, 2.0], "returned None for the response 'three'"),
        ([1.0, "high", 2.0], [1.0, NAN, 2.0], "returned 'high' for the response 'three'"),
        ([1.0, [2.0], 3.0], [1.0, NAN, 3.0], "returned [2.0] for the response 'three'"),
        ([1.0, 2.0, NAN], [1.0, 2.0, NAN], "returned nan for the response ''"),
        ([1.0, math.inf, None], [1.0, NAN, NAN], "returned None for the response ''"),
        ([-math.inf, 1e300, 2.0], [NAN, NAN, 2.0], "returned -inf for the response 'one'"),
        (torch.tensor([1.0, NAN, 2.0]), [1.0, NAN, 2.0], "returned nan for the response 'three'"),
        ([1.0], [NAN] * 3, "should return 3 numbers, not 1"),
        (1.0, [NAN] * 3, "should return 3 numbers, not shape ()"),
        ([[1.0]] * 3, [NAN] * 3, "should return 3 numbers, not shape (3, 1)"),
        (None, [NAN] * 3, "should return 3 numbers, not NoneType"),
        ("abc", [NAN] * 3, "should return 3 numbers, not str"),
    ],
    ids=repr,
)
def test_only_the_responses_without_a_number(returned, expected, reason):
    reward = RewardFunction(lambda responses: returned, on_failure="leave_out")
    parts, score, failures = judge(reward)
    assert same(score, expected)
    assert same(parts["<lambda>"], expected)
    assert failures["<lambda>"].responses == sum(map(math.isnan, expected))
    assert reason in failures["<lambda>"].reason
    with pytest.raises(RewardError):
        RewardFunction(lambda responses: returned)(make_reward_inputs(list(RESPONSES)))


def grade(solution_str, data_source=None):
    return 1 / len(solution_str)


async def grade_async(solution_str):
    return 1 / len(solution_str)


def grade_openrlhf(queries, prompts, labels):
    return {"rewards": torch.tensor([1 / len(queries[0])])}


@pytest.mark.parametrize("function", [grade, grade_async, grade_openrlhf])
def test_only_the_responses_for_which_a_function_raises(function):
    """A function that is called for each response."""
    _, score, failures = judge(RewardFunction(function, on_failure="leave_out"), responses=("four", "", "ab"))
    assert same(score, [0.25, NAN, 0.5])
    ((count, reason),) = failures.values()
    assert count == 1
    assert "raised ZeroDivisionError: division by zero" in reason
    assert __file__ in reason
    with pytest.raises(RewardError, match="ZeroDivisionError"):
        judge(RewardFunction(function), responses=("four", "", "ab"))


def test_none_of_trl_is_0():
    def trl(completions):
        return [None, 1.0, NAN]

    assert same(judge(RewardFunction(trl, on_failure="leave_out"))[1], [0.0, 1.0, NAN])


def test_a_wrong_configuration_stops_the_run():
    with pytest.raises(UserError, match="requires level"):
        judge(RewardFunction(lambda responses, level: [], on_failure="leave_out"))


class Own(Reward):
    def __init__(self, returned, **options):
        super().__init__(**options)
        self.returned = returned

    def forward(self, reward_inputs):
        if isinstance(self.returned, Exception):
            raise self.returned
        return self.returned


def test_a_reward_of_ones_own():
    some = torch.tensor([1.0, NAN, 2.0])
    assert same(judge(Own(some, on_failure="leave_out"))[1], some)
    _, score, failures = judge(Own(OSError("first\nsecond"), on_failure="leave_out"))
    assert (same(score, [NAN] * 3), failures) == (True, {"Own": (3, "OSError: first second")})
    assert same(judge(Own(some))[1], some)  # the run stops at the check of all numbers
    with pytest.raises(OSError, match="first"):
        judge(Own(OSError("first")))
    with pytest.raises(UserError, match="wrong"):
        judge(Own(UserError("wrong"), on_failure="leave_out"))


def test_a_reward_that_is_only_measured_leaves_out_no_response():
    some = torch.tensor([1.0, NAN, 2.0])
    parts, score, failures = judge(RewardFunction(length), Own(some, weight=0.0, on_failure="leave_out"))
    assert score == [3.0, 5.0, 0.0]
    assert same(parts["Own"], some)
    assert failures["Own"].responses == 1


def test_the_statistics_are_those_of_the_other_scores():
    rng, scores, so_far = np.random.default_rng(0), Scores([], ScoreShaping(normalize=True, clip=5.0)), np.array([])
    for failed in ([0, 1, 2], [1], [], [0, 2], [0, 1, 2]):
        batch = rng.normal(3.0, 2.0, 3)
        batch[failed] = NAN
        so_far = np.concatenate([so_far, batch[~np.isnan(batch)]])
        shaped = scores.shape(torch.from_numpy(batch), torch.tensor([True, True, False]), lambda x: x)
        assert shaped.isnan().tolist() == np.isnan(batch).tolist()
        if len(so_far):
            np.testing.assert_allclose(shaped, (batch - so_far.mean()) / (so_far.std() + 1e-8), rtol=1e-6)
            np.testing.assert_allclose([scores.count, scores.mean], [len(so_far), so_far.mean()])


# ------------------------------------------------------------------ services


def test_only_the_responses_of_requests_that_fail():
    """One request is refused, one is answered with nonsense, one with a number that is none, one is never answered."""
    instead = {"a": 400, "b": {"numbers": [1.0]}, "c": {"scores": [1.0, "high"]}, "d": lambda handler: time.sleep(1)}

    def answer(body):
        return instead.get(body["responses"][0], {"scores": [2.0] * len(body["responses"])})

    options = {"batch_size": 2, "connections": 1, "timeout": 0.2, "retries": 1}
    responses = [text for first in "xabcdy" for text in (first, "")]
    expected = [2.0, 2.0, NAN, NAN, NAN, NAN, 1.0, NAN, NAN, NAN, 2.0, 2.0]
    with serving(answer) as service:
        _, score, failures = judge(RemoteReward(service.url, on_failure="leave_out", **options), responses=responses)
        assert same(score, expected)
        assert failures["length"].responses == 7
        assert "answered 400" in failures["length"].reason
        assert len(service.bodies) == 7
        del service.bodies[:]
        with pytest.raises(UserError, match="answered 400"):
            judge(RemoteReward(service.url, **options), responses=responses)
        assert len(service.bodies) == 2


def said(text):
    return {"choices": [{"message": {"content": text}}]}


def test_only_the_responses_that_a_judge_does_not_rate():
    """One request is refused, one has no rating even when asked again, one has another form."""

    def answer(body):
        question = body["messages"][0]["content"]
        instead = {"refused": 400, "evasive": said("I would rather not."), "strange": {"choices": [{"message": 3}]}}
        return next(
            (instead[word] for word in instead if word in question), said("[[B]]" if "[[B]]" in question else "[[9]]")
        )

    responses = ["good", "refused", "evasive", "strange"]
    with serving(answer) as service:
        endpoint = ChatEndpoint(service.address, "large", retries=0)
        _, score, failures = judge(Judge(endpoint, scale=(1, 9), on_failure="leave_out"), responses=responses)
        assert same(score, [1.0, NAN, NAN, NAN])
        assert failures["Judge"].responses == 3
        _, score, _ = judge(
            Judge(endpoint, scale=(1, 9), unparsed=0.5, on_failure="leave_out"), responses=responses[:3]
        )
        assert same(score, [1.0, NAN, 0.5])
        pairwise = PairwiseJudge(endpoint, on_failure="leave_out")
        assert same(judge(pairwise, responses=responses, answer=["other"] * 4)[1], [0.5, NAN, NAN, NAN])
        with pytest.raises(UserError, match="answered 400"):
            judge(Judge(endpoint), responses=responses)


# ------------------------------------------------------------------ global state


def tampers(responses):
    print("scoring", end="")
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002
    torch.manual_seed(1)
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")
    torch.set_num_threads(torch.get_num_threads() + 1)
    torch.set_grad_enabled(True)
    return length(responses)


def state() -> list:
    numbers = [random.random(), np.random.rand(), float(torch.rand(()))]  # noqa: NPY002
    return [*numbers, torch.get_default_dtype(), torch.get_default_device(), torch.get_num_threads()]


@pytest.mark.parametrize("end", [length, raises])
def test_global_state_is_restored(end):
    def function(responses):
        tampers(responses)
        return end(responses)

    with isolated(seed=3), torch.no_grad():
        expected = state()
    with isolated(seed=3), torch.no_grad():
        judge(RewardFunction(function, on_failure="leave_out"))
        assert not torch.is_grad_enabled()
        assert state() == expected


def test_the_import_of_a_function_changes_nothing(tmp_path):
    (tmp_path / "careless.py").write_text("import torch\ntorch.manual_seed(1)\ndef f(responses): return [0.0]\n")
    with isolated(seed=3):
        expected = state()
    with isolated(seed=3):
        RewardFunction(f"{tmp_path / 'careless.py'}:f").prepare(None)
        assert state() == expected


def test_random_numbers_differ_between_iterations_and_repeat_in_a_resumed_run():
    def draws(responses):
        return [random.random(), np.random.rand(), float(torch.rand(()))]  # noqa: NPY002

    def at(iteration):
        inputs = make_reward_inputs(list(RESPONSES))
        object.__setattr__(inputs, "iteration", iteration)
        return Scores([RewardFunction(draws)], ScoreShaping()).judge(inputs)[1].tolist()

    assert at(4) == at(4)
    assert not set(at(4)) & set(at(5))
