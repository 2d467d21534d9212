"""A summary of a run, in one sentence with numbers."""

from __future__ import annotations

from lit_rlhf.report.run import Run

PHASES = "time/"
WIN_RATE = ("val/win_rate", "val/win_rate_low", "val/win_rate_high")
WAITING = "time/wait_for"
"""The beginning of the names of the waiting times, which are parts of phases and not phases of their own."""


def summarize(run: Run) -> str:
    """Return a summary of a run: its duration, and the change or the last value of each of its main metrics.

    >>> rows = [{"progress/iteration": i, "train/loss": 3.0 / i} for i in (1.0, 2.0, 3.0)]
    >>> summarize(Run(name="sft", config={"model.iterations": 4}, rows=rows, samples=[]))
    'After 3 of 4 iterations: the training loss fell from 3.00 to 1.00.'
    """
    iterations = run.values("progress/iteration")
    if not iterations:
        return "No iteration has ended yet."
    done, planned = int(iterations[-1]), run.config.get("model.iterations")
    progress = f"After {done:,} of {planned:,}" if isinstance(planned, int) and planned > done else f"In {done:,}"
    details = [f"{int(n):,} responses" for n in run.values("progress/responses")[-1:]]
    seconds = sum(value for name in phases(run) for value in run.values(name))
    details += [duration(seconds)] if seconds else []
    start = f"{progress} iteration{'s' if done > 1 or 'of' in progress else ''}"
    start += f" ({', '.join(details)})" if details else ""
    changes = [
        *_change(run, "the training score", "objective/score"),
        *_change(run, "the training loss", "train/loss"),
        *_held_out(run),
        *_kl(run),
        *_change(run, "the length of a response", "response/length", 0, " tokens"),
    ]
    return f"{start}: {'; '.join(changes)}." if changes else f"{start}."


def phases(run: Run) -> list[str]:
    """Return the sorted names of the metrics that give the seconds of each phase of an iteration."""
    return sorted(name for name in run.columns if name.startswith(PHASES) and not name.startswith(WAITING))


def duration(seconds: float) -> str:
    """Return a duration as text, in hours and minutes, in minutes and seconds, or in seconds.

    >>> duration(42.2), duration(190), duration(7322)
    ('42 s', '3 min 10 s', '2 h 2 min')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _change(run: Run, what: str, column: str, digits: int = 2, unit: str = "", factor: float = 1.0) -> list[str]:
    values = [f"{factor * value:.{digits}f}" for value in run.values(column)]
    if not values:
        return []
    first, last = values[0], values[-1]
    if len(values) == 1 or first == last:
        return [f"{what} {'is' if len(values) == 1 else 'stayed at'} {last}{unit}"]
    return [f"{what} {'rose' if float(last) > float(first) else 'fell'} from {first} to {last}{unit}"]


def _held_out(run: Run) -> list[str]:
    """Return the change of the held-out accuracy or, without an accuracy, of the held-out loss, as at most one text.

    For a run that scores responses to held-out prompts, the text has the last scores and the last win rate instead.
    """
    if run.values("val/accuracy"):
        return _change(run, "the held-out accuracy", "val/accuracy", 1, " %", 100)
    if not run.values("val/score"):
        return _change(run, "the held-out loss", "val/loss")
    found = f"on held-out prompts the score is {run.values('val/score')[-1]:.2f}"
    for reference in run.values("val/reference_score")[-1:]:
        found += f", against {reference:.2f} for the reference"
    rate = [100 * run.values(name)[-1] for name in WIN_RATE if run.values(name)]
    if len(rate) == len(WIN_RATE):
        found += ", with a win rate of {:.0f} % ({:.0f} to {:.0f} %)".format(*rate)
    return [found]


def _kl(run: Run) -> list[str]:
    held_out = bool(run.values("val/score") and run.values("val/kl_to_ref"))  # the KL then follows the held-out score
    where, column = ("there", "val/kl_to_ref") if held_out else ("to the reference", "objective/kl_to_ref")
    return [f"the KL {where} is {kl:.2f} nats per response" for kl in run.values(column)[-1:]]
