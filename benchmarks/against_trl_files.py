"""Writes the models and the records of against_trl.py, for lit-rlhf and for TRL, in the order in which both read them.

The larger model is the one of models.py, a Llama of 7.2 million parameters, with a byte-level tokenizer that is trained
on the pairs. TRL's file has the records in the order in which lit-rlhf's loader draws them from its own file.
"""

import argparse
import itertools
import json
import os
import random
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from against_trl import CHECK_BATCH, CHECK_STEPS, MAX_TOKENS, TASKS, Task
from models import write_models
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from lit_rlhf.data.loader import GlobalBatches

Record = dict[str, str]
SPECIAL = ["<pad>", "<eos>", "<bos>", "<unk>"]  # the ids that models.py uses
VOCABULARY = 4096
SEED = "42"


def byte_tokenizer(texts: Sequence[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Return a byte-level tokenizer with at most ``vocabulary`` tokens, trained on texts."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    pad, eos, bos, unk = SPECIAL
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=pad, eos_token=eos, bos_token=bos, unk_token=unk, padding_side="left"
    )


def write_llama(folder: Path, texts: Sequence[str], **shape: int) -> Path:
    """Write FOLDER/policy and FOLDER/reward, with one tokenizer, which is trained on the texts."""
    vocabulary = shape.pop("vocabulary", VOCABULARY)
    write_models(folder, vocabulary=vocabulary, prompts=1, **shape)
    tokenizer = byte_tokenizer(texts, vocabulary)
    for name in ("policy", "reward"):
        tokenizer.save_pretrained(folder / name)
    return folder


def read_pairs(file: Path) -> list[Record]:
    """Return the pairs, with a space before each response, so that no token has characters of prompt and response."""
    lines = (json.loads(line) for line in file.read_text(encoding="utf-8").splitlines())
    return [
        {"prompt": line["prompt"], "chosen": f" {line['chosen']}", "rejected": f" {line['rejected']}"} for line in lines
    ]


def lengths(tokenizer: Any, pair: Record) -> tuple[int, int, int]:
    """Return the tokens of the prompt, and those of the two responses with their end of sequence."""
    prompt, chosen, rejected = (
        len(tokenizer(text)["input_ids"])
        for text in (pair["prompt"], pair["prompt"] + pair["chosen"], pair["prompt"] + pair["rejected"])
    )
    return prompt, chosen - prompt + 1, rejected - prompt + 1


def random_prompts(tokenizer: Any, tokens: int, count: int) -> list[str]:
    """Return texts of random words that have exactly ``tokens`` tokens each, special tokens included."""
    draw = random.Random(0)
    pieces = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    words = [piece[1:] for piece in pieces if piece[0] in "▁Ġ" and piece[1:].isascii() and piece[1:].isalpha()]
    extra = len(tokenizer("")["input_ids"])
    found: list[str] = []
    for _ in range(1000 * count):
        text = " ".join(draw.choices(words, k=tokens - extra))
        if len(tokenizer(text)["input_ids"]) == tokens:
            found.append(text)
        if len(found) == count:
            return found
    raise SystemExit(f"--stories: no texts of {tokens} tokens can be made of the words of its vocabulary")


def write_job(folder: Path, task: Task, steps: int, models: dict[str, Path], pairs: Sequence[Record]) -> dict[str, Any]:
    """Write the records of a task, and return the description of its run.

    Args:
        folder: The folder for the records.
        task: The task.
        steps: The number of steps.
        models: The folders of the models, by `Task.model`; that of the larger one has a policy and a reward model.
        pairs: The pairs, of which none has more than `MAX_TOKENS` tokens.
    """
    folder.mkdir(parents=True)
    llama = "reward" if task.method == "reward" else "policy"
    model = models[task.model] / llama if task.model == "7.2M" else models[task.model]
    tokenizer = AutoTokenizer.from_pretrained(model)
    size = task.batch // task.group if task.method == "grpo" else task.batch  # records in a step
    if task.method == "grpo":
        records = [{"prompt": text} for text in random_prompts(tokenizer, task.prompt, steps * size)]
        counts = {"tokens": float(task.batch * (task.prompt + task.response))}
        counts["once"] = float(size * task.prompt + task.batch * task.response)
    else:
        if len(pairs) < steps * size:
            raise SystemExit(
                f"--steps: {steps} steps of {size} pairs need more than the {len(pairs)} that are short enough"
            )
        records = list(pairs[: steps * size])
        counts = counted(task, [lengths(tokenizer, pair) for pair in records], steps)
    if task.method == "sft":
        records = [{"prompt": pair["prompt"], "completion": pair["chosen"]} for pair in records]
    os.environ["PL_GLOBAL_SEED"] = SEED
    batches = GlobalBatches(len(records), size, shuffle=True).epoch(0)
    drawn = [records[row] for _, row in itertools.chain.from_iterable(batches)]
    for name, rows in (("ours", records), ("trl", drawn)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    rows = max(1, int(counts["tokens"] // MAX_TOKENS))  # TRL packs before it batches
    trl_batch = rows if task.method == "sft" else task.batch
    return (
        asdict(task)
        | counts
        | {
            "model": str(model),
            "steps": steps,
            "kl_coef": 0.02,
            "max_tokens": MAX_TOKENS,
            "trl_batch": trl_batch,
            "trl_micro_batch": task.micro_batch or trl_batch,
            "ours": str(folder / "ours.jsonl"),
            "trl": str(folder / "trl.jsonl"),
        }
    )


def counted(task: Task, rows: Sequence[tuple[int, int, int]], steps: int) -> dict[str, float]:
    """Return the mean tokens of a step, with the prompt of each response and with each prompt once."""
    if task.method == "sft":
        once = sum(prompt + chosen for prompt, chosen, _ in rows) / steps
        return {"tokens": once, "once": once}
    once = sum(map(sum, rows)) / steps
    return {"tokens": once + sum(prompt for prompt, _, _ in rows) / steps, "once": once}


def main() -> None:
    """Write all files, and the descriptions of the runs to jobs.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--pairs", type=Path, required=True)
    parser.add_argument("--stories", type=Path)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--tasks", nargs="+", required=True)
    options = parser.parse_args()
    pairs = read_pairs(options.pairs)
    models = {"7.2M": write_llama(options.folder / "llama", [text for pair in pairs for text in pair.values()])}
    if options.stories:
        models["260K"] = options.stories.resolve()
    tokenizer = AutoTokenizer.from_pretrained(models["7.2M"] / "policy")
    counts = ((pair, lengths(tokenizer, pair)) for pair in pairs)
    kept = [pair for pair, (prompt, *responses) in counts if prompt + max(responses) <= MAX_TOKENS]
    jobs = {}
    for name in options.tasks:
        task = TASKS[name]
        jobs[name] = write_job(options.folder / name, task, options.steps * task.times, models, kept)
        if task.method in ("dpo", "reward"):
            small = replace(task, batch=CHECK_BATCH, micro_batch=None)
            jobs[f"{name} check"] = write_job(options.folder / f"{name}_check", small, CHECK_STEPS, models, kept)
    (options.folder / "jobs.json").write_text(json.dumps(jobs))


if __name__ == "__main__":
    main()
