"""The JSON schema of configurations, with which editors complete and check them.

The schema is made from the signatures and docstrings of the classes that a configuration can name, so it fits the
installed versions of lit-rlhf, Lightning and torch.
"""

import collections.abc
import dataclasses
import re
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from lit_rlhf.components import Option, components, import_paths, is_options_group, options, summary, takes_any_option

Json = dict[str, Any]

DRAFT = "http://json-schema.org/draft-07/schema#"
SIMPLE = {bool: "boolean", int: "integer", float: "number", str: "string", Path: "string", type(None): "null"}
OWN = r"^(?!(lit_rlhf|torch\.optim)\.)[A-Za-z_][\w.]*\.\w+$"
"""The pattern of import paths of classes outside lit-rlhf and ``torch.optim``; the classes of these two are listed."""

OTHERS: dict[str, Json] = {
    "seed_everything": {"type": ["integer", "boolean"], "description": "The seed of all random numbers of the run."},
    "ckpt_path": {"type": ["string", "null"], "description": "A checkpoint to resume: a path, last, or best."},
    "weights_only": {"type": ["boolean", "null"]},
    "verbose": {"type": "boolean"},
    "return_predictions": {"type": ["boolean", "null"]},
}
"""The options at the top of a configuration that belong to no class."""


def config_schema(groups: Mapping[str, tuple[type, bool]]) -> Json:
    """Return a JSON schema (draft 7) of configurations.

    Args:
        groups: For each top-level option, a class and a bool: True if ``class_path`` chooses one of the subclasses of
            the class, False if the option is a group of the class's own options.

    >>> from lit_rlhf import Samples
    >>> schema = config_schema({"samples": (Samples, False)})
    >>> schema["definitions"]["lit_rlhf.callbacks.samples.Samples"]["properties"]["count"]["type"]
    'integer'
    """
    made = _Schema()
    properties = {
        name: made.choice(group) if is_choice else made.group(group) for name, (group, is_choice) in groups.items()
    }
    return {
        "$schema": DRAFT,
        "title": "A configuration of lit-rlhf",
        "type": "object",
        "properties": properties | OTHERS,
        "additionalProperties": False,
        "definitions": dict(sorted(made.definitions.items())),
    }


class _Schema:
    """The definitions of a schema: the options of each class, and the classes among which an option chooses."""

    def __init__(self) -> None:
        self.definitions: dict[str, Json] = {}

    def group(self, component: type) -> Json:
        """Return a reference to the schema of a class's options."""
        name = f"{component.__module__}.{component.__name__}"
        if name not in self.definitions:
            self.definitions[name] = {}  # while the class's options are read, which may name the class again
            self.definitions[name] = {
                "type": "object",
                "description": _for_yaml(summary(component)),
                "properties": {option.name: self.option(option) for option in options(component)},
                **({} if takes_any_option(component) else {"additionalProperties": False}),
            }
        return {"$ref": f"#/definitions/{name}"}

    def choice(self, base: type) -> Json:
        """Return a reference to the schema of a choice among the subclasses of a base class.

        A class is given by its name, or as ``class_path`` with ``init_args``. A file that modifies an earlier file may
        give ``init_args`` alone.
        """
        name = f"choice.{base.__name__}"
        if name not in self.definitions:
            self.definitions[name] = {}
            known = components(base)
            names = [path for component in known for path in (component.__name__, *import_paths(component))]
            self.definitions[name] = {
                "anyOf": [
                    {"enum": names},
                    *(self._class(component) for component in known),
                    {"type": "string", "pattern": OWN},
                    {
                        "type": "object",
                        "properties": {"class_path": {"type": "string", "pattern": OWN}, "init_args": {}},
                        "required": ["class_path"],
                    },
                ]
            }
        return {"$ref": f"#/definitions/{name}"}

    def _class(self, component: type) -> Json:
        path = {"enum": [component.__name__, *import_paths(component)], "description": _for_yaml(summary(component))}
        return {
            "type": "object",
            "properties": {"class_path": path, "init_args": self.group(component)},
            "additionalProperties": False,
        }

    def option(self, option: Option) -> Json:
        """Return the schema of an option: its type, its description and, if JSON can express it, its default."""
        schema = self.hint(option.hint)
        if "$ref" in schema:
            schema = {"allOf": [schema]}  # in draft 7, nothing beside a reference counts
        described = {"description": _for_yaml(option.description)} if option.description else {}
        default = _plain(option.default)
        return schema | described | ({} if default is dataclasses.MISSING else {"default": default})

    def hint(self, hint: Any) -> Json:
        """Return the schema of a type, or an empty schema, which every value matches, if the type is not supported."""
        origin, arguments = get_origin(hint), get_args(hint)
        if hint in SIMPLE:
            return {"type": SIMPLE[hint]}
        if origin is Literal:
            return {"enum": list(arguments)}
        if origin in (Union, types.UnionType):
            return _any_of([self.hint(argument) for argument in arguments])
        if origin in (list, tuple, set, collections.abc.Sequence, collections.abc.Iterable):
            items = self.hint(arguments[0]) if arguments and origin is not tuple else {}
            return {"type": "array"} | ({"items": items} if items else {})
        if hint is dict or origin in (dict, collections.abc.Mapping):
            return {"type": "object"}
        if origin is Callable or origin is collections.abc.Callable:
            made = get_args(arguments[-1]) or (arguments[-1],) if arguments else ()
            choices = [self.choice(base) for base in made if isinstance(base, type) and components(base)]
            return _any_of(choices) if choices else {}
        if is_options_group(hint):
            return _any_of([self.group(hint), self._class(hint)])
        return self.choice(hint) if isinstance(hint, type) and components(hint) else {}


def _any_of(schemas: list[Json]) -> Json:
    """Return a schema of the values that match at least one of the given schemas."""
    if {} in schemas:
        return {}
    distinct = [schema for number, schema in enumerate(schemas) if schema not in schemas[:number]]
    simple = [schema["type"] for schema in distinct if set(schema) == {"type"}]
    others = [schema for schema in distinct if set(schema) != {"type"}]
    joined = [{"type": simple if len(simple) > 1 else simple[0]}] if simple else []
    return (joined + others)[0] if len(joined + others) == 1 else {"anyOf": joined + others}


def _for_yaml(text: str) -> str:
    """Return a description without backquotes, and with None, True and False written as in YAML."""
    for word, name in {"None": "null", "True": "true", "False": "false"}.items():
        text = re.sub(rf"\b{word}\b", name, text)
    return text.replace("`", "")


def _plain(value: Any) -> Any:
    """Return a default value as JSON data, or MISSING if JSON cannot express the value, such as a function."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        items = [_plain(item) for item in value]
        return dataclasses.MISSING if dataclasses.MISSING in items else items
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        parts = {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
        given = {name: part for name, part in parts.items() if part is not dataclasses.MISSING}
        return given if is_options_group(type(value)) else {"class_path": type(value).__name__, "init_args": given}
    return dataclasses.MISSING
