"""Optimizers and schedules: how they are made, and their options in a resumed run, which are not the checkpoint's."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from copy import deepcopy
from typing import Any, Literal

from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import nn
from torch.optim import LBFGS, Optimizer, SparseAdam
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from lit_rlhf.errors import UserError
from lit_rlhf.modules.schedules import LinearDecay

PREFIXES = {"policy": "actor_", "value": "critic_"}
"""What precedes ``optimizer`` and ``scheduler`` in the names of the options, by the optimizer's name in its module."""


def make_optimizer(make: OptimizerCallable, parameters: list[nn.Parameter], name: str) -> Optimizer:
    """Return an optimizer for some parameters.

    Args:
        make: The function that makes the optimizer.
        parameters: The parameters.
        name: The name of the optimizer in its module, for messages.

    Raises:
        UserError: if the optimizer refuses an option or a parameter, or if it cannot be used here.

    >>> import torch
    >>> make_optimizer(torch.optim.LBFGS, [nn.Parameter(torch.zeros(1))], "policy")
    Traceback (most recent call last):
        ...
    lit_rlhf.errors.UserError: model.actor_optimizer must not be LBFGS, which computes the loss several times in a step
    """
    with refusals_of(name, "optimizer") as option:
        optimizer = make(parameters)
    if isinstance(optimizer, LBFGS):
        raise UserError(f"{option} must not be LBFGS, which computes the loss several times in a step")
    if isinstance(optimizer, SparseAdam):
        raise UserError(f"{option} must not be SparseAdam, which takes only sparse gradients")
    return optimizer


def make_scheduler(make: LRSchedulerCallable, optimizer: Optimizer, name: str, iterations: int | None) -> LRScheduler:
    """Return the learning-rate schedule of an optimizer.

    Args:
        make: The function that makes the schedule.
        optimizer: The optimizer.
        name: The name of the optimizer in its module, for messages.
        iterations: The number of iterations of the run; None if it is not known.

    Raises:
        UserError: if the schedule refuses an option or the optimizer, if it cannot be used here, or if it needs the
            number of iterations.
    """
    with refusals_of(name, "scheduler") as option:
        scheduler = make(optimizer)
    if isinstance(scheduler, ReduceLROnPlateau):
        raise UserError(f"{option} must not be ReduceLROnPlateau, which needs a metric: schedules know only iterations")
    if isinstance(scheduler, LinearDecay):
        scheduler.set_iterations(iterations)
    return scheduler


@contextlib.contextmanager
def refusals_of(name: str, kind: Literal["optimizer", "scheduler"]) -> Iterator[str]:
    """Return a context that turns the refusal of a value by an optimizer or a schedule into a one-line `UserError`.

    The value of the context is the name of the option that chooses the optimizer or the schedule.

    Args:
        name: The name of the optimizer in its module.
        kind: Whether the optimizer or its schedule may refuse a value.
    """
    option = f"model.{PREFIXES.get(name, '')}{kind}"
    try:
        yield option
    except (ValueError, TypeError, RuntimeError, ZeroDivisionError) as error:
        raise UserError(f"{option}: {error}") from error


class OptimizerOptions:
    """The options with which an optimizer and its schedule were made.

    A checkpoint restores an optimizer with all its options, such as the learning rate. This object restores those that
    the present run has changed, and leaves everything else, such as Adam's moments, as the checkpoint has it.

    Args:
        optimizer: The optimizer, which has taken no step yet.
        scheduler: Its schedule, which has taken no step yet; None for a constant learning rate.

    >>> import torch
    >>> old = torch.optim.SGD([torch.zeros(1)], lr=0.1)
    >>> saved = OptimizerOptions(old, None).state()
    >>> new = torch.optim.SGD([torch.zeros(1)], lr=0.2)
    >>> options = OptimizerOptions(new, None)
    >>> new.load_state_dict(old.state_dict())
    >>> new.param_groups[0]["lr"]
    0.1
    >>> options.use(saved, "actor", iteration=3)
    >>> new.param_groups[0]["lr"]
    0.2
    """

    def __init__(self, optimizer: Optimizer, scheduler: LRScheduler | None) -> None:
        self.optimizer = optimizer
        self.scheduler = scheduler
        groups = optimizer.param_groups
        self._made: dict[str, Any] = {
            "optimizer": type(optimizer).__name__,
            "groups": [{name: deepcopy(x) for name, x in group.items() if name != "params"} for group in groups],
            "scheduler": type(scheduler).__name__,
            "schedule": None if scheduler is None else deepcopy(scheduler.state_dict()),
        }

    def state(self) -> dict[str, Any]:
        """Return the options, for a checkpoint."""
        return self._made

    def step_scheduler(self, name: str) -> None:
        """Step the schedule, if there is one.

        Args:
            name: The name of the optimizer in its module, for messages.

        Raises:
            UserError: if the schedule refuses the step, such as ``OneCycleLR`` after its last one.
        """
        if self.scheduler is not None:
            with refusals_of(name, "scheduler"):
                self.scheduler.step()

    def use(self, saved: dict[str, Any], name: str, iteration: int) -> None:
        """Give the optimizer and its schedule, restored from a checkpoint, the options that the run has changed.

        With another schedule or another initial learning rate, the learning rate is what it would be if the run had
        had this schedule from its beginning.

        Args:
            saved: The `state` in the checkpoint.
            name: The name of the optimizer in its module, for the message.
            iteration: The number of iterations done.

        Raises:
            UserError: if the optimizer is of another class than the checkpoint's.
        """
        if saved["optimizer"] != self._made["optimizer"]:
            raise UserError(
                f"the optimizer {name} is {self._made['optimizer']}, which cannot continue from the checkpoint's "
                f"{saved['optimizer']}: resume with that, or export the model and begin a new run with it"
            )
        for group, now, before in zip(self.optimizer.param_groups, self._made["groups"], saved["groups"], strict=True):
            group.update({k: deepcopy(x) for k, x in now.items() if k not in before or _differ(x, before[k])})
        if any(_differ(self._made[key], saved[key]) for key in ("scheduler", "schedule")):
            self._restart(iteration)

    def _restart(self, steps: int) -> None:
        """Set the learning rate to its initial value, and let a new schedule take the steps of the past iterations."""
        for group, now in zip(self.optimizer.param_groups, self._made["groups"], strict=True):
            group["lr"] = deepcopy(now["lr"])
        if self.scheduler is None:
            return
        self.scheduler.load_state_dict(deepcopy(self._made["schedule"]))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the optimizer does not step between these steps
            for _ in range(steps):
                self.scheduler.step()


def _differ(one: Any, other: Any) -> bool:
    try:
        return bool(one != other)
    except (RuntimeError, ValueError):  # tensors or arrays, which cannot be compared in this way
        return False
