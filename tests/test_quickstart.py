import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from lit_rlhf import cli, recipes

pytestmark = pytest.mark.usefixtures("without_plans")


def in_full(folder, *options):
    """Run the command with its own model and data, but few iterations."""
    command = [sys.executable, "-m", "lit_rlhf.cli", "quickstart", "--sft-iterations", "60", *options]
    done = subprocess.run(command, cwd=folder, env=os.environ | {"COLUMNS": "140"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def in_miniature(monkeypatch, tmp_path, capsys):
    """Return a function that runs the command in this process, with a smaller model and few batches in each stage."""
    original = recipes.find_recipe

    def find_recipe(name):
        config = yaml.safe_load(original(name).read_text())
        if "sft" in name:
            config["model"]["init_args"]["actor"]["config"] |= {"hidden_size": 32, "num_hidden_layers": 1}
        else:
            config["trainer"] |= {"limit_train_batches": 2, "limit_val_batches": 1}
        (tmp_path / "configs").mkdir(exist_ok=True)
        path = tmp_path / "configs" / f"{Path(name).name}.yaml"
        path.write_text(yaml.safe_dump(config))
        return path

    monkeypatch.setattr(recipes, "find_recipe", find_recipe)
    monkeypatch.setenv("COLUMNS", "140")

    def run(folder, *options):
        monkeypatch.chdir(folder)
        cli.main(["quickstart", "--sft-iterations", "5", *options])
        return capsys.readouterr().out

    return run


@pytest.fixture(params=["miniature", pytest.param("full", marks=pytest.mark.long)])
def run(request):
    """Return a function that runs the command and returns what it prints."""
    return request.getfixturevalue("in_miniature") if request.param == "miniature" else in_full


def test_quickstart_trains_measures_and_reports(run, tmp_path):
    """With few iterations, this checks that every stage and table exists, not that the models learn well."""
    output = run(tmp_path, "--ppo-iterations", "2")
    for text in ("after SFT", "after PPO", "true score", "learned score", "KL to SFT", "grammatical", "3. PPO"):
        assert text in output
    assert output.splitlines()[-1] == "report: runs/quickstart/ppo/report.html"
    runs = tmp_path / "runs" / "quickstart"
    assert (runs / "ppo" / "report.html").exists()
    for stage in ("sft", "reward", "ppo"):
        assert (runs / stage / "metrics.csv").exists()
        assert (runs / stage / "export" / "model.safetensors").exists()
    samples = [json.loads(line) for line in (runs / "ppo" / "samples.jsonl").read_text().splitlines()]
    assert {s["iteration"] for s in samples} == {1, 2}
    with (runs / "ppo" / "metrics.csv").open() as lines:
        rows = [row for row in csv.DictReader(lines) if row["objective/score"]]
    for row in rows:  # the true reward is only monitored: its weight is 0
        assert float(row["objective/score"]) == float(row["rewards/RewardModel"])
        assert row["rewards/reward"]

    output = run(tmp_path, "--stage", "dpo")
    assert "1. DPO" in output  # it uses the SFT model of the first run
    assert all(text in output for text in ("after SFT", "after PPO", "after DPO"))
    assert (runs / "dpo" / "export" / "model.safetensors").exists()


@pytest.mark.long
def test_with_lora_every_later_stage_is_an_adapter_on_one_base(run, tmp_path):
    output = run(tmp_path, "--lora", "--ppo-iterations", "1")
    for text in ("1. Base", "2. SFT", "3. Reward", "4. PPO", "after BASE", "after SFT", "after PPO"):
        assert text in output
    runs = Path("runs", "quickstart_lora")
    assert (tmp_path / runs / "base" / "export" / "model.safetensors").exists()
    for stage in ("sft", "reward", "ppo"):
        export = tmp_path / runs / stage / "export"
        assert (export / "adapter_model.safetensors").exists()
        assert json.loads((export / "adapter_config.json").read_text())["base_model_name_or_path"] == str(
            runs / "base" / "export"
        )
    with (tmp_path / runs / "ppo" / "metrics.csv").open() as lines:
        first = next(csv.DictReader(lines))
    assert float(first["objective/kl_to_ref"]) == pytest.approx(0.0, abs=1e-5)  # the reference has the SFT adapter

    output = run(tmp_path, "--lora", "--stage", "dpo")
    assert "1. DPO" in output  # it uses the SFT adapter of the first run
    assert all(text in output for text in ("after BASE", "after SFT", "after PPO", "after DPO"))
    assert (tmp_path / runs / "dpo" / "export" / "adapter_model.safetensors").exists()
