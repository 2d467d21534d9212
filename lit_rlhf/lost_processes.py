"""When one process of a run dies, the others end too, at once and in one line."""

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from lit_rlhf.errors import UserError

GONE = (
    "another process of this run is gone: killed, out of memory, or stopped by an error that it tells itself; "
    "--ckpt_path last goes on from the last checkpoint"
)
LAUNCHER = "LIT_RLHF_LAUNCHER"
"""Environment variable: the first process of a run, which starts the others."""
CLOSED = ("Connection closed by peer", "Connection reset by peer", "remote process exited")
"""What gloo and NCCL say when they lose another process."""


@contextmanager
def together() -> Iterator[None]:
    """What is done together with other processes: without them it ends.

    Raises:
        UserError: if another process is gone.
    """
    done = threading.Event()
    if "TORCHELASTIC_RUN_ID" in os.environ or os.environ.get(LAUNCHER) == str(os.getppid()):
        threading.Thread(target=_end_with, args=(os.getppid(), done), daemon=True).start()
    first = os.environ.setdefault(LAUNCHER, str(os.getpid())) == str(os.getpid())
    try:
        yield
    except RuntimeError as error:
        if any(words in str(error) for words in CLOSED):
            raise UserError(f"{GONE} ({' '.join(str(error).split())})") from error
        raise
    finally:
        done.set()
        if first:
            os.environ.pop(LAUNCHER, None)


def _end_with(parent: int, done: threading.Event) -> None:
    while os.getppid() == parent:
        if done.wait(1.0):
            return
    print(f"lit-rlhf: error: {GONE}", file=sys.stderr, flush=True)
    os._exit(1)
