import csv
import json
import os
import subprocess
import sys


def quickstart(folder, *options):
    command = [sys.executable, "-m", "lit_rlhf.cli", "quickstart", "--sft-iterations", "60", *options]
    done = subprocess.run(command, cwd=folder, env=os.environ | {"COLUMNS": "140"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_quickstart_trains_measures_and_reports(tmp_path):
    """Few iterations: that it learns well is for the full run to show, here that every stage and table is there."""
    said = quickstart(tmp_path, "--ppo-iterations", "2")
    for words in ("after SFT", "after PPO", "true score", "learned score", "KL to SFT", "grammatical", "3. PPO"):
        assert words in said
    run = tmp_path / "runs" / "quickstart"
    for stage in ("sft", "reward", "ppo"):
        assert (run / stage / "metrics.csv").exists()
        assert (run / stage / "export" / "model.safetensors").exists()
    samples = [json.loads(line) for line in (run / "ppo" / "samples.jsonl").read_text().splitlines()]
    assert {s["iteration"] for s in samples} == {1, 2}
    with (run / "ppo" / "metrics.csv").open() as lines:
        rows = [row for row in csv.DictReader(lines) if row["objective/score"]]
    for row in rows:  # the true rule is watched, and has no weight
        assert float(row["objective/score"]) == float(row["rewards/RewardModel"])
        assert row["rewards/reward"]

    said = quickstart(tmp_path, "--stage", "dpo")
    assert "1. DPO" in said  # the SFT model of the first is taken
    assert all(words in said for words in ("after SFT", "after PPO", "after DPO"))
    assert (run / "dpo" / "export" / "model.safetensors").exists()
