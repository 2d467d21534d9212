"""A run that is killed by SIGKILL and resumed ends with the same bits as an uninterrupted run."""

import csv
import signal
import time
from functools import partial
from pathlib import Path

import preloaded
import pytest
import torch

pytestmark = pytest.mark.usefixtures("without_plans")
REWARD = """
import os, signal
calls = 0

def reward(responses):
    global calls
    calls += 1
    if calls == int(os.environ.get("KILL_AT_CALL", "0")):
        os.kill(os.getpid(), signal.SIGKILL)
    return [len(set(response.split())) / 10 for response in responses]
"""
ITERATIONS = 9


lit_rlhf = partial(preloaded.run, "-m", "lit_rlhf.cli")


def words(tiny_model, prompt_file, run: str) -> list[str]:
    """Return options with normalised scores, a schedule, validation every third iteration, and more than two epochs."""
    return [
        "fit",
        *("--model", "PolicyGradient", "--model.actor", str(tiny_model("llama"))),
        '--model.rewards=[{"class_path": "RewardFunction", "init_args": {"function": "reward.py:reward"}}]',
        *("--model.iterations", str(ITERATIONS), "--model.sampling.max_tokens", "10"),
        *("--model.scores.normalize", "true", "--model.update.epochs", "2", "--model.update.minibatches", "2"),
        *("--model.actor_optimizer", "AdamW", "--model.actor_optimizer.lr", "0.001"),
        *("--model.actor_scheduler", "ExponentialLR", "--model.actor_scheduler.gamma", "0.9"),
        *("--data", "Prompts", "--data.train", str(prompt_file), "--data.validation", str(prompt_file)),
        *("--data.batch_size", "12", "--trainer.default_root_dir", run, "--trainer.accelerator", "cpu"),
        *("--trainer.val_check_interval", "3", "--trainer.check_val_every_n_epoch", "null"),
        *("--checkpoint.every_n", "2", "--checkpoint.monitor", "val/score", "--checkpoint.keep_every_n", "4"),
    ]


def metrics(folder: Path) -> list[dict[str, str]]:
    rows = csv.DictReader((folder / "metrics.csv").open())
    return [{k: v for k, v in row.items() if not k.startswith(("time/", "perf/"))} for row in rows]


def weights(folder: Path, name: str) -> dict[str, torch.Tensor]:
    return torch.load(folder / "checkpoints" / name, weights_only=True)["state_dict"]


def assert_same_run(one: Path, two: Path) -> None:
    assert len(metrics(one)) == ITERATIONS + 3
    assert metrics(one) == metrics(two)
    assert (one / "samples.jsonl").read_bytes() == (two / "samples.jsonl").read_bytes()
    for name in ("last.ckpt", "best.ckpt", "iteration-000008.ckpt"):
        a, b = weights(one, name), weights(two, name)
        assert a.keys() == b.keys()
        assert all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tiny_model, prompt_file) -> Path:
    """Return a folder with the reward function and the uninterrupted run."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "reward.py").write_text(REWARD)
    done = lit_rlhf(*words(tiny_model, prompt_file, "whole"), cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("calls", [(2, 7, 3), pytest.param((2, 3, 5, 3, 5), marks=pytest.mark.long)])
def test_killed_and_resumed(runs, tiny_model, prompt_file, calls):
    """The run is killed in iterations 2 and 5 and in the validation after iteration 6; then also in 3 and 7.

    The reward is called once per iteration and twice in a process's first validation (for the reference too);
    checkpoints are saved every second iteration, after its validation.
    """
    name = f"killed-{len(calls)}"
    command = [*words(tiny_model, prompt_file, name), "--ckpt_path", "last"]
    for call in calls:
        killed = lit_rlhf(*command, cwd=runs, KILL_AT_CALL=str(call))
        assert killed.returncode == -signal.SIGKILL, killed.stderr
    resumed = lit_rlhf(*command, cwd=runs)
    assert resumed.returncode == 0, resumed.stderr
    assert_same_run(runs / "whole", runs / name)


@pytest.mark.long
@pytest.mark.parametrize("calls", [(5,), (2, 3, 5, 3, 5)])
def test_killed_and_resumed_with_rollouts_in_flight(tmp_path, tiny_model, prompt_file, calls):
    """Each kill meets responses that a worker process generates for later iterations; no worker outlives its parent.

    The uninterrupted run generates them in its own process, which changes nothing.
    """
    (tmp_path / "reward.py").write_text(REWARD)
    ahead = '--model.engine={"class_path": "Ahead", "init_args": {"lag": 2, "workers": %d}}'
    whole, killed = (
        [*words(tiny_model, prompt_file, run), ahead % workers] for run, workers in (("whole", 0), ("killed", 1))
    )
    done = lit_rlhf(*whole, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for call in calls:
        stopped = lit_rlhf(*killed, "--ckpt_path", "last", cwd=tmp_path, KILL_AT_CALL=str(call))
        assert stopped.returncode == -signal.SIGKILL, stopped.stderr
    resumed = lit_rlhf(*killed, "--ckpt_path", "last", cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    assert_same_run(tmp_path / "whole", tmp_path / "killed")
    time.sleep(1)
    assert not workers_in(tmp_path)


def workers_in(folder: Path) -> list[int]:
    """Return the worker processes whose working directory is the folder."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if b"generation.worker" in (process / "cmdline").read_bytes() and (process / "cwd").resolve() == folder:
                found.append(int(process.name))
        except OSError:  # it has just ended
            continue
    return found


def test_a_new_run_renames_the_folder_of_an_older_run(runs, tiny_model, prompt_file):
    (runs / "again").mkdir()
    (runs / "again" / "config.yaml").write_text("older")
    done = lit_rlhf(*words(tiny_model, prompt_file, "again"), "--model.iterations", "1", cwd=runs)
    assert done.returncode == 0, done.stderr
    assert "again contained an older run, which is now in again.1" in done.stdout
    assert (runs / "again" / "metrics.csv").exists()
    assert (runs / "again.1" / "config.yaml").read_text() == "older"


def test_a_new_run_that_fails_before_it_begins_leaves_the_older_run_in_its_place(runs, tiny_model, prompt_file):
    (runs / "kept").mkdir()
    (runs / "kept" / "config.yaml").write_text("older")
    done = lit_rlhf(*words(tiny_model, prompt_file, "kept"), "--model.actor", "./nowhere", cwd=runs)
    assert done.returncode == 1
    assert "so the older run is in kept again" in done.stdout
    assert [path.name for path in (runs / "kept").iterdir()] == ["config.yaml"]
    assert (runs / "kept" / "config.yaml").read_text() == "older"
    assert not (runs / "kept.1").exists()


def test_checkpoints_hold_no_frozen_model(runs):
    keys = weights(runs / "whole", "last.ckpt")
    assert any(k.startswith("actor.model.") for k in keys)
    assert any(k.startswith("critic.") for k in keys)
    assert not any(k.startswith(("reference.", "scores.rewards.")) for k in keys)


def test_export_writes_the_trained_actor(runs, tiny_model):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    done = lit_rlhf("export", "whole", "--out", "exported", cwd=runs)
    assert done.returncode == 0, done.stderr
    state = weights(runs / "whole", "last.ckpt")
    model = AutoModelForCausalLM.from_pretrained(runs / "exported")
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[f"actor.model.{name}"]), name
    trained, start = model.state_dict(), AutoModelForCausalLM.from_pretrained(tiny_model("llama")).state_dict()
    assert any(not torch.equal(trained[k], start[k]) for k in start)
    assert AutoTokenizer.from_pretrained(runs / "exported").eos_token == "<eos>"
    at_end = AutoModelForCausalLM.from_pretrained(runs / "whole" / "export").state_dict()
    assert all(torch.equal(at_end[k], trained[k]) for k in trained)


def test_validate_and_predict_from_a_checkpoint(runs, prompt_file):
    config = ["--config", "whole/config.yaml", "--ckpt_path", "whole/checkpoints/last.ckpt"]
    validated = lit_rlhf("validate", *config, cwd=runs)
    assert validated.returncode == 0, validated.stderr
    last = [row["val/score"] for row in metrics(runs / "whole") if row["val/score"]][-1]
    assert f"{float(last):.5f}"[:6] in validated.stdout
    predicted = lit_rlhf("predict", *config, "--data.predict", str(prompt_file), cwd=runs)
    assert predicted.returncode == 0, predicted.stderr
    assert len((runs / "whole" / "predictions.jsonl").read_text().splitlines()) == 48
