"""A callback that prints the memory and the time per iteration that a run needs, and saves memory if necessary."""

from __future__ import annotations

from typing import Any

import lightning
from lightning.pytorch.callbacks import Callback

from lit_rlhf.callbacks.layers import ActivationCheckpointing
from lit_rlhf.errors import UserError
from lit_rlhf.modules.module import AlignmentModule
from lit_rlhf.planning.hardware import Device, memory_of_host, this_gpu
from lit_rlhf.planning.plan import Plan, make_plan
from lit_rlhf.planning.report import summary
from lit_rlhf.planning.setting import Setting, setting_of


class PrintPlan(Callback):
    """A callback that prints a run's plan in two lines: the models, the memory, and the work and time of an iteration.

    ``lit-rlhf plan`` prints the whole plan.

    Args:
        checkpointing: Whether to turn on `ActivationCheckpointing` if the update would otherwise need more memory than
            the GPU has; this is never done on a CPU.

    >>> PrintPlan(checkpointing=False).checkpointing
    False
    """

    def __init__(self, checkpointing: bool = True) -> None:
        self.checkpointing = checkpointing

    def on_fit_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Print the plan on process 0; turn on activation checkpointing on all processes if the plan asks for it."""
        added = False
        if trainer.is_global_zero:
            try:
                plan = self.plan(trainer, pl_module)
                added = plan.checkpointing_added
                print(*summary(plan), sep="\n")
            except Exception as error:  # a run must not fail because of its plan, nor leave other processes waiting
                reason = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
                print(f"plan: none ({reason})")
        if trainer.strategy.broadcast(added):
            ActivationCheckpointing().on_fit_start(trainer, pl_module)

    def device(self, trainer: lightning.Trainer) -> Device:
        """Return the device of this process, without peak rates if it is a CPU."""
        on_gpu = trainer.strategy.root_device.type == "cuda"
        return this_gpu() if on_gpu else Device("cpu", memory_of_host(), None, None, None)

    def plan(self, trainer: lightning.Trainer, module: Any) -> Plan:
        """Return the plan of a Trainer's run.

        Raises:
            UserError: if the run cannot be planned.
        """
        setting = run_setting(trainer, module, self.device(trainer))
        return make_plan(setting, may_checkpoint=self.checkpointing)


def run_setting(trainer: lightning.Trainer, module: Any, device: Device) -> Setting:
    """Return the setting of a Trainer's run, as if every process had the given device.

    Raises:
        UserError: if the run cannot be planned.
    """
    if not isinstance(module, AlignmentModule):
        raise UserError(f"{type(module).__name__} is not a module of lit-rlhf")
    any_trainer: Any = trainer
    return setting_of(
        module,
        any_trainer.datamodule,
        device=device,
        processes=trainer.world_size,
        strategy=trainer.strategy,
        half=str(trainer.precision).startswith("bf16"),
        recompute=any(isinstance(callback, ActivationCheckpointing) for callback in any_trainer.callbacks),
    )
