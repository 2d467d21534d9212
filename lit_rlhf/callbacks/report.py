"""A callback that writes the report of a run at its end."""

from pathlib import Path

import lightning

from lit_rlhf.report.page import write_report


class WriteReport(lightning.Callback):
    """A callback that writes ``report.html`` into the run's folder, and prints the path of this file.

    Only process 0 writes the file. An error is printed in one line, and does not make the run fail.

    Args:
        at_end: Whether to write the report at the end of the run; ``lit-rlhf report`` can write it at any time.

    >>> WriteReport(at_end=False).at_end
    False
    """

    def __init__(self, at_end: bool = True) -> None:
        self.at_end = at_end

    def on_fit_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Write the report without PNG files of the charts, because drawing them takes seconds, and print its path."""
        folder = Path(trainer.default_root_dir)
        if not (self.at_end and trainer.is_global_zero and (folder / "metrics.csv").exists()):
            return
        try:
            print(f"report: {write_report([folder], pictures=False)}")
        except Exception as error:
            print(f"report: not written: {' '.join(f'{type(error).__name__}: {error}'.split())[:300]}")
