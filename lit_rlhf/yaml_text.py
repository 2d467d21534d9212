"""YAML from files and command lines, read with limits, so that a small text cannot become an endless value."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from lit_rlhf.errors import UserError

LARGEST = 2**18
"""The maximum number of characters of a text."""
DEEPEST = 50
"""The maximum number of lists and mappings inside one another."""
MOST_VALUES = 20_000
"""The maximum number of values, where a value that an alias repeats counts each time."""


def read_yaml(path: Path, what: str) -> Any:
    """Read a YAML file as plain values: mappings, lists, texts, numbers, dates, true, false and null.

    Args:
        path: The file.
        what: The purpose of the file, such as ``config``, for messages.

    Raises:
        UserError: if the file cannot be read, is not UTF-8 or not YAML, gives an option twice, or exceeds a limit of
            this module; the message names the file and the line.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{what}: {path} cannot be read: {error.strerror}") from error
    try:
        text = data.decode("utf-8-sig")
        check_yaml(text)
        return yaml.safe_load(text)
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(f"{what}: {path}, line {line} is not UTF-8 text: {error.reason}") from error
    except yaml.MarkedYAMLError as error:
        place = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UserError(f"{what}: {path}{place} is not valid YAML: {error.problem}") from error
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise UserError(f"{what}: {path}, line {line} is not valid YAML: a character that is not printable") from error
    except ValueError as error:  # an impossible date, or a number with thousands of digits
        raise UserError(f"{what}: {path} is not valid YAML: {error}") from error


class LimitError(yaml.MarkedYAMLError):
    """A YAML text exceeds a limit of this module."""


@dataclass
class _Open:
    """A list or mapping whose end has not been read."""

    anchor: str | None
    mapping: bool
    size: int = 1
    parts: int = 0
    keys: set[str] = field(default_factory=set)


def check_yaml(text: str) -> None:
    """Check that a YAML text stays within the limits of this module, and that no mapping has a key twice.

    The text is read event by event, so that neither aliases nor nesting cost more than the text itself.

    Args:
        text: The text.

    Raises:
        yaml.YAMLError: if the text is not YAML.
        LimitError: if the text exceeds a limit, a value contains itself, or a key occurs twice.

    >>> check_yaml("model: {class_path: SFT}")
    >>> check_yaml("data: 1\\ndata: 2")  # doctest: +IGNORE_EXCEPTION_DETAIL
    Traceback (most recent call last):
        ...
    lit_rlhf.yaml_text.LimitError: 'data' is given twice
    """
    if len(text) > LARGEST:
        raise LimitError(problem=f"it has more than {LARGEST} characters")
    around: list[_Open] = []
    sizes: dict[str, int] = {}
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        refusal = _refusal(event, around, sizes)
        if refusal:
            mark: Any = event.start_mark
            raise LimitError(problem=refusal, problem_mark=mark)


def _refusal(event: yaml.Event, around: list[_Open], sizes: dict[str, int]) -> str:
    """Follow one event, and return what is wrong with it, or an empty string.

    Args:
        event: The event.
        around: The lists and mappings around it, the outermost first; changed in place.
        sizes: The numbers of values in the values that have an anchor; changed in place.
    """
    size = 1
    if isinstance(event, yaml.CollectionStartEvent):
        around.append(_Open(event.anchor, isinstance(event, yaml.MappingStartEvent)))
        return f"more than {DEEPEST} lists and mappings inside one another" if len(around) > DEEPEST else ""
    if isinstance(event, yaml.CollectionEndEvent):
        ended = around.pop()
        size = ended.size
        sizes |= {ended.anchor: size} if ended.anchor else {}
    elif isinstance(event, yaml.AliasEvent):
        if event.anchor not in sizes:
            return f"the alias *{event.anchor} stands for nothing, or for a value around it"
        size = sizes[event.anchor]
    elif isinstance(event, yaml.ScalarEvent):
        sizes |= {event.anchor: 1} if event.anchor else {}
    else:
        return ""
    if not around:
        return ""
    owner = around[-1]
    is_key = owner.mapping and owner.parts % 2 == 0
    owner.size, owner.parts = owner.size + size, owner.parts + 1
    if is_key and isinstance(event, yaml.ScalarEvent):
        if event.value in owner.keys:
            return f"{event.value!r} is given twice"
        owner.keys.add(event.value)
    return f"more than {MOST_VALUES} values, counting those that aliases repeat" if owner.size > MOST_VALUES else ""
