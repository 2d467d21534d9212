"""The curves of the frontier are those of enumeration, and the benchmark runs in miniature."""

import argparse
import csv
import itertools
import json
import math
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lit_rlhf.models.loading import load_tokenizer
from lit_rlhf.rewards import RewardModel, make_reward_inputs

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
names = "frontier_curves", "frontier", "frontier_tasks", "frontier_trl", "randomwalks"
curves, frontier, tasks, trl, randomwalks = (pytest.importorskip(name) for name in names)
Point = curves.Point


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_best_of_n_is_the_mean_over_all_subsets(n):
    scores = torch.randn(3, 5, generator=torch.Generator().manual_seed(n)).double()
    subsets = [max(subset) for row in scores.tolist() for subset in itertools.combinations(row, n)]
    point = curves.best_of_n(scores, n)
    assert point.score == pytest.approx(sum(subsets) / len(subsets))
    assert point.kl == pytest.approx(math.log(n) - (n - 1) / n)


@pytest.mark.parametrize("n", [0, 6])
def test_more_than_all_responses_are_refused(n):
    with pytest.raises(ValueError, match=r"^n must be from 1 to the number of responses, 5"):
        curves.best_of_n(torch.zeros(2, 5), n)


def test_the_tilted_policy_of_a_start_with_equal_probabilities_is_exact():
    scores, coef = torch.tensor([[0.0, 1.0, 3.0], [2.0, 2.0, 2.0]]), 0.7
    expected = {"score": 0.0, "kl": 0.0, "effective": 0.0}
    for row in scores.tolist():
        weights = [math.exp(score / coef) for score in row]
        weights = [weight / sum(weights) for weight in weights]
        expected["score"] += sum(w * s for w, s in zip(weights, row, strict=True)) / 2
        expected["kl"] += sum(w * math.log(w * 3) for w in weights) / 2
        expected["effective"] += 1 / sum(w * w for w in weights) / 2
    point = curves.tilted(scores, coef)
    assert point == pytest.approx((expected["kl"], expected["score"], expected["effective"]), rel=1e-5)


def test_no_policy_beats_the_tilted_one_at_its_coefficient():
    g = torch.Generator().manual_seed(0)
    scores = torch.randn(1, 16, generator=g).double()
    at = curves.tilted(scores, 0.5)
    for scale in torch.linspace(0, 4, 50):
        weights = (scores * scale + 0.1 * torch.randn(1, 16, generator=g)).softmax(1)
        kl = float((weights * (weights * 16).log()).sum())
        assert at.score - 0.5 * at.kl >= float((weights * scores).sum()) - 0.5 * kl


def test_the_least_kl_is_that_of_the_tilted_policy_with_the_score():
    scores = torch.randn(4, 32, generator=torch.Generator().manual_seed(0)).double()
    for coef in (0.3, 1.0, 3.0):
        at = curves.tilted(scores, coef)
        assert curves.least_kl(scores, at.score) == pytest.approx(at.kl, rel=1e-6)
    assert curves.least_kl(scores, float(scores.mean())) == 0
    assert curves.least_kl(scores, float(scores.max()) + 1) == math.inf
    assert curves.least_kl(torch.ones(2, 3), 2.0) == math.inf


def test_kl_at_a_score():
    points = [Point(0.0, 1.0), Point(1.0, 2.0), Point(9.0, 1.5), Point(16.0, 3.0)]
    assert curves.kl_at_score(points, 1.5) == pytest.approx(0.25)  # the first of three times, at half of √1
    assert curves.kl_at_score(points, 2.25) == pytest.approx(3.5**2)
    assert curves.kl_at_score(points, 3.5) == math.inf
    assert curves.kl_at_score(points, 1.0) == 0


def test_a_walk_scores_by_its_length_if_it_follows_edges_to_the_goal():
    steps, edges = randomwalks.distances(), randomwalks.graph()
    start = next(node for node in edges if steps[node] == 3)

    def nearer(walk):
        return walk + next(node for node in (*edges.get(walk[-1], ()),) if steps[node] == steps[walk[-1]] - 1)

    shortest = nearer(nearer(nearer(start)))
    assert shortest[-1] == randomwalks.GOAL
    responses = [shortest[1:], shortest[1:-1], shortest[1:] + "b", "a", "", "?a"]
    assert randomwalks.optimality([start] * 6, responses) == [1.0, 0, 0, 0, 0, 0]


def test_random_walks_follow_edges_and_longer_ones_score_less():
    walks = randomwalks.demonstrations()
    for walk in walks:
        nodes = walk["prompt"] + walk["response"]
        assert all(after in randomwalks.graph()[before] for before, after in itertools.pairwise(nodes))
        assert nodes[-1] == randomwalks.GOAL or len(nodes) == 1 + randomwalks.STEPS
    scores = randomwalks.optimality([w["prompt"] for w in walks], [w["response"] for w in walks])
    for walk, score in zip(walks, scores, strict=True):
        arrived = walk["response"].endswith(randomwalks.GOAL)
        assert score == (randomwalks.distances()[walk["prompt"]] / len(walk["response"]) if arrived else 0)
    assert 0.05 < sum(scores) / len(scores) < 0.2


def test_the_letters_of_a_walk_are_its_tokens():
    tokenizer = randomwalks.tokenizer()
    ids = tokenizer("kbfa")["input_ids"]
    assert len(ids) == 4
    assert tokenizer.decode([*ids, tokenizer.eos_token_id], skip_special_tokens=True) == "kbfa"


@pytest.fixture(scope="module")
def walks(tmp_path_factory):
    """Return the task of random walks, with a start that has learned little."""
    return tasks.randomwalks(tmp_path_factory.mktemp("randomwalks"), iterations=2)


@pytest.mark.long
def test_a_saved_policy_is_measured_as_in_its_run(walks, tmp_path, monkeypatch):
    """The export of a run has the score, KL, length and diversity that the run measured last."""
    monkeypatch.setattr(frontier, "HELD_OUT", 64)
    variant = frontier.Variant("ppo", {"model.actor_optimizer.lr": 3e-2})
    tasks.quietly(frontier.options(variant, walks, seed=1, responses=64, folder=str(tmp_path / "run")))
    with open(tmp_path / "run" / "metrics.csv", encoding="utf-8") as file:
        last = [row for row in csv.DictReader(file) if row["val/score"]][-1]
    (tmp_path / "trl").mkdir()
    (tmp_path / "run" / "export").rename(tmp_path / "trl" / "2")
    shutil.copytree(walks.start, tmp_path / "trl" / "1")
    (tmp_path / "trl" / "log.json").write_text(json.dumps({"seconds": 1.0, "scores": [0.1, 0.2], "first": {}}))
    found = trl.measured(walks, tmp_path / "trl", held_out=64)
    start, end = found["points"]
    assert end == pytest.approx({name: float(last[f"val/{name}"]) for name in trl.MEASURED}, rel=1e-4)
    assert end["kl_to_ref"] > 0.1
    assert (start["score"], found["start"]) == pytest.approx((float(last["val/reference_score"]),) * 2)
    assert start["kl_to_ref"] == pytest.approx(0, abs=1e-4)


def test_the_judge_in_trls_process_gives_the_same_scores(tiny_model, tmp_path):
    trl_train = pytest.importorskip("trl_train")  # needs the package datasets, but not trl
    folder = tmp_path / "reward"
    shutil.copytree(tiny_model("llama", task="score"), folder)
    config = json.loads((folder / "config.json").read_text()) | {"score_mean": 0.5, "score_std": 2.0}
    (folder / "config.json").write_text(json.dumps(config))
    reward, tokenizer = RewardModel(str(folder), normalize=True), load_tokenizer(str(folder))
    reward.prepare(tokenizer)
    prompts, responses = [[6, 7], [8]], [[9, 10, 11], [9, tokenizer.eos_token_id]]
    inputs = make_reward_inputs(["", ""])
    rows = torch.tensor([[6, 7, 9, 10, 11], [8, 9, tokenizer.eos_token_id, 0, 0]])
    lengths = torch.tensor([2, 1]), torch.tensor([3, 2])
    changes = {"prompt_lengths": lengths[0], "response_lengths": lengths[1], "terminated": torch.tensor([False, True])}
    rollout = replace(inputs.rollout, tokens=rows, **changes)
    expected = reward(replace(inputs, rollout=rollout)).tolist()
    options = {"reward": str(folder), "function": None, "truncation_penalty": 1.0}
    judge = trl_train.Judge(argparse.Namespace(**options), tokenizer)
    assert judge.score(prompts, responses) == pytest.approx(expected, abs=1e-5)
    assert judge.means == [pytest.approx(sum(expected) / 2, abs=1e-5)]
    assert judge.first["tokens"] == [[6, 7, 9, 10, 11], [8, 9, tokenizer.eos_token_id]]


def test_the_judge_in_trls_process_calls_a_function_with_texts(walks):
    trl_train = pytest.importorskip("trl_train")
    options = {"reward": None, "function": walks.function, "truncation_penalty": 0.25}
    judge = trl_train.Judge(argparse.Namespace(**options), randomwalks.tokenizer())
    ids = randomwalks.tokenizer()("jab")["input_ids"]
    assert judge.grouped(["j", "j"], [[ids[1], judge.tokenizer.eos_token_id], ids[2:]]) == [1.0, -0.25]
    assert judge.means == [0.5]  # without the penalty


def test_a_critic_on_the_actors_trunk_stays_there(walks):
    """Its head, which is new, has a larger learning rate than a critic that starts from a model."""
    given = {
        name: dict(word.removeprefix("--").split("=", 1) for word in frontier.options(variant, walks, 1, 64, "run")[1:])
        for name, variant in frontier.VARIANTS.items()
    }
    assert given["ppo.yaml"]["model.critic"] == "actor"
    assert float(given["ppo.yaml"]["model.critic_optimizer.lr"]) == walks.critic_rate
    for name in ("a2c.yaml", "a3c.yaml"):
        assert "model.critic" not in given[name]
        assert float(given[name]["model.critic_optimizer.lr"]) == pytest.approx(10 * walks.critic_rate)
        assert float(given[name]["model.actor_optimizer.lr"]) == pytest.approx(3 * walks.rate)
    assert "model.critic_optimizer.lr" not in given["rloo.yaml"]


def test_the_arguments_of_trls_process(walks, tmp_path):
    trl_train = pytest.importorskip("trl_train")
    model = walks._replace(reward_model="reward", function=None, truncation_penalty=1.0)
    for task, name in ((walks, "TRL RLOO"), (model, "TRL PPO, kl 0.2")):
        words = trl.options(task, trl.TRAINERS[name], 1, 640, 4, tmp_path / "prompts.jsonl", tmp_path / "out")
        given, trainer = trl_train.parser.parse_args(words), trl.TRAINERS[name]
        assert (given.method, given.kl_coef, given.batch) == (trainer.method, trainer.kl_coef, trainer.batch)
        assert (given.reward, given.function) == (task.reward_model, task.function)
        assert given.rate == pytest.approx(task.rate * trainer.rate_factor)
        assert given.truncation_penalty == (task.truncation_penalty or None)


def test_the_table_compares_runs_with_those_of_trl():
    def result(name, *points):
        full = [dict.fromkeys(trl.MEASURED, 0.5) | {"kl_to_ref": kl, "score": score} for kl, score in points]
        return {"task": "walks", "variant": name, "seed": 1, "seconds": 1.0, "start": 0.0, "scores": [], "points": full}

    rival = "TRL PPO, kl 0.2"
    runs = [result("ppo.yaml", (1.0, 1.0), (9.0, 3.0)), result("rloo.yaml", (1.0, 0.5)), result(rival, (8.0, 2.0))]
    rows = frontier.table({"start": {"walks": [[0.0, 1.0]]}, "runs": runs}).splitlines()
    column = [cell.strip() for cell in rows[0].split("|")].index(f"KL at the score of {rival} (seeds)")
    cells = {cells[2].strip(): cells[column].strip() for cells in (row.split("|") for row in rows[2:])}
    assert cells["ppo.yaml"] == "0.50 (1 of 1)"  # 2² of 8 nats
    assert cells["rloo.yaml"] == "not reached"
    assert cells[rival] == "1.00 (1 of 1)"


def test_the_variants_that_run_by_default(walks):
    default, asked = (argparse.Namespace(variants=names, trl_python="python") for names in (None, ["ppo, full KL"]))
    assert frontier.variants_of(walks, default)[-2:] == ["TRL GRPO", "TRL RLOO"]
    assert frontier.variants_of(walks._replace(rivals=()), default) == frontier.RECIPES
    assert frontier.variants_of(walks, asked) == ["ppo, full KL"]
    assert len(frontier.RECIPES) == 10


def test_trls_trainers_need_trls_environment(capsys):
    with pytest.raises(SystemExit):
        frontier.main(["--tasks", "randomwalks", "--variants", "TRL GRPO"])
    assert "--trl-python is missing: TRL GRPO needs it" in capsys.readouterr().err


def test_the_benchmark_in_miniature(tiny_model, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tasks, "MAX_TOKENS", 8)
    monkeypatch.setattr(frontier, "HELD_OUT", 64)
    monkeypatch.setattr(frontier, "MEASUREMENTS", 1)
    monkeypatch.setattr(tasks, "PAIRS", 128)
    monkeypatch.setattr(tasks, "HELD_OUT_PAIRS", 32)
    reviews, measured = tmp_path / "reviews.jsonl", tmp_path / "frontier.json"
    reviews.write_text("\n".join(json.dumps({"text": f"w{i} w{i + 8} w1", "label": i % 2}) for i in range(8)))
    words = ["--stories", str(tiny_model("llama")), "--reviews", str(reviews), "--json", str(measured), "--seeds", "1"]
    small = ["--responses", "64", "--samples", "2", "--model-iterations", "2"]
    frontier.main([*words, *small, "--variants", "ppo.yaml", "--tasks", "happy", "sentiment"])
    frontier.main([*words, *small, "--variants", "ppo, full KL", "--tasks", "happy"])  # adds to the file
    results = json.loads(measured.read_text())
    ran = [(result["task"], result["variant"]) for result in results["runs"]]
    assert sorted(ran) == [("happy", "ppo, full KL"), ("happy", "ppo.yaml"), ("sentiment", "ppo.yaml")]
    assert {len(result["points"]) for result in results["runs"]} == {1}
    for result in results["runs"]:
        assert all(math.isfinite(value) for point in result["points"] for value in point.values())
    printed = "| task" + capsys.readouterr().out.rpartition("| task")[2]
    frontier.main([*words, "--table", "--plot", str(tmp_path / "frontier.png")])
    assert capsys.readouterr().out == printed
    rows = [row.split(" | ") for row in printed.splitlines() if row.startswith("| sentiment | ppo.yaml")]
    assert float(rows[0][2]) == pytest.approx(
        next(r for r in results["runs"] if r["task"] == "sentiment")["points"][-1]["score"], abs=6e-4
    )
    assert (tmp_path / "frontier.png").stat().st_size > 10_000
