import json
import os
import subprocess
import sys


def test_quickstart_trains_measures_and_reports(tmp_path):
    """Few iterations: that it learns well is for the full run to show, here that every stage and table is there."""
    command = [sys.executable, "-m", "lit_rlhf.cli", "quickstart", "--sft-iterations", "60", "--ppo-iterations", "2"]
    done = subprocess.run(command, cwd=tmp_path, env=os.environ | {"COLUMNS": "120"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for words in ("after SFT", "after PPO", "KL to SFT", "grammatical", "1. SFT", "2. PPO"):
        assert words in done.stdout
    run = tmp_path / "runs" / "quickstart"
    for stage in ("sft", "ppo"):
        assert (run / stage / "metrics.csv").exists()
        assert (run / stage / "export" / "model.safetensors").exists()
    samples = [json.loads(line) for line in (run / "ppo" / "samples.jsonl").read_text().splitlines()]
    assert {s["iteration"] for s in samples} == {1, 2}
