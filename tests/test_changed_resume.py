"""A run that is resumed with other options, or after it has finished or was killed while it wrote its export."""

import shutil
import signal
from functools import partial
from pathlib import Path

import preloaded
import pytest
import yaml

from lit_rlhf.checkpoints import read_checkpoint
from lit_rlhf.config_changes import POSITION, SHOWN, describe_changes

pytestmark = pytest.mark.usefixtures("without_plans")
PARTS = """
import os, signal
import lightning, transformers

def reward(responses):
    return [len(set(response.split())) / 10 for response in responses]

class KillInExport(lightning.Callback):
    def on_train_start(self, trainer, pl_module):
        if "KILL" in os.environ:
            kill = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
            transformers.PreTrainedTokenizerBase.save_pretrained = kill
"""
lit_rlhf = partial(preloaded.run, "-m", "lit_rlhf.cli", "fit")


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tiny_model, prompt_file) -> Path:
    """Return a folder with a finished run of four iterations, ``whole``, and one that was killed in its export."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "parts.py").write_text(PARTS)
    words = [
        *("--model", "PolicyGradient", "--model.actor", str(tiny_model("llama")), "--model.critic", "null"),
        '--model.rewards=[{"class_path": "RewardFunction", "init_args": {"function": "parts.py:reward"}}]',
        *("--model.iterations", "4", "--model.sampling.max_tokens", "6"),
        *("--model.update.epochs", "1", "--model.update.minibatches", "1"),
        *("--data", "Prompts", "--data.train", str(prompt_file), "--data.validation", str(prompt_file)),
        *("--data.batch_size", "12", "--trainer.accelerator", "cpu", "--trainer.callbacks", "parts.KillInExport"),
        *("--trainer.val_check_interval", "3", "--trainer.check_val_every_n_epoch", "null"),
        *("--report.at_end", "false", "--ckpt_path", "last"),
    ]
    whole = lit_rlhf(*words, "--trainer.default_root_dir", "whole", cwd=folder)
    assert whole.returncode == 0, whole.stderr
    (folder / "whole.txt").write_text(whole.stdout)
    killed = lit_rlhf(*words, "--trainer.default_root_dir", "killed", cwd=folder, KILL="yes")
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    return folder


def summary(output: str) -> list[str]:
    """Return the lines of the summary, without times and the name of the run."""
    lines = output[output.index("\ndone ") :].strip().splitlines()
    return [line.partition(" in 0:")[0].replace("killed", "whole") for line in lines]


def test_a_run_killed_in_its_export_ends_with_the_export_and_the_summary_of_one_that_was_not(runs):
    assert not (runs / "killed" / "export").exists()
    resumed = lit_rlhf("--config", "killed/config.yaml", "--ckpt_path", "last", cwd=runs)
    assert resumed.returncode == 0, resumed.stderr
    assert "resume: " not in resumed.stdout
    assert summary(resumed.stdout) == summary((runs / "whole.txt").read_text())
    files = {file.name: file.read_bytes() for file in (runs / "whole" / "export").iterdir()}
    for file in (runs / "killed" / "export").iterdir():
        assert file.read_bytes().replace(b"# killed:", b"# whole:") == files.pop(file.name)
    assert not files
    assert (runs / "killed" / "metrics.csv").read_text().count("\n") == 1 + 4 + 2
    assert not list((runs / "killed").glob(".*"))


def test_the_command_line_wins_and_what_differs_is_said(runs):
    shutil.copytree(runs / "whole", runs / "changed")
    words = ["--config", "changed/config.yaml", "--trainer.default_root_dir", "changed", "--ckpt_path", "last"]
    words += ["--model.iterations", "6", "--model.actor_optimizer.lr", "0.25", "--model.kl", "AdaptiveKL"]
    done = lit_rlhf(*words, "--data.batch_size", "24", cwd=runs)
    assert done.returncode == 0, done.stderr
    assert [line for line in done.stdout.splitlines() if line.startswith("resume: ")] == [
        "resume: model.kl is AdaptiveKL, was FixedKL until iteration 4",
        "resume: model.iterations is 6, was 4 until iteration 4",
        "resume: model.actor_optimizer.lr is 0.25, was 1e-06 until iteration 4",
        f"resume: data.batch_size is 24, was 12 until iteration 4; {POSITION}",
    ]
    saved = read_checkpoint(runs / "changed" / "checkpoints" / "last.ckpt")
    assert saved["optimizer_states"][0]["param_groups"][0]["lr"] == 0.25
    assert int(saved["state_dict"]["iteration"]) == 6
    again = lit_rlhf("--config", "changed/config.yaml", "--ckpt_path", "last", cwd=runs)
    assert again.returncode == 0, again.stderr
    assert "resume: " not in again.stdout


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--model.actor_optimizer", "SGD"], "the optimizer policy is SGD, which cannot continue"),
        (["--model.rewards", '[{"class_path": "ExactAnswer", "init_args": {"column": "nope"}}]'], "nope"),
    ],
)
def test_options_with_which_a_resumed_run_fails_are_not_kept(runs, changes, message):
    config = (runs / "killed" / "config.yaml").read_text()
    resume = ["--config", "killed/config.yaml", "--ckpt_path", "last", "--model.iterations", "9", *changes]
    done = lit_rlhf(*resume, cwd=runs)
    assert done.returncode == 1
    assert message in done.stderr.splitlines()[-1]
    assert (runs / "killed" / "config.yaml").read_text() == config


def test_what_does_not_fit_the_checkpoint_is_refused_and_changes_nothing(runs, tiny_model):
    before = (runs / "whole" / "config.yaml").read_text()
    words = ["--config", "whole/config.yaml", "--ckpt_path", "last", "--model.actor", str(tiny_model("gpt2"))]
    done = lit_rlhf(*words, cwd=runs)
    assert done.returncode == 1
    assert "last.ckpt does not fit this run's options: it has no actor.model.tr" in done.stderr.splitlines()[-1]
    assert (runs / "whole" / "config.yaml").read_text() == before
    assert (runs / "whole" / "export" / "model.safetensors").exists()


def test_many_changes_are_counted():
    before, now = ({"model": {f"option_{n}": value for n in range(SHOWN + 3)}} for value in ("a", "b"))
    *lines, last = describe_changes(before, now, 3)
    assert len(lines) == SHOWN
    assert lines[0] == "resume: model.option_0 is b, was a until iteration 3"
    assert last == "resume: 3 more options differ"


def test_changes_within_lists_and_of_classes():
    patience = [{"a": {"class_path": "l.EarlyStopping", "init_args": {"patience": n}}} for n in (3, 5)]
    (line,) = describe_changes(*patience, 3)
    assert line == "resume: a.patience is 5, was 3 until iteration 3; Lightning keeps that of the checkpoint"
    before = yaml.safe_load("{a: [{class_path: A, init_args: {x: 1}}, {class_path: p.B}], b: [1], c: null}")
    now = yaml.safe_load("{a: [{class_path: A, init_args: {x: 2}}, {class_path: q.C}], b: [1, 2], c: {class_path: D}}")
    assert describe_changes(before, now | {"ckpt_path": "last", "new": 1}, 3) == [
        "resume: a[0].x is 2, was 1 until iteration 3",
        "resume: a[1] is C, was B until iteration 3",
        "resume: b is [1, 2], was [1] until iteration 3",
        "resume: c is D, was null until iteration 3",
    ]


@pytest.mark.parametrize("adaptive", [True, False])
def test_only_an_adaptive_coefficient_continues(adaptive):
    from lit_rlhf import KLPenalty

    old, new = KLPenalty(beta=2.0, adaptive=adaptive), KLPenalty(beta=0.5, adaptive=adaptive)
    new.load_state_dict(old.state_dict())
    assert new.beta == (2.0 if adaptive else 0.5)
