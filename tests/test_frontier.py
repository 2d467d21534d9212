"""The curves of the frontier are those of enumeration, and the benchmark runs in miniature."""

import itertools
import json
import math
import sys
from pathlib import Path

import pytest
import torch

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


def test_kl_at_a_score():
    points = [Point(0.0, 1.0), Point(1.0, 2.0), Point(9.0, 1.5), Point(16.0, 3.0)]
    assert curves.kl_at_score(points, 1.5) == pytest.approx(0.25)  # the first of three times, at half of √1
    assert curves.kl_at_score(points, 2.25) == pytest.approx(3.5**2)
    assert curves.kl_at_score(points, 3.5) == math.inf
    assert curves.kl_at_score(points, 1.0) == 0


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
    frontier.main([*words, *small, "--variants", "ppo.yaml"])
    frontier.main([*words, *small, "--variants", "ppo, full KL, decayed", "--tasks", "happy"])  # adds to the file
    results = json.loads(measured.read_text())
    ran = [(result["task"], result["variant"]) for result in results["runs"]]
    assert ran == [("happy", "ppo.yaml"), ("sentiment", "ppo.yaml"), ("happy", "ppo, full KL, decayed")]
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
