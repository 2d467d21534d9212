"""The check of the names of options and classes before torch and Lightning are imported, which takes seconds.

LightningCLI stores the JSON schema of all options in the user's cache folder, unless it is already there. The next
command compares its options with the schema, which counts only while the files of lit-rlhf and the versions of the
libraries stay the same. Values, and what the check cannot decide, such as the options of a user's own class, are
left to the parser.
"""

import hashlib
import json
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

import lit_rlhf
from lit_rlhf import recipes
from lit_rlhf.command_words import check_config_files, config_names
from lit_rlhf.config_errors import unknown_class, unknown_option
from lit_rlhf.errors import one_line
from lit_rlhf.yaml_text import read_yaml

Json = dict[str, Any]
Names = tuple[str, ...]

LIBRARIES = ("jsonargparse", "lightning", "torch")
"""The libraries on which the names of the options depend."""
TOP = ("help", "config", "print_config", "gpu", "gpus", "prompt_tokens")
"""The options that no configuration contains."""
OF_CLASSES = ("class_path", "init_args", "dict_kwargs")


class _Undecided(Exception):  # noqa: N818 (it is not an error)
    """An exception that leaves a command line to the parser."""


def store(schema: Json, classes: Sequence[str]) -> None:
    """Store the schema for the commands that follow; nothing happens if the cache folder cannot be written.

    Args:
        schema: The schema of the options of ``fit``.
        classes: The names of all imported classes, any of which a configuration may name.
    """
    with suppress(OSError, RuntimeError):  # the latter if there is no home folder
        path = _path()
        path.parent.mkdir(parents=True, exist_ok=True)
        new = path.with_suffix(f".{os.getpid()}")
        new.write_text(json.dumps({"key": _key(), "schema": schema, "classes": list(classes)}), encoding="utf-8")
        new.replace(path)


def stored() -> Json | None:
    """Return what `store` has stored, with the keys ``schema`` and ``classes``; None if it is missing or outdated."""
    try:
        found: Json = json.loads(_path().read_text(encoding="utf-8"))
        return found if found["key"] == _key() else None
    except (OSError, RuntimeError, ValueError, KeyError):
        return None


def _path() -> Path:
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "lit-rlhf")
    return folder / f"options-{hashlib.sha256(lit_rlhf.__file__.encode()).hexdigest()[:16]}.json"


def _key() -> list[Any]:
    """Return the versions of the libraries, and a fingerprint of the package's files."""
    files = sorted(Path(lit_rlhf.__file__).parent.rglob("*.py"))
    states = [(str(file), status.st_size, status.st_mtime_ns) for file in files for status in [file.stat()]]
    return [*map(version, LIBRARIES), hashlib.sha256(repr(states).encode()).hexdigest()]


def check(words: Sequence[str]) -> None:
    """Check the files of a command line, and the names of its options and classes as far as this can be done early.

    Args:
        words: The command and its options.

    Raises:
        UserError: if a configuration file does not exist or cannot be read.
        SystemExit: with status 2, after a message, if an option or a class does not exist.
    """
    check_config_files(words)
    if mistake := mistake_in(words):
        print(f"lit-rlhf: error: {one_line(mistake)}", file=sys.stderr)
        sys.exit(2)


def mistake_in(words: Sequence[str]) -> str:
    """Return a message about the first unknown option or class of a command line and its configuration files.

    Args:
        words: The words of a command line that `check_config_files` has checked.

    Returns:
        The message, in one line; an empty string if no mistake was found, which does not mean that there is none.
    """
    found = stored()
    if found is None or any(re.match(r"-h$|--([\w.]+\.)?help(=|$)", word) for word in words):
        return ""
    files = [read_yaml(recipes.find(name), "config") for name in config_names(words)]
    try:
        return _Check(found["schema"], found["classes"]).mistake([*files, *_assignments(words[1:])])
    except (_Undecided, yaml.YAMLError, ValueError):  # the last for an impossible date
        return ""


def _assignments(words: Sequence[str]) -> Iterator[Json]:
    """Yield each option of a command line as a configuration with this option alone."""
    rest = list(words)
    while rest:
        word, separator, value = rest.pop(0).partition("=")
        if not re.match("--[a-z]", word):
            continue
        if not separator and rest and not rest[0].startswith("--"):
            value = rest.pop(0)
        config = yaml.safe_load(value)
        for name in reversed(word[2:].removesuffix("+").split(".")):
            config = {name: config}
        yield config


class _Check:
    """The search for a name that the schema does not contain.

    Args:
        schema: The schema of all options.
        classes: The names of all classes.
    """

    def __init__(self, schema: Json, classes: Sequence[str]) -> None:
        self.schema, self.definitions, self.classes = schema, schema["definitions"], frozenset(classes)
        self.chosen: dict[Names, set[str]] = {}
        """The names of the classes that the configurations choose for each option."""

    def mistake(self, configs: Sequence[Json]) -> str:
        """Return a message about the first mistake in configurations, or an empty string."""
        found = [self._classes_in(config, [self.schema], ()) for config in configs]
        return _first([*found, *[self._unknown(config, [self.schema], (), ()) for config in configs]])

    def _parts(self, schemas: Sequence[Json]) -> Iterator[Json]:
        """Yield the alternatives of schemas without references."""
        for schema in schemas:
            if "$ref" in schema:
                yield from self._parts([self.definitions[schema["$ref"].rpartition("/")[2]]])
            elif inner := schema.get("anyOf") or schema.get("allOf"):
                yield from self._parts(inner)
            else:
                yield schema

    def _choices(self, schemas: Sequence[Json]) -> dict[str, tuple[list[str], Json]]:
        """Return the import paths and the schema of the options of each class that can be chosen, by its name."""
        choices = [p["properties"] for p in self._parts(schemas) if "class_path" in p.get("properties", {})]
        listed = [choice for choice in choices if "enum" in choice["class_path"]]
        return {
            choice["class_path"]["enum"][0]: (choice["class_path"]["enum"], choice["init_args"]) for choice in listed
        }

    def _options(self, schemas: Sequence[Json], of: set[str] | None = None) -> dict[str, list[Json]] | None:
        """Return the schemas of the options inside an option, by name; None if the options are not known.

        Args:
            schemas: The schemas of the option.
            of: The names or import paths of the classes that are chosen for it; None for all classes.
        """
        found: dict[str, list[Json]] = {}
        choices = self._choices(schemas).values()
        chosen = [options for paths, options in choices if of is None or of & set(paths)]
        for part in self._parts([*schemas, *chosen]):
            types = part.get("type", "object" if "enum" not in part else "")
            if "class_path" in part.get("properties", {}):
                continue
            if "properties" in part and part.get("additionalProperties") is False:
                for name, inner in part["properties"].items():
                    found.setdefault(name, []).append(inner)
            elif "object" in types or ("array" in types and "items" not in part):
                return None
        return found

    def _items(self, schemas: Sequence[Json]) -> list[Json]:
        return [part["items"] for part in self._parts(schemas) if "items" in part]

    def _classes_in(self, value: Any, schemas: Sequence[Json], path: Names) -> str:
        """Collect the classes that a value chooses, and return a message about an unknown one, or an empty string."""
        if isinstance(value, list):
            return _first([self._classes_in(item, self._items(schemas), path) for item in value])
        given = value.get("class_path") if isinstance(value, Mapping) else value
        mistake = self._choose(given, schemas, path, isinstance(value, str)) if isinstance(given, str) else ""
        options = self._options([*schemas, *self._items(schemas)]) or {}
        inner = _inner(value).items() if isinstance(value, Mapping) else ()
        return _first(
            [mistake, *[self._classes_in(part, options.get(name, ()), (*path, name)) for name, part in inner]]
        )

    def _choose(self, name: str, schemas: Sequence[Json], path: Names, alone: bool) -> str:
        parts = list(self._parts([*schemas, *self._items(schemas)]))
        choices = self._choices(parts)
        if not choices or (alone and any(_takes_text(part) or _is_group(part) for part in parts)):
            return ""
        if any(name in paths for paths, _ in choices.values()):
            self.chosen.setdefault(path, set()).add(name)
            return ""
        module, _, last = name.rpartition(".")
        known_module = module == "lit_rlhf" and last not in lit_rlhf.__all__
        if not (known_module or re.fullmatch(r"[A-Za-z]\w*", name)) or last in self.classes or os.path.exists(name):
            raise _Undecided
        return unknown_class(".".join(path), name, sorted(choices))

    def _unknown(self, value: Any, schemas: Sequence[Json], path: Names, owner: Names) -> str:
        """Return a message about the first unknown option inside a value, or an empty string.

        Args:
            value: The value of an option.
            schemas: The schemas of the option.
            path: The names that lead to the option.
            owner: The path of the innermost option around it for which a class is chosen.
        """
        if isinstance(value, list):
            return _first([self._unknown(item, self._items(schemas), path, owner) for item in value])
        schemas = [*schemas, *self._items(schemas)]
        options = self._options(schemas, self.chosen.get(path))
        if not isinstance(value, Mapping) or options is None:
            return ""
        owner = path if len(self.chosen.get(path, ())) == 1 else owner
        for name, part in _inner(value).items():
            if name not in options and not (path == () and name in TOP):
                return self._message((*path, name, *_rest(part)), owner)
            if mistake := self._unknown(part, options.get(name, ()), (*path, name), owner):
                return mistake
        return ""

    def _message(self, path: Names, owner: Names) -> str:
        top = self._options([self.schema]) or {}
        known = [*TOP[:3], *top]
        for name, schemas in top.items():
            known += [f"{name}.{option}" for option in self._names(schemas, self.chosen.get((name,), set()))]
        if not owner:
            return unknown_option(".".join(path), "", known, "", known)
        schemas = [self.schema]
        for number, name in enumerate(owner):
            schemas = (self._options(schemas, self.chosen.get(owner[:number])) or {})[name]
            schemas = [*schemas, *self._items(schemas)]
        (chosen,) = self.chosen[owner]
        options = self._names(schemas, {chosen})
        return unknown_option(".".join(path[len(owner) :]), ".".join(owner), options, chosen.rpartition(".")[2], known)

    def _names(self, schemas: Sequence[Json], chosen: set[str]) -> list[str]:
        """Return the names of options and, with dots, of the options inside them."""
        names = []
        for name, inner in (self._options(schemas, chosen) or {}).items():
            names += [name, *(f"{name}.{option}" for option in self._options([*inner, *self._items(inner)]) or {})]
        return names


def _first(messages: Sequence[str]) -> str:
    """Return the first message that is not empty; all are made, because any may leave the decision to the parser."""
    return next(filter(None, messages), "")


def _takes_text(schema: Json) -> bool:
    return "string" in schema.get("type", "") and "pattern" not in schema


def _is_group(schema: Json) -> bool:
    return "class_path" not in schema.get("properties", {"class_path": {}})


def _inner(value: Mapping[Any, Any]) -> dict[str, Any]:
    """Return the options inside an option; those beside the ``init_args`` of a class are left to the parser."""
    arguments = value.get("init_args") or {}
    beside = {} if "class_path" in value else {name: part for name, part in value.items() if name not in OF_CLASSES}
    inner = {**beside, **(arguments if isinstance(arguments, Mapping) else {})}
    if not all(isinstance(name, str) and re.fullmatch(r"[A-Za-z_]\w*", name) for name in inner):
        raise _Undecided
    return inner


def _rest(value: Any) -> Names:
    """Return the names that follow an unknown name on the command line."""
    if not isinstance(value, Mapping) or len(value) != 1 or next(iter(value)) in OF_CLASSES:
        return ()
    ((name, inner),) = value.items()
    return (str(name), *_rest(inner))
