"""What reward modelling and DPO share: each response has a score, and the better ones should have the higher."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torchmetrics.classification import BinaryCalibrationError

from lit_rlhf.algorithms.preferences import bradley_terry, plackett_luce
from lit_rlhf.errors import UserError
from lit_rlhf.models.loading import ModelSource
from lit_rlhf.models.sharding import gathered, is_sharded
from lit_rlhf.modules.metrics import Means, Stopwatch, deviation
from lit_rlhf.modules.module import AlignmentModule
from lit_rlhf.modules.update import check_finite
from lit_rlhf.types import PreferenceBatch


class PreferenceModule(AlignmentModule):
    """Minimises Bradley–Terry's loss on pairs, Plackett–Luce's on rankings; one optimizer step a batch.

    Derived modules say what a response's score is. The arguments are theirs.

    Raises:
        ValueError: if a number is out of range.
    """

    batch_type = PreferenceBatch

    def __init__(
        self,
        *,
        source: ModelSource,
        label_smoothing: float,
        max_tokens: int,
        clip_grad_norm: float | None,
        optimizer: OptimizerCallable,
        scheduler: LRSchedulerCallable | None,
        iterations: int | None,
    ) -> None:
        super().__init__(source, iterations)
        if not 0.0 <= label_smoothing < 0.5:
            raise ValueError(f"model.label_smoothing must lie in [0, 0.5), not {label_smoothing}")
        if max_tokens < 1:
            raise ValueError(f"model.max_tokens must be 1 or more, not {max_tokens}")
        if clip_grad_norm is not None and not clip_grad_norm > 0:
            raise ValueError(f"model.clip_grad_norm must be positive or null, not {clip_grad_norm}")
        self.automatic_optimization = False
        self.label_smoothing = label_smoothing
        self.max_tokens = max_tokens
        self.clip_grad_norm = clip_grad_norm
        self.make_optimizer = optimizer
        self.make_scheduler = scheduler
        self.calibration = BinaryCalibrationError(n_bins=10, norm="l1", sync_on_compute=True)

    @abstractmethod
    def scores(self, batch: PreferenceBatch) -> Tensor:
        """The score of each response, [N]."""

    def trained_parameters(self) -> list[nn.Parameter]:
        """Those of the trained model."""
        return list(self.get_submodule(self.role).parameters())

    def configure_optimizers(self) -> Any:
        """The optimizer, and its schedule by batches."""
        optimizer = self.make_optimizer(self.trained_parameters())
        schedule = {} if self.make_scheduler is None else {"lr_scheduler": self.make_scheduler(optimizer)}
        return {"optimizer": optimizer, **schedule}

    # ---------------------------------------------------------------- training

    def training_step(self, batch: PreferenceBatch, batch_idx: int) -> None:
        """Gradients of all micro-batches, and a step."""
        means, watch = Means(self.device), Stopwatch()
        with watch.phase("update"):
            self._step(batch, means)
        tokens, responses = self.sum_over_ranks(
            torch.tensor([float(batch.lengths.sum()), float(len(batch.lengths))], device=self.device)
        ).tolist()
        self.count_iteration()
        self.after_step()
        measured = {f"train/{name}": value for name, value in means.compute().items()}
        measured |= self.trainer.strategy.broadcast(watch.measured(tokens, responses))  # those of process 0
        measured["progress/iteration"] = float(self.iteration)
        shown = ("train/loss", "train/accuracy")
        self.log_dict({k: v for k, v in measured.items() if k not in shown}, batch_size=1)
        self.log_dict({k: measured[k] for k in shown}, prog_bar=True, batch_size=1)

    def _step(self, batch: PreferenceBatch, means: Means) -> None:
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        count = self.sum_over_ranks(torch.tensor(float(len(batch.mask)), device=self.device))
        pieces = batch.micro_batches(self.max_tokens)
        most = self.max_over_ranks(len(pieces))[0] if is_sharded(self.get_submodule(self.role)) else len(pieces)
        for number in range(most):
            piece = pieces[min(number, len(pieces) - 1)]
            scores = piece.by_ranking(self.scores(piece))
            loss = self.loss(scores, piece)
            check_finite(loss=loss.mean())
            if number < len(pieces):
                self.measure(scores.detach(), loss.detach(), piece, means)
            else:  # other processes have more work, and sharded weights need us all
                loss = loss * 0.0
            with self.synchronized(number == most - 1):
                self.manual_backward(loss.sum() / count * self.trainer.world_size)
        means.add("grad_norm", self.clip(optimizer, self.clip_grad_norm))
        means.add("lr", optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler: Any = self.lr_schedulers()
        if scheduler is not None:
            scheduler.step()

    def after_step(self) -> None:
        """What else belongs to this iteration's checkpoint."""

    def loss(self, scores: Tensor, batch: PreferenceBatch) -> Tensor:
        """The loss of each ranking, [B].

        Args:
            scores: [B, K], best first, 0 where there is no response.
            batch: The rankings.

        Raises:
            UserError: for label smoothing on rankings of more than two.
        """
        if batch.margin is not None or self.label_smoothing:
            if scores.shape[1] > 2:
                raise UserError("model.label_smoothing is for pairs: the data holds rankings of more than two")
            return bradley_terry(scores[:, 0], scores[:, 1], batch.margin, self.label_smoothing)
        return plackett_luce(scores, batch.mask)

    # -------------------------------------------------------------- measuring

    def measure(self, scores: Tensor, loss: Tensor, batch: PreferenceBatch, means: Means) -> None:
        """Loss, and over all pairs of a ranking: how often, and by how much, the better one is ahead."""
        ahead, _ = pairs(scores, batch)
        means.add("loss", loss)
        means.add("accuracy", _won(ahead))
        means.add("margin", ahead)

    def on_validation_epoch_start(self) -> None:
        """Start the means."""
        super().on_validation_epoch_start()
        self.calibration.reset()

    def on_test_epoch_start(self) -> None:
        """Start the means."""
        super().on_test_epoch_start()
        self.calibration.reset()

    @torch.no_grad()
    def validation_step(self, batch: PreferenceBatch, batch_idx: int) -> None:
        """Add to the held-out means.

        ``accuracy_of_length`` is what the rule «the longer one wins» reaches on the same pairs; ``accuracy_if_longer``
        and ``accuracy_if_shorter`` are the model's where the better response is the longer, or the shorter; ``ece`` is
        the expected calibration error of the probability that the one ahead wins.
        """
        with gathered(*self.children()):
            for piece in batch.micro_batches(self.max_tokens):
                self._validate(piece)

    def _validate(self, piece: PreferenceBatch) -> None:
        responses = self.scores(piece)
        scores = piece.by_ranking(responses)
        self.measure(scores, self.loss(scores, piece), piece, self.held_out)
        ahead, longer = pairs(scores, piece)
        won = _won(ahead)
        self.held_out.add("accuracy_of_length", _won(longer))
        self.held_out.add("accuracy_if_longer", won[longer > 0])
        self.held_out.add("accuracy_if_shorter", won[longer < 0])
        self.held_out.add("score", responses)
        self.held_out.add("score_squared", responses.double() ** 2)
        self.calibration.update(*_claims(ahead))

    def test_step(self, batch: PreferenceBatch, batch_idx: int) -> None:
        """As ``validation_step``."""
        self.validation_step(batch, batch_idx)

    def summary(self, means: dict[str, float]) -> dict[str, float]:
        """With the scores' deviation and the calibration error."""
        means["score_std"] = deviation(means)
        means["ece"] = float(self.calibration.compute())
        return {name: value for name, value in means.items() if value == value}  # NaN: there are no such pairs


def pairs(scores: Tensor, batch: PreferenceBatch) -> tuple[Tensor, Tensor]:
    """Over all pairs in all rankings: the better response's score less the worse's, and likewise their lengths.

    Args:
        scores: [B, K], best first.
        batch: The rankings.

    Returns:
        Two [P] tensors.
    """
    length = batch.by_ranking((batch.lengths - batch.prompt_lengths).to(scores.dtype))
    better, worse = torch.triu_indices(scores.shape[1], scores.shape[1], offset=1, device=scores.device)
    there = batch.mask[:, better] & batch.mask[:, worse]
    return (scores[:, better] - scores[:, worse])[there], (length[:, better] - length[:, worse])[there]


def _won(ahead: Tensor) -> Tensor:
    """1 where it is ahead, ½ where the two are level."""
    return (ahead > 0).float() + 0.5 * (ahead == 0)


def _claims(ahead: Tensor) -> tuple[Tensor, Tensor]:
    """The probability claimed for the response that is ahead, and whether it is the better; a tie is half each."""
    claimed, right = torch.sigmoid(ahead.abs()), ahead >= 0
    tied = ahead == 0
    return torch.cat([claimed, claimed[tied]]), torch.cat([right, ~right[tied]]).int()
