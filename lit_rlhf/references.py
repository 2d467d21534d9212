"""Python functions that a configuration names: ``module:name`` or ``path/to/file.py:name``."""

import importlib
import importlib.util
import sys
from pathlib import Path
from typing import Any

from lit_rlhf.errors import UserError


def is_reference(text: str) -> bool:
    """Return whether a string has the form of a reference, ``module:name`` or ``path/to/file.py:name``.

    >>> is_reference("rewards.py:happy"), is_reference("package.module:happy"), is_reference("data/prompts.jsonl")
    (True, True, False)
    """
    module, colon, name = text.rpartition(":")
    return bool(colon) and name.isidentifier() and (module.endswith(".py") or _is_dotted(module))


def load_reference(text: str, field: str) -> Any:
    """Import and return the function that a reference names: ``module:name`` or ``path/to/file.py:name``.

    Args:
        text: The reference.
        field: The configuration field that contains the reference, for error messages.

    Raises:
        UserError: if the string is not a reference, the module cannot be imported, or the module has no such function.

    >>> load_reference("math:sqrt", "function")(9.0)
    3.0
    """
    if not is_reference(text):
        raise UserError(f"{field}: {text!r} should be module:name or path/to/file.py:name")
    module_name, _, name = text.rpartition(":")
    try:
        module = _load_file(Path(module_name)) if module_name.endswith(".py") else importlib.import_module(module_name)
    except UserError as error:
        raise UserError(f"{field}: {error}") from error
    except (Exception, SystemExit) as error:
        raise UserError(f"{field}: importing {module_name} failed: {type(error).__name__}: {error}") from error
    if not callable(getattr(module, name, None)):
        there = ", ".join(n for n in vars(module) if not n.startswith("_") and callable(getattr(module, n)))
        raise UserError(f"{field}: {module_name} has no function {name!r}; it has: {there or 'nothing callable'}")
    return getattr(module, name)


def _is_dotted(module: str) -> bool:
    return bool(module) and all(part.isidentifier() for part in module.split("."))


def _load_file(path: Path) -> Any:
    if not path.is_file():
        raise UserError(f"there is no file {path}")
    name = f"lit_rlhf_user_{path.resolve().stem}_{abs(hash(path.resolve()))}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise UserError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module
