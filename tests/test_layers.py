"""What may import what: the package's parts, from the lowest to the highest, each knowing only those below it."""

import ast
import re
from pathlib import Path

import pytest

import lit_rlhf

PACKAGE = Path(__file__).parent.parent / "lit_rlhf"
LAYERS = [
    ("errors", "files", "progress"),
    (
        "compat",
        "components",
        "foreign_options",
        "http",
        "randomness",
        "recipes",
        "references",
        "types",
        "yaml_text",
    ),
    ("algorithms",),
    ("batching",),
    ("models",),
    ("data",),
    ("checkpoint_folders", "generation", "rewards"),
    ("checkpoints",),
    ("strategies",),
    ("modules",),
    ("export", "planning", "report"),
    ("callbacks",),
    (
        "command_words",
        "config_changes",
        "config_comments",
        "config_errors",
        "lost_processes",
        "schema",
        "testing",
    ),
    ("early_check", "trainer_options"),
    ("lightning_cli",),
    ("plan_cli", "quickstart", "report_cli", "whole_schema"),
    ("export_cli", "quickstart_cli", "schema_cli", "starter"),
    ("cli",),
]
HEIGHT = {part: height for height, layer in enumerate(LAYERS) for part in layer}
HOME = {name: getattr(lit_rlhf, name).__module__.removeprefix("lit_rlhf.") for name in lit_rlhf.__all__}
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def part_of(name: str) -> str:
    """``lit_rlhf.modules.dpo`` belongs to ``modules``."""
    return name.split(".")[1] if "." in name else "__init__"


def imports(path: Path) -> set[str]:
    """The modules of the package that a file imports, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        assert not (isinstance(node, ast.ImportFrom) and node.level), "imports are absolute"
        if isinstance(node, ast.ImportFrom) and node.module == "lit_rlhf":
            found |= {f"lit_rlhf.{HOME[alias.name]}" for alias in node.names if alias.name in HOME}
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "lit_rlhf":
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found |= {name for name in names if (PACKAGE.parent / name.replace(".", "/")).with_suffix(".py").exists()}
            found.add(node.module)
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.split(".")[0] == "lit_rlhf"}
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_no_import_runs_up(path):
    own = path.relative_to(PACKAGE).with_suffix("").parts[0]
    used = {part_of(name) for name in imports(path)} - {own, "__init__"}
    assert {part for part in used if HEIGHT[part] >= HEIGHT[own]} == set()


def test_no_circle_of_imports():
    names = {".".join(("lit_rlhf", *path.relative_to(PACKAGE).with_suffix("").parts)): path for path in FILES}
    graph = {name.removesuffix(".__init__"): imports(path) for name, path in names.items()}
    finished: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join((*trail, name))
        if name not in finished:
            for used in graph.get(name, ()):
                visit(used, (*trail, name))
            finished.add(name)

    for name in graph:
        visit(name, ())
    assert len(finished) > 40


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_files_stay_short(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= (350 if path.name == "on_policy.py" else 400)


def test_the_design_page_lists_the_layers():
    page = (PACKAGE.parent / "docs" / "design.md").read_text(encoding="utf-8")
    table = page[page.index("| part | holds |") : page.index("## Where a new part belongs")]
    rows = [re.findall(r"`(\w+)`", line.split("|")[1]) for line in table.splitlines()[2:] if line.startswith("|")]
    assert [tuple(sorted(row)) for row in rows] == [tuple(sorted(layer)) for layer in LAYERS]


def test_every_part_has_a_layer():
    parts = {path.relative_to(PACKAGE).with_suffix("").parts[0] for path in FILES}
    assert parts == set(HEIGHT)
