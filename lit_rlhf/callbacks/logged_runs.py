"""A record of the loggers' own runs, such as a W&B run, so that a training run continues them when it is resumed."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger, MLFlowLogger

from lit_rlhf.files import write_text

LOGGED = "loggers.json"
"""The name of the file, in a training run's folder, that lists the loggers' own runs."""
IDS = {"WandbLogger": "id", "TensorBoardLogger": "version", "MLFlowLogger": "run_id", "CSVLogger": "version"}
"""The argument that makes a logger continue an earlier run, by the name of the logger's class."""


def note_logged(path: Path, loggers: Sequence[Logger]) -> list[Logger]:
    """Store the ids of the loggers' runs in a file, by the names of the loggers' classes.

    The ids of loggers that the training run had before stay in the file.

    Returns:
        Those of the loggers whose ids were in the file already.
    """
    before = _noted(path)
    runs = {_name(logger): logger.version for logger in loggers if _name(logger) in IDS}
    if runs:
        write_text(path, json.dumps(before | runs) + "\n")
    return [logger for logger in loggers if logger.version is not None and before.get(_name(logger)) == logger.version]


def log_config(loggers: Sequence[Logger], config: dict[str, Any]) -> None:
    """Log a run's configuration to every logger, except to an MLflow run that already has a configuration.

    MLflow refuses a changed configuration, and the configuration of a resumed run differs at least in ``ckpt_path``.
    """
    for logger in loggers:
        has_one = isinstance(logger, MLFlowLogger) and logger.experiment.get_run(str(logger.run_id)).data.params
        if not has_one:
            logger.log_hyperparams(config)


@contextmanager
def continued(path: Path, configs: Sequence[Any]) -> Iterator[None]:
    """Make loggers continue the runs noted in a file, by changing the loggers' configurations inside this context.

    A configuration that names a run itself is left as it is. At the end, the configurations are restored, so that they
    can be used for another run.

    Args:
        path: The file that `note_logged` wrote; nothing happens if there is no file.
        configs: The configurations of the loggers; those without ``class_path`` are left as they are.
    """
    runs = _noted(path)
    before: list[tuple[Any, str, Any]] = []
    for config in configs:
        name = getattr(config, "class_path", "").rpartition(".")[2]
        own = [config.init_args.get(key) for key in (IDS[name], "version")] if name in runs else [True]
        if all(value is None for value in own):
            before.append((config.init_args, IDS[name], config.init_args.get(IDS[name])))
            config.init_args[IDS[name]] = runs[name]
    try:
        yield
    finally:
        for arguments, key, value in before:
            arguments[key] = value


def _noted(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _name(logger: Logger) -> str:
    return type(logger).__name__
