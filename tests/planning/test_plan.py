import json
from dataclasses import replace
from functools import cache

import pytest
import torch
from transformers import AutoConfig

from lit_rlhf.algorithms.advantages import MonteCarlo
from lit_rlhf.data import Demonstrations, Preferences, Prompts
from lit_rlhf.errors import UserError
from lit_rlhf.generation import NativeEngine, Sampling
from lit_rlhf.models.adapters import LoRA
from lit_rlhf.models.loading import RandomWeights
from lit_rlhf.modules import DPO, SFT, TRPO, PolicyGradient
from lit_rlhf.planning.dry_run import Outputs, Shape, footprint
from lit_rlhf.planning.hardware import GB, Device, find_gpu, this_cpu
from lit_rlhf.planning.memory import cache_size, host_bytes, phases
from lit_rlhf.planning.plan import RESERVED, available, make_plan
from lit_rlhf.planning.report import summary
from lit_rlhf.planning.roles import without_weights
from lit_rlhf.planning.setting import setting_of
from lit_rlhf.planning.speed import forward_flops, training_flops, work
from lit_rlhf.rewards import RewardModel

QWEN = {"model_type": "qwen2", "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True}
QWEN_05B = QWEN | {
    "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14,
}  # fmt: skip
QWEN_15B = QWEN | {
    "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12,
}  # fmt: skip
LLAMA_8B = {
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
}  # fmt: skip
LOGPROBS = Outputs(logprobs=True, values=False)


@pytest.fixture(scope="module")
def ppo(tiny_model):
    """Return a function that makes the setting of PPO with four models of a shape; by default on one H100."""

    @cache
    def on_one(shape):
        source = RandomWeights(config=dict(shape), tokenizer=str(tiny_model()))
        module = PolicyGradient(actor=source, rewards=[RewardModel(source)], sampling=Sampling(max_tokens=160))
        return setting_of(
            module, Prompts(batch_size=64), device=find_gpu("h100"), processes=1,
            strategy="auto", half=True, recompute=False,
        )  # fmt: skip

    def make(shape, processes=1, **changes):
        setting = on_one(tuple(shape.items()))
        return replace(setting, processes=processes, rows=setting.rows * processes, **changes)

    return make


def with_engine(setting, engine):
    options = {"cache_tokens": engine.cache_tokens, "compiled": engine.compile}
    return replace(setting, generation=replace(setting.generation, **options))


def gb(plan):
    return {phase.name: phase.bytes / GB for phase in plan.phases}


def test_half_a_billion_on_one_gpu(ppo):
    """Actor and critic in float32 with gradients and Adam; the linear layers of the others in bfloat16."""
    plan = make_plan(ppo(QWEN_05B))
    parameters, embedding = 494_032_768, 151936 * 896
    resident = 2 * 16 * parameters + 2 * (2 * (parameters - embedding) + 4 * embedding)
    assert plan.fits
    assert not plan.checkpointing_added
    assert [role.parameters for role in plan.setting.roles] == pytest.approx([parameters] * 4, abs=897)
    update = plan.phases[-1]
    assert sum(part.bytes for part in update.parts[:3]) == pytest.approx(resident, rel=1e-3)
    assert update.parts[-2].bytes == pytest.approx(8192 * 24 * (21 * 896 + 8 * 4864) * 1.35, rel=0.2)


def test_one_and_a_half_billion_fit_one_gpu_with_checkpointing(ppo):
    plan = make_plan(ppo(QWEN_15B))
    assert plan.fits
    assert plan.checkpointing_added
    assert gb(plan)["update"] == pytest.approx(62, abs=3)
    assert "which fit turns on" in summary(plan)[1]
    refused = make_plan(ppo(QWEN_15B), may_checkpoint=False)
    assert refused.advice.text == "--trainer.callbacks+=ActivationCheckpointing"
    assert refused.advice.suffices
    assert gb(refused)["update"] > 85


def test_eight_billion_fit_eight_gpus(ppo):
    plan = make_plan(ppo(LLAMA_8B, processes=8, spread="fsdp2"))
    assert plan.fits
    assert plan.checkpointing_added
    # bytes of each parameter and GPU: 16 of the trained and 2 of the frozen models, a whole actor of 2 to decode
    actor, critic = 8_030_261_248, 8_030_261_248 - 128256 * 4096
    parts = {part.name: part.bytes for part in plan.phases[1].parts}
    assert parts["weights"] + parts["optimizer"] == pytest.approx((14 * actor + 14 * critic) / 8, rel=1e-3)
    assert parts["gathered weights"] == 2 * actor
    assert host_bytes(plan.setting) == 4 * actor
    assert gb(plan)["update"] == pytest.approx(47, abs=5)
    assert max(gb(plan).values()) < 60


@pytest.mark.long
def test_eight_billion_on_one_gpu_need_eight(ppo):
    plan = make_plan(ppo(LLAMA_8B))
    assert not plan.fits
    assert plan.advice.text == "8 GPUs and --trainer.strategy fsdp2"
    assert "does not fit" in summary(plan)[1]


def test_copies_on_eight_gpus_should_be_shards(ppo):
    plan = make_plan(ppo(QWEN_15B, processes=8, spread="ddp", device=find_gpu("a100-40gb")))
    assert plan.advice.text == "--trainer.strategy fsdp2"
    gradients = [{part.name: part.bytes for part in phase.parts}.get("gradients") for phase in plan.phases]
    assert gradients[1] == gradients[2] == gradients[3] > 0  # DDP's buffers


def test_a_smaller_micro_batch_is_advised_if_it_suffices(ppo):
    setting = ppo(QWEN_05B, recompute=True)
    needed = phases(setting)[-1].bytes
    small = replace(setting, device=replace(setting.device, memory=needed + RESERVED - GB / 4))
    advice = make_plan(small).advice
    assert advice.text == "--model.update.max_tokens 4096"
    assert needed - 2 * GB < advice.bytes <= available(small)


def test_a_smaller_cache_is_advised_if_it_suffices(ppo):
    setting = replace(ppo(QWEN_05B), rows=16384, max_tokens=1024)
    decode = phases(setting)[1].bytes
    small = replace(setting, device=replace(setting.device, memory=decode + RESERVED - GB))
    advice = make_plan(small).advice
    assert advice.text.startswith("--model.engine.cache_tokens ")
    assert advice.suffices


def test_the_cache_has_the_rows_that_the_engine_would_give_it(ppo):
    setting = with_engine(ppo(QWEN_05B), NativeEngine(cache_tokens=10_000))
    assert cache_size(setting) == (10_000 // 850, 856)  # 512 + 160 + 8 and a quarter, a multiple of 8
    assert cache_size(ppo(QWEN_05B)) == (64, 680)


@pytest.mark.parametrize("recompute", [False, True])
def test_activations_of_a_layer(ppo, recompute):
    """In bfloat16 a Llama layer keeps about 21 H + 8 I bytes of each token; with recomputation, 2 H."""
    model = ppo(LLAMA_8B).roles[0].model
    shape = Shape(rows=4, length=512, scored=160, half=True, gpu=True)
    kept = footprint(model, LOGPROBS, shape, rounding="all", gradients="shards", recompute=recompute).layer
    expected = 2 * 4096 if recompute else 21 * 4096 + 8 * 14336
    assert kept / shape.tokens == pytest.approx(expected, rel=0.06)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gpt_neox", "qwen3"])
def test_dry_runs_of_architectures(tiny_model, architecture):
    module = SFT(actor=str(tiny_model(architecture)))
    data = Demonstrations(max_tokens=32)
    setting = setting_of(
        module, data, device=find_gpu("l4"), processes=1, strategy="auto", half=True, recompute=False
    )  # fmt: skip
    assert setting.roles[0].parameters == sum(p.numel() for p in setting.roles[0].model.parameters())
    assert make_plan(setting).fits


def test_flops(ppo):
    """Forward: 2 FLOPs for each weight and token, and attention; training: 3 times as many, 4 with recomputation."""
    role = ppo(LLAMA_8B).roles[0]
    head = 128256 * 4096
    trunk = 8_030_261_248 - 2 * head - (2 * 32 + 1) * 4096  # without embedding, head and norms
    assert (role.multiplied, role.head) == (trunk, head)
    one = forward_flops(role, rows=1, length=10, scored=4)
    assert one == 10 * 2 * trunk + 32 * 2 * 4096 * 10**2 + 4 * 2 * head
    assert training_flops(role, 1, 10, 0, recompute=False) == 3 * forward_flops(role, 1, 10, 0)
    assert training_flops(role, 1, 10, 0, recompute=True) == 4 * forward_flops(role, 1, 10, 0)


def test_seconds(ppo):
    decode, judge, update = work(ppo(QWEN_05B))
    assert update.seconds == pytest.approx(update.flops / (0.4 * 989e12))
    assert decode.seconds == pytest.approx(160 * 24 * 86 * 5e-6)  # the launches of operations
    compiled = work(with_engine(ppo(QWEN_05B), NativeEngine(compile=True)))[0]
    cache = 64 * (512 + 80) * 24 * 2 * 2 * 64
    weights = 494_032_768 - 24 * (2 * 896 + 896 + 2 * 128) - 896  # without norms and biases
    assert compiled.seconds == pytest.approx(160 * 2 * (weights + cache) / (0.6 * 3.35e12), rel=1e-3)
    assert judge.seconds > 0
    unknown = replace(ppo(QWEN_05B), device=Device("unknown", 80 * GB, None, None, None))
    assert [phase.seconds for phase in work(unknown)] == [None] * 3


def test_the_prompt_of_several_responses_is_computed_once(tiny_model):
    """Eight responses of 8 tokens to a prompt of 100 need about the FLOPs of 164 tokens; one of each prompt, of 108."""
    flops = []
    for responses in (1, 8):
        sampling = Sampling(max_tokens=8, responses=responses)
        module = PolicyGradient(
            str(tiny_model()),
            [RewardModel(str(tiny_model(task="score")))],
            critic=None,
            sampling=sampling,
            advantages=MonteCarlo(),
        )
        setting = setting_of(
            module, Prompts(batch_size=16), device=find_gpu("h100"), processes=1, strategy="auto", half=True,
            recompute=False, prompt_tokens=100,
        )  # fmt: skip
        flops.append([phase.flops for phase in work(setting)[1:]])
    ratios = [several / one for one, several in zip(*flops, strict=True)]
    assert len(ratios) == 2
    assert all(1.4 < ratio < 2 for ratio in ratios)


def test_a_host_reads_shards_under_fsdp2_and_whole_models_otherwise(ppo):
    whole = 4 * 8_030_261_248
    assert host_bytes(ppo(LLAMA_8B, processes=8, spread="fsdp2")) == pytest.approx(whole, rel=1e-3)
    assert host_bytes(ppo(LLAMA_8B, processes=8, spread="fsdp")) == pytest.approx(8 * whole, rel=1e-3)


def test_a_plan_without_any_change_left_to_try(ppo):
    """The models alone need more than the CPU has, and there is nothing to turn down."""
    setting = ppo(LLAMA_8B, device=Device("cpu", 16e9, None, None, None), half=True)
    setting = replace(
        setting, roles=setting.roles[:1], judged=("actor",), generation=None, max_tokens=1, recompute=True
    )
    plan = make_plan(setting)
    assert not plan.fits
    assert plan.advice.text


def test_the_reference_of_dpo_computes_with_and_without_a_cache(tiny_model):
    flops = {}
    for cached in (True, False):
        module = DPO(actor=str(tiny_model()), cache_reference=cached)
        setting = setting_of(
            module, Preferences(batch_size=4), device=find_gpu("h100"), processes=1, strategy="auto", half=True,
            recompute=False,
        )  # fmt: skip
        flops[cached] = sum(part.flops for part in work(setting))
    assert flops[True] == flops[False]


def test_what_cannot_be_run_without_weights_is_refused(tiny_model):
    """The experts of a token depend on its values."""
    shape = {"model_type": "mixtral", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2,
             "num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 4}  # fmt: skip
    source = RandomWeights(config=shape, tokenizer=str(tiny_model()))
    setting = setting_of(
        SFT(actor=source), Demonstrations(), device=find_gpu("h100"), processes=1, strategy="auto", half=True,
        recompute=False,
    )  # fmt: skip
    with pytest.raises(UserError, match=r"plan: Mixtral.* cannot be run without weights"):
        make_plan(setting)


def test_what_cannot_be_planned(tiny_model):
    options = {"device": find_gpu("h100"), "processes": 2, "half": True, "recompute": False}
    source = str(tiny_model())
    trpo = TRPO(actor=source, rewards=[RewardModel(source)])
    with pytest.raises(UserError, match="plan: TRPO"):
        setting_of(trpo, Prompts(), strategy="ddp", **options)
    with pytest.raises(UserError, match="'deepspeed' cannot be planned; use ddp or fsdp2"):
        setting_of(SFT(actor=source), Demonstrations(), strategy="deepspeed", **options)
    with pytest.raises(UserError, match="SFT can be planned with Demonstrations, not with list"):
        setting_of(SFT(actor=source), [], strategy="ddp", **options)
    with pytest.raises(UserError, match="'b200' is not in the table; it has h200, h100"):
        find_gpu("b200")


def test_optimizers_differ(tiny_model):
    def resident(optimizer):
        module = SFT(actor=str(tiny_model()), optimizer=optimizer)
        options = {"device": find_gpu("l4"), "processes": 1, "strategy": "auto", "half": False, "recompute": False}
        return phases(setting_of(module, Demonstrations(), **options))[-1].parts[1].bytes

    adamw, sgd = resident(torch.optim.AdamW), resident(torch.optim.SGD)
    momentum = resident(lambda p: torch.optim.SGD(p, momentum=0.9))
    assert adamw == 2 * momentum > 0 == sgd


def test_the_rates_of_this_cpu():
    cpu = this_cpu()
    assert 2e9 < cpu.memory < 1e14
    assert 1e9 < cpu.single < 1e15
    assert 1e8 < cpu.bandwidth < 1e13


def write_shape(folder, shape, tokenizer):
    """Write a model folder without weights, and one of an adapter without weights; a plan reads neither."""
    LoRA(rank=16).config(without_weights(RandomWeights(shape, tokenizer), "", LOGPROBS)).save_pretrained(
        folder / "reward"
    )
    config = json.loads((folder / "reward/adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(folder / "base")
    (folder / "reward/adapter_config.json").write_text(json.dumps(config))
    AutoConfig.for_model(**shape).save_pretrained(folder / "base")
    return str(folder / "base"), str(folder / "reward")


@pytest.mark.long
def test_eight_billion_with_adapters_fit_one_gpu(tiny_model, tmp_path):
    """One base in bfloat16, and for each trained role 16 bytes of each of the adapter's parameters."""
    base, reward = write_shape(tmp_path, LLAMA_8B, str(tiny_model()))
    options = {"adapter": LoRA(rank=16), "rewards": [RewardModel(reward)], "sampling": Sampling(max_tokens=160)}
    setting = setting_of(
        PolicyGradient(actor=base, critic="reward", **options), Prompts(batch_size=64), device=find_gpu("h100"),
        processes=1, strategy="auto", half=True, recompute=False,
    )  # fmt: skip
    plan = make_plan(setting)
    assert plan.fits
    embedding, adapter = 128256 * 4096, 41_943_040  # rank 16 on all linear layers
    assert {role.name: role.parameters for role in setting.models} == {
        "base": 8_030_261_248, "actor": adapter, "critic": adapter + 4097, "reference": 0, "reward": adapter + 4097,
    }  # fmt: skip
    parts = {part.name: part.bytes for part in plan.phases[-1].parts}
    weights = 2 * (8_030_261_248 - embedding) + 2 * embedding + 3 * 4 * adapter
    assert parts["weights"] == pytest.approx(weights + 2 * embedding, rel=1e-3)  # the embedding stays in float32
    assert (parts["optimizer"], parts["gradients"]) == pytest.approx((2 * 8 * adapter, 2 * 4 * adapter), rel=1e-3)


def test_adapters_on_random_weights_can_be_planned(tiny_model):
    source = RandomWeights(config=QWEN_05B, tokenizer=str(tiny_model()))
    options = {"device": find_gpu("h100"), "processes": 1, "strategy": "auto", "half": True, "recompute": False}
    module = PolicyGradient(
        actor=source, rewards=[RewardModel(source)], adapter=LoRA(), sampling=Sampling(max_tokens=160)
    )
    setting = setting_of(module, Prompts(batch_size=64), **options)
    names = ["base", "actor", "critic", "reference", "reward"]
    assert [role.name for role in setting.models] == names
    assert setting.role("reward").parameters > 4e8  # a whole model beside the base
    assert make_plan(setting).fits


def test_flops_on_a_frozen_base(tiny_model):
    """The backward pass computes no gradients of the base's weights."""
    flops = {}
    for adapter in (None, LoRA(rank=1)):
        module = SFT(actor=RandomWeights(config=QWEN_05B, tokenizer=str(tiny_model())), adapter=adapter)
        setting = setting_of(
            module, Demonstrations(), device=find_gpu("h100"), processes=1, strategy="auto", half=True, recompute=False
        )
        flops[adapter] = training_flops(setting.roles[0], 1, 64, 0, recompute=False)
    assert flops[LoRA(rank=1)] / flops[None] == pytest.approx(2 / 3, rel=0.01)
