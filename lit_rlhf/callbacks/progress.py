"""The progress of a run: bars in a terminal, and plain lines in a log file."""

from __future__ import annotations

import math
from typing import Any

import lightning
from lightning.pytorch.callbacks import ProgressBar as LightningProgressBar
from lightning.pytorch.trainer.states import TrainerFn
from rich.console import Console

from lit_rlhf.callbacks.terminal import Bars, Course, Lines, View, is_terminal
from lit_rlhf.modules.module import AlignmentModule, iteration_of
from lit_rlhf.progress import Progress, listen, stop_listening

SHORT = {
    "objective/score": "score",
    "objective/kl_to_ref": "KL",
    "kl_to_ref": "KL",
    "perf/tokens_per_second": "tokens/s",
    "train/loss": "loss",
    "train/accuracy": "accuracy",
    "val/loss": "val loss",
    "val/score": "val score",
}
IN_VALIDATION = ("loss", "perplexity", "accuracy", "score", "reference_score", "win_rate", "kl_to_ref", "length")
"""The held-out metrics that a validation's line shows, in this order."""


class ProgressBar(LightningProgressBar):
    """A callback that shows the progress of a run, and metrics under short names such as ``KL`` (nats per response).

    In a terminal, one bar shows the iterations with the time left, and a second bar shows the current work: decoding,
    judging, the update or a validation. Elsewhere, such as in a SLURM log, plain lines are printed for the first and
    the last iteration, for every validation, and from time to time for other iterations. Only process 0 prints.

    Args:
        every: The minimum number of seconds between two lines for other iterations; the bars in a terminal ignore it.

    Raises:
        ValueError: if ``every`` is negative.

    >>> ProgressBar(every=60.0).every
    60.0
    """

    def __init__(self, every: float = 10.0) -> None:
        if every < 0:
            raise ValueError(f"every must be 0 or more seconds, not {every}")
        super().__init__()
        self.every = every
        self.enabled = True
        self._course: Course | None = None
        self._view: View | None = None

    @property
    def is_enabled(self) -> bool:
        """Whether the progress is shown; Lightning asks this when a module prints something."""
        return self.enabled

    def disable(self) -> None:
        """Show nothing from now on; Lightning calls this method on all processes except process 0."""
        self.enabled = False

    def enable(self) -> None:
        """Show the progress again, after `disable` was called."""
        self.enabled = True

    # ---------------------------------------------------------------- training

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Begin to show the iterations."""
        self._open(Course("iteration", iteration_of(pl_module), total_iterations(trainer, pl_module)))

    def on_train_batch_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Begin to measure the pace when the first iteration of this process begins."""
        if self._course is not None and self._course.done == self._course.first:
            self._course.begin()

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Show that the iteration is done."""
        if self._course is not None and self._view is not None:
            self._course.advance(iteration_of(pl_module), self.shown_metrics(trainer))
            self._view.advanced()

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Remove the bars."""
        self._close()

    def on_exception(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, exception: BaseException
    ) -> None:
        """Remove the bars, so that the error message is not mixed with them."""
        self._close()

    # --------------------------------------------- validation, test, prediction

    def on_validation_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Begin to show the batches of the validation."""
        if not trainer.sanity_checking:
            self._begin(trainer, "validation", trainer.num_val_batches)

    def on_test_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Begin to show the batches of the test."""
        self._begin(trainer, "test", trainer.num_test_batches)

    def on_predict_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Begin to show the batches of the prediction."""
        self._begin(trainer, "prediction", trainer.num_predict_batches)

    def on_validation_batch_end(self, trainer: lightning.Trainer, *_: Any) -> None:
        """Show that the batch is done."""
        if not trainer.sanity_checking:
            self._batch_done()

    def on_test_batch_end(self, *_: Any) -> None:
        """Show that the batch is done."""
        self._batch_done()

    def on_predict_batch_end(self, *_: Any) -> None:
        """Show that the batch is done."""
        self._batch_done()

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Show the result of a validation between two iterations; remove the bars after any other validation."""
        if trainer.state.fn != TrainerFn.FITTING:
            self._close()
        elif self._course is not None and self._view is not None and not trainer.sanity_checking:
            self._course.stage = self._course.work = None
            self._course.metrics = self.shown_metrics(trainer)
            metrics = [(name, trainer.callback_metrics.get(f"val/{name}")) for name in IN_VALIDATION]
            shown = [f"{SHORT.get(name, name).replace('_', ' ')} {number(x)}" for name, x in metrics if x is not None]
            self._view.note(f"{self._course.label}  validation: " + "  ".join(shown))

    def on_test_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Remove the bars."""
        self._close()

    def on_predict_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Remove the bars."""
        self._close()

    # --------------------------------------------------------------------- parts

    def get_metrics(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> dict[str, int | str | float | dict[str, float]]:
        """Return the metrics to show, by their short names."""
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        return {SHORT.get(name, name): value for name, value in metrics.items()}

    def shown_metrics(self, trainer: lightning.Trainer) -> list[str]:
        """Return the metrics to show as strings, each with its short name."""
        metrics: Any = self.get_metrics(trainer, trainer.lightning_module)
        return [
            f"{float(value):,.0f} {name}" if name == "tokens/s" else f"{name} {number(value)}"
            for name, value in metrics.items()
        ]

    def _open(self, course: Course) -> None:
        if not self.enabled:
            return
        self._close()
        self._course = course
        self._view = Bars(course, Console()) if is_terminal() else Lines(course, self.every)
        self._view.open()
        listen(self._hear)

    def _close(self) -> None:
        stop_listening(self._hear)
        if self._view is not None:
            self._view.close()
        self._course = self._view = None

    def _hear(self, progress: Progress) -> None:
        course, view = self._course, self._view
        if course is not None and view is not None:  # another thread may report progress after the end
            course.hear(progress)
            view.heard()

    def _begin(self, trainer: lightning.Trainer, name: str, batches: Any) -> None:
        total = sum(batches) if isinstance(batches, list) else batches
        if trainer.state.fn != TrainerFn.FITTING:
            self._open(Course(f"{name} batch", 0, None if math.isinf(total) else total))
        elif self._course is not None:
            self._course.stage = Progress(name, 0, None if math.isinf(total) else total, "batches")
            self._course.work = None

    def _batch_done(self) -> None:
        course = self._course
        if course is None or self._view is None:
            return
        if course.stage is not None:
            course.stage = Progress(course.stage.work, course.stage.done + 1, course.stage.total, course.stage.unit)
            course.work = None
        else:
            course.advance(course.done + 1, [])
            self._view.advanced()


def total_iterations(trainer: lightning.Trainer, module: lightning.LightningModule) -> int | None:
    """Return the number of iterations after which a run ends; None if that is not known in advance."""
    if isinstance(module, AlignmentModule) and module.iterations is not None:
        return module.iterations
    batches, epochs = trainer.num_training_batches, trainer.max_epochs
    if epochs is None or epochs == -1 or math.isinf(batches) or trainer.max_steps != -1:
        return None
    return epochs * int(batches)


def number(value: Any) -> str:
    """Return a metric as a short text with three significant digits, or as ``0`` if its magnitude is below 10⁻⁶.

    >>> number(0.123456), number(-1.2e-7)
    ('0.123', '0')
    """
    value = float(value)
    return "0" if abs(value) < 1e-6 else f"{value:.3g}"
