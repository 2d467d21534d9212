"""The command ``lit-rlhf schema``: the JSON schema of configurations, with which editors complete and check them."""

import argparse
from collections.abc import Sequence


def main(args: Sequence[str]) -> None:
    """Run the command ``lit-rlhf schema``.

    Args:
        args: The arguments that follow ``lit-rlhf schema`` on the command line.

    Raises:
        SystemExit: if there is an argument, such as ``--help``.
    """
    argparse.ArgumentParser(
        prog="lit-rlhf schema",
        description="Print a JSON schema of the configurations. An editor with a language server for YAML, such as VS "
        "Code with the YAML extension, completes and checks a file that begins with the line "
        "'# yaml-language-server: $schema=lit-rlhf.schema.json'.",
    ).parse_args(args)
    from lit_rlhf.whole_schema import schema_text

    print(schema_text(), end="")
