"""Weights and metrics do not depend on the number of processes or on the models' sharding (real processes, gloo)."""

import functools
from pathlib import Path

import preloaded
import pytest
import torch

CASES = ("ppo", "stopped", "penalty", "grpo", "rloo", "trpo", "three", "ahead", "reward", "sft", "packed", "dpo")
RUNS = (
    ("ddp", 2),
    pytest.param(("ddp", 4), marks=pytest.mark.long),
    ("fsdp2", 2),
    ("fsdp2", 4),
    ("fsdp", 2),
)


@pytest.fixture(scope="module")
def results(tiny_model, prompt_file, tmp_path_factory):
    """Return a function: a strategy and a number of processes -> the weights and metrics of every case."""
    folder = tmp_path_factory.mktemp("ranks")
    models = [
        str(tiny_model("llama")),
        str(tiny_model("llama", seed=1)),
        str(tiny_model("llama", task="score", seed=2)),
    ]

    @functools.cache
    def run(strategy, count):
        out = folder / f"{strategy}-{count}.pt"
        words = [str(Path(__file__).with_name("fit_on_ranks.py")), strategy, *models, str(prompt_file), str(out)]
        for done in preloaded.torchrun(count, *words, timeout=300):
            assert done.returncode == 0, done.stderr[-3000:]
        return torch.load(out)

    return run


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("run", RUNS, ids=lambda run: f"{run[0]}-{run[1]}")
def test_same_weights_on_several_processes(results, case, run):
    alone, spread = results("ddp", 1)[case], results(*run)[case]
    assert spread["steps"] == alone["steps"]
    assert spread["weights"].keys() == alone["weights"].keys()
    for name, weight in alone["weights"].items():
        torch.testing.assert_close(spread["weights"][name], weight, rtol=1e-6, atol=1e-6, msg=f"{case} {name}")
    assert spread["metrics"] == pytest.approx(alone["metrics"], rel=1e-4, abs=1e-5)


def test_early_stop(results):
    """The KL stops some of the 3 iterations (of 3 epochs of 3 steps of 2 optimizers), but not all after one step."""
    assert 3 * 2 < results("ddp", 1)["three"]["steps"] < 3 * 9 * 2


@pytest.mark.parametrize("case", CASES)
def test_the_iteration_changed_the_weights(results, tiny_model, case):
    from safetensors.torch import load_file

    start = load_file(Path(tiny_model("llama")) / "model.safetensors")["model.norm.weight"]
    weights = results("ddp", 1)[case]["weights"]
    if case == "reward":  # the head starts at 0, so only the head has a gradient in the first step
        assert weights["reward.head.weight"].abs().max() > 1e-4
    else:
        assert (weights["actor.model.model.norm.weight"] - start).abs().max() > 1e-4
