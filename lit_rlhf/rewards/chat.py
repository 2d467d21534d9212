"""OpenAI-compatible endpoints, through which a language model answers messages."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lit_rlhf.errors import UserError
from lit_rlhf.http import JSONClient, check_no_key, check_token_env, check_url, read_token
from lit_rlhf.types import Conversation

PATH = "/chat/completions"


@dataclass(frozen=True)
class ChatEndpoint:
    """An OpenAI-compatible endpoint for chat completions: a vLLM, SGLang or llama.cpp server, or a hosted model.

    A request is a POST to ``{base_url}/chat/completions`` with ``model``, ``messages``, ``max_tokens`` and a
    ``temperature`` of 0. A request is sent again, after the pauses of `JSONClient`, if the connection fails, if no
    answer comes in time, or if the status of the answer is 429, 500, 502, 503 or 504.

    Args:
        base_url: The address before ``/chat/completions``, such as ``http://judge:8000/v1``.
        model: The name by which the endpoint knows the model.
        token_env: The name of the environment variable with the API key, which is sent as ``Authorization: Bearer
            KEY``; None to send no key. The key itself is stored nowhere.
        max_tokens: The maximum number of tokens in an answer, including the model's reasoning before it.
        connections: The maximum number of requests that a process sends at the same time.
        timeout: The maximum number of seconds to wait for an answer, in each attempt.
        retries: The maximum number of times that a request is sent again.
        extra_body: Further fields of each request, which take precedence over the fields above; a field whose value is
            None is left out. These fields are stored with the configuration, so they must not contain a key.

    Raises:
        ValueError: if a number is out of range.
        UserError: if ``token_env`` cannot be the name of a variable, or if ``base_url`` or ``extra_body`` contains a
            key.

    >>> ChatEndpoint("https://api.example/v1", "large", token_env="JUDGE_KEY", extra_body={"temperature": None})
    ... # doctest: +ELLIPSIS
    ChatEndpoint(base_url='https://api.example/v1', model='large', token_env='JUDGE_KEY', max_tokens=1024, ...)
    """

    base_url: str
    model: str
    token_env: str | None = None
    max_tokens: int = 1024
    connections: int = 16
    timeout: float = 120.0
    retries: int = 4
    extra_body: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        limits = {
            "max_tokens": (self.max_tokens, 1),
            "connections": (self.connections, 1),
            "retries": (self.retries, 0),
        }
        for option, (value, minimum) in limits.items():
            if value < minimum:
                raise ValueError(f"rewards.endpoint.{option} must be {minimum} or more, not {value}")
        if not self.timeout > 0:
            raise ValueError(f"rewards.endpoint.timeout must be positive, not {self.timeout}")
        check_token_env(self.token_env, "rewards.endpoint.token_env")
        check_url(self.base_url, "rewards.endpoint.base_url")
        check_no_key(self.extra_body, "rewards.endpoint.extra_body")

    def client(self) -> JSONClient:
        """Return a new client, which sends the key with each request.

        Raises:
            UserError: if the address does not begin with ``http://`` or ``https://``, if the environment variable of
                the key is not set, or if a header cannot carry the key.
        """
        return JSONClient(
            self.base_url,
            "rewards.endpoint.base_url",
            timeout=self.timeout,
            retries=self.retries,
            token=read_token(self.token_env, "rewards.endpoint.token_env"),
            connections=self.connections,
        )

    def complete(self, conversations: Sequence[Conversation], *, keep_errors: bool = False) -> list[str | UserError]:
        """Return the model's answer to each conversation; an answer that ends during the reasoning is empty.

        Args:
            conversations: The conversations, each of which ends with a message of the user.
            keep_errors: Whether an error takes the place of a missing answer, instead of being raised.

        Raises:
            UserError: if the address or the key cannot be used; unless errors are kept, if no answer comes after all
                attempts, or if an answer does not have the form of a chat completion.
        """
        options = {"model": self.model, "temperature": 0, "max_tokens": self.max_tokens} | (self.extra_body or {})
        options = {name: value for name, value in options.items() if value is not None}
        bodies = [{**options, "messages": conversation} for conversation in conversations]
        answers = self.client().post_all(PATH, bodies, "judge", "answers of the judge", keep_errors=keep_errors)
        texts = [answer if isinstance(answer, UserError) else self._text(answer) for answer in answers]
        errors = [text for text in texts if isinstance(text, UserError)]
        if errors and not keep_errors:
            raise errors[0]
        return texts

    def _text(self, answer: Any) -> str | UserError:
        """Return the text of an answer, or the error because it has another form."""
        try:
            text = answer["choices"][0]["message"]["content"]
        except (TypeError, KeyError, IndexError):
            text = answer
        if text is not None and not isinstance(text, str):
            return UserError(
                f"rewards.endpoint.base_url: {self.base_url}{PATH} should answer with a message, not "
                f"{json.dumps(answer)[:80]}; is it an OpenAI-compatible endpoint?"
            )
        return text or ""
