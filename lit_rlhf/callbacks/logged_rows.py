"""What loggers have already got of a resumed run, so that they get nothing twice and miss nothing.

The iterations between the checkpoint and the interruption are computed again, with the same results. A logger may have
their metrics already; on the other hand, Lightning passes the metrics of an iteration to the loggers only after the
checkpoint of this iteration is saved, so that a logger may lack them. Every logger gets the values of a metric in the
order of the iterations, and what is lost when a process is killed is the end, so the last iteration of each metric says
what a logger has.
"""

from __future__ import annotations

import csv
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CSVLogger, Logger, MLFlowLogger, TensorBoardLogger, WandbLogger

from lit_rlhf.callbacks.details import Detail
from lit_rlhf.callbacks.files import TableFile
from lit_rlhf.callbacks.wandb_files import files as wandb_files
from lit_rlhf.callbacks.wandb_files import rows as wandb_rows

ITERATION = "progress/iteration"
"""The metric that is in every row, and therefore says nothing about what a logger has."""
STEP = "trainer/global_step"
"""The name under which Lightning's logger gives W&B the iteration."""

Steps = dict[str, int]
"""The last iteration of each metric that a logger has got."""


def continue_logs(
    loggers: Sequence[Logger], rows: Sequence[Mapping[str, float]], details: Sequence[Detail], iteration: int
) -> None:
    """Make loggers continue what they have of a run that is resumed.

    What TensorBoard and CSV files have of iterations after the checkpoint is dropped. W&B and MLflow cannot drop
    anything; from now on, they get only what they do not have.

    Args:
        loggers: The loggers.
        rows: The metrics of all iterations before the checkpoint, from which the loggers get what they lack.
        details: The latest tables and histograms before the checkpoint, from which the loggers get what they lack.
        iteration: The number of iterations of the checkpoint.
    """
    for logger in loggers:
        steps = _last_steps(logger, iteration)
        if steps is None:
            continue
        if isinstance(logger, WandbLogger | MLFlowLogger):
            _leave_out(logger, steps)
        for row in rows:
            if (step := int(row[ITERATION])) <= iteration and _lacks(steps, row, step):
                logger.log_metrics(dict(row), step)
        for detail in details:
            if not isinstance(logger, MLFlowLogger) and _lacks(steps, [detail.name], detail.iteration):
                detail.log(logger)
        logger.save()


def _last_steps(logger: Logger, iteration: int) -> Steps | None:
    """Return what a logger has, after files have dropped what is after an iteration; None if it is not known."""
    if isinstance(logger, CSVLogger):
        return _truncate(logger, iteration)
    if isinstance(logger, TensorBoardLogger):
        return _purge(logger, iteration)
    if isinstance(logger, WandbLogger):
        return _in_wandb(logger)
    return _in_mlflow(logger) if isinstance(logger, MLFlowLogger) else None


def keep_csv(loggers: Iterable[Logger]) -> None:
    """Open the CSV loggers' files without losing their rows, which Lightning's logger would delete.

    Args:
        loggers: The loggers, before they are used; those of other kinds are left as they are.
    """
    for logger in loggers:
        if not isinstance(logger, CSVLogger):
            continue
        file = Path(logger.log_dir, "metrics.csv")
        kept = file.with_name(".metrics.csv.kept")  # still there if a process was killed here
        if file.is_file() and not kept.exists():
            file.rename(kept)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it warns that it would delete the file
            _ = logger.experiment
        if kept.exists():
            kept.replace(file)


def read_rows(path: Path) -> list[dict[str, float]]:
    """Return the rows of a ``metrics.csv``, without empty cells; no rows if there is no file."""
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return [{name: float(text) for name, text in row.items() if text} for row in csv.DictReader(file)]


def _lacks(steps: Steps, metrics: Iterable[str], step: int) -> bool:
    """Return whether a logger lacks the metrics of an iteration; those that it has never got say nothing, or all."""
    known = [steps[name] for name in metrics if name in steps and name != ITERATION]
    return not known or min(known) < step


def _leave_out(logger: WandbLogger | MLFlowLogger, steps: Steps) -> None:
    """Make a logger leave out the metrics that it has got."""
    log = logger.log_metrics

    def log_new(metrics: Mapping[str, Any], step: int | None = None) -> None:
        if step is not None and isinstance(logger, MLFlowLogger):  # W&B has rows, and MLflow has single values
            metrics = {name: value for name, value in metrics.items() if steps.get(name, -1) < step}
        if metrics and (step is None or _lacks(steps, metrics, step)):
            log(metrics, step)

    vars(logger)["log_metrics"] = log_new  # takes precedence over the class's method


def _truncate(logger: CSVLogger, iteration: int) -> Steps:
    """Drop the rows of a CSV file after an iteration, and return what it has then."""
    file = TableFile(Path(logger.log_dir, "metrics.csv"))
    kept = [row for row in read_rows(file.path) if row["step"] <= iteration]
    if kept:
        columns = list(dict.fromkeys(name for row in kept for name in row))
        file.restore(sorted(columns), len(kept))
        logger.experiment.metrics_keys = file.columns
    elif file.path.exists():
        file.path.unlink()
    return _last((row, int(row["step"])) for row in kept)


def _purge(logger: TensorBoardLogger, iteration: int) -> Steps | None:
    """Make TensorBoard drop what it has after an iteration, and return what it has up to there.

    Without the package tensorboard, which reads the files, the result is None: it is not known.
    """
    files = sorted(Path(logger.log_dir).glob("events.out.*"), key=lambda file: file.stat().st_mtime)
    writer: Any = logger.experiment
    writer.close()  # the next event opens a new file, which says from which step to drop events
    writer.purge_step = iteration + 1
    if find_spec("tensorboard") is None:
        return None
    for file in reversed(files):
        if steps := _last((tags, step) for tags, step in _events(file) if 0 < step <= iteration):
            return steps
    return {}


def _events(file: Path) -> Iterator[tuple[list[str], int]]:
    """Yield the tags and the step of each event in a file of TensorBoard."""
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    for event in EventFileLoader(str(file)).Load():
        yield [value.tag.removesuffix("/text_summary") for value in event.summary.value], event.step


def _in_wandb(logger: WandbLogger) -> Steps | None:
    """Return what W&B has: what is in its files and, if there is a server, has got there; None if it is not known."""
    run: Any = logger.experiment
    files = wandb_files(Path(run.dir).parents[1], run.id)
    if len(files) > 1:  # not only the present one
        found = (row for file in files for row in wandb_rows(file))
        reached = (row for row in found if run.offline or row.get("_step", 0) < run.starting_step)
        return _last((row, int(row[STEP])) for row in reached if row.get(STEP) is not None)
    if run.offline or not run.starting_step:
        return None
    last = int(run.summary.get(STEP, 0)) - 1  # of the last iteration, the server may have only a part
    return dict.fromkeys(run.summary.keys(), last)


def _in_mlflow(logger: MLFlowLogger) -> Steps:
    """Return what an MLflow run has."""
    assert logger.run_id is not None
    client: Any = logger.experiment
    names = client.get_run(logger.run_id).data.metrics
    return {name: max(x.step for x in client.get_metric_history(logger.run_id, name)) for name in names}


def _last(found: Iterable[tuple[Iterable[str], int]]) -> Steps:
    steps: Steps = {}
    for names, step in found:
        steps |= {name: max(step, steps.get(name, step)) for name in names}
    return steps
