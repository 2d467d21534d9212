"""The progress of work that takes a while, reported to listeners such as the callback `ProgressBar`.

The parts of the package that do such work do not know the listeners. Without a listener, `tell` costs one comparison,
and `track` returns the items that it was given.
"""

from collections.abc import Callable, Iterable, Iterator, Sized
from dataclasses import dataclass
from typing import TypeAlias, TypeVar

Item = TypeVar("Item")


@dataclass(frozen=True, slots=True)
class Progress:
    """The progress of a piece of work.

    >>> Progress("generate", 3, 8, "responses").total
    8
    """

    work: str
    """The name of the work, such as ``generate``."""
    done: int = 0
    total: int | None = None
    """The amount of work, in the same unit as ``done``; None if it is not known."""
    unit: str = ""
    tokens: int = 0
    """The number of tokens generated so far; 0 if it is not known."""


Listener: TypeAlias = Callable[[Progress], None]
"""A function that is called with every `Progress`, in the thread that does the work; it should return quickly."""
_listeners: list[Listener] = []


def listen(listener: Listener) -> None:
    """Call a function with every `Progress` reported in this process, until it is passed to `stop_listening`."""
    _listeners.append(listener)


def stop_listening(listener: Listener) -> None:
    """Stop calling a function; nothing happens if it is not a listener."""
    if listener in _listeners:
        _listeners.remove(listener)


def tell(work: str, done: int = 0, total: int | None = None, unit: str = "", tokens: int = 0) -> None:
    """Report the progress of a piece of work to the listeners; the arguments are the fields of `Progress`.

    The numbers must already be known to the host, so that the host need not wait for a GPU.

    >>> heard = []
    >>> listen(heard.append)
    >>> tell("generate", 3, 8, "responses")
    >>> stop_listening(heard.append)
    >>> tell("generate", 4, 8, "responses")
    >>> [progress.done for progress in heard]
    [3]
    """
    if _listeners:
        progress = Progress(work, done, total, unit, tokens)
        for listener in tuple(_listeners):
            listener(progress)


def track(items: Iterable[Item], work: str, unit: str, total: int | None = None) -> Iterable[Item]:
    """Return the items, and report each one to the listeners as done when the next one is requested.

    Args:
        items: The items that the work processes one after the other.
        work: The name of the work, such as ``update``.
        unit: A plural noun for the items, such as ``minibatches``.
        total: The number of items; None for the length of ``items``, if it has one.

    Returns:
        ``items`` itself if there is no listener, otherwise an iterator over them.

    >>> heard = []
    >>> listen(heard.append)
    >>> sum(track([1, 2], "add", "numbers"))
    3
    >>> stop_listening(heard.append)
    >>> [(progress.done, progress.total) for progress in heard]
    [(0, 2), (1, 2), (2, 2)]
    """
    if not _listeners:
        return items
    if total is None and isinstance(items, Sized):
        total = len(items)
    return _tracked(items, work, unit, total)


def _tracked(items: Iterable[Item], work: str, unit: str, total: int | None) -> Iterator[Item]:
    tell(work, 0, total, unit)
    for number, item in enumerate(items, start=1):
        yield item
        tell(work, number, total, unit)
