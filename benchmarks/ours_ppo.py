"""Measures the time of lit-rlhf's PPO on the models in a folder, in this process; prints one JSON line.

    python benchmarks/ours_ppo.py MODELS [--iterations 4] [--response 256] [--precision bf16-mixed] [--critic shared]

An iteration has 64 prompts of 32 tokens, one response of at most --response tokens to each, and 4 epochs of 4
minibatches; actor, critic, reference and reward model have the same shape. The first iteration is a warm-up and is not
counted. When started by torchrun, the script runs on all of torchrun's processes, and process 0 prints.
"""

import argparse
import contextlib
import io
import json
import os
import statistics
import sys
import time
import warnings
from typing import Any

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("models", help="a folder that models.py wrote")
parser.add_argument("--iterations", type=int, default=4)
parser.add_argument("--batch", type=int, default=64)
parser.add_argument("--responses", type=int, default=1)
parser.add_argument("--response", type=int, default=256)
parser.add_argument("--precision", default="32-true")
parser.add_argument("--strategy", default="auto")
parser.add_argument("--critic", choices=("separate", "shared"), default="separate")
parser.add_argument("--max-tokens", type=int, default=8192)
parser.add_argument("--compile", action="store_true")
parser.add_argument("--epochs", type=int, default=4)
parser.add_argument("--minibatches", type=int, default=4)
parser.add_argument("--lag", type=int, default=0, help="the number of iterations by which generation runs ahead")
parser.add_argument("--workers", type=int, default=1, help="the number of worker processes if there is a lag")


def main() -> None:
    """Train, and print the measurements."""
    options = parser.parse_args()
    import lightning
    import torch

    from lit_rlhf import Ahead, CompileLayers, PolicyGradient, Prompts, RewardModel, Sampling, Update

    class Watch(lightning.Callback):
        """Records the metrics and the response lengths of each iteration."""

        def __init__(self) -> None:
            self.iterations: list[dict[str, float]] = []
            self.lengths: list[list[int]] = []
            self.last = 0.0

        def on_train_batch_start(self, *_: object) -> None:
            self.last = time.perf_counter()

        def on_train_batch_end(self, trainer: lightning.Trainer, module: object, outputs: Any, *_: object) -> None:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds = time.perf_counter() - self.last
            self.iterations.append({k: float(v) for k, v in trainer.callback_metrics.items()} | {"seconds": seconds})
            self.lengths.append(outputs["scored_rollout"].rollout.response_lengths.tolist())

    warnings.filterwarnings("ignore")
    lightning.seed_everything(1, verbose=False)
    models, watch = options.models, Watch()
    module = PolicyGradient(
        actor=f"{models}/policy",
        critic=f"{models}/reward" if options.critic == "separate" else "shared",
        rewards=[RewardModel(f"{models}/reward")],
        sampling=Sampling(max_tokens=options.response, responses=options.responses),
        update=Update(epochs=options.epochs, minibatches=options.minibatches, max_tokens=options.max_tokens),
        engine=Ahead(lag=options.lag, workers=options.workers),
        iterations=options.iterations,
    )
    with contextlib.redirect_stdout(io.StringIO()):
        trainer = lightning.Trainer(
            accelerator="auto",
            devices=int(os.environ.get("WORLD_SIZE", "1")),
            strategy=options.strategy,
            inference_mode=False,
            use_distributed_sampler=False,
            callbacks=[watch, *([CompileLayers()] if options.compile else [])],
            precision=options.precision,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, datamodule=Prompts(train=f"{models}/prompts.jsonl", batch_size=options.batch))
    if trainer.world_size > 1:
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    if not trainer.is_global_zero:
        return
    first = 1 + options.lag
    counted = watch.iterations[first:] or watch.iterations
    medians = {k: statistics.median(i[k] for i in counted) for k in counted[0]}
    json.dump(
        {
            "seconds": [round(i["seconds"], 3) for i in watch.iterations],
            "median": medians["seconds"],
            **{name.removeprefix("time/"): value for name, value in medians.items() if name.startswith("time/")},
            "response_tokens": [sum(lengths) for lengths in watch.lengths[first:] or watch.lengths],
            "lengths": watch.lengths[first:] or watch.lengths,
            "peak_memory_gib": medians["perf/peak_memory_gib"],
        },
        sys.stdout,
    )
    print()


if __name__ == "__main__":
    main()
