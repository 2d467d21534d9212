"""A reward from a service, which misbehaves as each test says."""

import pickle
import re
import socket
import time
from datetime import date
from pathlib import Path

import pytest
import torch
import yaml
from json_service import serving

from lit_rlhf.cli import main
from lit_rlhf.errors import UserError
from lit_rlhf.rewards import RemoteReward, Scores, ScoreShaping, make_reward_inputs
from lit_rlhf.testing import Recorder

TOKEN = "s3cr3t-0123456789"


def lengths(body) -> dict:
    return {"scores": [len(response) for response in body["responses"]]}


def drop(handler) -> None:
    handler.connection.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def service():
    with serving(lengths) as server:
        yield server


def score(reward, responses=("one", "three"), **columns):
    reward.prepare(tokenizer=None)
    return reward(make_reward_inputs(list(responses), **columns))


def message(reward, **columns) -> str:
    with pytest.raises(UserError) as error:
        score(reward, **columns)
    assert "\n" not in str(error.value)
    return str(error.value)


# ------------------------------------------------------------------ what is sent


def test_a_request_has_everything_that_a_reward_may_use(service):
    talk = [{"role": "user", "content": "2 · 3 = ?"}]
    inputs = make_reward_inputs(["six", "seven"], prompts=["1 + 1 = ?", talk], answer=[2, None], tags=[["a"], {"b": 1}])
    inputs.rollout.terminated[1] = False
    scores = RemoteReward(service.url)(inputs)
    assert scores.tolist() == [3.0, 5.0]
    assert scores.dtype == torch.float32
    assert service.bodies == [
        {
            "prompts": ["1 + 1 = ?", talk],
            "responses": ["six", "seven"],
            "terminated": [True, False],
            "columns": {"answer": [2, None], "tags": [["a"], {"b": 1}]},
        }
    ]


def test_scores_arrive_in_order_over_several_requests_and_connections(service):
    """The later a request was sent, the sooner it is answered."""

    def slow(handler):
        time.sleep(0.3)
        handler.react(lengths(service.bodies[0]))

    service.instead = [slow]
    responses = ["x" * length for length in (5, 3, 8, 1, 0, 7, 2)]
    scores = score(RemoteReward(service.url, batch_size=2, connections=3), responses, number=range(7))
    assert scores.tolist() == [5.0, 3.0, 8.0, 1.0, 0.0, 7.0, 2.0]
    assert sorted(len(body["responses"]) for body in service.bodies) == [1, 2, 2, 2]
    assert all(len(body["prompts"]) == len(body["terminated"]) == len(body["responses"]) for body in service.bodies)
    assert sorted(body["columns"]["number"] for body in service.bodies) == [[0, 1], [2, 3], [4, 5], [6]]
    assert 2 <= service.most <= 3


def test_no_responses_need_no_request(service):
    assert score(RemoteReward(service.url), []).shape == (0,)
    assert service.bodies == []


def test_only_the_named_columns_are_sent(service):
    score(RemoteReward(service.url, columns=["answer"]), answer=[1, 2], day=[date(2026, 1, 1)] * 2)
    score(RemoteReward(service.url, columns=[]), answer=[1, 2])
    assert [body["columns"] for body in service.bodies] == [{"answer": [1, 2]}, {}]


@pytest.mark.parametrize(
    ("options", "columns", "patterns"),
    [
        ({}, {"day": [None, date(2026, 1, 1)]}, ["'day'", "JSON", "date", r"rewards\.columns"]),
        ({}, {"ratio": [1.0, float("nan")]}, ["'ratio'", "JSON", "float", r"rewards\.columns"]),
        ({"columns": ["anwser"]}, {"answer": [1, 2]}, ["'anwser'", "answer"]),
    ],
)
def test_columns_that_cannot_be_sent(service, options, columns, patterns):
    found = message(RemoteReward(service.url, **options), **columns)
    assert all(re.search(pattern, found) for pattern in patterns), found
    assert service.bodies == []


def test_an_address_keeps_its_last_slash_and_its_query(service):
    for end in ("/", "?model=small"):
        score(RemoteReward(service.url + end))
    assert service.paths == ["/length/", "/length?model=small"]


# ------------------------------------------------------------------ answers


def test_a_dropped_connection_is_tried_again(service):
    service.instead = [drop, drop]
    assert score(RemoteReward(service.url, retries=2)).tolist() == [3.0, 5.0]
    assert len(service.bodies) == 3
    assert service.bodies[0] == service.bodies[2]


def test_a_busy_service_is_asked_again(service):
    service.instead = [503]
    assert score(RemoteReward(service.url)).tolist() == [3.0, 5.0]
    service.instead = [503, 503]
    found = message(RemoteReward(service.url, retries=1))
    assert all(word in found for word in ("rewards.url", service.url, "503")), found


def test_a_service_that_hangs_ends_the_run_in_time(service):
    service.instead = [lambda handler: service.ended.wait(30)] * 8
    start = time.monotonic()
    found = message(RemoteReward(service.url, batch_size=1, timeout=0.4, retries=1))
    assert 0.8 < time.monotonic() - start < 3.0
    assert all(word in found for word in ("rewards.url", service.url, "no answer", "timed out")), found


def test_a_service_that_is_not_there(service):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/length"
        assert all(word in message(RemoteReward(url, retries=0)) for word in ("rewards.url", url, "refused"))


@pytest.mark.parametrize(
    ("answer", "patterns"),
    [
        ({"scores": [1.0]}, ["2 numbers", "not 1$"]),
        ({"scores": [1.0, 2.0, 3.0]}, ["2 numbers", "not 3$"]),
        ({"scores": [[1.0], [2.0]]}, ["2 numbers", r"\(2, 1\)"]),
        ({"scores": 1.0}, ["2 numbers", r"shape \(\)"]),
        ({"scores": None}, ["2 numbers", "NoneType"]),
        ({"scores": [1.0, "good"]}, ["2 numbers", "'good'", "'three'"]),
        ({"scores": [None, 1.0]}, ["2 numbers", "None", "'one'"]),
        ({"scores": [1.0, {"score": 2.0}]}, ["2 numbers", "{'score': 2.0}", "'three'"]),
        ({"scores": [1.0, 10**400]}, ["2 numbers", "1000", "'three'"]),
        ({"rewards": [1.0, 2.0]}, ['{"scores": ', '{"rewards": '],),
        ([1.0, 2.0], ['{"scores": ', r"\[1.0, 2.0\]"]),
        ("scores: 1, 2", ["JSON", "scores: 1, 2"]),
        (404, ["404"]),
    ],
)  # fmt: skip
def test_answers_that_cannot_be_used(service, answer, patterns):
    service.answer = lambda body: answer
    found = message(RemoteReward(service.url))
    assert all(re.search(pattern, found) for pattern in [re.escape(service.url), *patterns]), found


def test_the_response_of_a_wrong_score_is_found_in_any_request(service):
    def answer(body):
        return {"scores": ["?" if response == "bad" else 0.0 for response in body["responses"]]}

    service.answer = answer
    with pytest.raises(UserError, match="should return 2 numbers, but returned '\\?' for the response 'bad'"):
        score(RemoteReward(service.url, batch_size=2), ["a", "b", "c", "bad", "e"])


# ------------------------------------------------------------------ options


def test_the_token_is_sent_and_kept_nowhere(service, monkeypatch):
    monkeypatch.setenv("JUDGE_TOKEN", f"{TOKEN}\n")
    reward = RemoteReward(service.url, token_env="JUDGE_TOKEN", retries=0)
    score(reward)
    assert service.tokens == [f"Bearer {TOKEN}"]
    assert TOKEN not in repr(vars(reward))
    assert TOKEN.encode() not in pickle.dumps(reward)
    assert score(pickle.loads(pickle.dumps(reward))).tolist() == [3.0, 5.0]
    for reaction in (401, drop):
        service.instead = [reaction]
        assert TOKEN not in message(reward)


@pytest.mark.parametrize("value", [None, "", " \n"])
def test_a_missing_token(monkeypatch, value):
    monkeypatch.delenv("JUDGE_TOKEN", raising=False)
    if value is not None:
        monkeypatch.setenv("JUDGE_TOKEN", value)
    found = message(RemoteReward("http://judge", token_env="JUDGE_TOKEN"))
    assert found == "rewards.token_env: the environment variable JUDGE_TOKEN is not set"


@pytest.mark.parametrize("value", ["two words 42", "line\nbreak 42", "ключ 42"])
def test_a_token_that_no_header_can_carry(monkeypatch, value):
    monkeypatch.setenv("JUDGE_TOKEN", value)
    found = message(RemoteReward("http://judge", token_env="JUDGE_TOKEN"))
    assert "JUDGE_TOKEN" in found
    assert "42" not in found


def test_a_token_in_place_of_its_name():
    with pytest.raises(UserError, match="token_env must be the name of an environment variable") as error:
        RemoteReward("http://judge", token_env=TOKEN)
    assert TOKEN not in str(error.value)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"batch_size": 0}, "rewards.batch_size must be 1 or more, not 0"),
        ({"connections": 0}, "rewards.connections must be 1 or more, not 0"),
        ({"retries": -1}, "rewards.retries must be 0 or more, not -1"),
        ({"timeout": 0}, "rewards.timeout must be positive, not 0"),
    ],
)
def test_values_out_of_range(options, text):
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        RemoteReward("http://judge", **options)


def test_an_address_without_http():
    assert "rewards.url is 'judge:8000': it must begin with http" in message(RemoteReward("judge:8000"))


def test_names():
    urls = ["http://judge:8000/v1/helpful/", "http://judge/helpful?model=a", "http://judge:8000", "http://judge/"]
    assert [RemoteReward(url).name for url in urls] == ["helpful", "helpful", "RemoteReward", "RemoteReward"]
    assert RemoteReward("http://judge/helpful", name="kind").name == "kind"


def test_two_models_of_a_service_are_both_reported(service):
    scores = Scores([RemoteReward(service.url), RemoteReward(service.url, weight=2.0)], ScoreShaping())
    rewards, total = scores.judge(make_reward_inputs(["one", "three"]))
    assert list(rewards) == ["length", "length_1"]
    assert total.tolist() == [9.0, 15.0]


# ------------------------------------------------------------------ runs


def test_a_fit(service, fit, make_module):
    recorder = Recorder()
    reward = RemoteReward(service.url, batch_size=3, connections=2)
    fit(make_module(rewards=[reward], iterations=2, critic=None), [recorder])
    assert [len(body["responses"]) for body in service.bodies].count(3) == 4  # 8 responses: 3, 3 and 2, twice
    assert all(isinstance(number, int) for body in service.bodies for number in body["columns"]["number"])
    for metrics, output in zip(recorder.metrics, recorder.outputs, strict=True):
        scored = output["scored_rollout"]
        expected = [float(len(response)) for response in scored.reward_inputs.responses]
        assert scored.rewards["length"].tolist() == scored.scores.tolist() == expected
        assert metrics["rewards/length"] == pytest.approx(sum(expected) / len(expected))


@pytest.fixture
def config(tmp_path, tiny_model, prompt_file, service, monkeypatch):
    """Return the options of a run with a configuration file, in the current folder."""
    monkeypatch.chdir(tmp_path)
    init_args = {"url": service.url, "batch_size": 4, "token_env": "JUDGE_TOKEN", "weight": 0.5}
    options = {
        "model": {
            "class_path": "PolicyGradient",
            "init_args": {
                "actor": str(tiny_model()),
                "rewards": [{"class_path": "RemoteReward", "init_args": init_args}],
                "sampling": {"max_tokens": 4},
                "iterations": 1,
            },
        },
        "data": {"class_path": "Prompts", "init_args": {"train": str(prompt_file), "batch_size": 8}},
    }
    Path("run.yaml").write_text(yaml.safe_dump(options))
    return ["--config", "run.yaml"]


def test_the_command_line_and_the_files_of_a_run(config, service, monkeypatch, capsys, tmp_path):
    """The token is in none of the run's files, nor in what it prints."""
    monkeypatch.setenv("JUDGE_TOKEN", TOKEN)
    main(["fit", *config, "--trainer.default_root_dir", "run", "--trainer.accelerator", "cpu"])
    assert service.tokens == [f"Bearer {TOKEN}"] * 2
    files = [path for path in Path("run").rglob("*") if path.is_file()]
    assert {"config.yaml", "metrics.csv", "samples.jsonl"} <= {path.name for path in files}
    assert any(path.suffix == ".ckpt" for path in files)
    assert not any(TOKEN.encode() in path.read_bytes() for path in files)
    said = capsys.readouterr()
    assert TOKEN not in said.out + said.err
    saved = yaml.safe_load(Path("run/config.yaml").read_text())["model"]["init_args"]["rewards"][0]
    assert saved["class_path"] == "lit_rlhf.RemoteReward"
    assert saved["init_args"]["token_env"] == "JUDGE_TOKEN"
    assert saved["init_args"]["url"] == service.url


def test_a_missing_token_ends_a_run_before_it_begins(config, service, monkeypatch, capsys):
    monkeypatch.delenv("JUDGE_TOKEN", raising=False)
    with pytest.raises(SystemExit):
        main(["fit", *config, "--trainer.accelerator", "cpu"])
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last == "lit-rlhf: error: rewards.token_env: the environment variable JUDGE_TOKEN is not set"
    assert service.bodies == []


def test_a_plan_asks_nobody(config, service, monkeypatch, capsys):
    monkeypatch.delenv("JUDGE_TOKEN", raising=False)
    main(["plan", *config, "--gpu", "h100"])
    assert "PolicyGradient on 1 x h100" in " ".join(capsys.readouterr().out.split())
    assert service.bodies == []
