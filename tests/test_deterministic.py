"""``trainer.deterministic: true``: no operation without a deterministic algorithm on GPUs, and the same bits twice."""

import os

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lit_rlhf.algorithms.group_baselines import GroupNormalized
from lit_rlhf.algorithms.kl import ReferenceKL
from lit_rlhf.generation import Sampling
from lit_rlhf.generation.sampling import draw
from lit_rlhf.modules import DPO, TRPO, RewardModeling, TrustRegion, Update
from lit_rlhf.rewards import RewardFunction, RewardModel
from lit_rlhf.testing import Recorder

RAISING = ("_histc", "bincount", "ctc_loss", "histc", "kthvalue", "median", "nll_loss", "put", "scatter_reduce")
"""The beginnings of the names of operations on sequences that raise an error on a GPU, by the documentation of
`torch.use_deterministic_algorithms`."""
RANKINGS = [{"prompt": f"w{i}", "chosen": f" w{i} w{i + 1}", "rejected": f" w{i + 2} w3 w4"} for i in range(16)]


def distinct_words(responses):
    return [len(set(response.split())) / 10 for response in responses]


class RaisingOperations(TorchDispatchMode):
    """Collects the operations that would raise an error on a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name.removeprefix("aten::")
        raises = name.startswith(RAISING) or (name == "cumsum" and args[0].is_floating_point())
        if raises and torch.are_deterministic_algorithms_enabled():
            self.seen.add(name)
        return function(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def settings(monkeypatch):
    """Restore what the Trainer sets for the whole process."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def train(make_module, fit, fit_preferences, tiny_model):
    """Return a function that trains one kind of module, with validation."""

    def run(kind: str, iterations: int, recorder: Recorder) -> None:
        actor, scorer = str(tiny_model("llama")), str(tiny_model("llama", task="score"))
        if kind in ("dpo", "reward"):
            module = {"dpo": DPO, "reward": RewardModeling}[kind](actor, iterations=iterations)
            fit_preferences(module, RANKINGS, RANKINGS, [recorder], deterministic=True)
            return
        common = {"iterations": iterations, "sampling": Sampling(max_tokens=4, responses=2)}
        if kind == "trpo":
            rewards, region = [RewardFunction(f"{__file__}:distinct_words")], TrustRegion(cg_iterations=1, backtracks=1)
            module = TRPO(actor=actor, rewards=rewards, region=region, update=Update(minibatches=1), **common)
        elif kind == "grpo":
            module = make_module(**common, critic=None, advantages=GroupNormalized())
        else:
            full_kl = ReferenceKL("loss", "full")
            module = make_module(**common, critic="reward", rewards=[RewardModel(scorer)], reference_kl=full_kl)
        fit(module, [recorder], deterministic=True, limit_val_batches=1, validation=True)

    return run


def test_a_restricted_distribution_raises_nothing_on_gpus():
    """Training refuses such a distribution, but validation and prediction may have it."""
    torch.use_deterministic_algorithms(True)
    with RaisingOperations() as operations:
        draw(torch.randn(4, 16), torch.rand(4, dtype=torch.float64), Sampling(top_k=5, top_p=0.9))
    assert operations.seen == set()


@pytest.mark.parametrize("kind", ["ppo", "grpo", "trpo", "dpo", "reward"])
def test_nothing_raises_on_gpus(train, kind):
    with RaisingOperations() as operations:
        train(kind, 1, Recorder())
    assert torch.are_deterministic_algorithms_enabled()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"  # for matrix products on GPUs; the Trainer sets it
    assert operations.seen == set()


def test_two_runs_are_identical(train):
    one, two = Recorder(), Recorder()
    for recorder in (one, two):
        train("ppo", 2, recorder)
    assert len(one.metrics) == 2
    for row, other in zip(one.metrics, two.metrics, strict=True):
        same = {name: row[name] == other[name] for name in row if not name.startswith(("time/", "perf/"))}
        assert all(same.values()), same
    assert all(torch.equal(two.weights[name], weight) for name, weight in one.weights.items())
