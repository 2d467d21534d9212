"""Callbacks that end a run, in real fits: KLGuard, and Lightning's EarlyStopping on a held-out score."""

import csv

import preloaded
import pytest
from lightning.pytorch.callbacks import EarlyStopping

from lit_rlhf.callbacks import IterationCheckpoint, KLGuard
from lit_rlhf.checkpoints import read_checkpoint
from lit_rlhf.errors import UserError
from lit_rlhf.testing import Recorder

pytestmark = pytest.mark.usefixtures("without_plans")
EVERY_TWO = {"validation": True, "val_check_interval": 2, "check_val_every_n_epoch": None}


def iterations(folder):
    with (folder / "metrics.csv").open() as file:
        return [float(row["progress/iteration"]) for row in csv.DictReader(file)]


@pytest.mark.long
def test_the_guard_from_the_command_line(tiny_model, tiny_prompts, tmp_path):
    """The run ends after its second iteration above the bound, and goes on with a higher bound."""
    words = ["-m", "lit_rlhf.cli", "fit", "--model", "PolicyGradient", "--model.actor", str(tiny_model())]
    reward = "lit_rlhf.testing.runs:low_words"
    words += [f'--model.rewards=[{{"class_path": "RewardFunction", "init_args": {{"function": "{reward}"}}}}]']
    words += ["--model.iterations", "4", "--model.sampling.max_tokens", "4", "--model.actor_optimizer", "AdamW"]
    words += ["--model.actor_optimizer.lr", "0.01", "--data", "Prompts", "--data.train", str(tiny_prompts)]
    words += ["--data.batch_size", "8", "--trainer.default_root_dir", "run", "--trainer.accelerator", "cpu"]
    words += ["--trainer.callbacks+=KLGuard", "--trainer.callbacks.iterations", "2", "--trainer.callbacks.bound"]
    stopped = preloaded.run(*words, "1e-3", cwd=tmp_path)
    assert stopped.returncode == 1
    (line,) = [line for line in stopped.stderr.splitlines() if "error" in line]
    assert line.startswith("lit-rlhf: error: KLGuard: the KL to the reference was ")
    assert "nats per response in iterations 2 to 3, above the bound 0.001; " in line
    assert iterations(tmp_path / "run") == [1, 2, 3]
    saved = read_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt")
    assert int(saved["state_dict"]["iteration"]) == 3
    assert saved["callbacks"]["KLGuard"]["above"] == []
    assert not (tmp_path / "run" / "export").exists()
    resumed = preloaded.run(*words, "1e9", "--ckpt_path", "last", cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    assert iterations(tmp_path / "run") == [1, 2, 3, 4]
    assert (tmp_path / "run" / "export").exists()


def test_the_guard_counts_nats_per_token(make_module, fit):
    """The KL of iteration 1 is 0, since the actor is the reference; a warning comes once, and the run goes on."""
    recorder, guard = Recorder(), KLGuard(bound=1e-12, per="token", iterations=1, action="warn")
    with pytest.warns(UserWarning, match=r"nats per token in iteration \d, above the bound 1e-12") as warned:
        fit(make_module(iterations=3), [guard, recorder])
    assert len([w for w in warned if "KLGuard" in str(w.message)]) == 1
    last = recorder.metrics[-1]
    assert guard.above == pytest.approx([last["objective/kl_to_ref"] / last["response/length"]])


def test_a_stopped_run_that_is_resumed_counts_again(make_module, fit, tmp_path):
    """The KL of iteration 1 is 0; the run is stopped after iterations 2 and 3, and the resumed one after 4 and 5."""
    last = tmp_path / "checkpoints" / "last.ckpt"
    for found, start in (("2 to 3", None), ("4 to 5", str(last))):
        callbacks = [KLGuard(bound=1e-3, iterations=2), IterationCheckpoint()]
        with pytest.raises(UserError, match=rf"^KLGuard: .* in iterations {found}, above the bound"):
            fit(make_module(iterations=9), callbacks, ckpt_path=start)


def test_an_iteration_below_the_bound_starts_the_count_again():
    guard = KLGuard(bound=1.0, iterations=2, action="warn")
    for kl in (2.0, 0.5, 3.0):
        guard.on_update_end(None, None, {"objective/kl_to_ref": kl, "progress/iteration": 1.0})
    assert guard.above == [3.0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bound": 0.0}, "KLGuard.bound must be positive, not 0.0"),
        ({"iterations": 0}, "KLGuard.iterations must be 1 or more, not 0"),
        ({"per": "word"}, "KLGuard.per must be response or token, not word"),
        ({"action": "end"}, "KLGuard.action must be stop or warn, not end"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        KLGuard(**options)


def stopping(**options):
    return EarlyStopping("val/score", mode="max", patience=2, check_on_train_epoch_end=False, **options)


def test_early_stopping_of_lightning_ends_at_the_same_iteration_after_a_resume(make_module, fit, tmp_path):
    """No score improves by 9, so the second validation after the first one is the last, in iteration 6.

    The checkpoint of iteration 4 holds the first of these two.
    """
    whole, resumed = stopping(min_delta=9.0), stopping(min_delta=9.0)
    keep = IterationCheckpoint(every_n=100, keep_every_n=4)
    fit(make_module(iterations=12), [whole, keep], **EVERY_TWO)
    last = tmp_path / "checkpoints" / "last.ckpt"
    assert int(read_checkpoint(last)["state_dict"]["iteration"]) == 6
    last.unlink()
    start = str(tmp_path / "checkpoints" / "iteration-000004.ckpt")
    fit(make_module(iterations=12), [resumed, IterationCheckpoint(every_n=100)], ckpt_path=start, **EVERY_TWO)
    assert int(read_checkpoint(last)["state_dict"]["iteration"]) == 6
    assert resumed.state_dict() == whole.state_dict()
    assert "did not improve in the last 2 records" in whole.stopping_reason_message
