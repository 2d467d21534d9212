"""Runs on several processes: resuming on another number of processes, resuming exactly after a kill, and memory."""

import csv
import functools
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import preloaded
import pytest
import torch

from lit_rlhf.checkpoints import read_checkpoint
from lit_rlhf.models.loading import RandomWeights, load_model, load_tokenizer

pytestmark = pytest.mark.usefixtures("without_plans")
REWARD = """
import os, signal
calls = 0

def reward(responses):
    global calls
    calls += 1
    here = os.environ.get("LOCAL_RANK", "0") == os.environ.get("KILL_RANK")
    if here and calls == 4:
        open("killed", "w").close()
        os.kill(os.getpid(), signal.SIGKILL)
    return [len(set(response.split())) / 10 for response in responses]
"""
ITERATIONS = 5


@pytest.fixture(scope="module")
def fit(tiny_model, prompt_file, tmp_path_factory):
    """Return a function that runs the command, as torchrun does; its attribute ``folder`` is the folder of the runs.

    With a status, the command starts the other processes itself, and must end with this status.
    """
    folder = tmp_path_factory.mktemp("runs")
    (folder / "reward.py").write_text(REWARD)

    def run(name: str, strategy: str, processes: int, *more: str, status: int | None = None, **environment: str):
        words = [
            *("-m", "lit_rlhf.cli"),
            *("fit", "--model", "PolicyGradient", "--model.actor", str(tiny_model("llama"))),
            '--model.rewards=[{"class_path": "RewardFunction", "init_args": {"function": "reward.py:reward"}}]',
            *("--model.iterations", str(ITERATIONS), "--model.sampling.max_tokens", "10"),
            *("--model.scores.normalize", "true", "--model.update.epochs", "2", "--model.update.minibatches", "2"),
            *("--model.actor_optimizer", "AdamW", "--model.actor_optimizer.lr", "0.001"),
            *("--model.actor_optimizer.eps", "1e-4", "--model.averaging.decay", "0.5"),
            *("--model.critic_optimizer", "AdamW", "--model.critic_optimizer.lr", "0.01"),
            *("--model.critic_optimizer.eps", "1e-4"),
            *("--model.actor_scheduler", "ExponentialLR", "--model.actor_scheduler.gamma", "0.9"),
            *("--data", "Prompts", "--data.train", str(prompt_file), "--data.batch_size", "11"),
            *("--trainer.default_root_dir", name, "--trainer.accelerator", "cpu"),
            *("--trainer.strategy", strategy, "--trainer.devices", str(processes)),
            *("--trainer.enable_progress_bar", "false", "--checkpoint.every_n", "2", "--report.at_end", "false"),
        ]
        if status is not None:
            done = subprocess.run(
                [sys.executable, *words, *more],
                cwd=folder,
                env={**os.environ, **environment},
                capture_output=True,  # until the last of its processes has ended
                text=True,
                timeout=120,
            )
            assert done.returncode == status, done.stderr[-3000:]
            return done.stderr
        for done in preloaded.torchrun(processes, *words, *more, cwd=folder, **environment):
            assert done.returncode == 0, done.stderr[-3000:]

    run.folder = folder
    return run


@pytest.fixture(scope="module")
def whole(fit):
    """Return a function that trains an uninterrupted run once, keeps its iteration 3, and returns its folder."""

    @functools.cache
    def folder(name: str) -> Path:
        strategy, processes = name.split("-")
        fit(name, strategy, int(processes), "--checkpoint.keep_every_n", "3")
        return fit.folder / name

    return folder


def metrics(folder: Path) -> list[dict[str, float]]:
    rows = csv.DictReader((folder / "metrics.csv").open())
    return [{k: float(v) for k, v in row.items() if not k.startswith(("time/", "perf/"))} for row in rows]


def last(folder: Path) -> dict:
    return read_checkpoint(folder / "checkpoints" / "last.ckpt")


def assert_close(one: Path, two: Path) -> None:
    assert len(metrics(one)) == len(metrics(two)) == ITERATIONS
    for a, b in zip(metrics(one), metrics(two), strict=True):
        assert b == pytest.approx(a, rel=1e-4, abs=1e-5)
    first, second = last(one), last(two)
    for name, weight in first["state_dict"].items():
        torch.testing.assert_close(second["state_dict"][name], weight, rtol=1e-5, atol=1e-5, msg=name)
    for one_state, two_state in zip(first["optimizer_states"], second["optimizer_states"], strict=True):
        for number, values in one_state["state"].items():
            torch.testing.assert_close(two_state["state"][number], values, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("before", "strategy", "processes"),
    [
        pytest.param("fsdp2-2", "auto", 1, marks=pytest.mark.long),
        pytest.param("fsdp2-2", "fsdp2", 4, marks=pytest.mark.long),
        ("auto-1", "fsdp2", 2),
        pytest.param("fsdp2-4", "fsdp2", 2, marks=pytest.mark.long),
        pytest.param("auto-1", "ddp", 2, marks=pytest.mark.long),
    ],
)
def test_resumed_on_another_number_of_processes(whole, fit, before, strategy, processes):
    saved = whole(before) / "checkpoints" / "iteration-000003.ckpt"
    assert saved.is_dir() == before.startswith("fsdp2")
    name = f"{before}-on-{processes}-{strategy}"
    shutil.copytree(whole(before), fit.folder / name)
    fit(name, strategy, processes, "--ckpt_path", str(saved))
    assert_close(whole("auto-1"), fit.folder / name)


@pytest.mark.parametrize("strategy", [pytest.param("ddp", marks=pytest.mark.long), "fsdp2"])
def test_a_killed_process_ends_the_run_and_the_run_resumes_exactly(whole, fit, strategy):
    """The killed run ends soon with a one-line error; resumed on as many processes, it ends with the same bits."""
    name, rank = f"{strategy}-killed", "1" if strategy == "ddp" else "0"
    said = fit(name, strategy, 2, status=-signal.SIGKILL if rank == "0" else 1, KILL_RANK=rank)
    assert time.time() - (fit.folder / "killed").stat().st_mtime < 30
    assert "lit-rlhf: error: another process of this run has ended" in said
    assert "Traceback" not in said
    assert len(metrics(fit.folder / name)) == 3
    fit(name, strategy, 2, "--ckpt_path", "last")
    assert metrics(fit.folder / name) == metrics(whole(f"{strategy}-2"))
    one, two = last(fit.folder / name)["state_dict"], last(whole(f"{strategy}-2"))["state_dict"]
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_predictions_of_all_processes(whole, prompt_file):
    """They are in the order of the file, as with one process."""
    runs = whole("auto-1").parent
    words = ["-m", "lit_rlhf.cli", "predict", "--config", "auto-1/config.yaml", "--trainer.strategy", "ddp"]
    words += ["--ckpt_path", "auto-1/checkpoints/last.ckpt", "--data.predict", str(prompt_file)]
    predictions = {}
    for processes in (1, 2):
        more = ["--trainer.devices", str(processes), "--trainer.default_root_dir", f"predicted-{processes}"]
        for done in preloaded.torchrun(processes, *words, *more, cwd=runs):
            assert done.returncode == 0, done.stderr[-3000:]
        predictions[processes] = (runs / f"predicted-{processes}" / "predictions.jsonl").read_text()
    assert len(predictions[1].splitlines()) == 48
    assert predictions[2] == predictions[1]


def test_export_reads_the_folder(whole, tmp_path):
    from transformers import AutoModelForCausalLM

    from lit_rlhf.export import export

    exported = AutoModelForCausalLM.from_pretrained(export(whole("fsdp2-2"), out=tmp_path / "exported")).state_dict()
    at_end = AutoModelForCausalLM.from_pretrained(whole("fsdp2-2") / "export").state_dict()
    weights = last(whole("fsdp2-2"))["state_dict"]
    for name, value in exported.items():
        assert torch.equal(value, weights[f"averaged.model.{name}"])
        assert torch.equal(value, at_end[name])


def test_an_incomplete_folder_is_refused(whole, tmp_path):
    from lit_rlhf import UserError

    shutil.copytree(whole("fsdp2-2") / "checkpoints" / "last.ckpt", tmp_path / "last.ckpt")
    (tmp_path / "last.ckpt" / "meta.pt").unlink()
    with pytest.raises(UserError, match=r"meta\.pt is missing"):
        read_checkpoint(tmp_path / "last.ckpt")


def test_each_process_holds_its_share(tiny_model, prompt_file, tmp_path):
    """Count all tensors at the end of an iteration: four models, and gradients and optimizer states of two."""
    held_bytes = {}
    for strategy, processes in (("ddp", 1), ("fsdp2", 2)):
        words = [str(Path(__file__).with_name("bytes_on_ranks.py")), strategy, str(tiny_model()), str(prompt_file)]
        for done in preloaded.torchrun(processes, *words, str(tmp_path)):
            assert done.returncode == 0, done.stderr[-3000:]
        held_bytes[processes] = [int(path.read_text()) for path in sorted(tmp_path.glob(f"{processes}-*"))]
    (alone,) = held_bytes[1]
    assert len(held_bytes[2]) == 2
    assert max(held_bytes[2]) < alone / 2 * 1.05 + 2**19


@pytest.mark.long
def test_each_process_holds_its_share_of_a_base(tiny_model, prompt_file, tmp_path):
    """The base is sharded; only the adapters of the actor and the critic have gradients and optimizer states."""
    base, shape = tmp_path / "base", {"num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 4}
    shape |= {"model_type": "llama", "hidden_size": 256, "intermediate_size": 512, "max_position_embeddings": 128}
    model = load_model(RandomWeights(shape, str(tiny_model())))
    model.save_pretrained(base)
    load_tokenizer(str(tiny_model())).save_pretrained(base)
    words = [str(Path(__file__).with_name("bytes_on_ranks.py")), "fsdp2", str(base), str(prompt_file), str(tmp_path)]
    for done in preloaded.torchrun(2, *words, str(base)):
        assert done.returncode == 0, done.stderr[-3000:]
    weights = sum(parameter.numel() for parameter in model.parameters()) * 4
    adapters = 2 * 4 * 4 * (4 * (256 + 256) + 3 * (256 + 512)) * 4  # two, of rank 4, in 4 layers, float32
    held = [int((tmp_path / f"2-{rank}").read_text()) for rank in range(2)]
    assert max(held) < weights / 2 + adapters / 2 * 4 + 2**19  # weights, gradients and two moments
