"""Callbacks that plan, show, save, measure, guard and report a run, and callbacks that change its decoder layers."""

from lit_rlhf.callbacks.checkpoint import IterationCheckpoint
from lit_rlhf.callbacks.collapse_guard import CollapseGuard
from lit_rlhf.callbacks.defaults import default_callbacks
from lit_rlhf.callbacks.export import ExportAtEnd
from lit_rlhf.callbacks.gradients import GradientShares
from lit_rlhf.callbacks.kl_guard import KLGuard
from lit_rlhf.callbacks.layers import ActivationCheckpointing, CompileLayers
from lit_rlhf.callbacks.loggers import LogDetails
from lit_rlhf.callbacks.metrics import MetricsFile
from lit_rlhf.callbacks.plan import PrintPlan
from lit_rlhf.callbacks.progress import ProgressBar
from lit_rlhf.callbacks.report import WriteReport
from lit_rlhf.callbacks.samples import Predictions, Samples
from lit_rlhf.callbacks.summary import Summary
from lit_rlhf.callbacks.throughput import Throughput

__all__ = [
    "ActivationCheckpointing",
    "CollapseGuard",
    "CompileLayers",
    "ExportAtEnd",
    "GradientShares",
    "IterationCheckpoint",
    "KLGuard",
    "LogDetails",
    "MetricsFile",
    "Predictions",
    "PrintPlan",
    "ProgressBar",
    "Samples",
    "Summary",
    "Throughput",
    "WriteReport",
    "default_callbacks",
]
