"""The engine samples from the actor with its adapters, and from the reference without them."""

import pytest
import torch

from lit_rlhf.generation import NativeEngine, Sampling
from lit_rlhf.generation.engine import find_special_tokens
from lit_rlhf.generation.packing import packed_weights
from lit_rlhf.models.actor import Actor
from lit_rlhf.models.adapted import load_adapted
from lit_rlhf.models.adapters import AdapterView, LoRA, adapted_layers, adapter_parameters, whole_model
from lit_rlhf.models.loading import load_model, load_tokenizer
from lit_rlhf.models.precision import store_in_bfloat16
from lit_rlhf.randomness import Stream
from lit_rlhf.types import PromptBatch

TOKENS = torch.tensor([[0, 0, 2, 6, 7], [2, 8, 9, 10, 11], [0, 2, 12, 13, 14]])


@pytest.fixture(autouse=True)
def seed(monkeypatch):
    monkeypatch.setenv("PL_GLOBAL_SEED", "7")


def adapted(folder, size=0.1, **options):
    """Return an actor with a random adapter, and its reference."""
    lora = LoRA(rank=4, alpha=32.0, **options)
    model = load_adapted(str(folder), lora, "model.actor", trained=["actor", "critic"])
    torch.manual_seed(1)
    for adapter in ("actor", "critic"):
        for name, parameter in adapter_parameters(model, adapter).items():
            if "lora_B" in name:
                parameter.data.normal_(std=size)
    actor = Actor(model, adapter="actor")
    return actor, Actor(AdapterView(actor, []))


def generate(actor, folder, engine=NativeEngine(), max_tokens=16):
    prompts = PromptBatch(tokens=TOKENS, mask=TOKENS > 0, group=torch.arange(3), prompts=["a", "b", "c"], columns={})
    special = find_special_tokens(actor, load_tokenizer(str(folder)), ())
    sampling = Sampling(max_tokens=max_tokens, responses=4)
    return engine.generate(actor, prompts, sampling, special, stream=Stream.ROLLOUT, iteration=0)


def own(actor, rollout):
    with torch.no_grad():
        return rollout.at_responses(actor(rollout.tokens, rollout.response_tokens_mask).logprobs)


@pytest.mark.parametrize(
    ("architecture", "options"),
    [("llama", {}), ("llama", {"dora": True}), ("llama", {"target_modules": ["q_proj"]}), ("gpt2", {}), ("qwen2", {})],
)
def test_packed_decoding_samples_the_same(tiny_model, monkeypatch, architecture, options):
    folder = tiny_model(architecture)
    actor, reference = adapted(folder, **options)
    packed, base = generate(actor, folder), generate(reference, folder)
    with monkeypatch.context() as patch:
        patch.setattr("lit_rlhf.generation.packing._can_be_packed", lambda weight: False)
        plain = generate(actor, folder)
    assert torch.equal(packed.tokens, plain.tokens)
    torch.testing.assert_close(packed.rollout_logprobs, plain.rollout_logprobs, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(packed.rollout_logprobs, own(actor, packed), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(base.rollout_logprobs, own(reference, base), atol=1e-5, rtol=1e-5)
    alone = generate(Actor(load_model(str(folder))), folder)
    assert torch.equal(base.tokens, alone.tokens)
    torch.testing.assert_close(base.rollout_logprobs, alone.rollout_logprobs, atol=1e-5, rtol=1e-5)
    assert not torch.equal(packed.tokens[:, :12], base.tokens[:, :12])


def test_the_layers_are_restored(tiny_model):
    actor, reference = adapted(tiny_model())
    before = {name: weight.clone() for name, weight in actor.model.state_dict().items()}
    for view in (actor, reference):
        with pytest.raises(RuntimeError, match="on the way"), packed_weights(view.model, 4):
            raise RuntimeError("on the way")
    assert all(torch.equal(before[name], weight) for name, weight in actor.model.state_dict().items())
    assert not any("forward" in vars(module) for module in actor.model.modules())
    assert {tuple(layer.active_adapters) for layer in adapted_layers(actor.model)} == {("actor",)}
    assert not any(layer.merged or layer.disable_adapters for layer in adapted_layers(actor.model))


def test_half_precision_keeps_a_small_adapter(tiny_model):
    """The change by the adapter is as in float32, although it is of the size of the rounding of the base's weights."""
    folder, size = tiny_model(), 1e-3
    actor, reference = adapted(folder, size)
    store_in_bfloat16(actor.model, all_weights=False)
    with torch.autocast("cpu", torch.bfloat16):
        rollout = generate(actor, folder)
        mine, theirs = own(actor, rollout), own(reference, rollout)
    mask = rollout.response_mask
    change = (own(adapted(folder, size)[0], rollout) - own(Actor(load_model(str(folder))), rollout))[mask]
    found = (rollout.rollout_logprobs - theirs)[mask]
    assert torch.corrcoef(torch.stack([found, change]))[0, 1] > 0.8
    assert (rollout.rollout_logprobs - mine)[mask].abs().mean() < 0.6 * found.abs().mean()


@pytest.mark.parametrize("half", [False, True])
def test_a_step_of_fixed_shape_selects_the_adapters(tiny_model, monkeypatch, half):
    """A compiled step is of fixed shape; in half precision, the weights are cast once, also those of a view's base."""
    dtypes = set()

    def step(actor, *args):
        dtypes.add(whole_model(actor.model).model.layers[0].self_attn.q_proj.get_base_layer().weight.dtype)
        return Actor.next_logits(actor, *args)

    monkeypatch.setattr("lit_rlhf.generation.static._compiled_next_logits", lambda: step)
    for model in adapted(tiny_model()):
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            plain, static = (generate(model, tiny_model(), NativeEngine(compile=c)) for c in (False, True))
        assert torch.equal(static.tokens, plain.tokens)
        close = {"atol": 0.1, "rtol": 0.1} if half else {"atol": 1e-5, "rtol": 1e-5}
        torch.testing.assert_close(static.rollout_logprobs, plain.rollout_logprobs, **close)
    assert dtypes == {torch.bfloat16 if half else torch.float32}
