"""Runs with adapters: killed and resumed, on other numbers of processes, and exported."""

import csv
import functools
import json
import signal
from pathlib import Path
from types import SimpleNamespace

import preloaded
import pytest
import torch
from safetensors.torch import load_file

from lit_rlhf.checkpoints import by_number, read_checkpoint
from lit_rlhf.export import export

pytestmark = pytest.mark.usefixtures("without_plans")
REWARD = """
import os, signal
calls = 0

def reward(responses):
    global calls
    calls += 1
    here = os.environ.get("LOCAL_RANK", "0") == os.environ.get("KILL_RANK")
    if here and calls == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    return [len(set(response.split())) / 10 for response in responses]
"""
ITERATIONS = 4
KINDS = {"alone": ("auto", 1), "ddp": ("ddp", 2), "fsdp2": ("fsdp2", 2)}
KILLED = {"alone": "0", "ddp": "1", "fsdp2": "0"}
ONE_FILE = '{"class_path": "lit_rlhf.FSDP2", "init_args": {"save_distributed_checkpoint": false}}'


@pytest.fixture(scope="module")
def runs(tiny_model, exported_adapter, prompt_file, tmp_path_factory):
    """Return the folder of all runs, and a function that kills and resumes one, and returns its exit codes.

    For one process, ddp and fsdp2 each: an uninterrupted run and, if the function is called, one that is killed in
    iteration 4, and its continuation from the checkpoint of iteration 2. Then, continued on another number of
    processes: a folder on one process, and a file with fsdp2, which then writes files.
    """
    folder = tmp_path_factory.mktemp("runs")
    (folder / "reward.py").write_text(REWARD)
    rewards = [
        {"class_path": "RewardFunction", "init_args": {"function": "reward.py:reward"}},
        {"class_path": "RewardModel", "init_args": {"model": str(exported_adapter(is_reward=True)), "weight": 0.1}},
    ]

    def command(name, strategy, processes, *more, **environment):
        words = [
            *(
                "fit",
                "--model",
                "PolicyGradient",
                "--model.actor",
                str(exported_adapter()),
                "--model.adapter.rank",
                "4",
            ),
            *(f"--model.rewards={json.dumps(rewards)}", "--model.critic", "reward"),
            *("--model.iterations", str(ITERATIONS), "--model.sampling.max_tokens", "10"),
            *("--model.scores.normalize", "true", "--model.update.epochs", "1", "--model.update.minibatches", "2"),
            *("--model.actor_optimizer", "AdamW", "--model.actor_optimizer.lr", "0.002"),
            *("--model.actor_optimizer.eps", "1e-3"),
            *("--model.critic_optimizer", "AdamW", "--model.critic_optimizer.lr", "0.002"),
            *("--model.critic_optimizer.eps", "1e-3"),
            *("--model.actor_scheduler", "ExponentialLR", "--model.actor_scheduler.gamma", "0.9"),
            *("--data", "Prompts", "--data.train", str(prompt_file), "--data.batch_size", "11"),
            *("--trainer.default_root_dir", name, "--trainer.accelerator", "cpu"),
            *("--trainer.strategy", strategy, "--trainer.devices", str(processes)),
            *("--trainer.enable_progress_bar", "false", "--checkpoint.every_n", "2", "--checkpoint.keep_every_n", "2"),
            *("--report.at_end", "false"),
        ]
        return {"words": [*words, *more], "processes": processes, "environment": environment}

    def start(run, may_fail=False):
        words = ["-m", "lit_rlhf.cli", *run["words"]]
        count = run["processes"]
        # with one process, no variables of torchrun
        launch = preloaded.torchrun if count > 1 else _alone
        done = launch(count, *words, cwd=folder, timeout=300, OMP_NUM_THREADS="1", **run["environment"])
        codes = [process.returncode for process in done]
        assert may_fail or set(codes) == {0}, done[0].stderr[-3000:]
        return codes

    @functools.cache
    def kill(kind):
        options = KINDS[kind]
        codes = start(command(f"{kind}-killed", *options, KILL_RANK=KILLED[kind]), may_fail=True)
        start(command(f"{kind}-killed", *options, "--ckpt_path", "last"))
        return codes

    for kind, options in KINDS.items():
        start(command(kind, *options))
    for name, before, options in (
        ("fsdp2-then-alone", "fsdp2", ("auto", 1)),
        ("alone-then-fsdp2", "alone", (ONE_FILE, 2)),
    ):
        start(command(name, *options, "--ckpt_path", f"{before}/checkpoints/iteration-000002.ckpt"))
    return SimpleNamespace(folder=folder, kill=kill)


def _alone(count, *words, **options):
    return [preloaded.run(*words, **options)]


def metrics(folder: Path) -> list[dict[str, float]]:
    rows = csv.DictReader((folder / "metrics.csv").open())
    return [{k: float(v) for k, v in row.items() if not k.startswith(("time/", "perf/"))} for row in rows]


def last(folder: Path) -> dict:
    return read_checkpoint(folder / "checkpoints" / "last.ckpt")


@pytest.mark.parametrize("kind", ["alone", *(pytest.param(kind, marks=pytest.mark.long) for kind in ("ddp", "fsdp2"))])
def test_killed_and_resumed(runs, kind):
    """The continued run ends with the same bits as the uninterrupted one."""
    assert -signal.SIGKILL in runs.kill(kind)
    one, two = runs.folder / kind, runs.folder / f"{kind}-killed"
    assert len(metrics(one)) == ITERATIONS
    assert metrics(one) == metrics(two)
    assert (one / "samples.jsonl").read_bytes() == (two / "samples.jsonl").read_bytes()
    a, b = last(one), last(two)
    assert a["state_dict"].keys() == b["state_dict"].keys()
    assert all(torch.equal(a["state_dict"][name], b["state_dict"][name]) for name in a["state_dict"])
    torch.testing.assert_close(a["optimizer_states"], b["optimizer_states"], rtol=0, atol=0)


@pytest.mark.parametrize("name", ["ddp", "fsdp2", "fsdp2-then-alone", "alone-then-fsdp2"])
def test_same_run_on_several_processes(runs, name):
    one, two = runs.folder / "alone", runs.folder / name
    for a, b in zip(metrics(one)[-2:], metrics(two)[-2:], strict=True):
        assert b == pytest.approx(a | {"engine/mismatch_max": b["engine/mismatch_max"]}, rel=1e-4, abs=1e-5)
    first, second = last(one), last(two)
    for key, weight in first["state_dict"].items():
        torch.testing.assert_close(second["state_dict"][key], weight, rtol=1e-6, atol=1e-6, msg=key)
    states = second["optimizer_states"]
    if name == "alone-then-fsdp2":  # in one file, a sharded strategy names the parameters
        states = [by_number(state) for state in states]
    for one_state, two_state in zip(first["optimizer_states"], states, strict=True):
        for number, values in one_state["state"].items():
            torch.testing.assert_close(two_state["state"][number], values, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [*KINDS, "alone-then-fsdp2"])
def test_checkpoints_hold_adapters_and_heads_alone(runs, name):
    path = runs.folder / name / "checkpoints" / "last.ckpt"
    assert path.is_dir() == (name == "fsdp2")
    checkpoint = last(runs.folder / name)
    weights = {key: weight for key, weight in checkpoint["state_dict"].items() if weight.numel() > 1}
    assert {key.split(".")[-2] for key in weights if ".lora_" in key} == {"actor", "critic"}
    assert [key for key in weights if ".lora_" not in key] == ["critic.head.weight"]
    assert sum(len(state["state"]) for state in checkpoint["optimizer_states"]) == len(weights) + 1  # the head's bias


def test_exports_of_all_strategies(runs, tiny_model, tmp_path):
    """At the end of a run and from its checkpoint, as an adapter and merged into the base."""
    from transformers import AutoModelForCausalLM

    expected = load_file(runs.folder / "alone" / "export" / "adapter_model.safetensors")
    for kind in KINDS:
        run = runs.folder / kind
        export(run, out=tmp_path / kind)
        for folder in (run / "export", tmp_path / kind):
            found = load_file(folder / "adapter_model.safetensors")
            assert found.keys() == expected.keys()
            for name, weight in expected.items():
                torch.testing.assert_close(found[name], weight, rtol=1e-6, atol=8e-6, msg=name)  # B has a factor of 8
    merged = AutoModelForCausalLM.from_pretrained(export(runs.folder / "fsdp2", out=tmp_path / "merged", merge=True))
    start = AutoModelForCausalLM.from_pretrained(tiny_model("llama")).state_dict()
    name = "layers.0.self_attn.q_proj"
    up, down = (expected[f"base_model.model.model.{name}.lora_{x}.weight"] for x in "BA")
    changed = merged.state_dict()[f"model.{name}.weight"]
    torch.testing.assert_close(changed, start[f"model.{name}.weight"] + up @ down, rtol=1e-5, atol=1e-6)
