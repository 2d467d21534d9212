"""Tools for tests with pytest: tiny models and data, a recorder of a run, and assertions about your own parts.

The module is a pytest plugin, so its fixtures are available wherever lit-rlhf is installed: ``tiny_model``,
``tiny_tokenizer``, ``tiny_prompts``, ``tiny_preferences`` and ``tiny_demonstrations``. Every pytest session imports the
module, whatever it tests; torch and Lightning are therefore imported only at their first use. ::

    from lit_rlhf.testing import assert_exact_resume, assert_learns, tiny_ppo

    def test_my_reward():
        assert_learns(tiny_ppo([MyReward()]), by=0.3)
        assert_exact_resume(lambda: tiny_ppo([MyReward()]))
"""

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from lit_rlhf.testing.models import WORDS as WORDS
from lit_rlhf.testing.models import Architecture
from lit_rlhf.testing.models import make_tiny_model as make_tiny_model

if TYPE_CHECKING:
    from lit_rlhf.testing.gradients import assert_gradient_matches as assert_gradient_matches
    from lit_rlhf.testing.learning import assert_learns as assert_learns
    from lit_rlhf.testing.ranks import assert_same_on_ranks as assert_same_on_ranks
    from lit_rlhf.testing.recorder import Recorder as Recorder
    from lit_rlhf.testing.resuming import assert_exact_resume as assert_exact_resume
    from lit_rlhf.testing.runs import tiny_data as tiny_data
    from lit_rlhf.testing.runs import tiny_ppo as tiny_ppo

_LAZY = {
    "Recorder": "recorder",
    "assert_exact_resume": "resuming",
    "assert_gradient_matches": "gradients",
    "assert_learns": "learning",
    "assert_same_on_ranks": "ranks",
    "tiny_data": "runs",
    "tiny_ppo": "runs",
}
"""The names that are imported at their first use, and the submodules that define them."""

MakeModel = Callable[..., Path]


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> MakeModel:
    """Return a function that writes a tiny model and returns the model's folder.

    The function takes the arguments of `make_tiny_model` except ``folder``, for example
    ``tiny_model("llama", task="score", special="pad_is_eos")``. In a test session, calls with the same arguments return
    the same folder.
    """
    made: dict[Any, Path] = {}

    def make(architecture: Architecture = "llama", **options: Any) -> Path:
        key = (architecture, *sorted(options.items()))
        if key not in made:
            made[key] = make_tiny_model(tmp_path_factory.mktemp(architecture), architecture, **options)
        return made[key]

    return make


@pytest.fixture(scope="session")
def tiny_tokenizer(tiny_model: MakeModel) -> Any:
    """Return the tokenizer of the tiny models, with the words w0 … w31."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_model())


@pytest.fixture(scope="session")
def tiny_prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the path of a JSONL file with 48 prompts of one to six words, for `Prompts`."""
    return _write(tmp_path_factory, "prompts")


@pytest.fixture(scope="session")
def tiny_preferences(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the path of a JSONL file with 32 pairs of responses, for `Preferences`.

    The better response of a pair has more of the words w0 … w7.
    """
    return _write(tmp_path_factory, "preferences")


@pytest.fixture(scope="session")
def tiny_demonstrations(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the path of a JSONL file with 32 texts, for `Demonstrations`."""
    return _write(tmp_path_factory, "demonstrations")


def _write(tmp_path_factory: pytest.TempPathFactory, kind: str) -> Path:
    records = getattr(importlib.import_module("lit_rlhf.testing.data"), kind)()
    path = tmp_path_factory.mktemp("tiny") / f"{kind}.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'lit_rlhf.testing' has no attribute {name!r}")
    return getattr(importlib.import_module(f"lit_rlhf.testing.{_LAZY[name]}"), name)
