"""The rows with numbers that are not finite, as records for the file of an incident."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lit_rlhf.algorithms.masked import masked_mean
from lit_rlhf.models.sharding import unsharded
from lit_rlhf.modules.decoding import response_text, token_texts
from lit_rlhf.modules.losses import Losses
from lit_rlhf.modules.metrics import Metrics
from lit_rlhf.types import DemonstrationBatch, Experience, PreferenceBatch, RewardInputs, Rollout

Record: TypeAlias = dict[str, Any]
AROUND = 8
"""The number of tokens that a record shows before the first number that is not finite, and after it."""
MOST_POSITIONS = 100
"""The maximum number of positions of numbers that are not finite in each tensor of a record."""


def not_finite(x: Tensor) -> list[int]:
    """Return the indices at which a tensor of shape [N] is not finite."""
    return (~x.isfinite()).nonzero().squeeze(1).tolist()


def response_records(
    tokenizer: PreTrainedTokenizerBase,
    rollout: Rollout,
    numbers: Mapping[str, Tensor],
    *,
    inputs: RewardInputs | None = None,
    rows: Sequence[int] | None = None,
    cause: str | None = None,
) -> list[Record]:
    """Return a record for each response that has a number that is not finite.

    Args:
        tokenizer: The tokenizer of the actor.
        rollout: The responses.
        numbers: Numbers of the responses by name, [B], or of their tokens, [B, T]; finite outside the response mask.
        inputs: The texts of the same responses; None to decode them.
        rows: The row of each response in the whole batch; None for 0, 1, ….
        cause: The name of the numbers of which one must not be finite; None for any.
    """
    judged = numbers.values() if cause is None else [numbers[cause]]
    bad = torch.stack([(~x.isfinite()).view(len(x), -1).any(1) for x in judged]).any(0)
    records = []
    for i in bad.nonzero().squeeze(1).tolist():
        start, length = int(rollout.prompt_lengths[i]), int(rollout.response_lengths[i])
        tokens = rollout.tokens[i, : start + length].tolist()
        decoded = tokenizer.decode(tokens[:start], skip_special_tokens=True)
        whole = {name: x[i].item() for name, x in numbers.items() if x.ndim == 1}
        of_tokens = {name: x[i, :length] for name, x in numbers.items() if x.ndim > 1}
        records.append(
            {
                "row": i if rows is None else rows[i],
                "prompt_number": int(rollout.group[i]),
                "prompt": decoded if inputs is None else inputs.prompts[i],
                "response": response_text(tokenizer, tokens, start, start + length),
                "prompt_tokens": start,
                "response_tokens": length,
                "terminated": bool(rollout.terminated[i]),
                "not_finite": {name: None for name, value in whole.items() if not math.isfinite(value)}
                | _positions(of_tokens),
                **whole,
                "tokens": _window(tokenizer, tokens[start:], of_tokens),
            }
        )
    return records


def _positions(of_tokens: Mapping[str, Tensor]) -> dict[str, list[int]]:
    """Return the positions of the numbers that are not finite, by the name of the tensor."""
    found = {name: not_finite(x)[:MOST_POSITIONS] for name, x in of_tokens.items()}
    return {name: positions for name, positions in found.items() if positions}


def _window(
    tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int], of_tokens: Mapping[str, Tensor]
) -> dict[str, list[Any]]:
    """Return the tokens around the first number that is not finite, or the last tokens if there is no such number."""
    found = [positions[0] for positions in _positions(of_tokens).values()]
    middle = min(found) if found else len(tokens)
    first, end = max(0, middle - AROUND), min(len(tokens), middle + AROUND + 1)
    numbers = {name: x[first:end].tolist() for name, x in of_tokens.items()}
    return {"position": list(range(first, end)), "text": token_texts(tokenizer, tokens)[first:end], **numbers}


# ------------------------------------------------------------------- the rows of a step


@torch.no_grad()
def experience_records(module: Any, minibatch: Experience, losses: Losses) -> list[Record]:
    """Compute the losses of this process's share of a minibatch, and return the rows in which one is not finite.

    Args:
        module: The `OnPolicy` module that trains; all processes call this function together.
        minibatch: The rows of all processes.
        losses: The losses of the actor and the critic.
    """
    rank, world_size = module.on_rank()
    rows = torch.arange(rank, len(minibatch.advantages), world_size)
    records: list[Record] = []
    with unsharded(module.actor, module.critic, module.reference):
        for chunk in _chunks(rows, minibatch.rollout.tokens.shape[1], module.max_tokens):
            part = minibatch.select(chunk.to(minibatch.advantages.device))
            numbers = _losses_of_tokens(part, losses)
            records += response_records(module.tokenizer, part.rollout, numbers, rows=chunk.tolist())
    return records


def _losses_of_tokens(part: Experience, losses: Losses) -> dict[str, Tensor]:
    """Return the loss of each token and the numbers from which it is computed, [b, t] each, 0 outside the mask."""
    rollout, scratch = part.rollout, Metrics(part.advantages.device)
    numbers = {"old_logprobs": part.old_logprobs, "ref_logprobs": part.ref_logprobs, "advantages": part.advantages}
    stats = None
    if "policy" in losses.parts:
        policy = losses.policy(part, scratch)
        stats = policy.stats
        numbers |= {"logprobs": rollout.at_responses(stats.logprobs), "policy_loss": policy.loss}
    if part.values is not None:
        numbers |= {"values": part.values, "returns": part.returns, "value_loss": losses.value(part, stats, scratch)}
    mask = rollout.response_mask
    return {name: torch.where(mask, x, 0.0) for name, x in numbers.items() if x is not None}


@torch.no_grad()
def preference_records(module: Any, batch: PreferenceBatch) -> list[Record]:
    """Compute the scores and losses of a batch, and return a record for each ranking in which one is not finite.

    Args:
        module: The `PreferenceModule` that trains; all processes call this function together.
        batch: This process's rankings.
    """
    records = []
    with unsharded(*module.children()):
        for part in module.micro_batches(batch):
            numbers = {name: part.by_ranking(x) for name, x in module.numbers_of(part).items()}
            losses = module.loss(numbers["scores"], part)
            bad = torch.stack([~losses.isfinite(), *((~x.isfinite()).any(1) for x in numbers.values())]).any(0)
            for i in bad.nonzero().squeeze(1).tolist():
                count = int(part.mask[i].sum())
                of_ranking = {name: x[i, :count] for name, x in numbers.items()}
                whole = {"loss": None} if not losses[i].isfinite() else {}
                records.append(
                    {
                        "row": int(part.number[i]),
                        **_ranked_texts(module.tokenizer, part, part.ranking[i, :count].tolist()),
                        "tokens": part.lengths[part.ranking[i, :count]].tolist(),
                        "not_finite": whole | _positions(of_ranking),
                        **{name: x.tolist() for name, x in of_ranking.items()},
                        "loss": losses[i].item(),
                    }
                )
    return records


def _ranked_texts(tokenizer: PreTrainedTokenizerBase, batch: PreferenceBatch, rows: Sequence[int]) -> Record:
    """Return the prompt of a ranking and its responses, best first; those of a pair as ``chosen`` and ``rejected``."""
    starts, ends = batch.prompt_lengths.tolist(), batch.lengths.tolist()
    responses = [response_text(tokenizer, batch.tokens[row].tolist(), starts[row], ends[row]) for row in rows]
    prompt = tokenizer.decode(batch.tokens[rows[0], : starts[rows[0]]].tolist(), skip_special_tokens=True)
    texts = dict(zip(("chosen", "rejected"), responses, strict=True)) if len(rows) == 2 else {"responses": responses}
    return {"prompt": prompt, **texts}


@torch.no_grad()
def demonstration_records(module: Any, batch: DemonstrationBatch) -> list[Record]:
    """Compute the log-probabilities of a batch, and return a record for each row in which one is not finite.

    Args:
        module: The `SFT` module that trains; all processes call this function together.
        batch: This process's rows.
    """
    records = []
    with unsharded(module.actor):
        for chunk in _chunks(torch.arange(len(batch.tokens)), batch.tokens.shape[1], module.max_tokens):
            part = batch.select(chunk.to(batch.tokens.device))
            logprobs = module.actor(part.tokens, part.mask, positions=part.positions).logprobs
            logprobs = torch.where(part.mask, logprobs, 0.0)
            for i in (~logprobs.isfinite()).any(1).nonzero().squeeze(1).tolist():
                tokens = part.tokens[i, : int(part.lengths[i])].tolist()
                numbers = {"logprobs": logprobs[i, : len(tokens)]}
                records.append(
                    {
                        "row": int(chunk[i]),
                        "text": module.tokenizer.decode(tokens, skip_special_tokens=True),
                        "not_finite": _positions(numbers),
                        "loss": -masked_mean(logprobs[i], part.mask[i]).item(),
                        "tokens": _window(module.tokenizer, tokens, numbers),
                    }
                )
    return records


def _chunks(rows: Tensor, width: int, max_tokens: int) -> list[Tensor]:
    """Return the rows, [N] int64, in chunks of at most ``max_tokens`` tokens with padding, or of one row."""
    return [chunk for chunk in rows.split(max(1, max_tokens // width)) if len(chunk)]
