import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from lit_rlhf.compat import select_adapters
from lit_rlhf.generation import packing
from lit_rlhf.generation.packing import packed_weights
from lit_rlhf.models.actor import Actor
from lit_rlhf.models.adapted import load_adapted
from lit_rlhf.models.adapters import AdapterView, LoRA, adapted_layers, adapter_parameters, selected
from lit_rlhf.models.precision import store_in_bfloat16


@pytest.fixture(autouse=True)
def small_weights_are_packed(monkeypatch):
    monkeypatch.setattr(packing, "PACKED_ELEMENTS", 0)


@pytest.fixture
def layers():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 40), nn.GELU(), nn.Linear(40, 7, bias=False))


@pytest.mark.parametrize("packed_for", [1, 16])
@pytest.mark.parametrize("shape", [(1, 24), (2, 24), (16, 1, 24), (3, 50, 24)])
@torch.no_grad()
def test_the_products_are_the_same(layers, packed_for, shape):
    x = torch.randn(shape)
    expected = layers(x)
    with packed_weights(layers, packed_for):
        assert "forward" in vars(layers[0])
        found = layers(x)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_in_the_precision_of_autocast(layers):
    x = torch.randn(5, 24)
    with torch.autocast("cpu", torch.bfloat16):
        expected = layers(x)
        with packed_weights(layers, 5):
            found = layers(x)
    assert found.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected, atol=2e-2, rtol=2e-2)


@torch.no_grad()
def test_small_weights_are_not_packed(monkeypatch, layers):
    monkeypatch.setattr(packing, "PACKED_ELEMENTS", 24 * 40)
    with packed_weights(layers, 2):
        assert [name for name, layer in layers.named_modules() if "forward" in vars(layer)] == ["0"]


def test_the_layers_are_restored(layers):
    with pytest.raises(RuntimeError, match="on the way"), packed_weights(layers, 1):
        raise RuntimeError("on the way")
    assert all("forward" not in vars(layer) for layer in layers)
    with torch.no_grad():
        layers[0].weight.zero_()
        layers[0].bias.zero_()
        assert (layers(torch.randn(1, 24)) == 0).all()


@torch.no_grad()
def test_float64_weights_are_not_packed(layers):
    layers.double()
    x = torch.randn(2, 24, dtype=torch.float64)
    with packed_weights(layers, 2):
        assert all("forward" not in vars(layer) for layer in layers)
        assert layers(x).dtype == torch.float64


@pytest.mark.parametrize(("dtype", "packed"), [(None, ["0"]), (torch.bfloat16, ["0.base_layer", "A", "B"])])
def test_of_the_adapters_only_the_selected_one_is_packed(dtype, packed):
    model = torch.nn.Sequential(torch.nn.Linear(8, 6)).requires_grad_(False).eval()
    for name in ("actor", "critic"):
        inject_adapter_in_model(LoraConfig(r=2, target_modules=["0"]), model, name)
        torch.nn.init.normal_(model[0].lora_B[name].weight)
    select_adapters([model[0]], ["actor"])
    x = torch.randn(3, 8)
    with torch.no_grad(), torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
        right = model(x)
        with packed_weights(model, 3):
            torch.testing.assert_close(model(x), right)
            found = {name for name, module in model.named_modules() if "forward" in vars(module)}
    short = {"A": "0.lora_A.actor", "B": "0.lora_B.actor"}
    assert found == {short.get(name, name) for name in packed}


@pytest.mark.parametrize("moved_bytes", [0, 2**20])
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dora", [False, True])
@torch.no_grad()
def test_weights_below_adapters(tiny_model, monkeypatch, precision, dora, moved_bytes):
    """Large ones are moved, and come back unchanged; small ones, and those of DoRA, are copied."""
    monkeypatch.setattr(packing, "MOVED_BYTES", moved_bytes)
    torch.manual_seed(0)
    lora = LoRA(rank=2, dora=dora)
    model = load_adapted(str(tiny_model()), lora, "model.actor", trained=["actor", "critic"], copies=["below"])
    for name in ("actor", "critic", "below"):
        for parameter in adapter_parameters(model, name).values():
            parameter.add_(torch.randn_like(parameter) / 20)
    actor = Actor(model, adapter="actor")
    critic, base = AdapterView(actor, ["critic"]), AdapterView(actor, [])
    if precision == torch.bfloat16:
        store_in_bfloat16(model, all_weights=False)
    select_adapters(adapted_layers(model), ["below", "actor"])
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    x, linear = torch.tensor([[2, 6, 7], [3, 8, 9]]), adapted_layers(model)[0].get_base_layer()
    for shown, adapters in ((model, ["below", "actor"]), (critic, ["critic"]), (base, [])):
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16):
            with selected(adapted_layers(model), adapters):
                expected = model(x).logits
            with packed_weights(shown, 2):
                assert (linear.weight.numel() == 0) == (moved_bytes == 0 and not (dora and adapters))
                with selected(adapted_layers(model), adapters):  # as a view does
                    found = model(x).logits
        tolerance = 1e-4 if precision == torch.float32 else 0.15
        torch.testing.assert_close(found.float(), expected.float(), atol=tolerance, rtol=tolerance)
    assert all(torch.equal(p, frozen[name]) for name, p in model.named_parameters() if name in frozen)
