"""Calls of code outside this package: in a thread that can be given up, and without effects on global state."""

import ctypes
import random
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import copy_context
from typing import TypeVar

import numpy as np
import torch

Result = TypeVar("Result")


class CallTimeoutError(Exception):
    """An error because a call did not return in time.

    Args:
        stack: The frames of the call at that time, the innermost last.
    """

    def __init__(self, stack: traceback.StackSummary) -> None:
        super().__init__("the call did not return in time")
        self.stack = stack


def call_in_thread(function: Callable[[], Result], timeout: float | None = None) -> Result:
    """Call a function in a thread of its own, and return its result, or raise its exception.

    A call that takes too long is given up: its thread gets an exception, which ends Python code such as an endless
    loop. A call into C, such as a request without a time limit, ends when it returns; until then the thread stays, but
    neither a later call nor the end of the process waits for it. C code that keeps the interpreter's lock cannot be
    given up, because it stops all threads.

    Args:
        function: The function, which has no arguments. It is called with the caller's context variables, gradient mode
            and CUDA device.
        timeout: The maximum number of seconds to wait for the result; None for no limit.

    Raises:
        CallTimeoutError: if the function does not return in time.

    >>> call_in_thread(lambda: 1 + 1, timeout=10.0)
    2
    """
    results: list[Result] = []
    errors: list[BaseException] = []
    gradient, device = torch.is_grad_enabled(), torch.cuda.current_device() if torch.cuda.is_initialized() else -1

    def run() -> None:
        try:
            with torch.set_grad_enabled(gradient), torch.cuda.device(device):
                results.append(function())
        except BaseException as error:
            errors.append(error)

    # a daemon: Python's exit does not wait for it
    thread = threading.Thread(target=copy_context().run, args=(run,), daemon=True)
    thread.start()
    thread.join(timeout)
    if errors:
        raise errors[0]
    if results:
        return results[0]
    assert thread.ident is not None
    frame = sys._current_frames().get(thread.ident)
    stack = traceback.extract_stack(frame) if frame is not None else traceback.StackSummary()
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(SystemExit))
    raise CallTimeoutError(stack)


@contextmanager
def isolated(seed: int | None = None) -> Iterator[None]:
    """Restore global state at the end of this context, so that code outside this package changes none of it.

    The state is that of the global generators of Python, NumPy and PyTorch, and PyTorch's default type, default device,
    gradient mode and number of threads.

    Args:
        seed: The seed of the global generators inside this context; None to keep their state.

    >>> with isolated(seed=1):
    ...     first = random.random()
    ...     torch.set_default_dtype(torch.float64)
    >>> with isolated(seed=1):
    ...     random.random() == first, torch.get_default_dtype()
    (True, torch.float32)
    """
    dtype, device, threads = torch.get_default_dtype(), torch.get_default_device(), torch.get_num_threads()
    restore_generators = _generators()
    try:
        if seed is not None:
            random.seed(seed)
            np.random.seed(seed % 2**32)  # noqa: NPY002  (code outside this package uses the global generator)
            torch.manual_seed(seed)
        with torch.set_grad_enabled(torch.is_grad_enabled()):
            yield
    finally:
        restore_generators()
        torch.set_default_dtype(dtype)
        if torch.get_default_device() != device:
            torch.set_default_device(None if device.type == "cpu" else device)  # None: no mode around every operation
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)


def _generators() -> Callable[[], None]:
    """Return a function that restores the present state of the global generators."""
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []

    def restore() -> None:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
        torch.set_rng_state(cpu)
        if cuda:
            torch.cuda.set_rng_state_all(cuda)

    return restore
