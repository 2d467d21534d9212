"""Trains a policy with a trainer of TRL (trl 1.12.0), and saves it along the run; frontier_trl.py starts this script.

It runs in TRL's own environment (see README.md), so it imports nothing of lit-rlhf. The folder of the output receives a
model folder for each saved iteration, named by its number, and ``log.json``: the CPU seconds of the training, the mean
score of the responses of each iteration, and the texts of the first iteration, as tokens, with their scores.

The options that have no argument here are TRL's defaults, except precision (float32), gradient checkpointing (off),
temperature (1), PPO's stop token (the end of the text), the division of a batch, logging and saving. By default, the
learning rate falls linearly to 0.
"""

import argparse
import importlib.util
import inspect
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerBase,
    TrainerCallback,
    set_seed,
)

Score = Callable[[list[str], list[str], list[bool]], list[float]]
"""Maps prompts, responses, and whether a stop token ended each response to the scores."""

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("method", choices=("ppo", "grpo", "rloo"))
parser.add_argument("--model", required=True, help="the folder of the language model")
parser.add_argument("--prompts", type=Path, required=True, help="a file of JSON lines with a field prompt")
parser.add_argument("--reward", help="the folder of a reward model, with score_mean and score_std in its config.json")
parser.add_argument("--function", help="FILE.py:NAME, a reward function, in place of a reward model")
parser.add_argument("--output", type=Path, required=True)
parser.add_argument("--seed", type=int, required=True)
parser.add_argument("--responses", type=int, required=True, help="the number of responses in the whole run")
parser.add_argument("--batch", type=int, required=True, help="the number of responses in an iteration")
parser.add_argument("--group", type=int, default=1, help="the number of responses to a prompt")
parser.add_argument("--epochs", type=int, default=4)
parser.add_argument("--minibatches", type=int, default=1)
parser.add_argument("--max-tokens", type=int, required=True)
parser.add_argument("--kl-coef", type=float, required=True)
parser.add_argument("--rate", type=float, required=True, help="the learning rate")
parser.add_argument("--schedule", default="linear", help="the learning-rate schedule; by default, a linear fall to 0")
parser.add_argument("--truncation-penalty", type=float, help="subtracted from the score of a truncated response")
parser.add_argument("--saves", type=int, default=4, help="the number of times that the policy is saved")


def load_function(reference: str) -> Score:
    """Return a reward function from a file; it is called with those arguments of `Score` that its parameters name."""
    path, _, name = reference.rpartition(":")
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    function = getattr(module, name)
    names = inspect.signature(function).parameters

    def score(prompts: list[str], responses: list[str], terminated: list[bool]) -> list[float]:
        given = {"prompts": prompts, "responses": responses, "terminated": terminated}
        return [float(value) for value in function(**{key: given[key] for key in given if key in names})]

    return score


def load_scorer(folder: str) -> nn.Module:
    """Return a reward model whose head gives (r − mean) / std, with score_mean and score_std of its config.json."""
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
    mean, std = model.config.score_mean, model.config.score_std
    head = nn.Linear(model.config.hidden_size, 1)
    head.weight.data = model.score.weight.data / std
    head.bias.data.fill_(-mean / std)
    model.score = head
    return model


def load_value_model(folder: str) -> nn.Module:
    """Return a value model that starts from a language model, with a head of zeros."""
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1, dtype=torch.float32)
    nn.init.zeros_(model.score.weight)
    return model


class Judge:
    """Scores responses with a reward model or a reward function, and records the scores."""

    def __init__(self, options: argparse.Namespace, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer: Any = tokenizer
        self.model = load_scorer(options.reward) if options.reward else nn.Identity()
        self.function = load_function(options.function) if options.function else None
        self.penalty = options.truncation_penalty
        self.means: list[float] = []
        self.first: dict[str, Any] = {}

    def record(self, texts: list[list[int]], scores: list[float]) -> None:
        """Record the mean score of an iteration and, of the first one, all texts with their scores."""
        self.means.append(sum(scores) / len(scores))
        self.first = self.first or {"tokens": texts, "scores": scores}

    @torch.no_grad()
    def score(self, prompts: list[list[int]], responses: list[list[int]]) -> list[float]:
        """Return the scores of responses to prompts, both as tokens without padding.

        A reward model scores a truncated response with the end-of-sequence token after it, as in lit-rlhf.
        """
        texts = [prompt + response for prompt, response in zip(prompts, responses, strict=True)]
        if self.function is not None:
            starts, wholes = (self.tokenizer.batch_decode(rows, skip_special_tokens=True) for rows in (prompts, texts))
            words = [whole[len(start) :] for start, whole in zip(starts, wholes, strict=True)]
            scores = self.function(starts, words, self._terminated(responses))
        else:
            ends = [[] if ended else [self.tokenizer.eos_token_id] for ended in self._terminated(responses)]
            ended_texts = [torch.tensor(text + end) for text, end in zip(texts, ends, strict=True)]
            lengths = torch.tensor([len(text) for text in ended_texts])
            rows = nn.utils.rnn.pad_sequence(ended_texts, batch_first=True)
            mask = torch.arange(rows.shape[1]) < lengths[:, None]
            hidden = self.model.base_model(input_ids=rows, attention_mask=mask).last_hidden_state
            scores = self.model.score(hidden)[torch.arange(len(rows)), lengths - 1, 0].tolist()
        self.record(texts, scores)
        return scores

    def grouped(self, prompts: list[str], completion_ids: list[list[int]], **_: Any) -> list[float]:
        """Score responses as a reward function of TRL's GRPO and RLOO, with the penalty for truncation, if any."""
        scores = self.score([self.tokenizer(prompt)["input_ids"] for prompt in prompts], completion_ids)
        ended = self._terminated(completion_ids)
        return [score - (0.0 if end else self.penalty or 0.0) for score, end in zip(scores, ended, strict=True)]

    def _terminated(self, responses: list[list[int]]) -> list[bool]:
        return [self.tokenizer.eos_token_id in response for response in responses]


class Saver(TrainerCallback):
    """Saves the policy, evenly along the run and at its end."""

    def __init__(self, policy: Any, tokenizer: Any, options: argparse.Namespace, steps: int) -> None:
        self.policy, self.tokenizer, self.folder, self.steps = policy, tokenizer, options.output, steps
        self.iterations = options.responses // options.batch
        self.every = max(1, self.iterations // options.saves)
        self.seconds = 0.0  # of CPU, spent in saving

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Save the policy if it is time."""
        began = time.process_time()
        iteration, within = divmod(state.global_step, self.steps)
        if not within and (iteration % self.every == 0 or iteration == self.iterations):
            self.policy.save_pretrained(self.folder / str(iteration))
            self.tokenizer.save_pretrained(self.folder / str(iteration))
        self.seconds += time.process_time() - began


def ppo_trainer(options: argparse.Namespace, policy: Any, judge: Judge, texts: list[str]) -> Any:
    """Return TRL's PPOTrainer, with its defaults γ = 1, λ = 0.95 and the KL estimator k1.

    The value model starts from the reward model or, if the reward is a function, from the language model.
    """
    from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

    get_reward = ppo_trainer.get_reward

    def rewarded(model: nn.Module, rows: Tensor, pad: int, context: int) -> tuple[Any, Tensor, Any]:
        if model is not judge.model:
            return get_reward(model, rows, pad, context)  # the value model's
        prompts, responses = (
            [[token for token in row if token != pad] for row in part.tolist()]
            for part in (rows[:, :context], rows[:, context:])
        )
        return None, torch.tensor(judge.score(prompts, responses), device=rows.device), None

    ppo_trainer.get_reward = rewarded
    return PPOTrainer(
        args=PPOConfig(
            per_device_train_batch_size=options.batch,  # with more accumulation, several minibatches would share a step
            gradient_accumulation_steps=1,
            num_mini_batches=options.minibatches,
            num_ppo_epochs=options.epochs,
            local_rollout_forward_batch_size=options.batch,
            total_episodes=options.responses,
            response_length=options.max_tokens,
            stop_token="eos",
            missing_eos_penalty=options.truncation_penalty,
            kl_coef=options.kl_coef,
            num_sample_generations=0,
            **common(options),
        ),
        processing_class=judge.tokenizer,
        model=policy,
        ref_model=AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32),
        reward_model=judge.model,
        value_model=load_scorer(options.reward) if options.reward else load_value_model(options.model),
        train_dataset=Dataset.from_dict({"input_ids": [judge.tokenizer(text)["input_ids"] for text in texts]}),
    )


def grouped_trainer(options: argparse.Namespace, policy: Any, judge: Judge, texts: list[str]) -> Any:
    """Return TRL's GRPOTrainer or RLOOTrainer."""
    import trl

    trainer, config = {
        "grpo": (trl.GRPOTrainer, trl.GRPOConfig),
        "rloo": (trl.RLOOTrainer, trl.RLOOConfig),
    }[options.method]
    return trainer(
        model=policy,
        reward_funcs=judge.grouped,
        args=config(
            per_device_train_batch_size=options.batch // options.minibatches,
            steps_per_generation=options.minibatches,
            num_generations=options.group,
            num_iterations=options.epochs,
            max_steps=options.responses // options.batch * options.minibatches * options.epochs,
            max_completion_length=options.max_tokens,
            beta=options.kl_coef,
            **common(options),
        ),
        train_dataset=Dataset.from_dict({"prompt": texts}),
        processing_class=judge.tokenizer,
    )


def common(options: argparse.Namespace) -> dict[str, Any]:
    """Return the options that all of TRL's trainers have."""
    return {
        "output_dir": str(options.output),
        "temperature": 1.0,
        "learning_rate": options.rate,
        "lr_scheduler_type": options.schedule,
        "seed": options.seed,
        "report_to": [],
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": not torch.cuda.is_available(),
        "bf16": False,
        "gradient_checkpointing": False,
    }


def main() -> None:
    """Train, and write the log."""
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    set_seed(options.seed)
    tokenizer = AutoTokenizer.from_pretrained(options.model, padding_side="left")
    policy = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    texts = [json.loads(line)["prompt"] for line in options.prompts.read_text(encoding="utf-8").splitlines()]
    judge = Judge(options, tokenizer)
    trainer = (ppo_trainer if options.method == "ppo" else grouped_trainer)(options, policy, judge, texts)
    steps = 1 if options.method == "ppo" else options.minibatches * options.epochs
    saver = Saver(policy, tokenizer, options, steps)
    trainer.add_callback(saver)
    began = time.process_time()
    trainer.train()
    seconds = time.process_time() - began - saver.seconds
    log = {"seconds": seconds, "scores": judge.means, "first": judge.first}
    (options.output / "log.json").write_text(json.dumps(log), encoding="utf-8")


if __name__ == "__main__":
    main()
