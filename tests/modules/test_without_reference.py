"""Runs with ``reference_kl: null``, which load no reference, in real fits."""

import csv
import json

import preloaded
import pytest
import torch

from lit_rlhf.algorithms.group_baselines import GroupNormalized
from lit_rlhf.algorithms.kl import AdaptiveKL, FixedKL
from lit_rlhf.callbacks import IterationCheckpoint, KLGuard, Samples
from lit_rlhf.callbacks.loggers import table
from lit_rlhf.data import Prompts
from lit_rlhf.errors import UserError
from lit_rlhf.generation import Sampling
from lit_rlhf.models.adapters import LoRA
from lit_rlhf.modules import TRPO, Update
from lit_rlhf.modules.dynamic_sampling import DynamicSampling
from lit_rlhf.planning.hardware import Device
from lit_rlhf.planning.plan import make_plan
from lit_rlhf.planning.setting import setting_of
from lit_rlhf.rewards import RewardFunction
from lit_rlhf.testing import Recorder

GROUPS = {"critic": None, "advantages": GroupNormalized(), "sampling": Sampling(max_tokens=8, responses=2)}
CASES = {
    "ppo": {},
    "grpo": GROUPS | {"dynamic_sampling": DynamicSampling()},
    "lora": {"adapter": LoRA(rank=2), "critic": "shared"},
}


@pytest.mark.parametrize("case", [pytest.param("ppo", marks=pytest.mark.long), "grpo", "lora", "trpo"])
def test_the_weights_are_those_of_a_coefficient_of_0(make_module, tiny_model, fit, case):
    def make(**options):
        if case == "trpo":
            rewards, update = [RewardFunction("lit_rlhf.testing.runs:low_words")], Update(max_tokens=256)
            options |= {"sampling": Sampling(max_tokens=4), "critic": None}
            return TRPO(str(tiny_model("llama")), rewards, update=update, iterations=2, **options)
        return make_module(**{"iterations": 3} | CASES[case] | options)

    with_one, without = Recorder(), Recorder()
    fit(make(kl=FixedKL(0.0)), [with_one])
    module = make(reference_kl=None)
    fit(module, [without])
    assert module.reference is None
    trained = {name: x for name, x in with_one.weights.items() if not name.startswith("reference.")}
    assert trained.keys() == without.weights.keys()
    assert all(torch.equal(x, without.weights[name]) for name, x in trained.items())
    missing = with_one.metrics[-1].keys() - without.metrics[-1].keys()
    assert missing == {"objective/kl_to_ref", "objective/kl_coef"}


def test_a_resumed_run_ends_with_the_same_bits(make_module, fit, tmp_path):
    whole, rest = Recorder(), Recorder()
    fit(make_module(reference_kl=None, iterations=4), [whole])
    fit(make_module(reference_kl=None, iterations=2), [IterationCheckpoint(every_n=2)])
    (path,) = tmp_path.rglob("last.ckpt")
    fit(make_module(reference_kl=None, iterations=4), [rest], ckpt_path=str(path))
    assert len(rest.metrics) == 2
    assert all(torch.equal(x, rest.weights[name]) for name, x in whole.weights.items())


def test_validation_compares_with_nothing(make_module, fit, prompt_file, tmp_path):
    module = make_module(reference_kl=None, iterations=2)
    trainer = fit(module, [Samples(count=2)], validation=True, val_check_interval=1)
    measured = {name for name in trainer.callback_metrics if name.startswith("val/")}
    assert {"val/score", "val/score_std", "val/length"} < measured
    assert not any(part in name for name in measured for part in ("kl", "win_rate", "reference"))
    records = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert {record["stage"] for record in records} == {"train", "val"}
    for record in records:
        assert not {"kl_to_ref", "reference"} & (record.keys() | record["tokens"].keys())
    columns, (row, *_) = table(records[:1])
    assert columns[-1] == "rewards/low_words"
    assert len(row) == len(columns)


def test_the_command_writes_the_report_and_validates_with_a_reference(tiny_model, prompt_file, tmp_path):
    words = ["--model", "PolicyGradient", "--model.actor", str(tiny_model("llama")), "--model.reference_kl", "null"]
    reward = "lit_rlhf.testing.runs:low_words"
    words += [f'--model.rewards=[{{"class_path": "RewardFunction", "init_args": {{"function": "{reward}"}}}}]']
    words += ["--model.iterations", "2", "--model.sampling.max_tokens", "4", "--data", "Prompts"]
    words += ["--data.train", str(prompt_file), "--data.validation", str(prompt_file), "--data.batch_size", "8"]
    words += ["--trainer.default_root_dir", "run", "--trainer.accelerator", "cpu", "--trainer.val_check_interval", "2"]
    done = preloaded.run("-m", "lit_rlhf.cli", "fit", *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "plan: none" not in done.stdout
    with (tmp_path / "run" / "metrics.csv").open() as file:
        columns = csv.DictReader(file).fieldnames
    assert {"objective/score", "val/score"} < set(columns)
    assert not any("kl_to_ref" in name or "kl_coef" in name or "win_rate" in name for name in columns)
    page = (tmp_path / "run" / "report.html").read_text()
    assert "Score against KL" not in page
    assert "on held-out prompts the score is" in page
    words = ["validate", "--config", "run/config.yaml", "--ckpt_path", "run/checkpoints/last.ckpt"]
    compared = preloaded.run("-m", "lit_rlhf.cli", *words, "--model.reference_kl.where", "reward", cwd=tmp_path)
    assert compared.returncode == 0, compared.stderr
    assert "win_rate" in compared.stdout


def test_a_plan_has_no_reference(make_module, prompt_file):
    data, device = Prompts(train=str(prompt_file), batch_size=8), Device("cpu", 2**34, None, None, None)

    def plan(**options):
        module = make_module(**GROUPS | options)
        options = {"device": device, "processes": 1, "strategy": "auto", "half": False, "recompute": False}
        return make_plan(setting_of(module, data, **options), may_checkpoint=False)

    assert [role.name for role in plan().setting.roles] == ["actor", "reference"]
    assert [role.name for role in plan(reference_kl=None).setting.roles] == ["actor"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kl": AdaptiveKL()}, r"^model\.kl: AdaptiveKL follows the KL to the reference.*use FixedKL"),
        ({"reference": "other"}, r"^model\.reference names a model, but model\.reference_kl is null.*remove one$"),
    ],
)
def test_settings_that_need_a_reference_are_refused(make_module, options, message):
    with pytest.raises(UserError, match=message):
        make_module(reference_kl=None, **options)


def test_the_guard_of_the_kl_is_refused(make_module, fit):
    with pytest.raises(UserError, match=r"^KLGuard needs the KL to the reference, but model\.reference_kl is null"):
        fit(make_module(reference_kl=None, iterations=1), [KLGuard()])
