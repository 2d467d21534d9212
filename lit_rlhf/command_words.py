"""Functions that check and change the words of a command line before LightningCLI parses them."""

import re
from collections.abc import Sequence
from pathlib import Path
from types import NoneType
from typing import Any

import yaml

from lit_rlhf import recipes
from lit_rlhf.errors import UserError
from lit_rlhf.yaml_text import LimitError, check_yaml, read_yaml

LONGEST_NAME = 200
"""The number of characters that the name of an option may have."""
HELP_OF_OPTION = re.compile(r"--(model|data)\.[\w.]+\.help(=|$)")
"""The pattern of a word that asks for help on an option of the chosen model class or data module class."""


def help_words(words: Sequence[str]) -> list[str]:
    """Return the words of a command line, with a request for help on an option in the form that jsonargparse expects.

    jsonargparse accepts a request for help on an option of a chosen class, such as ``--model.adapter.help``, only after
    ``--model.help CLASS``. The class is taken from ``--model CLASS`` or from the files given by ``--config``.
    Words without such a request are returned as they are. Otherwise, the words between the command and the request are
    dropped.

    Args:
        words: The words of a command line that `check_config_files` has checked.

    Raises:
        UserError: if the words contain such a request, but neither the words nor the files name the class.

    >>> help_words(["fit", "--model", "SFT", "--model.adapter.help"])
    ['fit', '--model.help', 'SFT', '--model.adapter.help']
    """
    asked = next((number for number, word in enumerate(words) if HELP_OF_OPTION.match(word)), None)
    if asked is None:
        return list(words)
    group = words[asked][2:].partition(".")[0]
    chosen = chosen_class(words, group)
    if not chosen:
        raise UserError(f"{words[asked]}: name the class first, as in --{group} CLASS {words[asked]}")
    command = [word for word in words[:1] if not word.startswith("-")]
    return [*command, f"--{group}.help", chosen, *words[asked:]]


def chosen_class(words: Sequence[str], group: str) -> str:
    """Return the class that a command line, or else one of its ``--config`` files, chooses for the model or the data.

    Args:
        words: The words of a command line that `check_config_files` has checked.
        group: ``model`` or ``data``.

    Returns:
        The name or the import path of the class; an empty string if no class is chosen.

    >>> chosen_class(["fit", "--config", "ppo"], "model")
    'PolicyGradient'
    """
    chosen = _given(words, f"--{group}.help") or _given(words, f"--{group}")
    if not chosen:
        configs = [read_yaml(recipes.find(name), "config") for name in config_names(words)]
        groups = [part for config in configs if isinstance(part := config.get(group), dict)]
        chosen = [str(name) for part in groups if (name := part.get("class_path"))]
    return chosen[-1] if chosen else ""


def _given(words: Sequence[str], *options: str) -> list[str]:
    """Return the values that a command line gives to options, as ``--option value`` or ``--option=value``."""
    parts = [(word.partition("="), after) for word, after in zip(words, [*words, ""][1:], strict=True)]
    return [value if given else after for (option, given, value), after in parts if option in options]


def config_names(words: Sequence[str]) -> list[str]:
    """Return the files and recipes that a command line gives to ``--config``.

    >>> config_names(["fit", "--config", "ppo", "-c=more.yaml"])
    ['ppo', 'more.yaml']
    """
    return _given(words, "-c", "--config")


def check_config_files(words: Sequence[str]) -> None:
    """Check the words of a command line, and that every file or recipe given by ``--config`` is a YAML mapping.

    Args:
        words: The words of the command line.

    Raises:
        UserError: if an option is longer than any that exists, if a value or a file exceeds a limit of
            `lit_rlhf.yaml_text`, if there is no such file or recipe, or if a file is not a YAML mapping; the message
            names the file and, if the YAML is invalid, the line.
    """
    for before, word in zip(["", *words], words, strict=False):
        name, _, value = word.partition("=") if word.startswith("--") else (before, "", word)
        if name.startswith("--") and len(name) > LONGEST_NAME:
            raise UserError(f"there is no option {name!r}")
        try:
            check_yaml(value)
        except LimitError as error:
            raise UserError(f"{name.lstrip('-')} cannot be {value[:40]!r}…: {error.problem}") from error
        except yaml.YAMLError:  # the value is plain text, unless the parser says otherwise
            pass
    for name in config_names(words):
        _check_config_file(recipes.find(name))


def _check_config_file(path: Path) -> None:
    config = read_yaml(path, "config")
    if not isinstance(config, dict):
        what = "is empty" if config is None else f"contains a {type(config).__name__}"
        raise UserError(f"config: {path} should be a mapping of options (model: …, data: …), but it {what}")
    if others := [name for name in config if not isinstance(name, str)]:
        raise UserError(f"config: {path}: the name of an option should be text, not {others[0]!r}")
    for name, value in config.items():
        _check_classes(value, f"config: {path}: {name}")


def _check_classes(value: Any, where: str) -> None:
    """Check that each class inside an option is named by text, and that its options are a mapping."""
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, part in parts:
        _check_classes(part, f"{where}.{name}")
        if name == "class_path" and not isinstance(part, str):
            raise UserError(f"{where}.class_path should be the name of a class, not {part!r}")
        if name == "init_args" and not isinstance(part, dict | NoneType):
            raise UserError(f"{where}.init_args should be a mapping of options, not {part!r}")
