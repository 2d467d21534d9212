"""How the models lie on many processes: ``ddp`` (Lightning's own), ``fsdp2`` and ``fsdp``, by ``--trainer.strategy``.

Importing this module makes the names known to Lightning.
"""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy

from lit_rlhf.models.sharding import shard

HALF = {"bf16-mixed": torch.bfloat16, "bf16-true": torch.bfloat16}


class FSDP2(ModelParallelStrategy):
    """Every process holds its share of each model's weights, gradients and optimizer state (FSDP2).

    A decoder layer's weights are gathered while it computes; all of a model's while it decodes or judges. With
    ``--trainer.precision bf16-mixed`` weights are gathered and multiplied in bfloat16, and gradients added up and
    weights updated in float32.

    Args:
        cpu_offload: Keep the shares in the CPU's memory, and update them there.
        save_distributed_checkpoint: Each process writes its share into a folder; False: process 0 writes one file.
        options: Lightning's.
    """

    def __init__(self, cpu_offload: bool = False, save_distributed_checkpoint: bool = True, **options: Any) -> None:
        if cpu_offload and torch.cuda.is_available():
            options.setdefault("process_group_backend", "cpu:gloo,cuda:nccl")  # norms of what lies on the CPU
        super().__init__(tensor_parallel_size=1, save_distributed_checkpoint=save_distributed_checkpoint, **options)
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
        for module in self.model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, buffer.to(self.root_device))


StrategyRegistry.register("fsdp2", FSDP2, description="every process holds its share of all models (FSDP2)")
