"""A progress bar that shows metrics by short names."""

import lightning
from lightning.pytorch.callbacks import TQDMProgressBar

SHORT = {
    "objective/score": "score",
    "objective/kl_to_ref": "KL",
    "perf/tokens_per_second": "tokens/s",
    "train/loss": "loss",
    "val/loss": "val loss",
    "val/perplexity": "val perplexity",
}


class ProgressBar(TQDMProgressBar):
    """A progress bar that shows metrics by short names, such as the KL to the reference (nats per response) as ``KL``.

    >>> SHORT["objective/kl_to_ref"]
    'KL'
    """

    def get_metrics(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> dict[str, int | str | float | dict[str, float]]:
        """Return the metrics to show after the bar, keyed by their short names."""
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        return {SHORT.get(name, name): value for name, value in metrics.items()}
