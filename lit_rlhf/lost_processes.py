"""When one process of a run dies, the others end too, at once and in one line."""

import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from lit_rlhf.errors import UserError

GONE = (
    "another process of this run is gone: killed, out of memory, or stopped by an error that it tells itself; "
    "--ckpt_path last goes on from the last checkpoint"
)


@contextmanager
def together() -> Iterator[None]:
    """What is done together with other processes: without them it ends.

    Raises:
        UserError: if another process is gone.
    """
    if "LOCAL_RANK" in os.environ:  # started by Lightning or torchrun, which may be killed
        threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, torch.distributed.DistBackendError) or "gloo/transport" in str(error):
            raise UserError(f"{GONE} ({' '.join(str(error).split())[:200]})") from error
        raise


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1.0)
    print(f"lit-rlhf: error: {GONE}", file=sys.stderr, flush=True)
    os._exit(1)
