"""What a run prints at its beginning and its end, with the callbacks of the command line in a run of Python's."""

import re

from lightning.pytorch.cli import SaveConfigCallback

from lit_rlhf import IterationCheckpoint, RewardFunction, Summary, default_callbacks
from lit_rlhf.callbacks.progress import number
from lit_rlhf.callbacks.summary import following, initial

LOW_WORDS = "lit_rlhf.testing.runs:low_words"


def test_a_run_without_an_iteration(make_module, fit, capsys):
    fit(make_module(iterations=2), [Summary()], limit_train_batches=0)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("done ")]
    assert re.match(
        r"done      PolicyGradient, 0 iterations in 0:\d\d$", line
    )  # not the time since the computer started


def test_a_run_in_python_says_what_it_did(make_module, fit, tmp_path, capsys, recwarn):
    rewards = [RewardFunction(LOW_WORDS), RewardFunction(LOW_WORDS, weight=0.0), RewardFunction(LOW_WORDS, weight=0.5)]
    module = make_module(iterations=2, rewards=rewards)
    callbacks = default_callbacks(IterationCheckpoint(every_n=5))
    trainer = fit(module, callbacks, validation=True, enable_progress_bar=True, val_check_interval=2)
    lines = capsys.readouterr().out.splitlines()
    function = f"function {LOW_WORDS}"
    assert f"rewards: {function}, {function} (weight 0: only measured), {function} (weight 0.5)" in lines
    assert not [warning for warning in recwarn if "eval mode" in str(warning.message)]
    assert (tmp_path / "metrics.csv").exists()
    told = {line[:9].strip(): line[10:] for line in lines[lines.index(f"report: {tmp_path / 'report.html'}") + 1 :]}
    assert list(told) == ["done", "score", "KL", "length", "win rate", "model", "files", "next"]
    metrics = {name: number(value) for name, value in trainer.callback_metrics.items()}
    held_out = f"{metrics['val/reference_score']} → {metrics['val/score']} held out"  # the actor's own beginning
    assert told["score"].endswith(held_out)
    assert f"0 → {metrics['val/kl_to_ref']} held out" in told["KL"]
    assert re.match(r"0\.\d+ held out, 95 % interval 0\.\d+–0\.\d+  \(against", told["win rate"])
    assert told["next"] == f"vllm serve {tmp_path / 'export'}"  # there is no config.yaml

    trainer.callbacks.append(SaveConfigCallback(parser=None, config=None))
    last = f"--config {tmp_path / 'config.yaml'} --ckpt_path {tmp_path / 'checkpoints' / 'last.ckpt'}"
    predict, _ = following(trainer, module, tmp_path / "export")
    assert predict == f"lit-rlhf predict {last} --data.predict prompts.jsonl"
    trainer.datamodule.sources["predict"] = "mine.jsonl"
    assert following(trainer, module, tmp_path / "export")[0] == f"lit-rlhf predict {last}"
    module.reference_source = "another/model"
    assert initial(module, {"val/reference_score": 1.0}) == {}
