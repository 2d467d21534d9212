"""The options of optimizers and schedules in a resumed run: those of its configuration, not those of the checkpoint."""

from __future__ import annotations

import warnings
from copy import deepcopy
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lit_rlhf.errors import UserError


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
