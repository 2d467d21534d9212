"""The rollouts that the iterations learn from, generated when needed or, with `Ahead`, some iterations earlier."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol, cast

import lightning
import torch

from lit_rlhf.batching import gather_rollout
from lit_rlhf.data.loader import ResumableLoader
from lit_rlhf.errors import UserError
from lit_rlhf.generation import Ahead, Engine, Sampling
from lit_rlhf.generation.engine import SpecialTokens
from lit_rlhf.models.actor import Actor
from lit_rlhf.modules.guard import Guard, Mismatch, measure_mismatch
from lit_rlhf.modules.incidents import check_logprobs
from lit_rlhf.modules.metrics import Metrics
from lit_rlhf.modules.module import AlignmentModule
from lit_rlhf.randomness import Stream
from lit_rlhf.types import PromptBatch, Rollout


class Learner(Protocol):
    """The attributes of `OnPolicy` that this file uses and `AlignmentModule` lacks."""

    special_tokens: SpecialTokens
    generate: Callable[[PromptBatch, Actor, Stream, int], Rollout]


@dataclass(frozen=True, slots=True)
class CheckedRollout:
    """This process's rollout of an iteration, with the mismatch if the guard measured it."""

    rollout: Rollout
    mismatch: Mismatch | None
    learner_waited: float = 0.0  # the seconds for which the learner waited for this rollout
    generators_waited: float = 0.0  # the seconds for which the generators had nothing to do before this rollout


class Rollouts(lightning.Callback):
    """The source of rollouts, each checked by the guard.

    As a callback, it stores in checkpoints the rollouts of `Ahead` that no iteration has learned from yet.

    Args:
        engine: The engine that generates the responses.
        sampling: The options for sampling.
        guard: The check of the engine's log-probabilities.
    """

    def __init__(self, engine: Engine, sampling: Sampling, guard: Guard) -> None:
        self.engine = engine
        self.sampling = sampling
        self.guard = guard
        self.ahead = engine if isinstance(engine, Ahead) and engine.lag else None
        self.landed: dict[int, CheckedRollout] = {}  # by iteration: generated, but not learned from yet
        self.saved: dict[int, dict[str, Any]] = {}  # by iteration: read from a checkpoint, with all processes' rows

    # ----------------------------------------------------------- a callback's hooks

    def setup(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Forget the rollouts of an earlier run.

        Raises:
            UserError: if the run trains with responses from a restricted distribution.
        """
        for option, value, whole in (("top_k", self.sampling.top_k, 0), ("top_p", self.sampling.top_p, 1)):
            if stage == "fit" and value != whole:
                raise UserError(
                    f"model.sampling.{option} is {value}, but training needs responses from the whole distribution, "
                    f"whose log-probabilities it uses: set it to {whole}"
                )
        self.landed.clear()
        self.saved.clear()

    def on_save_checkpoint(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Wait for the rollouts being generated, and save all rollouts that no iteration has learned from yet."""
        if self.ahead is None:
            return
        module = cast(AlignmentModule, pl_module)
        with trainer.precision_plugin.forward_context():  # Lightning saves checkpoints outside of this context
            for iteration in list(self.ahead.flights):
                self.landed[iteration] = self._land(self.ahead, module, iteration)
        landed = {iteration: self._saved(module, checked) for iteration, checked in self.landed.items()}
        checkpoint["rollouts"] = self.saved | landed

    def on_load_checkpoint(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Keep a checkpoint's rollouts for the iterations that will learn from them."""
        self.saved = dict(checkpoint.get("rollouts", {})) if self.ahead is not None else {}

    # --------------------------------------------------------------- an iteration

    def next(self, module: AlignmentModule, batch: PromptBatch, metrics: Metrics) -> Rollout:
        """Return this process's rollout for the current iteration; all processes call this method together.

        Args:
            module: The `OnPolicy` module that trains.
            batch: The prompts of the iteration.
            metrics: Receives the mismatch and, with `Ahead`, the times for which the learner and the generators waited.

        Raises:
            UserError: if responses could not be generated, if the guard finds that a policy other than the expected one
                drew them, if the rollouts of a checkpoint answer other prompts, or if `Ahead` is used without the data
                module `Prompts`.
        """
        iteration = int(module.iteration)
        if self.ahead is None:
            rollout = cast(Learner, module).generate(batch, module.actor, Stream.ROLLOUT, iteration)
            checked = self._check(module, rollout, iteration)
        else:
            self._launch(self.ahead, module, iteration)
            checked = self._take(self.ahead, module, batch, iteration)
            metrics.add("time/wait_for_rollouts", checked.learner_waited)
            metrics.add("time/wait_for_learner", checked.generators_waited)
        if checked.mismatch is not None:
            metrics.add("engine/mismatch_mean", checked.mismatch.mean)
            metrics.add("engine/mismatch_max", checked.mismatch.maximum)
        return checked.rollout

    def _launch(self, ahead: Ahead, module: AlignmentModule, iteration: int) -> None:
        """Start to generate the rollouts up to ``lag`` iterations ahead, except those that exist or are under way."""
        last = iteration + ahead.lag if module.iterations is None else module.iterations - 1
        for number in range(iteration, min(iteration + ahead.lag, last) + 1):
            if not (number in ahead.flights or number in self.landed or number in self.saved):
                prompts = _upcoming(module, number - iteration)
                special_tokens = cast(Learner, module).special_tokens
                parts = module.actor, prompts, self.sampling, special_tokens
                ahead.launch(*parts, iteration=number, keep_weights=self.guard.responses > 0)

    def _take(self, ahead: Ahead, module: AlignmentModule, batch: PromptBatch, iteration: int) -> CheckedRollout:
        if iteration in self.saved:
            checked = _rows_of(self.saved.pop(iteration), batch)
        elif iteration in self.landed:
            checked = self.landed.pop(iteration)
        else:
            checked = self._land(ahead, module, iteration)
        _check_prompts(checked.rollout, batch, self.sampling.responses)
        return checked

    def _land(self, ahead: Ahead, module: AlignmentModule, iteration: int) -> CheckedRollout:
        with torch.no_grad(), ahead.weights_of(module.actor, iteration):
            landing = ahead.land(iteration)
            checked = self._check(module, landing.rollout, iteration)
        del ahead.flights[iteration]
        return replace(checked, learner_waited=landing.learner_waited, generators_waited=landing.generators_waited)

    def _check(self, module: AlignmentModule, rollout: Rollout, iteration: int) -> CheckedRollout:
        if not self.guard.responses:
            return CheckedRollout(rollout, None)
        mismatch = measure_mismatch(module, module.actor, rollout, self.guard.responses)
        bound = self.guard.bound_for(module.trainer.precision, module.device)
        if math.isnan(mismatch.mean):
            check_logprobs(module, module.actor, rollout)
        if not mismatch.mean <= bound:
            updates = max(0, iteration - (self.ahead.lag if self.ahead else 0))
            raise UserError(
                f"model.engine is out of step: in iteration {iteration}, the mean of |log π − log μ| between the "
                f"actor's weights after {updates} updates and the engine is {mismatch.mean:.3g} nats per token, more "
                f"than model.guard.bound={bound:g}: the engine has other weights, another temperature or prompt "
                "template, or truncates (top-k, top-p). Stopped before the update, and the last checkpoint is good"
            )
        return CheckedRollout(rollout, mismatch)

    def _saved(self, module: AlignmentModule, checked: CheckedRollout) -> dict[str, Any]:
        rollout = checked.rollout
        if module.trainer.world_size > 1:
            rollout = gather_rollout(rollout, self.sampling.responses, module.sum_over_ranks, module.max_over_ranks)
        mismatch = None if checked.mismatch is None else tuple(checked.mismatch)
        return {"rollout": asdict(rollout.to(torch.device("cpu"))), "mismatch": mismatch}


def _rows_of(saved: dict[str, Any], batch: PromptBatch) -> CheckedRollout:
    """Return this process's rows of a saved rollout of all processes, or all rows if none answer this batch."""
    rollout = Rollout(**saved["rollout"]).to(batch.group.device)
    rows = torch.isin(rollout.group, batch.group).nonzero().squeeze(1)
    mismatch = None if saved["mismatch"] is None else Mismatch(*saved["mismatch"])
    return CheckedRollout(rollout.select(rows) if len(rows) else rollout, mismatch)


def _upcoming(module: AlignmentModule, distance: int) -> PromptBatch:
    """Return this process's prompts for ``distance`` iterations after the current one, on the module's device.

    Raises:
        UserError: if the prompts do not come from a `ResumableLoader`.
    """
    loader = module.trainer.train_dataloader
    if not isinstance(loader, ResumableLoader):
        raise UserError(
            f"model.engine: Ahead takes its prompts from the data module Prompts, not from {type(loader).__name__}"
        )
    return loader.upcoming(distance).to(module.device)


def _check_prompts(rollout: Rollout, batch: PromptBatch, responses: int) -> None:
    """Check that the rollout answers the prompts of the batch.

    Raises:
        UserError: if the rollout answers other prompts.
    """
    rows = torch.arange(len(batch.tokens), device=batch.tokens.device).repeat_interleave(responses)
    is_prompt = torch.arange(rollout.tokens.shape[1], device=rollout.tokens.device) < rollout.prompt_lengths[:, None]
    same_rows = torch.equal(rollout.group, batch.group[rows])
    if not (same_rows and torch.equal(rollout.tokens[is_prompt], batch.tokens[rows][batch.mask[rows]])):
        raise UserError(
            "model.engine: the rollouts of the checkpoint answer other prompts than this run's; resume with the same "
            "data, batch size and number of responses"
        )
