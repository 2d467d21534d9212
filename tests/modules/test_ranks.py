"""The loss and its gradients do not depend on how the rows are spread over processes (gloo, real ones)."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

CASES = ("ppo", "stopped", "penalty", "grpo", "rloo", "trpo", "reward", "dpo")


@pytest.fixture(scope="module")
def found(tiny_model, prompt_file, tmp_path_factory):
    """Weights and metrics after an iteration on 1, 2 and 4 processes."""
    folder = tmp_path_factory.mktemp("ranks")
    for count in (1, 2, 4):
        words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
        words += [str(Path(__file__).with_name("fit_on_ranks.py")), str(tiny_model("llama"))]
        words += [str(tiny_model("llama", seed=1)), str(prompt_file), str(folder / f"{count}.pt")]
        done = subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
    return {count: torch.load(folder / f"{count}.pt") for count in (1, 2, 4)}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("count", [2, 4])
def test_same_gradient_on_several_processes(found, case, count):
    alone, spread = found[1][case], found[count][case]
    for name, weight in alone["weights"].items():
        torch.testing.assert_close(spread["weights"][name], weight, rtol=1e-6, atol=1e-6, msg=f"{case} {name}")
    assert spread["metrics"] == pytest.approx(alone["metrics"], rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_the_iteration_changed_the_weights(found, tiny_model, case):
    from safetensors.torch import load_file

    start = load_file(Path(tiny_model("llama")) / "model.safetensors")["model.norm.weight"]
    weights = found[1][case]["weights"]
    if case == "reward":  # the head is 0 at first, so the first gradient is the head's alone
        assert weights["reward.head.weight"].abs().max() > 1e-4
    else:
        assert (weights["actor.model.model.norm.weight"] - start).abs().max() > 1e-4
