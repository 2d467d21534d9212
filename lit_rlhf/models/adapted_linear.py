"""A linear layer with low-rank adapters, which multiplies its matrices in the cheaper of two orders.

This module imports peft, which takes seconds, so it must be imported only inside functions.
"""

from typing import Any

import torch
from peft.tuners.lora import Linear
from torch import Tensor, nn
from torch.nn import functional as F

from lit_rlhf.compat import selected_adapters


class AdaptedLinear(Linear):
    """A linear layer with adapters that computes W x + Σ s B A x, or (W + Σ s B A) x where that is cheaper.

    The sum is over the selected adapters, and s is an adapter's scaling. The two are equal up to rounding. Only
    products in float32 or float64 use the sum of the weights, because in half precision a small s B A would be rounded
    away when it is added to W. See `sum_is_cheaper` for the costs.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the output, [..., out], of the base layer with the selected adapters for the input x, [..., in]."""
        adapters = [name for name in selected_adapters(self) if name in self.lora_A]
        if args or kwargs or not adapters or not self._can_use_sum(x, adapters):
            return super().forward(x, *args, **kwargs)
        base: Any = self.base_layer
        rank, tokens = sum(self.r[name] for name in adapters), x.numel() // x.shape[-1]
        if not sum_is_cheaper(base.weight.shape, rank, tokens, differentiates=torch.is_grad_enabled()):
            return super().forward(x)
        return F.linear(x, self.summed_weight(adapters), base.bias)

    def summed_weight(self, adapters: list[str]) -> Tensor:
        """Return W + Σ s B A, [out, in].

        Args:
            adapters: The names of adapters of this layer for which `has_plain` is True.
        """
        layer: Any = self
        weight: Tensor = layer.base_layer.weight
        for name in adapters:
            up, down = layer.lora_B[name].weight, layer.lora_A[name].weight
            weight = torch.addmm(weight, up, down, alpha=self.scaling[name])
        return weight

    def has_plain(self, adapters: list[str]) -> bool:
        """Return whether the given adapters only add s B A x, without extensions such as DoRA's norms or a bias."""
        return not any(name in self.lora_variant or self.lora_B[name].bias is not None for name in adapters)

    def _can_use_sum(self, x: Tensor, adapters: list[str]) -> bool:
        return (
            x.dtype == self.base_layer.weight.dtype
            and x.dtype in (torch.float32, torch.float64)
            and not torch.is_autocast_enabled(x.device.type)
            and not self.training  # dropout
            and not self.merged
            and self.has_plain(adapters)
        )


def sum_is_cheaper(shape: tuple[int, ...], rank: int, tokens: int, *, differentiates: bool) -> bool:
    """Return whether (W + s B A) x takes less time than W x + s B A x.

    For t tokens and rank r, B A takes in · out · r multiplications, and B A x takes t · r · (in + out). The backward
    pass of each takes twice as many; the sum's backward pass also computes the gradient of the summed weight, which
    takes t · in · out. With its memory accesses, B A x takes as long as if r were greater by 16 (measured on a CPU).

    Args:
        shape: The shape of W, [out, in].
        rank: The rank of B A.
        tokens: t, the number of tokens.
        differentiates: Whether a backward pass follows.

    >>> sum_is_cheaper((64, 64), rank=16, tokens=1000, differentiates=True)
    True
    >>> sum_is_cheaper((1024, 1024), rank=16, tokens=1000, differentiates=True)
    False
    >>> sum_is_cheaper((1024, 1024), rank=16, tokens=1000, differentiates=False)
    True
    """
    high, wide = shape
    passes = 3 if differentiates else 1
    by_sum = high * wide * (passes * rank + (tokens if differentiates else 0))
    return by_sum < passes * tokens * (rank + 16) * (high + wide)


def use_sums(model: nn.Module) -> None:
    """Turn peft's LoRA layers whose base layer is a plain ``nn.Linear`` into `AdaptedLinear` layers, in place."""
    for module in model.modules():
        if type(module) is Linear and type(module.base_layer) is nn.Linear:
            module.__class__ = AdaptedLinear
