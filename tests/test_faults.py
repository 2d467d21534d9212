"""Runs that are interrupted in many ways and resumed; benchmarks/faults.py does the same more often."""

import random
import re
import signal
import sys
import time
from pathlib import Path

import pytest

from lit_rlhf import UserError
from lit_rlhf.checkpoints import read_checkpoint
from lit_rlhf.testing.models import make_tiny_model

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
faults, faults_damage, faults_runs = (pytest.importorskip(name) for name in ("faults", "faults_damage", "faults_runs"))

KINDS = ("ppo", "trpo", "dpo", "reward", "sft", "ppo-fsdp2")
"""The kinds of runs that are killed, once each."""
LONG = ("trpo", "dpo", "ppo-fsdp2")
"""The kinds whose runs are killed in the long form only."""


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    return faults_runs.Setting(tmp_path_factory.mktemp("faults"))


@pytest.mark.parametrize(
    "kind",
    [pytest.param(kind, marks=pytest.mark.long) if kind in LONG else kind for kind in KINDS],
)
def test_killed_at_random_moments(setting, kind):
    row = faults.kill(setting, kind, 1, random.Random(kind))
    assert row.failures == []
    assert (row.tried, row.survived) == (1, 1)
    assert row.worst_loss <= faults_runs.EVERY_N


def test_sigterm_while_a_checkpoint_is_saved_and_while_validating(setting):
    """The run saves a checkpoint of the iteration, ends with status 143, and is resumed exactly."""
    row = faults.in_phases(setting, "sft", signal.SIGTERM, ("saving", "validating"))
    assert row.failures == []
    assert (row.tried, row.worst_loss) == (2, 0)


@pytest.mark.long
@pytest.mark.parametrize("kind", faults_runs.KINDS)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_signals_in_each_phase(setting, kind, number):
    assert faults.in_phases(setting, kind, number).failures == []


def test_damaged_checkpoints_cannot_be_read(setting, tmp_path):
    good = setting.whole("sft") / "checkpoints" / "last.ckpt"
    found = list(faults_damage.files(good.resolve(), tmp_path, random.Random(0)))
    assert len(found) > 30
    for what, path in found:
        with pytest.raises(UserError, match=re.escape(path.name)):
            read_checkpoint(path)
        assert not (tmp_path / "ran").exists(), what
    assert read_checkpoint(good)["lit_rlhf"]["module"] == "SFT"


def test_damaged_folders_cannot_be_read(setting, tmp_path):
    good = setting.whole("ppo-fsdp2") / "checkpoints" / "last.ckpt"
    found = list(faults_damage.folders(good.resolve(), tmp_path, random.Random(0)))
    assert len(found) > 15
    for what, path in found:
        with pytest.raises(UserError, match=re.escape(path.name)):
            read_checkpoint(path)
        assert not (tmp_path / "ran").exists(), what
    assert read_checkpoint(good)["lit_rlhf"]["module"] == "PolicyGradient"


@pytest.mark.long
@pytest.mark.parametrize("kind", ["ppo", "ppo-fsdp2"])
def test_damaged_checkpoints_are_refused(setting, kind):
    row = faults.damage(setting, kind, random.Random(0))
    assert row.failures == []


def test_a_damaged_checkpoint_is_refused_in_one_line_that_offers_the_one_before(setting):
    run = setting.folder / "broken"
    faults.shutil.copytree(setting.whole("sft"), run, symlinks=True)
    last = (run / "checkpoints" / "last.ckpt").resolve()
    last.write_bytes(last.read_bytes()[:-1000])
    (done,) = setting.start("sft", "broken", "--ckpt_path", "last").wait()
    before = "checkpoints/iteration-000010.ckpt resumes from the one before it"
    assert (done.returncode, len(faults_runs.messages(done.stderr))) == (1, 1)
    assert last.name in done.stderr
    assert before in done.stderr
    setting.start("sft", "broken", "--ckpt_path", str(last.with_name("iteration-000010.ckpt"))).end_well()
    assert faults_runs.unequal(run, setting.whole("sft")) == []


def test_a_file_that_another_process_verifies_is_missing(setting):
    """Both processes refuse the folder, and neither reads the file before."""
    folder = setting.folder / "incomplete.ckpt"
    faults.shutil.copytree((setting.whole("ppo-fsdp2") / "checkpoints" / "last.ckpt").resolve(), folder)
    (folder / "meta.pt").unlink()
    for done in setting.start("ppo-fsdp2", "other", "--ckpt_path", str(folder)).wait():
        refusal = f"lit-rlhf: error: the checkpoint {folder} cannot be used: meta.pt is missing"
        assert (done.returncode, faults_runs.messages(done.stderr)) == (1, [refusal])


def test_other_modules_and_models_are_refused(setting):
    of_dpo = setting.whole("dpo") / "checkpoints" / "last.ckpt"
    (done,) = setting.start("sft", "other", "--ckpt_path", str(of_dpo)).wait()
    assert faults_runs.messages(done.stderr) == [
        f"lit-rlhf: error: ckpt_path: {of_dpo} is a checkpoint of DPO, not of SFT"
    ]
    wide = make_tiny_model(setting.folder / "wide", words=["more", "words"])
    of_sft = setting.whole("sft") / "checkpoints" / "last.ckpt"
    (done,) = setting.start("sft", "other", "--ckpt_path", str(of_sft), "--model.actor", str(wide)).wait()
    (line,) = faults_runs.messages(done.stderr)
    assert line.startswith(f"lit-rlhf: error: ckpt_path: {of_sft} does not fit this run's options: actor.model.")


def test_a_folder_is_locked_while_a_run_trains_in_it(setting):
    slow = "import time\n\ndef reward(responses):\n    time.sleep(0.5)\n    return [0.0] * len(responses)\n"
    (setting.folder / "slow.py").write_text(slow)
    function = '[{"class_path": "RewardFunction", "init_args": {"function": "slow.py:reward"}}]'
    first = setting.start("trpo", "locked", "--model.rewards", function)
    while not (setting.folder / "locked" / "metrics.csv").exists():
        assert first.processes[0].is_running(), first.wait()
        time.sleep(0.1)
    for more in ([], ["--ckpt_path", "last"]):
        (done,) = setting.start("sft", "locked", *more).wait()
        assert done.returncode == 1
        (line,) = faults_runs.messages(done.stderr)
        assert f"a run is training in locked (process {first.processes[0].pid} on " in line
    first.processes[0].kill()
    assert (setting.folder / "locked" / "metrics.csv").exists()
    setting.start("sft", "locked").end_well()  # the older run's folder is renamed
    assert (setting.folder / "locked.1" / "metrics.csv").exists()
    assert not list(setting.folder.glob("locked*/.lock"))


def test_a_folder_that_cannot_be_written_is_refused(setting):
    (setting.folder / "file").write_text("")
    (done,) = setting.start("sft", "file/run").wait()
    assert done.returncode == 1
    (line,) = faults_runs.messages(done.stderr)
    assert line == "lit-rlhf: error: trainer.default_root_dir: file/run cannot be written: Not a directory"


def test_the_comparison_finds_a_difference(setting):
    """Otherwise, the other tests of this file could not fail."""
    whole = setting.whole("sft")
    copy = setting.folder / "changed"
    faults.shutil.copytree(whole, copy, symlinks=True)
    assert faults_runs.unequal(copy, whole) == []
    path = copy / "metrics.csv"
    path.write_text(path.read_text().replace("1", "2", 1))
    assert faults_runs.unequal(copy, whole) != []
