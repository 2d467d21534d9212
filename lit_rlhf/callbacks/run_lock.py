"""A callback that refuses a run in the folder of a run that is still training, or in a folder that it cannot write."""

import fcntl
import os
import socket
from contextlib import suppress
from pathlib import Path
from typing import IO

import lightning

from lit_rlhf.errors import UserError

LOCK = ".lock"
"""The file in a run's folder that a training run locks; a run that is killed leaves the file, but not the lock."""


class RunLock(lightning.Callback):
    """A callback that lets only one run train in a folder at a time.

    Process 0 locks the file `LOCK` in the run's folder. The operating system releases the lock when this process ends,
    however it ends.

    >>> RunLock().folder is None
    True
    """

    def __init__(self) -> None:
        self.folder: Path | None = None
        self._file: IO[str] | None = None

    def take(self, folder: Path) -> None:
        """Create the folder unless it exists, and lock it, in place of any other folder that this callback has locked.

        Args:
            folder: The run's folder.

        Raises:
            UserError: if another process holds the lock, or if the folder cannot be written.
        """
        if self._file is not None and _is(self._file, folder / LOCK):
            return
        file = _open(folder)
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "another process"
            file.close()
            raise UserError(
                f"trainer.default_root_dir: a run is training in {folder} ({holder}): wait for its end, or choose "
                "another folder"
            ) from None
        if not _is(file, folder / LOCK):  # the run before removed it in the meantime
            file.close()
            self.take(folder)
            return
        self.release()
        file.truncate(0)
        with suppress(OSError):  # the note is only for messages, and the disk may be full
            file.write(f"process {os.getpid()} on {socket.gethostname()}")
            file.flush()
        self.folder, self._file = folder, file

    def release(self) -> None:
        """Release the lock, if there is one."""
        if self._file is not None and self.folder is not None:
            if _is(self._file, self.folder / LOCK):
                (self.folder / LOCK).unlink()
            self._file.close()
        self.folder = self._file = None

    def setup(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Lock the run's folder for a training run, unless it is locked already.

        Raises:
            UserError: if another process holds the lock, or if the folder cannot be written.
        """
        if stage == "fit" and trainer.is_global_zero:
            self.take(Path(trainer.default_root_dir))

    def teardown(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Release the lock."""
        self.release()


def _open(folder: Path) -> IO[str]:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return (folder / LOCK).open("a+", encoding="utf-8")
    except OSError as error:
        raise UserError(f"trainer.default_root_dir: {folder} cannot be written: {error.strerror}") from error


def _is(file: IO[str], path: Path) -> bool:
    """Return whether a path names an open file."""
    return path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat())
