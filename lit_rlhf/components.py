"""The classes that a configuration can name, and their options, read from the classes' signatures and docstrings."""

import collections.abc
import inspect
import sys
from collections.abc import Iterator
from dataclasses import dataclass, is_dataclass
from typing import Any, get_args, get_origin

import docstring_parser

PACKAGES = (
    "lit_rlhf",
    "torch.optim",
    *(f"lightning.pytorch.{part}" for part in ("accelerators", "callbacks", "loggers", "plugins", "profilers")),
    "lightning.pytorch.strategies",
    "lightning.fabric.plugins",
)
"""The packages whose classes are listed; a configuration may name a class of another package by its import path."""

INTERNAL = (
    *("AlignmentModule", "OnPolicy", "OnPolicyCallback", "PreferenceModule", "ResumableData", "LRScheduler"),
    *("Parser", "Rollouts", "SaveConfig"),
)
"""The names of unlisted classes without abstract methods: base classes, and classes that only the command line uses."""

GIVEN = ("params", "optimizer")
"""The first arguments of optimizers and of schedules, which are not options."""


@dataclass(frozen=True)
class Option:
    """An option of a class: an argument of its constructor."""

    name: str
    hint: Any
    default: Any  # inspect.Parameter.empty for an option without a default
    description: str


def components(base: type) -> list[type]:
    """Return the imported subclasses of a base class that a configuration can name, sorted by name.

    The list is empty if the base class is not from lit-rlhf, Lightning or ``torch.optim``, as with ``nn.Module``.

    >>> from lit_rlhf.algorithms.kl import KLController
    >>> [component.__name__ for component in components(KLController)]
    ['AdaptiveKL', 'FixedKL']
    """
    if not base.__module__.startswith(("lit_rlhf.", "lightning.", "torch.optim.")):
        return []
    found = {component for component in _subclasses(base) if _is_component(component)}
    return sorted(found, key=lambda component: (component.__name__, component.__module__))


def _subclasses(base: type) -> Iterator[type]:
    direct: type
    for direct in type.__subclasses__(base):
        yield direct
        yield from _subclasses(direct)


def class_names() -> list[str]:
    """Return the sorted names of all imported classes.

    >>> {"FixedKL", "dict"} <= set(class_names())
    True
    """
    return sorted({component.__name__ for component in _subclasses(object)})


def _is_component(candidate: type) -> bool:
    """Return whether a class is listed: whether it is in one of `PACKAGES`, and not abstract, private or internal."""
    listed = candidate.__module__.startswith(tuple(f"{package}." for package in PACKAGES))
    hidden = candidate.__name__.startswith("_") or candidate.__name__ in INTERNAL
    return listed and not hidden and not inspect.isabstract(candidate)


def options(component: type) -> list[Option]:
    """Return the options of a class, in the order of its signature.

    >>> from lit_rlhf.algorithms.kl import FixedKL
    >>> (option,) = options(FixedKL)
    >>> option.name, option.hint, option.default
    ('coef', <class 'float'>, 0.05)
    """
    described = _descriptions(component)
    return [
        Option(name, hint, default, described.get(name, "")) for name, (hint, default) in _signature(component).items()
    ]


def option_names(component: type) -> list[str]:
    """Return the names of a class's options and, with dots, of the options inside them, such as ``adapter.rank``.

    >>> from lit_rlhf import SFT
    >>> {"actor", "adapter.rank", "optimizer.lr"} <= set(option_names(SFT))
    True
    """
    names = []
    for name, (hint, _) in _signature(component).items():
        inner = [part for owner in classes_in(hint) for part in [owner, *components(owner)]]
        groups = [owner for owner in inner if is_options_group(owner) or _is_component(owner)]
        names += [name, *(f"{name}.{option}" for owner in groups for option in _signature(owner))]
    return list(dict.fromkeys(names))


def takes_any_option(component: type) -> bool:
    """Return whether a class takes more options than its signature names, because it passes them on (``**kwargs``).

    >>> from lightning.pytorch.loggers import CSVLogger, WandbLogger
    >>> takes_any_option(WandbLogger), takes_any_option(CSVLogger)
    (True, False)
    """
    return any(p.kind is p.VAR_KEYWORD for p in inspect.signature(component).parameters.values())


def _signature(component: type) -> dict[str, tuple[Any, Any]]:
    """Return the type and the default of each option of a class."""
    init: Any = component.__init__  # type: ignore[misc]
    scope = vars(inspect.getmodule(component)) | getattr(inspect.unwrap(init), "__globals__", {})
    return {
        name: (_evaluated(parameter.annotation, scope), parameter.default)
        for name, parameter in inspect.signature(component).parameters.items()
        if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        and not (name in GIVEN and any(base.__module__.startswith("torch.optim") for base in component.__mro__))
    }


def summary(component: type) -> str:
    """Return the summary at the beginning of a class's docstring, as one line."""
    parsed = docstring_parser.parse(inspect.getdoc(component) or "")
    return " ".join((parsed.short_description or "").split())


def _descriptions(component: type) -> dict[str, str]:
    """Return the descriptions of a class's arguments, each as one line, from the class or else a base class."""
    found: dict[str, str] = {}
    for owner in reversed(component.__mro__[:-1]):
        for text in (owner.__doc__, owner.__init__.__doc__ if "__init__" in vars(owner) else None):  # type: ignore[misc]
            for parameter in docstring_parser.parse(inspect.cleandoc(text or "")).params:
                found[parameter.arg_name.lstrip("*")] = " ".join((parameter.description or "").split())
    return found


def _evaluated(annotation: Any, scope: dict[str, Any]) -> Any:
    """Return the type of an annotation, which may be a string; Any if it is missing or uses an undefined name."""
    if annotation is inspect.Parameter.empty:
        return Any
    if not isinstance(annotation, str):
        return annotation
    try:
        return eval(annotation, scope)
    except NameError:
        return Any


def is_options_group(hint: Any) -> bool:
    """Return whether a type is a dataclass of options, such as ``Sampling``, and not a choice between classes.

    >>> from lit_rlhf import GAE, Sampling
    >>> is_options_group(Sampling), is_options_group(GAE)
    (True, False)
    """
    return isinstance(hint, type) and is_dataclass(hint) and hint.__base__ is object


def import_paths(component: type) -> list[str]:
    """Return the paths from which a class can be imported, from its own module up, such as ``lit_rlhf.GAE``.

    >>> from lit_rlhf import GAE
    >>> import_paths(GAE)
    ['lit_rlhf.algorithms.advantages.GAE', 'lit_rlhf.GAE']
    """
    name, module, found = component.__name__, component.__module__, []
    while module:
        if getattr(sys.modules.get(module), name, None) is component:
            found.append(f"{module}.{name}")
        module = module.rpartition(".")[0]
    return found


def classes_in(hint: Any) -> Iterator[type]:
    """Yield the classes that a type contains, including those in unions and lists and those that callables return."""
    arguments = get_args(hint)
    if get_origin(hint) is collections.abc.Callable:
        arguments = arguments[-1:]
    if isinstance(hint, type) and not arguments:
        yield hint
    for argument in arguments:
        yield from classes_in(argument)
