"""Every public name has an example in its docstring; pytest runs them all as doctests."""

import importlib
import inspect
import pkgutil
import re

import pytest

import lit_rlhf

WITHOUT = {
    "UserError": "an exception; the docstrings of the functions that raise it show its messages",
    "Experience": "made by the module, never by a user",
    "ScoredRollout": "made by the module, never by a user",
}


@pytest.mark.parametrize("name", sorted(set(lit_rlhf.__all__) - set(WITHOUT)))
def test_every_public_name_has_an_example(name):
    documented = getattr(lit_rlhf, name)
    assert re.search(r">>> |::\n\n    \S", inspect.getdoc(documented))


def test_the_exceptions_are_public_names():
    assert set(WITHOUT) <= set(lit_rlhf.__all__)


def public_functions_of_algorithms():
    for info in pkgutil.iter_modules(importlib.import_module("lit_rlhf.algorithms").__path__):
        module = importlib.import_module(f"lit_rlhf.algorithms.{info.name}")
        for name, value in vars(module).items():
            is_own = inspect.isfunction(value) and value.__module__ == module.__name__
            if is_own and not name.startswith("_"):
                yield pytest.param(value, id=name)


@pytest.mark.parametrize("function", public_functions_of_algorithms())
def test_every_formula_has_an_example(function):
    assert ">>>" in inspect.getdoc(function)
