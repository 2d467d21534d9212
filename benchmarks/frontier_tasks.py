"""The tasks of frontier.py, each with a start (the policy before training), prompts and a reward.

happy        a small story model; the reward is the function `happy_story`
sentiment    the same model; the reward is a model of sentiment, trained on labelled sentences (JSON lines with
             ``text``, and ``label`` 0 for negative or 1 for positive), which are joined to texts of one sentiment and
             cut to a random number of words, so that the length says nothing about the sentiment
randomwalks  short paths in a graph (randomwalks.py); the start is trained on random walks with SFT
quickstart   the model, the prompts and the learned reward of ``lit-rlhf quickstart``, with its penalty for truncation
"""

import contextlib
import io
import json
import random
import sys
from pathlib import Path
from typing import Any, NamedTuple

import lags

from lit_rlhf import Reward, RewardFunction, RewardModel
from lit_rlhf.cli import main as command_line

HERE = Path(__file__).resolve().parent
MAX_TOKENS = 64
"""The maximum number of tokens in a story."""
PAIRS, HELD_OUT_PAIRS = 7500, 500
"""The numbers of pairs of texts from which the reward model of sentiment learns, and with which it is tested."""


class Task(NamedTuple):
    """A start, prompts, and either a reward model or a reward function."""

    start: str  # a model folder
    prompts: str  # a function that returns the prompts to train on
    held_out: str  # a function that returns the prompts to measure with
    max_tokens: int  # the maximum number of tokens in a response
    reward_model: str | None = None  # a model folder; its scores are normalised
    function: str | None = None  # FILE.py:NAME, which needs nothing of lit-rlhf
    truncation_penalty: float = 0.0  # in units of the score
    rate: float = 1e-4  # the learning rate of an actor with several optimizer steps in an iteration
    critic_rate: float = 1e-3  # the learning rate of the critic
    rivals: tuple[str, ...] = ("TRL PPO, kl 0.05", "TRL PPO, kl 0.2")  # the trainers of TRL that run by default

    def rewards(self) -> list[dict[str, Any]]:
        """Return the rewards as a configuration gives them."""
        if self.reward_model is None:
            return [{"class_path": "RewardFunction", "init_args": {"function": self.function}}]
        return [{"class_path": "RewardModel", "init_args": {"model": self.reward_model, "normalize": True}}]

    def reward(self) -> Reward:
        """Return the reward."""
        if self.reward_model is not None:
            return RewardModel(self.reward_model, normalize=True)
        assert self.function is not None
        return RewardFunction(self.function)


def happy(stories: str) -> Task:
    """Return the task with the reward `happy_story`."""
    function = f"{HERE.parent}/lit_rlhf/rewards/examples.py:happy_story"
    held_out = f"{__file__}:held_out_stories"
    return Task(stories, f"{HERE}/lags.py:story_prompts", held_out, MAX_TOKENS, function=function)


def sentiment(stories: str, reviews: Path | None, folder: Path, iterations: int | None = None) -> Task:
    """Return the task with a reward model of sentiment, which is trained if the folder does not hold it."""
    model = folder / "reward" / "export"
    if not model.exists():
        if reviews is None:
            raise SystemExit(f"--reviews: the task sentiment needs it, as there is no reward model in {model}")
        train_reward_model(stories, reviews, folder, iterations)
    return happy(stories)._replace(reward_model=str(model), function=None)


def randomwalks(folder: Path, iterations: int | None = None) -> Task:
    """Return the task of short paths; its start is trained if the folder does not hold it."""
    file = f"{HERE}/randomwalks.py"
    if not (folder / "export").exists():
        shape = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 3}
        shape |= {"num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 16}
        values = {
            "config": "sft",
            "model.actor": json.dumps({"config": shape, "tokenizer": f"{file}:tokenizer"}),
            "model.iterations": iterations or 640,  # 20 epochs
            "model.optimizer.lr": 1e-3,
            "data.train": f"{file}:demonstrations",
            "data.batch_size": 32,
            "data.prompt": "prompt",
            "data.response": "response",
            "trainer.default_root_dir": folder,
            "trainer.accelerator": "cpu",
        }
        quietly(["fit", *(f"--{name}={value}" for name, value in values.items())])
    source = f"{file}:prompts"
    function, rivals = f"{file}:optimality", ("TRL GRPO", "TRL RLOO")
    return Task(str(folder / "export"), source, source, 11, function=function, rivals=rivals)


def quickstart(folder: Path, iterations: int | None = None) -> Task:
    """Return the task of the quickstart; its start and reward model are trained if the folder does not hold them."""
    stages = {"sft": ["--model.scheduler.T_max=500"], "reward": [f"--model.reward={folder}/sft/export"]}
    for stage, words in stages.items():
        if not (folder / stage / "export").exists():
            words += [f"--trainer.default_root_dir={folder}/{stage}", "--trainer.accelerator=cpu"]
            words += [f"--model.iterations={iterations}"] if iterations else []
            quietly(["fit", "--config", f"quickstart/{stage}", *words])
    return Task(
        start=str(folder / "sft" / "export"),
        prompts="lit_rlhf.data.reviews:prompts",
        held_out=f"{__file__}:held_out_reviews",
        max_tokens=64,
        reward_model=str(folder / "reward" / "export"),
        truncation_penalty=1.0,
        critic_rate=5e-4,
    )


def held_out_stories() -> list[dict[str, str]]:
    """Return openings of stories to measure with; each occurs often, so that the mean score is precise."""
    return lags.fresh_story_prompts() * 4


def held_out_reviews() -> list[dict[str, str]]:
    """Return the quickstart's held-out prompts, each several times."""
    from lit_rlhf.data.reviews import fresh_prompts

    return [{"prompt": record["prompt"]} for record in fresh_prompts()] * 3


def train_reward_model(stories: str, reviews: Path, folder: Path, iterations: int | None = None) -> Path:
    """Train a reward model of sentiment on pairs of texts, and return its folder."""
    folder.mkdir(parents=True, exist_ok=True)
    rng, texts = random.Random(1), {label: list[str]() for label in (0, 1)}
    for line in reviews.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        texts[record["label"]].append(record["text"])

    def text(label: int) -> str:
        words = " ".join(rng.choices(texts[label], k=5)).split()
        return " ".join(words[: rng.randint(5, 50)])

    pairs = [{"chosen": text(1), "rejected": text(0)} for _ in range(PAIRS + HELD_OUT_PAIRS)]
    train, test = folder / "pairs.jsonl", folder / "held_out_pairs.jsonl"
    train.write_text("\n".join(map(json.dumps, pairs[:PAIRS])))
    test.write_text("\n".join(map(json.dumps, pairs[PAIRS:])))
    values = {
        "config": "reward",
        "model.reward": stories,
        "model.optimizer.lr": 1e-3,
        "model.iterations": iterations or "null",
        "data.train": train,
        "data.validation": test,
        "trainer.default_root_dir": folder / "reward",
        "trainer.accelerator": "cpu",
    }
    quietly(["fit", *(f"--{name}={value}" for name, value in values.items())])
    return folder / "reward" / "export"


def quietly(words: list[str]) -> None:
    """Run a command of lit-rlhf without its output; print the output if the command fails."""
    output = io.StringIO()
    try:
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            command_line(words)
    except BaseException:
        print(output.getvalue(), file=sys.stderr)
        raise
