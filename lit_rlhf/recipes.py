"""The recipes: configurations that come with the package, found by name, and the command ``lit-rlhf recipes``.

Neither torch nor Lightning is imported, so that the command answers quickly.
"""

import argparse
import difflib
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from lit_rlhf.errors import UserError

TITLES = {
    "": "Recipes",
    "quickstart": "The stages of lit-rlhf quickstart",
    "strategy": "To add to a recipe: how models are distributed over GPUs",
    "engine": "To add to a recipe: what generates the responses",
}
"""The headings of the list, by the folder of the recipes under ``configs/``."""

METHODS = ("sft", "reward", "dpo", "ppo", "trpo", "grpo", "dr_grpo", "rloo", "reinforce", "a2c", "a3c")
"""The order of the recipes: the beginnings of their names, in the order in which a beginner needs them."""


def folder() -> Path:
    """Return the folder of the recipes, ``configs/``, either in the installed package or in a source checkout."""
    package = Path(__file__).parent
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"


def names() -> list[str]:
    """Return the names of the recipes: their paths under ``configs/`` without the file extension.

    >>> {"ppo", "strategy/fsdp2", "quickstart/sft"} <= set(names())
    True
    """
    paths = (path.relative_to(folder()).with_suffix("") for path in folder().rglob("*.yaml"))
    return sorted((path.as_posix() for path in paths if path.parent.name in TITLES), key=_order)


def _order(name: str) -> tuple[int, int, str]:
    directory, _, last = name.rpartition("/")
    method = next((rank for rank, method in enumerate(METHODS) if last.startswith(method)), len(METHODS))
    return list(TITLES).index(directory), method, last


def find(name: str | Path) -> Path:
    """Return the path of a configuration file or, if there is no such file, of the recipe with this name.

    The name of a recipe may be given with ``configs/`` before it and ``.yaml`` after it, like the path of a file in the
    repository. A file NAME or NAME.yaml takes precedence over the recipe NAME.

    Args:
        name: A path, or the name of a recipe, such as ``ppo`` or ``strategy/fsdp2``.

    Raises:
        UserError: if there is neither a file nor a recipe with this name.

    >>> find("strategy/fsdp2").name
    'fsdp2.yaml'
    >>> find("poo")
    Traceback (most recent call last):
    lit_rlhf.errors.UserError: config: there is no file poo and no recipe of that name, did you mean 'ppo'?
    """
    for candidate in (Path(name), Path(f"{name}.yaml")):
        with suppress(OSError):  # if the name is too long
            if candidate.is_file():
                return candidate
    return find_recipe(name)


def find_recipe(name: str | Path) -> Path:
    """Return the path of the recipe with this name, which may have the forms that `find` accepts.

    Raises:
        UserError: if there is no recipe with this name.
    """
    path, known = Path(name), names()
    recipe = (path.with_suffix("") if path.suffix == ".yaml" else path).as_posix().removeprefix("configs/")
    if recipe in known:
        return folder() / f"{recipe}.yaml"
    last = {name.rpartition("/")[2]: name for name in reversed(known)}
    nearest = difflib.get_close_matches(recipe, [*known, *last], n=1, cutoff=0.5)
    hint = f"did you mean {last.get(nearest[0], nearest[0])!r}?" if nearest else "lit-rlhf recipes lists the recipes"
    raise UserError(f"config: there is no file {name} and no recipe of that name, {hint}")


def summary(recipe: str) -> str:
    """Return the description of a recipe: the first line of its file, without the comment sign.

    >>> summary("sft")
    'Supervised fine-tuning: the start of everything else.'
    """
    first, _, _ = (folder() / f"{recipe}.yaml").read_text(encoding="utf-8").partition("\n")
    return first.lstrip("# ")


def main(args: Sequence[str]) -> None:
    """Run the command ``lit-rlhf recipes``.

    Args:
        args: The arguments that follow ``lit-rlhf recipes`` on the command line.

    Raises:
        UserError: if there is no recipe with the given name.
        SystemExit: if an argument is unknown or wrong, or if it is ``--help``.

    >>> main(["strategy/ddp"])
    # Every GPU holds all models and processes its part of each batch. For models that fit into one GPU.
    #   lit-rlhf fit --config ppo --config strategy/ddp
    trainer:
      strategy: ddp
      accelerator: auto
      devices: auto
    """
    parser = argparse.ArgumentParser(
        prog="lit-rlhf recipes",
        description="List the recipes, which --config finds by name in any folder, or print one of them: "
        "lit-rlhf recipes ppo > my_ppo.yaml",
    )
    parser.add_argument("name", nargs="?", help="the recipe to print")
    name = parser.parse_args(args).name
    if name is not None:
        print(find_recipe(name).read_text(encoding="utf-8"), end="")
        return
    width = max(len(recipe) for recipe in names())
    for directory, title in TITLES.items():
        print(f"{title}:")
        for recipe in names():
            if recipe.rpartition("/")[0] == directory:
                print(f"  {recipe:{width}}  {summary(recipe)}")
        print()
    print("lit-rlhf fit --config NAME runs a recipe; lit-rlhf recipes NAME > FILE.yaml copies one, to be edited.")
