"""Callbacks: plan, checkpoints, files, export, guards and measurements of a run, compiled or recomputed layers."""

from lit_rlhf.callbacks.checkpoint import IterationCheckpoint
from lit_rlhf.callbacks.export import ExportAtEnd
from lit_rlhf.callbacks.gradients import GradientShares
from lit_rlhf.callbacks.kl_guard import KLGuard
from lit_rlhf.callbacks.layers import ActivationCheckpointing, CompileLayers
from lit_rlhf.callbacks.metrics import MetricsFile
from lit_rlhf.callbacks.plan import PrintPlan
from lit_rlhf.callbacks.progress import ProgressBar
from lit_rlhf.callbacks.samples import Predictions, Samples
from lit_rlhf.callbacks.throughput import Throughput

__all__ = [
    "ActivationCheckpointing",
    "CompileLayers",
    "ExportAtEnd",
    "GradientShares",
    "IterationCheckpoint",
    "KLGuard",
    "MetricsFile",
    "Predictions",
    "PrintPlan",
    "ProgressBar",
    "Samples",
    "Throughput",
]
