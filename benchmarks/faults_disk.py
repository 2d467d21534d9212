"""A file system in memory that is full at a random point of a run, for faults.py."""

from __future__ import annotations

import random
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from faults_runs import Setting, messages

SIZE = 64 << 20
"""The size of the file system, in bytes."""


@contextmanager
def small_disk(folder: Path) -> Iterator[Path]:
    """Mount a file system in memory at a folder; this needs the right to mount."""
    folder.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def size_of(folder: Path) -> int:
    """Return the size of the files in a folder, in bytes."""
    return sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink())


def fill(setting: Setting, kind: str, disk: Path, draw: random.Random) -> tuple[bool, list[str]]:
    """Start a run on a disk that gets full, make room, and resume it.

    Returns:
        Whether the disk got full, and what was wrong: the message is not one line about the disk, or the resumed run
        did not end.
    """
    room = int(size_of(setting.whole(kind)) * draw.uniform(0.02, 1.0))
    filler = disk / "filler"
    with filler.open("wb") as file:
        file.write(bytes(SIZE - room))
    done = setting.start(kind, str(disk / "run"), "--ckpt_path", "last").wait()
    filler.unlink()
    if all(one.returncode == 0 for one in done):
        return False, []
    lines = [line for one in done for line in messages(one.stderr)]
    wrong = [line for line in lines if not (line.startswith("lit-rlhf: error: ") and "No space left" in line)]
    wrong += [f"status {one.returncode}" for one in done if one.returncode != 1]
    setting.start(kind, str(disk / "run"), "--ckpt_path", "last").end_well()
    return True, wrong
