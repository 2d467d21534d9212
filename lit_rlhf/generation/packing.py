"""Faster matrix products with few rows on a CPU, for decoding, with the weights in oneDNN's blocked layout."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lit_rlhf.compat import block_weight, multiply_by_blocks, selected_adapters
from lit_rlhf.models.adapters import AdapterView, adapted_layers, merged_weight, selected, whole_model
from lit_rlhf.models.sharding import is_sharded


@contextmanager
def packed_weights(model: nn.Module, rows: int) -> Iterator[None]:
    """Make a model's linear layers use their weights in oneDNN's blocked layout, inside this context.

    A decoding step with 64 rows is twice as fast as with PyTorch's own products, and one with 2 rows three times as
    fast. Each time the context is entered, the weights are copied in autocast's precision, which needs as much memory
    as the weights would in that precision. The frozen weights of layers with adapters are not copied but moved, and
    moved back at the end without any change, unless the model is sharded; the adapters become two thin products. No
    gradients are computed. Only CPU weights that are used in float32 or bfloat16 are packed.

    Args:
        model: The model, whose weights must not change inside the context, nor be used but through its linear layers.
        rows: The typical number of rows in the input of a linear layer.
    """
    whole = whole_model(model)
    may_move = not any(is_sharded(module) for module in whole.modules())
    with ExitStack() as packed:
        with _selection(model):
            for layer, linear in _linear_layers(whole):
                packed.enter_context(_packed(layer, linear, rows, may_move))
        yield


def _selection(model: nn.Module) -> Any:
    """Return a context in which the adapters of a view are selected."""
    if isinstance(model, AdapterView):
        return selected(model.base_model.layers, model.base_model.adapters)
    return nullcontext()


def _linear_layers(model: nn.Module) -> Iterator[tuple[Any, nn.Linear]]:
    """Yield the layers to replace, each with the linear layer that holds its weight: itself, or the base's layer."""
    adapted: list[Any] = [*adapted_layers(model)]
    inside = {id(module) for layer in adapted for module in layer.modules()}
    for module in model.modules():
        if type(module) is nn.Linear and id(module) not in inside and _can_be_packed(module.weight):
            yield module, module
    for layer in adapted:
        base: Any = layer.get_base_layer()
        if type(base) is nn.Linear and _can_be_packed(base.weight):
            # half precision would round a small adapter away in the merged weight that DoRA needs
            yield base if _is_dora(layer) and _compute_dtype(base.weight) != torch.float32 else layer, base


@contextmanager
def _packed(layer: Any, linear: nn.Linear, rows: int, may_move: bool) -> Iterator[None]:
    """Replace a layer's forward method, which hides that of the class, and move the weight of an adapted layer."""
    weight, dtype = linear.weight, _compute_dtype(linear.weight)
    is_merged = layer is not linear and _is_dora(layer)
    with merged_weight(layer) if is_merged else nullcontext(weight) as used:
        blocks = block_weight(used.detach().to(dtype), rows)
    thin = [] if layer is linear or is_merged else _adapters(layer, dtype)
    is_exact = weight.dtype == dtype and not weight.requires_grad
    moves = may_move and is_exact and layer is not linear and not is_merged
    if moves:
        weight.data = weight.new_empty(0)
    bias = None if linear.bias is None else linear.bias.detach().to(dtype)
    vars(layer)["forward"] = partial(_multiply, blocks, bias, thin)
    try:
        yield
    finally:
        del vars(layer)["forward"]
        if moves:
            weight.data = blocks.to_dense()


def _multiply(blocks: Tensor, bias: Tensor | None, thin: list[Tensor], x: Tensor) -> Tensor:
    x = x.to(blocks.dtype)
    result = multiply_by_blocks(blocks, bias, x)
    if thin:
        down, up = thin
        result.view(-1, result.shape[-1]).addmm_(x.reshape(-1, x.shape[-1]) @ down, up)
    return result


def _adapters(layer: Any, dtype: torch.dtype) -> list[Tensor]:
    """Return Aᵀ [in, R] and Bᵀ [R, out], where R is the sum of the ranks of the selected adapters; empty for none.

    B includes the scaling.
    """
    names = [name for name in selected_adapters(layer) if name in layer.lora_A]
    if not names:
        return []
    down = torch.cat([layer.lora_A[name].weight.detach() for name in names])
    up = torch.cat([layer.lora_B[name].weight.detach() * layer.scaling[name] for name in names], 1)
    return [down.T.to(dtype), up.T.to(dtype)]


def _is_dora(layer: Any) -> bool:
    return any(name in layer.lora_variant for name in selected_adapters(layer))


def _can_be_packed(weight: Tensor) -> bool:
    return (
        type(weight) in (nn.Parameter, Tensor)
        and weight.device.type == "cpu"
        and torch.backends.mkldnn.is_available()
        and _compute_dtype(weight) in (torch.float32, torch.bfloat16)
    )


def _compute_dtype(weight: Tensor) -> torch.dtype:
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else weight.dtype
