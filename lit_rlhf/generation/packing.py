"""Faster matrix products on a CPU for inputs with few rows, as in decoding, with weights in oneDNN's blocked layout."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lit_rlhf.compat import block_weight, multiply_by_blocks, selected_adapters
from lit_rlhf.models.adapters import adapted_layers, merged_weight, selected_by, whole_model
from lit_rlhf.models.sharding import is_sharded

PACKED_ELEMENTS = 2**16
"""The minimum number of elements of a weight that is packed; PyTorch's own products with smaller ones are faster."""
MOVED_BYTES = 2**20
"""The minimum size, in bytes, of a base layer's weight that is moved into blocks instead of being copied.

Compared with the product with such a weight, the additional products with the adapters' A and B take little time.
"""


@contextmanager
def packed_weights(model: nn.Module, rows: int) -> Iterator[None]:
    """Make a model's linear layers use their weights in oneDNN's blocked layout, inside this context.

    A decoding step with 64 rows is then twice as fast as with PyTorch's own products, and a step with 2 rows is three
    times as fast. Entering the context copies the weights, cast to autocast's precision if autocast is enabled, and the
    copies need as much memory as weights of that precision. A large frozen weight below adapters is not copied if it
    already has that precision: it is moved, and moved back unchanged at the end, unless the model is sharded or an
    adapter uses DoRA. No gradients are computed inside the context. Only weights on the CPU that are used in float32 or
    bfloat16 are packed, and of layers without adapters only weights of at least ``PACKED_ELEMENTS`` elements.

    Args:
        model: The model, or a view of a base with adapters. Its weights must not change inside the context, and only
            its linear layers may use a weight that is moved.
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
    """Make a layer multiply by its weight in blocked layout, inside this context.

    The layer gets an attribute ``forward``, which hides the method of its class.

    Args:
        layer: The layer.
        linear: The linear layer that holds the weight: the same layer, or the base layer of a layer with adapters.
        rows: The typical number of rows in the input of the layer.
        may_move: Whether a large weight of a base layer may be moved into the blocks, and moved back at the end.
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
    """Return x Wᵀ + b + (x Aᵀ) Bᵀ.

    Args:
        blocks: The weight W, from `block_weight`.
        bias: The bias b; None for 0.
        adapters: Aᵀ and the scaled Bᵀ, from `_adapters`; if the sequence is empty, the last term is left out.
        x: The input of the layer, with its features on the last axis.
    """
    x = x.to(blocks.dtype)
    result = multiply_by_blocks(blocks, bias, x)
    if adapters:
        down, up = adapters
        result.view(-1, result.shape[-1]).addmm_(x.reshape(-1, x.shape[-1]) @ down, up)
    return result


def _adapters(layer: Any, dtype: torch.dtype) -> list[Tensor]:
    """Return the selected adapters of a layer as one adapter: Aᵀ [in, R] and the scaled Bᵀ [R, out].

    R is the sum of the ranks of the selected adapters. The list is empty if no adapter of the layer is selected.

    Args:
        layer: A layer with adapters, from ``in`` to ``out`` features.
        dtype: The data type of the result.
    """
    names = [name for name in selected_adapters(layer) if name in layer.lora_A]
    if not names:
        return []
    down = torch.cat([layer.lora_A[name].weight.detach() for name in names])
    up = torch.cat([layer.lora_B[name].weight.detach() * layer.scaling[name] for name in names], 1)
    return [down.T.to(dtype), up.T.to(dtype)]


def _linear_layers(model: nn.Module, may_move: bool) -> Iterator[tuple[Any, nn.Linear]]:
    """Yield the layers that can be packed, each with the linear layer that holds its weight.

    A layer with adapters is yielded together with its base layer if the base layer's weight is moved, or if the layer
    computes in float32, where one product with the merged weight is enough. In bfloat16, a small adapter would be lost
    to rounding in the merged weight. The base layer, and A and B of each selected adapter, are therefore yielded as
    separate layers if the weight is not moved.

    Args:
        model: The model, with all adapters.
        may_move: Whether large weights of base layers may be moved.
    """
    adapted: list[Any] = adapted_layers(model)
    inside = {id(part) for layer in adapted for part in layer.modules() if part is not layer}
    for module in model.modules():
        if type(module) is nn.Linear and id(module) not in inside and _is_large_enough(module.weight):
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
    """Return whether the weight of a base layer is large, need not be cast, and can be moved into blocks and back.

    Args:
        layer: The layer with adapters; the weight cannot be moved if a selected adapter uses DoRA.
        weight: The weight of its base layer.
    """
    is_dora = any(name in layer.lora_variant for name in selected_adapters(layer))
    return weight.nbytes >= MOVED_BYTES and weight.dtype == _compute_dtype(weight) and not is_dora


def _is_large_enough(weight: Tensor) -> bool:
    return weight.numel() >= PACKED_ELEMENTS and _can_be_packed(weight)


def _can_be_packed(weight: Tensor) -> bool:
    return (
        type(weight) is nn.Parameter
        and weight.device.type == "cpu"
        and torch.backends.mkldnn.is_available()
        and _compute_dtype(weight) in (torch.float32, torch.bfloat16)
    )


def _compute_dtype(weight: Tensor) -> torch.dtype:
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else weight.dtype
