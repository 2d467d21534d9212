"""The precisions that training supports, and the storage of frozen weights in bfloat16."""

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from lit_rlhf.errors import UserError
from lit_rlhf.models.quantization import compute_in

PRECISIONS = ("32-true", "bf16-mixed")
"""The values of ``trainer.precision`` that training supports, as Lightning reports them."""
ALIASES = ("32", "bf16")
"""Other names of the same precisions, which Lightning accepts."""


def check_precision(precision: str | int) -> None:
    """Check that training supports a precision, which must keep weights and gradients in float32.

    With weights in bfloat16, updates at the usual learning rates are lost to rounding. Float16 needs scaled losses, but
    the code that measures and clips gradient norms does not take the scale into account.

    Args:
        precision: The option ``trainer.precision``.

    Raises:
        UserError: if training does not support the precision.

    >>> check_precision("bf16-true")
    Traceback (most recent call last):
    lit_rlhf.errors.UserError: trainer.precision must be 32-true or bf16-mixed, not 'bf16-true'
    """
    if str(precision) not in (*PRECISIONS, *ALIASES):
        raise UserError(f"trainer.precision must be {' or '.join(PRECISIONS)}, not {str(precision)!r}")


def is_frozen(model: nn.Module) -> bool:
    """Return whether no parameter of a model is trained.

    >>> is_frozen(nn.Linear(2, 1)), is_frozen(nn.Linear(2, 1).requires_grad_(False))
    (False, True)
    """
    return not any(parameter.requires_grad for parameter in model.parameters())


def rounded_weights(model: nn.Module, *, all_weights: bool) -> list[nn.Parameter]:
    """Return the parameters that each forward pass under autocast to bfloat16 rounds.

    Autocast rounds the weights and biases of linear layers, but not the weights of embeddings and norms. A weight that
    a head shares with an embedding is left out, because the embedding uses it without rounding. Classes derived from
    ``nn.Linear`` are left out, because some of them use their weights in other operations.

    Args:
        model: The model.
        all_weights: True if FSDP rounds all weights to bfloat16 when it gathers them; all parameters are then returned.

    >>> model = nn.Sequential(nn.Embedding(4, 2), nn.Linear(2, 4, bias=False))
    >>> len(rounded_weights(model, all_weights=False)), len(rounded_weights(model, all_weights=True))
    (1, 2)
    """
    others = [module for module in model.modules() if type(module) not in (nn.Linear, Conv1D)]
    kept = set() if all_weights else {id(x) for module in others for x in module.parameters(recurse=False)}
    return [parameter for parameter in model.parameters() if id(parameter) not in kept]  # yields tied weights once


def store_in_bfloat16(model: nn.Module, *, all_weights: bool) -> None:
    """Store the frozen float32 weights of a model in bfloat16, in place, where this does not change the model's output.

    Weights that each forward pass would round can be rounded once; see `rounded_weights`. (State-space layers are an
    exception: they use the weights of plain linear layers directly, so the rounding does change their output.) Trained
    weights and the weights of adapters, which are small, stay in float32. Quantized weights stay as they are, and are
    dequantized to bfloat16 from now on.

    Args:
        model: The model, which is only used under autocast to bfloat16.
        all_weights: True if FSDP rounds all weights to bfloat16 when it gathers them.

    >>> model = nn.Sequential(nn.Embedding(4, 2), nn.Linear(2, 4)).requires_grad_(False)
    >>> store_in_bfloat16(model, all_weights=False)
    >>> model[0].weight.dtype, model[1].weight.dtype
    (torch.float32, torch.bfloat16)
    """
    kept = {
        id(parameter) for name, parameter in model.named_parameters() if parameter.requires_grad or ".lora_" in name
    }
    for parameter in rounded_weights(model, all_weights=all_weights):
        if parameter.dtype == torch.float32 and id(parameter) not in kept:
            parameter.data = parameter.data.to(torch.bfloat16)
    compute_in(model, torch.bfloat16)
