"""A base with adapters computes what a plain model with W + scaling · B A computes, and each role sees its own part."""

from functools import partial

import pytest
import torch

from lit_rlhf.callbacks.layers import ActivationCheckpointing, CompileLayers
from lit_rlhf.compat import select_adapters, selected_adapters
from lit_rlhf.errors import UserError
from lit_rlhf.models.actor import Actor
from lit_rlhf.models.adapted import load_adapted
from lit_rlhf.models.adapters import (
    AdaptedTrunk,
    AdapterView,
    LoRA,
    adapted_layers,
    adapter_parameters,
    merged_weight,
    selected,
    target_names,
)
from lit_rlhf.models.loading import RandomWeights, load_model
from lit_rlhf.models.scoring import ScalarModel

ARCHITECTURES = ["llama", "gpt2", "qwen2", "gpt_neox"]
TOKENS = torch.tensor([[2, 6, 7, 8, 9, 1], [2, 9, 10, 11, 0, 0]])
MASK = torch.tensor([[False, False, True, True, True, True], [False, True, True, True, False, False]])


def fill(model, *names, size=0.1, seed=0):
    """Give the adapters of these names random weights of this standard deviation, B included."""
    numbers = torch.Generator().manual_seed(seed)
    for adapter in names:
        for name, parameter in adapter_parameters(model, adapter).items():
            noise = torch.randn(parameter.shape, generator=numbers)
            parameter.data = parameter.data + noise if "magnitude" in name else size * noise


def base_weights(model):
    """Return the weight of each adapted layer as [out, in], by the layer's name, with the layer."""
    layers = {id(layer): layer for layer in adapted_layers(model)}
    found = {}
    for name, module in model.named_modules():
        if id(module) in layers:
            weight = module.get_base_layer().weight
            found[name] = (weight.T if type(module.get_base_layer()).__name__ == "Conv1D" else weight), module
    return found


def plain_twin(folder, model, names, lora):
    """Return a plain model with the adapters added to its weights by hand."""
    plain = load_model(str(folder))
    for name, (weight, layer) in base_weights(model).items():
        total = weight.detach().clone()
        for adapter in names:
            total += lora.scaling * layer.lora_B[adapter].weight.detach() @ layer.lora_A[adapter].weight.detach()
        if lora.dora:
            (adapter,) = names
            magnitude = layer.lora_magnitude_vector[adapter].weight.detach()
            total *= (magnitude.view(-1) / total.norm(dim=1))[:, None]
        own = plain.get_submodule(name).weight
        own.data = total.T.contiguous() if type(plain.get_submodule(name)).__name__ == "Conv1D" else total
    return plain


def loss_of(actor):
    """Return the outputs of an actor with a shared critic, and a loss that depends on all of them."""
    actor.value_head.weight.data = torch.linspace(-1, 1, actor.value_head.in_features)[None]
    stats = actor(TOKENS, MASK)
    weights = torch.linspace(-1, 2, MASK.numel()).view(MASK.shape) / MASK.sum()
    values = torch.where(MASK, stats.values, 0.0)
    return stats, ((stats.logprobs + 0.3 * stats.entropy + 0.2 * values**2) * weights).sum()


VARIANTS = {
    "plain": LoRA(rank=4, alpha=6.0),
    "rslora": LoRA(rank=4, alpha=6.0, rslora=True),
    "dora": LoRA(rank=4, alpha=6.0, dora=True),
    "full rank": LoRA(rank=32, alpha=16.0),
}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_an_adapted_actor_is_the_plain_model_with_other_weights(tiny_model, architecture, variant):
    """With G = ∂loss/∂W of the plain model, ∂loss/∂A = scaling · Bᵀ G and ∂loss/∂B = scaling · G Aᵀ."""
    lora, folder = VARIANTS[variant], tiny_model(architecture)
    model = load_adapted(str(folder), lora, "model.actor", trained=["actor"])
    fill(model, "actor")
    adapted, plain = Actor(model, 0.8, True, adapter="actor"), plain_twin(folder, model, ["actor"], lora)
    (stats, loss), (expected, plain_loss) = loss_of(adapted), loss_of(Actor(plain, 0.8, True))
    for found, right in zip(stats[:3], expected[:3], strict=True):
        torch.testing.assert_close(torch.where(MASK, found, 0.0), torch.where(MASK, right, 0.0), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(loss, plain_loss, atol=1e-5, rtol=1e-5)
    assert (stats.logprobs - Actor(load_model(str(folder)), 0.8)(TOKENS, MASK).logprobs).abs().max() > 0.01

    loss.backward()
    plain_loss.backward()
    assert {name for name, p in adapted.named_parameters() if p.grad is not None} == adapted.own_parameters().keys()
    for name, (weight, layer) in base_weights(model).items():
        twin = plain.get_submodule(name)
        gradient = twin.weight.grad.T if type(twin).__name__ == "Conv1D" else twin.weight.grad
        down, up = layer.lora_A["actor"].weight, layer.lora_B["actor"].weight
        if lora.dora:  # the norm counts as a constant (section 4.3)
            direction = weight + lora.scaling * up.detach() @ down.detach()
            norm, magnitude = direction.norm(dim=1), layer.lora_magnitude_vector["actor"].weight
            found = magnitude.grad.view(-1)
            torch.testing.assert_close(found, (gradient * direction).sum(1) / norm, atol=1e-5, rtol=1e-4)
            gradient = gradient * (magnitude.detach().view(-1) / norm)[:, None]
        torch.testing.assert_close(down.grad, lora.scaling * up.T @ gradient, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(up.grad, lora.scaling * gradient @ down.T, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_selected_adapters_are_added_up(tiny_model, architecture):
    """Two of three adapters are selected; the gradient of one does not flow into the other."""
    lora, folder = LoRA(rank=2, alpha=3.0), tiny_model(architecture)
    model = load_adapted(str(folder), lora, "model.actor", trained=["actor", "critic"], copies=["old"])
    fill(model, "actor", "critic", "old")
    trunk = AdaptedTrunk(Actor(model, adapter="actor"), ["old", "critic"])
    scalar = ScalarModel(trunk, torch.nn.Linear(32, 1), adapter="critic")
    twin = ScalarModel(plain_twin(folder, model, ["old", "critic"], lora).base_model, scalar.head)
    torch.testing.assert_close(scalar(TOKENS), twin(TOKENS), atol=1e-5, rtol=1e-5)
    scalar(TOKENS).sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in adapter_parameters(model, "critic").values())
    others = [p for name in ("actor", "old") for p in adapter_parameters(model, name).values()]
    assert all(p.grad is None for p in others)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dora", [False, True])
def test_a_new_adapter_changes_nothing(tiny_model, architecture, dora):
    """Bit by bit without DoRA, whose division by the norm rounds."""
    lora, folder = LoRA(rank=4, dora=dora), str(tiny_model(architecture))
    actor = Actor(load_adapted(folder, lora, "model.actor", trained=["actor"]), adapter="actor")
    reference, plain = Actor(AdapterView(actor, [])), Actor(load_model(folder))
    found, seen, right = (model(TOKENS, MASK).logprobs for model in (actor, reference, plain))
    assert torch.equal(seen, right)
    assert torch.equal(found, right) or (dora and torch.allclose(found, right, atol=1e-5))
    if not dora:
        assert actor(TOKENS, MASK, reference).full_kl.abs().max() == 0


@pytest.fixture
def owner(tiny_model):
    """Return an actor that owns a base with the trained adapters actor and critic."""
    model = load_adapted(str(tiny_model("llama")), LoRA(rank=2), "model.actor", trained=["actor", "critic"])
    fill(model, "actor", "critic")
    return Actor(model, adapter="actor")


def test_a_view_leaves_its_owner_as_it_was(owner):
    critic = ScalarModel(AdaptedTrunk(owner, ["critic"]), torch.nn.Linear(32, 1), adapter="critic")
    before, values = owner(TOKENS, MASK).logprobs, critic(TOKENS)
    assert torch.equal(owner(TOKENS, MASK).logprobs, before)
    assert torch.equal(critic(TOKENS), values)
    assert not list(AdapterView(owner, []).parameters())
    assert [name for name, _ in critic.named_parameters()] == ["head.weight", "head.bias"]
    layers = adapted_layers(owner.model)
    with selected(layers, ()):
        assert {selected_adapters(layer) for layer in layers} == {()}
    assert {selected_adapters(layer) for layer in layers} == {("actor",)}
    with pytest.raises(ValueError, match="exactly one"):
        critic.trunk(input_ids=None)
    assert torch.equal(owner(TOKENS, MASK).logprobs, before)


def test_a_merged_weight_lasts_for_the_context_alone(owner):
    layer = adapted_layers(owner.model)[0]
    before = layer.get_base_layer().weight.data.clone()
    with merged_weight(layer) as weight:
        right = before + 2 * layer.lora_B["actor"].weight @ layer.lora_A["actor"].weight
        torch.testing.assert_close(weight, right, atol=1e-6, rtol=1e-5)
    with pytest.raises(RuntimeError), merged_weight(layer):
        raise RuntimeError
    assert torch.equal(layer.get_base_layer().weight.data, before)
    assert not layer.merged


def gradients(owner, *, checkpointed):
    """Return the gradients of a loss of actor and critic, in whose backward pass the actor is selected."""
    critic = ScalarModel(AdaptedTrunk(owner, ["critic"]), torch.nn.Linear(32, 1), adapter="critic")
    for parameter in critic.head.parameters():
        torch.nn.init.constant_(parameter, 0.1)
    module = torch.nn.ModuleDict({"actor": owner, "critic": critic})
    if checkpointed:
        ActivationCheckpointing().on_fit_start(None, module)
    (owner(TOKENS, MASK).logprobs.sum() + (critic(TOKENS) ** 2).sum()).backward()
    found = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
    owner.zero_grad()
    return found


def test_recomputed_layers_use_the_adapters_of_the_forward_pass(owner, monkeypatch):
    plain = gradients(owner, checkpointed=False)
    assert len(plain) == 2 * 2 * len(adapted_layers(owner.model)) + 2
    again = gradients(owner, checkpointed=True)
    assert again.keys() == plain.keys()
    assert all(torch.equal(again[name], gradient) for name, gradient in plain.items())
    for layer in owner.model.base_model.layers:
        del layer.forward
    monkeypatch.setattr("lit_rlhf.callbacks.layers.adapted_layers", lambda layer: [])
    wrong = gradients(owner, checkpointed=True)
    assert any(name not in wrong or not torch.allclose(wrong[name], plain[name]) for name in plain if "critic" in name)


def test_compiled_layers_follow_the_selection(tiny_model, monkeypatch):
    """Each selection is a variant of the layer, and none is left uncompiled, whatever the limit was."""
    names = ["actor", *(f"reward{i}" for i in range(2))]
    lora = LoRA(rank=2, target_modules=["down_proj"])
    model = load_adapted(str(tiny_model()), lora, "model.actor", trained=names)
    fill(model, *names, size=0.5)
    owner = Actor(model, adapter="actor")
    trunks = [AdaptedTrunk(owner, name) for name in ([], *([name] for name in names))]
    tokens, graphs = TOKENS[:, :4], []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def outputs():
        found, counts = [], []
        for trunk in trunks:
            with torch.no_grad():
                found.append(trunk(input_ids=tokens).last_hidden_state)
            counts.append(len(graphs))
        return found, counts

    plain, _ = outputs()
    torch.compiler.reset()
    with monkeypatch.context() as patch, torch._dynamo.config.patch(recompile_limit=2):
        patch.setattr(torch, "compile", partial(torch.compile, backend=backend))
        CompileLayers().on_fit_start(None, owner)
        compiled, counts = outputs()
        assert counts == sorted(set(counts))  # each trunk has added a graph
        outputs()
        assert len(graphs) == counts[-1]
    for found, right in zip(compiled, plain, strict=True):
        torch.testing.assert_close(found, right, atol=1e-5, rtol=1e-5)
    model.base_model.layers[0].mlp.down_proj.lora_A["reward1"].weight.data.mul_(2)  # weights are no constants
    assert not torch.allclose(outputs()[0][-1], plain[-1])


def test_the_first_weights_depend_on_the_seed_alone(tiny_model, monkeypatch):
    def first():
        torch.manual_seed(torch.seed())
        model = load_adapted(str(tiny_model()), LoRA(rank=2), "model.actor", trained=["actor", "critic"])
        return adapter_parameters(model, "actor"), adapter_parameters(model, "critic")

    (actor, critic), (again, _) = first(), first()
    assert all(torch.equal(again[name], weight) for name, weight in actor.items())
    downs = [name for name in actor if "lora_A" in name]
    assert not any(torch.equal(actor[name], critic[name.replace("actor", "critic")]) for name in downs)
    monkeypatch.setenv("PL_GLOBAL_SEED", "8")
    other, _ = first()
    assert not any(torch.equal(other[name], actor[name]) for name in downs)


def test_only_the_trained_adapters_are_trained(tiny_model):
    lora = LoRA(rank=2, target_modules=["q_proj", "v_proj"])
    model = load_adapted(str(tiny_model()), lora, "model.actor", trained=["actor"], copies=["old"])
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert sorted(adapter_parameters(model, "actor")) == sorted(trained)
    assert len(trained) == 2 * 2 * 2  # matrices, modules, layers
    assert all(".q_proj." in name or ".v_proj." in name for name in trained)
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "model.adapter.rank must be 1 or more, not 0"),
        ({"alpha": 0}, "model.adapter.alpha must be positive, not 0"),
        ({"alpha": float("nan")}, "model.adapter.alpha must be positive, not nan"),
        ({"target_modules": []}, "model.adapter.target_modules is empty"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(UserError, match=message):
        LoRA(**options)


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("rank", [1, 4, 16])
def test_alpha_is_twice_the_rank_unless_it_is_set(tiny_model, rank, rslora):
    model = load_adapted(str(tiny_model()), LoRA(rank=rank, rslora=rslora), "model.actor", trained=["actor"])
    scaling = 2 * rank**0.5 if rslora else 2.0
    assert LoRA(rank=rank, rslora=rslora).scaling == pytest.approx(scaling)
    assert [layer.scaling["actor"] for layer in adapted_layers(model)] == pytest.approx([scaling] * 14)
    assert LoRA(rank=rank, alpha=2.0 * rank, rslora=rslora).scaling == pytest.approx(scaling)


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens", "query", "nowhere.q_proj"])
def test_layers_that_cannot_be_adapted(tiny_model, target):
    with pytest.raises(UserError, match=rf"^model\.adapter.*{target}.*") as raised:
        load_adapted(str(tiny_model()), LoRA(target_modules=["v_proj", target]), "model.actor", trained=["actor"])
    assert "\n" not in str(raised.value)


def test_random_weights_are_no_base(tiny_model):
    source = RandomWeights({"model_type": "llama"}, str(tiny_model()))
    with pytest.raises(UserError, match=r"model\.actor: an adapter needs a base with weights"):
        load_adapted(source, LoRA(), "model.actor", trained=["actor"])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_all_linear_layers_but_the_head_are_adapted(tiny_model, architecture):
    model = load_model(str(tiny_model(architecture)))
    names = {
        "llama": "down_proj gate_proj k_proj o_proj q_proj up_proj v_proj",
        "qwen2": "down_proj gate_proj k_proj o_proj q_proj up_proj v_proj",
        "gpt2": "c_attn c_fc c_proj",
        "gpt_neox": "dense dense_4h_to_h dense_h_to_4h query_key_value",
    }
    assert target_names(model, "all-linear") == names[architecture].split()
    select_adapters([], ["actor"])  # of no layers: nothing to do
