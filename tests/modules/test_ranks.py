"""Weights and metrics do not depend on the number of processes or on the models' sharding (real processes, gloo)."""

import functools
import os
import re
from pathlib import Path

import preloaded
import pytest
import torch
from safetensors.torch import load_file

CASES = (
    *("ppo", "several", "stopped", "penalty", "grpo", "rloo", "trpo", "three", "ahead"),
    *("reward", "sft", "packed", "dpo"),
)
SHARED = ("several", "grpo", "rloo", "reward", "dpo")
"""The cases with several texts that begin alike."""
ADAPTERS = ("lora ppo", "lora stacked", "lora shared", "lora ahead", "lora trpo", "lora sft", "lora reward", "lora dpo")
WHOLE = "(?!lora).*"
"""A regular expression for the cases without adapters."""
MOST = "(?!lora|penalty|rloo|three|sft).*|lora (ppo|stacked|half|half sft)"
"""A regular expression for the cases of the short form on FSDP2, some with adapters."""
FEW = "ppo|grpo|dapo|packed"
"""A regular expression for some of these cases."""
RUNS = {
    ("ddp", 2, FEW): (),
    ("ddp", 4, ".*"): pytest.mark.long,
    ("fsdp2", 2, MOST): (),
    ("fsdp2", 2, WHOLE): pytest.mark.long,
    ("fsdp2", 4, WHOLE): pytest.mark.long,
    ("fsdp", 2, WHOLE): pytest.mark.long,
}
"""Strategies, numbers of processes and cases, and the marks of these runs."""
ADAPTER_RUNS = {
    ("fsdp2", 2, MOST): (),
    ("ddp", 2, "lora.*"): pytest.mark.long,
    ("fsdp2", 2, "lora.*"): pytest.mark.long,
    ("fsdp2", 4, "lora.*"): pytest.mark.long,
}
"""The runs with adapters, and their marks."""


def in_each(runs, *cases):
    """Run a test with each of the cases in every run that has it; without cases, once for each run."""
    found = [
        pytest.param(run, *case, marks=marks, id="-".join([*map(str, run[:2]), *case]))
        for run, marks in runs.items()
        for case in ([(name,) for name in cases if re.fullmatch(run[2], name)] if cases else [()])
    ]
    return pytest.mark.parametrize(("run", "case") if cases else "run", found)


@pytest.fixture(scope="module")
def results(tiny_model, exported_adapter, prompt_file, tmp_path_factory):
    """Return a function: a strategy, a number of processes, an expression -> weights and metrics of the cases."""
    folder = tmp_path_factory.mktemp("ranks")
    models = [
        str(tiny_model("llama")),
        str(tiny_model("llama", seed=1)),
        str(tiny_model("llama", task="score", seed=2)),
        str(exported_adapter()),
        str(exported_adapter(is_reward=True)),
    ]

    @functools.cache
    def run(strategy, count, cases=".*"):
        out = folder / f"{strategy}-{count}{'-apart' * ('APART' in os.environ)}.pt"
        script = str(Path(__file__).with_name("fit_on_ranks.py"))
        for done in preloaded.torchrun(
            count, script, strategy, *models, str(prompt_file), str(out), cases, timeout=300
        ):
            assert done.returncode == 0, done.stderr[-3000:]
        return torch.load(out)

    run.folder = folder
    return run


@in_each(RUNS, *CASES)
def test_same_weights_on_several_processes(results, case, run):
    assert_same(results("ddp", 1)[case], results(*run)[case])


@in_each({run: marks for run, marks in RUNS.items() if run[0] != "fsdp"})
def test_same_averages_and_draws_on_several_processes(results, run):
    """Averages are in the weights and, by validation, in the held-out metrics; FSDP1 refuses them."""
    alone = results("ddp", 1)["dapo"]
    assert_same(alone, results(*run)["dapo"])
    averages = {name.replace("averaged.", "actor."): x for name, x in alone["weights"].items() if "averaged." in name}
    assert averages.keys() == {name for name in alone["weights"] if name.startswith("actor.")}
    assert any((x - alone["weights"][name]).abs().max() > 1e-4 for name, x in averages.items())
    assert alone["metrics"]["dynamic_sampling/draws"] > 1
    assert 0 < alone["metrics"]["dynamic_sampling/uninformative_fraction"] < 1


@pytest.fixture(scope="module")
def apart(results):
    """Return the results of one process that computes shared beginnings for each text."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("APART", "1")
        return results("ddp", 1, "|".join(SHARED))


@in_each({("ddp", 1, WHOLE): (), **RUNS}, *SHARED)
def test_shared_beginnings_change_nothing(results, apart, case, run):
    """Each step has the learning rate 1, so that the weights differ as the gradients do."""
    alone, shared = apart[case], results(*run)[case]
    for name, weight in alone["weights"].items():
        torch.testing.assert_close(shared["weights"][name], weight, rtol=0, atol=1e-5, msg=name)
    rounding = {name: value for name, value in shared["metrics"].items() if name == "engine/mismatch_max"}
    assert shared["metrics"] == pytest.approx(alone["metrics"] | rounding, rel=1e-4, abs=1e-5)


def assert_same(alone, spread):
    assert spread["steps"] == alone["steps"]
    assert spread["weights"].keys() == alone["weights"].keys()
    for name, weight in alone["weights"].items():
        torch.testing.assert_close(spread["weights"][name], weight, rtol=1e-6, atol=1e-6, msg=name)
    rounding = {name: value for name, value in spread["metrics"].items() if name == "engine/mismatch_max"}
    assert spread["metrics"] == pytest.approx(alone["metrics"] | rounding, rel=1e-4, abs=1e-5)


def test_held_out_metrics_are_measured(results):
    """`test_same_weights_on_several_processes` compares them; here, some prompts have one correct answer of two."""
    metrics = results("ddp", 1)["grpo"]["metrics"]
    assert 0 < metrics["val/pass_at_1"] < metrics["val/pass_at_2"] < 1
    assert metrics["val/pass_at_1"] < metrics["val/majority_at_2"]  # an empty response does not vote
    assert metrics["val/rewards/LowFirstWord"] == pytest.approx(metrics["val/pass_at_1"])


def test_early_stop(results):
    """The KL stops some of the 3 iterations (of 3 epochs of 3 steps of 2 optimizers), but not all after one step."""
    assert 3 * 2 < results("ddp", 1)["three"]["steps"] < 3 * 9 * 2


@pytest.mark.parametrize("case", CASES)
def test_the_iteration_changed_the_weights(results, tiny_model, case):
    start = load_file(Path(tiny_model("llama")) / "model.safetensors")["model.norm.weight"]
    weights = results("ddp", 1)[case]["weights"]
    if case == "reward":  # the head starts at 0, so only the head has a gradient in the first step
        assert weights["reward.head.weight"].abs().max() > 1e-4
    else:
        assert (weights["actor.model.model.norm.weight"] - start).abs().max() > 1e-4


@in_each({("ddp", 2, FEW): (), ("fsdp2", 2, MOST): ()})
def test_hooks_get_the_rows_of_their_process_in_order(results, run):
    found = results(*run)["ppo"]
    score = pytest.approx(found["metrics"]["objective/score"])
    calls = [("on_rollout_end", 12), ("on_rewards", 12, 12), ("on_advantages", 12), ("on_update_end", score)]
    assert found["hooks"] == [calls, calls]


@in_each(ADAPTER_RUNS, *ADAPTERS)
def test_same_adapters_on_several_processes(results, case, run):
    alone, spread = results("ddp", 1)[case], results(*run)[case]
    assert_same(alone, spread)
    frozen = {name for name, (_, is_trained, _, _) in spread["parameters"].items() if not is_trained}
    assert frozen
    assert not frozen & alone["weights"].keys()  # checkpoints hold no base
    trained = [weight for name, weight in alone["weights"].items() if ".lora_B." in name]
    assert sum(float(weight.abs().max()) > 1e-6 for weight in trained) > 0.9 * len(trained)


@in_each(ADAPTER_RUNS, *ADAPTERS, "lora half", "lora half sft")
def test_what_is_trained_and_sharded(results, case, run):
    """The base is frozen and, with adapters of all roles, sharded; TRPO's actor is not, and its critic's head neither.

    In half precision, the base is stored in bfloat16 and the adapters in float32.
    """
    strategy, half = run[0], case.startswith("lora half")
    with_state = 0
    for name, (dtype, is_trained, is_sharded, has_state) in results(*run)[case]["parameters"].items():
        is_adapter = ".lora_" in name
        own = name.split(".")[-2] in ("actor", "critic", "reward") if is_adapter else name.startswith(OWN_HEADS)
        assert is_trained == own, name
        assert is_trained or not has_state, name
        with_state += has_state
        frozen_head = name.startswith("scores.")
        assert is_sharded == (strategy == "fsdp2" and (case != "lora trpo" or frozen_head)), name
        if half and ".base_layer." in name:
            assert dtype == "torch.bfloat16"
        if is_adapter or not half:
            assert dtype == "torch.float32", name
    assert with_state > 0


OWN_HEADS = ("critic.head.", "reward.head.", "actor.value_head.")


@in_each(ADAPTER_RUNS)
def test_half_precision(results, run):
    """At first, the policy is exactly the reference and the old policy; SFT learns nearly what one process learns."""
    metrics = results(*run)["lora half"]["metrics"]
    assert metrics["policy/ratio_max"] == 1
    assert metrics["objective/kl_to_ref"] == 0
    alone, spread = results("ddp", 1)["lora half sft"]["weights"], results(*run)["lora half sft"]["weights"]
    moved = [
        torch.cat([weights[name].flatten() for name in alone if ".lora_B." in name]) for weights in (alone, spread)
    ]
    assert torch.nn.functional.cosine_similarity(*moved, dim=0) > 0.95


@in_each(ADAPTER_RUNS)
def test_same_export(results, run):
    """With the adapter that it started from, joined to one of twice the rank; the scaling, 16, is a factor in B."""
    results("ddp", 1), results(*run)
    one, two = (load_file(results.folder / f"{r[0]}-{r[1]}" / "adapter_model.safetensors") for r in (("ddp", 1), run))
    assert one.keys() == two.keys()
    for name, weight in one.items():
        assert 4 in weight.shape
        torch.testing.assert_close(two[name], weight, rtol=1e-6, atol=1.6e-5, msg=name)
