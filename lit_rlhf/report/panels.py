"""The panels of the report, each of which becomes a chart if a run has numbers for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lit_rlhf.report.run import Run


@dataclass(frozen=True, slots=True)
class Panel:
    """A chart over the iterations: a line for a training metric, and points for a validation metric."""

    title: str
    unit: str  # the title of the y-axis
    trained: str | None  # the metric of each iteration
    held_out: str | None = None  # the metric of each validation
    floor: float | None = None  # smaller values are drawn at this value
    percent: bool = False  # whether the metric is a fraction, to be shown in %

    @property
    def columns(self) -> tuple[str, ...]:
        """The metrics that the panel shows."""
        return tuple(name for name in (self.trained, self.held_out) if name)


RESULT = (
    Panel("Score", "score", "objective/score", "val/score"),
    Panel("KL to the reference", "nats per response", "objective/kl_to_ref", "val/kl_to_ref"),
    Panel("Win rate against the reference", "% of held-out prompts", None, "val/win_rate", percent=True),
    Panel("Loss", "loss", "train/loss", "val/loss"),
    Panel("Accuracy", "% of pairs ranked correctly", "train/accuracy", "val/accuracy", percent=True),
    Panel("Margin", "better score − worse score", "train/margin", "val/margin"),
    Panel("Calibration error", "% (0 is best)", None, "val/ece", percent=True),
)
LENGTH = (
    Panel("Response length", "tokens", "response/length", "val/length"),
    Panel("Truncated responses", "%", "response/truncated_fraction", "val/truncated_fraction", percent=True),
    Panel("Entropy of the policy", "nats per token", "objective/entropy"),
)
UPDATE = (
    Panel("Clip fraction", "% of tokens", "policy/clip_fraction", percent=True),
    Panel("KL to the old policy", "nats per token", "policy/kl_to_old"),
    Panel(
        "Explained variance of the critic", "1 is best; below −1 drawn at −1", "value/explained_variance", floor=-1.0
    ),
    Panel("Loss of the critic", "loss", "value/loss"),
    Panel("Gradient norm of the policy", "before clipping", "policy/grad_norm"),
    Panel("Gradient norm of the critic", "before clipping", "value/grad_norm"),
    Panel("Gradient norm", "before clipping", "train/grad_norm"),
    Panel("KL coefficient", "coefficient", "objective/kl_coef"),
    Panel("Engine against actor", "|Δ log-probability|, nats per token", "engine/mismatch_mean"),
)
COST = (
    Panel("Speed", "tokens per second", "perf/tokens_per_second"),
    Panel("Peak memory", "GiB", "perf/peak_memory_gib"),
)
SECTIONS = {"Result": RESULT, "Length and entropy": LENGTH, "Update": UPDATE, "Time and memory": COST}


def panels_of(runs: Sequence[Run]) -> dict[str, list[Panel]]:
    """Return the panels for which at least one of the runs has numbers, by the title of their section.

    A KL coefficient that never changes is left out, and so is a reward that always equals the score. A section without
    panels is left out as well.

    >>> run = Run(name="sft", config={}, rows=[{"train/loss": 2.0}], samples=[])
    >>> {title: [panel.title for panel in panels] for title, panels in panels_of([run]).items()}
    {'Result': ['Loss']}
    """
    columns = {name for run in runs for name in run.columns}
    if len({value for run in runs for value in run.values("objective/kl_coef")}) == 1:
        columns -= {"objective/kl_coef"}
    rewards = [name for name in sorted(columns) if name.startswith("rewards/") and not _is_score(name, runs)]
    named = [Panel(f"Reward: {name[8:]}", "reward, unweighted", name, f"val/{name}") for name in rewards]
    sections = SECTIONS | {"Result": (*RESULT[:3], *named, *RESULT[3:])}
    shown = {title: [p for p in panels if columns & set(p.columns)] for title, panels in sections.items()}
    return {title: panels for title, panels in shown.items() if panels}


def _is_score(reward: str, runs: Sequence[Run]) -> bool:
    """Return whether a reward equals the score in all rows of all runs."""
    return all(run.values(reward) == run.values("objective/score") for run in runs)
