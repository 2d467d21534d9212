"""Reward functions in the forms of TRL, verl and OpenRLHF are called as they are."""

import asyncio
import json

import pytest
import torch
from transformers import AutoTokenizer

from lit_rlhf.algorithms.advantages import MonteCarlo
from lit_rlhf.data import Prompts
from lit_rlhf.errors import UserError
from lit_rlhf.generation import Sampling
from lit_rlhf.rewards import ExactAnswer, RewardFunction, make_reward_inputs
from lit_rlhf.testing import Recorder

FUNCTIONS = """\
import asyncio
import torch

SEEN = []

# --- TRL
def short(completions, **kwargs):
    return [-float(len(text)) for text in completions]

def chat(prompts, completions, answer, **kwargs):
    SEEN.append((prompts[0][-1]["content"], sorted(kwargs)))
    return [1.0 if talk[0]["content"] == right and talk[0]["role"] == "assistant" else 0.0
            for talk, right in zip(completions, answer)]

def only_sums(completions, task, **kwargs):
    return [float(text == "4") if kind == "sum" else None for text, kind in zip(completions, task)]

def ids(completions, completion_ids):
    return [float(sum(row)) for row in completion_ids]

def later(completions, trainer_state, log_metric, log_extra):
    log_metric("step", trainer_state.global_step)
    log_extra("text", completions)
    SEEN.append(trainer_state.global_step)
    return [float(trainer_state.global_step)] * len(completions)

async def judge(completions, **kwargs):
    async def one(text):
        await asyncio.sleep(0.001)
        return float(len(text))
    return await asyncio.gather(*map(one, completions))

def demanding(completions, difficulty):
    return [0.0] * len(completions)

# --- verl
def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    extra_info["seen"] = True
    SEEN.append((data_source, extra_info["index"]))
    return {"score": 1.0 if solution_str == ground_truth else 0.1, "acc": solution_str == ground_truth}

def plain(solution_str, ground_truth, method="strict"):
    return solution_str == ground_truth

async def slow(data_source, solution_str, ground_truth, extra_info=None):
    await asyncio.sleep(0.001)
    return float(ground_truth)

def batch(data_sources, solution_strs, ground_truths, extra_infos):
    return [{"score": float(a == b)} for a, b in zip(solution_strs, ground_truths)]

def no_score(data_source, solution_str, ground_truth, extra_info=None):
    return {"acc": 1.0}

# --- OpenRLHF
def reward_func(queries, prompts, labels):
    SEEN.extend(zip(queries, prompts, labels))
    scores = torch.tensor([float(q[len(p):].startswith(x)) for q, p, x in zip(queries, prompts, labels)])
    return {"rewards": scores, "scores": scores, "extra_logs": {"mean": scores.mean()}}

def as_tensor(queries, prompts, labels, **kwargs):
    return torch.tensor([len(query) for query in queries])

def as_number(queries, prompts, labels):
    return {"rewards": 0.25}

# --- none of them
def unknown(query, label):
    return [0.0]
"""


@pytest.fixture
def score(tmp_path, tiny_model):
    (tmp_path / "rewards.py").write_text(FUNCTIONS)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model("llama", chat=True))

    def run(name, responses=("4", "5"), prompts=None, **columns):
        reward = RewardFunction(f"{tmp_path}/rewards.py:{name}")
        reward.prepare(tokenizer)
        scores = reward(make_reward_inputs(list(responses), prompts, **columns))
        return scores.tolist(), reward._call.__globals__["SEEN"]

    return run


TALKS = [[{"role": "user", "content": "2 + 2"}]] * 2
VERL = {
    "data_source": ["sums", "sums"],
    "reward_model": [{"style": "rule", "ground_truth": "4"}] * 2,
    "extra_info": [{"index": 0}, {"index": 1}],
}


def test_trl(score):
    assert score("short", ["yes", "no"])[0] == [-3.0, -2.0]
    scores, seen = score("chat", prompts=TALKS, answer=["4", "4"], level=[1, 2])
    assert scores == [1.0, 0.0]
    assert seen == [("2 + 2", ["completion_ids", "level", "log_extra", "log_metric", "trainer_state"])]
    assert score("only_sums", task=["sum", "riddle"])[0] == [1.0, 0.0]
    assert score("ids")[0] == [0.0, 0.0]
    assert score("judge", ["yes", "no"])[0] == [3.0, 2.0]


def test_an_async_function_inside_a_running_loop(score):
    async def notebook():
        return score("judge", ["yes", "no"])[0]

    assert asyncio.run(notebook()) == [3.0, 2.0]


@pytest.mark.parametrize("truth", [{}, {"reward_model": ["4", "4"], "ground_truth": ["4", "4"]}])
def test_verl(score, truth):
    columns = {**VERL, **truth}
    scores, seen = score("compute_score", **columns)
    assert scores == pytest.approx([1.0, 0.1])
    assert seen == [("sums", 0), ("sums", 1)]
    assert columns["extra_info"] == [{"index": 0}, {"index": 1}]  # the function got copies
    assert score("slow", **columns)[0] == [4.0, 4.0]
    assert score("batch", **columns)[0] == [1.0, 0.0]


def test_verl_with_the_column_answer(score):
    assert score("plain", answer=["4", "4"])[0] == [1.0, 0.0]


def test_openrlhf(score):
    scores, seen = score("reward_func", prompts=["2 + 2 = ", "1 + 1 = "], answer=["4", "2"])
    assert scores == [1.0, 0.0]
    assert seen == [("2 + 2 = 4<eos>", "2 + 2 = ", "4"), ("1 + 1 = 5<eos>", "1 + 1 = ", "2")]
    talks, seen = score("reward_func", prompts=TALKS, label=["4", "4"])
    assert talks == [1.0, 0.0]
    assert seen[0][1].split() == ["<user>", "2", "+", "2", "<eos>", "<assistant>"]
    assert score("as_tensor", ["yes", "no"])[0] == [8.0, 7.0]
    assert score("as_number")[0] == [0.25, 0.25]


@pytest.mark.parametrize(
    ("name", "columns", "words"),
    [
        ("unknown", {}, ["unknown requires query, label", "f(completions", "ground_truth", "f(queries", "f(prompts"]),
        ("demanding", {}, ["demanding requires difficulty", "completion_ids", "trainer_state"]),
        ("compute_score", {"ground_truth": ["4", "4"]}, ["requires data_source", "solution_str, extra_info"]),
        ("compute_score", {"data_source": ["s", "s"]}, ["requires ground_truth"]),
        ("no_score", {**VERL}, ["no_score should return 2 numbers", "None for the response '4'"]),
    ],
)
def test_what_does_not_fit_is_one_line(score, name, columns, words):
    with pytest.raises(UserError) as error:
        score(name, **columns)
    assert all(word in str(error.value) for word in words), str(error.value)
    assert "\n" not in str(error.value)


def test_in_a_run(fit, make_module, tmp_path):
    """TRL's functions get the iteration and the tokens of the responses."""
    (tmp_path / "rewards.py").write_text(FUNCTIONS)
    rewards = [RewardFunction(f"{tmp_path}/rewards.py:{name}") for name in ("later", "ids")]
    module = make_module(rewards=rewards, critic=None, sampling=Sampling(max_tokens=4, responses=2), iterations=2)
    fit(module)
    assert rewards[0]._call.__globals__["SEEN"] == [0, 1]
    assert torch.isfinite(next(module.actor.parameters())).all()


def test_data_and_function_of_verl_in_a_run(make_module, make_trainer, tiny_model, tmp_path):
    """The scores of all iterations are those that the ground truth of each prompt's own record gives."""
    (tmp_path / "rewards.py").write_text(FUNCTIONS)
    records = [
        {"data_source": "sums", "prompt": [{"role": "user", "content": f"w{i}"}], "extra_info": {"index": i},
         "reward_model": {"style": "rule", "ground_truth": str(i)}}
        for i in range(8)
    ]  # fmt: skip
    (tmp_path / "verl.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    rewards = [RewardFunction(f"{tmp_path}/rewards.py:slow"), ExactAnswer()]
    actor = str(tiny_model("llama", chat=True))
    module, recorder = make_module(actor=actor, rewards=rewards, critic=None, advantages=MonteCarlo()), Recorder()
    data = Prompts(train=str(tmp_path / "verl.jsonl"), batch_size=4)
    make_trainer([recorder]).fit(module, datamodule=data)
    assert len(recorder.metrics) == 2
    scored = [step["rewards/slow"] for step in recorder.metrics]
    assert sum(scored) / 2 == pytest.approx(sum(range(8)) / 8)
