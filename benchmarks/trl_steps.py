"""Trains with a trainer of TRL (trl 1.16), and writes the time and the loss of each step; against_trl.py starts it.

    ENV/bin/python benchmarks/trl_steps.py JOB.json

It runs in TRL's own environment, so it imports nothing of lit-rlhf: ``python -m venv ENV`` and
``ENV/bin/pip install "torch>=2.9,<2.14" transformers accelerate datasets trl==1.16.0``. Records are read in the order
of the file. The file steps.json in the folder of the output receives the seconds, the loss, and the tokens, with
padding, of each step.
"""

import itertools
import json
import sys
import time
from pathlib import Path
from typing import Any


def score(completions: list[str], **_: Any) -> list[float]:
    """Score responses by the mean code of their characters; a reward function for both trainers."""
    return [sum(map(ord, text)) / max(1, len(text)) / 100.0 for text in completions]


class Steps:
    """The time, the loss and the tokens of each step."""

    def __init__(self) -> None:
        self.ends: list[float] = []
        self.losses: list[float] = []
        self.tokens: list[int] = []
        self._parts: list[float] = []  # the losses of the micro-batches of the step
        self._count = 0

    def add(self, inputs: dict[str, Any], loss: Any) -> None:
        """Count a micro-batch."""
        names = ("input_ids",) if "input_ids" in inputs else ("prompt_ids", "completion_ids")
        self._count += sum(inputs[name].numel() for name in names)
        self._parts.append(float(loss.detach()))

    def end(self) -> None:
        """End a step."""
        self.ends.append(time.perf_counter())
        self.losses.append(sum(self._parts) / len(self._parts))
        self.tokens.append(self._count)
        self._parts, self._count = [], 0

    def write(self, file: Path) -> None:
        """Write the file."""
        seconds = [after - before for before, after in itertools.pairwise(self.ends)]
        file.write_text(json.dumps({"seconds": seconds, "losses": self.losses, "tokens": self.tokens}))


def common(job: dict[str, Any]) -> dict[str, Any]:
    """Return the options that all of TRL's trainers have."""
    micro_batch = job["trl_micro_batch"]
    return {
        "output_dir": job["output"],
        "max_steps": job["steps"],
        "per_device_train_batch_size": micro_batch,
        "gradient_accumulation_steps": job["trl_batch"] // micro_batch,
        "learning_rate": job["rate"],
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "seed": 42,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": "none",
        "logging_strategy": "no",
        "save_strategy": "no",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }


def parts(job: dict[str, Any]) -> tuple[Any, Any, dict[str, Any]]:
    """Return the class of the trainer, its configuration, and its other arguments."""
    import trl

    options, method = common(job), job["method"]
    if method == "dpo":
        config = trl.DPOConfig(train_sampling_strategy="sequential", max_length=job["max_tokens"], **options)
        return trl.DPOTrainer, config, {}
    if method == "reward":
        config = trl.RewardConfig(train_sampling_strategy="sequential", max_length=job["max_tokens"], **options)
        return trl.RewardTrainer, config, {}
    if method == "sft":
        sft = {"train_sampling_strategy": "sequential", "max_length": job["max_tokens"], "packing": True}
        return trl.SFTTrainer, trl.SFTConfig(**sft, **options), {}
    config = trl.GRPOConfig(
        num_generations=job["group"],
        max_completion_length=job["response"],
        generation_kwargs={"min_new_tokens": job["response"]},
        beta=job["kl_coef"],
        loss_type="grpo",
        shuffle_dataset=False,
        **options,
    )
    return trl.GRPOTrainer, config, {"reward_funcs": score}


def main() -> None:
    """Train, save the model, and write the file."""
    job = json.loads(Path(sys.argv[1]).read_text())
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback

    kind, config, more = parts(job)
    steps = Steps()

    class Clock(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            steps.ends.append(time.perf_counter())

        def on_step_end(self, *_: Any, **__: Any) -> None:
            steps.end()

    class Counted(kind):  # type: ignore[misc, valid-type]
        def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **named: Any) -> Any:
            found = super().compute_loss(model, inputs, *args, **named)
            steps.add(inputs, found[0] if isinstance(found, tuple) else found)
            return found

    loader = AutoModelForSequenceClassification if job["method"] == "reward" else AutoModelForCausalLM
    records = [json.loads(line) for line in Path(job["trl"]).read_text(encoding="utf-8").splitlines()]
    trainer = Counted(
        model=loader.from_pretrained(job["model"], dtype=torch.float32),
        args=config,
        train_dataset=Dataset.from_list(records),
        processing_class=AutoTokenizer.from_pretrained(job["model"]),
        callbacks=[Clock()],
        **more,
    )
    trainer.train()
    if job["method"] not in ("dpo", "reward"):
        steps.losses = []  # some trainers divide the loss of a micro-batch by the tokens of the whole batch
    steps.write(Path(job["output"], "steps.json"))
    trainer.save_model(str(Path(job["output"], "export")))


if __name__ == "__main__":
    main()
