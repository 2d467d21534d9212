"""Files and folders that are either complete or absent, even if the process or the machine stops while writing them."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EFBIG)
"""The numbers of the errors that say that a disk is full, read-only or broken, or that a limit is reached."""


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``, and rename what was written there to ``path`` at the end.

    A file or a folder can be written. It is flushed to the disk before it is renamed, so ``path`` never names something
    incomplete. A file is replaced in one step. A folder takes two: the older one is renamed to ``.NAME.old`` and, once
    the new one has its name, deleted; a process that is killed between these steps leaves the older folder there.
    Two processes must not replace the same path at the same time.

    Args:
        path: The path of a file or a folder; the folders above it are created.

    Yields:
        The temporary path ``.NAME.new`` in the same folder, which names nothing yet. After an exception, what was
        written there is deleted, and ``path`` names what it named before.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "model"
    >>> with replacing(path) as new:
    ...     new.mkdir()
    ...     _ = (new / "config.json").write_text("{}")
    ...     path.exists()
    False
    >>> [file.name for file in path.iterdir()]
    ['config.json']
    """
    new, old = (path.with_name(f".{path.name}.{end}") for end in ("new", "old"))
    path.parent.mkdir(parents=True, exist_ok=True)
    remove(new)
    try:
        with naming(path):
            yield new
            flush(new)
            _put(new, path, old)
    except BaseException:
        with suppress(OSError):  # the exception that is raised again says more
            remove(new)
        raise
    flush_entry(path.parent)
    remove(old)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Return a context in which an `OSError` that does not name a file, such as that of a full disk, names ``path``."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def disk_error(error: BaseException | None) -> OSError | None:
    """Return the error of a full, read-only or broken disk that has led to an error, or None if it has another cause.

    >>> full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "metrics.csv")
    >>> disk_error(full) is full, disk_error(ValueError("no")) is None
    (True, True)
    """
    while error is not None:
        if isinstance(error, OSError) and error.errno in DISK_ERRORS:
            return error
        failures = getattr(error, "failures", {})  # of each process, in the error of a checkpoint with shards
        found = [disk_error(failure) for failure, _ in failures.values()] if isinstance(failures, dict) else []
        if any(found):
            return next(filter(None, found))
        error = error.__cause__ or error.__context__
    return None


def write_text(path: Path, text: str) -> None:
    """Write a text file, in UTF-8, with `replacing`.

    Args:
        path: The path of the file; the folders above it are created.
        text: The content.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "run" / "config.yaml"
    >>> write_text(path, "seed: 1")
    >>> path.read_text()
    'seed: 1'
    """
    with replacing(path) as new:
        new.write_text(text, encoding="utf-8")


def flush(path: Path) -> None:
    """Write a file, or a folder with everything in it, from the operating system's memory to the disk."""
    for inner in path.iterdir() if path.is_dir() else ():
        flush(inner)
    flush_entry(path)


def remove(path: Path) -> None:
    """Delete a file, a link, or a folder with everything in it, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _put(new: Path, path: Path, old: Path) -> None:
    """Rename ``new`` to ``path``, after renaming what ``path`` names to ``old`` unless both are files."""
    if not path.exists() or not (path.is_dir() or new.is_dir()):
        new.replace(path)
        return
    remove(old)
    path.rename(old)
    try:
        new.rename(path)
    except BaseException:
        old.rename(path)
        raise


def flush_entry(path: Path) -> None:
    """Write one file, or the names in one folder, from the operating system's memory to the disk."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    except OSError:
        if not path.is_dir():  # some network file systems refuse to flush folders
            raise
    finally:
        os.close(number)
