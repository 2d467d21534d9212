"""A client of services that take and return JSON over HTTP: engines and rewards on other machines."""

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

import requests
from requests.adapters import HTTPAdapter
from urllib3.util import Retry

from lit_rlhf.errors import UserError

RETRIED_STATUS = (429, 500, 502, 503, 504)
"""The HTTP status codes after which a later attempt may succeed."""


class JSONClient:
    """A client of one service; several threads may use it at once.

    A request is repeated if the connection fails, if no answer comes in time, or if the status code says that a later
    attempt may succeed. The pauses before the repetitions are 0, 1, 2, 4, … seconds, or as long as the header
    ``Retry-After`` of the answer asks for. A repeated request must therefore be harmless.

    Args:
        url: The address of the service; a slash at the end is removed.
        option: The name of the option that holds the address, for messages.
        timeout: The maximum number of seconds to wait for an answer, in each attempt.
        retries: The maximum number of times that a request is repeated.
        token: The bearer token to send; None for none.
        connections: The maximum number of requests that `post_all` sends at the same time.

    Raises:
        UserError: if the address does not begin with ``http://`` or ``https://``.

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
    ) -> None:
        if not url.startswith(("http://", "https://")):
            raise UserError(f"{option} is {url!r}: it must begin with http:// or https://")
        self.url = url.rstrip("/")
        self.option = option
        self.timeout = timeout
        self.connections = connections
        retry = Retry(
            total=retries,
            backoff_factor=0.5,
            status_forcelist=RETRIED_STATUS,
            allowed_methods=None,  # all methods
            raise_on_status=False,
        )
        self._session = requests.Session()
        local = urlsplit(url).hostname in ("localhost", "127.0.0.1", "::1")
        self._session.trust_env = not local  # the environment's proxies do not know this machine's ports
        if token is not None:
            self._session.headers["Authorization"] = f"Bearer {token}"
        for scheme in ("http://", "https://"):
            self._session.mount(scheme, HTTPAdapter(pool_maxsize=connections, max_retries=retry))

    def get(self, path: str) -> Any:
        """Return the JSON value with which the service answers a GET request, or None if the answer is empty.

        Args:
            path: What follows the address of the service, beginning with a slash.

        Raises:
            UserError: if no attempt succeeds, or if the answer reports an error or is not JSON.
        """
        return self._request("GET", path, None)

    def post(self, path: str, body: Mapping[str, Any]) -> Any:
        """Return the JSON value with which the service answers a POST request, or None if the answer is empty.

        Args:
            path: What follows the address of the service, beginning with a slash.
            body: The JSON object to send.

        Raises:
            UserError: if no attempt succeeds, or if the answer reports an error or is not JSON.
        """
        return self._request("POST", path, body)

    def post_all(self, path: str, bodies: Sequence[Mapping[str, Any]]) -> list[Any]:
        """Return the answers to several POST requests, as `post` does, in the order of the requests.

        At most ``connections`` requests are sent at the same time. When the failure of one of them is noticed, requests
        that are still waiting are not sent any more.

        Args:
            path: What follows the address of the service, beginning with a slash.
            bodies: The JSON object of each request.

        Raises:
            UserError: if one of the requests fails, for the reasons in `post`.
        """
        with ThreadPoolExecutor(max(1, min(self.connections, len(bodies)))) as pool:
            futures = [pool.submit(self.post, path, body) for body in bodies]
            try:
                return [future.result() for future in futures]
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _request(self, method: str, path: str, body: Mapping[str, Any] | None) -> Any:
        address, start = f"{self.url}{path}", time.monotonic()
        try:
            answer = self._session.request(method, address, json=body, timeout=self.timeout)
        except requests.RequestException as error:
            seconds = time.monotonic() - start
            reason = _reason(error)
            raise UserError(f"{self.option}: no answer from {address} after {seconds:.0f} s ({reason})") from error
        if not answer.ok:
            text = " ".join(answer.text.split())[:200]
            raise UserError(f"{self.option}: {address} answered {answer.status_code} {answer.reason}: {text}")
        if not answer.content:
            return None
        try:
            return answer.json()
        except requests.JSONDecodeError as error:
            text = " ".join(answer.text.split())[:200]
            raise UserError(f"{self.option}: the answer of {address} is not JSON: {text!r}") from error


def _reason(error: Exception) -> str:
    """Return the innermost cause of an error that requests and urllib3 have wrapped, in one line."""
    cause: Any = error
    while True:
        inner = getattr(cause, "reason", None) or next((x for x in cause.args if isinstance(x, Exception)), None)
        if not isinstance(inner, Exception):
            return " ".join(str(cause).split())[:200]
        cause = inner
