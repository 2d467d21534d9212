"""The base class of reward modelling and DPO, which learn to give better responses higher scores."""

from __future__ import annotations

import math
from abc import abstractmethod
from functools import partial
from typing import Any, NamedTuple

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor
from torchmetrics.classification import BinaryCalibrationError

from lit_rlhf.algorithms.preferences import bradley_terry, plackett_luce
from lit_rlhf.batching import preference_micro_batches
from lit_rlhf.errors import UserError
from lit_rlhf.models.adapters import LoRA
from lit_rlhf.models.loading import ModelSource
from lit_rlhf.models.sharding import unsharded
from lit_rlhf.modules.incident_rows import preference_records
from lit_rlhf.modules.metrics import Metrics, Stopwatch, pop_standard_deviation
from lit_rlhf.modules.module import AlignmentModule
from lit_rlhf.modules.steps import add_gradients, step_optimizers, within_memory
from lit_rlhf.modules.update import check_limits
from lit_rlhf.types import PreferenceBatch


class PreferenceModule(AlignmentModule):
    """Minimises the Bradley–Terry loss on pairs or the Plackett–Luce loss on rankings.

    Each batch takes one optimizer step. Derived classes define the score of a response and document the arguments.

    Raises:
        ValueError: if a number is out of range.
        UserError: if the model is not named, or if iterations is less than 1.
    """

    batch_type = PreferenceBatch

    def __init__(
        self,
        *,
        source: ModelSource,
        adapter: LoRA | None,
        label_smoothing: float,
        max_tokens: int,
        clip_grad_norm: float | None,
        optimizer: OptimizerCallable,
        scheduler: LRSchedulerCallable | None,
        iterations: int | None,
    ) -> None:
        super().__init__(source, iterations, {"model": (optimizer, scheduler)}, adapter)
        if not 0.0 <= label_smoothing < 0.5:
            raise ValueError(f"model.label_smoothing must be in [0, 0.5), not {label_smoothing}")
        check_limits(max_tokens, clip_grad_norm)
        self.automatic_optimization = False
        self.label_smoothing = label_smoothing
        self.max_tokens = max_tokens
        self.clip_grad_norm = clip_grad_norm
        self.calibration = BinaryCalibrationError(n_bins=10, norm="l1", sync_on_compute=True)

    @abstractmethod
    def scores(self, batch: PreferenceBatch) -> Tensor:
        """Return the score of each response, [N]."""

    def numbers_of(self, batch: PreferenceBatch) -> dict[str, Tensor]:
        """Return the numbers of each response, [N] each, that the file of an incident shows; ``scores`` is one."""
        return {"scores": self.scores(batch)}

    # ---------------------------------------------------------------- training

    def training_step(self, batch: PreferenceBatch, batch_idx: int) -> None:
        """Take one optimizer step on a batch.

        Raises:
            UserError: if the loss or the gradient norm is not finite, if memory runs out (see `within_memory`), or if
                `loss` raises one.
        """
        metrics, watch = self.metrics, Stopwatch()
        metrics.clear(self.device)
        with watch.phase("update"):
            self._step(batch, metrics)
        tokens, responses = self.sum_over_ranks(
            torch.tensor([float(batch.lengths.sum()), float(len(batch.lengths))], device=self.device)
        ).tolist()
        self.count_iteration()
        self.after_step()
        logged = {f"train/{name}": value for name, value in metrics.compute().items()}
        logged |= self.trainer.strategy.broadcast(watch.summary(tokens, responses))  # as measured by process 0
        logged["progress/iteration"] = float(self.iteration)
        self.log_iteration(logged, shown=("train/loss", "train/accuracy"))

    def _step(self, batch: PreferenceBatch, metrics: Metrics) -> None:
        sizes = batch.by_ranking(batch.lengths).amax(1) * batch.mask.sum(1)  # of each ranking, with padding
        loss = within_memory(self, partial(self._add_gradients, batch, metrics), sizes, metrics)
        records = partial(preference_records, self, batch)
        (norm,) = step_optimizers(self, self.clip_grad_norm, records, loss=loss).values()
        (optimizer,) = self.optimizers_by_name().values()
        metrics.add("grad_norm", norm)
        metrics.add("lr", optimizer.param_groups[0]["lr"])
        self.step_schedulers()

    def _add_gradients(self, batch: PreferenceBatch, metrics: Metrics) -> Tensor:
        """Compute the gradient of a batch, and return this process's part of the mean loss over all rankings, []."""
        rankings = self.sum_over_ranks(torch.full((), float(len(batch.mask)), device=self.device))

        def loss_of(micro_batch: PreferenceBatch, counts: bool) -> Tensor:
            scores = micro_batch.by_ranking(self.scores(micro_batch))
            loss = self.loss(scores, micro_batch)
            if counts:
                self.measure(scores.detach(), loss.detach(), micro_batch, metrics)
            return loss.sum() / rankings

        return add_gradients(self, self.micro_batches(batch), loss_of)

    def micro_batches(self, batch: PreferenceBatch) -> list[PreferenceBatch]:
        """Return the micro-batches of a batch, of at most ``max_tokens`` tokens each."""
        model: Any = self.get_submodule(self.role)
        return preference_micro_batches(batch, self.max_tokens, model.pads)

    def after_step(self) -> None:
        """Update any other state that this iteration's checkpoint must hold; by default, do nothing."""

    def loss(self, scores: Tensor, batch: PreferenceBatch) -> Tensor:
        """Return the loss of each ranking, [B].

        Args:
            scores: The scores, [B, K], best response first; 0 where a ranking has fewer than K responses.
            batch: The rankings.

        Raises:
            UserError: if label smoothing or a margin is used with rankings of more than two responses.
        """
        if batch.margin is not None or self.label_smoothing:
            if scores.shape[1] > 2:
                raise UserError("model.label_smoothing is for pairs: the data holds rankings of more than two")
            return bradley_terry(scores[:, 0], scores[:, 1], batch.margin, self.label_smoothing)
        return plackett_luce(scores, batch.mask)

    # -------------------------------------------------------------- measuring

    def measure(self, scores: Tensor, loss: Tensor, batch: PreferenceBatch, metrics: Metrics) -> None:
        """Record the loss and, over all pairs, how often and by how much the better response scores higher.

        Args:
            scores: The scores, [B, K], best response first.
            loss: The loss of each ranking, [B].
            batch: The rankings.
            metrics: Receives ``loss``, ``accuracy`` and ``margin``.
        """
        ahead, _, both = pairs(scores, batch)
        metrics.add("loss", loss)
        metrics.add_masked("accuracy", _won(ahead), both)
        metrics.add_masked("margin", ahead, both)

    def on_validation_epoch_start(self) -> None:
        """Reset the held-out metrics, including the calibration error."""
        super().on_validation_epoch_start()
        self.calibration.reset()

    def on_test_epoch_start(self) -> None:
        """Reset the held-out metrics, including the calibration error."""
        super().on_test_epoch_start()
        self.calibration.reset()

    @torch.no_grad()
    def validation_step(self, batch: PreferenceBatch, batch_idx: int) -> None:
        """Add a batch to the held-out metrics.

        ``accuracy_of_length`` is the accuracy of the rule "the longer response wins" on all pairs;
        ``accuracy_if_longer`` and ``accuracy_if_shorter`` are the model's accuracies on the pairs whose better response
        is the longer one and the shorter one, respectively; ``ece`` is the expected calibration error of the predicted
        probability that the response with the higher score is the better one.
        """
        with unsharded(*self.children()):
            for micro_batch in self.micro_batches(batch):
                self._validate(micro_batch)

    def _validate(self, micro_batch: PreferenceBatch) -> None:
        responses = self.scores(micro_batch)
        scores = micro_batch.by_ranking(responses)
        self.measure(scores, self.loss(scores, micro_batch), micro_batch, self.held_out)
        ahead, longer, both = pairs(scores, micro_batch)
        ahead, longer = ahead[both], longer[both]
        won = _won(ahead)
        self.held_out.add("accuracy_of_length", _won(longer))
        self.held_out.add("accuracy_if_longer", won[longer > 0])
        self.held_out.add("accuracy_if_shorter", won[longer < 0])
        self.held_out.add("score", responses)
        self.held_out.add("score_squared", responses.double() ** 2)
        self.calibration.update(*_predictions(ahead))

    def test_step(self, batch: PreferenceBatch, batch_idx: int) -> None:
        """Add a batch to the test metrics in the same way as ``validation_step``."""
        self.validation_step(batch, batch_idx)

    def summary(self, means: dict[str, float]) -> dict[str, float]:
        """Return the means that are not NaN, with the standard deviation of the scores and the calibration error."""
        means["score_std"] = pop_standard_deviation(means)
        means["ece"] = float(self.calibration.compute())
        return {name: value for name, value in means.items() if not math.isnan(value)}  # NaN if no pair was counted


class Pairs(NamedTuple):
    """All pairs of two responses to the same prompt: P pairs for each of B rankings."""

    ahead: Tensor  # [B, P], the difference in score, better minus worse
    longer: Tensor  # [B, P], the difference in response length, in tokens
    both: Tensor  # [B, P] bool, True where the ranking has both responses


def pairs(scores: Tensor, batch: PreferenceBatch) -> Pairs:
    """Return the differences in score and in length between the two responses of every pair.

    Args:
        scores: The scores, [B, K], best response first.
        batch: The rankings.
    """
    length = batch.by_ranking((batch.lengths - batch.prompt_lengths).to(scores.dtype))
    better, worse = torch.triu_indices(scores.shape[1], scores.shape[1], offset=1, device=scores.device)
    both = batch.mask[:, better] & batch.mask[:, worse]
    return Pairs(scores[:, better] - scores[:, worse], length[:, better] - length[:, worse], both)


def _won(ahead: Tensor) -> Tensor:
    """Return 1 for each pair whose better response has the higher score, ½ for each tie, and 0 for the other pairs."""
    return (ahead > 0).float() + 0.5 * (ahead == 0)


def _predictions(ahead: Tensor) -> tuple[Tensor, Tensor]:
    """Return the predicted probability that each pair's higher-scoring response is the better one, and whether it is.

    A tie counts as two predictions, one correct and one incorrect.
    """
    probability, correct, tied = torch.sigmoid(ahead.abs()), ahead >= 0, ahead == 0
    return torch.cat([probability, probability[tied]]), torch.cat([correct, ~correct[tied]]).int()
