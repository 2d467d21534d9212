"""The largest tensor of an iteration with a vocabulary of 131,072, and the peak memory by size of micro-batches.

    python benchmarks/memory.py

The first is measured at every operation of PyTorch's, forward and backward; tensors of the weights' own shapes are left
out. The second is each process's peak resident memory (on a GPU: allocated), of ours on iteration.py's models.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import lightning
import torch
from models import write_models
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lit_rlhf import PolicyGradient, Prompts, RewardModel, Sampling, Update

HERE = Path(__file__).resolve().parent
VOCABULARY, MAX_TOKENS = 131_072, 1024


class Largest(TorchDispatchMode):
    """Remembers the largest result of any operation that is not of a weight's shape."""

    def __init__(self, shapes: set[tuple[int, ...]]) -> None:
        super().__init__()
        self.shapes, self.elements, self.what = shapes, 0, ""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor) and tuple(x.shape) not in self.shapes and x.numel() > self.elements:
                self.elements, self.what = x.numel(), f"{func} {tuple(x.shape)}"
        return result


def largest_tensor() -> None:
    """One iteration of four models."""
    with tempfile.TemporaryDirectory() as folder:
        models = write_models(Path(folder), hidden=64, layers=2, vocabulary=VOCABULARY, mean_length=24.0)
        lightning.seed_everything(1, verbose=False)
        module = PolicyGradient(
            actor=f"{models}/policy",
            critic=f"{models}/reward",
            rewards=[RewardModel(f"{models}/reward")],
            sampling=Sampling(max_tokens=64),
            update=Update(epochs=1, minibatches=1, max_tokens=MAX_TOKENS, entropy_coef=0.01),
            iterations=1,
        )
        module.configure_model()
        shapes = {tuple(p.shape) for p in module.parameters()} | {tuple(p.t().shape) for p in module.parameters()}
        trainer = lightning.Trainer(
            logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False
        )
        with Largest(shapes) as seen:
            trainer.fit(module, datamodule=Prompts(train=f"{models}/prompts.jsonl", batch_size=32))
    rows = seen.elements / VOCABULARY
    print(f"\nlargest tensor with a vocabulary of {VOCABULARY}: {seen.what}, {rows:.0f} rows of it, ", end="")
    print(f"where all response tokens would be about {32 * 24}; max_tokens / 8 is {MAX_TOKENS // 8}\n")


def peaks() -> None:
    """Peak memory by max_tokens."""
    print("| max_tokens | precision | s an iteration | peak GiB |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        models = write_models(Path(folder))
        for max_tokens in (1024, 2048, 8192):
            for precision in ("32-true", "bf16-mixed"):
                words = ["--iterations", "3", "--max-tokens", str(max_tokens), "--precision", precision]
                done = subprocess.run(
                    [sys.executable, str(HERE / "ours_ppo.py"), str(models), *words], capture_output=True, text=True
                )
                found = json.loads(done.stdout.strip().splitlines()[-1])
                cells = [max_tokens, precision, f"{found['median']:.1f}", f"{found['peak_memory_gib']:.2f}"]
                print("| " + " | ".join(map(str, cells)) + " |", flush=True)


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    largest_tensor()
    peaks()
