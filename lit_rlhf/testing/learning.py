"""The assertion that a run learns."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Any

import lightning

from lit_rlhf.modules.on_policy import OnPolicy
from lit_rlhf.testing.runs import tiny_data, train


def assert_learns(
    module: OnPolicy,
    by: float,
    *,
    goal: Callable[[str], float] | None = None,
    data: lightning.LightningDataModule | None = None,
    seed: int = 0,
) -> None:
    """Assert that a run raises its mean score, or another measure of its responses, by a given amount.

    The first and the last fifth of the iterations are compared. The score is the one that the module's rewards give.
    The score also rises if a reward has the wrong sign, because a run maximises any reward; a ``goal`` that does not
    depend on the reward's code finds such mistakes. ::

        def test_my_reward():
            assert_learns(tiny_ppo([MyReward()]), by=0.3, goal=lambda response: response.split().count("w3"))

    Args:
        module: An untrained module, such as one from `tiny_ppo`; it is trained for its own number of iterations.
        by: The smallest rise in the mean that passes, in the units of the score or the goal.
        goal: A function that measures one response; None to measure by the score.
        data: The prompts; None for 48 prompts of the words w0 … w31.
        seed: The seed of the run.

    Raises:
        AssertionError: if the mean rises by less than ``by``; the message has the means at the start and at the end.
        TypeError: if the module does not sample responses.
    """
    if not isinstance(module, OnPolicy):
        raise TypeError(f"assert_learns takes a module that samples responses, not {type(module).__name__}")
    responses = _Responses()
    with tempfile.TemporaryDirectory() as folder:
        train(module, data or tiny_data(module), [responses], folder=folder, seed=seed)
    scores = responses.scores
    measured = scores if goal is None else [[float(goal(text)) for text in texts] for texts in responses.texts]
    start, end = _ends(measured)
    if end - start >= by:
        return
    name, fifth = "score" if goal is None else "goal", max(1, len(measured) // 5)
    fell = f"fell by {start - end:.3g}" if end < start else "did not change"
    moved = f"rose by {end - start:.3g}" if end > start else fell
    lines = [
        f"the {name} {moved}, but should rise by {by:g} or more: the mean was {start:.4g} in the first {fifth} of "
        f"{len(measured)} iterations, and {end:.4g} in the last {fifth}"
    ]
    if goal is not None:
        lines.append("the mean score went from {:.4g} to {:.4g}".format(*_ends(scores)))
    if len({score for iteration in scores for score in iteration}) == 1:
        lines.append(f"every score was {scores[0][0]:.4g}, so there was nothing to learn from")
    raise AssertionError("; ".join(lines))


def _ends(values: Sequence[Sequence[float]]) -> tuple[float, float]:
    """Return the means over the first and the last fifth of the iterations."""
    means = [fmean(iteration) for iteration in values]
    fifth = max(1, len(means) // 5)
    return fmean(means[:fifth]), fmean(means[-fifth:])


class _Responses(lightning.Callback):
    """A callback that keeps the responses and the scores of each iteration."""

    def __init__(self) -> None:
        self.texts: list[Sequence[str]] = []
        self.scores: list[list[float]] = []

    def on_rewards(self, trainer: Any, pl_module: Any, scored: Any, trajectory: Any) -> None:
        self.texts.append(scored.reward_inputs.responses)
        self.scores.append(scored.scores.tolist())
