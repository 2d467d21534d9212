"""A configuration with the description of each option as a comment, for ``--print_config=comments``."""

import textwrap
from collections.abc import Iterator
from typing import Any

import yaml

WIDTH = 110
MOST_CHOICES = 16
"""The largest number of classes or values that a comment lists."""


def with_comments(config: dict[str, Any], schema: dict[str, Any]) -> str:
    """Return a configuration as YAML, with a comment above each option that the schema describes.

    Args:
        config: The configuration.
        schema: The schema of configurations (`lit_rlhf.schema.config_schema`).

    >>> count = {"type": "integer", "description": "The number of responses."}
    >>> schema = {"properties": {"samples": {"properties": {"count": count}}}}
    >>> print(with_comments({"samples": {"count": 4}}, schema))
    samples:
      # The number of responses.
      count: 4
    """
    commented = _Commented(schema)
    blocks = (commented.entry(option, value, schema) for option, value in config.items())
    return "\n\n".join("\n".join(block) for block in blocks)


class _Commented:
    """A writer of the parts of a configuration, with comments from the schema of each part."""

    def __init__(self, root: dict[str, Any]) -> None:
        self.root = root

    def mapping(self, value: dict[str, Any], schema: dict[str, Any]) -> list[str]:
        """Return the lines of a mapping."""
        return [line for key, part in value.items() for line in self.entry(key, part, schema)]

    def entry(self, key: str, value: Any, owner: dict[str, Any]) -> list[str]:
        """Return the lines of an option with its comment; ``owner`` is the schema of the mapping that has it."""
        schema = owner.get("properties", {}).get(key, {})
        comment = textwrap.wrap(self.comment(schema), WIDTH)
        found = self.matching(schema, value)
        if isinstance(value, dict) and value and found:
            lines = [f"{key}:", *(f"  {line}" for line in self.mapping(value, found))]
        elif isinstance(value, list) and any(isinstance(part, dict) for part in value):
            lines = [f"{key}:", *(line for part in value for line in self.item(part, found.get("items", {})))]
        else:
            text = yaml.safe_dump({key: value}, sort_keys=False, allow_unicode=True, width=1000)
            lines = text.rstrip("\n").splitlines()
        return [*(f"# {line}" for line in comment), *lines]

    def item(self, value: Any, schema: dict[str, Any]) -> list[str]:
        """Return the lines of an item of a list."""
        if not isinstance(value, dict):
            return yaml.safe_dump([value], sort_keys=False, allow_unicode=True).rstrip("\n").splitlines()
        lines = self.mapping(value, self.matching(schema, value))
        first = next(number for number, line in enumerate(lines) if not line.startswith("#"))
        return [f"{'- ' if number == first else '  '}{line}" for number, line in enumerate(lines)]

    def comment(self, schema: dict[str, Any]) -> str:
        """Return the description of an option, and its choices if there are at most `MOST_CHOICES`."""
        text = schema.get("description", "")
        values = (str(value) for part in self.alternatives(schema) for value in part.get("enum", ()))
        choices = list(dict.fromkeys(value for value in values if "." not in value))  # classes by their short names
        if text and 1 < len(choices) <= MOST_CHOICES:
            text = f"{text.rstrip('.')}. Choices: {', '.join(choices)}."
        return text

    def alternatives(self, schema: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Yield the alternatives that a schema offers for a value, with references resolved."""
        if "$ref" in schema:
            definition = schema["$ref"].removeprefix("#/definitions/")
            yield from self.alternatives(self.root["definitions"][definition])
        elif "anyOf" in schema or "allOf" in schema:
            for part in schema.get("anyOf") or schema["allOf"]:
                yield from self.alternatives(part)
        else:
            yield schema

    def matching(self, schema: dict[str, Any], value: Any) -> dict[str, Any]:
        """Return the alternative that describes a value's keys, class or items; an empty schema if none does."""
        for part in self.alternatives(schema):
            properties = part.get("properties", {})
            classes = properties.get("class_path", {}).get("enum", [None])
            if isinstance(value, list) and "items" in part:
                return part
            is_described = isinstance(value, dict) and value.keys() <= properties.keys()
            if is_described and value.get("class_path") in classes:
                return part
        return {}
