"""What is written beside the training: checkpoints, metrics, samples, the exported model."""

from lit_rlhf.callbacks.checkpoint import IterationCheckpoint
from lit_rlhf.callbacks.export import ExportAtEnd
from lit_rlhf.callbacks.metrics import MetricsFile
from lit_rlhf.callbacks.progress import ProgressBar
from lit_rlhf.callbacks.samples import Predictions, Samples

__all__ = ["ExportAtEnd", "IterationCheckpoint", "MetricsFile", "Predictions", "ProgressBar", "Samples"]
