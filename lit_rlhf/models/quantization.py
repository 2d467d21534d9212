"""Quantized bases, whose linear layers have adapters on top of frozen weights in 4 or 8 bits.

transformers loads and quantizes the weights. This module makes the layers compute x Wᵀ with the dequantized W. The
result is the same with and without gradients, and does not depend on the other texts of a batch.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any, Literal, TypeAlias, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lit_rlhf.compat import keep_4_bit_layout
from lit_rlhf.errors import UserError

Quantization: TypeAlias = Literal["nf4", "int8"]
ModuleType = TypeVar("ModuleType", bound=nn.Module)
PACKAGES = {"nf4": "bitsandbytes", "int8": "torchao"}
"""The package that each quantization needs; none of them is a dependency of lit-rlhf."""


def check_package(quantization: Quantization) -> None:
    """Check that the package of a quantization is installed.

    Args:
        quantization: The option ``model.adapter.quantization``.

    Raises:
        UserError: if the package is not installed.
    """
    package = PACKAGES[quantization]
    if find_spec(package) is None:
        raise UserError(
            f"model.adapter.quantization: {quantization} needs {package}, which is not installed: pip install {package}"
        )


def quantization_config(quantization: Quantization) -> Any:
    """Return transformers' configuration of a quantization.

    Args:
        quantization: ``nf4`` for the 16 values of 4-bit NormalFloat, with an 8-bit scale for each block of 64 weights
            (bitsandbytes); ``int8`` for 255 equidistant values, with a scale for each row of the matrix (torchao).

    Raises:
        UserError: if the quantization's package is not installed.
    """
    check_package(quantization)
    if quantization == "nf4":
        from transformers import BitsAndBytesConfig

        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
        )
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


def is_quantized(layer: nn.Module) -> bool:
    """Return whether a layer is a linear layer with quantized weights.

    >>> is_quantized(nn.Linear(2, 1))
    False
    """
    return isinstance(layer, QuantizedLinear) or type(layer).__module__.startswith("bitsandbytes.")


def has_quantized_layers(model: nn.Module) -> bool:
    """Return whether any layer of a model is quantized."""
    return any(is_quantized(layer) for layer in model.modules())


def check_whole(model: ModuleType, field: str) -> ModuleType:
    """Check that a model can be trained as a whole, and return the model.

    Args:
        model: The model.
        field: The name of the configuration field, for error messages.

    Raises:
        UserError: if the model is quantized.
    """
    if has_quantized_layers(model):
        raise UserError(f"{field}: quantized weights cannot be trained; train an adapter (model.adapter)")
    return model


def prepare_quantized(model: nn.Module, field: str) -> None:
    """Make the quantized layers of a model that transformers has loaded compute x Wᵀ with the dequantized W, in place.

    Args:
        model: The model.
        field: The name of the configuration field, for error messages.

    Raises:
        UserError: if a layer also rounds its input, or has a shape that bitsandbytes gets wrong on a CPU.
    """
    for name, layer in model.named_modules():
        weight: Any = getattr(layer, "weight", None)
        if type(layer).__name__ == "Linear8bitLt":
            raise UserError(
                f"{field}: bitsandbytes' 8-bit layers round their input, by amounts that depend on the other texts of "
                "a batch; quantize the model to int8 (model.adapter.quantization) or nf4 instead"
            )
        if type(layer).__name__ == "Linear4bit":
            keep_4_bit_layout(layer)
            block = weight.quant_state.blocksize
            if weight.device.type == "cpu" and layer.in_features % block:
                raise UserError(
                    f"{field}: on a CPU, bitsandbytes needs linear layers whose number of inputs is a multiple of "
                    f"{block}, but {name} has {layer.in_features} inputs"
                )
        elif type(layer) is nn.Linear and type(weight).__module__.startswith("torchao."):
            layer.__class__ = QuantizedLinear


def compute_in(model: nn.Module, dtype: torch.dtype) -> None:
    """Make the 4-bit layers of a model dequantize their weights to a data type and multiply in this type, in place.

    The layers of torchao need no such setting, because they follow autocast.

    Args:
        model: The model.
        dtype: The data type of autocast.
    """
    layers: list[Any] = [layer for layer in model.modules() if type(layer).__name__ == "Linear4bit"]
    for layer in layers:
        layer.compute_dtype = dtype


class QuantizedLinear(nn.Linear):
    """A frozen linear layer whose weight torchao has quantized; the backward pass dequantizes the weight again.

    Without this class, autograd would keep the dequantized weights of all layers until the backward pass.
    """

    @torch.compiler.disable  # compiled code would hold references to the weight, which could then not be moved
    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (the name in nn.Linear)
        """Return x Wᵀ + b."""
        product = _Product.apply(input, self.weight)
        return product if self.bias is None else product + self.bias


class _Product(torch.autograd.Function):
    """The product x Wᵀ of an x that may need a gradient and a quantized W, which needs none."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Any) -> Tensor:
        ctx.weight = weight
        return F.linear(x, weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,) = gradients
        return gradient @ ctx.weight.dequantize().to(gradient.dtype), None
