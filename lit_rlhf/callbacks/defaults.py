"""The callbacks that the command line adds to every run, as a list for runs that Python code starts."""

from lightning.pytorch.callbacks import Callback

from lit_rlhf.callbacks.checkpoint import IterationCheckpoint
from lit_rlhf.callbacks.collapse_guard import CollapseGuard
from lit_rlhf.callbacks.export import ExportAtEnd
from lit_rlhf.callbacks.loggers import LogDetails
from lit_rlhf.callbacks.metrics import MetricsFile
from lit_rlhf.callbacks.plan import PrintPlan
from lit_rlhf.callbacks.progress import ProgressBar
from lit_rlhf.callbacks.report import WriteReport
from lit_rlhf.callbacks.run_lock import RunLock
from lit_rlhf.callbacks.samples import Predictions, Samples
from lit_rlhf.callbacks.summary import Summary

UNNAMED: tuple[type[Callback], ...] = (RunLock, MetricsFile, Predictions, ProgressBar, ExportAtEnd)
"""The callbacks that have no options on the command line."""

WITH_OPTIONS: dict[str, type[Callback]] = {
    "checkpoint": IterationCheckpoint,
    "samples": Samples,
    "details": LogDetails,
    "collapse": CollapseGuard,
    "plan": PrintPlan,
    "report": WriteReport,
    "summary": Summary,  # the last one, because it names the files that the others write
}
"""The callbacks that have options on the command line, by the name of their option group."""


def default_callbacks(*own: Callback) -> list[Callback]:
    """Return the callbacks that a run of ``lit-rlhf fit`` has by default.

    Args:
        own: Callbacks to add; a callback of the same class as a default callback replaces the default.

    >>> callbacks = default_callbacks(IterationCheckpoint(every_n=5))
    >>> [type(callback).__name__ for callback in callbacks][:4]
    ['IterationCheckpoint', 'Samples', 'LogDetails', 'CollapseGuard']
    >>> callbacks[0].every_n
    5
    """
    defaults = [callback() for callback in (*WITH_OPTIONS.values(), *UNNAMED)]  # a guard ends a run before its export
    placed = [next((callback for callback in own if type(callback) is type(default)), default) for default in defaults]
    return [*(callback for callback in own if callback not in placed), *placed]
