"""``lit-rlhf quickstart``: from random weights to a trained policy on a laptop, with nothing but this package."""

import argparse
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
from lit_rlhf.generation.engine import find_vocabulary
from lit_rlhf.models.actor import Actor
from lit_rlhf.models.loading import load_model, load_tokenizer
from lit_rlhf.modules.completions import complete
from lit_rlhf.randomness import Stream
from lit_rlhf.types import Completions, PromptBatch

SAMPLES = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What a model writes for the 200 openings that no stage has seen."""

    completions: Completions
    scores: Tensor  # [B]
    grammatical: Tensor  # [B] bool
    kl_to_sft: Tensor  # [B], nats a response


def main(args: Sequence[str]) -> None:
    """The command ``lit-rlhf quickstart``."""
    parser = argparse.ArgumentParser(
        prog="lit-rlhf quickstart",
        description="Teach a model of a million parameters, from random weights, to write restaurant reviews (SFT), "
        "then to write positive ones (PPO). About three minutes on two cores; no file, network, account or GPU.",
    )
    parser.add_argument("--dir", type=Path, default=Path("runs/quickstart"), help="where (default: %(default)s)")
    parser.add_argument("--sft-iterations", type=int, default=500, help="batches of SFT (default: %(default)s)")
    parser.add_argument("--ppo-iterations", type=int, default=25, help="iterations of PPO (default: %(default)s)")
    options = parser.parse_args(args)
    start = time.perf_counter()
    console = Console()
    run_stages(options.dir, options.sft_iterations, options.ppo_iterations, console)
    sft, ppo = options.dir / "sft" / "export", options.dir / "ppo" / "export"
    before, after = measure(sft, sft), measure(ppo, sft)
    report(before, after, console)
    console.print(f"\n{time.perf_counter() - start:.0f} seconds. The runs' files: {options.dir}", highlight=False)


def run_stages(folder: Path, sft_iterations: int, ppo_iterations: int, console: Console) -> None:
    """SFT and PPO, each an ordinary ``lit-rlhf fit``."""
    sft = ["--trainer.default_root_dir", str(folder / "sft"), "--model.iterations", str(sft_iterations)]
    sft += ["--model.scheduler.T_max", str(sft_iterations)]
    ppo = ["--trainer.default_root_dir", str(folder / "ppo"), "--model.iterations", str(ppo_iterations)]
    ppo += ["--model.actor", str(folder / "sft" / "export")]
    for title, stage, options in (
        ("1. SFT: learn to write reviews", "sft", sft),
        ("2. PPO: learn to write positive ones", "ppo", ppo),
    ):
        console.rule(title)
        lightning_cli.run(["fit", "--config", str(config_file(f"quickstart/{stage}.yaml")), *options])


def config_file(name: str) -> Path:
    """A recipe of ``configs/``, in a checkout or in an installed package."""
    here = Path(__file__).parent
    installed = here / "configs" / name
    return installed if installed.exists() else here.parent / "configs" / name


@torch.no_grad()
def measure(folder: Path, sft: Path) -> Measured:
    """Let a model answer the fresh prompts, and judge what it writes by the grammar and the true rule.

    Args:
        folder: The model's.
        sft: The model that the KL is measured to.
    """
    tokenizer = load_tokenizer(str(folder))
    actor, reference = Actor(load_model(str(folder))), Actor(load_model(str(sft)))
    texts = [record["prompt"] for record in reviews.fresh_prompts()]
    tokens, mask = left_pad([tokenizer(text)["input_ids"] for text in texts], tokenizer.pad_token_id)
    batch = PromptBatch(tokens=tokens, mask=mask, group=torch.arange(len(texts)), prompts=texts, columns={})
    vocabulary = find_vocabulary(actor, tokenizer, ())
    rollout = NativeEngine().generate(
        actor, batch, Sampling(max_tokens=64), vocabulary, stream=Stream.PREDICTION, iteration=0
    )
    completions = complete(rollout, batch, tokenizer)
    ours, theirs = (rollout.at_responses(m(rollout.tokens, rollout.scored).logprobs) for m in (actor, reference))
    whole = [f"{prompt}{response}" for prompt, response in zip(texts, completions.responses, strict=True)]
    return Measured(
        completions=completions,
        scores=torch.tensor(reviews.reward(completions.responses)),
        grammatical=torch.tensor([reviews.grammatical(text) for text in whole]),
        kl_to_sft=masked_sum(k1(ours, theirs), rollout.response_mask, 1),
    )


def report(before: Measured, after: Measured, console: Console) -> None:
    """The table and five samples of each."""
    console.rule("Before and after PPO, on 200 prompts that no stage has seen")
    table = Table()
    for heading in ("", "score (best: 1)", "deviation", "KL to SFT, nats a response", "grammatical"):
        table.add_column(heading, justify="right" if heading else "left")
    for name, measured in (("after SFT", before), ("after PPO", after)):
        table.add_row(
            name,
            f"{measured.scores.mean():.3f}",
            f"{measured.scores.std():.3f}",
            f"{measured.kl_to_sft.mean():.2f}",
            f"{100 * measured.grammatical.float().mean():.1f} %",
        )
    console.print(table)
    for name, measured in (("after SFT", before), ("after PPO", after)):
        console.print(f"\n[bold]{name}[/bold]")
        for i in range(SAMPLES):
            prompt, response = measured.completions.prompts[i], measured.completions.responses[i]
            console.print(f"{measured.scores[i]:+.2f}  [dim]{prompt}[/dim]{response}", highlight=False)
