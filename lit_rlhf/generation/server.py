"""A vLLM server as a child process, which ends with the run."""

import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path

from lit_rlhf.errors import UserError
from lit_rlhf.http import JSONClient

MODULE = "vllm.entrypoints.openai.api_server"
"""The module that ``vllm serve`` runs; the command itself is not installed with every build of vLLM."""
SERVED_NAME = "actor"
SETTINGS = {
    "VLLM_SERVER_DEV_MODE": "1",  # opens the routes for weights
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",  # opens the routes for adapters
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB; this option and the next have no effect on GPUs
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # vLLM would bind its threads to the cores that training uses
}
"""The environment variables that are set for the server, unless they are set already."""
NOT_INHERITED = re.compile(
    r"(RANK|LOCAL_RANK|NODE_RANK|WORLD_SIZE|LOCAL_WORLD_SIZE|MASTER_ADDR|MASTER_PORT|(GROUP|ROLE|TORCHELASTIC)_.*"
    r"|PYTHONPATH|PYTHONHOME|PYTORCH_ALLOC_CONF|PYTORCH_(CUDA|HIP)_ALLOC_CONF)"
)
"""The environment variables for torchrun, Python's paths and torch's allocator, which the server does not inherit."""
ERROR = re.compile(r"[\w.]*(Error|Exception|error): ")
POLL_SECONDS = 0.2
GIVE_UP_SECONDS = 15.0
"""The maximum number of seconds to wait until the keeper (``keeper.py``) has ended.

The keeper itself ends the server by force after a third of this time.
"""


class Server:
    """A vLLM server in a process group of its own, which ends with this process, however this process ends.

    Args:
        python: The Python interpreter of an environment in which vLLM is installed.
        model: The folder or the hub id of the model to start with.
        arguments: Further command-line arguments of vLLM.
        devices: The indices of the server's GPUs among those that this process may use; None for all of them.
        folder: A folder that is removed when the server has ended.

    Raises:
        UserError: if the interpreter does not exist, or if ``CUDA_VISIBLE_DEVICES`` excludes one of the GPUs.
    """

    def __init__(
        self, python: str, model: str, arguments: Sequence[str], *, devices: Sequence[int] | None, folder: Path
    ) -> None:
        program = shutil.which(python)
        if program is None:
            raise UserError(f"model.engine.python: there is no program {python}")
        port = _free_port()
        self.url = f"http://127.0.0.1:{port}"  # of this machine only: whoever reaches the port controls the server
        handle, name = tempfile.mkstemp(prefix=f"lit-rlhf-vllm-{os.getpid()}-", suffix=".log")
        self.log = Path(name)
        command = [program, "-m", MODULE, "--model", model, "--served-model-name", SERVED_NAME]
        command += ["--host", "127.0.0.1", "--port", str(port), *arguments]
        keeper = str(Path(__file__).with_name("keeper.py"))
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", keeper, str(os.getpid()), str(folder), *command],
            stdin=subprocess.PIPE,
            stdout=handle,
            stderr=handle,
            env=_environment(devices),
            start_new_session=True,  # Ctrl-C reaches only the training
        )
        os.close(handle)
        self.close = weakref.finalize(self, _end, self._process)

    def wait(self, seconds: float) -> None:
        """Wait until the server answers.

        Args:
            seconds: The maximum number of seconds to wait.

        Raises:
            UserError: if the server ends, or does not answer within this time.
        """
        client, deadline = JSONClient(self.url, "model.engine", timeout=5.0, retries=0), time.monotonic() + seconds
        while True:
            if ended := self.ended():
                raise UserError(ended)
            try:
                return client.get("/health")
            except UserError:
                if time.monotonic() > deadline:
                    message = f"model.engine: the vLLM server did not come up within startup_timeout={seconds:g} s"
                    raise UserError(f"{message}: {self.last_error()}") from None
            time.sleep(POLL_SECONDS)

    def when_ended(self, act: Callable[[], None]) -> None:
        """Call a function, in a thread of its own, as soon as the server has ended."""

        def watch() -> None:
            self._process.wait()
            act()

        threading.Thread(target=watch, daemon=True).start()

    def ended(self, patience: float = 0.0) -> str:
        """Return a message if the server has ended or ends within ``patience`` seconds, otherwise an empty string."""
        try:
            code = self._process.wait(patience)
        except subprocess.TimeoutExpired:
            return ""
        how = f"killed by signal {code - 128}" if code > 128 else f"exit code {code}"
        return f"model.engine: the vLLM server has ended ({how}): {self.last_error()}"

    def last_error(self) -> str:
        """Return the last error in the server's log, or the log's last line if it has no error, and the log's path."""
        text = self.log.read_text(encoding="utf-8", errors="replace")
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        errors = [number for number, line in enumerate(lines) if ERROR.search(line)]
        # an error that mentions a root cause only refers to an earlier error
        causes = [number for number in errors if "root cause" not in lines[number]]
        number = (causes or errors or [len(lines) - 1])[-1]
        last = " ".join(lines[number : number + 2]) if lines else "the log is empty"  # some errors have two lines
        found = ERROR.search(last)
        return f"{last[found.start() :][:300] if found else last[-300:]} (log: {self.log})"


def _end(process: "subprocess.Popen[bytes]") -> None:
    """Close the keeper's input, so that it ends the server; kill it if it still runs after ``GIVE_UP_SECONDS``."""
    assert process.stdin is not None
    process.stdin.close()
    try:
        process.wait(GIVE_UP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _environment(devices: Sequence[int] | None) -> dict[str, str]:
    """Return the environment variables of the server.

    Args:
        devices: The indices of the server's GPUs among those that this process may use; None for all of them.

    Raises:
        UserError: if ``CUDA_VISIBLE_DEVICES`` excludes one of the devices.
    """
    own = {name: value for name, value in os.environ.items() if not NOT_INHERITED.fullmatch(name)}
    environment = SETTINGS | own
    if devices is not None:
        visible = own.get("CUDA_VISIBLE_DEVICES")
        names = None if visible is None else visible.split(",")
        if names is not None and max(devices) >= len(names):
            raise UserError(
                f"model.engine.devices: there is no GPU {max(devices)}, because CUDA_VISIBLE_DEVICES={visible}"
            )
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(str(n) if names is None else names[n] for n in devices)
    return environment


def _free_port() -> int:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        port: int = bound.getsockname()[1]
        return port
