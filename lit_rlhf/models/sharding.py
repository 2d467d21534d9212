"""Models whose weights, gradients and optimizer state are spread over processes, each holding its share."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel, fully_shard, register_fsdp_forward_method
from transformers import PreTrainedModel

FORWARDS = ("next_logits", "hidden")
"""Methods of a model that compute with its weights, besides ``forward``."""


def decoder_layers(module: nn.Module) -> Iterator[nn.Module]:
    """The decoder layers of all models of transformers in a module, each once."""
    seen: set[int] = set()
    for model in module.modules():
        names = tuple(model._no_split_modules or ()) if isinstance(model, PreTrainedModel) else ()
        for layer in model.modules() if names else ():
            kinds = {kind.__name__ for kind in type(layer).__mro__}  # FSDP2 derives a class of its own from a layer's
            if kinds & set(names) and id(layer) not in seen:
                seen.add(id(layer))
                yield layer


def shard(model: nn.Module, **options: Any) -> nn.Module:
    """Spread a model by FSDP2, in place: each decoder layer by itself, and the rest together.

    Args:
        model: An actor, critic or reward model.
        options: Of `torch.distributed.fsdp.fully_shard`: mesh, precision, offloading.
    """
    for layer in list(decoder_layers(model)):
        fully_shard(layer, **options)
    fully_shard(model, **options)
    for name in FORWARDS:
        if hasattr(model, name):
            register_fsdp_forward_method(model, name)
    return model


def wrap(model: nn.Module, **options: Any) -> nn.Module:
    """Spread a model by FSDP1: each decoder layer is wrapped, and the model itself is returned wrapped.

    Args:
        model: An actor, critic or reward model.
        options: Of `torch.distributed.fsdp.FullyShardedDataParallel`.
    """
    layers = {id(layer) for layer in decoder_layers(model)}
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if id(child) in layers:
                setattr(parent, name, Wrapped(child, use_orig_params=True, **options))
    return Wrapped(model, use_orig_params=True, **options)


class Wrapped(FullyShardedDataParallel):
    """FSDP1 that also computes while its weights are gathered."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The wrapped module's."""
        if self.training_state.name == "SUMMON_FULL_PARAMS":
            return self.module(*args, **kwargs)
        return super().forward(*args, **kwargs)


@contextmanager
def unsharded(*models: nn.Module | None) -> Iterator[None]:
    """Every process holds these models' whole weights meanwhile; models that are not sharded have them anyway.

    Forwards then need no other process, so that each may do as many as it has work for. For forwards without gradient:
    decoding, judging, validation. All processes must enter together.
    """
    with ExitStack() as stack:
        for model in models:
            if isinstance(model, FSDPModule):
                stack.enter_context(_unsharded(model))
            elif isinstance(model, FullyShardedDataParallel):
                stack.enter_context(_summoned(model))
        yield


@contextmanager
def _unsharded(model: FSDPModule) -> Iterator[None]:
    parts = [part for part in model.modules() if isinstance(part, FSDPModule)]  # type: ignore[attr-defined]
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        yield
    finally:
        for part in parts:  # the root's weights stay from a forward to its backward, as FSDP2 has it by itself
            part.set_reshard_after_forward(part is not model, recurse=False)
            part.reshard()


@contextmanager
def _summoned(model: FullyShardedDataParallel) -> Iterator[None]:
    """Round the weights as FSDP1 does in its own forwards, so that what is judged is what is trained.

    It also keeps autocast from rounding them: its cache knows a parameter, and not that its weights change.
    """
    dtype = model.mixed_precision.param_dtype
    with FullyShardedDataParallel.summon_full_params(model, writeback=False):
        for weight in model.parameters() if dtype is not None else ():
            weight.data = weight.data.to(dtype)
        yield


def is_sharded(model: nn.Module) -> bool:
    """Whether each process holds only its share of the weights."""
    return isinstance(model, FSDPModule | FullyShardedDataParallel)


def full_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The model's ``state_dict`` with whole weights; of a sharded one in the CPU's memory of process 0, else empty.

    All processes must ask together.
    """
    if isinstance(model, FullyShardedDataParallel):
        with FullyShardedDataParallel.summon_full_params(model, writeback=False, rank0_only=True):
            named = [*model.named_parameters(remove_duplicate=False)] if torch.distributed.get_rank() == 0 else []
            return {name.replace("_fsdp_wrapped_module.", ""): weight.detach().cpu().clone() for name, weight in named}
    if isinstance(model, FSDPModule):
        state: Any = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        return state
    return model.state_dict()
