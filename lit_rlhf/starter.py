"""The command ``lit-rlhf init``, which writes a folder to start from, with a configuration that runs as it is."""

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path

from lit_rlhf import recipes
from lit_rlhf.errors import UserError

SCHEMA = "lit-rlhf.schema.json"


def main(args: Sequence[str]) -> None:
    """Run the command ``lit-rlhf init``.

    Args:
        args: The arguments that follow ``lit-rlhf init`` on the command line.

    Raises:
        UserError: if the folder is not empty, is a file, or cannot be written.
        SystemExit: if an argument is missing, unknown or wrong, or if it is ``--help``.
    """
    parser = argparse.ArgumentParser(
        prog="lit-rlhf init",
        description="Write a folder to start from: a configuration, a reward function with its test, prompts, and a "
        "README with the commands. The configuration runs as it is on a CPU in about a minute, without a network.",
    )
    parser.add_argument("name", type=Path, help="the folder to write, which must be new or empty")
    folder = parser.parse_args(args).name
    try:
        write(folder)
    except OSError as error:
        raise UserError(f"init: the folder {folder} cannot be written: {error.strerror}") from error
    commands = (f"cd {folder}", "python -m pytest", "lit-rlhf fit --config config.yaml")
    print(f"{folder} is ready. The next commands:\n", *(f"  {command}" for command in commands), sep="\n")


def write(folder: Path) -> None:
    """Write the starter's files, and the schema with which editors complete and check its configuration.

    Args:
        folder: The folder to write.

    Raises:
        UserError: if the folder is not empty, or is a file.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"init: {folder} is a file; give the name of a new folder")
    if folder.is_dir() and any(folder.iterdir()):
        raise UserError(f"init: the folder {folder} is not empty; give the name of a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    from lit_rlhf.whole_schema import schema_text

    schema = schema_text()
    for file in sorted((recipes.folder() / "starter").iterdir()):
        if file.is_file():
            shutil.copyfile(file, folder / file.name)
    readme, config = folder / "README.md", folder / "config.yaml"
    readme.write_text(readme.read_text(encoding="utf-8").replace("NAME", folder.resolve().name, 1), encoding="utf-8")
    reference = f"# yaml-language-server: $schema={SCHEMA}\n"
    config.write_text(reference + config.read_text(encoding="utf-8"), encoding="utf-8")
    (folder / SCHEMA).write_text(schema, encoding="utf-8")
