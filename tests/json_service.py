"""A real HTTP server in a thread, which answers JSON with JSON, and misbehaves as a test says."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Service(ThreadingHTTPServer):
    """A server that answers with a function of the request's body; ``instead`` are other reactions, to the first ones.

    A reaction is the answer as an object or as text, a status, or a function of the request's handler.
    """

    def __init__(self, answer) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.instead = []
        self.answer = answer
        self.bodies, self.tokens, self.paths = [], [], []
        self.working = self.most = 0  # requests at the same time
        self.lock, self.ended = threading.Lock(), threading.Event()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    @property
    def url(self) -> str:
        return f"{self.address}/length"


class Handler(BaseHTTPRequestHandler):
    server: Service

    def do_POST(self):
        service = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with service.lock:
            service.bodies.append(body)
            service.tokens.append(self.headers["Authorization"])
            service.paths.append(self.path)
            service.working += 1
            service.most = max(service.most, service.working)
            reaction = service.instead.pop(0) if service.instead else service.answer(body)
        try:
            self.react(reaction)
        finally:
            with service.lock:
                service.working -= 1

    def react(self, reaction) -> None:
        if callable(reaction):
            return reaction(self)
        content = reaction if isinstance(reaction, str) else json.dumps(reaction)
        self.send_response(reaction if isinstance(reaction, int) else 200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content.encode())

    def log_message(self, *words):
        pass


@contextmanager
def serving(answer) -> Iterator[Service]:
    """Run a server that answers with ``answer(body)``."""
    with Service(answer) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield server
        finally:
            server.ended.set()
            server.shutdown()
            thread.join()
