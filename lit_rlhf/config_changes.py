"""What a resumed run has changed in its configuration, in lines for the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

SHOWN = 10
"""The number of changes that are listed; of further ones, only the number is given."""
UNSAID = ("ckpt_path", "trainer.default_root_dir", "trainer.enable_", "plan.", "report.", "summary.")
"""The beginnings of the names of options that change nothing in the run but what it prints, or its folder."""
POSITION = "the position in the data is kept as a number of batches"
REMARKS = {
    "data.batch_size": POSITION,
    "data.train": POSITION,
    "AdaptiveKL.coef": "the adapted coefficient of the checkpoint continues",
    "EarlyStopping.patience": "Lightning keeps that of the checkpoint",
    "KLPenalty.beta": "if β is adaptive, that of the checkpoint continues",
}
"""What else there is to say about a change, by the name of the option, or by its class and its name there."""
LONGEST = 80
"""The largest number of characters of a value that is shown."""


class Change(NamedTuple):
    """An option with two different values, and the class that has the option, if a class was chosen."""

    name: str
    before: Any
    now: Any
    owner: str = ""


def describe_changes(before: Mapping[str, Any], now: Mapping[str, Any], iteration: int) -> list[str]:
    """Describe how the configuration of a resumed run differs from the one with which it ran before.

    Args:
        before: The earlier configuration.
        now: The present configuration.
        iteration: The number of iterations done with the earlier configuration.

    Returns:
        One line for each option that differs, up to ``SHOWN`` lines, and a line with the number of further ones.

    >>> before = {"seed_everything": 42, "model": {"class_path": "lit_rlhf.SFT", "init_args": {"max_tokens": 8192}}}
    >>> now = {"seed_everything": 42, "model": {"class_path": "lit_rlhf.SFT", "init_args": {"max_tokens": 4096}}}
    >>> describe_changes(before, now, 40)
    ['resume: model.max_tokens is 4096, was 8192 until iteration 40']
    """
    found = [change for change in _changes(before, now) if not change.name.startswith(UNSAID)]
    lines = [f"resume: {_described(change, iteration)}" for change in found[:SHOWN]]
    return lines + ([f"resume: {len(found) - SHOWN} more options differ"] if found[SHOWN:] else [])


def _described(change: Change, iteration: int) -> str:
    remark = REMARKS.get(change.name) or REMARKS.get(f"{change.owner}.{change.name.rpartition('.')[2]}")
    text = f"{change.name} is {_shown(change.now)}, was {_shown(change.before)} until iteration {iteration}"
    return f"{text}; {remark}" if remark else text


def _changes(before: Any, now: Any, name: str = "", owner: str = "") -> Iterator[Change]:
    """Yield the options with different values; an option that only one of the configurations has is left out."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        if (chosen := now.get("class_path")) != before.get("class_path"):
            yield Change(name, before, now, owner)
            return
        for key in (key for key in now if key in before):
            inner = name if chosen and key == "init_args" else f"{name}.{key}".lstrip(".")
            yield from _changes(before[key], now[key], inner, _short(chosen) if chosen else owner)
    elif isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        for number, pair in enumerate(zip(before, now, strict=True)):
            yield from _changes(*pair, f"{name}[{number}]", owner)
    elif before != now:
        yield Change(name, before, now, owner)


def _shown(value: Any) -> str:
    """Return a short text for a value; of a class with its options, only the name."""
    if isinstance(value, Mapping) and value.get("class_path"):
        return _short(value["class_path"])
    if isinstance(value, list):
        value = f"[{', '.join(map(_shown, value))}]"
    text = "null" if value is None else str(value)
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…"


def _short(class_path: str) -> str:
    return str(class_path).rpartition(".")[2]
