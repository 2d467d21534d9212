"""``lit-rlhf quickstart``: from random weights to an aligned policy on a laptop, with nothing but this package."""

import argparse
import csv
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from lit_rlhf import lightning_cli
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
    "sft": "SFT: learn to write reviews",
    "reward": "Reward model: learn from pairs which review people prefer",
    "ppo": "PPO: learn to write what the reward model likes",
    "dpo": "DPO: learn from the same pairs at once",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What a model writes for the 200 openings that no stage has seen."""

    reward_inputs: RewardInputs
    true_scores: Tensor  # [B], by the rule behind the pairs
    learned_scores: Tensor | None  # [B], by the reward model, in deviations; None: there is none
    grammatical: Tensor  # [B] bool
    kl_to_sft: Tensor  # [B], nats a response


def main(args: Sequence[str]) -> None:
    """The command ``lit-rlhf quickstart``."""
    parser = argparse.ArgumentParser(
        prog="lit-rlhf quickstart",
        description="Teach a model of a million parameters, from random weights, to write restaurant reviews (SFT), a "
        "reward model to tell which of two people prefer, and then the first to write what the second likes (PPO). "
        "About four minutes on two cores; no file, network, account or GPU.",
    )
    parser.add_argument(
        "--stage", choices=("ppo", "dpo"), default="ppo", help="dpo: DPO in place of reward model and PPO"
    )
    parser.add_argument("--dir", type=Path, default=Path("runs/quickstart"), help="where (default: %(default)s)")
    parser.add_argument("--sft-iterations", type=int, default=500, help="batches of SFT (default: %(default)s)")
    parser.add_argument("--ppo-iterations", type=int, default=25, help="iterations of PPO (default: %(default)s)")
    options = parser.parse_args(args)
    start, console, folder = time.perf_counter(), Console(), options.dir
    stages = ["sft", "reward", "ppo"] if options.stage == "ppo" else ["sft", "dpo"]
    if options.stage == "dpo" and (folder / "sft" / "export").exists():
        stages.remove("sft")  # of an earlier quickstart: so the two can be compared
    for number, stage in enumerate(stages, start=1):
        console.rule(f"{number}. {TITLES[stage]}")
        run_stage(stage, folder, options.sft_iterations, options.ppo_iterations)
    found = {stage: measure(folder, stage) for stage in ("sft", "ppo", "dpo") if (folder / stage / "export").exists()}
    if options.stage == "ppo":
        report_iterations(folder / "ppo" / "metrics.csv", console)
    report(found, console)
    console.print(f"\n{time.perf_counter() - start:.0f} seconds. The runs' files: {folder}", highlight=False)


def run_stage(stage: str, folder: Path, sft_iterations: int, ppo_iterations: int) -> None:
    """One of the stages, an ordinary ``lit-rlhf fit``."""
    sft, reward = str(folder / "sft" / "export"), str(folder / "reward" / "export")
    options = {
        "sft": ["--model.iterations", str(sft_iterations), "--model.scheduler.T_max", str(sft_iterations)],
        "reward": ["--model.reward", sft],
        "ppo": ["--model.actor", sft, "--model.iterations", str(ppo_iterations)],
        "dpo": ["--model.actor", sft],
    }[stage]
    if stage == "ppo":
        options += ["--model.rewards", f"[{_learned(reward)}, {_watched()}]"]
    config = ["--config", str(config_file(f"quickstart/{stage}.yaml"))]
    lightning_cli.run(["fit", *config, "--trainer.default_root_dir", str(folder / stage), *options])


def _learned(model: str) -> str:
    return f'{{"class_path": "RewardModel", "init_args": {{"model": "{model}", "normalize": true}}}}'


def _watched() -> str:
    function = "lit_rlhf.data.reviews:reward"
    return f'{{"class_path": "RewardFunction", "init_args": {{"function": "{function}", "weight": 0.0}}}}'


def config_file(name: str) -> Path:
    """A recipe of ``configs/``, in a checkout or in an installed package."""
    here = Path(__file__).parent
    installed = here / "configs" / name
    return installed if installed.exists() else here.parent / "configs" / name


@torch.no_grad()
def measure(folder: Path, stage: str) -> Measured:
    """Let a stage's model answer the fresh prompts; judge what it writes by the true rule, the learned, the grammar.

    Args:
        folder: The quickstart's.
        stage: ``sft``, ``ppo`` or ``dpo``.
    """
    own, sft, reward = (folder / name / "export" for name in (stage, "sft", "reward"))
    tokenizer = load_tokenizer(str(own))
    actor, reference = Actor(load_model(str(own))), Actor(load_model(str(sft)))
    texts = [record["prompt"] for record in reviews.fresh_prompts()]
    tokens, mask = left_pad([tokenizer(text)["input_ids"] for text in texts], tokenizer.pad_token_id)
    batch = PromptBatch(tokens=tokens, mask=mask, group=torch.arange(len(texts)), prompts=texts, columns={})
    special_tokens = find_special_tokens(actor, tokenizer, ())
    rollout = NativeEngine().generate(
        actor, batch, Sampling(max_tokens=64), special_tokens, stream=Stream.PREDICTION, iteration=0
    )
    reward_inputs = decode(rollout, batch, tokenizer)
    logprobs, ref_logprobs = (response_logprobs(model, rollout, max_tokens=8192) for model in (actor, reference))
    whole = [f"{prompt}{response}" for prompt, response in zip(texts, reward_inputs.responses, strict=True)]
    learned = None
    if reward.exists():
        model = RewardModel(str(reward), normalize=True)
        model.prepare(tokenizer)
        learned = model(reward_inputs)
    return Measured(
        reward_inputs=reward_inputs,
        true_scores=torch.tensor(reviews.reward(reward_inputs.responses)),
        learned_scores=learned,
        grammatical=torch.tensor([reviews.grammatical(text) for text in whole]),
        kl_to_sft=masked_sum(k1(logprobs, ref_logprobs), rollout.response_mask, 1),
    )


def report_iterations(metrics: Path, console: Console) -> None:
    """Learned score against true score over PPO's iterations: the first may rise where the second does not."""
    with metrics.open(encoding="utf-8") as lines:
        rows = [row for row in csv.DictReader(lines) if row.get("objective/score")]
    shown = [row for i, row in enumerate(rows) if i % 4 == 0 or i + 1 == len(rows)]
    console.rule("What PPO saw: the learned score, which it maximised, and the true one, which it did not know")
    table = Table()
    for heading in ("iteration", "learned score", "true score", "KL to SFT, nats a response"):
        table.add_column(heading, justify="right")
    for row in shown:
        values = (row[name] for name in ("rewards/RewardModel", "rewards/reward", "objective/kl_to_ref"))
        table.add_row(f"{float(row['progress/iteration']):.0f}", *(f"{float(value):.3f}" for value in values))
    console.print(table)


def report(found: dict[str, Measured], console: Console) -> None:
    """A row for each model, what the learned reward delivered of the true one, and samples of each."""
    console.rule("On 200 prompts that no stage has seen")
    table = Table()
    for heading in (
        "",
        "true score (best: 1)",
        "deviation",
        "learned score",
        "KL to SFT, nats a response",
        "grammatical",
    ):
        table.add_column(heading, justify="right" if heading else "left")
    for stage, measured in found.items():
        table.add_row(
            f"after {stage.upper()}",
            f"{measured.true_scores.mean():.3f}",
            f"{measured.true_scores.std():.3f}",
            "–" if measured.learned_scores is None else f"{measured.learned_scores.mean():.3f}",
            f"{measured.kl_to_sft.mean():.2f}",
            f"{100 * measured.grammatical.float().mean():.1f} %",
        )
    console.print(table)
    before = float(found["sft"].true_scores.mean())
    for stage in [stage for stage in found if stage != "sft"]:
        share = (float(found[stage].true_scores.mean()) - before) / (1 - before)
        console.print(
            f"{stage.upper()} knew only pairs: it delivered {100 * share:.0f} % of the rise in score that was left.",
            highlight=False,
        )
    for stage, measured in found.items():
        console.print(f"\n[bold]after {stage.upper()}[/bold], true score before each")
        for i in range(SAMPLES):
            prompt, response = measured.reward_inputs.prompts[i], measured.reward_inputs.responses[i]
            console.print(f"{measured.true_scores[i]:+.2f}  [dim]{prompt}[/dim]{response}", highlight=False)
