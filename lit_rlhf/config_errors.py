"""jsonargparse's messages in one line, with the nearest right word."""

import difflib
import importlib
import inspect
import re
from dataclasses import is_dataclass
from typing import Any


def explain(message: str) -> str:
    """One line that names the option, what was found, and what would be right.

    Args:
        message: What jsonargparse says, often many lines.
    """
    text = str(message)
    owner = _last_class(text)
    if found := re.search(r"Option '([^']+)' is not accepted", text):
        return _unknown_option(found[1], owner)
    if found := re.search(r"[Uu]nrecognized arguments: (?:--)?([\w.\-]+)", text):
        return _unknown_option(found[1], owner)
    if found := re.search(r"Key '([^']+)' is not expected", text):
        return _unknown_option(found[1], owner)
    if found := re.search(r"Expected a dot import path string: (\S+)", text):
        return _unknown_class(found[1], _last_key(text))
    if found := re.search(r"invalid choice: '?([^' ]+)'? \(choose from ([^)]+)\)", text):
        choices = [choice.strip(" '\"") for choice in found[2].split(",")]
        return f"there is no command {found[1]!r}{_nearest(found[1], choices)}; there are: {', '.join(choices)}"
    lines = [line.strip(" -") for line in text.splitlines() if line.strip()]
    telling = [line for line in lines if "Expected" in line or "Problem" in line or "not" in line]
    key = _last_key(text)
    best = telling[-1] if len(lines) > 1 and telling else " ".join(lines)
    specific = [line for line in telling if line != "Expected a <class 'NoneType'>"]
    best = specific[-1] if specific else best
    return f"{key}: {best}" if key and key not in best else best


def _unknown_option(option: str, owner: type | None) -> str:
    known = _options(owner) if owner is not None else []
    name = option.rpartition(".")[2] if option not in known else option
    where = f" of {owner.__name__}" if owner is not None else ""
    listed = f"; there are: {', '.join(known)}" if known else ""
    return f"there is no option {option!r}{where}{_nearest(name, known)}{listed}"


def _unknown_class(name: str, key: str) -> str:
    known = _class_names(key)
    listed = f"; there are: {', '.join(known)}, or a class by its import path" if known else ""
    where = f"{key}: " if key else ""
    return f"{where}there is no class {name!r}{_nearest(name, known)}{listed}"


def _nearest(word: str, known: list[str]) -> str:
    by_last = {k.rpartition(".")[2]: k for k in known}
    close = difflib.get_close_matches(word, [*known, *by_last], n=1, cutoff=0.5)
    return f", did you mean {by_last.get(close[0], close[0])!r}?" if close else ""


def _last_key(text: str) -> str:
    keys = re.findall(r'Parser key "([^"]+)"', text)
    return keys[-1] if keys else ""


def _last_class(text: str) -> type | None:
    paths = re.findall(r"Problem with given class_path '([^']+)'", text)
    if not paths:
        return None
    module, _, name = paths[-1].rpartition(".")
    return getattr(importlib.import_module(module), name, None)


def _options(owner: type) -> list[str]:
    """Names of the class's options, those inside dataclass options with a dot."""
    names = []
    for parameter in inspect.signature(owner).parameters.values():
        names.append(parameter.name)
        if is_dataclass(parameter.default) and not inspect.isabstract(type(parameter.default)):
            names += [f"{parameter.name}.{inner}" for inner in inspect.signature(type(parameter.default)).parameters]
    return [name for name in names if not name.startswith("self")]


def _class_names(key: str) -> list[str]:
    """Classes of ours that the option takes."""
    import lightning

    from lit_rlhf.algorithms.advantages import Estimator
    from lit_rlhf.algorithms.kl import KLController
    from lit_rlhf.algorithms.objectives import Objective
    from lit_rlhf.generation import Engine
    from lit_rlhf.rewards import Reward

    bases: dict[str, Any] = {
        "model": lightning.LightningModule,
        "data": lightning.LightningDataModule,
        "advantages": Estimator,
        "objective": Objective,
        "kl": KLController,
        "engine": Engine,
        "rewards": Reward,
    }
    base = bases.get(key.rpartition(".")[2])
    if base is None:
        return []
    return sorted(c.__name__ for c in _subclasses(base) if c.__module__.startswith("lit_rlhf"))


def _subclasses(base: type) -> list[type]:
    direct: list[type] = base.__subclasses__()
    return [*direct, *(deeper for c in direct for deeper in _subclasses(c))]
