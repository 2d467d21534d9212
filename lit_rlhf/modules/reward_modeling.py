"""Training of reward models, which learn from preferences to score a response to a prompt."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from transformers import PreTrainedModel

from lit_rlhf.models.adapted import load_adapted_reward_model
from lit_rlhf.models.adapters import LoRA
from lit_rlhf.models.loading import ModelSource
from lit_rlhf.models.scoring import ScalarModel, load_critic, strip_prefix, to_classifier
from lit_rlhf.models.sharding import unsharded
from lit_rlhf.models.trained_adapter import TrainedAdapter, weights_of
from lit_rlhf.modules.preference import PreferenceModule
from lit_rlhf.progress import track
from lit_rlhf.types import PreferenceBatch

MEASURED = 1024
"""The number of pairs or rankings of the training set whose scores are measured.

The standard error of the mean of n independent scores is std/√n: 2.2 % of the standard deviation for the 2,048
responses of 1,024 pairs, and at most 3.1 %, since two responses to the same prompt may score alike. The standard error
of the standard deviation is std/√(2n) if the scores are normally distributed: 1.6 %, and at most 2.2 %.
"""


class RewardModeling(PreferenceModule):
    """Trains a decoder with a scalar head to give better responses higher scores at their last token.

    The loss of a pair is the Bradley–Terry loss, −log σ(r_chosen − r_rejected − margin), and the loss of a ranking is
    the Plackett–Luce loss. The mean and the standard deviation of the scores are measured after the last step and for
    each ``best.ckpt``, on a random sample of 1,024 pairs or rankings of the training set (on all of them if there are
    no more), and stored with the model, in ``config.score_mean`` and ``config.score_std``, so that `RewardModel` can
    normalise the scores. Other checkpoints in the middle of a run have neither.

    Args:
        reward: The initial model: a folder, a hub id, or a configuration for random weights. It is a language model
            (such as the export of an SFT run), which gets a new head, or a sequence classifier with one label.
        label_smoothing: ε in [0, 0.5), the assumed fraction of pairs that are in the wrong order.
        max_tokens: The maximum number of tokens in a micro-batch. A prompt counts once for all its responses, and
            padding only if the model processes it. The number affects memory and speed only.
            On a single GPU, a step that runs out of memory halves this number for the rest of the run.
        clip_grad_norm: The maximum gradient norm, to which a larger gradient is scaled down; None for no clipping.
        optimizer: The optimizer of the model.
        scheduler: The learning-rate schedule, stepped after each batch; None for a constant rate.
        iterations: The number of batches; None to leave the limit to the Trainer's max_epochs.
        adapter: The options of a low-rank adapter to train instead of the whole model; None to train the whole model.

    Raises:
        ValueError: if a number is out of range.
        UserError: if the model is not named or iterations is less than 1; in ``configure_model``, if the model cannot
            be loaded.

    >>> RewardModeling(reward="runs/sft/export", label_smoothing=0.1).max_tokens
    8192
    """

    role = "reward"
    reward: ScalarModel  # set by configure_model
    score_mean: Tensor  # [] float64, the mean over a sample of the training set; NaN if the weights are newer
    score_std: Tensor  # [] float64, the standard deviation over the same sample; NaN if the weights are newer

    def __init__(
        self,
        reward: ModelSource = "",
        label_smoothing: float = 0.0,
        max_tokens: int = 8192,
        clip_grad_norm: float | None = 1.0,
        optimizer: OptimizerCallable = lambda p: torch.optim.AdamW(p, lr=1e-5, weight_decay=0.0, fused=True),
        scheduler: LRSchedulerCallable | None = None,
        iterations: int | None = None,
        adapter: LoRA | None = None,
    ) -> None:
        super().__init__(
            source=reward,
            adapter=adapter,
            label_smoothing=label_smoothing,
            max_tokens=max_tokens,
            clip_grad_norm=clip_grad_norm,
            optimizer=optimizer,
            scheduler=scheduler,
            iterations=iterations,
        )
        for name in ("score_mean", "score_std"):
            self.register_buffer(name, torch.tensor(torch.nan, dtype=torch.float64))

    def configure_model(self) -> None:
        """Load the model; Lightning calls this method more than once, but only the first call loads the model.

        Raises:
            UserError: if the model cannot be loaded.
        """
        if not self.is_configured:
            self.reward = self.place(self._load_reward)
            self.train(self.training)

    def _load_reward(self) -> ScalarModel:
        if self.adapter is None:
            return load_critic(self.source, "model.reward", bias=False)
        return load_adapted_reward_model(self.source, self.adapter, "model.reward")

    def trained_model(self, weights: dict[str, Tensor]) -> tuple[PreTrainedModel, dict[str, Tensor]]:
        """Return the model as a sequence classifier, and its weights.

        The classifier's configuration stores the mean and standard deviation of the scores if they have been measured.

        Args:
            weights: The full ``state_dict`` of the trained model.

        Raises:
            UserError: if transformers has no sequence classifier of this architecture.
        """
        model = to_classifier(self.reward, self.tokenizer, weights)
        if torch.isfinite(self.score_mean):
            model.config.score_mean, model.config.score_std = float(self.score_mean), float(self.score_std)
        return model, model.state_dict()

    def trained_adapter(self, weights: dict[str, Tensor]) -> TrainedAdapter:
        """Return the trained adapter with the head, for export.

        Args:
            weights: The trained part of the full ``state_dict`` of the trained model.
        """
        assert self.adapter is not None
        head = nn.Linear(weights["head.weight"].shape[1], 1, bias="head.bias" in weights)
        head.load_state_dict(strip_prefix("head.", weights))
        scale = (float(self.score_mean), float(self.score_std)) if torch.isfinite(self.score_mean) else None
        own = weights_of(strip_prefix("trunk.", weights), "reward")
        parts: Any = {"source": str(self.source), "lora": self.adapter, "name": "reward", "weights": own}
        return TrainedAdapter(**parts, head=head, scale=scale)

    def scores(self, batch: PreferenceBatch) -> Tensor:
        """Return the score at the last token of each response, [N]."""
        after_tokens = self.reward(batch.tokens, batch.lengths, batch.shared)
        return after_tokens.gather(1, batch.lengths[:, None] - 1).squeeze(1)

    def after_step(self) -> None:
        """Forget the scores' mean and standard deviation of earlier weights; measure them after the last step."""
        self.score_mean.fill_(torch.nan)
        self.score_std.fill_(torch.nan)
        if self.is_last_step():
            self._measure_sample()

    def prepare_export(self) -> bool:
        """Measure the mean and deviation of the scores if these weights have none yet and there is a training set."""
        needed = self.trainer.train_dataloader is not None and bool(self.score_mean.isnan())
        if needed:
            self._measure_sample()
        return needed

    @torch.no_grad()
    def _measure_sample(self) -> None:
        sums = torch.zeros(3, dtype=torch.float64, device=self.device)
        with unsharded(self.reward), self.trainer.precision_plugin.forward_context():  # also outside training_step
            loader: Any = self.trainer.train_dataloader
            batches, count = loader.once(MEASURED), loader.batches_in_once(MEASURED)
            for batch in track(batches, "measure the scores", "batches", count):
                for micro_batch in self.micro_batches(batch.to(self.device)):
                    scores = self.scores(micro_batch).double()
                    sums += torch.stack([torch.ones_like(scores).sum(), scores.sum(), (scores**2).sum()])
        responses, total, squares = self.sum_over_ranks(sums)
        self.score_mean.copy_(total / responses)
        self.score_std.copy_((squares / responses - self.score_mean**2).clamp(min=0).sqrt())
