"""Everything lit_rlhf relies on in other libraries that is private, undocumented, or an English message.

An upgrade may change any of it without notice. ``tests/test_compat.py`` has a test of each, which fails with the
library's name. Libraries are imported inside the functions, because some parts of lit_rlhf use only one of them.
"""

from __future__ import annotations

import re
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import lightning
    import torch
    from lightning.pytorch.strategies import ModelParallelStrategy, Strategy
    from torch import Tensor
    from transformers import PretrainedConfig, PreTrainedModel

# torch


def read_distributed_checkpoint(folder: Path) -> dict[str, Any]:
    """Read a whole folder of ``torch.distributed.checkpoint`` in one process, without a process group.

    Uses ``_EmptyStateDictLoadPlanner``, which takes names and shapes from the folder, and ``_load_state_dict``, which
    fills a nested dictionary. The public ``dcp_to_torch_save`` does the same, but writes a second copy to disk.
    """
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
    from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

    state: dict[str, Any] = {}
    _load_state_dict(state, FileSystemReader(folder), planner=_EmptyStateDictLoadPlanner(), no_dist=True)
    return state


def block_weight(weight: Tensor, rows: int) -> Tensor:
    """Copy a linear layer's weight [O, I] into the blocks that oneDNN reads fastest for inputs of this many rows.

    Uses the operator ``mkldnn::_reorder_linear_weight``, which ``torch.compile`` applies on CPUs. The public
    ``to_mkldnn`` does not make blocks.
    """
    import torch

    return torch.ops.mkldnn._reorder_linear_weight(weight, rows)


def multiply_by_blocks(weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    """Return x Wᵀ + b, [..., I] → [..., O], for a weight of `block_weight`.

    Uses the operator ``mkldnn::_linear_pointwise`` without a pointwise function.
    """
    import torch

    return torch.ops.mkldnn._linear_pointwise.default(x.to(weight.dtype), weight, bias, "none", [], "")


LOST_PEER = ("Connection closed by peer", "Connection reset by peer", "remote process exited")
"""Phrases in the RuntimeError of a collective that lost another process: gloo's, the operating system's, NCCL's."""

LEAF_SPEC_WARNING = r".*`isinstance\(treespec, LeafSpec\)`.*"
"""Torch's warning about a class that Lightning still uses."""

# Lightning

METADATA_FILE = "meta.pt"
"""In a distributed checkpoint: everything except weights and optimizer state; Lightning writes it last."""


def validation_is_due(trainer: lightning.Trainer) -> bool:
    """Return whether Lightning will validate after the current training batch, for ``on_train_batch_end``.

    Uses ``_should_check_val_fx`` of the epoch loop and ``_data_fetcher`` of the fit loop: Lightning decides there.
    """
    loop: Any = trainer.fit_loop
    return any(trainer.num_val_batches) and bool(loop.epoch_loop._should_check_val_fx(loop._data_fetcher))


def strategy_of(module: lightning.LightningModule) -> Strategy | None:
    """Return the strategy of a module's Trainer, None if the module has no Trainer.

    Relies on the RuntimeError that ``LightningModule.trainer`` raises without one.
    """
    try:
        return module.trainer.strategy
    except RuntimeError:
        return None


def no_gradient_sync(strategy: Strategy) -> AbstractContextManager[Any]:
    """Return a context in which DDP does not average gradients; it changes nothing for other strategies.

    Uses ``block_backward_sync``, which only some strategies have.
    """
    blocked = getattr(strategy, "block_backward_sync", nullcontext)
    return blocked()


def shard_over_all_processes(strategy: ModelParallelStrategy) -> None:
    """Set the data-parallel size to the number of processes, which is not known when the strategy is constructed.

    Sets ``_data_parallel_size``, which ``ModelParallelStrategy.setup_environment`` reads.
    """
    strategy._data_parallel_size = strategy.num_nodes * strategy.num_processes


def set_device(module: lightning.LightningModule, device: torch.device) -> None:
    """Set ``module.device`` without moving the weights, which are offloaded to the CPU.

    Sets ``_device``; the public ``to`` would move the weights too.
    """
    module._device = device


ADVERTISING_LOGGERS = (
    "lightning.pytorch.utilities.rank_zero",
    "lightning.pytorch.trainer.connectors.checkpoint_connector",
)
"""Loggers of the messages below; one that is renamed makes the command noisier."""

ADVERTISEMENTS = ("\N{ELECTRIC LIGHT BULB}", "TPU available", "GPU available", "`weights_only` was not set")
"""How Lightning's messages begin that do not concern the user."""

INAPPLICABLE_WARNINGS = (
    r".*does not have many workers.*",
    r".*LightningCLI's args parameter.*",
    r".*module\(s\) in eval mode.*",
    r".*Total length of `list` across ranks is zero.*",
)
"""Lightning's warnings about what is intended here: records in memory, dropout off, no validation set."""

# argparse and jsonargparse


def option_names(parser: Any) -> list[str]:
    """Return the long options of a parser and its subcommands, without dashes.

    Uses argparse's ``_actions`` and jsonargparse's ``_subcommands_action``; neither has a public list.
    """
    commands = getattr(parser._subcommands_action, "choices", None) or {}
    actions = [action for p in (parser, *commands.values()) for action in p._actions]
    return list(dict.fromkeys(o[2:] for action in actions for o in action.option_strings if o.startswith("--")))


PARSER_KEY = re.compile(r'Parser key "([^"]+)"')
"""A level of a nested message; all of them together are the option's path."""

REFUSED_CLASS = re.compile(r"Problem with given class_path '([^']+)'")
"""A class whose options are refused; a message may contain several, the innermost last."""

REFUSED_CALLABLE = re.compile(r"Got value: Namespace\(class_path='([^']+)'")
"""The same for an optimizer or a schedule, whose annotation is a callable."""

UNKNOWN_OPTION = (
    re.compile(r"Group '(?P<group>[^']+)' does not accept option '(?P<name>[^']+)'"),
    re.compile(r"(?:Option|option) '(?P<group>)(?P<name>[^']+)'"),
    re.compile(r"[Uu]nrecognized arguments: (?:--)?(?P<group>)(?P<name>[^\s=]+)"),
    re.compile(r"Key '(?P<group>)(?P<name>[^']+)' is not expected"),  # of older versions
)
"""How an option that does not exist is refused."""

UNKNOWN_CLASS = re.compile(r"Expected a dot import path string: (\S+)")
"""A class that does not exist."""

ABSTRACT_CLASS = re.compile(r"Expected an instantiatable class, but (\S+) is abstract")
"""An abstract class, or options of a class that is not named."""

MISSING_OPTION = re.compile(r"arguments are required: (?:\w+\.)?(\w+)")
"""An option that must be given; the subcommand before the dot is left out."""

UNKNOWN_COMMAND = re.compile(r"invalid choice: '?([^' ]+)'? \(choose from ([^)]+)\)")
"""A subcommand that does not exist, and those that do."""

CHOICE_EXPECTED = re.compile(r"Expected a typing\.Literal\[(.+?)\]\. Got value: (.*)")
"""The choices, and the value found."""

TYPE_EXPECTED = re.compile(r"Expected an? <class '([^']+)'>\. Got value: (.*)")
"""The type of an option, and the value found."""

UNION_MEMBER = re.compile(r"Expected an? <class '([^']+)'>")
"""One of the types that a union accepts."""

GIVEN_VALUE = re.compile(r"Given value: (.+?)(?:\. Got value.*)?$", re.MULTILINE)
"""The value that no type of a union accepts."""

WRONG_TYPE = ("Expected", "Type typing.Callable")
"""How the line about a value of a wrong type begins; the second is for an optimizer or a schedule."""

REMARK = re.compile(
    r"^(Does not validate against|Subtypes:|Errors:|Given value|Expected a <class 'NoneType'>|Expected a path but"
    r"|Subclass types expect|a class path|a dict with|Parser key|Problem with given class_path|\(class path)"
)
"""Lines that name neither the mistake nor the remedy."""

# datasets

NO_RECORDS = "corresponds to no data"
"""In the message of the ValueError that ``load_dataset`` raises for a file without records."""

# transformers


def attention_of(config: PretrainedConfig) -> str:
    """Return the name of a model's attention implementation, ``sdpa`` for example.

    Uses ``config._attn_implementation``: ``set_attn_implementation`` has no public getter.
    """
    return config._attn_implementation


def attention_can_be_set(model: PreTrainedModel) -> bool:
    """Return whether a model computes its attention through transformers' ``AttentionInterface``.

    Uses ``_can_set_attn_implementation``; for other models ``set_attn_implementation`` only logs a warning.
    """
    return model._can_set_attn_implementation()


def decoder_layer_names(model: PreTrainedModel) -> set[str]:
    """Return the class names of a model's decoder layers, an empty set if it does not name them.

    Uses ``_no_split_modules``, the layers that must not be split across devices.
    """
    return set(model._no_split_modules or ())
