"""Rollouts as text: inputs for the rewards, and records of the responses."""

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from lit_rlhf.types import PromptBatch, RewardInputs, Rollout


def decode(
    rollout: Rollout, batch: PromptBatch, tokenizer: PreTrainedTokenizerBase, iteration: int = 0
) -> RewardInputs:
    """Return the inputs of the rewards: the decoded responses, each with its prompt and the columns of that prompt.

    Args:
        rollout: n responses for each prompt of the batch, in prompt-major order.
        batch: The prompts that the rollout answers, with their columns.
        tokenizer: The tokenizer of the actor.
        iteration: The number of iterations that were completed before this rollout.
    """
    n = len(rollout.tokens) // len(batch.prompts)
    starts, ends = rollout.prompt_lengths.tolist(), rollout.lengths.tolist()
    tokens = rollout.tokens.tolist()
    return RewardInputs(
        prompts=[prompt for prompt in batch.prompts for _ in range(n)],
        responses=[response_text(tokenizer, tokens[i], starts[i], ends[i]) for i in range(len(tokens))],
        columns={name: [value for value in values for _ in range(n)] for name, values in batch.columns.items()},
        rollout=rollout,
        iteration=iteration,
    )


def as_records(reward_inputs: RewardInputs) -> list[dict[str, Any]]:
    """Return one record per response: its prompt's columns, its prompt, its text, and whether a stop token ended it."""
    return [
        {
            **{name: values[i] for name, values in reward_inputs.columns.items()},
            "prompt": reward_inputs.prompts[i],
            "response": response,
            "terminated": bool(reward_inputs.rollout.terminated[i]),
        }
        for i, response in enumerate(reward_inputs.responses)
    ]


def token_texts(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int]) -> list[str]:
    """Return the text that each token adds to the text of the tokens before it, special tokens included.

    Where several tokens make up one character, the text of the last token is this character, and the other texts are
    empty.
    """
    texts, start, end = [], 0, 0  # the text of the tokens up to `end` is known; decoding continues from `start`
    for after in range(1, len(tokens) + 1):
        known, longer = (str(tokenizer.decode(list(tokens[start:to]))) for to in (end, after))
        if after < len(tokens) and longer.endswith("\N{REPLACEMENT CHARACTER}"):
            texts.append("")
            continue
        texts.append(longer[len(known) :])
        start, end = end, after
    return texts


def response_text(tokenizer: PreTrainedTokenizerBase, tokens: list[int], start: int, end: int) -> str:
    """Decode the prompt and the response together, and return the text without the prompt.

    A tokenizer may drop the space before the first token of a text, so the response is decoded alone only if the joint
    text does not start with the text of the prompt.
    """
    prompt = str(tokenizer.decode(tokens[:start], skip_special_tokens=True))
    both = str(tokenizer.decode(tokens[:end], skip_special_tokens=True))
    if both.startswith(prompt):
        return both[len(prompt) :]
    return str(tokenizer.decode(tokens[start:end], skip_special_tokens=True))
