"""Reward models trained on rankings (Plackett-Luce) and on all pairs of the same rankings (Bradley-Terry), by seed.

    python benchmarks/rankings.py                                     # rankings sampled from a known linear reward
    python benchmarks/rankings.py --model DIR --train F --validation F  # your own files

Both models see the same rankings in the same order and take the same number of steps. Prints the held-out accuracy over
pairs.
"""

import argparse
import contextlib
import io
import json
import math
import os
import random
import statistics
import tempfile
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import lightning
import torch

from lit_rlhf import Preferences, RewardModeling
from lit_rlhf.testing import WORDS, make_tiny_model


def sample_rankings(count: int, seed: int, k: int = 4) -> list[dict[str, object]]:
    """Return rankings sampled from the Plackett-Luce model, with a reward that is linear in the word counts."""
    rng = random.Random(seed)
    weights = [random.Random(i).gauss(0, 1) for i in range(WORDS)]
    rankings = []
    for _ in range(count):
        texts = [[rng.randrange(WORDS) for _ in range(rng.randint(4, 8))] for _ in range(k)]
        # sorting by score − log(exponential sample) draws from the Plackett-Luce model
        noisy = sorted(texts, key=lambda words: math.log(rng.expovariate(1.0)) - sum(weights[w] for w in words))
        rankings.append({"prompt": "w1", "responses": [" " + " ".join(f"w{w}" for w in words) for words in noisy]})
    return rankings


def accuracy(
    model: str, data: dict[str, object], seed: int, as_pairs: bool, rate: float, epochs: int, batch: int
) -> float:
    """Train a reward model and return its held-out accuracy."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        lightning.seed_everything(seed, verbose=False)
        module = RewardModeling(reward=model, optimizer=lambda p: torch.optim.AdamW(p, lr=rate, weight_decay=0.0))
        preferences = Preferences(**data, as_pairs=as_pairs, batch_size=batch)  # type: ignore[arg-type]
        trainer = lightning.Trainer(
            accelerator="cpu",
            max_epochs=epochs,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            limit_val_batches=0,
        )
        trainer.fit(module, datamodule=preferences)
        held_out = Preferences(**data, as_pairs=True)  # type: ignore[arg-type]
        trainer = lightning.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False)
        return trainer.validate(module, datamodule=held_out, verbose=False)[0]["val/accuracy"]


def main() -> None:
    """Print one line per seed, and the means."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--train")
    parser.add_argument("--validation")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--rate", type=float, default=2e-3)
    options = parser.parse_args()
    accuracies: dict[bool, list[float]] = {False: [], True: []}
    with tempfile.TemporaryDirectory() as folder:
        model = options.model or str(make_tiny_model(Path(folder, "model")))
        for seed in range(1, options.seeds + 1):
            data: dict[str, object] = {
                "train": options.train,
                "validation": options.validation,
                "max_tokens": 512,
                "ties": "drop",
            }
            pairs_per_ranking = 6
            if not options.train:
                for split, count, key in (("train", 320, seed), ("validation", 200, 1000)):
                    data[split] = str(Path(folder, f"{split}.jsonl"))
                    Path(str(data[split])).write_text("\n".join(map(json.dumps, sample_rankings(count, key))))
            for as_pairs in (False, True):
                batch = 16 * pairs_per_ranking if as_pairs else 16
                accuracies[as_pairs].append(accuracy(model, data, seed, as_pairs, options.rate, options.epochs, batch))
            print(f"seed {seed}: rankings {accuracies[False][-1]:.3f}, pairs {accuracies[True][-1]:.3f}", flush=True)
    for as_pairs, name in ((False, "rankings (Plackett-Luce)"), (True, "their pairs (Bradley-Terry)")):
        values = accuracies[as_pairs]
        print(f"{name}: mean {statistics.mean(values):.4f}, standard deviation {statistics.stdev(values):.4f}")


if __name__ == "__main__":
    main()
