"""Processes that start at once: forks of a process that has imported the package, which takes seconds.

Each is a process with an environment, a folder, an output and an exit status of its own, like one that Python starts.
The processes of one test session have the same parent, which starts with the first of them and ends with the session.
"""

import atexit
import fcntl
import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import tempfile
import time
from multiprocessing import reduction
from pathlib import Path
from types import SimpleNamespace

_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload(
    [
        "altair",
        "datasets",
        "lit_rlhf.lightning_cli",
        "lit_rlhf.export",
        "lit_rlhf.quickstart",
        "lit_rlhf.strategies",
        "torch.distributed.fsdp",
        "transformers.models.llama.modeling_llama",
    ]
)


WITHOUT_PLANS = "LIT_RLHF_TESTS_WITHOUT_PLANS"
"""The environment variable that makes these processes leave out the plans of their runs."""


class Program:
    """A program that runs: ``-m MODULE`` or the path of a file, and its arguments."""

    def __init__(self, *words: str, cwd: Path | str = ".", **environment: str):
        self.words = words
        self._folder = tempfile.TemporaryDirectory()
        self._output = [Path(self._folder.name, name) for name in ("stdout", "stderr")]
        arguments = words, os.path.abspath(cwd), {**os.environ, **environment}, self._output
        self._process = _processes.Process(target=_main, args=arguments)
        self._process.start()
        self.pid = self._process.pid

    def output(self) -> str:
        """Return what the program has written to its standard output so far."""
        return self._output[0].read_text() if self._output[0].exists() else ""

    def wait(self, timeout: float = 120) -> subprocess.CompletedProcess[str]:
        """Wait for the end, and return the status and the output; end the program if it takes too long."""
        self._process.join(timeout)
        late = self._process.is_alive()
        self.kill()
        out, err = (path.read_text() if path.exists() else "" for path in self._output)
        self._folder.cleanup()
        assert not late, f"it took more than {timeout} s: {err[-3000:]}"
        return subprocess.CompletedProcess(self.words, self._process.exitcode, out, err)

    def is_running(self) -> bool:
        """Return whether the program has not ended."""
        return self._process.is_alive()

    def kill(self) -> None:
        """End the program if it still runs."""
        self._process.kill()
        self._process.join()


def run(*words: str, cwd: Path | str = ".", timeout: float = 120, **environment: str) -> subprocess.CompletedProcess:
    """Run a program, as ``subprocess.run([sys.executable, *words])`` does."""
    return Program(*words, cwd=cwd, **environment).wait(timeout)


def torchrun(count: int, *words: str, cwd: Path | str = ".", timeout: float = 120, **environment: str) -> list:
    """Run a program in several processes with the variables that torchrun sets, and return what each process did."""
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "TORCHELASTIC_RUN_ID": "tests"}
    shared |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "GROUP_RANK": "0"}
    programs = [
        Program(*words, cwd=cwd, **{**environment, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(count)
    ]
    end = time.monotonic() + timeout
    try:
        return [program.wait(max(0.0, end - time.monotonic())) for program in programs]
    finally:
        for program in programs:
            program.kill()


def leave_out_plans(patch=setattr) -> None:
    """Let runs begin without a plan, which takes a second; ``patch`` is a function like setattr."""
    from lit_rlhf.callbacks.plan import PrintPlan
    from lit_rlhf.errors import UserError

    def plan(self, trainer, module):
        raise UserError("left out by the tests")

    patch(PrintPlan, "plan", plan)


def fork_workers(patch=setattr) -> None:
    """Make the worker processes of `Ahead` forks, too; ``patch`` is a function like setattr."""
    from lit_rlhf.generation import workers

    patch(workers, "subprocess", SimpleNamespace(Popen=_Popen, DEVNULL=subprocess.DEVNULL))


class _Popen:
    """What `Ahead` needs of ``subprocess.Popen([sys.executable, "-c", code])``: open files keep their numbers."""

    def __init__(self, words, *, env, stdin, pass_fds):
        assert (words[:2], stdin) == ([sys.executable, "-c"], subprocess.DEVNULL)
        arguments = words[2], env, [_OpenFile(number) for number in pass_fds]
        self._process = _processes.Process(target=_run_code, args=arguments, daemon=True)
        self._process.start()
        self.pid, self.kill = self._process.pid, self._process.kill

    def wait(self) -> int:
        self._process.join()
        return self._process.exitcode


class _OpenFile:
    """A file descriptor that is sent to a process when it starts."""

    def __init__(self, number, sent=None):
        self.number, self.sent = number, sent

    def __reduce__(self):
        return _OpenFile, (self.number, reduction.DupFd(self.number))


def _run_code(code, environment, files):
    apart = [fcntl.fcntl(file.sent.detach(), fcntl.F_DUPFD, 500) for file in files]  # from the numbers of the others
    for file, number in zip(files, apart, strict=True):
        os.dup2(number, file.number)
        os.close(number)
    os.environ.clear()
    os.environ.update(environment)
    sys.path[:] = environment["PYTHONPATH"].split(os.pathsep)
    exec(code)


def free_port() -> int:
    """Return a port on which nothing listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def _main(words, folder, environment, output):
    for descriptor, path in enumerate(output, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), descriptor)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    if WITHOUT_PLANS in environment:
        leave_out_plans()
    module = words[0] == "-m"
    sys.argv[1:] = words[2 if module else 1 :]
    try:
        if module:
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            sys.path.insert(0, os.path.dirname(words[0]))
            runpy.run_path(words[0], run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # multiprocessing does not
