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
    """With few iterations, this checks that every stage and table exists, not that the models learn well."""
    output = quickstart(tmp_path, "--ppo-iterations", "2")
    for text in ("after SFT", "after PPO", "true score", "learned score", "KL to SFT", "grammatical", "3. PPO"):
        assert text in output
    run = tmp_path / "runs" / "quickstart"
    for stage in ("sft", "reward", "ppo"):
        assert (run / stage / "metrics.csv").exists()
        assert (run / stage / "export" / "model.safetensors").exists()
    samples = [json.loads(line) for line in (run / "ppo" / "samples.jsonl").read_text().splitlines()]
    assert {s["iteration"] for s in samples} == {1, 2}
    with (run / "ppo" / "metrics.csv").open() as lines:
        rows = [row for row in csv.DictReader(lines) if row["objective/score"]]
    for row in rows:  # the true reward is only monitored: its weight is 0
        assert float(row["objective/score"]) == float(row["rewards/RewardModel"])
        assert row["rewards/reward"]

    output = quickstart(tmp_path, "--stage", "dpo")
    assert "1. DPO" in output  # it uses the SFT model of the first run
    assert all(text in output for text in ("after SFT", "after PPO", "after DPO"))
    assert (run / "dpo" / "export" / "model.safetensors").exists()
