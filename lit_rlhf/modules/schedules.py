"""A learning-rate schedule that knows how long the run is."""

from typing import Any

import torch
from torch.optim.lr_scheduler import LRScheduler

from lit_rlhf.errors import UserError


class LinearDecay(LRScheduler):
    """A linear decay of the learning rate to 0 at the end of the run, after an optional linear warm-up.

    In iteration i = 0, 1, …, N − 1, the learning rate is the optimizer's initial learning rate times

    (i + 1) / (W + 1) if i < W, otherwise (N − i) / (N − W),

    where W is the length of the warm-up, and N is ``model.iterations``. Unlike ``LinearLR``, the schedule takes N from
    the module, so that N is set in one place only; a resumed run with another N follows the schedule for the new N.

    Args:
        optimizer: The optimizer.
        warmup: W, the length of the warm-up in iterations.

    Raises:
        ValueError: if ``warmup`` is negative.

    >>> optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    >>> schedule, rates = LinearDecay(optimizer, warmup=1), []
    >>> schedule.set_iterations(5)
    >>> for _ in range(5):
    ...     rates.append(optimizer.param_groups[0]["lr"])
    ...     optimizer.step()
    ...     schedule.step()
    >>> rates
    [0.5, 1.0, 0.75, 0.5, 0.25]
    """

    def __init__(self, optimizer: torch.optim.Optimizer, warmup: int = 0) -> None:
        if warmup < 0:
            raise ValueError(f"warmup must be 0 or more, not {warmup}")
        self.warmup = warmup
        self.iterations: int | None = None  # no decay until this number is set
        super().__init__(optimizer)

    def set_iterations(self, iterations: int | None) -> None:
        """Set N, the number of iterations; the module calls this method before the run.

        Raises:
            UserError: if the module has no number of iterations.
        """
        if iterations is None:
            raise UserError("model.iterations is not set, but LinearDecay needs the number of iterations of the run")
        self.iterations = iterations

    def get_lr(self) -> list[float | torch.Tensor]:
        """Return the learning rate of each parameter group in the current iteration."""
        return [rate * self._factor(self.last_epoch) for rate in self.base_lrs]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state from a checkpoint, but keep this run's warm-up and number of iterations."""
        super().load_state_dict(state_dict | {"warmup": self.warmup, "iterations": self.iterations})

    def _factor(self, iteration: int) -> float:
        if iteration < self.warmup:
            return (iteration + 1) / (self.warmup + 1)
        if self.iterations is None:
            return 1.0
        return max(0.0, (self.iterations - iteration) / max(1, self.iterations - self.warmup))
