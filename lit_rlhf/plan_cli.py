"""The command ``lit-rlhf plan``: the memory and the time that a run will need, from its configuration alone."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch.cli import LightningArgumentParser
from rich.console import Console

from lit_rlhf import lightning_cli
from lit_rlhf.callbacks import ActivationCheckpointing
from lit_rlhf.errors import UserError
from lit_rlhf.models.precision import check_precision
from lit_rlhf.planning.hardware import Device, find_gpu, this_cpu, this_gpu
from lit_rlhf.planning.plan import Plan, make_plan
from lit_rlhf.planning.report import show
from lit_rlhf.planning.setting import setting_of


class PlanCLI(lightning_cli.CLI):
    """A command line that takes the options of ``fit``, but prints a plan instead of training.

    Neither weights nor data are read. For example::

        lit-rlhf plan --config ppo --model.actor Qwen/Qwen2.5-1.5B --gpu h100
        lit-rlhf plan --config ppo --trainer.strategy fsdp2 --gpus 8 --gpu a100-80gb
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs["run"] = False  # the parser then has no subcommands
        super().__init__(*args, **kwargs)

    def add_default_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the plan's own options, and then the options of ``fit``."""
        parser.add_argument("--gpu", type=str | None, help="h100, a100-80gb, … or cpu; by default, this machine's own")
        parser.add_argument("--gpus", type=int | None, help="the number of GPUs; by default, trainer.devices")
        parser.add_argument(
            "--prompt_tokens", type=int | None, help="the length of the prompts; by default, the longest allowed"
        )
        for name in ("--ckpt_path", "--weights_only"):  # a run's config.yaml has them
            parser.add_argument(name, type=Any, help=argparse.SUPPRESS)
        super().add_default_arguments_to_parser(parser)

    def before_instantiate_classes(self) -> None:
        """Check the plan's own numbers; nothing else, because a plan leaves the run's folder as it is.

        Raises:
            UserError: if a number is less than 1.
        """
        for name in ("gpus", "prompt_tokens"):
            if self.config[name] is not None and self.config[name] < 1:
                raise UserError(f"{name} must be 1 or more, not {self.config[name]}")

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        """Return None, because a Trainer would need the devices, which this machine may lack."""

    def after_instantiate_classes(self) -> None:
        """Print the plan.

        Raises:
            UserError: if the run cannot be planned.
        """
        show(self.plan(), Console())

    def plan(self) -> Plan:
        """Return the plan.

        Raises:
            UserError: if the run cannot be planned.
        """
        options = self.config_init
        device, trainer = _device(options.gpu), options.trainer
        callbacks = trainer.callbacks if isinstance(trainer.callbacks, list) else [trainer.callbacks]
        setting = setting_of(
            self.model,
            self.datamodule,
            device=device,
            processes=options.gpus or _devices(trainer, device),
            strategy=trainer.strategy,
            half=_is_half(trainer.precision, device),
            recompute=any(isinstance(callback, ActivationCheckpointing) for callback in callbacks),
            prompt_tokens=options.prompt_tokens,
        )
        return make_plan(setting, may_checkpoint=options.plan.checkpointing)


def main(args: Sequence[str]) -> None:
    """Run the command ``lit-rlhf plan``.

    Args:
        args: The arguments that follow ``lit-rlhf plan`` on the command line.

    Raises:
        UserError: if the configuration is not valid, or the run cannot be planned.
        SystemExit: if an option does not exist, or a value has the wrong type.
    """
    lightning_cli.run(args, PlanCLI, prog="lit-rlhf plan")


def _device(name: str | None) -> Device:
    if name is None:
        return this_gpu() if torch.cuda.is_available() else this_cpu()
    return this_cpu() if name == "cpu" else find_gpu(name)


def _devices(trainer: Any, device: Device) -> int:
    """Return the number of processes that the Trainer's options ask for.

    ``auto`` and -1 stand for as many processes on each node as this machine has GPUs, or for one process on each node
    if this machine has no GPU or the plan is for a CPU.

    Raises:
        UserError: if the option ``trainer.devices`` does not give a number.
    """
    number = trainer.devices
    if isinstance(number, list):
        number = len(number)
    if str(number) in ("auto", "-1"):
        number = 1 if device.is_cpu else max(1, torch.cuda.device_count())
    if not str(number).isdigit():
        raise UserError(f"gpus: trainer.devices is {trainer.devices!r}; say how many GPUs to plan for")
    return int(number) * trainer.num_nodes


def _is_half(precision: Any, device: Device) -> bool:
    """Return whether matrix products are computed in bfloat16, which is the default on GPUs.

    Raises:
        UserError: if ``fit`` does not support the precision.
    """
    if precision is not None:
        check_precision(precision)
    return not device.is_cpu if precision is None else str(precision).startswith("bf16")
