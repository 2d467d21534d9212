"""The stages of ``lit-rlhf quickstart``, which trains an aligned policy from random weights on a laptop, alone."""

import csv
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from lit_rlhf import lightning_cli, recipes
from lit_rlhf.algorithms.kl import k1
from lit_rlhf.algorithms.masked import masked_sum
from lit_rlhf.data import reviews
from lit_rlhf.data.prompts import left_pad
from lit_rlhf.generation import NativeEngine, Sampling
from lit_rlhf.generation.engine import find_special_tokens
from lit_rlhf.models.actor import Actor
from lit_rlhf.models.loading import load_model, load_tokenizer
from lit_rlhf.modules.decoding import decode
from lit_rlhf.modules.forwards import response_logprobs
from lit_rlhf.randomness import Stream
from lit_rlhf.rewards import RewardModel
from lit_rlhf.types import PromptBatch, RewardInputs

SAMPLES = 4
TITLES = {
    "base": "Base: train all weights; every later stage is an adapter on them",
    "sft": "SFT: learn to write reviews",
    "reward": "Reward model: learn from pairs which reviews people prefer",
    "ppo": "PPO: learn to write reviews that the reward model scores highly",
    "dpo": "DPO: learn from the same pairs directly, without a reward model",
}
LORA_LEARNING_RATES = {
    "sft": {"optimizer": 5e-3},
    "reward": {"optimizer": 3e-3},
    "ppo": {"actor_optimizer": 3e-4, "critic_optimizer": 5e-3},
    "dpo": {"optimizer": 3e-4},
}
"""The learning rates for adapters, by stage; the learning rates in ``configs/quickstart/`` are for whole models."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """A model's responses to the 200 held-out prompts, and the scores of these responses."""

    reward_inputs: RewardInputs
    true_scores: Tensor  # [B], by the rule that ranked the pairs
    learned_scores: Tensor | None  # [B], by the reward model, in standard deviations; None without a reward model
    grammatical: Tensor  # [B] bool
    kl_to_sft: Tensor  # [B], in nats per response


def quickstart(method: str, folder: Path, sft_iterations: int, ppo_iterations: int, lora: bool = False) -> None:
    """Train a model in several stages, and print its evaluation after each.

    Args:
        method: The last stage, ``ppo`` or ``dpo``.
        folder: The folder for all files. If it has an SFT model already, DPO starts from this one.
        sft_iterations: The number of iterations of SFT; with ``lora``, the first half of them train a base.
        ppo_iterations: The number of iterations of PPO.
        lora: Whether to train adapters of one base in all stages after a short first one.

    Raises:
        UserError: if ``lit-rlhf fit`` fails in one of the stages.
    """
    start, console = time.perf_counter(), Console()
    stages = ["sft", "reward", "ppo"] if method == "ppo" else ["sft", "dpo"]
    if method == "dpo" and (folder / "sft" / "export").exists():
        stages.remove("sft")  # start from the SFT model of an earlier quickstart, to compare DPO with its PPO
    elif lora:
        stages.insert(0, "base")
    for number, stage in enumerate(stages, start=1):
        console.rule(f"{number}. {TITLES[stage]}")
        run_stage(stage, folder, sft_iterations, ppo_iterations, lora=lora)
    trained = [stage for stage in ("base", "sft", "ppo", "dpo") if (folder / stage / "export").exists()]
    evaluations = {stage: evaluate(folder, stage) for stage in trained}
    if method == "ppo":
        report_iterations(folder / "ppo" / "metrics.csv", console)
    report(evaluations, console)
    console.print(f"\nDone in {time.perf_counter() - start:.0f} seconds. The runs are in {folder}", highlight=False)
    print(f"report: {folder / stages[-1] / 'report.html'}")


def run_stage(stage: str, folder: Path, sft_iterations: int, ppo_iterations: int, lora: bool = False) -> None:
    """Run one stage of the quickstart, which is an ordinary ``lit-rlhf fit``.

    Args:
        stage: ``base``, ``sft``, ``reward``, ``ppo`` or ``dpo``.
        folder: The quickstart's folder, which contains a folder for each stage.
        sft_iterations: The number of iterations of SFT; with ``lora``, the first half of them train the base.
        ppo_iterations: The number of iterations of PPO.
        lora: Whether to train adapters instead of whole models, except in the stage ``base``.

    Raises:
        UserError: if ``lit-rlhf fit`` fails.
    """
    base, sft, reward = (str(folder / name / "export") for name in ("base", "sft", "reward"))
    pretraining = sft_iterations // 2 if lora else 0
    options = {
        "base": _sft_iterations(pretraining),
        "sft": _sft_iterations(sft_iterations - pretraining) + (["--model.actor", base] if lora else []),
        "reward": ["--model.reward", sft],
        "ppo": ["--model.actor", sft, "--model.iterations", str(ppo_iterations)],
        "dpo": ["--model.actor", sft],
    }[stage]
    if stage == "ppo":
        options += ["--model.rewards", f"[{_reward_model(reward)}, {_true_score()}]"]
    if lora and stage != "base":
        options += ["--model.adapter.rank", "16"]
        for optimizer, rate in LORA_LEARNING_RATES[stage].items():
            options += [f"--model.{optimizer}.lr", str(rate)]
    config = ["--config", str(recipes.find_recipe(f"quickstart/{'sft' if stage == 'base' else stage}"))]
    options += ["--trainer.default_root_dir", str(folder / stage), "--summary.next", "false"]
    lightning_cli.run(["fit", *config, *options])


def _sft_iterations(number: int) -> list[str]:
    return ["--model.iterations", str(number), "--model.scheduler.T_max", str(number)]


def _reward_model(model: str) -> str:
    return f'{{"class_path": "RewardModel", "init_args": {{"model": "{model}", "normalize": true}}}}'


def _true_score() -> str:
    """Return the configuration of the true score as a reward of weight 0: it is logged, but not trained on."""
    function = "lit_rlhf.data.reviews:reward"
    return f'{{"class_path": "RewardFunction", "init_args": {{"function": "{function}", "weight": 0.0}}}}'


@torch.no_grad()
def evaluate(folder: Path, stage: str) -> Evaluation:
    """Generate and score the responses of a stage's model to the held-out prompts.

    Args:
        folder: The quickstart's folder, which contains a folder for each stage.
        stage: ``base``, ``sft``, ``ppo`` or ``dpo``.

    Returns:
        The responses with their true and learned scores, their grammaticality, and their KL to the SFT model.
    """
    policy, sft, reward = (folder / name / "export" for name in (stage, "sft", "reward"))
    tokenizer = load_tokenizer(str(policy))
    actor, reference = Actor(load_model(str(policy))), Actor(load_model(str(sft)))
    texts = [record["prompt"] for record in reviews.fresh_prompts()]
    tokens, mask = left_pad([tokenizer(text)["input_ids"] for text in texts], tokenizer.pad_token_id)
    batch = PromptBatch(tokens=tokens, mask=mask, group=torch.arange(len(texts)), prompts=texts, columns={})
    special_tokens = find_special_tokens(actor, tokenizer, ())
    rollout = NativeEngine().generate(
        actor, batch, Sampling(max_tokens=64), special_tokens, stream=Stream.PREDICTION, iteration=0
    )
    reward_inputs = decode(rollout, batch, tokenizer)
    logprobs, ref_logprobs = (response_logprobs(model, rollout, max_tokens=8192) for model in (actor, reference))
    full_texts = [f"{prompt}{response}" for prompt, response in zip(texts, reward_inputs.responses, strict=True)]
    learned = None
    if reward.exists():
        model = RewardModel(str(reward), normalize=True)
        model.prepare(tokenizer)
        learned = model(reward_inputs)
    return Evaluation(
        reward_inputs=reward_inputs,
        true_scores=torch.tensor(reviews.reward(reward_inputs.responses)),
        learned_scores=learned,
        grammatical=torch.tensor([reviews.grammatical(text) for text in full_texts]),
        kl_to_sft=masked_sum(k1(logprobs, ref_logprobs), rollout.response_mask, 1),
    )


def report_iterations(metrics: Path, console: Console) -> None:
    """Print the learned and true scores over PPO's iterations; the learned score can rise without the true score.

    Args:
        metrics: The path of PPO's ``metrics.csv``.
        console: The console to print to.
    """
    with metrics.open(encoding="utf-8") as lines:
        rows = [row for row in csv.DictReader(lines) if row.get("objective/score")]
    shown = [row for i, row in enumerate(rows) if i % 4 == 0 or i + 1 == len(rows)]
    console.rule("PPO: the learned score, which it maximised, and the true score, which it did not see")
    table = Table()
    for heading in ("iteration", "learned score", "true score", "KL to SFT (nats per response)"):
        table.add_column(heading, justify="right")
    for row in shown:
        values = (row[name] for name in ("rewards/RewardModel", "rewards/reward", "objective/kl_to_ref"))
        table.add_row(f"{float(row['progress/iteration']):.0f}", *(f"{float(value):.3f}" for value in values))
    console.print(table)


def report(evaluations: dict[str, Evaluation], console: Console) -> None:
    """Print each model's mean scores and samples, and the share of the possible gain over SFT that PPO or DPO achieved.

    Args:
        evaluations: The evaluation of each stage's model, with ``sft`` among the stages.
        console: The console to print to.
    """
    console.rule("Evaluation on 200 prompts that were not used in training")
    table = Table()
    for heading in (
        "",
        "true score (maximum 1)",
        "standard deviation",
        "learned score",
        "KL to SFT (nats per response)",
        "grammatical",
    ):
        table.add_column(heading, justify="right" if heading else "left")
    for stage, evaluation in evaluations.items():
        table.add_row(
            f"after {stage.upper()}",
            f"{evaluation.true_scores.mean():.3f}",
            f"{evaluation.true_scores.std():.3f}",
            "–" if evaluation.learned_scores is None else f"{evaluation.learned_scores.mean():.3f}",
            f"{evaluation.kl_to_sft.mean():.2f}",
            f"{100 * evaluation.grammatical.float().mean():.1f} %",
        )
    console.print(table)
    sft_score = float(evaluations["sft"].true_scores.mean())
    for stage in [stage for stage in evaluations if stage not in ("base", "sft")]:
        gain = (float(evaluations[stage].true_scores.mean()) - sft_score) / (1 - sft_score)
        console.print(
            f"{stage.upper()} was trained on pairs only and achieved {100 * gain:.0f} % of the possible gain in true "
            "score over SFT.",
            highlight=False,
        )
    for stage, evaluation in evaluations.items():
        console.print(f"\n[bold]after {stage.upper()}[/bold], each sample with its true score")
        for i in range(SAMPLES):
            prompt, response = evaluation.reward_inputs.prompts[i], evaluation.reward_inputs.responses[i]
            console.print(f"{evaluation.true_scores[i]:+.2f}  [dim]{prompt}[/dim]{response}", highlight=False)
