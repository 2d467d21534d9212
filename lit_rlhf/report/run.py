"""The files of a training run, which can be read while the run writes them."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from lit_rlhf.errors import UserError
from lit_rlhf.yaml_text import read_yaml

Item = TypeVar("Item")
ELSEWHERE = ("trainer.default_root_dir", "ckpt_path", "weights_only", "report.at_end")
"""The options that determine where a run starts and what it writes, but not how it trains."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """The contents of a run's folder.

    >>> Run(name="ppo", config={}, rows=[{"train/loss": 0.5}], samples=[]).columns
    {'train/loss'}
    """

    name: str
    config: dict[str, Any]  # the options by their full names, such as model.kl.coef
    rows: list[dict[str, float]]  # the rows of metrics.csv in their order, each with its finite numbers
    samples: list[dict[str, Any]]  # the lines of samples.jsonl

    @property
    def columns(self) -> set[str]:
        """The names of the metrics that have a number in at least one row."""
        return {name for row in self.rows for name in row}

    def values(self, column: str) -> list[float]:
        """Return the values of a metric, in the order of the rows."""
        return [row[column] for row in self.rows if column in row]


def read_run(folder: Path, name: str) -> Run:
    """Return the contents of a run's folder, in which only ``metrics.csv`` must exist.

    An unfinished last line of ``metrics.csv`` or ``samples.jsonl`` is left out, because the run may be writing it.

    Args:
        folder: The folder that ``lit-rlhf fit`` wrote.
        name: The name of the run in the report.

    Raises:
        UserError: if there is no ``metrics.csv``, or if one of the files cannot be parsed.
    """
    metrics, samples, config = (folder / file for file in ("metrics.csv", "samples.jsonl", "config.yaml"))
    if not metrics.exists():
        raise UserError(f"report: {folder} has no metrics.csv; it should be the folder of a run of lit-rlhf fit")
    table = csv.DictReader(io.StringIO("".join(_finished_lines(metrics))))
    return Run(
        name=name,
        config=flatten(read_yaml(config, "report")) if config.exists() else {},
        rows=[_numbers(row, f"line {number} of {metrics}") for number, row in enumerate(table, start=2)],
        samples=_read_json_lines(samples) if samples.exists() else [],
    )


def flatten(options: Any, name: str = "") -> dict[str, Any]:
    """Return nested options as one dictionary, by their full names.

    The names leave out the levels ``init_args`` and ``class_path``, which the user need not write. The value of an
    option that chooses a class is the name of the class, without its module.

    Args:
        options: The options, as dictionaries and lists.
        name: The full name of the option whose value ``options`` is; empty for a whole configuration.

    >>> flatten({"model": {"init_args": {"kl": {"coef": 0.1}, "rewards": [{"weight": 1.0}]}}})
    {'model.kl.coef': 0.1, 'model.rewards.0.weight': 1.0}
    """
    if isinstance(options, dict) and options:
        parts = {"" if key in ("init_args", "class_path") else str(key): value for key, value in options.items()}
        if "class_path" in options:
            parts[""] = options.get("init_args") or {}
            first = {name: options["class_path"].rpartition(".")[2]}
        else:
            first = {}
    elif isinstance(options, list) and any(isinstance(value, dict | list) for value in options):
        parts, first = {str(number): value for number, value in enumerate(options)}, {}
    else:
        return {name: options}
    flat = [flatten(value, f"{name}.{key}".strip(".")) for key, value in parts.items() if value != {}]
    return {key: value for part in (first, *flat) for key, value in part.items()}


def differences(runs: Sequence[Run]) -> dict[str, list[str]]:
    """Return the options in which the runs differ, each with its value in every run as text.

    The value is ``–`` for a run without the option. The options in ``ELSEWHERE`` are not compared.

    >>> one, two = (Run(name="", config={"seed": s, "lr": 0.1}, rows=[], samples=[]) for s in (1, 2))
    >>> differences([one, two])
    {'seed': ['1', '2']}
    """
    names = dict.fromkeys(name for run in runs for name in run.config if name not in ELSEWHERE)
    table = {name: [_shown(run.config[name]) if name in run.config else "–" for run in runs] for name in names}
    return {name: values for name, values in table.items() if len(set(values)) > 1}


def thinned(items: Sequence[Item], most: int) -> list[Item]:
    """Return at most ``most`` of the items, evenly spaced, including the first and the last.

    Args:
        items: The items.
        most: The maximum number of items to return, 2 or more.

    >>> thinned(range(11), 3), thinned("ab", 3)
    ([0, 5, 10], ['a', 'b'])
    """
    if len(items) <= most:
        return list(items)
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]


def _finished_lines(path: Path) -> list[str]:
    with path.open(encoding="utf-8", errors="replace", newline="") as file:
        lines = file.readlines()
    return lines[:-1] if lines and not lines[-1].endswith("\n") else lines


def _read_json_lines(path: Path) -> list[dict[str, Any]]:
    records = []
    for number, line in enumerate(_finished_lines(path), start=1):
        try:
            records.append(json.loads(line, parse_constant=lambda name: None))  # NaN is not JSON
        except ValueError as error:
            raise UserError(f"report: line {number} of {path} is not JSON: {error}") from error
    return records


def _numbers(row: dict[str, str], where: str) -> dict[str, float]:
    try:
        numbers = {name: float(value) for name, value in row.items() if value}
    except (TypeError, ValueError) as error:  # a list, if the line has more values than there are columns
        raise UserError(f"report: {where} must have a number or nothing in each column: {error}") from error
    return {name: value for name, value in numbers.items() if math.isfinite(value)}


def _shown(value: Any) -> str:
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
