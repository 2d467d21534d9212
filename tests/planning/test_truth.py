"""Plans against real trainings on a CPU: what the allocator gives out in each phase."""

import gc
import json
from bisect import bisect_left, bisect_right

import lightning
import pytest
import torch
from torch.profiler import ProfilerActivity, profile, record_function

from lit_rlhf import Averaging
from lit_rlhf.algorithms.group_baselines import GroupNormalized
from lit_rlhf.data import Demonstrations, Preferences, Prompts
from lit_rlhf.generation import Sampling
from lit_rlhf.models.adapted import load_adapted_reward_model
from lit_rlhf.models.adapters import LoRA
from lit_rlhf.models.loading import RandomWeights, load_model, load_tokenizer
from lit_rlhf.models.trained_adapter import TrainedAdapter
from lit_rlhf.modules import DPO, SFT, PolicyGradient, RewardModeling, Update
from lit_rlhf.planning.hardware import GB, Device
from lit_rlhf.planning.memory import held, phases
from lit_rlhf.planning.setting import setting_of
from lit_rlhf.rewards import RewardModel

TEXT = " ".join(f"w{i % 32}" for i in range(40))
CPU = Device("cpu", 24 * GB, None, None, None)
METHODS = ["ppo", "shared critic", "grpo", "dpo", "reward", "sft"]
ADAPTED = ["adapted ppo", "adapted sft"]
SHORT = ["ppo", "adapted sft"]


def adamw(parameters):
    return torch.optim.AdamW(parameters, lr=1e-4, fused=True)


def write(folder, record):
    path = folder / "records.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for _ in range(16)))
    return str(path)


def make(method, source, folder, rows):
    """Return a module and its data: two iterations, with as many rows of about 45 tokens in two micro-batches."""
    adapter = LoRA(rank=8) if method in ADAPTED else None
    method = method.removeprefix("adapted ")
    if method == "sft":
        data = Demonstrations(train=write(folder, {"text": TEXT}), batch_size=rows, max_tokens=42)
        options = {"optimizer": adamw, "iterations": 2, "adapter": adapter}
        return SFT(actor=source, max_tokens=42 * rows // 2, **options), data
    if method in ("dpo", "reward"):
        pair = {"prompt": "w1", "chosen": TEXT, "rejected": TEXT + " w2"}
        data = Preferences(train=write(folder, pair), batch_size=rows // 2, max_tokens=43)
        options = {"max_tokens": 43 * rows // 2, "optimizer": adamw, "iterations": 2}
        return DPO(actor=source, **options) if method == "dpo" else RewardModeling(reward=source, **options), data
    others = {
        "ppo": {},
        "shared critic": {"critic": "shared"},
        "grpo": {"critic": None, "advantages": GroupNormalized(), "averaging": Averaging()},
    }[method]
    responses = 2 if method == "grpo" else 1
    module = PolicyGradient(
        actor=source,
        rewards=[RewardModel(source if adapter is None else reward_adapter(source, folder))],
        sampling=Sampling(max_tokens=8, min_tokens=8, responses=responses),
        update=Update(epochs=1, minibatches=1, max_tokens=49 * rows // 2),
        iterations=2,
        actor_optimizer=adamw,
        critic_optimizer=adamw,
        adapter=adapter,
        **others,
    )
    return module, Prompts(train=write(folder, {"prompt": TEXT}), batch_size=rows // responses, max_tokens=41)


def written(source, folder):
    """Write a model with random weights in bfloat16, which are copied when they are read, and return its folder."""
    load_model(source).to(torch.bfloat16).save_pretrained(folder)
    load_tokenizer(source).save_pretrained(folder)
    return str(folder)


def reward_adapter(base, folder):
    """Write a reward model that is an adapter, and return its folder."""
    lora = LoRA(rank=8)
    reward = load_adapted_reward_model(base, lora, "reward")
    weights = {n.removeprefix("trunk."): x for n, x in reward.own_parameters().items() if ".lora_" in n}
    saved = TrainedAdapter(source=base, lora=lora, name="reward", weights=weights, head=reward.head)
    saved.save(load_tokenizer(base), folder / "reward", "")
    return str(folder / "reward")


class Marks(lightning.Callback):
    """Marks the phases of a fit, and counts gradients and optimizer state by their tensors."""

    def __init__(self):
        self.open = None
        self.gradients = self.state = 0

    def mark(self, name):
        if self.open is not None:
            self.open.__exit__(None, None, None)
        self.open = None if name is None else record_function(f"phase {name}")
        if self.open is not None:
            self.open.__enter__()

    def setup(self, trainer, pl_module, stage):
        pl_module.profile = lambda phase: record_function(f"phase {phase}")
        self.mark("load")

    def on_fit_start(self, trainer, pl_module):
        gc.collect()  # peft leaves a saved adapter's weights in a reference cycle
        self.mark(None)

    def on_train_start(self, trainer, pl_module):
        self.mark("judge")  # DPO's

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.mark("step")

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.gradients = sum(p.grad.nbytes for p in pl_module.parameters() if p.grad is not None)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.mark(None)
        states = [s for optimizer in trainer.optimizers for s in optimizer.state.values()]
        self.state = sum(x.nbytes for state in states for x in state.values())


def measure(module, data, make_trainer, precision):
    """Return the callback and the peak of each phase, in bytes that the allocator has given out."""
    gc.collect()
    marks = Marks()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        make_trainer([marks], max_epochs=-1, inference_mode=False, precision=precision).fit(module, datamodule=data)
    events = profiler.profiler.kineto_results.events()
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    times, live = [time for time, _ in changes], [0]
    for _, change in changes:
        live.append(live[-1] + change)
    peaks = {}
    for event in events:
        if event.name().startswith("phase "):
            first, last = (
                bisect_left(times, event.start_ns()),
                bisect_right(times, event.start_ns() + event.duration_ns()),
            )
            name = event.name().removeprefix("phase ")
            peaks[name] = max(peaks.get(name, 0), *live[first : last + 1])
            if name == "load":
                peaks["loaded"] = live[last]
    return marks, peaks


def check(method, shape, tiny_model, make_trainer, monkeypatch, folder, rows=4, precision="32-true"):
    shape = {"model_type": "llama", "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 4096} | shape
    source = RandomWeights(config=shape, tokenizer=str(tiny_model()))
    if method in ADAPTED:
        source = written(source, folder / "base")
        monkeypatch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")  # the profiler does not see the memory of other threads
    module, data = make(method, source, folder, rows)
    half = precision == "bf16-mixed"
    setting = setting_of(module, data, device=CPU, processes=1, strategy="auto", half=half, recompute=False)
    planned = {phase.name: phase.bytes for phase in phases(setting)}
    marks, peaks = measure(module, data, make_trainer, precision)
    each = [held(setting, role) for role in setting.models]
    assert sum(h.gradients for h in each) == pytest.approx(marks.gradients, rel=0.02)
    assert sum(h.optimizer for h in each) == pytest.approx(marks.state, rel=0.02)
    assert planned["load"] == pytest.approx(peaks["loaded"], rel=0.02)
    found = {"decode": "generate", "judge": "judge", "update": "update" if "update" in peaks else "step"}
    for phase in planned.keys() - {"load"}:
        print(method, phase, planned[phase] / 1e6, peaks[found[phase]] / 1e6, planned[phase] / peaks[found[phase]])
    for phase in planned.keys() - {"load"}:
        assert planned[phase] == pytest.approx(peaks[found[phase]], rel=0.02), phase


@pytest.mark.parametrize(
    "method", [name if name in SHORT else pytest.param(name, marks=pytest.mark.long) for name in METHODS + ADAPTED]
)
def test_plan_and_truth(method, tiny_model, make_trainer, monkeypatch, tmp_path):
    shape = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 10}
    check(method, shape, tiny_model, make_trainer, monkeypatch, tmp_path)


@pytest.mark.long
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "shape",
    [
        {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 9},
        {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 15, "tie_word_embeddings": True},
    ],
    ids=["30M", "100M"],
)
def test_plan_and_truth_of_larger_models(method, shape, tiny_model, make_trainer, monkeypatch, tmp_path):
    check(method, shape, tiny_model, make_trainer, monkeypatch, tmp_path, rows=16)


@pytest.mark.long
@pytest.mark.parametrize("method", METHODS + ADAPTED)
def test_plan_and_truth_in_half_precision(method, tiny_model, make_trainer, monkeypatch, tmp_path):
    shape = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 10}
    check(method, shape, tiny_model, make_trainer, monkeypatch, tmp_path, rows=8, precision="bf16-mixed")
