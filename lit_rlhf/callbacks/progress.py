"""The progress bar."""

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
    """Shows score, KL to the reference (nats a response) and response tokens a second, by their short names."""

    def get_metrics(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> dict[str, int | str | float | dict[str, float]]:
        """What stands behind the bar."""
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        return {SHORT.get(name, name): value for name, value in metrics.items()}
