"""The JSON schema of all options of ``fit``, read from LightningCLI."""

import json
from typing import Any, NoReturn

from lit_rlhf import lightning_cli
from lit_rlhf.schema import config_schema


class _Groups(Exception):  # noqa: N818 (it is not an error)
    """An exception that carries the groups of options out of LightningCLI."""


class SchemaCLI(lightning_cli.CLI):
    """A command line that parses nothing: it raises an exception as soon as its options are known."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs["run"] = False  # the parser then has no subcommands
        super().__init__(*args, **kwargs)

    def parse_arguments(self, parser: Any, args: Any) -> NoReturn:
        """Raise `_Groups` with the groups of options instead of parsing the arguments."""
        raise _Groups(parser.option_groups)


def schema_text() -> str:
    """Return the JSON schema of the options of ``fit`` and the other commands, as text."""
    groups = {}
    try:
        lightning_cli.run([], SchemaCLI)
    except _Groups as found:
        (groups,) = found.args
    return json.dumps(config_schema(groups), indent=1, ensure_ascii=False) + "\n"
