"""The client of JSON services, against a real server that fails in the ways that services fail."""

import json
import os
import socket
import struct
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise

import pytest

from lit_rlhf.errors import UserError
from lit_rlhf.http import JSONClient


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.do_POST()

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or "null")
        with self.server.lock:
            number = len(self.server.requests)
            self.server.requests.append((time.monotonic(), self.command, self.path, body, dict(self.headers)))
        self.server.behave(self, number, body)

    def answer(self, status, text, **headers):
        content = text.encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args):
        pass


@contextmanager
def serving(behave):
    """Yield a server whose requests are answered by ``behave(handler, number, body)``."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads, server.block_on_close = True, False
    server.behave, server.requests, server.lock = behave, [], threading.Lock()
    server.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


def fail_first(count, failure, answer='{"ok": true}'):
    """Return a behaviour: the first ``count`` requests meet ``failure``, later ones are answered."""
    return lambda handler, number, body: failure(handler) if number < count else handler.answer(200, answer)


def unavailable(handler):
    handler.answer(503, "busy")


def reset(handler):
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    os.close(handler.connection.detach())  # with this option, "connection reset by peer"
    handler.close_connection = True


def half_an_answer(handler):
    handler.send_response(200)
    handler.send_header("Content-Length", "100")
    handler.end_headers()
    handler.wfile.write(b'{"half":')
    handler.close_connection = True


def hang(handler):
    time.sleep(30)


def assert_pauses(server, *expected):
    """Check that the pauses between the requests are at least those expected, and little longer on a busy machine."""
    pauses = [later[0] - earlier[0] for earlier, later in pairwise(server.requests)]
    assert len(pauses) == len(expected)
    for pause, least in zip(pauses, expected, strict=True):
        assert least - 0.05 < pause < least + 5


def test_sends_and_returns_json():
    with serving(lambda handler, number, body: handler.answer(200, json.dumps([handler.path, body]))) as server:
        client = JSONClient(f"{server.url}/", "model.engine.url", token="secret")
        assert client.post("/a", {"x": [1, "ü"]}) == ["/a", {"x": [1, "ü"]}]
        assert client.get("/b?c=1") == ["/b?c=1", None]
        assert [request[1] for request in server.requests] == ["POST", "GET"]
        assert server.requests[0][4]["Authorization"] == "Bearer secret"


def test_an_empty_answer_is_none():
    with serving(lambda handler, number, body: handler.answer(200, "")) as server:
        assert JSONClient(server.url, "model.engine.url").post("/", {}) is None


@pytest.mark.parametrize("failure", [unavailable, reset, half_an_answer])
def test_repeats_what_may_succeed_later(failure):
    with serving(fail_first(2, failure)) as server:
        assert JSONClient(server.url, "model.engine.url").post("/", {}) == {"ok": True}
        assert_pauses(server, 0.0, 1.0)


def test_the_last_attempt_decides():
    with serving(fail_first(9, unavailable)) as server:
        with pytest.raises(UserError, match=rf"^model.engine.url: {server.url}/a answered 503 Service Unavailable: "):
            JSONClient(server.url, "model.engine.url", retries=1).post("/a", {})
        assert len(server.requests) == 2


def test_waits_as_long_as_the_service_asks():
    with serving(fail_first(1, lambda handler: handler.answer(429, "slower", Retry_After="1"))) as server:
        assert JSONClient(server.url, "model.engine.url").post("/", {}) == {"ok": True}
        assert_pauses(server, 1.0)


def test_an_answer_that_does_not_come_in_time():
    with serving(fail_first(1, hang)) as server:
        assert JSONClient(server.url, "model.engine.url", timeout=0.3).post("/", {}) == {"ok": True}
        assert_pauses(server, 0.3)


def test_timeouts_need_not_be_repeated():
    with serving(fail_first(1, hang)) as server:
        client = JSONClient(server.url, "model.engine.url", timeout=0.3, retry_timeouts=False)
        with pytest.raises(UserError, match=r"no answer from .*/a after \d s \(.*[Rr]ead timed out"):
            client.post("/a", {})
        assert len(server.requests) == 1


def test_nobody_listens():
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{bound.getsockname()[1]}"
        with pytest.raises(UserError, match=r"^rewards.url: no answer from .* after \d s \(.*Connection refused\)$"):
            JSONClient(url, "rewards.url", retries=1).get("/health")


def test_a_refusal_is_not_repeated_and_its_reason_is_shown():
    with serving(lambda handler, number, body: handler.answer(400, "max_tokens\n is too large")) as server:
        with pytest.raises(UserError, match=r"answered 400 Bad Request: max_tokens is too large$"):
            JSONClient(server.url, "model.engine.url").post("/", {})
        assert len(server.requests) == 1


def test_an_answer_that_is_not_json():
    with serving(lambda handler, number, body: handler.answer(200, "<html>\nhello")) as server:
        with pytest.raises(UserError, match=r"the answer of .* is not JSON: '<html> hello'$"):
            JSONClient(server.url, "model.engine.url").post("/", {})
        assert len(server.requests) == 1


def test_several_requests_at_once_keep_their_order():
    running, most, lock = [], [], threading.Lock()

    def behave(handler, number, body):
        with lock:
            running.append(number)
            most.append(len(running))
        time.sleep(0.02 * (3 - body["i"] % 3))
        with lock:
            running.remove(number)
        handler.answer(200, json.dumps(body["i"]))

    with serving(behave) as server:
        client = JSONClient(server.url, "model.engine.url", connections=4)
        assert client.post_all("/", [{"i": i} for i in range(12)]) == list(range(12))
        assert client.post_all("/", []) == []
        assert max(most) == 4


def test_after_a_failure_nothing_waits_and_nothing_more_is_sent():
    def behave(handler, number, body):
        if body["i"] == 0:
            handler.answer(400, "no")
        else:
            hang(handler)

    with serving(behave) as server:
        client, start = JSONClient(server.url, "model.engine.url", connections=2), time.monotonic()
        with pytest.raises(UserError, match="answered 400"):
            client.post_all("/", [{"i": i} for i in range(9)])
        assert time.monotonic() - start < 2
        time.sleep(0.1)
        assert len(server.requests) <= 2


def test_closing_ends_the_waiting_in_other_threads():
    with serving(lambda handler, number, body: hang(handler)) as server:
        client, start = JSONClient(server.url, "model.engine.url", connections=2), time.monotonic()
        threading.Timer(0.3, client.close).start()
        with pytest.raises(UserError, match=rf"^model.engine.url: requests to {server.url} were given up$"):
            client.post_all("/", [{}] * 4)
        assert time.monotonic() - start < 2
        with pytest.raises(UserError, match="were given up"):
            client.get("/")


def test_closing_ends_the_pauses():
    with serving(fail_first(9, unavailable)) as server:
        client, start = JSONClient(server.url, "model.engine.url", retries=9), time.monotonic()
        threading.Timer(0.3, client.close).start()
        with pytest.raises(UserError, match="were given up"):
            client.post("/", {})
        assert time.monotonic() - start < 0.9


def test_a_token_is_not_shown():
    """Not even if the service repeats it in its answer."""
    with (
        serving(lambda handler, number, body: handler.answer(403, handler.headers["Authorization"])) as server,
        pytest.raises(UserError, match=r"answered 403 Forbidden: Bearer \*\*\*$"),
    ):
        JSONClient(server.url, "rewards.url", token="secret").post("/", {})


def test_a_token_takes_precedence_over_netrc(tmp_path, monkeypatch):
    (tmp_path / "netrc").write_text("default login somebody password other\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    with serving(lambda handler, number, body: handler.answer(200, "{}")) as server:
        client = JSONClient(server.url, "rewards.url", token="secret")
        client._session.trust_env = True  # as with a service on another machine
        client.post("/", {})
        assert server.requests[0][4]["Authorization"] == "Bearer secret"
