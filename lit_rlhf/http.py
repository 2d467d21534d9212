"""A client of services that take and return JSON over HTTP, such as engines and rewards on other machines."""

import os
import queue
import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import count
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import requests
from requests.adapters import HTTPAdapter

from lit_rlhf.errors import UserError
from lit_rlhf.progress import tell

RETRIED_STATUS = (429, 500, 502, 503, 504)
"""The HTTP status codes after which a later attempt may succeed."""
RETRIED_ERRORS = (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError)
"""The errors after which a later attempt may succeed: no connection, no answer in time, an incomplete answer."""
SECRET = re.compile(r"(?i).*(api[_-]?key|secret|passw(or)?d|authorization|(access|auth|bearer)[_-]?token)|key|token")
"""The pattern of the names of fields that hold a key or a password."""
CONNECT_SECONDS = 10.0
"""The maximum number of seconds to wait for a connection, which a service accepts even when it is busy."""
MAX_PAUSE_SECONDS = 60.0
"""The longest pause before the next attempt, in seconds; a service cannot ask for a longer one (Retry-After)."""
NOTICE_SECONDS = 0.2
"""The maximum number of seconds after `JSONClient.close` until `JSONClient.post_all` stops waiting for answers."""


def pause_before_retry(attempt: int) -> float:
    """Return the seconds to wait after a failed attempt, counted from 0: 0, 1, 2, 4, …, 60 at most.

    >>> [pause_before_retry(attempt) for attempt in (0, 1, 2, 3, 9)]
    [0.0, 1.0, 2.0, 4.0, 60.0]
    """
    return min(2.0 ** (attempt - 1), MAX_PAUSE_SECONDS) if attempt else 0.0


def check_token_env(name: str | None, option: str) -> None:
    """Check that an option holds the name of an environment variable, and not the token itself.

    Args:
        name: The value of the option; None for no token.
        option: The option, for messages.

    Raises:
        UserError: if the value cannot be the name of a variable; the message does not show the value.

    >>> check_token_env("sk-0123", "rewards.token_env")
    Traceback (most recent call last):
        ...
    lit_rlhf.errors.UserError: rewards.token_env must be the name of an environment variable, not the token itself
    """
    if name is not None and not re.fullmatch(r"[A-Za-z_]\w*", name):
        raise UserError(f"{option} must be the name of an environment variable, not the token itself")


def check_url(url: str | None, option: str) -> str | None:
    """Return an address, after a check that it contains no user name, password or token.

    Addresses are stored with the configuration and shown in messages.

    Args:
        url: The address; None if the option is not set.
        option: The option, for messages.

    Raises:
        UserError: if the address contains one of these; the message does not show the address.

    >>> check_url("http://judge:8000/v1", "rewards.url")
    'http://judge:8000/v1'
    >>> check_url("http://me:swordfish@judge:8000", "rewards.url")
    Traceback (most recent call last):
        ...
    lit_rlhf.errors.UserError: rewards.url must not contain a password or a key: it is stored with the configuration
    """
    parts = urlsplit(url or "")
    if "@" in parts.netloc or any(SECRET.fullmatch(name) for name, _ in parse_qsl(parts.query)):
        raise UserError(f"{option} must not contain a password or a key: it is stored with the configuration")
    return url


def check_no_key(fields: Any, option: str) -> None:
    """Check that no field has a name that is usual for a key or a password, since the fields are stored.

    Args:
        fields: Fields of a request, which may contain others.
        option: The option that holds the fields, for messages.

    Raises:
        UserError: if there is such a field; the message does not show its value.

    >>> check_no_key({"top_p": 1.0, "auth": {"api_key": "sk-0123"}}, "rewards.endpoint.extra_body")
    Traceback (most recent call last):
        ...
    lit_rlhf.errors.UserError: rewards.endpoint.extra_body must not contain api_key: it is stored with the configuration
    """
    for name, value in fields.items() if isinstance(fields, Mapping) else ():
        if SECRET.fullmatch(str(name)):
            raise UserError(f"{option} must not contain {name}: it is stored with the configuration")
        check_no_key(value, option)


def read_token(name: str | None, option: str) -> str | None:
    """Return the token that an environment variable holds, or None if no variable is named.

    Args:
        name: The name of the variable; None for no token.
        option: The option that holds the name, for messages.

    Raises:
        UserError: if the variable is not set or is empty, or if an HTTP header cannot carry its value.
    """
    if name is None:
        return None
    token = os.environ.get(name, "").strip()
    if not token:
        raise UserError(f"{option}: the environment variable {name} is not set")
    if not re.fullmatch(r"[!-~]+", token):  # an error of the HTTP library would show the token
        raise UserError(
            f"{option}: the token in the environment variable {name} contains spaces, or characters outside ASCII"
        )
    return token


class JSONClient:
    """A client of one service, which several threads can use at the same time.

    A request is repeated if the connection fails, if the answer is incomplete or does not come in time, or if its
    status code says that a later attempt may succeed. The pauses before the repetitions are 0, 1, 2, 4, … seconds, or
    as many seconds (60 at most) as the answer's header ``Retry-After`` asks for. A repeated request must therefore be
    harmless.

    Args:
        url: The address of the service; a slash at the end is removed.
        option: The name of the option that holds the address, for messages.
        timeout: The maximum number of seconds to wait for an answer, in each attempt.
        retries: The maximum number of times that a request is repeated.
        token: The bearer token to send; None to send no token.
        connections: The maximum number of requests that `post_all` sends at the same time.
        retry_timeouts: Whether a request is also repeated if it was sent and no answer came in time.

    Raises:
        UserError: if the address contains a password, or does not begin with ``http://`` or ``https://``.

    >>> JSONClient("ftp://example", "model.engine.url")
    Traceback (most recent call last):
        ...
    lit_rlhf.errors.UserError: model.engine.url is 'ftp://example': it must begin with http:// or https://
    """

    def __init__(
        self,
        url: str,
        option: str,
        *,
        timeout: float = 60.0,
        retries: int = 4,
        token: str | None = None,
        connections: int = 1,
        retry_timeouts: bool = True,
    ) -> None:
        check_url(url, option)
        if not url.startswith(("http://", "https://")):
            raise UserError(f"{option} is {url!r}: it must begin with http:// or https://")
        self.url = url.rstrip("/")
        self.option = option
        self.timeout = timeout
        self.connections = connections
        self.retries = retries
        self.retry_timeouts = retry_timeouts
        self._closed = threading.Event()
        self._session = requests.Session()
        local = urlsplit(url).hostname in ("localhost", "127.0.0.1", "::1")
        self._session.trust_env = not local  # the environment's proxies do not know this machine's ports
        self._token = token
        if token is not None:
            self._session.auth = self._authorize  # takes precedence over the user's netrc file
        for scheme in ("http://", "https://"):
            self._session.mount(scheme, HTTPAdapter(pool_maxsize=connections))

    def get(self, path: str) -> Any:
        """Return the JSON value with which the service answers a GET request, or None if the answer is empty.

        Args:
            path: The path after the address of the service; it is empty or begins with a slash.

        Raises:
            UserError: if no attempt succeeds, the answer reports an error or is not JSON, or the client is closed.
        """
        return self._request("GET", path, None)

    def post(self, path: str, body: Mapping[str, Any]) -> Any:
        """Return the JSON value with which the service answers a POST request, or None if the answer is empty.

        Args:
            path: The path after the address of the service; it is empty or begins with a slash.
            body: The JSON object to send.

        Raises:
            UserError: if no attempt succeeds, the answer reports an error or is not JSON, or the client is closed.
        """
        return self._request("POST", path, body)

    def post_for_text(self, path: str, body: Mapping[str, Any]) -> str:
        """Return the plain text with which the service answers a POST request.

        Args:
            path: The path after the address of the service; it is empty or begins with a slash.
            body: The JSON object to send.

        Raises:
            UserError: if no attempt succeeds, the answer reports an error, or the client is closed.
        """
        return str(self._request("POST", path, body, read=lambda answer: answer.text))

    def post_all(
        self,
        path: str,
        bodies: Sequence[Mapping[str, Any]],
        work: str = "request",
        unit: str = "answers",
        *,
        keep_errors: bool = False,
    ) -> list[Any]:
        """Return the answers to several POST requests, as `post` does, in the order of the requests.

        At most ``self.connections`` requests are in progress at the same time. When a request fails, the requests that
        are still waiting are not sent, unless errors are kept.

        Args:
            path: The path after the address of the service; it is empty or begins with a slash.
            bodies: The JSON object of each request.
            work: The purpose of the requests, which is shown with their progress.
            unit: A plural noun for the answers, which is also shown.
            keep_errors: Whether the `UserError` of a failed request is returned in place of the answer, instead of
                being raised.

        Raises:
            UserError: if one of the requests fails, for a reason given in `post`, and errors are not kept; or if the
                client is closed meanwhile.
        """
        waiting: queue.SimpleQueue[tuple[int, Mapping[str, Any]]] = queue.SimpleQueue()
        for numbered in enumerate(bodies):
            waiting.put(numbered)
        answered: queue.SimpleQueue[tuple[int, Any, BaseException | None]] = queue.SimpleQueue()
        failed = threading.Event()

        def send() -> None:
            while not failed.is_set():
                try:
                    index, body = waiting.get_nowait()
                except queue.Empty:
                    return
                try:
                    answered.put((index, self.post(path, body), None))
                except BaseException as error:
                    if keep_errors and isinstance(error, UserError):
                        answered.put((index, error, None))
                        continue
                    failed.set()
                    answered.put((index, None, error))

        # daemons: Python's exit does not wait for them, so that requests in progress do not keep a run from ending
        for _ in range(min(self.connections, len(bodies))):
            threading.Thread(target=send, daemon=True).start()
        answers: dict[int, Any] = {}
        try:
            while len(answers) < len(bodies):
                try:
                    index, answer, error = answered.get(timeout=NOTICE_SECONDS)
                except queue.Empty:
                    self._check_open()
                    continue
                if error is not None:
                    raise error
                answers[index] = answer
                tell(work, len(answers), len(bodies), unit)
        finally:
            failed.set()
        return [answers[index] for index in range(len(bodies))]

    def close(self) -> None:
        """Give up all requests: from now on, none is sent or repeated, and no call to `post_all` waits for answers.

        >>> client = JSONClient("http://localhost:9", "model.engine.url")
        >>> client.close()
        >>> client.get("/health")
        Traceback (most recent call last):
            ...
        lit_rlhf.errors.UserError: model.engine.url: requests to http://localhost:9 were given up
        """
        self._closed.set()
        self._session.close()

    def _authorize(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        request.headers["Authorization"] = f"Bearer {self._token}"
        return request

    def _shown(self, text: str) -> str:
        """Return the beginning of an answer as one line for a message, with ``***`` in place of the token."""
        return _one_line(text.replace(self._token, "***") if self._token else text)

    def _check_open(self) -> None:
        if self._closed.is_set():
            raise UserError(f"{self.option}: requests to {self.url} were given up")

    def _request(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | None,
        read: Callable[[requests.Response], Any] | None = None,
    ) -> Any:
        address, start = f"{self.url}{path}", time.monotonic()
        timeout = min(CONNECT_SECONDS, self.timeout), self.timeout
        for attempt in count():
            last, pause = attempt == self.retries, pause_before_retry(attempt)
            self._check_open()
            try:
                answer = self._session.request(method, address, json=body, timeout=timeout)
            except requests.RequestException as error:
                given_up = isinstance(error, requests.ReadTimeout) and not self.retry_timeouts
                if last or given_up or not isinstance(error, RETRIED_ERRORS):
                    seconds, reason = time.monotonic() - start, _reason(error)
                    message = f"{self.option}: no answer from {address} after {seconds:.0f} s ({reason})"
                    raise UserError(message) from error
            else:
                if last or answer.status_code not in RETRIED_STATUS:
                    return self._read(answer, address, read)
                asked = answer.headers.get("Retry-After", "")
                pause = min(float(asked), MAX_PAUSE_SECONDS) if asked.isdecimal() else pause
            self._closed.wait(pause)

    def _read(self, answer: requests.Response, address: str, read: Callable[[requests.Response], Any] | None) -> Any:
        if not answer.ok:
            status = self._shown(f"{answer.status_code} {answer.reason}")
            raise UserError(f"{self.option}: {address} answered {status}: {self._shown(answer.text)}")
        if read is not None:
            return read(answer)
        if not answer.content:
            return None
        try:
            return answer.json()
        except requests.JSONDecodeError as error:
            text = self._shown(answer.text)
            raise UserError(f"{self.option}: the answer of {address} is not JSON: {text!r}") from error


def _reason(error: Exception) -> str:
    """Return the innermost cause of an error that requests and urllib3 have wrapped, in one line."""
    cause: Any = error
    while True:
        inner = getattr(cause, "reason", None) or next((x for x in cause.args if isinstance(x, Exception)), None)
        if not isinstance(inner, Exception):
            return _one_line(str(cause))
        cause = inner


def _one_line(text: str) -> str:
    return " ".join(text.split())[:200]
