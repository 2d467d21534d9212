"""The ways in which a reward function can be called: this project's, TRL's, verl's and OpenRLHF's.

The names of a function's parameters show for which trainer it was written.
"""

import asyncio
import inspect
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

from transformers import PreTrainedTokenizerBase

from lit_rlhf.data.columns import value_at
from lit_rlhf.errors import UserError
from lit_rlhf.rewards.calls import call_in_thread
from lit_rlhf.types import Prompt, RewardInputs

SIGNATURES = (
    "f(prompts, responses, **columns), TRL's f(completions, **columns), "
    "verl's f(data_source, solution_str, ground_truth, extra_info) and OpenRLHF's f(queries, prompts, labels)"
)
TRUTHS = ("reward_model.ground_truth", "ground_truth", "answer")
"""The columns that verl's ``ground_truth`` may come from; the first one with a value in the record is used."""
LABELS = ("answer", "label")
"""The columns that OpenRLHF's ``labels`` may come from; the first one that the records have is used."""


def scores_of(
    function: Callable[..., Any], name: str, inputs: RewardInputs, tokenizer: PreTrainedTokenizerBase | None
) -> Any:
    """Call a reward function in the way that its parameters ask for, and return its scores, unchecked.

    Where the function is called once for each response, an exception takes the place of the score.

    Args:
        function: The function, which may be async.
        name: The function's location, for messages.
        inputs: The responses to score.
        tokenizer: The actor's tokenizer, which OpenRLHF's signature needs for prompts that are conversations.

    Raises:
        UserError: if the function requires an argument that is not available.

    >>> from lit_rlhf.rewards import make_reward_inputs
    >>> def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    ...     return {"score": float(solution_str == ground_truth), "source": data_source}
    >>> inputs = make_reward_inputs(["72", "7"], data_source=["sums", "sums"], ground_truth=["72", "72"])
    >>> scores_of(compute_score, "compute_score", inputs, tokenizer=None)
    [1.0, 0.0]
    """
    names = inspect.signature(function).parameters
    if "responses" in names or not names.keys() & {"completions", "solution_str", "solution_strs", "queries"}:
        return _result(function, name, _own(inputs))
    if "completions" in names:
        scores = _result(function, name, _trl(inputs))
        return [0.0 if score is None else score for score in scores] if isinstance(scores, list) else scores
    if "queries" in names:
        return [_value(result, "rewards") for result in _results(function, name, _openrlhf(inputs, tokenizer))]
    samples = _verl(inputs)
    if "solution_str" in names:
        return [_value(result, "score") for result in _results(function, name, samples)]
    scores = _result(function, name, {f"{key}s": [sample[key] for sample in samples] for key in samples[0]})
    return [_value(score, "score") for score in scores] if isinstance(scores, list) else scores


def _result(function: Callable[..., Any], name: str, available: dict[str, Any]) -> Any:
    """Call the function once, and return its result, or raise its exception."""
    (result,) = _results(function, name, [available])
    if isinstance(result, Exception):
        raise result
    return result


def _results(function: Callable[..., Any], name: str, calls: Sequence[dict[str, Any]]) -> list[Any]:
    """Call the function once for each dictionary of available arguments; an async function's calls run concurrently.

    The exception of a call takes the place of its result.
    """
    results = [_called(function, _arguments(function, name, available)) for available in calls]
    waiting = [number for number, result in enumerate(results) if inspect.isawaitable(result)]

    async def gathered() -> list[Any]:
        return await asyncio.gather(*(results[number] for number in waiting), return_exceptions=True)

    if waiting:  # in another thread, because this one may have a running event loop
        for number, result in zip(waiting, call_in_thread(lambda: asyncio.run(gathered())), strict=True):
            results[number] = result
    return results


def _called(function: Callable[..., Any], arguments: dict[str, Any]) -> Any:
    try:
        return function(**arguments)
    except UserError:
        raise
    except Exception as error:
        return error


def _arguments(function: Callable[..., Any], name: str, available: dict[str, Any]) -> dict[str, Any]:
    parameters = [p for p in inspect.signature(function).parameters.values() if p.kind is not p.VAR_POSITIONAL]
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return available
    missing = [p.name for p in parameters if p.default is p.empty and p.name not in available]
    if missing:
        raise UserError(
            f"the reward function {name} requires {', '.join(missing)}, but the available arguments are: "
            f"{', '.join(available)}; these signatures are known: {SIGNATURES}"
        )
    return {p.name: available[p.name] for p in parameters if p.name in available}


def _own(inputs: RewardInputs) -> dict[str, Any]:
    return {
        **inputs.columns,
        "prompts": inputs.prompts,
        "responses": inputs.responses,
        "terminated": inputs.rollout.terminated.tolist(),
    }


def _trl(inputs: RewardInputs) -> dict[str, Any]:
    rollout = inputs.rollout
    spans = zip(rollout.tokens.tolist(), rollout.prompt_lengths.tolist(), rollout.lengths.tolist(), strict=True)
    return {
        **inputs.columns,
        "prompts": inputs.prompts,
        "completions": [
            response if isinstance(prompt, str) else [{"role": "assistant", "content": response}]
            for prompt, response in zip(inputs.prompts, inputs.responses, strict=True)
        ],
        "completion_ids": [tokens[start:end] for tokens, start, end in spans],
        "trainer_state": SimpleNamespace(global_step=inputs.iteration),
        "log_extra": _ignore,
        "log_metric": _ignore,
    }


def _verl(inputs: RewardInputs) -> list[dict[str, Any]]:
    samples = []
    for i, response in enumerate(inputs.responses):
        record = {name: values[i] for name, values in inputs.columns.items()}
        truth = next((path for path in TRUTHS if value_at(record, path) is not None), None)
        sample = {"data_source": record["data_source"]} if "data_source" in record else {}
        sample |= {"solution_str": response, "extra_info": dict(record.get("extra_info") or {})}
        samples.append(sample | ({} if truth is None else {"ground_truth": value_at(record, truth)}))
    return samples


def _openrlhf(inputs: RewardInputs, tokenizer: PreTrainedTokenizerBase | None) -> list[dict[str, Any]]:
    """Return the arguments of one call per response: lists of one element, as OpenRLHF passes them."""
    column = next((inputs.columns[name] for name in LABELS if name in inputs.columns), [""] * len(inputs.responses))
    end = str(tokenizer.eos_token) if tokenizer is not None else ""
    rows = zip(inputs.prompts, inputs.responses, inputs.rollout.terminated.tolist(), column, strict=True)
    calls = []
    for prompt, response, terminated, label in rows:
        text = _templated(prompt, tokenizer)
        calls.append({"queries": [text + response + (end if terminated else "")], "prompts": [text], "labels": [label]})
    return calls


def _templated(prompt: Prompt, tokenizer: PreTrainedTokenizerBase | None) -> str:
    if isinstance(prompt, str):
        return prompt
    assert tokenizer is not None, "call prepare() with the actor's tokenizer first"
    return str(tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True))


def _value(result: Any, key: str) -> Any:
    """Return a result or, if it is a dictionary, its entry ``key``; unpack a list or a tensor with one element."""
    score: Any = result.get(key) if isinstance(result, dict) else result
    shape = (len(score),) if isinstance(score, list) else tuple(getattr(score, "shape", ()))
    return score[0] if shape == (1,) else score


def _ignore(*values: Any) -> None:
    """Accept and ignore the values that a function would log with TRL."""
