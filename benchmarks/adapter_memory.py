"""The memory of SFT and PPO with adapters on one base model, and of PPO with four whole models, on a CPU.

    python benchmarks/adapter_memory.py [--max-tokens 96] [--hidden 768] [--layers 13] [--precision 32-true]

Writes a Llama with random weights in bfloat16 and a reward adapter, and runs each of three trainings for two
iterations: SFT with an adapter; PPO with actor, critic, reference and reward model as adapters of one base; PPO with
four whole models. All texts have 96 tokens, 32 of them the prompt, and the three trainings have micro-batches of the
same size. Prints the peaks of:

- the bytes of all tensors alive, counted by the allocator, in a process of its own;
- the resident memory of the process (VmHWM), above that before loading, and in all, with Python and its libraries.

glibc's allocator keeps much of the memory that tensors have freed. With a fixed threshold, it returns the memory of
tensors of 256 KiB and more to the system at once. The resident memory of each training is measured in two processes,
the second with this fixed threshold.
"""

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from itertools import accumulate
from pathlib import Path
from typing import Any

import lightning
import torch
from models import word_tokenizer, write_models
from safetensors.torch import load_file, save_file
from torch.profiler import ProfilerActivity, profile

from lit_rlhf import (
    SFT,
    ActivationCheckpointing,
    Demonstrations,
    LoRA,
    PolicyGradient,
    Prompts,
    RewardModel,
    Sampling,
    Update,
)
from lit_rlhf.models.adapted import load_adapted_reward_model
from lit_rlhf.models.trained_adapter import TrainedAdapter

PROMPT, RESPONSE, ROWS = 32, 64, 8
RANK = 16
RUNS = {"sft": "SFT, adapter", "adapters": "PPO, four roles on one base", "whole": "PPO, four whole models"}


def write_inputs(folder: Path, options: argparse.Namespace) -> None:
    """Write the models, an adapter of a reward model, and the texts."""
    write_models(folder, hidden=options.hidden, layers=options.layers, prompt=PROMPT)
    for path in folder.glob("*/*.safetensors"):
        save_file({name: x.bfloat16() for name, x in load_file(path).items()}, path, {"format": "pt"})
    lora = LoRA(rank=RANK)
    reward = load_adapted_reward_model(str(folder / "policy"), lora, "reward")
    weights = {name.removeprefix("trunk."): p.detach().normal_(std=0.01) for name, p in reward.own_parameters().items()}
    head: torch.nn.Linear = reward.head  # type: ignore[assignment]
    adapter = TrainedAdapter(
        source=str(folder / "policy"),
        lora=lora,
        name="reward",
        weights={name: x for name, x in weights.items() if ".lora_" in name},
        head=head,
    )
    adapter.save(word_tokenizer(4096), folder / "reward_adapter", "")
    prompts = (json.loads(line)["prompt"] for line in (folder / "prompts.jsonl").open())
    texts = ({"prompt": prompt, "response": " ".join(prompt.split() * (RESPONSE // PROMPT))} for prompt in prompts)
    (folder / "texts.jsonl").write_text("".join(json.dumps(text) + "\n" for text in texts))


def training(run: str, folder: Path, max_tokens: int) -> tuple[Any, Any]:
    """Return the module and the data of one of the trainings."""
    policy, adapter = str(folder / "policy"), None if run == "whole" else LoRA(rank=RANK)
    if run == "sft":
        texts = Demonstrations(
            train=str(folder / "texts.jsonl"), prompt="prompt", response="response", batch_size=ROWS,
            max_tokens=PROMPT + RESPONSE + 2,
        )  # fmt: skip
        return SFT(policy, max_tokens=max_tokens, adapter=adapter, iterations=2), texts
    module = PolicyGradient(
        actor=policy,
        critic="reward",
        rewards=[RewardModel(str(folder / ("reward" if run == "whole" else "reward_adapter")), max_tokens=max_tokens)],
        sampling=Sampling(max_tokens=RESPONSE, min_tokens=RESPONSE),
        update=Update(epochs=1, minibatches=1, max_tokens=max_tokens),
        adapter=adapter,
        iterations=2,
    )
    return module, Prompts(train=str(folder / "prompts.jsonl"), batch_size=ROWS, max_tokens=PROMPT)


class Counted(lightning.Callback):
    """A callback that counts the bytes of the tensors alive in a fit, from its set-up on, and those of the weights."""

    def __init__(self, counts: bool) -> None:
        self.profiler = profile(activities=[ProfilerActivity.CPU], profile_memory=True) if counts else None
        self.peak = self.weights = self.before = 0

    def setup(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Begin to count."""
        self.before = resident()
        if self.profiler is not None:
            os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1"  # the profiler does not see the memory of other threads
            gc.collect()
            self.profiler.__enter__()

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Count the weights."""
        storages = [x.untyped_storage() for x in pl_module.parameters()]
        self.weights = sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Find the peak."""
        if self.profiler is not None:
            self.profiler.__exit__(None, None, None)
            events = [e for e in self.profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
            events.sort(key=lambda event: event.start_ns())
            self.peak = max(accumulate(event.nbytes() for event in events))


def resident() -> int:
    """Return the largest resident memory that this process has had, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def measure(run: str, folder: Path, options: argparse.Namespace) -> None:
    """Train in this process, and print the peak as a line of JSON."""
    warnings.filterwarnings("ignore")
    module, data = training(run, folder, options.max_tokens)
    counted = Counted(options.counts)
    trainer = lightning.Trainer(
        accelerator="cpu", devices=1, precision=options.precision, inference_mode=False, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[counted, *([ActivationCheckpointing()] if options.recompute else [])],
    )  # fmt: skip
    trainer.fit(module, datamodule=data)
    found = {"before": counted.before, "resident": resident(), "alive": counted.peak, "weights": counted.weights}
    print(json.dumps(found | {"seconds": time.process_time()}))


def main() -> None:
    """Write the inputs, run each training three times, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--layers", type=int, default=13)
    parser.add_argument("--max-tokens", type=int, default=96)
    parser.add_argument("--precision", default="32-true")
    parser.add_argument("--recompute", action="store_true", help="use ActivationCheckpointing in all three")
    for name in ("--run", "--folder"):  # for the processes that this process starts
        parser.add_argument(name, help=argparse.SUPPRESS)
    parser.add_argument("--counts", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        measure(options.run, Path(options.folder), options)
        return
    found: dict[str, list[int]] = {}
    with tempfile.TemporaryDirectory() as folder:
        write_inputs(Path(folder), options)
        print("| MB | tensors alive | resident above the start | in all | above the start, fixed | in all, fixed |")
        print("|---|---|---|---|---|---|")
        for run, title in RUNS.items():
            arguments = ["--run", run, "--folder", folder, *sys.argv[1:]]
            found[run] = [in_a_process(*arguments, "--counts")["alive"]]
            for environment in ({}, {"MALLOC_MMAP_THRESHOLD_": str(2**18)}):
                taken = in_a_process(*arguments, **environment)
                found[run] += [taken["resident"] - taken["before"], taken["resident"]]
            print(f"| {title} | " + " | ".join(f"{size / 1e6:,.0f}" for size in found[run]) + " |", flush=True)
    for other in ("sft", "whole"):
        ratios = (mine / its for mine, its in zip(found["adapters"], found[other], strict=True))
        print(f"| {RUNS['adapters']} / {RUNS[other]} | " + " | ".join(f"{ratio:.2f}" for ratio in ratios) + " |")


def in_a_process(*words: str, **environment: str) -> dict[str, int]:
    """Return what `measure` prints in another process with these arguments and environment variables."""
    command, variables = [sys.executable, __file__, *words], os.environ | environment
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=variables)
    result: dict[str, int] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


if __name__ == "__main__":
    main()
