"""Measures the time of TRL's PPOTrainer (trl 1.12.0, the last release that has it); prints one JSON line.

    python benchmarks/trl_ppo.py MODELS [--iterations 4] [--response 256]

It does the same work as ours_ppo.py on the same models: 64 prompts, 4 epochs of 4 minibatches, separate models; but
TRL adds up the gradients of an epoch's minibatches, for one optimizer step. It needs a separate environment:
``pip install "torch>=2.9,<2.14" transformers accelerate datasets pandas`` and ``pip install --no-deps trl==1.12.0``.
"""

import argparse
import itertools
import json
import os
import resource
import statistics
import tempfile
import time
from pathlib import Path

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("models", type=Path)
parser.add_argument("--iterations", type=int, default=4)
parser.add_argument("--batch", type=int, default=64)
parser.add_argument("--response", type=int, default=256)


def main() -> None:
    """Train, and print the measurements."""
    options = parser.parse_args()
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback
    from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

    torch.manual_seed(1)
    policy, reward = options.models / "policy", options.models / "reward"
    tokenizer = AutoTokenizer.from_pretrained(policy, padding_side="left")
    texts = [json.loads(line)["prompt"] for line in (options.models / "prompts.jsonl").read_text().splitlines()]
    generating: list[float] = []
    counted: list[int] = []
    ends: list[float] = []
    generate = ppo_trainer.batch_generation

    def timed(model: object, queries: torch.Tensor, *others: object, **named: object) -> tuple[torch.Tensor, ...]:
        began = time.perf_counter()
        answer = generate(model, queries, *others, **named)
        generating.append(time.perf_counter() - began)
        is_end = (answer[0][:, queries.shape[1] :] == tokenizer.eos_token_id).int()
        counted.append(int((is_end.cumsum(1) - is_end == 0).sum()))
        return answer

    class Clock(TrainerCallback):
        def on_train_begin(self, *_: object, **__: object) -> None:
            ends.append(time.perf_counter())

        def on_step_end(self, *_: object, **__: object) -> None:
            ends.append(time.perf_counter())

    ppo_trainer.batch_generation = timed
    trainer = PPOTrainer(
        args=PPOConfig(
            output_dir=tempfile.mkdtemp(),
            per_device_train_batch_size=options.batch // 4,
            gradient_accumulation_steps=4,
            num_mini_batches=4,
            num_ppo_epochs=4,
            local_rollout_forward_batch_size=options.batch,
            total_episodes=options.batch * options.iterations,
            response_length=options.response,
            temperature=1.0,
            stop_token="eos",
            learning_rate=1e-6,
            report_to=[],
            num_sample_generations=0,
            save_strategy="no",
            use_cpu=not torch.cuda.is_available(),
        ),
        processing_class=tokenizer,
        model=AutoModelForCausalLM.from_pretrained(policy, dtype=torch.float32),
        ref_model=AutoModelForCausalLM.from_pretrained(policy, dtype=torch.float32),
        reward_model=AutoModelForSequenceClassification.from_pretrained(reward, dtype=torch.float32),
        value_model=AutoModelForSequenceClassification.from_pretrained(reward, dtype=torch.float32),
        train_dataset=Dataset.from_dict({"input_ids": [tokenizer(text)["input_ids"] for text in texts]}),
    )
    trainer.add_callback(Clock())
    trainer.train()
    seconds = [after - before for before, after in itertools.pairwise(ends)]
    warm = slice(1, None) if len(seconds) > 1 else slice(None)
    print(
        json.dumps(
            {
                "seconds": [round(x, 3) for x in seconds],
                "median": statistics.median(seconds[warm]),
                "generate": statistics.median(generating[warm]),
                "response_tokens": counted[warm],
                "peak_memory_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
            }
        )
    )


if __name__ == "__main__":
    main()
