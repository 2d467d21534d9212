"""Requests to vLLM for one response each, and the check of its answers."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lit_rlhf.errors import UserError
from lit_rlhf.generation.engine import Sampling, SpecialTokens, join_responses
from lit_rlhf.types import PromptBatch, Rollout

PATH = "/v1/completions"
FULL_DISTRIBUTION = {
    "top_p": 1.0,
    "top_k": 0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}
"""The options that leave the distribution as it is, whatever defaults the server has."""
ROUNDING = 1e-5
"""The maximum of a log-probability, which would be 0 without rounding errors."""


@dataclass(frozen=True, slots=True)
class Response:
    """The tokens of one response, and the logarithms of the probabilities with which the server drew them, in nats."""

    tokens: list[int]
    logprobs: list[float]


def completion_request(
    model: str, prompt: Sequence[int], seed: int, sampling: Sampling, special_tokens: SpecialTokens
) -> dict[str, Any]:
    """Return the request for one response, which ends with a stop token or after ``sampling.max_tokens`` tokens.

    Args:
        model: The name by which the server knows its model.
        prompt: The ids of the prompt's tokens.
        seed: The seed of the random numbers.
        sampling: The options for sampling, of which top-k and top-p are not used.
        special_tokens: The stop tokens and the padding token.

    >>> request = completion_request("actor", [2, 6], 5, Sampling(max_tokens=8), SpecialTokens(stop=(1,), pad=0))
    >>> request["prompt"], request["stop_token_ids"], request["seed"]
    ([2, 6], [1], 5)
    """
    return {
        "model": model,
        "prompt": list(prompt),
        "max_tokens": sampling.max_tokens,
        "min_tokens": sampling.min_tokens,
        "temperature": sampling.temperature,
        **FULL_DISTRIBUTION,
        "seed": seed,
        "stop_token_ids": list(special_tokens.stop),
        "ignore_eos": True,  # the tokens above are the only ones that end a response
        "logprobs": 0,  # of the sampled tokens alone
        "return_token_ids": True,
        "skip_special_tokens": False,
        "add_special_tokens": False,
    }


def read_response(
    answer: Any, sampling: Sampling, special_tokens: SpecialTokens, vocabulary: int, option: str
) -> Response:
    """Return the response in an answer of the server.

    Args:
        answer: The JSON value with which the server answered a `completion_request`.
        sampling: The options for sampling.
        special_tokens: The stop tokens and the padding token.
        vocabulary: The number of tokens of the vocabulary.
        option: The name of the option that holds the server's address, for messages.

    Raises:
        UserError: if the answer is not what a server of vLLM gives to such a request.

    >>> choice = {"token_ids": [7, 1], "logprobs": {"token_logprobs": [-0.5, -2.0]}}
    >>> read_response({"choices": [choice]}, Sampling(), SpecialTokens(stop=(1,), pad=0), 38, "model.engine.url")
    Response(tokens=[7, 1], logprobs=[-0.5, -2.0])
    """

    def wrong(what: str) -> UserError:
        return UserError(f"{option}: {what}; is it a vLLM server (0.32 or later) with this run's model?")

    try:
        (choice,) = answer["choices"]
        tokens, logprobs = choice["token_ids"], choice["logprobs"]["token_logprobs"]
        count = len(tokens)
        numbers = len(logprobs)
    except (TypeError, KeyError, IndexError, ValueError):
        raise wrong("the server's answer does not have one response with its tokens and log-probabilities") from None
    if not 1 <= count <= sampling.max_tokens:
        raise wrong(f"the server's response has {count} tokens, not between 1 and sampling.max_tokens")
    if numbers != count:
        raise wrong(f"the server's response has {count} tokens, but {numbers} log-probabilities")
    for token in tokens:
        if not isinstance(token, int) or not 0 <= token < vocabulary:
            raise wrong(f"the server's response has the token {token!r}, which the model does not have")
    for logprob in logprobs:
        if not isinstance(logprob, int | float) or not -math.inf < logprob <= ROUNDING:  # also refuses NaN
            raise wrong(f"the server's response has the log-probability {logprob!r}")
    ends = [token in special_tokens.stop for token in tokens]
    if any(ends[:-1]):
        raise wrong("the server's response goes on after a stop token")
    if not ends[-1] and count < sampling.max_tokens:
        raise wrong(f"the server's response ends after {count} tokens, before max_tokens and without a stop token")
    return Response(tokens, logprobs)


def to_rollout(
    responses: Sequence[Response], prompts: PromptBatch, sampling: Sampling, special_tokens: SpecialTokens
) -> Rollout:
    """Return the rollout of checked responses in prompt-major order, on the prompts' device, with entropies of 0.

    >>> tokens, group = torch.tensor([[2, 6]]), torch.tensor([0])
    >>> prompts = PromptBatch(tokens=tokens, mask=tokens > 0, group=group, prompts=["w0"], columns={})
    >>> responses = [Response([7, 1], [-0.5, -2.0]), Response([8], [-1.0])]
    >>> to_rollout(responses, prompts, Sampling(responses=2), SpecialTokens(stop=(1,), pad=0)).tokens
    tensor([[2, 6, 7, 1],
            [2, 6, 8, 0]])
    """
    lengths = [len(response.tokens) for response in responses]
    tokens = torch.full((len(responses), max(lengths)), special_tokens.pad)
    logprobs = torch.zeros(tokens.shape)
    for row, response in enumerate(responses):
        tokens[row, : lengths[row]] = torch.tensor(response.tokens)
        logprobs[row, : lengths[row]] = torch.tensor(response.logprobs)
    device = prompts.tokens.device
    return join_responses(
        prompts,
        sampling,
        special_tokens.pad,
        tokens=tokens.to(device),
        logprobs=logprobs.to(device),
        entropy=torch.zeros(tokens.shape, device=device),
        lengths=torch.tensor(lengths, device=device),
        terminated=torch.tensor([r.tokens[-1] in special_tokens.stop for r in responses], device=device),
    )
