"""The strategies ``fsdp2`` and ``fsdp``, which shard models over processes; Lightning's ``ddp`` works as well.

The option ``--trainer.strategy`` selects a strategy by name. Importing this module registers the names with Lightning,
and replaces Lightning's ``ddp`` with one in which the gradients are views of the buckets that DDP reduces.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy, StrategyRegistry
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_optimizer_state_dict
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecision, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from lit_rlhf.checkpoint_folders import checksum, write_checksums
from lit_rlhf.checkpoints import by_name, check_belongs, read_checkpoint, read_plain, shapes_in, verify
from lit_rlhf.compat import METADATA_FILE, set_device, shard_over_all_processes
from lit_rlhf.errors import UserError
from lit_rlhf.files import flush_entry, remove
from lit_rlhf.models.sharding import shard, wrap


class FSDP2(ModelParallelStrategy):
    """A strategy that shards each model's weights, gradients and optimizer state over all processes (FSDP2).

    In training, a decoder layer's weights are gathered only while the layer computes; in decoding and scoring, the
    weights of the whole model are gathered. With ``--trainer.precision bf16-mixed``, weights are gathered and
    multiplied in bfloat16, while gradients are reduced and weights updated in float32.

    Args:
        cpu_offload: Whether to store and update the shards in CPU memory.
        save_distributed_checkpoint: If True, each process writes its shard into a folder; if False, process 0 writes
            one file.

    >>> FSDP2(cpu_offload=True).cpu_offload
    True

    In a configuration, ``fsdp2`` selects the default options; other options need the class::

        trainer:
          strategy: {class_path: lit_rlhf.FSDP2, init_args: {cpu_offload: true}}
    """

    def __init__(self, cpu_offload: bool = False, save_distributed_checkpoint: bool = True) -> None:
        both = "cpu:gloo,cuda:nccl" if cpu_offload and torch.cuda.is_available() else None  # gradient norms on the CPU
        super().__init__(
            tensor_parallel_size=1, save_distributed_checkpoint=save_distributed_checkpoint, process_group_backend=both
        )
        self.cpu_offload = cpu_offload
        self.saves_folders = save_distributed_checkpoint

    def setup_environment(self) -> None:
        """Start the communication between the processes, with a device mesh that spans all of them."""
        shard_over_all_processes(self)
        super().setup_environment()

    def shard(self, model: nn.Module) -> nn.Module:
        """Shard a model over the processes, in place, and return it."""
        precision = self.precision_plugin.precision
        options: dict[str, Any] = {"mesh": self.device_mesh["data_parallel"]}
        if precision == "bf16-mixed":
            options["mp_policy"] = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        if self.cpu_offload:
            options["offload_policy"] = CPUOffloadPolicy(pin_memory=torch.cuda.is_available())
        return shard(model, **options)

    def model_to_device(self) -> None:
        """Move everything except offloaded shards to this process's device."""
        if not self.cpu_offload:
            super().model_to_device()
            return
        assert self.model is not None
        for tensor in (*self.model.parameters(), *self.model.buffers()):
            if not isinstance(tensor, DTensor):
                tensor.data = tensor.data.to(self.root_device)
        if self.lightning_module is not None:
            set_device(self.lightning_module, self.root_device)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Return an optimizer's state for a checkpoint, which is at step 0 if the optimizer has not stepped yet.

        To know the state's tensors, torch makes an optimizer without a state step once, with a learning rate and
        gradients of 0, which would count as the first step in the bias correction of Adam.
        """
        has_stepped = bool(optimizer.state)
        saved = super().optimizer_state(optimizer)
        if not has_stepped:
            for state in (*optimizer.state.values(), *saved.get("state", {}).values()):
                if "step" in state:
                    state["step"] = state["step"] * 0
        return saved

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        """Write a checkpoint with its checksums; a folder gets its name only when it is complete and on the disk."""
        if not self.saves_folders:
            super().save_checkpoint(checkpoint, filepath, storage_options)
            return
        path = Path(self.broadcast(filepath))
        part = path.with_name(f".{path.name}.new")
        if self.is_global_zero:
            remove(part)
        self.barrier()
        super().save_checkpoint(checkpoint, part, storage_options)
        own = [*part.glob(f"__{self.global_rank}_*")]
        own += [part / METADATA_FILE, part / ".metadata"] if self.is_global_zero else []
        checksums = [{file.name: checksum(file) for file in own}]
        for file in own:
            flush_entry(file)
        if self.world_size > 1:
            checksums *= self.world_size
            torch.distributed.all_gather_object(checksums, checksums[0])
        if self.is_global_zero:
            write_checksums(part, {name: value for some in checksums for name, value in some.items()})
            remove(path)
            part.rename(path)
            flush_entry(path.parent)
        self.barrier()

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Load a checkpoint saved by any number of processes: a folder, or a file that any strategy wrote.

        Raises:
            UserError: if the checkpoint is damaged, incomplete, not a checkpoint, or one of another module or model;
                every process then raises it.
        """
        path = Path(self.broadcast(checkpoint_path))
        assert self.lightning_module is not None
        with self._refused_by_all():  # before any process reads what another one has to verify
            if path.is_dir():
                verify(path, self.global_rank, self.world_size)
        with self._refused_by_all():
            if path.is_dir():
                check_belongs(self.lightning_module, read_plain(path / METADATA_FILE, path), shapes_in(path), path)
            else:
                checkpoint = read_checkpoint(path)
                shapes = {name: value.shape for name, value in checkpoint["state_dict"].items()}
                check_belongs(self.lightning_module, checkpoint, shapes, path)
        if path.is_dir():
            try:
                return super().load_checkpoint(path, weights_only=True)
            except CheckpointException as error:
                first, _ = next(iter(error.failures.values()))
                raise UserError(f"ckpt_path: the checkpoint does not fit this run's options: {first}") from error
        assert self.model is not None
        here = self.model.state_dict()
        weights = {name: _like(value, here.get(name)) for name, value in checkpoint.pop("state_dict").items()}
        self.model.load_state_dict(weights, strict=self.lightning_module.strict_loading)
        for optimizer, state in zip(self.optimizers, checkpoint.get("optimizer_states", []), strict=False):
            named = by_name(state, _names(self.model, optimizer))
            options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
            set_optimizer_state_dict(self.model, optimizer, optim_state_dict=named, options=options)
        return checkpoint

    @contextmanager
    def _refused_by_all(self) -> Iterator[None]:
        """Return a context in which a `UserError` of one process is raised on all of them at the end."""
        message = ""
        try:
            yield
        except UserError as error:
            message = str(error)
        messages = [message] * self.world_size
        if self.world_size > 1:
            torch.distributed.all_gather_object(messages, message)
        if any(messages):
            raise UserError(max(messages, key=bool))


def _like(whole: torch.Tensor, there: torch.Tensor | None) -> torch.Tensor:
    """Shard a full tensor like another tensor; return it unchanged if the other tensor is not sharded."""
    if not isinstance(there, DTensor):
        return whole
    return distribute_tensor(whole.to(there.device), there.device_mesh, there.placements)


def _names(model: nn.Module, optimizer: Optimizer) -> list[list[str]]:
    """Return the names of the parameters in each of an optimizer's parameter groups."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    return [[names[parameter] for parameter in group["params"]] for group in optimizer.param_groups]


class FSDP(FSDPStrategy):
    """A strategy that shards with FSDP1 and saves a checkpoint as one file; use `FSDP2` unless FSDP1 is required.

    >>> FSDP().sharding_strategy.name
    'FULL_SHARD'
    """

    def __init__(self) -> None:
        super().__init__(state_dict_type="full")

    def setup_environment(self) -> None:
        """Start the communication between the processes, and preserve the data types of batches and buffers.

        Lightning would cast the buffers, and would raise an error for the batches, which it cannot cast because they
        are frozen dataclasses. Autocast works as in Lightning's other strategies: on the device of the models, and
        without a cache of cast weights, which would be outdated after an optimizer step within the same training step.
        """
        super().setup_environment()
        for name in ("convert_input", "convert_module"):
            setattr(self.precision_plugin, name, lambda it: it)
        if self.precision_plugin.precision == "bf16-mixed":
            context = partial(torch.autocast, self.root_device.type, dtype=torch.bfloat16, cache_enabled=False)
            vars(self.precision_plugin)["forward_context"] = context  # takes precedence over the class's method

    def shard(self, model: nn.Module) -> nn.Module:
        """Shard a model over the processes, and return the wrapped model."""
        options: dict[str, Any] = {"sharding_strategy": self.sharding_strategy}
        if self.precision_plugin.precision == "bf16-mixed":
            options["mixed_precision"] = MixedPrecision(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        return wrap(model, device_id=self.root_device, **options)

    def setup(self, trainer: lightning.Trainer) -> None:
        """Move everything except the shards to this process's device; `shard` has already wrapped the models."""
        assert self.model is not None
        self.model.to(self.root_device)
        super().setup(trainer)


StrategyRegistry.register("fsdp", FSDP, description="sharded over all processes by FSDP1", override=True)
StrategyRegistry.register("fsdp2", FSDP2, description="sharded over all processes by FSDP2")
# the gradients are views of the buckets that DDP reduces; otherwise, the buckets would be a second copy of them
StrategyRegistry.register(
    "ddp", DDPStrategy, description="a copy on every process", override=True, gradient_as_bucket_view=True
)
