"""One-line explanations of jsonargparse's messages, with the closest valid name if there is one.

The messages are nested: ``Parser key "model"`` contains ``Problem with given class_path '…PolicyGradient'``, which
contains ``Parser key "advantages"`` and finally the mistake, with remarks on every type of a union. The keys give the
field, the last class is the one whose option is wrong, and the innermost line states the mistake.
"""

import difflib
import importlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from lit_rlhf import compat, recipes
from lit_rlhf.components import components, is_options_group, option_names, options
from lit_rlhf.foreign_options import own_name

NOT_IN_MODULE = re.compile(r"module '([^']+)' has no attribute '([^']+)'")
"""The pattern of a class that does not exist in a module that does."""

NO_MODULE = re.compile(r"No module named '([^']+)'")
"""The pattern of a module that does not exist."""

MISSING_PACKAGE = re.compile(r"Requirement '([^']+)' not met")
"""The pattern of a package that a logger of Lightning needs, and that is not installed."""

HELP_OPTION = re.compile(r"--([\w.]+)\.help: ")
"""The pattern of an option, at the beginning of the message about a class whose help is asked for."""

NO_VALUE = re.compile(r"^argument --([\w.]+): expected one argument")
"""The pattern of an option without its value; the name is only that of the group for the options of a chosen class."""

STRAY_WORD = re.compile(r"[Uu]nrecognized arguments: (?!-)(\S+)")
"""The pattern of a word that is neither an option nor an option's value."""

BESIDE_INIT_ARGS = re.compile(
    r"Not a valid subclass of [^{]*\{'class_path': '[^']+', (?:'init_args': .*\}, )?'(?!init_args')(\w+)'"
)
"""The pattern of an option that a file gives beside ``init_args`` instead of inside."""


def explain(message: str, known: Sequence[str] = (), words: Sequence[str] = ()) -> str:
    """Return one line that names the option that is wrong, the value or name found, and what would be right.

    Args:
        message: jsonargparse's message, often many lines.
        known: The options of the command and of the classes that were chosen, such as ``trainer.max_epochs``.
        words: The words of the command line.

    >>> explain("unrecognized arguments: --trainer.max_epoch=1", ["trainer.max_epochs", "config"])
    "there is no option 'trainer.max_epoch', did you mean 'trainer.max_epochs'?; trainer has: trainer.max_epochs"
    """
    known = [name for name in known if not name.endswith(".help")]
    if matched := NO_VALUE.search(message):
        return f"{_without_value(matched[1], words)} needs a value"
    if matched := STRAY_WORD.search(message):
        return _stray_word(matched[1], known)
    field = ".".join(compat.PARSER_KEY.findall(message) or HELP_OPTION.findall(message))
    if matched := NOT_IN_MODULE.search(message):
        return unknown_class(field, f"{matched[1]}.{matched[2]}", _class_names(field))
    if matched := NO_MODULE.search(message):
        return _class_expected(field, f": there is no module {matched[1]!r}")
    owner = _owner(message)
    option = next(filter(None, (pattern.search(message) for pattern in compat.UNKNOWN_OPTION)), None)
    if owner and (matched := MISSING_PACKAGE.search(message)):
        package = matched[1]
        return f"trainer.logger: {owner.__name__} needs a package that is not installed: pip install '{package}'"
    if owner and field and (matched := compat.MISSING_OPTION.search(message)):
        return f"{field}.{matched[1]} is not set; {owner.__name__} needs it"
    if owner is not None and owner.__module__.startswith("lightning."):
        return _class_expected(field, " is not set")
    if option:
        name = ".".join(filter(None, option.group("group", "name")))
        return unknown_option(
            name, field, option_names(owner) if owner else known, owner.__name__ if owner else "", known
        )
    matched = compat.UNKNOWN_CLASS.search(message)
    if matched and not {"int", "float"} & set(compat.UNION_MEMBER.findall(message)):
        if paths := compat.OPTIONS_OR_NULL.findall(message):
            options = ", ".join(option_names(_class(paths[-1])))
            return f"{field}: should be null or have options ({options}), not {matched[1]!r}"
        return unknown_class(field, matched[1], _class_names(field))
    if matched := compat.ABSTRACT_CLASS.search(message):
        return _class_expected(field, f": {matched[1].rpartition('.')[2]} is abstract, or class_path is missing")
    if matched := compat.MISSING_OPTION.search(message):
        return _class_expected(matched[1].rpartition(".")[2], " is not set")
    if matched := compat.UNKNOWN_COMMAND.search(message):
        return unknown_command(matched[1], [choice.strip(" '\"") for choice in matched[2].split(",")])
    if beside := BESIDE_INIT_ARGS.search(message):
        return f"{field}.{beside[1]} should be inside {field}.init_args"
    return _wrong_value(field, message)


def _without_value(group: str, words: Sequence[str]) -> str:
    """Return the name of the first option of a group that the words of a command line give without a value."""
    pairs = zip(words, [*words, "--"][1:], strict=True)
    names = [word[2:] for word, after in pairs if after.startswith("--") and "=" not in word]
    return next((name for name in names if name.startswith(f"{group}.")), group)


def _stray_word(word: str, known: Sequence[str]) -> str:
    """Return a message about a word that is neither an option nor a value, with the option that was probably meant.

    >>> _stray_word("ppo", [])
    "'ppo' is not an option, did you mean '--config ppo'?"
    >>> _stray_word("model.actor=x", [])
    "'model.actor=x' is not an option, did you mean '--model.actor=x'?"
    """
    if word in recipes.names() or word.endswith((".yaml", ".yml")):
        meant = f", did you mean '--config {word}'?"
    else:
        meant = f", did you mean '--{word}'?" if "=" in word or word in known else ""
    return f"{word!r} is not an option{meant}"


def _wrong_value(field: str, text: str) -> str:
    """Return a line with the type or the choices expected and the value found, or else the message without remarks."""
    lines = [re.sub(rf"^{compat.PARSER_KEY.pattern}:\s*", "", line.strip(" -\n")) for line in text.splitlines()]
    informative = [line for line in lines if line and not compat.REMARK.match(line)]
    if matched := compat.CHOICE_EXPECTED.search(text):
        choices = matched[1].replace("'", "")
        mistake = f"should be one of {choices}, not {matched[2]!r}"
    elif matched := compat.TYPE_EXPECTED.search(text):
        mistake = f"should be {_type(matched[1])}, not {matched[2]!r}"
    else:
        mistake = "; ".join(dict.fromkeys(informative)) or " ".join(text.split())
        value = compat.GIVEN_VALUE.findall(text)
        expected = [name for name in compat.UNION_MEMBER.findall(text) if name != "NoneType"]
        if mistake.startswith(compat.WRONG_TYPE) and value and expected:
            mistake = f"should be {' or '.join(dict.fromkeys(map(_type, expected)))}, not {value[0]!r}"
    shown = mistake if len(mistake) < 400 else f"{mistake[:400]} …"
    return f"{field}: {shown}" if field and not shown.startswith(field) else shown


def _type(name: str) -> str:
    """Return a type's name in plain words."""
    words = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "text", "list": "a list"}
    return words.get(name, name.rpartition(".")[2])


def unknown_option(option: str, field: str, known: Sequence[str], owner: str, others: Sequence[str]) -> str:
    """Return a message about an option that does not exist, with the closest that do.

    Args:
        option: The name of the option inside ``field``.
        field: The option that the class is given for; empty if the option belongs to no class.
        known: The options of the class, or else all options.
        owner: The name of the class, or an empty string.
        others: All options of the command.

    >>> unknown_option("lamm", "model.advantages", ["gamma", "lam"], "GAE", [])
    "there is no option 'model.advantages.lamm', did you mean 'model.advantages.lam'?; GAE has: gamma, lam"
    """
    if option.partition(".")[0] not in known:
        option = option.partition(".init_args.")[0]  # the first name in a file that does not exist
    whole = ".".join(filter(None, [field, option]))
    similar = "reward" if option == "actor" and "reward" in known else option  # the model that is trained
    own = own_name(whole, {*others, *(".".join(filter(None, [field, name])) for name in known)})
    meant = f", did you mean {own!r}?" if own else _nearest(similar, known, field)
    group = option.rpartition(".")[0]
    siblings = [name for name in known if name.rpartition(".")[0] == (group if f"{group}." in " ".join(known) else "")]
    who = owner or (group if f"{group}." in " ".join(known) else "")
    listed = f"; {f'{who} has' if who else 'there are'}: {', '.join(siblings)}" if 0 < len(siblings) < 30 else ""
    return f"there is no option {whole!r}{meant}{listed}"


def unknown_command(name: str, known: Sequence[str]) -> str:
    """Return a message about a command that does not exist, with the commands that do and the closest of them.

    >>> unknown_command("fti", ["fit", "test"])
    "there is no command 'fti', did you mean 'fit'?; there are: fit, test"
    """
    return f"there is no command {name!r}{_nearest(name, known)}; there are: {', '.join(known)}"


def unknown_class(field: str, name: str, known: Sequence[str]) -> str:
    """Return a message about a class that does not exist, with the classes that do and the closest of them.

    >>> unknown_class("model.kl", "FixdKL", ["FixedKL"])
    "model.kl: there is no class 'FixdKL'; it should be FixedKL, or a class by its import path, did you mean 'FixedKL'?"
    """
    return _class_expected(field, f": there is no class {name!r}", name, known)


def _class_expected(field: str, mistake: str, name: str = "", known: Sequence[str] = ()) -> str:
    known = known or _class_names(field)
    listed = f" {', '.join(known)}, or a class by its import path" if known else " a class by its import path"
    return f"{field}{mistake}; it should be{listed}{_nearest(name, known)}"


def _nearest(word: str, known: Sequence[str], field: str = "") -> str:
    """Return a suggestion with the known names that are closest to a word, or an empty string if no name is close.

    In a dotted word, a first part that is unknown is replaced by a known first part that is close. Otherwise the word
    is replaced by the names with the same last part, by a name that is close, or by a name whose last part is close.
    ``field`` is put before the names that are suggested.

    >>> _nearest("max_epoch", ["trainer.max_epochs"])
    ", did you mean 'trainer.max_epochs'?"
    >>> _nearest("updat.epochs", ["update", "update.epochs"], field="model")
    ", did you mean 'model.update.epochs'?"
    >>> _nearest("update.max_tokens", ["adapter", "adapter.rank", "max_tokens"], field="model")
    ", did you mean 'model.max_tokens'?"
    >>> _nearest("max_tokens", ["sampling.max_tokens", "update.max_tokens"], field="model")
    ", did you mean 'model.update.max_tokens' or 'model.sampling.max_tokens'?"
    """
    group = _in_close_group(word, known)
    nearest = [".".join(filter(None, [field, name])) for name in ([group] if group else _with_close_name(word, known))]
    return f", did you mean {' or '.join(map(repr, nearest))}?" if nearest else ""


def _in_close_group(word: str, known: Sequence[str]) -> str:
    """Return a dotted word with its unknown first part replaced by a close known one, or else an empty string."""
    head, dot, rest = word.partition(".")
    heads = list(dict.fromkeys(name.partition(".")[0] for name in known))
    close = difflib.get_close_matches(head, heads, n=1, cutoff=0.75)
    if not dot or head in heads or not close:
        return ""
    whole, inside = f"{close[0]}.{rest}", [name for name in known if name.startswith(f"{close[0]}.")]
    return whole if whole in known else next(iter(difflib.get_close_matches(whole, inside, n=1)), whole)


def _with_close_name(word: str, known: Sequence[str]) -> list[str]:
    """Return the known names with the same last part as a word, the closest first, at most three.

    If there are none, the result is a name that is close to the word, or else a name whose last part is close, if any.
    """
    ending = word.rpartition(".")[2]
    shortest_first = sorted(known, key=lambda name: name.count("."))
    last = {name.rpartition(".")[2]: name for name in reversed(shortest_first)}
    if ending in last:
        depth = last[ending].count(".")
        same = [name for name in known if name.rpartition(".")[2] == ending and name.count(".") == depth]
        return difflib.get_close_matches(word, same, n=3, cutoff=0.0)
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    close = close or difflib.get_close_matches(ending, list(last), n=1, cutoff=0.6)
    return [last.get(name, name) for name in close]


def _owner(text: str) -> type | None:
    """Return the innermost class whose options a message refuses, or None if there is no such class."""
    paths = compat.REFUSED_CLASS.findall(text) + compat.REFUSED_CALLABLE.findall(text)
    return _class(paths[-1]) if paths else None


def _class(path: str) -> Any:
    """Return the class at an import path, or None if its module has no such class."""
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name, None)


def missing_options(field: str, class_path: str, given: Mapping[str, Any]) -> str:
    """Return a message about a group of options that is null, or an empty string; jsonargparse accepts null for it.

    Args:
        field: The option that the class is given for.
        class_path: The import path of the class.
        given: The values of the options of the class.

    >>> missing_options("model", "lit_rlhf.PolicyGradient", {"sampling": None}).partition(" min_tokens")[0]
    'model.sampling should be a mapping of options (max_tokens,'
    """
    for option in options(_class(class_path)):
        if is_options_group(option.hint) and given.get(option.name, {}) is None:
            names = ", ".join(option_names(option.hint))
            return f"{field}.{option.name} should be a mapping of options ({names}), not null"
    return ""


def _class_names(field: str) -> list[str]:
    """Return the sorted names of the classes of lit_rlhf, ``torch.optim`` and Lightning that an option accepts."""
    import lightning
    from lightning.pytorch.loggers import Logger
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
        "logger": Logger,
        "callbacks": lightning.Callback,
    }
    last = field.rpartition(".")[2]
    base = bases.get(last) or bases.get(last.rpartition("_")[2])
    return sorted({c.__name__ for c in components(base)}) if base is not None else []


def chosen_options(base: type, group: str, name: str) -> list[str]:
    """Return the names of the options of the class chosen for a group, each prefixed with the group's name.

    Args:
        base: The base of the classes that can be chosen.
        group: The group, such as ``model``.
        name: The name or the import path of the class. If `components` does not list this class, the result is empty.

    >>> import lightning
    >>> from lit_rlhf import SFT
    >>> "model.optimizer.lr" in chosen_options(lightning.LightningModule, "model", "SFT")
    True
    """
    chosen = [c for c in components(base) if c.__name__ == name.rpartition(".")[2]]
    return [f"{group}.{option}" for component in chosen for option in option_names(component)]
