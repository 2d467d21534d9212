"""Generation alone: the native engine, transformers' ``generate``, and its continuous batching, on the same model.

    python benchmarks/generation.py [--repeats 3] [--precision bf16]

Generates responses to 64 prompts of 32 tokens, first of geometric length (mean 64, at most 256), then of 128 tokens;
then 8 responses to each of 2 prompts of 512 tokens. Prints the median tokens per second, and the ratio to ``generate``.
"""

import argparse
import contextlib
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from models import EOS, PAD, WORDS, write_models
from transformers import AutoModelForCausalLM, GenerationConfig

from lit_rlhf import NativeEngine, Sampling
from lit_rlhf.generation.engine import SpecialTokens
from lit_rlhf.models.actor import Actor
from lit_rlhf.models.loading import load_model
from lit_rlhf.randomness import Stream
from lit_rlhf.types import PromptBatch

SETTINGS = {  # mean length, longest response, prompts, tokens per prompt, responses per prompt
    "geometric lengths": (64.0, 256, 64, 32, 1),
    "all 128 tokens long": (1e9, 128, 64, 32, 1),
    "8 responses to prompts of 512 tokens": (64.0, 256, 2, 512, 8),
}


def main() -> None:
    """Measure the engines and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print("| | | tokens per second | ratio to generate |\n|---|---|---|---|")
    for name, (mean_length, longest, count, prompt, responses) in SETTINGS.items():
        with tempfile.TemporaryDirectory() as folder:
            policy = str(write_models(Path(folder), mean_length=mean_length) / "policy")
            actor = Actor(load_model(policy)).to(device)
            plain = AutoModelForCausalLM.from_pretrained(policy, dtype=torch.float32).to(device).eval()
        tokens = torch.randint(WORDS, 4096, (count, prompt), generator=torch.Generator().manual_seed(2)).to(device)
        engines: dict[str, Callable[[int], int]] = {
            "lit-rlhf": lambda i, a=actor, t=tokens, n=longest, r=responses: ours(a, t, n, r, i),
            "generate": lambda i, m=plain, t=tokens, n=longest, r=responses: generate(m, t, n, r),
            "continuous batching": lambda i, m=plain, t=tokens, n=longest, r=responses: continuous(m, t, n, r),
        }
        speeds = {}
        for engine, run in engines.items():
            try:
                speeds[engine] = [timed(run, i, device, options.precision) for i in range(options.repeats + 1)][1:]
            except Exception as error:  # transformers' continuous batching does not run everywhere
                print(f"| {name} | {engine} | {type(error).__name__}: {str(error)[:80]} | |", flush=True)
        base = statistics.median(speeds["generate"])
        for engine, measured in speeds.items():
            median = statistics.median(measured)
            print(f"| {name} | {engine} | {median:.0f} | {median / base:.2f} |", flush=True)


def timed(run: Callable[[int], int], number: int, device: str, precision: str) -> float:
    """Run a generation, and return the number of tokens per second."""
    cast = torch.autocast(device, torch.bfloat16) if precision == "bf16" else contextlib.nullcontext()
    torch.manual_seed(number)
    began = time.perf_counter()
    with cast, torch.no_grad():
        tokens = run(number)
    if device == "cuda":
        torch.cuda.synchronize()
    return tokens / (time.perf_counter() - began)


def ours(actor: Actor, tokens: torch.Tensor, longest: int, responses: int, number: int) -> int:
    """Return the number of response tokens that NativeEngine sampled."""
    count = len(tokens)
    group = torch.arange(count, device=tokens.device)
    prompts = PromptBatch(
        tokens=tokens, mask=torch.ones_like(tokens, dtype=torch.bool), group=group, prompts=[""] * count, columns={}
    )
    sampling = Sampling(max_tokens=longest, responses=responses)
    special_tokens = SpecialTokens(stop=(EOS,), pad=PAD)
    rollout = NativeEngine().generate(actor, prompts, sampling, special_tokens, stream=Stream.ROLLOUT, iteration=number)
    return int(rollout.response_lengths.sum())


def generate(model: torch.nn.Module, tokens: torch.Tensor, longest: int, responses: int) -> int:
    """Return the number of response tokens that ``generate`` sampled."""
    response_tokens = model.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        do_sample=True,
        top_k=0,
        top_p=1.0,
        max_new_tokens=longest,
        num_return_sequences=responses,
        pad_token_id=PAD,
    )[:, tokens.shape[1] :]
    return int((response_tokens != PAD).sum())


def continuous(model: torch.nn.Module, tokens: torch.Tensor, longest: int, responses: int) -> int:
    """Return the number of response tokens that transformers' continuous batching sampled."""
    config = GenerationConfig(
        do_sample=True, top_k=0, top_p=1.0, max_new_tokens=longest, eos_token_id=EOS, pad_token_id=PAD
    )
    inputs = [row for row in tokens.tolist() for _ in range(responses)]
    answers = model.generate_batch(inputs=inputs, generation_config=config, progress_bar=False)
    return sum(len(answer.generated_tokens) for answer in answers.values())


if __name__ == "__main__":
    main()
