"""A service as a reward: a reward model or a judge on another machine."""

import json
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lit_rlhf.errors import UserError
from lit_rlhf.http import JSONClient, check_token_env, check_url, read_token
from lit_rlhf.rewards.reward import NotFiniteError, OnFailure, Reward, RewardError, checked_scores, column_of
from lit_rlhf.types import RewardInputs


class RemoteReward(Reward):
    """A service that scores responses over HTTP: a reward model or a judge on another machine.

    A request is a POST of a JSON object with four keys, whose lists have one entry per response. Prompts are text, or
    conversations (``[{"role": …, "content": …}, …]``); ``terminated`` is true if a stop token ended the response::

        {
            "prompts": ["What is 70 + 2?", "What is 7 · 3?"],
            "responses": ["72", "Let me think"],
            "terminated": [true, false],
            "columns": {"answer": [72, 21], "source": ["sums", "products"]}
        }

    The service answers with a JSON object that has one finite number per response, in the order of the request; it may
    have further keys, which are ignored::

        {"scores": [1.0, 0.0]}

    Each process sends its own responses, and waits for all answers. A request is sent again, after the pauses of
    `JSONClient`, if the connection fails, if no answer comes in time, or if the status of the answer is 429, 500, 502,
    503 or 504; the service may therefore receive the same responses more than once. ``docs/rewards.md`` shows a
    complete service.

    Args:
        url: The address that takes the requests, such as ``http://judge:8000/score``.
        weight: The factor of this reward in the score.
        batch_size: The maximum number of responses in a request.
        connections: The maximum number of requests that a process sends at the same time.
        timeout: The maximum number of seconds to wait for an answer, in each attempt.
        retries: The maximum number of times that a request is sent again.
        token_env: The name of the environment variable with a token, which is sent as ``Authorization: Bearer TOKEN``;
            None to send no token. The token itself is stored nowhere.
        columns: The columns of the prompts that are sent; None for all of them.
        name: The name of this reward in metrics and samples; None for the last part of the address's path.
        on_failure: What happens if a request fails in all attempts, or if its answer does not have one finite number
            per response: see `Reward`. A request's failure concerns only its responses.

    Raises:
        ValueError: if a number is out of range.
        UserError: if ``token_env`` cannot be the name of a variable, or if ``url`` contains a password; in
            ``prepare``, if the variable is not set, if a header cannot carry its value, or if the address does not
            begin with ``http://`` or ``https://``.

    >>> reward = RemoteReward("http://judge:8000/helpfulness", weight=0.5, token_env="JUDGE_TOKEN")
    >>> reward.name
    'helpfulness'
    >>> reward.prepare(tokenizer=None)
    Traceback (most recent call last):
        ...
    lit_rlhf.errors.UserError: rewards.token_env: the environment variable JUDGE_TOKEN is not set
    """

    def __init__(
        self,
        url: str,
        weight: float = 1.0,
        batch_size: int = 32,
        connections: int = 4,
        timeout: float = 60.0,
        retries: int = 4,
        token_env: str | None = None,
        columns: list[str] | None = None,
        name: str | None = None,
        on_failure: OnFailure = "stop",
    ) -> None:
        super().__init__(weight, on_failure)
        limits = {"batch_size": (batch_size, 1), "connections": (connections, 1), "retries": (retries, 0)}
        for option, (value, minimum) in limits.items():
            if value < minimum:
                raise ValueError(f"rewards.{option} must be {minimum} or more, not {value}")
        if timeout <= 0:
            raise ValueError(f"rewards.timeout must be positive, not {timeout}")
        check_token_env(token_env, "rewards.token_env")
        check_url(url, "rewards.url")
        self.url = url
        self.batch_size = batch_size
        self.connections = connections
        self.timeout = timeout
        self.retries = retries
        self.token_env = token_env
        self.columns = columns
        self._name = name

    @property
    def name(self) -> str:
        """The given name or, without one, the last part of the address's path; without a path, the class's name."""
        return self._name or urlsplit(self.url).path.rstrip("/").rpartition("/")[2] or super().name

    @property
    def description(self) -> str:
        """The address of the service, without a user name, a password or a query."""
        parts = urlsplit(self.url)
        return f"service {parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"

    def prepare(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Check the address and the token without a request; the tokenizer is not used.

        Raises:
            UserError: if the address does not begin with ``http://`` or ``https://``, if the environment variable of
                the token is not set, or if a header cannot carry the token.
        """
        self._client()

    def forward(self, reward_inputs: RewardInputs) -> Tensor:
        """Send the responses to the service and return their scores, [B].

        Raises:
            UserError: if a column is missing or cannot be sent as JSON; with ``on_failure="stop"``, if no usable answer
                to a request came after all attempts.
            RewardError: if an answer does not have one finite number per response; with ``on_failure="leave_out"``,
                also if no usable answer to a request came after all attempts. Other requests are then still sent.
        """
        responses = reward_inputs.responses
        data = {
            "prompts": reward_inputs.prompts,
            "responses": responses,
            "terminated": reward_inputs.rollout.terminated.tolist(),
        }
        columns = self._columns(reward_inputs)
        batches = [slice(i, i + self.batch_size) for i in range(0, len(responses), self.batch_size)]
        bodies = [{**_rows(data, batch), "columns": _rows(columns, batch)} for batch in batches]
        scores, failures = torch.full((len(responses),), torch.nan), []
        keep_errors = self.on_failure == "leave_out"
        answers = self._client().post_all(
            self._path, bodies, "judge", "answers of the service", keep_errors=keep_errors
        )
        for batch, answer in zip(batches, answers, strict=True):
            try:
                scores[batch] = self._scores(answer, responses[batch])
            except RewardError as failure:
                failures.append(failure)
                if failure.scores is not None:
                    scores[batch] = failure.scores
        if failures:
            only_values = all(isinstance(failure, NotFiniteError) for failure in failures)
            raise (NotFiniteError if only_values else RewardError)(str(failures[0]), scores) from failures[0]
        return scores.to(reward_inputs.rollout.tokens.device)

    def _columns(self, reward_inputs: RewardInputs) -> dict[str, Sequence[Any]]:
        names = reward_inputs.columns if self.columns is None else self.columns
        columns = {name: column_of(reward_inputs, name) for name in names}
        for name, values in columns.items():
            try:
                json.dumps(list(values), allow_nan=False)
            except (TypeError, ValueError) as error:
                raise UserError(
                    f"the prompts' column {name!r} cannot be sent as JSON ({' '.join(str(error).split())[:200]}); "
                    "list the columns to send in rewards.columns"
                ) from error
        return columns

    def _scores(self, answer: Any, responses: Sequence[str]) -> Tensor:
        service = f"the service {self.url}"
        if isinstance(answer, UserError):  # of the request
            raise RewardError(str(answer)) from answer
        if not isinstance(answer, dict) or "scores" not in answer:
            raise RewardError(f'{service} should answer {{"scores": [numbers]}}, not {json.dumps(answer)[:80]}')
        return checked_scores(answer["scores"], responses, service)

    def _client(self) -> JSONClient:
        """Return a new client; it is not kept, so that neither a copy nor a pickle of this reward has the token."""
        return JSONClient(
            self.url,
            "rewards.url",
            timeout=self.timeout,
            retries=self.retries,
            token=read_token(self.token_env, "rewards.token_env"),
            connections=self.connections,
        )

    @property
    def _path(self) -> str:
        return "/" if self.url.endswith("/") else ""  # the client removes the slash


def _rows(data: dict[str, Sequence[Any]], batch: slice) -> dict[str, list[Any]]:
    return {name: list(values[batch]) for name, values in data.items()}
