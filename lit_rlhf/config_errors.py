"""jsonargparse's messages in one line, with the nearest right word.

It nests them: ``Parser key "model"`` around ``Problem with given class_path '…PolicyGradient'`` around ``Parser key
"advantages"`` around what is wrong, with remarks on every type of a union. The keys tell the field, the last class
whose option it is, the innermost line what is wrong.
"""

import difflib
import importlib
import inspect
import re
from collections.abc import Sequence
from dataclasses import is_dataclass

REMARKS = re.compile(
    r"^(Does not validate against|Subtypes:|Errors:|Given value|Expected a <class 'NoneType'>|Expected a path but"
    r"|Subclass types expect|a class path|a dict with|Parser key|Problem with given class_path|\(class path)"
)


def explain(message: str, known: Sequence[str] = ()) -> str:
    """One line that names the option, what was found, and what would be right.

    Args:
        message: What jsonargparse says, often many lines.
        known: The command's own options, ``trainer.max_epochs`` and the like.

    >>> explain("unrecognized arguments: --trainer.max_epoch=1", ["trainer.max_epochs", "config"])
    "there is no option 'trainer.max_epoch', did you mean 'trainer.max_epochs'?; trainer has: trainer.max_epochs"
    """
    text = message.replace(" in a subcommand", "")
    field, owner = ".".join(re.findall(r'Parser key "([^"]+)"', text)), _owner(text)
    option = (
        re.search(r"Group '(?P<group>[^']+)' does not accept option '(?P<name>[^']+)'", text)
        or re.search(r"(?:Option|option) '(?P<group>)(?P<name>[^']+)'", text)
        or re.search(r"[Uu]nrecognized arguments: (?:--)?(?P<group>)(?P<name>[^\s=]+)", text)
        or re.search(r"Key '(?P<group>)(?P<name>[^']+)' is not expected", text)
    )
    if owner is not None and owner.__module__.startswith("lightning."):
        return _class_expected(field, " is not set")
    if option:
        name = ".".join(filter(None, option.group("group", "name")))
        return _unknown_option(name, field, _options(owner) if owner else known, owner)
    found = re.search(r"Expected a dot import path string: (\S+)", text)
    if found and not re.search(r"Expected an? <class '(int|float)'>", text):
        return _class_expected(field, f": there is no class {found[1]!r}", found[1])
    if found := re.search(r"Expected an instantiatable class, but (\S+) is abstract", text):
        return _class_expected(field, f": {found[1].rpartition('.')[2]} is abstract, or no class_path is named")
    if found := re.search(r"arguments are required: (?:\w+\.)?(\w+)", text):
        return _class_expected(found[1], " is not set")
    if found := re.search(r"invalid choice: '?([^' ]+)'? \(choose from ([^)]+)\)", text):
        choices = [choice.strip(" '\"") for choice in found[2].split(",")]
        return f"there is no command {found[1]!r}{_nearest(found[1], choices)}; there are: {', '.join(choices)}"
    return _told(field, text)


def _told(field: str, text: str) -> str:
    """The innermost lines that say something, without what stands around them."""
    lines = [re.sub(r'^Parser key "[^"]+":\s*', "", line.strip(" -\n")) for line in text.splitlines()]
    telling = [line for line in lines if line and not REMARKS.match(line)]
    if found := re.search(r"Expected a typing\.Literal\[(.+?)\]\. Got value: (.*)", text):
        choices = found[1].replace("'", "")
        said = f"should be one of {choices}, not {found[2]!r}"
    elif found := re.search(r"Expected an? <class '([^']+)'>\. Got value: (.*)", text):
        said = f"should be {_type(found[1])}, not {found[2]!r}"
    else:
        said = "; ".join(dict.fromkeys(telling)) or " ".join(text.split())
        value = re.findall(r"Given value: (.+?)(?:\. Got value.*)?$", text, re.MULTILINE)
        wanted = [w for w in re.findall(r"Expected an? <class '([^']+)'>", text) if w != "NoneType"]
        if said.startswith(("Expected", "Type typing.Callable")) and value and wanted:
            said = f"should be {' or '.join(dict.fromkeys(map(_type, wanted)))}, not {value[0]!r}"
    shown = said if len(said) < 400 else f"{said[:400]} …"
    return f"{field}: {shown}" if field and not shown.startswith(field) else shown


def _type(name: str) -> str:
    """A type as one says it."""
    said = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "text", "list": "a list"}
    return said.get(name, name.rpartition(".")[2])


def _unknown_option(option: str, field: str, known: Sequence[str], owner: type | None) -> str:
    whole = ".".join(filter(None, [field, option]))
    group = option.rpartition(".")[0]
    siblings = [name for name in known if name.rpartition(".")[0] == (group if f"{group}." in " ".join(known) else "")]
    who = owner.__name__ if owner else group if f"{group}." in " ".join(known) else ""
    listed = f"; {f'{who} has' if who else 'there are'}: {', '.join(siblings)}" if 0 < len(siblings) < 30 else ""
    return f"there is no option {whole!r}{_nearest(option, known, field)}{listed}"


def _class_expected(field: str, found: str, name: str = "") -> str:
    known = _class_names(field)
    listed = f" {', '.join(known)}, or a class by its import path" if known else " a class by its import path"
    return f"{field}{found}, it should be{listed}{_nearest(name, known)}"


def _nearest(word: str, known: Sequence[str], field: str = "") -> str:
    """Compare whole names, and the last parts of dotted ones; the field is put in front of what is found."""
    head, dot, rest = word.partition(".")
    heads = list(dict.fromkeys(name.partition(".")[0] for name in known))
    if dot and head not in heads and (close := difflib.get_close_matches(head, heads, n=1)):
        return f", did you mean '{close[0]}.{rest}'?"
    last = {name.rpartition(".")[2]: name for name in reversed(known)}
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    close = close or difflib.get_close_matches(word.rpartition(".")[2], list(last), n=1, cutoff=0.5)
    if not close:
        return ""
    nearest = ".".join(filter(None, [field, last.get(close[0], close[0])]))
    return f", did you mean {nearest!r}?"


def _owner(text: str) -> type | None:
    """The innermost class that is named."""
    paths = re.findall(r"Problem with given class_path '([^']+)'", text)
    paths += re.findall(r"Got value: Namespace\(class_path='([^']+)'", text)
    if not paths:
        return None
    module, _, name = paths[-1].rpartition(".")
    return getattr(importlib.import_module(module), name, None)


def _options(owner: type) -> list[str]:
    """Names of the class's options, and with a dot those inside dataclass options."""
    names = []
    for parameter in inspect.signature(owner).parameters.values():
        if parameter.name in ("params", "optimizer"):  # of an optimizer, a schedule: not the user's to set
            continue
        names.append(parameter.name)
        default = type(parameter.default)
        if is_dataclass(default) and default.__base__ is object:
            names += [f"{parameter.name}.{inner}" for inner in inspect.signature(default).parameters]
    return names


def _class_names(field: str) -> list[str]:
    """The classes that an option takes, ours and torch's."""
    import lightning
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler

    from lit_rlhf.algorithms.advantages import AdvantageEstimator
    from lit_rlhf.algorithms.kl import KLController
    from lit_rlhf.algorithms.objectives import Objective
    from lit_rlhf.generation import Engine
    from lit_rlhf.rewards import Reward

    bases: dict[str, type] = {
        "model": lightning.LightningModule,
        "data": lightning.LightningDataModule,
        "advantages": AdvantageEstimator,
        "objective": Objective,
        "kl": KLController,
        "engine": Engine,
        "rewards": Reward,
        "optimizer": Optimizer,
        "scheduler": LRScheduler,
    }
    last = field.rpartition(".")[2]
    base = bases.get(last) or bases.get(last.rpartition("_")[2])
    found = _subclasses(base) if base is not None else []
    return sorted({c.__name__ for c in found if c.__module__.startswith(("lit_rlhf", "torch.optim")) and _usable(c)})


def _usable(candidate: type) -> bool:
    """Neither abstract, nor private, nor our modules' common grounds."""
    hidden = candidate.__name__.startswith("_") or candidate.__name__ in (
        "AlignmentModule",
        "OnPolicy",
        "PreferenceModule",
        "ResumableData",
        "LRScheduler",
    )
    return not (inspect.isabstract(candidate) or hidden)


def _subclasses(base: type) -> list[type]:
    direct: list[type] = base.__subclasses__()
    return [*direct, *(deeper for c in direct for deeper in _subclasses(c))]
