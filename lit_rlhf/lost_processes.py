"""A context that ends a run in all its processes, with a one-line message, as soon as one of them dies."""

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from lit_rlhf.compat import LOST_PEER
from lit_rlhf.errors import UserError

MESSAGE = (
    "another process of this run has ended: killed, out of memory, or stopped by an error that it reported itself; "
    "--ckpt_path last resumes from the last checkpoint"
)
LAUNCHER = "LIT_RLHF_LAUNCHER"
"""The environment variable with the id of the run's first process, which starts the others."""


@contextmanager
def exit_with_peers() -> Iterator[None]:
    """Return a context in which this process ends when any other process of the run dies.

    A process that waits in a collective operation gets an error from the communication library. A process that was
    started by the run's first process or by torchrun also watches its parent, and exits at most about a second
    after the parent.

    Raises:
        UserError: if a collective fails because another process has ended.

    >>> with exit_with_peers():
    ...     raise RuntimeError("[pair.cc:553] Connection closed by peer [127.0.0.1]:1207")
    Traceback (most recent call last):
    lit_rlhf.errors.UserError: another process of this run has ended: ...
    """
    done = threading.Event()
    if "TORCHELASTIC_RUN_ID" in os.environ or os.environ.get(LAUNCHER) == str(os.getppid()):
        threading.Thread(target=_exit_after, args=(os.getppid(), done), daemon=True).start()
    first = os.environ.setdefault(LAUNCHER, str(os.getpid())) == str(os.getpid())
    try:
        yield
    except RuntimeError as error:
        if any(phrase in str(error) for phrase in LOST_PEER):
            raise UserError(f"{MESSAGE} ({' '.join(str(error).split())})") from error
        raise
    finally:
        done.set()
        if first:
            os.environ.pop(LAUNCHER, None)


def _exit_after(parent: int, done: threading.Event) -> None:
    """Exit when the parent process has ended, unless ``done`` is set first."""
    while os.getppid() == parent:
        if done.wait(1.0):
            return
    print(f"lit-rlhf: error: {MESSAGE}", file=sys.stderr, flush=True)
    os._exit(1)
