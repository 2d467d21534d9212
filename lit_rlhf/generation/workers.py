"""Generation in worker processes, on GPUs of their own or with a share of the CPU cores, while training continues."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import weakref
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from lit_rlhf.errors import UserError
from lit_rlhf.generation.collectives import gather
from lit_rlhf.generation.engine import Engine, EngineContext, PendingRollout, Sampling, SpecialTokens
from lit_rlhf.generation.shared import Layout, map_tensors, open_shared_memory, trained_weights
from lit_rlhf.generation.worker import Answer, Assignment, Job, receive, send
from lit_rlhf.models.actor import Actor
from lit_rlhf.models.sharding import unsharded
from lit_rlhf.randomness import Stream
from lit_rlhf.types import PromptBatch, Rollout

Message = TypeVar("Message", Layout, Answer)


_PROGRAM = """
import signal
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):  # the parent acts on them, and ends its workers
    signal.signal(number, signal.SIG_IGN)
from lit_rlhf.generation.worker import main  # takes seconds, in which a signal may come
main({descriptor})
"""


class WorkerProcess:
    """A worker process, which gets an engine in its first message, and then generates responses, one job at a time.

    Args:
        threads: The number of CPU threads of the process.
        memories: The file descriptors of the blocks of shared memory that the process's jobs may name.
        name: The name of the process in error messages.
    """

    def __init__(self, threads: int, memories: Sequence[int], name: str) -> None:
        self.name = name
        self._connection, other = Pipe()
        environment = dict(os.environ, PYTHONPATH=os.pathsep.join(path or os.getcwd() for path in sys.path))
        environment["OMP_NUM_THREADS"] = str(threads)
        self._process = subprocess.Popen(
            [sys.executable, "-c", _PROGRAM.format(descriptor=other.fileno())],
            env=environment,
            stdin=subprocess.DEVNULL,
            pass_fds=(other.fileno(), *memories),
        )
        other.close()  # so that the end of the process closes the connection
        self.end = weakref.finalize(self, _end, self._process, self._connection)

    def give(self, message: Assignment | Job) -> None:
        """Send a message to the process.

        Raises:
            UserError: if the process has ended.
        """
        try:
            send(self._connection, message)
        except OSError as error:
            raise self._ended() from error

    def take(self, kind: type[Message]) -> Message:
        """Wait for the process's next message, and return it.

        Args:
            kind: The type that the message must have.

        Raises:
            UserError: if the process has ended, or reports an error.
        """
        try:
            message = receive(self._connection)
        except (EOFError, OSError) as error:
            raise self._ended() from error
        if isinstance(message, Answer) and message.error:
            raise UserError(f"{self.name} could not generate responses: {message.error}")
        assert isinstance(message, kind)
        return message

    def _ended(self) -> UserError:
        code = self._process.wait()
        how = f"killed by signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        return UserError(f"{self.name} has ended ({how}); --ckpt_path last resumes from the last checkpoint")


def _end(process: subprocess.Popen[bytes], connection: Connection) -> None:
    connection.close()
    process.kill()
    process.wait()


class Workers:
    """Several worker processes that divide the prompts of a batch among themselves.

    Each process holds a copy of the actor. The trained weights reach the processes through shared memory, in which
    `begin` writes one copy for all of them. The random numbers of a response depend on its row in the global batch,
    but not on its worker, so that the samples are the same for any number of workers.

    Args:
        engine: The engine that each worker uses.
        count: The number of workers.
        slots: The maximum number of rollouts that are pending at the same time; each has shared memory of its own.
        threads: The number of CPU threads of each worker.
        devices: The device of each worker.
    """

    def __init__(
        self,
        engine: Engine,
        count: int,
        *,
        slots: int,
        threads: int,
        devices: Sequence[torch.device],
    ) -> None:
        self.engine = engine
        self.count = count
        self.slots = slots
        self.threads = threads
        self.devices = devices
        self.device = torch.device("cpu")  # of the rollouts
        self.processes: list[WorkerProcess] = []
        self.free: list[int] = []  # blocks of shared memory that no pending rollout uses
        self.memories: list[int] = []
        self.layout: Layout | None = None
        self.tensors: dict[int, dict[str, Tensor]] = {}

    def start(self, context: EngineContext) -> None:
        """Start the processes; they load the actor while this process continues.

        Args:
            context: The properties of the run that the engine of each worker may need.

        Raises:
            UserError: if a process has ended already.
        """
        self.device = context.device
        self.memories = [open_shared_memory() for _ in range(self.slots)]
        self.free = list(self.memories)
        for number in range(self.count):
            name = f"the worker process {number} of model.engine"
            self.processes.append(WorkerProcess(self.threads, self.memories, name))
        for process, device in zip(self.processes, self.devices, strict=True):
            assignment = Assignment(
                engine=self.engine,
                context=replace(context, device=device),
                threads=self.threads,
                float32_precision=torch.backends.cuda.matmul.fp32_precision,
                deterministic=torch.are_deterministic_algorithms_enabled(),
                warns_only=torch.is_deterministic_algorithms_warn_only_enabled(),
            )
            process.give(assignment)

    def close(self) -> None:
        """End the processes, and free the shared memory."""
        for process in self.processes:
            process.end()
        for memory in self.memories:
            os.close(memory)
        self.processes, self.memories, self.free, self.layout = [], [], [], None
        self.tensors.clear()

    def begin(
        self,
        actor: Actor,
        prompts: PromptBatch,
        sampling: Sampling,
        special_tokens: SpecialTokens,
        *,
        stream: Stream,
        iteration: int,
    ) -> PendingRollout:
        """Copy the actor's weights into free shared memory, and return a pending rollout that is generated with them.

        All training processes call this method together; the arguments are those of `Engine.generate`.

        Raises:
            UserError: on all training processes, if a worker of one of them has ended or could not load the actor.
        """
        if self.layout is None:
            self.layout = self._loaded()
            self.tensors = {memory: map_tensors(memory, self.layout) for memory in self.memories}
        memory = self.free.pop()
        with unsharded(actor):
            for name, weight in trained_weights(actor).items():
                self.tensors[memory][name].copy_(weight)
        job = Job(
            memory=memory,
            prompts=prompts.to(torch.device("cpu")),
            sampling=sampling,
            special_tokens=special_tokens,
            stream=stream,
            iteration=iteration,
        )
        return _PendingRollout(self, job)

    def _loaded(self) -> Layout:
        """Wait until all workers have loaded the actor, and return the layout of its trained weights.

        Raises:
            UserError: on all training processes, if a worker of one of them has ended or could not load the actor.
        """
        layouts, error = [], ""
        try:
            layouts = [process.take(Layout) for process in self.processes]
        except UserError as problem:
            error = str(problem)
        _raise_first(error)
        return layouts[0]


def _raise_first(error: str) -> None:
    """Raise the first error among all training processes, if there is any; they all call this function together.

    Args:
        error: The message of this process's error; empty for none.

    Raises:
        UserError: on all training processes, if one of them has an error.
    """
    for problem in gather(error):
        if problem:
            raise UserError(problem)


class _PendingRollout(PendingRollout):
    def __init__(self, workers: Workers, job: Job) -> None:
        self.workers, self.job = workers, job
        self.answers: list[Answer] = []
        self.error = ""

    def run(self) -> None:
        used = []
        try:
            for process, prompts in zip(self.workers.processes, self._shares(), strict=False):
                process.give(replace(self.job, prompts=prompts))
                used.append(process)
            self.answers += [process.take(Answer) for process in used]
        except UserError as error:
            self.error = str(error)

    def result(self) -> Rollout:
        _raise_first(self.error)
        self.workers.free.append(self.job.memory)
        rollouts = [answer.rollout for answer in self.answers if answer.rollout is not None]
        return concatenate(rollouts, self.job.special_tokens.pad).to(self.workers.device)

    def _shares(self) -> list[PromptBatch]:
        """Return the prompts in non-empty parts of consecutive prompts, one part for each worker.

        If there are fewer prompts than workers, each part is one prompt, and some workers get no part.
        """
        prompts, total = self.job.prompts, len(self.job.prompts.tokens)
        count = min(self.workers.count, total)
        bounds = [total * number // count for number in range(count + 1)]
        return [_rows(prompts, start, end) for start, end in pairwise(bounds)]


def _rows(prompts: PromptBatch, start: int, end: int) -> PromptBatch:
    return PromptBatch(
        tokens=prompts.tokens[start:end],
        mask=prompts.mask[start:end],
        group=prompts.group[start:end],
        prompts=prompts.prompts[start:end],
        columns={name: values[start:end] for name, values in prompts.columns.items()},
    )


def concatenate(rollouts: Sequence[Rollout], padding: int) -> Rollout:
    """Return the rows of several rollouts as one rollout, padded on the right to the longest row.

    Args:
        rollouts: The rollouts, at least one.
        padding: The id of the padding token.
    """
    width = max(rollout.tokens.shape[1] for rollout in rollouts)
    time = max(rollout.response_mask.shape[1] for rollout in rollouts)

    def join(name: str, columns: int | None = None, value: float = 0) -> Tensor:
        parts = [getattr(rollout, name) for rollout in rollouts]
        if columns is not None:
            parts = [pad(part, (0, columns - part.shape[1]), value=value) for part in parts]
        return torch.cat(parts)

    return Rollout(
        tokens=join("tokens", width, padding),
        prompt_lengths=join("prompt_lengths"),
        response_lengths=join("response_lengths"),
        rollout_logprobs=join("rollout_logprobs", time),
        rollout_entropy=join("rollout_entropy", time),
        response_mask=join("response_mask", time, False),
        terminated=join("terminated"),
        group=join("group"),
    )
