"""Requests to a vLLM server for one response each, and checks of the server's answers."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lit_rlhf.errors import UserError
from lit_rlhf.generation.engine import Sampling, SpecialTokens, join_responses
from lit_rlhf.http import JSONClient
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
"""The request options with which the server samples from the full distribution, whatever its own defaults are."""
ROUNDING = 1e-5
"""The largest log-probability that is accepted; it is above 0 to allow for rounding errors."""


ATTEMPTS_PER_TOKEN = 100
"""The maximum number of new draws to replace a response's early stop tokens, per token of ``min_tokens``."""


@dataclass(frozen=True, slots=True)
class Response:
    """The token ids of one response, and the log-probability of each token as the server reports it, in nats."""

    tokens: list[int]
    logprobs: list[float]


def completion_request(
    model: str, prompt: Sequence[int], seed: int, sampling: Sampling, special_tokens: SpecialTokens
) -> dict[str, Any]:
    """Return the request for one response, which ends with a stop token or after ``sampling.max_tokens`` tokens.

    Args:
        model: The name by which the server knows its model.
        prompt: The ids of the prompt's tokens.
        seed: The seed of the random numbers, less than 2⁶³.
        sampling: The options for sampling, of which ``max_tokens``, ``min_tokens`` and the temperature are used.
        special_tokens: The stop tokens, and the padding token, which is not used.

    >>> request = completion_request("actor", [2, 6], 5, Sampling(max_tokens=8), SpecialTokens(stop=(1,), pad=0))
    >>> request["prompt"], request["stop_token_ids"], request["seed"]
    ([2, 6], [1], 5)
    """
    return {
        "model": model,
        "prompt": list(prompt),
        "max_tokens": sampling.max_tokens,
        "min_tokens": 0 if sampling.temperature else sampling.min_tokens,  # see draw_responses
        "temperature": sampling.temperature,
        **FULL_DISTRIBUTION,
        "seed": seed,
        "stop_token_ids": list(special_tokens.stop),
        "ignore_eos": True,  # the tokens above are the only ones that end a response
        "logprobs": 0,  # returns those of the sampled tokens, without alternatives
        "return_token_ids": True,
        "skip_special_tokens": False,
        "add_special_tokens": False,
    }


def draw_responses(
    client: JSONClient, requests: Sequence[dict[str, Any]], min_tokens: int, vocabulary: int
) -> list[Response]:
    """Make the server draw one response for each request, and return the responses.

    If a response ends with a stop token before the minimum length, this stop token is discarded, and the server is
    asked to continue the response with another seed. The first ``min_tokens`` tokens thus follow the distribution
    without the stop tokens, while their log-probabilities refer to the full distribution. The server's own option for
    the minimum length would also exclude the stop tokens from the log-probabilities; this option is used only at
    temperature 0, where another seed would give the same token.

    Args:
        client: The client of the server.
        requests: The requests, from `completion_request`.
        min_tokens: The minimum number of tokens before a stop token; it must be 0 at temperature 0.
        vocabulary: The number of tokens in the vocabulary.

    Returns:
        The responses, in the order of the requests.

    Raises:
        UserError: if a request fails, if the server's answer to a request is invalid, or if stop tokens are so
            likely that a response does not reach the minimum length.
    """
    responses, waiting = [Response([], []) for _ in requests], list(range(len(requests)))
    for attempt in range(1 + ATTEMPTS_PER_TOKEN * min_tokens):
        asked = [_continued(requests[row], responses[row], attempt) for row in waiting]
        for row, request, answer in zip(
            waiting, asked, client.post_all(PATH, asked, "generate", "responses"), strict=True
        ):
            new, old = read_response(answer, request, vocabulary, client.option), responses[row]
            responses[row] = Response(old.tokens + new.tokens, old.logprobs + new.logprobs)
        waiting = [row for row in waiting if _ends_early(responses[row], requests[row], min_tokens)]
        if not waiting:
            return responses
        for row in waiting:
            responses[row] = Response(responses[row].tokens[:-1], responses[row].logprobs[:-1])
    raise UserError(
        f"model.sampling.min_tokens is {min_tokens}, but stop tokens are so likely that a response still has only "
        f"{len(responses[waiting[0]].tokens)} tokens after {ATTEMPTS_PER_TOKEN * min_tokens} attempts"
    )


def _continued(request: dict[str, Any], response: Response, attempt: int) -> dict[str, Any]:
    """Return the request for the rest of a response, with a seed that depends on the attempt's number."""
    return request | {
        "prompt": request["prompt"] + response.tokens,
        "max_tokens": request["max_tokens"] - len(response.tokens),
        "seed": (request["seed"] + attempt) % 2**63,
    }


def _ends_early(response: Response, request: dict[str, Any], min_tokens: int) -> bool:
    return len(response.tokens) <= min_tokens and response.tokens[-1] in request["stop_token_ids"]


def read_response(answer: Any, request: Mapping[str, Any], vocabulary: int, option: str) -> Response:
    """Check the server's answer to a request, and return the response that the answer contains.

    Args:
        answer: The JSON value with which the server answered.
        request: The request, from `completion_request`.
        vocabulary: The number of tokens in the vocabulary.
        option: The name of the option that holds the server's address, for messages.

    Raises:
        UserError: if the answer is malformed or does not fit the request.

    >>> request = completion_request("actor", [2, 6], 5, Sampling(max_tokens=8), SpecialTokens(stop=(1,), pad=0))
    >>> choice = {"token_ids": [7, 1], "logprobs": {"token_logprobs": [-0.5, -2.0]}}
    >>> read_response({"choices": [choice]}, request, 38, "model.engine.url")
    Response(tokens=[7, 1], logprobs=[-0.5, -2.0])
    """

    def wrong(what: str) -> UserError:
        return UserError(f"{option}: {what}; is it a vLLM server (0.32 or later) with this run's model?")

    try:
        (choice,) = answer["choices"]
        tokens, logprobs = choice["token_ids"], choice["logprobs"]["token_logprobs"]
        count, numbers = len(tokens), len(logprobs)
    except (TypeError, KeyError, IndexError, ValueError):
        raise wrong("the server's answer does not have one response with its tokens and log-probabilities") from None
    if not 1 <= count <= request["max_tokens"]:
        raise wrong(f"the server's response has {count} tokens, not between 1 and {request['max_tokens']}")
    if numbers != count:
        raise wrong(f"the server's response has {count} tokens, but {numbers} log-probabilities")
    for token in tokens:
        if not isinstance(token, int) or not 0 <= token < vocabulary:
            raise wrong(f"the server's response has the token {token!r}, which the model does not have")
    for logprob in logprobs:
        if not isinstance(logprob, int | float) or not -math.inf < logprob <= ROUNDING:  # also refuses NaN
            raise wrong(f"the server's response has the log-probability {logprob!r}")
    ends = [token in request["stop_token_ids"] for token in tokens]
    if any(ends[:-1]):
        raise wrong("the server's response continues after a stop token")
    if not ends[-1] and count < request["max_tokens"]:
        raise wrong(f"the server's response ends after {count} tokens, before max_tokens and without a stop token")
    return Response(tokens, logprobs)


def to_rollout(
    responses: Sequence[Response], prompts: PromptBatch, sampling: Sampling, special_tokens: SpecialTokens
) -> Rollout:
    """Return the rollout of B n checked responses, on the prompts' device, with entropies of 0.

    Args:
        responses: The B n responses, in prompt-major order.
        prompts: The B prompts.
        sampling: The options for sampling, of which only the number n of responses for each prompt is used.
        special_tokens: The stop tokens and the padding token.

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
