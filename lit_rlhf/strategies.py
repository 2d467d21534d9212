"""How the models lie on many processes: ``ddp`` (Lightning's own), ``fsdp2`` and ``fsdp``, by ``--trainer.strategy``.

Importing this module makes the names known to Lightning.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy, StrategyRegistry
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_optimizer_state_dict
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecision, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from lit_rlhf.checkpoints import by_name, read_checkpoint, remove
from lit_rlhf.models.sharding import shard, wrap


class FSDP2(ModelParallelStrategy):
    """Every process holds its share of each model's weights, gradients and optimizer state (FSDP2).

    A decoder layer's weights are gathered while it computes; all of a model's while it decodes or judges. With
    ``--trainer.precision bf16-mixed`` weights are gathered and multiplied in bfloat16, and gradients added up and
    weights updated in float32.

    Args:
        cpu_offload: Keep the shares in the CPU's memory, and update them there.
        save_distributed_checkpoint: Each process writes its share into a folder; False: process 0 writes one file.
    """

    def __init__(self, cpu_offload: bool = False, save_distributed_checkpoint: bool = True) -> None:
        both = "cpu:gloo,cuda:nccl" if cpu_offload and torch.cuda.is_available() else None  # norms of what is offloaded
        super().__init__(
            tensor_parallel_size=1, save_distributed_checkpoint=save_distributed_checkpoint, process_group_backend=both
        )
        self.cpu_offload = cpu_offload

    def setup_environment(self) -> None:
        """Every process is a share."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def shard(self, model: nn.Module) -> nn.Module:
        """Spread a model over the processes, in place."""
        precision = self.precision_plugin.precision
        options: dict[str, Any] = {"mesh": self.device_mesh["data_parallel"]}
        if precision == "bf16-mixed":
            options["mp_policy"] = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        if self.cpu_offload:
            options["offload_policy"] = CPUOffloadPolicy(pin_memory=torch.cuda.is_available())
        return shard(model, **options)

    def model_to_device(self) -> None:
        """All that is not offloaded."""
        if not self.cpu_offload:
            super().model_to_device()
            return
        assert self.model is not None
        for tensor in (*self.model.parameters(), *self.model.buffers()):
            if not isinstance(tensor, DTensor):
                tensor.data = tensor.data.to(self.root_device)
        if self.lightning_module is not None:
            self.lightning_module._device = self.root_device  # as .to() would have it

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        """A folder takes an older one's place when it is whole."""
        if not self._save_distributed_checkpoint:
            super().save_checkpoint(checkpoint, filepath, storage_options)
            return
        path = Path(self.broadcast(filepath))
        # while neither has its name, Lightning takes the old one for the last: its name begins like it
        part, old = path.with_name("being-written"), path.with_name(f"{path.name}.old")
        if self.is_global_zero:
            remove(part)
            remove(old)
        self.barrier()
        super().save_checkpoint(checkpoint, part, storage_options)
        if self.is_global_zero:
            if path.exists():
                path.rename(old)
            part.rename(path)
            remove(old)
        self.barrier()

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """A folder, or one file of any strategy, whatever the number of processes it was saved on."""
        path = Path(self.broadcast(checkpoint_path))
        if path.is_dir():
            return super().load_checkpoint(path, weights_only)
        checkpoint = read_checkpoint(path, weights_only is not False)
        assert self.model is not None
        assert self.lightning_module is not None
        here = self.model.state_dict()
        weights = {name: _like(value, here.get(name)) for name, value in checkpoint.pop("state_dict").items()}
        self.model.load_state_dict(weights, strict=self.lightning_module.strict_loading)
        for optimizer, state in zip(self.optimizers, checkpoint.get("optimizer_states", []), strict=False):
            named = by_name(state, _names(self.model, optimizer))
            options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
            set_optimizer_state_dict(self.model, optimizer, optim_state_dict=named, options=options)
        return checkpoint


def _like(whole: torch.Tensor, there: torch.Tensor | None) -> torch.Tensor:
    """A whole tensor, spread as another one is."""
    if not isinstance(there, DTensor):
        return whole
    return distribute_tensor(whole.to(there.device), there.device_mesh, there.placements)


def _names(model: nn.Module, optimizer: Optimizer) -> list[list[str]]:
    """The names of an optimizer's parameters, by group."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    return [[names[parameter] for parameter in group["params"]] for group in optimizer.param_groups]


class FSDP(FSDPStrategy):
    """The same by FSDP1, each model wrapped by itself, with checkpoints of one file. Take `FSDP2` unless something else
    asks for FSDP1.
    """

    def __init__(self) -> None:
        super().__init__(state_dict_type="full")

    def setup_environment(self) -> None:
        """Batches and buffers keep their types: Lightning would cast them, and refuses frozen dataclasses.

        Autocast is as Lightning has it in its other strategies: on the models' device, and without a cache of cast
        weights, which would be those of before an optimizer step within the same training step.
        """
        super().setup_environment()
        for name in ("convert_input", "convert_module"):
            setattr(self.precision_plugin, name, lambda it: it)
        if self.precision_plugin.precision in ("bf16-mixed", "16-mixed"):
            half = torch.bfloat16 if self.precision_plugin.precision == "bf16-mixed" else torch.float16
            context = partial(torch.autocast, self.root_device.type, dtype=half, cache_enabled=False)
            vars(self.precision_plugin)["forward_context"] = context  # the instance's goes before the class's

    def shard(self, model: nn.Module) -> nn.Module:
        """The model wrapped, and spread over the processes."""
        options: dict[str, Any] = {"sharding_strategy": self.sharding_strategy}
        if self.precision_plugin.precision == "bf16-mixed":
            options["mixed_precision"] = MixedPrecision(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        return wrap(model, device_id=self.root_device, **options)

    def _setup_model(self, model: nn.Module) -> nn.Module:
        """The models are wrapped already; what is beside them goes to the device."""
        return model.to(self.root_device)


StrategyRegistry.register("fsdp", FSDP, description="the same by FSDP1", override=True)
StrategyRegistry.register("fsdp2", FSDP2, description="every process holds its share of all models (FSDP2)")
