import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from lit_rlhf.compat import select_adapters
from lit_rlhf.generation.packing import packed_weights


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
