"""Tables of samples and histograms, and how the loggers show them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Literal, NamedTuple

from lightning.pytorch.loggers import Logger, MLFlowLogger, TensorBoardLogger, WandbLogger


class Detail(NamedTuple):
    """A table or a histogram of an iteration.

    Args:
        kind: What it is.
        name: Its name in the loggers.
        first: The names of a table's columns, or the counts of a histogram's bins.
        second: The rows of a table, or the edges of a histogram's bins.
        iteration: The iteration.
    """

    kind: Literal["table", "histogram"]
    name: str
    first: list[Any]
    second: list[Any]
    iteration: int

    def log(self, logger: Logger) -> None:
        """Log it, if the logger can show it."""
        log = _log_table if self.kind == "table" else _log_histogram
        log(logger, self.name, self.first, self.second, self.iteration)


def markdown(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Return a table in Markdown; the pipe characters and line breaks in its cells are written as HTML.

    >>> print(markdown(["response", "score"], [["a|b", 0.123456]]))
    | response | score |
    |---|---|
    | a&#124;b | 0.123 |
    """

    def cell(value: Any) -> str:
        text = f"{value:.3g}" if isinstance(value, float) else str(value)
        return text.replace("|", "&#124;").replace("\n", "<br>")

    lines = ["| " + " | ".join(map(cell, row)) + " |" for row in (columns, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(columns), *lines[1:]])


def _log_table(logger: Logger, name: str, columns: list[str], rows: list[list[Any]], iteration: int) -> None:
    """Log a table, if the logger can show one."""
    if isinstance(logger, WandbLogger):
        import wandb

        metrics: Any = {name: wandb.Table(columns=[*columns], data=rows), "progress/iteration": iteration}
        logger.log_metrics(metrics, step=iteration)
    elif isinstance(logger, TensorBoardLogger):
        logger.experiment.add_text(name, markdown(columns, rows), iteration)
    elif isinstance(logger, MLFlowLogger):
        assert logger.run_id is not None
        logger.experiment.log_text(logger.run_id, markdown(columns, rows), f"{name}/iteration-{iteration:06d}.md")


def _log_histogram(logger: Logger, name: str, counts: list[float], edges: list[float], iteration: int) -> None:
    """Log a histogram, if the logger can show one."""
    if isinstance(logger, WandbLogger):
        import numpy as np
        import wandb

        drawn = wandb.Histogram(np_histogram=(np.array(counts), np.array(edges)))
        metrics: Any = {name: drawn, "progress/iteration": iteration}
        logger.log_metrics(metrics, step=iteration)
    elif isinstance(logger, TensorBoardLogger):
        middles = [(low + high) / 2 for low, high in pairwise(edges)]
        logger.experiment.add_histogram_raw(
            name,
            min=edges[0],
            max=edges[-1],
            num=int(sum(counts)),
            sum=sum(count * middle for count, middle in zip(counts, middles, strict=True)),
            sum_squares=sum(count * middle**2 for count, middle in zip(counts, middles, strict=True)),
            bucket_limits=edges[1:],
            bucket_counts=counts,
            global_step=iteration,
        )
