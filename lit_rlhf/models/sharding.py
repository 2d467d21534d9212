"""Models whose weights, gradients and optimizer state are sharded over processes."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel, fully_shard, register_fsdp_forward_method
from transformers import PreTrainedModel

from lit_rlhf.compat import decoder_layer_names, without_forward_hooks
from lit_rlhf.models.adapters import AdaptedTrunk

FORWARD_METHODS = ("next_logits", "hidden", "run_trunk")
"""The names of methods besides ``forward`` that compute with a model's weights."""


def decoder_layers(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the decoder layers of all transformers models within a module, each layer once."""
    seen: set[int] = set()
    for model in module.modules():
        names = decoder_layer_names(model) if isinstance(model, PreTrainedModel) else set()
        for layer in model.modules() if names else ():
            kinds = {kind.__name__ for kind in type(layer).__mro__}  # FSDP2 replaces a layer's class by a subclass
            if kinds & names and id(layer) not in seen:
                seen.add(id(layer))
                yield layer


def shard(model: nn.Module, **options: Any) -> nn.Module:
    """Shard a model with FSDP2 in place, and return it.

    Each decoder layer is one unit, and the rest of the model is another.

    Args:
        model: An actor, critic or reward model.
        options: Options of `torch.distributed.fsdp.fully_shard`, such as the mesh, the precision and offloading.
    """
    for layer in list(decoder_layers(model)):
        fully_shard(layer, **options)
    fully_shard(model, **options)
    for name in FORWARD_METHODS:
        if hasattr(model, name):
            register_fsdp_forward_method(model, name)
    return model


def wrap(model: nn.Module, **options: Any) -> nn.Module:
    """Shard a model with FSDP1: wrap each decoder layer and the model itself, and return the wrapped model.

    Args:
        model: An actor, critic or reward model.
        options: Options of `torch.distributed.fsdp.FullyShardedDataParallel`.
    """
    layers = {id(layer) for layer in decoder_layers(model)}
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if id(child) in layers:
                setattr(parent, name, ShardedByFSDP1(child, use_orig_params=True, **options))
    return ShardedByFSDP1(model, use_orig_params=True, **options)


class ShardedByFSDP1(FullyShardedDataParallel):
    """A module sharded with FSDP1 that can also compute with the full weights, inside `unsharded`."""

    holds_full_weights = False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the wrapped module's output, without communication if this process holds the full weights."""
        if self.holds_full_weights:
            return self.module(*args, **kwargs)
        return super().forward(*args, **kwargs)


@contextmanager
def unsharded(*models: nn.Module | None) -> Iterator[None]:
    """Hold the full weights of the given models on every process inside this context.

    Forward passes then need no communication, so each process may run a different number of them. Only forward passes
    without gradients are allowed, such as decoding, scoring and validation. All processes must enter the context
    together. Models that are not sharded stay as they are. If a model is already in such a context, this one changes
    nothing for that model; its full weights are held until the outer context ends.
    """
    found = [part for model in models if model is not None for part in (model, *owners(model))]
    with ExitStack() as stack:
        for model in dict.fromkeys(found):
            stack.enter_context(_held(model))
        yield


def owners(model: nn.Module) -> list[nn.Module]:
    """Return the owners of the bases that a model uses through an `AdaptedTrunk`; an empty list if it uses none."""
    return [part.owner for part in model.modules() if isinstance(part, AdaptedTrunk)]


_gathered: ContextVar[frozenset[nn.Module]] = ContextVar("gathered", default=frozenset())


@contextmanager
def _held(model: nn.Module) -> Iterator[None]:
    """Hold a model's full weights inside this context; do nothing if an outer context already holds them."""
    before = _gathered.get()
    gather = _unsharded if isinstance(model, FSDPModule) else _summoned
    if model in before or not is_sharded(model):
        yield
        return
    token = _gathered.set(before | {model})
    try:
        with gather(model):
            yield
    finally:
        _gathered.reset(token)


@contextmanager
def _unsharded(model: Any) -> Iterator[None]:
    """Hold an FSDP2 model's full weights inside this context, in which FSDP2's own forward hooks are removed.

    These hooks take longer than the forward pass of a small layer.
    """
    parts = [part for part in model.modules() if isinstance(part, FSDPModule)]
    for part in parts:
        part.unshard()
    try:
        with ExitStack() as stack:
            for part in parts:
                stack.enter_context(without_forward_hooks(part, FORWARD_METHODS))
            yield
    finally:
        for part in parts:
            part.reshard()


@contextmanager
def _summoned(model: Any) -> Iterator[None]:
    """Gather an FSDP1 model's full weights, rounded as for FSDP1's own forward passes, inside this context.

    Autocast then has nothing left to round; otherwise, its cache would keep rounded weights after an update. Each
    process then holds the gathered weights and their rounded copies: 6 bytes per parameter in half precision.
    """
    dtype, parts = (
        model.mixed_precision.param_dtype,
        [part for part in model.modules() if isinstance(part, ShardedByFSDP1)],
    )
    with FullyShardedDataParallel.summon_full_params(model, writeback=False):
        for weight in model.parameters() if dtype is not None else ():
            weight.data = weight.data.to(dtype)
        for part in parts:
            part.holds_full_weights = True
        try:
            yield
        finally:
            for part in parts:
                part.holds_full_weights = False


def is_sharded(model: nn.Module) -> bool:
    """Return whether each process holds only a shard of the model's weights."""
    return isinstance(model, FSDPModule | FullyShardedDataParallel)


def full_state_dict(model: nn.Module, trained_only: bool = False) -> dict[str, Tensor]:
    """Return the model's ``state_dict`` with full weights; with FSDP1, without buffers.

    For a sharded model, the result is in CPU memory on process 0 and empty on the other processes, and all processes
    must call this function together.

    Args:
        model: The model.
        trained_only: Whether to leave out frozen weights, such as the weights of a base with adapters, and, if the
            model is not sharded, the buffers; ignored with FSDP1.
    """
    if isinstance(model, FullyShardedDataParallel):
        with FullyShardedDataParallel.summon_full_params(model, writeback=False, rank0_only=True):
            named = [*model.named_parameters(remove_duplicate=False)] if torch.distributed.get_rank() == 0 else []
            return {name: weight.detach().cpu().clone() for name, weight in named}
    if isinstance(model, FSDPModule):
        options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=trained_only)
        state: Any = get_model_state_dict(model, options=options)
        return state
    if trained_only:
        return {name: weight.detach() for name, weight in model.named_parameters() if weight.requires_grad}
    return model.state_dict()
