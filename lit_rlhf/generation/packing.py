"""Faster matrix products with few rows on a CPU, for decoding, with the weights in oneDNN's blocked layout."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lit_rlhf.compat import block_weight, multiply_by_blocks, selected_adapters
from lit_rlhf.models.adapters import adapted_layers, merged_weight, selected_by, whole_model
from lit_rlhf.models.sharding import is_sharded

MOVED_BYTES = 2**20
"""The size, in bytes, from which a weight below adapters is moved: the products with A and B then take little time."""


@contextmanager
def packed_weights(model: nn.Module, rows: int) -> Iterator[None]:
    """Make a model's linear layers use their weights in oneDNN's blocked layout, inside this context.

    A decoding step with 64 rows is twice as fast as with PyTorch's own products, and one with 2 rows three times as
    fast. Each time the context is entered, the weights are copied in autocast's precision, which needs as much memory
    as the weights would in that precision. There are no copies of large frozen weights below adapters, unless the model
    is sharded: these weights are moved, and moved back at the end without any change. No gradients are computed. Only
    CPU weights that are used in float32 or bfloat16 are packed.

    Args:
        model: The model, whose weights must not change inside the context, nor be used except by its linear layers.
        rows: The typical number of rows in the input of a linear layer.
    """
    whole = whole_model(model)
    may_move = not any(is_sharded(module) for module in whole.modules())
    with ExitStack() as packed:
        with selected_by(model):
            for layer, linear in _linear_layers(whole, may_move):
                packed.enter_context(_packed(layer, linear, rows, may_move))
        yield


@contextmanager
def _packed(layer: Any, linear: nn.Linear, rows: int, may_move: bool) -> Iterator[None]:
    """Make a layer multiply by blocks, inside this context, with a ``forward`` of its own that hides its class's.

    A large weight below adapters is moved into the blocks, and moved back at the end.
    """
    weight, dtype = linear.weight, _compute_dtype(linear.weight)
    moves = layer is not linear and may_move and _can_be_moved(layer, weight)
    with merged_weight(layer) if layer is not linear and not moves else nullcontext(weight) as used:
        blocks = block_weight(used.detach().to(dtype), rows)
    del used  # a merged weight, which would live as long as this context
    bias = None if linear.bias is None else linear.bias.detach().to(dtype)
    if moves:
        weight.data = weight.new_empty(0)
        vars(layer)["forward"] = partial(_multiply, blocks, bias, _adapters(layer, dtype))
    else:
        vars(layer)["forward"] = partial(multiply_by_blocks, blocks, bias)
    try:
        yield
    finally:
        del vars(layer)["forward"]
        if moves:
            weight.data = blocks.to_dense()


def _multiply(blocks: Tensor, bias: Tensor | None, adapters: Sequence[Tensor], x: Tensor) -> Tensor:
    """Return x Wᵀ + b + (x Aᵀ) Bᵀ, without the last term if there are no adapters."""
    x = x.to(blocks.dtype)
    result = multiply_by_blocks(blocks, bias, x)
    if adapters:
        down, up = adapters
        result.view(-1, result.shape[-1]).addmm_(x.reshape(-1, x.shape[-1]) @ down, up)
    return result


def _adapters(layer: Any, dtype: torch.dtype) -> list[Tensor]:
    """Return Aᵀ [in, R] and the scaled Bᵀ [R, out], where R is the sum of the ranks of the selected adapters.

    The list is empty if none is selected.
    """
    names = [name for name in selected_adapters(layer) if name in layer.lora_A]
    if not names:
        return []
    down = torch.cat([layer.lora_A[name].weight.detach() for name in names])
    up = torch.cat([layer.lora_B[name].weight.detach() * layer.scaling[name] for name in names], 1)
    return [down.T.to(dtype), up.T.to(dtype)]


def _linear_layers(model: nn.Module, may_move: bool) -> Iterator[tuple[Any, nn.Linear]]:
    """Yield the layers that can be packed, each with the linear layer that holds its weight.

    In float32, a layer with adapters becomes a single product with the merged weight, unless its weight is moved. In
    half precision, the merged weight would lose a small adapter to rounding, so there the base's layer and the selected
    adapters are packed one by one, unless the base's weight is moved.
    """
    adapted: list[Any] = adapted_layers(model)
    inside = {id(part) for layer in adapted for part in layer.modules() if part is not layer}
    for module in model.modules():
        if type(module) is nn.Linear and id(module) not in inside and _can_be_packed(module.weight):
            yield module, module
    for layer in adapted:
        base = layer.get_base_layer()
        if not (type(base) is nn.Linear and _can_be_packed(base.weight)):
            continue
        if _compute_dtype(base.weight) == torch.float32 or (may_move and _can_be_moved(layer, base.weight)):
            yield layer, base
            continue
        names = [name for name in selected_adapters(layer) if name in layer.lora_A]
        for part in (base, *(part[name] for name in names for part in (layer.lora_A, layer.lora_B))):
            yield part, part


def _can_be_moved(layer: Any, weight: Tensor) -> bool:
    """Return whether a weight below adapters is large, and can be multiplied and moved back without a change."""
    is_dora = any(name in layer.lora_variant for name in selected_adapters(layer))
    return weight.nbytes >= MOVED_BYTES and weight.dtype == _compute_dtype(weight) and not is_dora


def _can_be_packed(weight: Tensor) -> bool:
    return (
        type(weight) is nn.Parameter
        and weight.device.type == "cpu"
        and torch.backends.mkldnn.is_available()
        and _compute_dtype(weight) in (torch.float32, torch.bfloat16)
    )


def _compute_dtype(weight: Tensor) -> torch.dtype:
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else weight.dtype
