"""Files that grow with a run, and are truncated to a checkpoint's state when the run is resumed."""

import csv
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lit_rlhf.files import naming, replacing


class TableFile:
    """A CSV file to which rows and columns can be added.

    Args:
        path: The path of the file.

    >>> import tempfile
    >>> table = TableFile(Path(tempfile.mkdtemp()) / "metrics.csv")
    >>> table.append({"loss": 0.5})
    >>> table.append({"loss": 0.25, "score": 1.0})
    >>> table.path.read_text().splitlines()
    ['loss,score', '0.5,', '0.25,1.0']
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.columns: list[str] = []
        self.rows = 0

    def append(self, row: Mapping[str, float]) -> None:
        """Add a row of numbers, keyed by column; a new column is empty in the earlier rows."""
        new = [name for name in row if name not in self.columns]
        if new:
            self._rewrite(self._read(), [*self.columns, *new])
        with naming(self.path), self.path.open("a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, self.columns, restval="").writerow(row)
        self.rows += 1

    def restore(self, columns: list[str], rows: int) -> None:
        """Keep only the given columns and the first ``rows`` rows of the file."""
        self.columns = columns
        self._rewrite(self._read()[:rows], columns)
        self.rows = rows

    def _read(self) -> list[dict[str, str]]:
        if not self.path.exists():
            return []
        with self.path.open(newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))

    def _rewrite(self, rows: Iterable[Mapping[str, str]], columns: list[str]) -> None:
        self.columns = columns
        with replacing(self.path) as new, new.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns, restval="", extrasaction="ignore")
            if columns:
                writer.writeheader()
            writer.writerows(rows)


class LinesFile:
    """A JSONL file to which records can be added.

    Args:
        path: The path of the file.

    >>> import tempfile
    >>> lines = LinesFile(Path(tempfile.mkdtemp()) / "samples.jsonl")
    >>> lines.append([{"prompt": "2 + 2"}])
    >>> lines.path.read_text(), lines.size
    ('{"prompt": "2 + 2"}\\n', 20)
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Add records, one per line."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with naming(self.path), self.path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(record, ensure_ascii=False, default=str) + "\n" for record in records)

    @property
    def size(self) -> int:
        """The size of the file in bytes; 0 if the file does not exist."""
        return self.path.stat().st_size if self.path.exists() else 0

    def restore(self, size: int) -> None:
        """Keep only the first ``size`` bytes of the file."""
        if self.size > size:
            os.truncate(self.path, size)
