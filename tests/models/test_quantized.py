"""Adapters on a quantized base; the packages that quantize are not needed by lit-rlhf, so most tests may be skipped."""

import json
from importlib.util import find_spec

import pytest
import torch
from peft.utils.integrations import dequantize_module_weight
from safetensors.torch import load_file

from lit_rlhf import (
    DPO,
    SFT,
    Demonstrations,
    IterationCheckpoint,
    LoRA,
    MonteCarlo,
    RewardModeling,
    UserError,
)
from lit_rlhf.compat import select_adapters
from lit_rlhf.export import export
from lit_rlhf.generation.vllm_adapters import check_adapter
from lit_rlhf.models import adapted, quantization
from lit_rlhf.models.actor import Actor
from lit_rlhf.models.adapted import load_adapted
from lit_rlhf.models.adapters import AdapterView, adapted_layers, adapter_parameters
from lit_rlhf.models.loading import RandomWeights, load_model
from lit_rlhf.models.precision import store_in_bfloat16
from lit_rlhf.models.quantization import PACKAGES, is_quantized, quantization_config
from lit_rlhf.models.weights import UnreadWeights
from lit_rlhf.modules import Update
from lit_rlhf.modules.roles import load_actor
from lit_rlhf.testing import Recorder

SHAPE = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
TOKENS = torch.tensor([[2, 6, 7, 8, 9, 10], [2, 11, 12, 13, 1, 0]])
MASK = torch.tensor([[False] * 2 + [True] * 4, [False] * 2 + [True] * 3 + [False]])


def needs(kind):
    package = PACKAGES[kind]
    return pytest.param(kind, marks=pytest.mark.skipif(find_spec(package) is None, reason=f"{package} is missing"))


each_kind = pytest.mark.parametrize("kind", [needs("nf4"), needs("int8")])
with_nf4 = pytest.mark.parametrize("kind", [needs("nf4")])


@pytest.fixture(scope="module")
def base(tiny_model, tmp_path_factory):
    """Return a Llama whose layers have multiples of 64 inputs, as bitsandbytes needs them on a CPU."""
    folder = tmp_path_factory.mktemp("base")
    config = {"model_type": "llama", "num_key_value_heads": 2, "initializer_range": 0.2, **SHAPE}
    model = load_model(RandomWeights(config=config, tokenizer=str(tiny_model("llama"))))
    model.save_pretrained(folder)
    for file in tiny_model("llama").glob("*token*"):
        (folder / file.name).write_bytes(file.read_bytes())
    return str(folder)


def actor_of(source, kind, spread=0.0, **options):
    """Return an actor whose adapter has random weights of this standard deviation."""
    model = load_adapted(source, LoRA(rank=2, quantization=kind, **options), "model.actor", trained=["actor"])
    generator = torch.Generator().manual_seed(0)
    for parameter in adapter_parameters(model, "actor").values():
        parameter.data += spread * torch.randn(parameter.shape, generator=generator)
    return Actor(model, adapter="actor")


def dequantized(actor, source):
    """Return the same actor with plain weights."""
    plain = actor_of(source, None)
    layers = dict(actor.model.named_modules())
    for name, layer in plain.model.named_modules():
        if is_quantized(layers[name]):
            layer.weight.data = dequantize_module_weight(layers[name]).detach().float()
    for name, parameter in adapter_parameters(plain.model, "actor").items():
        parameter.data.copy_(adapter_parameters(actor.model, "actor")[name].detach())
    return plain


def stored(model):
    """Return the tensors of the frozen weights: their numbers in 4 or 8 bits, and the scales."""
    parts = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if ".lora_" not in name:
            inner = tensor.__tensor_flatten__()[0] if type(tensor).__module__.startswith("torchao") else ()
            parts |= {f"{name}.{part}": getattr(tensor, part).clone() for part in inner}
            if not inner:
                parts[name] = tensor.detach().clone()
    return parts


# what is computed


@each_kind
def test_outputs_and_gradients_are_those_of_the_dequantized_weights(base, kind):
    actor = actor_of(base, kind, spread=0.05)
    plain = dequantized(actor, base)
    outputs, gradients = [], []
    for one in (actor, plain):
        parameters = list(adapter_parameters(one.model, "actor").values())
        outputs.append(one(TOKENS, MASK).logprobs)
        gradients.append(torch.cat([g.flatten() for g in torch.autograd.grad(outputs[-1].sum(), parameters)]))
    torch.testing.assert_close(*outputs, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(*gradients, atol=1e-4, rtol=1e-3)
    with torch.no_grad():
        assert torch.equal(actor(TOKENS, MASK).logprobs, outputs[0].detach())
        alone = actor(TOKENS[:1], MASK[:1]).logprobs
    torch.testing.assert_close(alone, outputs[0][:1].detach(), atol=1e-6, rtol=0)  # no matter what else is in the batch


@each_kind
def test_quantized_weights_differ_by_their_rounding(base, kind):
    """A normal variable in blocks of 64 loses 9 % of its norm in NF4, and 0.6 % with 255 values for each row."""
    error, bounds = [], {"nf4": (0.08, 0.11), "int8": (0.003, 0.01)}[kind]
    layers = dict(actor_of(base, None).model.named_modules())
    model = actor_of(base, kind).model
    for name, layer in model.named_modules():
        if is_quantized(layer):
            weight = layers[name].weight
            error.append(float((dequantize_module_weight(layer) - weight).norm() / weight.norm()))
    assert len(error) == 14
    assert bounds[0] < min(error) <= max(error) < bounds[1]
    assert not is_quantized(model.lm_head)
    assert model.lm_head.weight.dtype == model.get_input_embeddings().weight.dtype == torch.float32


@each_kind
def test_bfloat16(base, kind):
    """Under bf16-mixed, products are in bfloat16 and the quantized weights stay as they are."""
    actor = actor_of(base, kind, spread=0.05)
    plain, before = dequantized(actor, base), stored(actor.model)
    with torch.no_grad():
        exact = actor(TOKENS, MASK).logprobs
        store_in_bfloat16(actor, all_weights=False)
        store_in_bfloat16(plain, all_weights=False)
        with torch.autocast("cpu", torch.bfloat16):
            outputs = [one(TOKENS, MASK).logprobs for one in (actor, plain)]
    after = stored(actor.model)
    assert all(torch.equal(after[name], value) for name, value in before.items() if "lm_head" not in name)
    rounding = (outputs[1] - exact).abs().max()
    assert (outputs[0] - outputs[1]).abs().max() < 1.5 * rounding


@each_kind
def test_the_backward_pass_keeps_no_dequantized_weights(base, kind):
    actor, sizes = actor_of(base, kind), []
    largest = max(layer.in_features * layer.out_features for layer in adapted_layers(actor.model))
    with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel() * x.is_floating_point()) or x, id):
        actor.model.base_model(input_ids=TOKENS[:1, :2], use_cache=False)
    assert max(sizes) < largest


@each_kind
def test_a_quantized_model_is_moved(base, kind):
    actor = actor_of(base, kind)
    with torch.no_grad():
        before = actor(TOKENS, MASK).logprobs
        UnreadWeights().read(actor, torch.device("cpu"))
        assert torch.equal(actor(TOKENS, MASK).logprobs, before)


# training


@each_kind
def test_ppo(base, kind, make_module, fit, tmp_path):
    """The roles start as one, only the adapters learn and are saved, and a resumed run ends with the same bits."""
    update = Update(epochs=1, minibatches=1, max_tokens=64)
    make = lambda: make_module(actor=base, adapter=LoRA(rank=4, quantization=kind), update=update)  # noqa: E731
    recorder, before = Recorder(), stored(actor_of(base, kind).model)
    module = make()
    checkpoint = IterationCheckpoint(every_n=1, keep_every_n=1)
    fit(module, [recorder, checkpoint], limit_train_batches=2)
    assert abs(recorder.metrics[0]["objective/kl_to_ref"]) < 1e-5
    for metrics in recorder.metrics:
        assert abs(metrics["policy/ratio_max"] - 1) < 1e-5
    assert recorder.metrics[1]["objective/kl_to_ref"] > 1e-4
    after = stored(module.actor.model)
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    for name in ("actor", "critic"):
        parameters = adapter_parameters(module.actor.model, name)
        assert all(float(p.detach().abs().sum()) > 0 for key, p in parameters.items() if "lora_B" in key)
    folder = tmp_path / "checkpoints"
    state = torch.load(folder / "last.ckpt")["state_dict"]
    assert {key for key in state if ".lora_" not in key} == {"critic.head.weight", "critic.head.bias"} | {
        key for key, _ in module.named_buffers() if key in state
    }
    resumed = Recorder()
    fit(make(), [resumed], limit_train_batches=2, ckpt_path=folder / "iteration-000001.ckpt")
    assert resumed.weights.keys() == recorder.weights.keys()
    assert all(torch.equal(resumed.weights[name], value) for name, value in recorder.weights.items())


@each_kind
def test_reference_is_the_quantized_base(base, kind):
    actor, plain = actor_of(base, kind, spread=0.05), Actor(load_model(base))
    reference = Actor(AdapterView(actor, ()))
    with torch.no_grad():
        ours, whole = (one(TOKENS, MASK).logprobs[MASK] for one in (reference, plain))
        select_adapters(adapted_layers(actor.model), ["actor"])
    difference = float((ours - whole).abs().mean())
    assert {"nf4": 0.02, "int8": 0.001}[kind] < difference < {"nf4": 0.6, "int8": 0.06}[kind]


@each_kind
def test_supervised_and_reward_training(base, kind, make_trainer, fit_preferences, tmp_path):
    lora = LoRA(rank=2, quantization=kind)
    records = [{"prompt": "w1", "responses": [" w2 w3", " w4"]}] * 8
    for module in (RewardModeling(reward=base, adapter=lora), DPO(actor=base, adapter=lora)):
        recorder = Recorder()
        fit_preferences(module, records, callbacks=[recorder], max_epochs=2)
        assert any(float(weight.abs().max()) > 0 for name, weight in recorder.weights.items() if "lora_B" in name)
    (tmp_path / "texts.jsonl").write_text('{"text": "w1 w2 w3"}\n' * 8)
    module, recorder = SFT(actor=base, adapter=lora), Recorder()
    data = Demonstrations(str(tmp_path / "texts.jsonl"), batch_size=8)
    make_trainer([recorder], max_epochs=2).fit(module, datamodule=data)
    assert recorder.metrics[1]["train/loss"] < recorder.metrics[0]["train/loss"]


# folders


@each_kind
def test_export(base, kind, make_module, fit, tmp_path):
    """The adapter's folder has no trace of the quantization, and is merged into the weights of the base's files."""
    module = make_module(
        actor=base,
        adapter=LoRA(rank=4, quantization=kind),
        actor_optimizer=lambda p: torch.optim.AdamW(p, lr=1e-2),
    )
    fit(module, [IterationCheckpoint(every_n=1)], limit_train_batches=1)
    config = {
        "class_path": "PolicyGradient",
        "init_args": {"actor": base, "critic": "actor", "adapter": {"rank": 4, "quantization": kind}},
    }
    (tmp_path / "config.yaml").write_text(json.dumps({"model": config}))
    folder, whole = export(tmp_path, out=tmp_path / "adapter"), export(tmp_path, out=tmp_path / "whole", merge=True)
    adapter = load_file(folder / "adapter_model.safetensors")
    assert len(adapter) == 2 * 14
    assert all(".lora_" in name for name in adapter)
    merged, original = load_file(whole / "model.safetensors"), load_model(base).state_dict()
    name = "model.layers.0.self_attn.q_proj"
    down, up = (adapter[f"base_model.model.{name}.lora_{part}.weight"] for part in "AB")
    expected = original[f"{name}.weight"] + 32.0 / 4 * up @ down
    torch.testing.assert_close(merged[f"{name}.weight"], expected)
    assert torch.equal(merged["model.norm.weight"], original["model.norm.weight"])


@each_kind
def test_a_folder_that_is_quantized_already(base, kind, tmp_path):
    from transformers import AutoModelForCausalLM

    saved = AutoModelForCausalLM.from_pretrained(
        base, dtype=torch.float32, quantization_config=quantization_config(kind), device_map={"": "cpu"}
    )
    saved.save_pretrained(tmp_path)
    with torch.no_grad():
        outputs = [actor_of(*given)(TOKENS, MASK).logprobs for given in ((base, kind), (str(tmp_path), None))]
    torch.testing.assert_close(*outputs, atol=1e-5, rtol=0)
    with pytest.raises(UserError, match=f"model.adapter.quantization is {kind}, but .* is quantized already"):
        actor_of(str(tmp_path), kind)
    with pytest.raises(UserError, match=r"model.actor: quantized weights cannot be trained; train an adapter"):
        load_actor(str(tmp_path), temperature=1.0)


# what is refused


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_missing_package(base, kind, make_module, fit, monkeypatch):
    """The run ends before anything is loaded."""
    monkeypatch.setattr(quantization, "find_spec", lambda name: None)
    monkeypatch.setattr(adapted, "load_model", None)
    with pytest.raises(UserError, match=f"{kind} needs {PACKAGES[kind]}, which is not installed: pip install"):
        fit(make_module(actor=base, adapter=LoRA(quantization=kind)))


def test_nothing_is_merged_into_quantized_weights():
    with pytest.raises(UserError, match=r"chained must be stacked if quantization is set, not merged"):
        LoRA(quantization="nf4", chained="merged")


@with_nf4
def test_shapes_that_bitsandbytes_gets_wrong_on_a_cpu(tiny_model, kind):
    with pytest.raises(UserError, match=r"multiple of 64, but .*q_proj has 32 inputs"):
        actor_of(str(tiny_model("llama")), kind)


@with_nf4
def test_layers_that_round_their_input(base, kind, tmp_path):
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    eight = BitsAndBytesConfig(load_in_8bit=True)
    AutoModelForCausalLM.from_pretrained(base, quantization_config=eight).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"model.actor: bitsandbytes' 8-bit layers round their input"):
        actor_of(str(tmp_path), None)


@each_kind
def test_sharding(base, kind, make_module, fit, one_process):
    module = make_module(actor=base, adapter=LoRA(quantization=kind))
    with pytest.raises(UserError, match=r"trainer.strategy must be ddp for quantized weights"):
        fit(module, strategy="fsdp2", devices=1, inference_mode=False)


@each_kind
def test_ddp(base, kind, make_module, fit, one_process):
    recorder = Recorder()
    module = make_module(actor=base, adapter=LoRA(rank=2, quantization=kind), critic=None, advantages=MonteCarlo())
    fit(module, [recorder], strategy="ddp", devices=1, limit_train_batches=1)
    assert any(float(weight.abs().max()) > 0 for name, weight in recorder.weights.items() if "lora_B" in name)


@each_kind
def test_vllm(base, kind):
    with pytest.raises(UserError, match=r"VLLMEngine does not take quantized weights"):
        check_adapter(LoRA(quantization=kind), base)
