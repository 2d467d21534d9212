"""Every recipe of configs/ learns a language whose optimum is known (benchmarks/recipes.py makes the whole table)."""

import sys
from pathlib import Path

import preloaded
import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
recipes, worlds = (pytest.importorskip(name) for name in ("recipes", "worlds"))
pytestmark = pytest.mark.usefixtures("without_plans")


def in_short(names, some):
    """Return parameters of which only some are in the short form of a test."""
    return [pytest.param(name, marks=() if name in some else pytest.mark.long) for name in names]


@pytest.mark.parametrize("recipe", in_short(recipes.RECIPES, ("reinforce", "a3c", "ppo", "trpo", "grpo")))
def test_one_token_of_three(recipe, monkeypatch):
    preloaded.fork_workers(monkeypatch.setattr)
    assert recipes.reached(recipes.run(recipe, "bandit", seed=1, iterations=40)) is not None


@pytest.mark.parametrize("recipe", in_short(("grpo", "ppo", "reinforce"), ("grpo",)))
def test_steps_of_a_markov_chain(recipe):
    shares = recipes.run(recipe, "chain", seed=1, iterations=80)
    assert shares[0] < 0.5
    assert recipes.reached(shares) is not None


def test_the_optimum_is_the_best_response():
    for world, language in worlds.WORLDS.items():
        best = [
            max(worlds._scores(world, start, list(language.responses(start))).tolist()) for start in language.starts
        ]
        assert worlds.optimum(world) == pytest.approx(sum(best) / len(best))
