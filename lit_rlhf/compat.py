"""Everything in other libraries that lit_rlhf uses although it is private, undocumented, or the text of a message.

The only exception is ``_ddp_params_and_buffers_to_ignore``, an attribute of `AlignmentModule` that DDP reads. An
upgrade of a library may change any of this without notice. ``tests/test_compat.py`` tests that the installed versions
still behave as assumed here; a test that fails names the library. Libraries are imported inside the functions, so that
a part of lit_rlhf that uses one library does not import the others.
"""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import lightning
    import torch
    from lightning.pytorch.strategies import ModelParallelStrategy, Strategy
    from peft.tuners.lora import LoraLayer
    from torch import Tensor, nn
    from torch.distributed.fsdp import FSDPModule
    from transformers import PretrainedConfig, PreTrainedModel

# torch


def read_distributed_checkpoint(folder: Path, keys: set[str] | None = None) -> dict[str, Any]:
    """Read a ``torch.distributed.checkpoint`` folder, or only some keys of it, in one process, without a process group.

    Uses ``_EmptyStateDictLoadPlanner``, which takes names and shapes from the folder, and ``_load_state_dict``, which
    fills a nested dictionary. The public ``dcp_to_torch_save`` does the same, but writes a second copy to disk.
    """
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
    from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

    state: dict[str, Any] = {}
    _load_state_dict(state, FileSystemReader(folder), planner=_EmptyStateDictLoadPlanner(keys), no_dist=True)
    return state


def block_weight(weight: Tensor, rows: int) -> Tensor:
    """Copy a linear weight [O, I] into the blocked layout that oneDNN reads fastest for inputs of ``rows`` rows.

    Uses the operator ``mkldnn::_reorder_linear_weight``, which ``torch.compile`` applies on CPUs. The public
    ``to_mkldnn`` does not produce this layout.
    """
    import torch

    return torch.ops.mkldnn._reorder_linear_weight(weight, rows)


def multiply_by_blocks(weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    """Return x Wᵀ + b as [..., O], for ``x`` [..., I], ``weight`` W from `block_weight`, and ``bias`` b [O] or None.

    Uses the operator ``mkldnn::_linear_pointwise`` without a pointwise function.
    """
    import torch

    return torch.ops.mkldnn._linear_pointwise.default(x.to(weight.dtype), weight, bias, "none", [], "")


def materialize(model: nn.Module, device: torch.device) -> None:
    """Move a model to a device; its meta tensors, which hold no values, get uninitialized memory on that device.

    Uses ``Module._apply``, which FSDP2 overrides so that its shards follow the change; the public ``to_empty`` would
    also discard the values of the tensors that are not on the meta device. Parameters are swapped rather than replaced,
    so that tied parameters stay tied.
    """
    import torch

    swapped = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model._apply(lambda x: torch.empty_like(x, device=device) if x.is_meta else x.to(device))
    finally:
        torch.__future__.set_swap_module_params_on_conversion(swapped)


@contextmanager
def without_forward_hooks(module: FSDPModule, methods: Iterable[str]) -> Iterator[None]:
    """Return a context in which a module computes with the weights that it holds, without FSDP2's hooks.

    Removes the hooks in ``_forward_pre_hooks`` and ``_forward_hooks`` that belong to the object that
    ``_get_fsdp_state`` returns, and the wrappers of the named methods that ``register_fsdp_forward_method`` has set
    on the module; at the end of the context, puts everything back in the same order.
    """
    state, part = module._get_fsdp_state(), vars(module)
    hooks = [(entries, dict(entries)) for entries in (part["_forward_pre_hooks"], part["_forward_hooks"])]
    wrapped = {name: part.pop(name) for name in methods if name in part}
    for entries, before in hooks:
        for number, hook in before.items():
            if getattr(hook, "__self__", None) is state:
                del entries[number]
    try:
        yield
    finally:
        for entries, before in hooks:
            entries.clear()
            entries.update(before)
        part.update(wrapped)


def allow_variants(count: int) -> None:
    """Raise ``torch.compile``'s limit on the number of variants of each function to at least ``count``.

    Further variants run uncompiled. Sets ``torch._dynamo.config.recompile_limit``, because only newer versions of
    ``torch.compile`` have a public option for this.
    """
    import torch._dynamo.config as options

    options.recompile_limit = max(options.recompile_limit, count)


def tensors_without_memory() -> AbstractContextManager[Any]:
    """Return a context in which operations compute the shapes and data types of their results, but no values.

    Uses ``FakeTensorMode``. The public meta device is not enough: it has no autocast, and no attention kernel except
    the one that stores the scores of all pairs of tokens. The mode's logger is silenced, because it also reports
    errors that are raised anyway.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    logging.getLogger("torch._subclasses.fake_tensor").setLevel(logging.CRITICAL)
    return FakeTensorMode(allow_non_fake_inputs=True)


def watch_results(seen: Callable[[Tensor], None]) -> AbstractContextManager[Any]:
    """Return a context in which a function is called with every tensor that an operation returns.

    Uses ``TorchDispatchMode``, which also sees the operations of the backward pass.
    """
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            results = func(*args, **(kwargs or {}))
            for result in tree_leaves(results):
                if isinstance(result, torch.Tensor):
                    seen(result)
            return results

    return Watch()


LOST_PEER = ("Connection closed by peer", "Connection reset by peer", "remote process exited")
"""Phrases with which gloo, the operating system and NCCL report a lost process in a collective's RuntimeError."""

LEAF_SPEC_WARNING = r".*`isinstance\(treespec, LeafSpec\)`.*"
"""The pattern of torch's warning about a deprecated class that Lightning still uses."""

# Lightning

METADATA_FILE = "meta.pt"
"""The file in a distributed checkpoint that holds all but weights and optimizer state; Lightning writes it last."""


def validation_is_due(trainer: lightning.Trainer) -> bool:
    """Return whether Lightning will validate after the current training batch; call this in ``on_train_batch_end``.

    Uses ``_should_check_val_fx`` of the epoch loop and ``_data_fetcher`` of the fit loop, as Lightning itself does.
    """
    loop: Any = trainer.fit_loop
    return any(trainer.num_val_batches) and bool(loop.epoch_loop._should_check_val_fx(loop._data_fetcher))


def strategy_of(module: lightning.LightningModule) -> Strategy | None:
    """Return the strategy of a module's Trainer, or None if the module has no Trainer.

    Relies on the RuntimeError that ``LightningModule.trainer`` raises in a module without a Trainer.
    """
    try:
        return module.trainer.strategy
    except RuntimeError:
        return None


def no_gradient_sync(strategy: Strategy) -> AbstractContextManager[Any]:
    """Return a context in which DDP does not average gradients; the context has no effect under other strategies.

    Uses ``block_backward_sync``, which only some strategies have.
    """
    blocked = getattr(strategy, "block_backward_sync", nullcontext)
    return blocked()


def shard_over_all_processes(strategy: ModelParallelStrategy) -> None:
    """Set a strategy's data-parallel size to the number of processes, which its constructor did not know.

    Sets ``_data_parallel_size``, which ``ModelParallelStrategy.setup_environment`` reads.
    """
    strategy._data_parallel_size = strategy.num_nodes * strategy.num_processes


def set_device(module: lightning.LightningModule, device: torch.device) -> None:
    """Set ``module.device`` without moving the module's weights, which are offloaded to the CPU.

    Sets ``_device``; the public ``to`` would move the weights too.
    """
    module._device = device


ADVERTISING_LOGGERS = (
    "lightning.pytorch.utilities.rank_zero",
    "lightning.pytorch.trainer.connectors.checkpoint_connector",
)
"""The loggers of the messages in `ADVERTISEMENTS`; if Lightning renames a logger, its messages are shown."""

ADVERTISEMENTS = (
    "\N{ELECTRIC LIGHT BULB}",
    "TPU available",
    "GPU available",
    "`weights_only` was not set",
    "`Trainer.fit` stopped",
)
"""The beginnings of those Lightning messages that are hidden because they do not concern the user."""

INAPPLICABLE_WARNINGS = (
    r".*does not have many workers.*",
    r".*LightningCLI's args parameter.*",
    r".*module\(s\) in eval mode.*",
    r".*Total length of `list` across ranks is zero.*",
    r".*It is recommended to use `self\.log\(.*sync_dist=True.*",
)
"""The patterns of Lightning's warnings about what is intended here, such as modules in eval mode or no validation set.

The last warning concerns runs on several processes, where the modules log metrics that are already reduced.
"""

LONG_VAL_CHECK_INTERVAL = "`val_check_interval` ("
"""The beginning of Lightning's message that an epoch has fewer batches than ``val_check_interval``."""


def hide_inapplicable_warnings() -> None:
    """Ignore the warnings that match `INAPPLICABLE_WARNINGS`."""
    for message in INAPPLICABLE_WARNINGS:
        warnings.filterwarnings("ignore", message=message)


# argparse and jsonargparse


def option_names(parser: Any) -> list[str]:
    """Return the long options of a parser and its subcommands, without the leading dashes.

    Uses argparse's ``_actions`` and jsonargparse's ``_subcommands_action``; neither library lists the options publicly.
    """
    commands = getattr(parser._subcommands_action, "choices", None) or {}
    actions = [action for p in (parser, *commands.values()) for action in p._actions]
    return list(dict.fromkeys(o[2:] for action in actions for o in action.option_strings if o.startswith("--")))


def prefer_integers(parser: Any) -> None:
    """Make a parser read 1 as an integer for those options that accept an integer, a float or None.

    ``typing`` caches unions without regard to their order: if any library has used ``Union[float, int]`` before,
    Lightning's ``Union[int, float]`` is that union, too, and ``--trainer.limit_train_batches 1`` would mean 1.0, which
    is all batches. Sets the ``_typehint`` of jsonargparse's ``_actions``.
    """
    for action in parser._actions:
        if getattr(action, "_typehint", None) == int | float | None:
            action._typehint = int | float | None


PARSER_KEY = re.compile(r'Parser key "([^"]+)"')
"""The pattern of the key at one level of a nested message; the keys of all levels, joined by dots, name the option."""

REFUSED_CLASS = re.compile(r"Problem with given class_path '([^']+)'")
"""The pattern of a class whose options are refused; a message may name several such classes, the innermost last."""

REFUSED_CALLABLE = re.compile(r"Got value: Namespace\(class_path='([^']+)'")
"""The pattern of an optimizer class or a schedule class whose options are refused, where a callable is expected."""

UNKNOWN_OPTION = (
    re.compile(r"Group '(?P<group>[^']+)' does not accept option '(?P<name>[^']+)'"),
    re.compile(r"(?:Option|option) '(?P<group>)(?P<name>[^']+)'"),
    re.compile(r"[Uu]nrecognized arguments: (?:--)?(?P<group>)(?P<name>[^\s=]+)"),
    re.compile(r"Key '(?P<group>)(?P<name>[^']+)' is not expected"),  # in older versions of jsonargparse
)
"""The patterns of an option that does not exist, with its group if the message names the group."""

UNKNOWN_CLASS = re.compile(r"Expected a dot import path string: (\S+)")
"""The pattern of a class that does not exist."""

OPTIONS_OR_NULL = re.compile(r"Subtypes: \[<class '(lit_rlhf\.[^']+)'>, <class 'NoneType'>\]")
"""The pattern of the dataclass of an option that accepts either this dataclass's options or null."""

ABSTRACT_CLASS = re.compile(r"Expected an instantiatable class, but (\S+) is abstract")
"""The pattern of an abstract class, in the message about such a class and about options given without a class."""

MISSING_OPTION = re.compile(r"arguments are required: ([\w.]+)")
"""The pattern of a required option that is not given: ``SUBCOMMAND.NAME``, or its name in the class that needs it."""

UNKNOWN_COMMAND = re.compile(r"invalid choice: '?([^' ]+)'? \(choose from ([^)]+)\)")
"""The pattern of a subcommand that does not exist, and of the subcommands that do."""

CHOICE_EXPECTED = re.compile(
    r"Expected a typing\.Literal\[(.+?)\](?:\. Got value: |(?:\n.*)*?\n\s*Given value: )(.*)"  # the latter for a union
)
"""The pattern of the choices of an option, and of the value found."""

TYPE_EXPECTED = re.compile(r"Expected an? <class '([^']+)'>\. Got value: (.*)")
"""The pattern of the type of an option, and of the value found."""

UNION_MEMBER = re.compile(r"Expected an? <class '([^']+)'>")
"""The pattern of one of the types that a union accepts."""

GIVEN_VALUE = re.compile(r"Given value: (.+?)(?:\. Got value.*)?$", re.MULTILINE)
"""The pattern of a value that no type of a union accepts."""

WRONG_TYPE = ("Expected", "Type typing.Callable")
"""The beginnings of a line about a value of the wrong type; the second is for an optimizer or a schedule."""

REMARK = re.compile(
    r"^(Does not validate against|Subtypes:|Errors:|Given value|Expected a <class 'NoneType'>|Expected a path but"
    r"|Subclass types expect|a class path|a dict with|Parser key|Problem with given class_path|\(class path)"
)
"""The pattern of the beginnings of lines that name neither the mistake nor the remedy."""

# datasets

NO_RECORDS = "corresponds to no data"
"""A phrase in the ValueError that ``load_dataset`` raises for a file without records."""

# transformers


def attention_of(config: PretrainedConfig) -> str:
    """Return the name of a model's attention implementation, such as ``sdpa``.

    Uses ``config._attn_implementation``, because ``set_attn_implementation`` has no public counterpart that reads
    the name.
    """
    return config._attn_implementation


def attention_can_be_set(model: PreTrainedModel) -> bool:
    """Return whether a model computes its attention through transformers' ``AttentionInterface``.

    Uses ``_can_set_attn_implementation``; for other models ``set_attn_implementation`` only logs a warning.
    """
    return model._can_set_attn_implementation()


def decoder_layer_names(model: PreTrainedModel) -> set[str]:
    """Return the class names of a model's decoder layers, or an empty set if the model does not declare them.

    Uses ``_no_split_modules``, the layers that must not be split across devices.
    """
    return set(model._no_split_modules or ())


# bitsandbytes


def keep_4_bit_layout(layer: Any) -> None:
    """Keep the weight of a 4-bit layer in the layout for which bitsandbytes has a backward pass.

    Sets ``support_avx512bf16_for_cpu`` to False. Otherwise, on a CPU with bfloat16 instructions, the first forward pass
    in eval mode would repack the weight and round its scales to bfloat16, and no gradient would pass through it again.
    """
    layer.support_avx512bf16_for_cpu = False


# peft


def selected_adapters(layer: LoraLayer) -> tuple[str, ...]:
    """Return the names of the adapters whose outputs a layer adds; an empty tuple if its adapters are off."""
    return () if layer.disable_adapters else tuple(layer.active_adapters)


def select_adapters(layers: Iterable[LoraLayer], adapters: Iterable[str]) -> None:
    """Make layers add the outputs of only the named adapters, in this order, or of no adapter if none is named.

    Sets ``_active_adapter`` and ``_disable_adapters``, because the public ``set_adapter`` and ``enable_adapters`` also
    change which parameters are trained, while these layers serve several roles in each step.
    """
    names = list(adapters)
    for layer in layers:
        layer._active_adapter = names or layer._active_adapter
        layer._disable_adapters = not names


def share_inputs(layers: Iterable[LoraLayer]) -> None:
    """Make adapters take their layers' inputs without a cast, so that an input that layers share is saved only once.

    Otherwise, peft casts a bfloat16 input to float32, the data type of the adapter's weights, and autocast casts the
    result back to bfloat16, so that each layer saves its own copy for the backward pass. Layers with DoRA still cast
    their inputs, because they compute the norms of their weights in the input's precision. Sets
    ``cast_input_dtype_enabled``, as peft's ``disable_input_dtype_casting`` does temporarily.
    """
    for layer in layers:
        layer.cast_input_dtype_enabled = bool(layer.lora_variant)
