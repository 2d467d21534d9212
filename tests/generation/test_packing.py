import pytest
import torch
from torch import nn

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
