"""Responses to held-out prompts, and their metrics."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lit_rlhf.algorithms.kl import k1
from lit_rlhf.algorithms.masked import masked_sum
from lit_rlhf.algorithms.pass_rates import majority_correct, pass_at_k
from lit_rlhf.models.actor import Actor
from lit_rlhf.modules.decoding import decode
from lit_rlhf.modules.diversity import DistinctNGrams, SelfSimilarity
from lit_rlhf.modules.failed_rewards import FAILED_FRACTION, failed_prompts, has_failed, tell_failures
from lit_rlhf.modules.forwards import response_logprobs
from lit_rlhf.modules.incidents import check_rewards
from lit_rlhf.modules.metrics import Metrics, pop_standard_deviation
from lit_rlhf.randomness import Stream
from lit_rlhf.rewards import Scores
from lit_rlhf.types import PromptBatch, RewardInputs, Rollout


@torch.no_grad()
def evaluate(module: Any, batch: PromptBatch, batch_idx: int) -> dict[str, Any]:
    """Generate and score the actor's and any reference's responses to held-out prompts, and record their metrics.

    If the module averages the actor's weights, the actor's responses are generated with the averaged weights.

    Args:
        module: The `OnPolicy` module; its ``reference_answers`` hold the reference's responses from earlier in the run.
        batch: The prompts.
        batch_idx: The index of the batch; the random numbers are the same whenever this batch is evaluated.

    Returns:
        A dictionary for callbacks. It has the actor's responses (``reward_inputs``), their ``scores``, [B], their
        unweighted ``rewards`` by name, [B] each, and their KL to the reference in nats, both per response
        (``kl_to_ref``, [B]) and per token (``kl_of_tokens``, [B, T]). Its entry ``reference`` has the texts and the
        scores of the reference's responses. Without a reference, these three entries are missing.

    Raises:
        UserError: if the engine or a reward fails, or if a reward is not finite.
    """

    def respond(actor: Actor) -> RewardInputs:
        rollout = module.generate(batch, actor, Stream.VALIDATION, batch_idx)
        return decode(rollout, batch, module.tokenizer, int(module.iteration))

    with module.with_averaged_weights():
        inputs = respond(module.actor)
        logprobs = module.actor_outputs(inputs.rollout).logprobs
    rewards, scores = _judge(module, inputs)
    measure_held_out(module.held_out, inputs.rollout, scores, rewards)
    outputs = {"reward_inputs": inputs, "scores": scores, "rewards": rewards}
    if module.reference is not None:
        if batch_idx not in module.reference_answers:  # once per run, because the reference does not change
            answers = respond(module.reference)
            judged = _judge(module, answers)[1]
            on_cpu = replace(answers, rollout=answers.rollout.to(torch.device("cpu")))
            module.reference_answers[batch_idx] = on_cpu, judged
        elif module.scores.can_fail:
            answers, before = module.reference_answers[batch_idx]
            module.reference_answers[batch_idx] = answers, _judge_failed_again(module, answers, before)
        answers, reference_scores = module.reference_answers[batch_idx]
        kl_of_tokens = k1(logprobs, response_logprobs(module.reference, inputs.rollout, module.max_tokens))
        kl_to_ref = masked_sum(kl_of_tokens, inputs.rollout.response_mask, 1)
        measure_against_reference(module.held_out, scores, reference_scores, kl_to_ref)
        reference = answers.responses, reference_scores
        outputs |= {"kl_to_ref": kl_to_ref, "kl_of_tokens": kl_of_tokens, "reference": reference}
    if module.scores.can_fail:
        module.held_out.add(FAILED_FRACTION, has_failed(rewards).float())
    measure_answers(module.held_out, module.scores, inputs, rewards, module.sampling.responses)
    return outputs


def _judge(module: Any, inputs: RewardInputs) -> tuple[dict[str, Tensor], Tensor]:
    """Return the rewards of responses by name, and their scores, [B] each; NaN where a reward that may fail did so."""
    rewards, scores = module.scores.judge(inputs)
    left_out = module.scores.left_out(rewards)
    check_rewards({name: x.masked_fill(left_out[name], 0.0) for name, x in rewards.items()}, inputs.responses)
    return rewards, scores


def _judge_failed_again(module: Any, inputs: RewardInputs, scores: Tensor) -> Tensor:
    """Judge the responses again to those prompts for which a reward failed; all processes call this function together.

    Args:
        module: The `OnPolicy` module.
        inputs: The responses, with a rollout on the CPU.
        scores: [B], their scores so far.

    Returns:
        The scores, [B].
    """
    failed = failed_prompts(scores, module.sampling.responses).repeat_interleave(module.sampling.responses)
    if not module.max_over_ranks(int(failed.any()))[0]:
        return scores
    rows = failed.nonzero().squeeze(1)
    rows = rows if len(rows) else rows.new_zeros(1)  # one row, whose score is not used, for the collectives of a call
    selected = inputs.select(rows.cpu())
    again = _judge(module, replace(selected, rollout=selected.rollout.to(scores.device)))[1]
    return torch.where(failed, scores.index_copy(0, rows, again), scores)


def measure_held_out(metrics: Metrics, rollout: Rollout, scores: Tensor, rewards: Mapping[str, Tensor]) -> None:
    """Record scores, rewards, lengths and diversity of responses to held-out prompts.

    A score or a reward that is NaN, because the reward failed, does not count.

    Args:
        metrics: Receives the metrics.
        rollout: The responses, B rows.
        scores: [B], the scores of the responses.
        rewards: The unweighted rewards of the responses by name, [B] each.
    """
    for name, value in {
        "score": scores,
        "score_squared": scores.double() ** 2,
        "length": rollout.response_lengths,
        "truncated_fraction": (~rollout.terminated).float(),
        **{f"rewards/{name}": reward for name, reward in rewards.items()},
    }.items():
        metrics.add_masked(name, value, ~value.isnan())
    tokens = rollout.at_responses(rollout.tokens)
    metrics.update("distinct_2", partial(DistinctNGrams, n=2), tokens, rollout.response_mask)
    metrics.update("self_similarity", partial(SelfSimilarity, n=2), tokens, rollout.response_mask)


def measure_against_reference(metrics: Metrics, scores: Tensor, reference_scores: Tensor, kl_to_ref: Tensor) -> None:
    """Record the reference's scores, the win rate against it and the KL to it.

    The win rate is the fraction of the actor's responses that score higher than the reference's response to the same
    prompt; both are sampled with the same random numbers. A tie counts half. A response without a score (NaN), because
    a reward failed, does not count, nor does the response with which it would be compared.

    Args:
        metrics: Receives the metrics.
        scores: [B], the scores of the actor's responses.
        reference_scores: [B], the scores of the reference's responses.
        kl_to_ref: [B], the KL to the reference in nats per response.
    """
    metrics.add_masked("reference_score", reference_scores, ~reference_scores.isnan())
    metrics.add("kl_to_ref", kl_to_ref)
    wins = (scores > reference_scores).float() + 0.5 * (scores == reference_scores)
    metrics.add_masked("win_rate", wins, ~(scores - reference_scores).isnan())


def measure_answers(
    metrics: Metrics, scores: Scores, reward_inputs: RewardInputs, rewards: Mapping[str, Tensor], responses: int
) -> None:
    """Record pass@k for k = 1, 2, 4, … and n, and majority@n, if a reward checks answers and n is more than 1.

    Prompts with a response that a reward failed to score do not count.

    Args:
        metrics: Receives the metrics, which are means over prompts.
        scores: The rewards of the run; the first of them that checks answers decides what is correct.
        reward_inputs: n responses to each prompt, in prompt-major order.
        rewards: The unweighted rewards of these responses by name, as `Scores.judge` returns them.
        responses: n, the number of responses to each prompt.

    Raises:
        UserError: if a reward does not give one answer for each response.
    """
    checked = scores.check_answers(reward_inputs, rewards) if responses > 1 else None
    if checked is None:
        return
    numbers: dict[Hashable, int] = {None: -1}
    answers = [numbers.setdefault(answer, len(numbers)) for answer in checked.answers]
    correct, counts = checked.correct.view(-1, responses), ~has_failed(rewards).view(-1, responses).any(1)
    for k in [*(2**i for i in range(responses.bit_length()) if 2**i < responses), responses]:
        metrics.add_masked(f"pass_at_{k}", pass_at_k(correct.sum(1), responses, k), counts)
    voted = majority_correct(torch.tensor(answers, device=correct.device).view_as(correct), correct)
    metrics.add_masked(f"majority_at_{responses}", voted, counts)


def summarize_held_out(module: Any, means: dict[str, float]) -> dict[str, float]:
    """Return the means with the standard deviation of the scores and the 95 % confidence interval of any win rate.

    The independent trials of the win rate are the prompts. If a reward failed for the first time, a line is printed.

    Args:
        module: The `OnPolicy` module, whose ``held_out`` metrics are those recorded above.
        means: The means of these metrics; the mean of the squared scores is removed from this dictionary, and is not in
            the result.
    """
    if module.scores.can_fail:
        tell_failures(module, f"the validation after iteration {int(module.iteration)}")
    means = means | {"score_std": pop_standard_deviation(means)}
    if "win_rate" in means:
        compared = torch.tensor(module.held_out.weight("win_rate"), device=module.device)
        prompts = float(module.sum_over_ranks(compared)) / module.sampling.responses
        means["win_rate_low"], means["win_rate_high"] = wilson_interval(means["win_rate"], prompts)
    return means


def wilson_interval(fraction: float, count: float, z: float = 1.96) -> tuple[float, float]:
    """Return the confidence interval of a fraction p of n = ``count`` independent trials; z = 1.96 gives 95 %.

    The bounds are (p + z²/(2n) ± z √(p(1 − p)/n + z²/(4n²))) / (1 + z²/n). Source: Wilson 1927, equation 4.

    Both bounds are NaN if n = 0.

    >>> tuple(round(bound, 3) for bound in wilson_interval(0.5, 100))
    (0.404, 0.596)
    """
    if not count:
        return math.nan, math.nan
    middle = fraction + z**2 / (2 * count)
    spread = z * (fraction * (1 - fraction) / count + z**2 / (4 * count**2)) ** 0.5
    return (middle - spread) / (1 + z**2 / count), (middle + spread) / (1 + z**2 / count)
