"""The display of a run in progress: bars in a terminal, and plain lines in a file or a pipe."""

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Protocol

from rich.console import Console
from rich.live import Live
from rich.text import Text

from lit_rlhf.progress import Progress

LABEL = 20
"""The minimum number of columns for the label before a bar."""
REFRESH_PER_SECOND = 4
QUIET_SECONDS = 1.0
"""The number of seconds after which work of unknown amount is shown, so that short work does not flicker."""
SILENT_SECONDS = 60.0
"""The number of seconds without a line after which a line shows the progress of the current work."""


class Course:
    """The state of a run: the number of steps done, and the current work.

    Args:
        step: A singular noun for the steps that are counted, such as ``iteration``.
        done: The number of steps that an earlier part of the run has done, before this process started.
        total: The number of steps in the whole run; None if it is not known.
    """

    def __init__(self, step: str, done: int, total: int | None) -> None:
        self.step, self.first, self.done, self.total = step, done, done, total
        self.start = self.newest = time.monotonic()
        self.metrics: list[str] = []
        self.stage: Progress | None = None
        """The stage that interrupts the steps, such as a validation."""
        self.work: Progress | None = None
        """The work whose progress was reported last."""
        self.work_start = self.start

    def hear(self, progress: Progress) -> None:
        """Store the progress of some work."""
        if self.work is None or (progress.work, progress.total) != (self.work.work, self.work.total):
            self.work_start = time.monotonic()
        self.work = progress

    def begin(self) -> None:
        """Record that the first step begins; the time before the first step is not counted in the pace."""
        self.start, self.work = time.monotonic(), None

    def advance(self, done: int, metrics: list[str]) -> None:
        """Store the number of steps done and the metrics to show, and clear the current stage and work."""
        self.done, self.metrics, self.stage, self.work = done, metrics, None, None
        self.newest = time.monotonic()

    @property
    def label(self) -> str:
        """The noun for the steps, the number done and, if it is known, the total, such as ``iteration 3/10``."""
        return f"{self.step} {self.done}" + ("" if self.total is None else f"/{self.total}")

    def duration(self) -> str:
        """Return the time left or, if it is not known, the time since the start, as text such as ``1:15 left``."""
        now = time.monotonic()
        if self.total is None or self.done == self.first:
            return clock(now - self.start)
        return f"{clock(max(0.0, self.pace() * (self.total - self.done) - (now - self.newest)))} left"

    def pace(self) -> float:
        """Return the mean number of seconds per step since the start; at least one step must be done."""
        return (self.newest - self.start) / (self.done - self.first)


class View(Protocol):
    """A display of a `Course`."""

    def open(self) -> None:
        """Begin to show the course."""

    def advanced(self) -> None:
        """Show that steps are done."""

    def heard(self) -> None:
        """Show that some work has progressed."""

    def note(self, line: str) -> None:
        """Show a line with a result, which the display must not overwrite."""

    def close(self) -> None:
        """Stop the display, and remove its bars if it has any."""


class Bars:
    """Two bars at the bottom of a terminal: one for the run, and one for its current work.

    A thread draws the bars a few times a second, so that the run itself only stores numbers.

    Args:
        course: The course to show.
        console: The terminal.
    """

    def __init__(self, course: Course, console: Console) -> None:
        self.course, self.console = course, console
        self.live = Live(
            console=console, get_renderable=self.render, refresh_per_second=REFRESH_PER_SECOND, transient=True
        )
        self.exits = ExitStack()

    def open(self) -> None:
        """Begin to draw; text that is printed meanwhile appears above the bars."""
        self.exits.enter_context(self.live)
        self.live.refresh()  # before other threads print
        self.exits.enter_context(_logging_to(sys.stderr))

    def advanced(self) -> None:
        """Do nothing, because a thread draws the bars."""

    def heard(self) -> None:
        """Do nothing, because a thread draws the bars."""

    def note(self, line: str) -> None:
        """Do nothing: the bar of the run shows the newest metrics."""

    def close(self) -> None:
        """Remove the bars."""
        self.exits.close()

    def render(self) -> Text:
        """Return the two lines to draw, neither of which is wider than the terminal; the second one may be empty.

        The number of lines must not change: a line that another thread prints while Rich redraws would be overwritten.
        """
        course, width = self.course, self.console.width - 1
        label, bar = max(LABEL, len(course.label)), max(8, min(40, width // 4))
        texts = [course.duration()]
        for metric in course.metrics:
            if label + bar + sum(2 + len(text) for text in [*texts, metric]) <= width:
                texts.append(metric)
        lines = [self._line(course.label, label, course.done, course.total, bar, texts, width)]
        if (below := self._below()) is not None:
            name, done, total, texts = below
            lines.append(self._line(name, label, done, total, bar, texts, width))
        return Text("\n").join(lines if below is not None else [*lines, Text(" ")])

    def _below(self) -> tuple[str, int, int | None, list[str]] | None:
        """Return the label, the amount done, the total amount and the texts of the second bar.

        None is returned if there is nothing to show.
        """
        stage, work, seconds = self.course.stage, self.course.work, time.monotonic() - self.course.work_start
        if work is not None and work.total is None and seconds < QUIET_SECONDS:
            work = None
        texts = [] if work is None else [amount(work)]
        if work is not None and work.tokens and seconds > 0:
            texts.append(f"{work.tokens / seconds:,.0f} tokens/s")
        if work is not None and work.total is None:
            texts.append(clock(seconds))
        if stage is not None:
            inner = [f"{work.work} {texts[0]}".strip(), *texts[1:]] if work is not None else []
            return stage.work, stage.done, stage.total, [amount(stage), *inner]
        return None if work is None else (work.work, work.done, work.total, texts)

    def _line(
        self, name: str, label: int, done: int, total: int | None, bar: int, texts: list[str], width: int
    ) -> Text:
        filled = min(bar, round(bar * done / total)) if total else 0
        signs = "-" if self.console.options.ascii_only else "━"
        line = Text(f"{name:<{label}} ", no_wrap=True)
        line.append(signs * filled, "green").append(signs * (bar - filled), "bright_black")
        line.append(" " + "  ".join(text for text in texts if text))
        line.truncate(width)
        return line


class Lines:
    """Plain lines in a log file: one for the first step, one for the last, and from time to time one in between.

    Args:
        course: The course to show.
        every: The minimum number of seconds between the lines of two steps.
    """

    def __init__(self, course: Course, every: float) -> None:
        self.course, self.every = course, every
        self.last = time.monotonic()

    def open(self) -> None:
        """Do nothing: the first step prints the first line."""

    def advanced(self) -> None:
        """Print a line for the step if one is due."""
        course = self.course
        ends = course.done in (course.first + 1, course.total)
        if ends or time.monotonic() - self.last >= self.every:
            metrics = [metric for metric in course.metrics if not metric.startswith("val ")]  # in a line of their own
            self.note("  ".join([course.label, *metrics, f"{course.pace():.3g} s/{course.step}", course.duration()]))

    def heard(self) -> None:
        """Print the progress of the current work if no line has been printed for a minute."""
        work = self.course.work
        if work is not None and time.monotonic() - self.last >= SILENT_SECONDS:
            self.note(f"{self.course.label}: {work.work} {amount(work)}".rstrip())

    def note(self, line: str) -> None:
        """Print a line."""
        print(line, flush=True)
        self.last = time.monotonic()

    def close(self) -> None:
        """Do nothing: the printed lines remain."""


def amount(progress: Progress) -> str:
    """Return the amount done, the total amount and their unit as text; an empty string if the total is not known.

    >>> amount(Progress("generate", 37, 64, "responses")), amount(Progress("update"))
    ('37/64 responses', '')
    """
    return "" if progress.total is None else f"{progress.done}/{progress.total} {progress.unit}".rstrip()


def clock(seconds: float) -> str:
    """Return a duration as text: the hours, if there are any, the minutes and the seconds.

    >>> clock(75), clock(3675)
    ('1:15', '1:01:15')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def is_terminal() -> bool:
    """Return whether the standard output is a terminal in which lines can be redrawn."""
    return sys.stdout.isatty() and not Console().is_dumb_terminal


@contextmanager
def _logging_to(stream: object) -> Iterator[None]:
    """Make loggers that write to the terminal write to ``stream`` inside this context, so that the bars stay intact."""
    loggers = [logging.getLogger(), *map(logging.getLogger, list(logging.root.manager.loggerDict))]
    handlers = {
        handler
        for logger in loggers
        for handler in logger.handlers
        if isinstance(handler, logging.StreamHandler) and handler.stream in (sys.__stdout__, sys.__stderr__)
    }
    before = {handler: handler.setStream(stream) for handler in handlers}
    try:
        yield
    finally:
        for handler, original in before.items():
            if original is not None:
                handler.setStream(original)
