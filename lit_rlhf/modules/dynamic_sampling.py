"""The responses of an iteration, drawn once or, to replace uninformative prompts, several times."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from lit_rlhf.data.loader import ResumableLoader
from lit_rlhf.errors import UserError
from lit_rlhf.modules.failed_rewards import FAILED_FRACTION, failed_prompts, has_failed, leave_out_failed
from lit_rlhf.modules.hooks import call_hook
from lit_rlhf.modules.metrics import Metrics, Stopwatch
from lit_rlhf.randomness import Stream
from lit_rlhf.types import Experience, PromptBatch, RewardInputs, ScoredRollout, Trajectory

Stage = TypeVar("Stage")


@dataclass(frozen=True)
class DynamicSampling:
    """The option to learn only from prompts whose responses have different scores, and to replace the other prompts.

    A prompt is *informative* if its n responses do not all have the same score; if answers are either correct or wrong,
    this means that some of the n answers are correct, but not all. With a group baseline, the advantages are 0 for all
    other prompts, so that the effective batch is smaller. An iteration draws a batch of prompts, and generates and
    scores their responses. It repeats this until it has ``data.batch_size`` informative prompts, but draws at most
    ``max_draws`` batches. It learns from the first ``data.batch_size`` informative prompts, or from fewer if there are
    no more. If fewer responses would be left than ``update.minibatches``, uninformative prompts are added. The scores
    are those that enter the reward, after `ScoreShaping`. A prompt is never learned from if one of its responses has no
    score, because a reward failed.

    Each draw takes the next whole batch in the order of the data, so that the position in the data, which checkpoints
    hold, is a number of batches. The Trainer's epoch has as many iterations as the data has batches, and therefore
    covers the data more than once if there are further draws. The informative prompts are counted over all processes,
    which make the same number of draws; the result does not depend on the number of processes.

    The metrics ``objective/…`` (except ``objective/advantage_std``), ``rewards/…`` and ``response/…`` describe all
    responses that were drawn; all other metrics describe the responses that the iteration learns from.

    Source: Yu et al. 2025 (DAPO, arXiv 2503.14476), section 3.2, equation 11.

    Args:
        max_draws: The maximum number of batches in an iteration; with 1, uninformative prompts are not replaced.

    Raises:
        ValueError: if ``max_draws`` is less than 1.

    >>> DynamicSampling(max_draws=5).max_draws
    5
    """

    max_draws: int = 3

    def __post_init__(self) -> None:
        if self.max_draws < 1:
            raise ValueError(f"dynamic_sampling.max_draws must be 1 or more, not {self.max_draws}")


def draw_responses(
    module: Any, batch: PromptBatch, metrics: Metrics, watch: Stopwatch
) -> tuple[ScoredRollout, Tensor | None]:
    """Generate and score the responses of an iteration; all processes call this function together.

    Args:
        module: The `OnPolicy` module that trains.
        batch: The prompts of the first draw; the prompts of further draws come from the training loader.
        metrics: Receives the engine's metrics, the fraction of responses that a reward failed to score, and the metrics
            ``dynamic_sampling/…``.
        watch: Measures the phases ``generate`` and ``judge``.

    Returns:
        This process's responses of all draws, B rows, and a mask of the rows to learn from, [B] bool, or None for all.

    Raises:
        UserError: if the engine or a reward fails, if too few responses have a score, if the guard refuses the
            responses, or if further prompts are needed and do not come from a data module of this package.
    """
    draws = [_draw(module, batch, metrics, watch)]
    if module.dynamic_sampling is None:
        return draws[0], leave_out_failed(module, draws[0], None)
    (size,) = module.max_over_ranks(int(batch.group.max()) + 1)
    signals = [_signal_of_all(module, draws[0], size, first=0)]
    while len(draws) < module.dynamic_sampling.max_draws and int((torch.cat(signals) > 0).sum()) < size:
        first = len(draws) * size
        further = _further_prompts(module)
        further = replace(further, group=further.group + first)  # other random numbers than those of the first draw
        draws.append(_draw(module, further, metrics, watch, first=False))
        signals.append(_signal_of_all(module, draws[-1], size, first))
    signal = torch.cat(signals)
    kept = choose(signal, at_least=-(-module.update.minibatches // module.sampling.responses), at_most=size)
    metrics.add("dynamic_sampling/draws", len(draws))
    metrics.add_masked("dynamic_sampling/uninformative_fraction", (signal == 0).float(), signal >= 0)
    metrics.add("dynamic_sampling/prompts", kept.sum())
    scored = draws[0] if len(draws) == 1 else join(draws)
    return scored, leave_out_failed(module, scored, kept[scored.rollout.group])


def _draw(module: Any, batch: PromptBatch, metrics: Metrics, watch: Stopwatch, first: bool = True) -> ScoredRollout:
    with watch.phase("generate"):
        if first:
            rollout = module.rollouts.next(module, batch, metrics)
        else:  # with the weights that the guard has checked
            rollout = module.generate(batch, module.actor, Stream.ROLLOUT, int(module.iteration))
    call_hook(module, "on_rollout_end", rollout)
    with watch.phase("judge"):
        scored: ScoredRollout = module.judge(rollout, batch)
    if module.scores.can_fail:
        metrics.add(FAILED_FRACTION, has_failed(scored.rewards).float())
    return scored


def _signal_of_all(module: Any, scored: ScoredRollout, size: int, first: int) -> Tensor:
    """Return 1 for the informative prompts of a draw on all processes, −1 for those without a score, else 0, [size].

    Args:
        module: The `OnPolicy` module that trains.
        scored: This process's responses of the draw.
        size: The number of prompts in a draw, over all processes.
        first: The number that the draw's first prompt has in ``scored.rollout.group``.
    """
    n = module.sampling.responses
    table, signal = torch.zeros(size, device=module.device), is_informative(scored.shaped_scores, n).float()
    table[scored.rollout.group[::n] - first] = torch.where(failed_prompts(scored.scores, n), -1.0, signal)
    return module.sum_over_ranks(table)


def _further_prompts(module: Any) -> PromptBatch:
    loader = module.trainer.train_dataloader
    if not isinstance(loader, ResumableLoader):
        raise UserError(
            "model.dynamic_sampling draws further prompts from the data module Prompts, not from "
            f"{type(loader).__name__}; set max_draws to 1"
        )
    return loader.draw().to(module.device)


def is_informative(scores: Tensor, responses: int) -> Tensor:
    """Return a bool mask, [P], that is True for the prompts whose responses do not all have the same score.

    Args:
        scores: The scores of the responses, [P n], in prompt-major order.
        responses: n, the number of responses to each prompt.

    >>> is_informative(torch.tensor([1.0, 1.0, 0.0, 1.0]), responses=2)
    tensor([False,  True])
    """
    by_prompt = scores.view(-1, responses)
    return by_prompt.amax(1) > by_prompt.amin(1)


def choose(signal: Tensor, at_least: int, at_most: int) -> Tensor:
    """Choose the prompts to learn from: the first informative ones, and if these are too few, the first of the others.

    Args:
        signal: [P], positive for the informative prompts; if others are needed, those with a larger value come first.
        at_least: The minimum number of prompts to choose.
        at_most: The maximum number of prompts to choose; ``at_least`` takes precedence if it is greater.

    Returns:
        Bool [P], True for the chosen prompts.

    >>> choose(torch.tensor([False, True, True, True]), at_least=1, at_most=2)
    tensor([False,  True,  True, False])
    >>> choose(torch.tensor([False, True, False, False]), at_least=2, at_most=2)
    tensor([ True,  True, False, False])
    """
    order = torch.argsort(signal.float(), descending=True, stable=True)
    count = max(at_least, min(at_most, int((signal > 0).sum())))
    return torch.zeros_like(signal, dtype=torch.bool).index_fill(0, order[:count], True)


def join(draws: Sequence[ScoredRollout]) -> ScoredRollout:
    """Join the responses of several draws, in order; a column that a draw lacks is None for that draw's responses."""
    inputs = [draw.reward_inputs for draw in draws]
    rollout = _join([draw.rollout for draw in draws])
    names = dict.fromkeys(name for part in inputs for name in part.columns)
    columns = {
        name: [x for part in inputs for x in part.columns.get(name, [None] * len(part.responses))] for name in names
    }
    joined = RewardInputs(
        prompts=[prompt for part in inputs for prompt in part.prompts],
        responses=[response for part in inputs for response in part.responses],
        columns=columns,
        rollout=rollout,
        iteration=inputs[0].iteration,
    )
    rewards = {name: torch.cat([draw.rewards[name] for draw in draws]) for name in draws[0].rewards}
    return _join(draws, rollout=rollout, reward_inputs=joined, rewards=rewards)


def _join(parts: Sequence[Stage], **given: Any) -> Stage:
    """Join objects of one type: concatenate the rows of their tensors, padded with 0 on the right; None stays None.

    Args:
        parts: The objects.
        given: The values of fields that are not to be concatenated, by field name.
    """
    kind: Any = type(parts[0])
    values = {f.name: [getattr(part, f.name) for part in parts] for f in fields(kind) if f.name not in given}
    return kind(**{name: None if x[0] is None else _cat(x) for name, x in values.items()}, **given)


def _cat(tensors: Sequence[Tensor]) -> Tensor:
    if tensors[0].ndim == 1:
        return torch.cat(list(tensors))
    width = max(x.shape[1] for x in tensors)
    return torch.cat([pad(x, (0, width - x.shape[1])) for x in tensors])


def responses_so_far(module: Any, responses: int, metrics: Mapping[str, float]) -> int:
    """Return the number of responses that the run has drawn, in this and all earlier iterations.

    Args:
        module: The `OnPolicy` module that trains.
        responses: The number of responses of this iteration, in all of its draws and over all processes.
        metrics: The metrics of this iteration.
    """
    loader = module.trainer.train_dataloader
    further = loader.drawn if isinstance(loader, ResumableLoader) else 0
    return (int(module.iteration) + further) * responses // int(metrics.get("dynamic_sampling/draws", 1))


def counted(scored: ScoredRollout, trajectory: Trajectory, rows: Tensor | None) -> tuple[ScoredRollout, Trajectory]:
    """Return the responses and their trajectory with masks that are False, and rewards of 0, outside of ``rows``.

    Args:
        scored: The responses, B rows.
        trajectory: The trajectory of the same rows.
        rows: Bool [B], True for the rows to learn from; None for all rows.
    """
    if rows is None:
        return scored, trajectory
    mask = scored.rollout.response_mask & rows[:, None]
    rewards = torch.where(mask, trajectory.rewards, 0.0)
    scored = replace(scored, rollout=replace(scored.rollout, response_mask=mask))
    return scored, replace(trajectory, mask=mask, rewards=rewards)


def drop_uncounted(experience: Experience) -> Experience:
    """Return the rows in which the response mask is True at some token, with their prompts renumbered from 0.

    Args:
        experience: The rows of all processes.
    """
    selected = experience.select(experience.rollout.response_mask.any(1).nonzero().squeeze(1))
    group = selected.rollout.group.unique(return_inverse=True)[1]
    return replace(selected, rollout=replace(selected.rollout, group=group))
