"""A callback that keeps the folder of an older run when a new run takes its place."""

import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning

from lit_rlhf.callbacks.run_lock import LOCK


class OlderRun(lightning.Callback):
    """A callback that renames the folder of an older run when a new run takes its place.

    If the new run fails before its first iteration is complete, the older run's folder gets its name back. `move_aside`
    renames the folder before the fit, because loggers write to the new folder before any hook is called. If there is no
    older run, the ``config.yaml`` of a new run that fails this early is removed, so that its folder does not count
    as a run's folder.

    >>> OlderRun().aside is None
    True
    """

    def __init__(self) -> None:
        self.folder: Path | None = None
        self.aside: Path | None = None

    def move_aside(self, folder: Path) -> None:
        """Rename a folder that contains an older run to the first free name among ``NAME.1``, ``NAME.2``, ….

        Args:
            folder: The folder of the new run; a folder without a ``config.yaml`` is left as it is.
        """
        self.folder = folder
        if not (folder / "config.yaml").exists():
            return
        number = 1
        while (aside := folder.with_name(f"{folder.name}.{number}")).exists():
            number += 1
        folder.rename(aside)
        (aside / LOCK).unlink(missing_ok=True)
        self.aside = aside
        print(f"{folder} contained an older run, which is now in {aside}")

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Keep the new folder, since the new run has completed an iteration."""
        self.folder = self.aside = None

    def on_exception(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, exception: BaseException
    ) -> None:
        """Give the older run's folder its name back, if the new run has completed no iteration.

        In that case, if there is an older run, the new run's folder is removed. Otherwise, only the ``config.yaml`` in
        the new run's folder is removed, and the folder itself if nothing else is in it.
        """
        if self.folder is None:
            return
        if self.aside is None:
            for name in ("config.yaml", LOCK):
                (self.folder / name).unlink(missing_ok=True)
            with suppress(OSError):  # if the folder is not empty
                self.folder.rmdir()
            return
        shutil.rmtree(self.folder, ignore_errors=True)
        self.aside.rename(self.folder)
        print(f"the run failed before its first iteration was complete, so the older run is in {self.folder} again")
        self.folder = self.aside = None
