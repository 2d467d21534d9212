"""Tests of the reward: pytest runs them in about 20 seconds."""

import csv
from pathlib import Path

import pytest
from reward import reward

from lit_rlhf.cli import main

HERE = Path(__file__).parent


def test_reward_by_hand():
    """The reward gives the numbers that it should give."""
    responses = ["the soup was warm and tasty .", "tasty tasty tasty", "the soup was awful .", ""]
    assert reward(responses=responses) == pytest.approx([0.5, 0.25, 0.0, 0.0])


def test_a_model_learns_the_reward(tmp_path, monkeypatch):
    """A short training raises the reward."""
    monkeypatch.chdir(HERE)
    main(
        [
            *("fit", "--config", "config.yaml", "--model.iterations", "10"),
            *("--trainer.default_root_dir", str(tmp_path), "--trainer.enable_progress_bar", "false"),
        ]
    )
    with (tmp_path / "metrics.csv").open() as lines:
        scores = [float(row["objective/score"]) for row in csv.DictReader(lines) if row["objective/score"]]
    assert max(scores[-3:]) > scores[0] + 0.1
