import errno
import math
import os
import signal
from contextlib import nullcontext

import lightning
import pytest
import torch

from lit_rlhf.callbacks import IterationCheckpoint, MetricsFile, Summary
from lit_rlhf.checkpoints import AnyCheckpoint, read_checkpoint
from lit_rlhf.errors import UserError
from lit_rlhf.rewards import RewardFunction
from lit_rlhf.testing import Recorder
from lit_rlhf.testing.runs import low_words


def iteration(path):
    return int(torch.load(path, weights_only=True)["state_dict"]["iteration"])


def test_every_n_kept_and_last(make_module, fit, tmp_path):
    fit(make_module(iterations=5), [IterationCheckpoint(every_n=2, keep_every_n=2)])
    folder = tmp_path / "checkpoints"
    assert {p.name for p in folder.iterdir()} == {"last.ckpt", *(f"iteration-00000{n}.ckpt" for n in (2, 4, 5))}
    assert iteration(folder / "iteration-000002.ckpt") == 2
    assert iteration(folder / "iteration-000004.ckpt") == 4
    assert iteration(folder / "last.ckpt") == 5  # the last iteration is saved although 5 is not a multiple of 2


def test_best_by_score_is_the_best_row_of_the_metrics(make_module, fit, tmp_path):
    fit(
        make_module(iterations=6),
        [IterationCheckpoint(every_n=100, monitor="val/score"), MetricsFile()],
        validation=True,
        val_check_interval=1,
    )
    header, *rows = [line.split(",") for line in (tmp_path / "metrics.csv").read_text().splitlines()]
    score, number = header.index("val/score"), header.index("progress/iteration")
    best = max((float(row[score]), -float(row[number])) for row in rows if row[score])
    assert iteration(tmp_path / "checkpoints" / "best.ckpt") == -best[1]


def test_resumed_from_last_it_continues_to_count(make_module, fit, tmp_path):
    fit(make_module(iterations=2), [IterationCheckpoint(every_n=1)])
    fit(make_module(iterations=4), [IterationCheckpoint(every_n=1)], ckpt_path="last")
    assert iteration(tmp_path / "checkpoints" / "last.ckpt") == 4


class Measured(lightning.Callback):
    """Logs 1000 in the first validation, NaN in the third one, and 0 in the others."""

    def on_validation_epoch_end(self, trainer, pl_module):
        pl_module.log("val/measured", {1: 1e3, 3: math.nan}.get(int(pl_module.iteration), 0.0))


def test_a_validation_without_a_score_is_not_the_best(make_module, fit, tmp_path):
    checkpoint = IterationCheckpoint(every_n=100, keep_last=1, monitor="val/measured")
    options = {"validation": True, "val_check_interval": 1, "num_sanity_val_steps": 0}
    fit(make_module(iterations=4), [Measured(), checkpoint], **options)
    assert (checkpoint.best, checkpoint.best_iteration) == (1e3, 1)
    names = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert names == {"best.ckpt", "last.ckpt", "iteration-000001.ckpt", "iteration-000004.ckpt"}
    assert iteration(tmp_path / "checkpoints" / "best.ckpt") == 1


@pytest.mark.parametrize(("monitor", "mode", "is_best"), [("val/length", "max", True), ("val/score", "min", True),
                                                          ("val/score", "max", False)])  # fmt: skip
def test_the_best_of_another_metric_or_mode_says_nothing_in_a_resumed_run(
    make_module, fit, tmp_path, monitor, mode, is_best
):
    often = {"validation": True, "val_check_interval": 1}
    first = IterationCheckpoint(every_n=1, monitor="val/score")
    fit(make_module(iterations=1), [first], **often)
    path = tmp_path / "checkpoints" / "iteration-000001.ckpt"
    state = torch.load(path, weights_only=False)
    (own,) = [saved for saved in state["callbacks"].values() if "saved_iteration" in saved]
    assert own["best"] == first.best
    own["best"] = {"max": 1e9, "min": -1e9}[mode]  # nothing is better
    torch.save(state, path)
    fit(make_module(iterations=2), [IterationCheckpoint(monitor=monitor, mode=mode)], ckpt_path=str(path), **often)
    assert iteration(tmp_path / "checkpoints" / "best.ckpt") == 1 + is_best


def test_an_epoch_that_ends_is_resumed_in_the_next(make_module, fit, tmp_path):
    """With 48 prompts in batches of 8, the sixth iteration ends an epoch."""
    whole = make_module(iterations=8)
    fit(whole, [IterationCheckpoint(every_n=1, dirpath=str(tmp_path / "whole"))])
    fit(make_module(iterations=6), [IterationCheckpoint(every_n=1)])
    resumed = make_module(iterations=8)
    fit(resumed, [IterationCheckpoint(every_n=1)], ckpt_path=str(tmp_path / "checkpoints" / "last.ckpt"))
    one, two = whole.state_dict(), resumed.state_dict()
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_an_unknown_metric_is_refused_with_the_existing_ones(make_module, fit):
    with pytest.raises(UserError, match=r"no metric 'objective/scores'; the metrics are: .*objective/score"):
        fit(make_module(iterations=1), [IterationCheckpoint(monitor="objective/scores")])


def test_a_metric_of_the_validation_needs_data_for_it(make_module, fit, tmp_path):
    with pytest.raises(UserError, match=r"^checkpoint\.monitor is 'val/score', but data\.validation is not set$"):
        fit(make_module(iterations=1), [IterationCheckpoint(monitor="val/score")])
    assert not (tmp_path / "checkpoints").exists()


def test_numbers_out_of_range():
    with pytest.raises(ValueError, match="every_n must be 1 or more, not 0"):
        IterationCheckpoint(every_n=0)


def test_ctrl_c_ends_the_run_after_the_iteration(make_module, fit, tmp_path, capfd):
    """With a checkpoint, from which the run goes on to the same bits as without an interruption."""
    iterations, handler = [], signal.getsignal(signal.SIGINT)

    def presses(responses):
        iterations.append(len(responses))
        if len(iterations) == 2:
            signal.raise_signal(signal.SIGINT)
        return low_words(responses)

    module = make_module(iterations=3, rewards=[RewardFunction(presses)])
    try:
        with pytest.raises(SystemExit):
            fit(module, [IterationCheckpoint(every_n=10), Summary()])
    finally:
        signal.signal(signal.SIGINT, handler)  # Lightning ignores Ctrl-C from the first one on
    out = capfd.readouterr().out
    assert "Ctrl-C: the run ends after this iteration, with a checkpoint" in out
    assert "interrupted after iteration 2: the last checkpoint is that of iteration 2" in out
    whole, rest = Recorder(), Recorder()
    fit(make_module(iterations=3), [whole])
    fit(make_module(iterations=3), [rest], ckpt_path=tmp_path / "checkpoints" / "last.ckpt")
    assert len(rest.metrics) == 1
    assert all(torch.equal(rest.weights[name], weight) for name, weight in whole.weights.items())


@pytest.mark.parametrize("fails", [False, True])
def test_the_handlers_of_signals_are_as_before_the_run(make_module, fit, fails):
    """Otherwise, processes that are forked later would not end with SIGTERM."""
    signals = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    before = [signal.getsignal(number) for number in signals]
    seen = []

    def score(responses):
        seen.append([signal.getsignal(number) for number in signals])
        if fails:
            raise ValueError("no")
        return low_words(responses)

    module = make_module(iterations=1, rewards=[RewardFunction(score)])
    with pytest.raises(UserError) if fails else nullcontext():
        fit(module, [IterationCheckpoint()])
    assert all(now != then for now, then in zip(seen[0], before, strict=True))
    assert [signal.getsignal(number) for number in signals] == before


def test_sigusr1_saves_a_checkpoint_and_the_run_continues(make_module, fit, tmp_path):
    def score(responses):
        seen.append(len(responses))
        if len(seen) == 2:
            signal.raise_signal(signal.SIGUSR1)
        return low_words(responses)

    seen = []
    module = make_module(iterations=4, rewards=[RewardFunction(score)])
    fit(module, [IterationCheckpoint(every_n=100)])
    names = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert names == {"last.ckpt", "iteration-000002.ckpt", "iteration-000004.ckpt"}


@pytest.mark.parametrize(
    ("options", "kept"), [({"keep_last": 1}, {6}), ({"keep_last": 3, "keep_every_n": 2}, {2, 4, 5, 6})]
)
def test_the_latest_and_those_for_good_are_kept(make_module, fit, tmp_path, options, kept):
    fit(make_module(iterations=6), [IterationCheckpoint(every_n=1, **options)])
    folder = tmp_path / "checkpoints"
    assert {path.name for path in folder.iterdir()} == {"last.ckpt", *(f"iteration-{n:06d}.ckpt" for n in kept)}
    assert (folder / "last.ckpt").resolve().name == "iteration-000006.ckpt"


def test_a_checkpoint_is_due_after_some_minutes(make_module, fit, tmp_path):
    fit(make_module(iterations=3), [IterationCheckpoint(every_n=100, every_minutes=1e-9, keep_last=9)])
    assert len(list((tmp_path / "checkpoints").glob("iteration-*"))) == 3


def test_a_checkpoint_that_cannot_be_written_leaves_the_one_before(make_module, fit, tmp_path, monkeypatch):
    save, saved = torch.save, []

    def full(checkpoint, file):
        saved.append(0)
        if len(saved) == 2:
            file.write(b"part")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save(checkpoint, file)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match=r"No space left on device.*iteration-000002"):
        fit(make_module(iterations=3), [IterationCheckpoint(every_n=1)], plugins=[AnyCheckpoint()])
    monkeypatch.undo()
    folder = tmp_path / "checkpoints"
    assert {path.name for path in folder.iterdir()} == {"last.ckpt", "iteration-000001.ckpt"}
    assert int(read_checkpoint(folder / "last.ckpt")["state_dict"]["iteration"]) == 1
