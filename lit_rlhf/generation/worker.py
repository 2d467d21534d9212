"""The program of a worker process, which generates responses with weights from shared memory until its parent ends.

`lit_rlhf.generation.workers` starts the program with the file descriptor of a connection, through which the parent and
the worker send pickled objects to each other.
"""

from __future__ import annotations

import os
import pickle
import sys
import threading
import time
import traceback
from contextlib import nullcontext
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch

from lit_rlhf.generation.engine import Engine, EngineContext, Sampling, SpecialTokens
from lit_rlhf.generation.shared import Layout, map_tensors, trained_weights
from lit_rlhf.models.precision import store_in_bfloat16
from lit_rlhf.models.scoring import freeze
from lit_rlhf.models.weights import unread_weights
from lit_rlhf.randomness import Stream
from lit_rlhf.types import PromptBatch, Rollout


@dataclass(frozen=True, slots=True, kw_only=True)
class Assignment:
    """The first message to a worker: the engine that it uses, and the settings of its process."""

    engine: Engine
    context: EngineContext  # with the worker's own device
    threads: int
    float32_precision: str  # of matrix products on CUDA
    deterministic: bool  # whether torch must use deterministic algorithms
    warns_only: bool  # whether operations that are not deterministic only cause a warning


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A message to a worker: prompts to answer, and the shared memory that contains the weights to use."""

    memory: int  # the file descriptor of the shared memory
    prompts: PromptBatch
    sampling: Sampling
    special_tokens: SpecialTokens
    stream: Stream
    iteration: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """A worker's message to its parent: the responses, or an error message."""

    rollout: Rollout | None = None  # on the CPU
    error: str = ""


def send(connection: Connection, message: Any) -> None:
    """Send an object that can be pickled; the tensors in the object are copied."""
    connection.send_bytes(pickle.dumps(message))


def receive(connection: Connection) -> Any:
    """Wait for the next object on a connection, and return it.

    Raises:
        EOFError: if the other side has ended.
    """
    return pickle.loads(connection.recv_bytes())


def serve(connection: Connection) -> None:
    """Load the actor, send the layout of its trained weights, and answer one job after another.

    Args:
        connection: The connection to the parent process, which sends an `Assignment` and then each `Job`.

    Raises:
        EOFError: if the parent has ended or has closed the connection.
    """
    assignment: Assignment = receive(connection)
    torch.set_num_threads(assignment.threads)
    if assignment.deterministic:
        torch.use_deterministic_algorithms(True, warn_only=assignment.warns_only)
    if assignment.context.device.type == "cuda":
        torch.cuda.set_device(assignment.context.device)
        torch.backends.cuda.matmul.fp32_precision = assignment.float32_precision
    device, half = assignment.context.device, assignment.context.precision == "bf16-mixed"
    assignment.engine.start(assignment.context)
    with unread_weights() as unread:
        actor = assignment.context.load_actor()
    freeze(actor)
    if half:  # before the weights are read, where they can be read later, so that they need no more memory at first
        store_in_bfloat16(actor, all_weights=assignment.context.rounds_all_weights)
    unread.read(actor, device)
    weights = trained_weights(actor)
    layout = Layout.of(weights)
    send(connection, layout)
    autocast = torch.autocast(device.type, dtype=torch.bfloat16, cache_enabled=False) if half else nullcontext()
    slots: dict[int, dict[str, torch.Tensor]] = {}
    while True:
        job: Job = receive(connection)
        if job.memory not in slots:
            slots[job.memory] = map_tensors(job.memory, layout)
        with torch.no_grad(), autocast:
            for name, weight in weights.items():
                weight.copy_(slots[job.memory][name])
            rollout = assignment.engine.generate(
                actor,
                job.prompts.to(device),
                job.sampling,
                job.special_tokens,
                stream=job.stream,
                iteration=job.iteration,
            )
        send(connection, Answer(rollout=rollout.to(torch.device("cpu"))))


def main(descriptor: int) -> None:
    """Serve the parent process on the other side of a connection, until the parent ends or closes the connection.

    Args:
        descriptor: The file descriptor of the connection.

    Raises:
        SystemExit: if the actor cannot be loaded or a job fails; the error has then been sent to the parent.
    """
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    connection = Connection(descriptor)
    try:
        serve(connection)
    except EOFError:
        return
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        reason = f"{type(error).__name__}: {error} ({frame.filename}, line {frame.lineno})"
        send(connection, Answer(error=" ".join(reason.split())))
        sys.exit(1)


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)
