"""The blocks, the inline code, the commands and the options of all pages: the READMEs, CONTRIBUTING and docs/."""

import collections.abc
import functools
import inspect
import re
import shlex
import typing
from pathlib import Path
from typing import NamedTuple

import lightning
import torch

from lit_rlhf import DPO, SFT, PolicyGradient, RewardModeling
from lit_rlhf.callbacks import IterationCheckpoint, LogDetails, Samples, Summary, WriteReport
from lit_rlhf.callbacks.plan import PrintPlan
from lit_rlhf.data import Demonstrations, Preferences, Prompts

ROOT = Path(__file__).parent.parent
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in (
        *(ROOT / folder / "README.md" for folder in ("", "benchmarks", "configs/starter")),
        ROOT / "CONTRIBUTING.md",
        *sorted((ROOT / "docs").glob("*.md")),
    )
}
FENCE = re.compile(r"^( *)```(\S*)\n(.*?)^\1```$", re.DOTALL | re.MULTILINE)
SHELLS = ("bash", "sh")
MODULES = (PolicyGradient, SFT, RewardModeling, DPO, Prompts, Demonstrations, Preferences)
OTHERS = {
    **{"trainer": lightning.Trainer, "checkpoint": IterationCheckpoint, "samples": Samples, "plan": PrintPlan},
    **{"details": LogDetails, "report": WriteReport, "summary": Summary},
}
OPTION = re.compile(rf"^(?:--)?((?:model|data|{'|'.join(OTHERS)})(?!\.jsonl|\.html)(?:\.\w+)+)(?:\+?[:= ].*)?$")
"""An option's path in inline code, with its value or without."""


class Block(NamedTuple):
    """A fenced block of a page."""

    page: str
    line: int
    kind: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


class Span(NamedTuple):
    """Inline code, with the scripts of benchmarks/ that its paragraph or, if there are none, its section names."""

    page: str
    text: str
    scripts: frozenset[str]


def blocks(*kinds: str, page: str | None = None) -> list[Block]:
    """Return the blocks of these kinds, or of all kinds, of a page or of all pages."""
    found = [
        Block(name, text[: match.start()].count("\n") + 1, match[2], match[3])
        for name, text in PAGES.items()
        for match in FENCE.finditer(text)
    ]
    return [block for block in found if block.kind in (kinds or (block.kind,)) and block.page == (page or block.page)]


@functools.cache
def spans() -> list[Span]:
    """Return the inline code of all pages, each once for a page."""
    found = {}
    for page, text in PAGES.items():
        for section in re.split(r"^(?=## )", text, flags=re.MULTILINE):
            prose = FENCE.sub("", section)
            for paragraph in re.split(r"\n\n|\n(?=\|)", prose):
                scripts = _scripts(paragraph) or _scripts(section)
                for code in re.findall(r"`([^`]+)`", paragraph):
                    span = Span(page, " ".join(code.split()), scripts)
                    found.setdefault((page, span.text, scripts), span)
    return list(found.values())


def commands_of(text: str) -> list[list[str]]:
    """Return the words of each command of a shell's text, without comments, redirections and variables before it.

    >>> commands_of("A=1 python -m venv x && x/bin/pip install . # twice\\nls > files.txt")
    [['python', '-m', 'venv', 'x'], ['x/bin/pip', 'install', '.'], ['ls']]
    """
    commands = []
    for line in text.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        words: list[str] = []
        for word in [*lexer, ";"]:
            if word in ("&&", ";", "|"):
                commands.append(words)
                words = []
            elif words or not re.match(r"[A-Z_]+=", word):
                words.append(word)
    plain = [words[: words.index(">")] if ">" in words else words for words in commands]
    return [words for words in plain if words]


def _scripts(text: str) -> frozenset[str]:
    return frozenset(name for name in re.findall(r"(\w+)\.py\b", text) if (ROOT / "benchmarks" / f"{name}.py").exists())


def exists(path: str, modules: tuple[type, ...] = MODULES) -> bool:
    """Return whether one of the modules, or the Trainer or a callback that every run has, has an option."""
    owner, *names = path.split(".")
    data = [kind for kind in modules if issubclass(kind, lightning.LightningDataModule)]
    models = [kind for kind in modules if kind not in data]
    found = {"model": models, "data": data}.get(owner) or [OTHERS[owner]]
    for number, name in enumerate(names):
        types = [_options(kind)[name] for kind in found if name in _options(kind)]
        if not types:
            return False
        if number + 1 < len(names):
            found = [kind for annotation in types for kind in _kinds(annotation)]
    return True


def _kinds(annotation):
    """Return the classes that an option of this type may take, with all classes derived from them."""
    origin = typing.get_origin(annotation)
    if origin is collections.abc.Callable:  # the factory of an optimizer or a schedule
        made = typing.get_args(annotation)[1]
        return [torch.optim.AdamW] if made is torch.optim.Optimizer else []
    if origin is not None:
        return [kind for part in typing.get_args(annotation) for kind in _kinds(part)]
    if not inspect.isclass(annotation) or annotation.__module__ == "builtins":
        return []
    return [annotation, *(kind for derived in annotation.__subclasses__() for kind in _kinds(derived))]


@functools.cache
def _options(kind):
    """Return the types of a class's options by their names."""
    hints = typing.get_type_hints(kind.__init__)
    return {name: hints.get(name) for name in inspect.signature(kind.__init__).parameters if name != "self"}
