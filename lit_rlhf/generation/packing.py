"""Faster matrix products with few rows on a CPU, for decoding, with the weights in oneDNN's blocked layout."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lit_rlhf.compat import block_weight, multiply_by_blocks, selected_adapters
from lit_rlhf.models.adapters import AdapterView, adapted_layers, merged_weight, selected, whole_model


@contextmanager
def packed_weights(model: nn.Module, rows: int) -> Iterator[None]:
    """Make a model's linear layers use copies of their weights in oneDNN's blocked layout, inside this context.

    A decoding step with 64 rows is twice as fast as with PyTorch's own products, and one with 2 rows three times as
    fast. The copies are made each time the context is entered, in autocast's precision, and need as much memory as the
    weights would in that precision. No gradients are computed. Only CPU weights that are used in float32 or bfloat16
    are copied.

    Args:
        model: The model, whose weights must not change inside the context.
        rows: The typical number of rows in the input of a linear layer.
    """
    packed = []
    with ExitStack() as stack:
        if isinstance(model, AdapterView):
            stack.enter_context(selected(model.base_model.layers, model.base_model.adapters))
        for layer in _linear_layers(whole_model(model)):
            with _weight_of(layer) as weight:
                if not _can_be_packed(weight):
                    continue
                dtype = _compute_dtype(weight)
                blocks = block_weight(weight.detach().to(dtype), rows)
            bias = None if layer.bias is None else layer.bias.detach().to(dtype)
            vars(layer)["forward"] = partial(multiply_by_blocks, blocks, bias)  # hides the method of the class
            packed.append(layer)
    try:
        yield
    finally:
        for layer in packed:
            del vars(layer)["forward"]


def _linear_layers(model: nn.Module) -> Iterator[Any]:
    """Yield the plain linear layers of a model and, where products are in float32, the adapted ones.

    A layer with adapters becomes one product with the merged weight. Half precision would round a small adapter away in
    the merged weight, so there the layer's base and its selected adapters are packed one by one.
    """
    adapted: list[Any] = adapted_layers(model)
    inside = {id(part) for layer in adapted for part in layer.modules() if part is not layer}
    yield from (module for module in model.modules() if type(module) is nn.Linear and id(module) not in inside)
    for layer in adapted:
        base = layer.get_base_layer()
        if type(base) is not nn.Linear:
            continue
        if _compute_dtype(base.weight) == torch.float32:
            yield layer
            continue
        yield base
        for name in selected_adapters(layer):
            if name in layer.lora_A:
                yield from (layer.lora_A[name], layer.lora_B[name])


def _weight_of(layer: Any) -> AbstractContextManager[Tensor]:
    return nullcontext(layer.weight) if type(layer) is nn.Linear else merged_weight(layer)


def _can_be_packed(weight: Tensor) -> bool:
    return (
        type(weight) in (nn.Parameter, Tensor)
        and weight.device.type == "cpu"
        and torch.backends.mkldnn.is_available()
        and _compute_dtype(weight) in (torch.float32, torch.bfloat16)
    )


def _compute_dtype(weight: Tensor) -> torch.dtype:
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else weight.dtype
