"""Faster matrix products with few rows on a CPU, for decoding, with the weights in oneDNN's blocked layout."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from lit_rlhf.compat import block_weight, multiply_by_blocks


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
    for layer in model.modules():
        if type(layer) is nn.Linear and _can_be_packed(layer.weight):
            dtype = _compute_dtype(layer.weight)
            weight = block_weight(layer.weight.detach().to(dtype), rows)
            bias = None if layer.bias is None else layer.bias.detach().to(dtype)
            vars(layer)["forward"] = partial(multiply_by_blocks, weight, bias)  # hides the method of the class
            packed.append(layer)
    try:
        yield
    finally:
        for layer in packed:
            del vars(layer)["forward"]


def _can_be_packed(weight: Tensor) -> bool:
    return (
        type(weight) is nn.Parameter
        and weight.device.type == "cpu"
        and torch.backends.mkldnn.is_available()
        and _compute_dtype(weight) in (torch.float32, torch.bfloat16)
    )


def _compute_dtype(weight: Tensor) -> torch.dtype:
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else weight.dtype
