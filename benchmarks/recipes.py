"""Every recipe on two toy languages with a known optimum: the iterations and responses until 95 % of the optimum.

    python benchmarks/recipes.py            # prints the table
    python benchmarks/recipes.py --write    # also puts it into docs/algorithms.md

The recipes are those of configs/; this script sets only the model, the task, the learning rates or the size of the
trust region, and the KL coefficient (to 0, so that the optimum is the optimum of the task).
"""

import argparse
import contextlib
import io
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from lit_rlhf.cli import main  # noqa: E402

RECIPES = ("reinforce", "reinforce_pp", "a2c", "a3c", "ppo_penalty", "ppo", "trpo", "grpo", "dr_grpo", "rloo")
STEPS = {"bandit": 1, "chain": 4}
RATE, MAX_KL = 1e-2, 0.02
GOAL, HELD = 0.95, 5


def options(recipe: str, world: str, seed: int, iterations: int, folder: str, goal: float = GOAL) -> list[str]:
    """Return the arguments of the command line."""
    values = {
        "config": HERE.parent / "configs" / f"{recipe}.yaml",
        "seed_everything": seed,
        "model.actor": json.dumps(
            {
                "config": {
                    "model_type": "llama",
                    "hidden_size": 16,
                    "intermediate_size": 32,
                    "num_hidden_layers": 1,
                    "num_attention_heads": 2,
                    "max_position_embeddings": 16,
                },
                "tokenizer": f"{HERE}/worlds.py:{world}_tokenizer",
                "seed": seed,
            }
        ),
        "model.rewards": json.dumps(
            [{"class_path": "RewardFunction", "init_args": {"function": f"{HERE}/worlds.py:{world}_score"}}]
        ),
        "model.sampling.max_tokens": STEPS[world],
        "model.kl.coef": 0.0,
        "model.iterations": iterations,
        "data.train": f"{HERE}/worlds.py:{world}_prompts",
        "checkpoint.every_n": 1_000_000,
        "trainer.default_root_dir": folder,
        "trainer.accelerator": "cpu",
        "trainer.enable_progress_bar": "false",
        "trainer.callbacks+": json.dumps(
            {"class_path": "worlds.Watch", "init_args": {"world": world, "goal": goal, "held": HELD}}
        ),
    }
    if recipe == "trpo":
        values["model.region.max_kl"] = MAX_KL
    else:
        values["model.actor_optimizer.lr"] = RATE
    if recipe in ("a2c", "a3c", "ppo", "ppo_penalty", "trpo"):
        values["model.critic_optimizer.lr"] = RATE
    return ["fit", *(f"--{name}={value}" for name, value in values.items())]


def run(recipe: str, world: str, seed: int, iterations: int) -> list[float]:
    """Train, and return the expected score after each iteration as a fraction of the optimum."""
    with tempfile.TemporaryDirectory() as folder:
        with contextlib.redirect_stdout(io.StringIO()):
            main(options(recipe, world, seed, iterations, folder))
        return json.loads(Path(folder, "shares.json").read_text())


def responses_per_iteration(recipe: str) -> int:
    """Return the number of responses per iteration in the recipe: prompts × responses per prompt."""
    import yaml

    config = yaml.safe_load((HERE.parent / "configs" / f"{recipe}.yaml").read_text())
    return config["data"]["init_args"]["batch_size"] * config["model"]["init_args"]["sampling"].get("responses", 1)


def reached(shares: list[float]) -> int | None:
    """Return the first of the last ``HELD`` iterations if the score is near the optimum in all of them, else None."""
    return len(shares) - HELD + 1 if len(shares) >= HELD and min(shares[-HELD:]) >= GOAL else None


def table(seeds: int, iterations: int) -> str:
    """Run every recipe on both languages, and return the table in Markdown."""
    lines = [
        "| recipe | task | seeds that reach 95 % | iterations, median (most) | responses, median |",
        "|---|---|---|---|---|",
    ]
    print("\n".join(lines))
    for recipe in RECIPES:
        for world in STEPS:
            firsts = [reached(run(recipe, world, seed, iterations)) for seed in range(1, seeds + 1)]
            counts = [first for first in firsts if first is not None] or [float("nan")]
            median = statistics.median(counts)
            lines.append(
                f"| `{recipe}.yaml` | {world} | {seeds - firsts.count(None)} of {seeds} | {median:g} ({max(counts):g}) "
                f"| {median * responses_per_iteration(recipe):g} |"
            )
            print(lines[-1], flush=True)
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--iterations", type=int, default=200)
    parser.add_argument("--write", action="store_true", help="put the table into docs/algorithms.md")
    arguments = parser.parse_args()
    made = table(arguments.seeds, arguments.iterations)
    if arguments.write:
        page = HERE.parent / "docs" / "algorithms.md"
        before, _, rest = page.read_text(encoding="utf-8").partition("<!-- table -->\n")
        after = rest.partition("<!-- /table -->")[2]
        page.write_text(f"{before}<!-- table -->\n{made}\n<!-- /table -->{after}", encoding="utf-8")
