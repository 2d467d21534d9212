"""The sum of the weights of a base and its adapters gives what the separate products give, with the same gradients."""

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import Linear
from torch import nn

from lit_rlhf.compat import select_adapters
from lit_rlhf.models.adapted_linear import AdaptedLinear, sum_is_cheaper, use_sums
from lit_rlhf.models.adapters import adapted_layers


def layer_of(*adapters, dtype=torch.float64, **options):
    """Return an adapted layer [5, 7] with random adapters of rank 2, all of which are selected."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 5, dtype=dtype))
    for name in adapters:
        inject_adapter_in_model(LoraConfig(r=2, lora_alpha=6, target_modules=["0"], **options), model, name)
    use_sums(model)
    (layer,) = adapted_layers(model.eval())
    for name in adapters:
        nn.init.normal_(layer.lora_B[name].weight)
        layer.to(dtype)
    select_adapters([layer], adapters)
    return layer


def results(layer, x, weight):
    """Return the output, and the gradients of the input and the adapters."""
    x = x.clone().requires_grad_()
    layer.zero_grad()
    y = layer(x)
    (y * weight).sum().backward()
    own = {name: p.grad for name, p in layer.named_parameters() if "lora" in name}
    return {"y": y.detach(), "x": x.grad, **own}


@pytest.mark.parametrize("adapters", [("one",), ("one", "two")])
def test_sums_and_separate_products_agree(adapters):
    layer = layer_of(*adapters)
    layer.base_layer.requires_grad_(False)
    x, weight = torch.randn(3, 20, 7, dtype=torch.float64), torch.randn(3, 20, 5, dtype=torch.float64)
    right = layer.base_layer(x)
    for name in adapters:
        right = right + 3 * x @ layer.lora_A[name].weight.T @ layer.lora_B[name].weight.T
    found = results(layer, x, weight)
    torch.testing.assert_close(found["y"], right.detach())
    layer.__class__ = Linear
    separate = results(layer, x, weight)
    assert found.keys() == separate.keys()
    assert len(found) == 2 + 2 * len(adapters)
    torch.testing.assert_close(found, separate)


def summed(layer, monkeypatch, x):
    """Return whether the layer uses the sum of its weights for this input."""
    calls = []
    own = AdaptedLinear.summed_weight
    monkeypatch.setattr(AdaptedLinear, "summed_weight", lambda self, names: calls.append(names) or own(self, names))
    layer(x)
    return bool(calls)


def test_the_sum_is_for_full_precision_and_plain_adapters(monkeypatch):
    x = torch.randn(20, 7)
    layer = layer_of("one", dtype=torch.float32)
    assert summed(layer, monkeypatch, x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not summed(layer, monkeypatch, x)
    assert not summed(layer.to(torch.bfloat16), monkeypatch, x.bfloat16())
    assert not summed(layer_of("one", dtype=torch.float32, lora_dropout=0.5).train(), monkeypatch, x)
    assert not summed(layer_of("one", dtype=torch.float32, use_dora=True), monkeypatch, x)
    assert not summed(layer_of("one", dtype=torch.float32, lora_bias=True), monkeypatch, x)


def test_no_adapter_is_the_base_alone(monkeypatch):
    x = torch.randn(20, 7)
    layer = layer_of("one", dtype=torch.float32)
    select_adapters([layer], ())
    assert not summed(layer, monkeypatch, x)
    assert torch.equal(layer(x), layer.base_layer(x))


def test_the_cheaper_order_depends_on_the_sizes():
    assert not sum_is_cheaper((64, 64), 4, 6, differentiates=False)  # 64 * 64 * 4 = 16384 > 6 * 20 * 128 = 15360
    assert sum_is_cheaper((64, 64), 4, 7, differentiates=False)  # 16384 < 7 * 20 * 128 = 17920
    assert not sum_is_cheaper((64, 64), 4, 13, differentiates=True)  # 4096 * (12 + 13) = 102400 > 39 * 20 * 128 = 99840
    assert sum_is_cheaper((64, 64), 4, 14, differentiates=True)  # 4096 * (12 + 14) = 106496 < 42 * 20 * 128 = 107520
    assert not sum_is_cheaper((4096, 4096), 64, 10**6, differentiates=True)
    assert sum_is_cheaper((4096, 4096), 64, 10**6, differentiates=False)


def test_a_wide_layer_multiplies_separately(monkeypatch):
    monkeypatch.setattr("lit_rlhf.models.adapted_linear.sum_is_cheaper", lambda *sizes, **differentiates: False)
    assert not summed(layer_of("one", dtype=torch.float32), monkeypatch, torch.randn(20, 7))
