"""Checks of a run's options before and after the Trainer is made, and the refusals of libraries as one-line errors."""

import contextlib
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import lightning
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import (
    GradientAccumulationScheduler,
    LearningRateFinder,
    StochasticWeightAveraging,
    WeightAveraging,
)

from lit_rlhf import compat
from lit_rlhf.config_errors import explain
from lit_rlhf.errors import UserError
from lit_rlhf.modules.module import AlignmentModule
from lit_rlhf.modules.on_policy import OnPolicy

LARGEST_INTEGER = 2**63 - 1
"""The largest integer that torch and Arrow can hold."""
NO_METRIC = re.compile(r"Early stopping conditioned on metric `(.*?)` which is not available.* of the following: (.*)")
"""The pattern of the message of ``EarlyStopping`` about a metric that does not exist, and of the metrics that do."""
NO_KEY = re.compile(r"No API key configured|api_key not configured")
"""The pattern of the message of wandb about a user who is not logged in."""
REFUSED_OPTIONS = {
    r"`devices` selected with": "trainer.devices",
    r"\S+ is not in bounds, numpy accepts": "seed_everything",
}
"""The patterns of the refusals by Lightning and NumPy that have another type of error, and the options."""

CUT = "every batch is already cut into micro-batches; a larger data.batch_size takes no more memory in the update"
"""Why gradients are not accumulated over batches."""
AVERAGED = "weights are averaged by model.averaging, in the modules that have this option"
"""Why no callback may average weights."""
REFUSED_CALLBACKS: dict[type[lightning.Callback], str] = {
    GradientAccumulationScheduler: CUT,
    StochasticWeightAveraging: AVERAGED,
    WeightAveraging: AVERAGED,
    LearningRateFinder: "it would train on batches that are not iterations of the run; choose the rate by short runs",
}
"""The callbacks of Lightning, with their subclasses, that work only in automatic optimization, and the reasons."""


def check_numbers(options: Any, path: str = "") -> None:
    """Check that no number in a configuration is NaN, or is an integer that torch cannot hold.

    Args:
        options: The configuration, or a part of it.
        path: The name of that part, for messages.

    Raises:
        UserError: if there is such a number; the message names its option.

    >>> check_numbers({"model": {"lam": float("nan")}})
    Traceback (most recent call last):
        ...
    lit_rlhf.errors.UserError: model.lam should be a number, not nan
    """
    if isinstance(options, Mapping) or hasattr(options, "__dict__"):
        inner = options.items() if isinstance(options, Mapping) else vars(options).items()
        for name, value in inner:
            check_numbers(value, path if name == "init_args" else f"{path}.{name}".lstrip("."))
    elif isinstance(options, list | tuple):
        for value in options:
            check_numbers(value, path)
    elif isinstance(options, float) and math.isnan(options):
        raise UserError(f"{path} should be a number, not nan")
    elif isinstance(options, int) and abs(options) > LARGEST_INTEGER:
        raise UserError(f"{path} is {options}, but a whole number may not exceed {LARGEST_INTEGER}")


def check_intervals(epochs: int | None, batches: Any) -> None:
    """Check the options that say when there is a validation.

    Args:
        epochs: The number of epochs between validations, ``trainer.check_val_every_n_epoch``.
        batches: The option ``trainer.val_check_interval``: a number of batches, a part of an epoch, or a time.

    Raises:
        UserError: if a number is not positive.
    """
    without = "trainer.limit_val_batches: 0 leaves validation out"
    if epochs is not None and epochs < 1:
        raise UserError(f"trainer.check_val_every_n_epoch must be 1 or more, or null, not {epochs}; {without}")
    if isinstance(batches, int | float) and batches <= 0:
        raise UserError(f"trainer.val_check_interval must be positive, not {batches}; {without}")


@contextlib.contextmanager
def folder_of_run(folder: Path) -> Iterator[None]:
    """Return a context in which a run's folder is made; it turns a failure into one line that names the option.

    Raises:
        UserError: if the working folder is the run's folder or is inside it, so that a later run would rename the
            working folder; or if the folder cannot be made.
    """
    option = f"trainer.default_root_dir is {str(folder)!r}"
    try:
        if Path.cwd().is_relative_to(folder.resolve()):
            raise UserError(f"{option}: it must be a folder of the run's own, not the working folder or one around it")
        yield
    except (OSError, RuntimeError) as error:  # the latter is what `resolve` raises for a loop of links
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"{option}, but this folder cannot be made: {reason}") from error
    except ValueError as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{option}, but this folder cannot be made: {error}") from error


def check_automatic_options(trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
    """Check that no option or callback is set that Lightning applies only in automatic optimization.

    Raises:
        UserError: if the Trainer's options clip or accumulate gradients, or if a callback is among `REFUSED_CALLBACKS`.
    """
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    if trainer.gradient_clip_val is not None:
        own = "model.update.clip_grad_norm" if isinstance(module, OnPolicy) else "model.clip_grad_norm"
        raise UserError(f"trainer.gradient_clip_val must be null: gradients are clipped by {own}")
    if trainer.accumulate_grad_batches != 1:
        raise UserError(f"trainer.accumulate_grad_batches must be 1: {CUT}")
    for callback in callbacks:
        for refused, reason in REFUSED_CALLBACKS.items():
            if isinstance(callback, refused):
                raise UserError(f"trainer.callbacks must not contain {type(callback).__name__}: {reason}")


def check_predict(module: lightning.LightningModule) -> None:
    """Check that a module can write responses, before the Trainer looks for the data of ``predict``.

    Raises:
        UserError: if it cannot.
    """
    if type(module).predict_step is AlignmentModule.predict_step:
        raise UserError(
            f"predict: {type(module).__name__} writes no responses; give the folder of an exported language model to "
            "an on-policy module: lit-rlhf predict --config ppo --model.actor EXPORT --data.predict prompts.jsonl"
        )


@contextlib.contextmanager
def refusals_as_user_errors() -> Iterator[None]:
    """Return a context that turns the refusals of an option by libraries into a one-line `UserError`."""
    try:
        yield
    except MisconfigurationException as error:
        raise UserError(explain(str(error))) from error
    except Exception as error:  # of wandb, too, which may not be installed
        if isinstance(error, UserError) or not (message := _refusal(" ".join(str(error).split()))):
            raise
        raise UserError(message) from error


def _refusal(message: str) -> str:
    """Return what a library's message means for the user; an empty string if it is not about an option."""
    if message.startswith(compat.LONG_VAL_CHECK_INTERVAL):
        return (
            f"trainer.val_check_interval: {message.partition('. ')[0]}; with trainer.check_val_every_n_epoch: null, it "
            "counts the iterations of the run"
        )
    if matched := NO_METRIC.match(message):
        known = ", ".join(sorted(re.findall(r"`([^`]+)`", matched[2])))
        return f"trainer.callbacks: EarlyStopping.monitor is {matched[1]!r}, but the metrics are {known}"
    if NO_KEY.search(message):
        return (
            "trainer.logger: W&B has no API key; log in with `wandb login`, or set the environment variable "
            "WANDB_MODE=offline, to write the run to files only"
        )
    for pattern, option in REFUSED_OPTIONS.items():
        if re.match(pattern, message):
            return f"{option}: {message}"
    return ""
