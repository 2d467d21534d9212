"""Generation that runs ahead of training, by a fixed number of iterations."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from lit_rlhf.errors import UserError
from lit_rlhf.generation.engine import DetachedEngine, Engine, EngineContext, PendingRollout, Sampling, SpecialTokens
from lit_rlhf.generation.native import NativeEngine
from lit_rlhf.generation.workers import Workers
from lit_rlhf.models.actor import Actor
from lit_rlhf.randomness import Stream
from lit_rlhf.types import PromptBatch, Rollout


@dataclass(frozen=True, slots=True)
class Flight:
    """A rollout that is being generated, and the weights of the policy that draws its responses."""

    pending: PendingRollout
    idle: Future[float]  # done when the responses are; its result is the generators' idle time before them, in seconds
    weights: list[Tensor]  # on the host: this process's part of each trained parameter of the actor; empty if not kept


class Landing(NamedTuple):
    """A rollout that was generated ahead, and the seconds for which the learner and the generators waited."""

    rollout: Rollout
    learner_waited: float
    generators_waited: float


class Ahead(Engine):
    """An engine that generates responses, with weights that are a few iterations old, while the learner trains.

    Iteration i learns from responses that the policy after iteration i − 1 − lag drew (the initial policy in the first
    iterations). The lag is fixed, not "whatever is ready", so that the responses remain a function of the seed, the
    iteration and the row: a run has the same result each time, even if it is interrupted and resumed.

    An engine that works in the training process, such as `NativeEngine`, generates the responses for training in
    worker processes instead, on other GPUs or with CPU cores of their own; a server generates them on its own devices.
    Responses for validation and prediction are generated without a lag.

    For each training process, the host's memory holds lag + 1 full copies of the actor's trained weights for its worker
    processes, in the precision in which the workers hold them, and, for `Guard`, lag + 1 copies of the process's own
    part of these weights. With eight training processes and a lag of 1, the workers' copies are 16 in all: 256 GB for 8
    billion parameters in bfloat16.

    With a lag, the responses are off-policy: ``model.correction`` or `VTrace` corrects for this. The ratio π / π_old of
    the objectives still begins at 1, because π_old is the actor at the beginning of the update (unless
    `Correction.bypass` makes π_old the policy that drew the responses).

    Source: Noukhovitch et al. 2024 (asynchronous RLHF, arXiv 2410.18252), section 3; actors with an older policy as in
    Espeholt et al. 2018 (IMPALA, arXiv 1802.01561), section 3.

    Args:
        engine: The engine that generates the responses.
        lag: The number of iterations by which the policy that draws the responses is older than without this class;
            with 0, the inner engine is used directly, as if this class were not there.
        workers: The number of worker processes of each training process, which share the work on its prompts. This
            number does not change the samples. With 0, the training process itself generates the same responses, with
            a copy of the older weights; this is slower, but needs no second device. A server needs no workers.
        threads: The number of CPU threads of each worker process. If the workers compute on the CPU, the training
            process gives up as many threads as its workers have together, but keeps at least one.
        devices: The devices of the worker processes, such as ``cuda:1``: the first ``workers`` of them for the first
            training process of a machine, the next ones for the second, and so on. None for the GPUs that are not
            used for training, or for the CPU if training is on the CPU.

    Raises:
        ValueError: if ``lag`` or ``workers`` is negative, ``threads`` is less than 1, ``engine`` is an `Ahead`, or the
            name of a device is not like ``cpu`` or ``cuda:1``.

    >>> Ahead(lag=2).lag
    2

    In a configuration::

        model:
          engine: {class_path: Ahead, init_args: {lag: 1}}
          correction: {class_path: Correction}
    """

    def __init__(
        self,
        engine: Engine = NativeEngine(),
        lag: int = 1,
        workers: int = 1,
        threads: int = 1,
        devices: list[str] | None = None,
    ) -> None:
        for name, value, least in (("lag", lag, 0), ("workers", workers, 0), ("threads", threads, 1)):
            if value < least:
                raise ValueError(f"engine.{name} must be {least} or more, not {value}")
        if isinstance(engine, Ahead):
            raise ValueError("engine.engine must be an engine that generates, not Ahead itself")
        for name in devices or ():
            if not re.fullmatch(r"cpu|cuda:\d+", name):
                raise ValueError(f"engine.devices must be names such as cuda:1, not {name!r}")
        self.engine = engine
        self.lag = lag
        self.workers = workers
        self.threads = threads
        self.devices = devices
        self.flights: dict[int, Flight] = {}  # by the iteration that learns from the rollout
        self._context: EngineContext | None = None
        self._unstarted = engine  # after `start`, a copy from before `start`, for the worker processes
        self._detached: DetachedEngine | Workers | None = None
        self._thread: ThreadPoolExecutor | None = None
        self._threads_before: int | None = None
        self._idle_since = 0.0

    @property
    def is_exact(self) -> bool:
        """Whether the inner engine is exact and draws the responses with the actor's current weights."""
        return self.engine.is_exact and self.lag == 0

    def start(self, context: EngineContext) -> None:
        """Start the inner engine; worker processes start with the first `launch`."""
        self._context, self._unstarted = context, deepcopy(self.engine)
        self.engine.start(context)

    def close(self) -> None:
        """Drop the rollouts that are being generated, end the worker processes, and close the inner engine."""
        workers, thread = self._detached, self._thread
        self.flights.clear()
        self._detached = self._thread = None
        if thread is not None:
            thread.shutdown(wait=False, cancel_futures=True)
        if workers is not None:
            workers.close()
        self.engine.close()
        if self._threads_before is not None:
            torch.set_num_threads(self._threads_before)
            self._threads_before = None

    def generate(
        self,
        actor: Actor,
        prompts: PromptBatch,
        sampling: Sampling,
        special_tokens: SpecialTokens,
        *,
        stream: Stream,
        iteration: int,
    ) -> Rollout:
        """Generate responses with the actor's current weights, wait for them, and return the rollout.

        A server generates these responses after those of the rollouts that were launched earlier. The arguments are
        those of `Engine.generate`.
        """
        if self._thread is None or not isinstance(self.engine, DetachedEngine):
            return self.engine.generate(actor, prompts, sampling, special_tokens, stream=stream, iteration=iteration)
        pending = self.engine.begin(actor, prompts, sampling, special_tokens, stream=stream, iteration=iteration)
        self._thread.submit(self._run, pending).result()
        return pending.result()

    def launch(
        self,
        actor: Actor,
        prompts: PromptBatch,
        sampling: Sampling,
        special_tokens: SpecialTokens,
        *,
        iteration: int,
        keep_weights: bool = True,
    ) -> None:
        """Begin to generate the responses of an iteration with the actor's current weights; do not wait for them.

        All processes call this method together. The first call starts the worker processes.

        Args:
            actor: The policy.
            prompts: The prompts of the iteration.
            sampling: The options for sampling.
            special_tokens: The stop tokens and the padding token.
            iteration: The iteration that will learn from the responses.
            keep_weights: Whether to keep a copy of the weights for `weights_of`. Without worker processes or a server,
                a copy is kept in any case, because the responses are only generated in `land`.

        Raises:
            UserError: if there are not enough devices for the worker processes, if a worker process has ended or could
                not load the actor, or if the inner engine refuses the options for sampling.
        """
        if self._thread is None:
            self._start_working()
        keys: dict[str, Any] = {"stream": Stream.ROLLOUT, "iteration": iteration}
        assert self._thread is not None
        if self._detached is None:
            generate = partial(self.engine.generate, actor, prompts, sampling, special_tokens, **keys)
            pending: PendingRollout = _InThisProcess(generate)
        else:
            pending = self._detached.begin(actor, prompts, sampling, special_tokens, **keys)
        kept = _trained(actor) if keep_weights or self._detached is None else []
        weights = [_local(parameter).to("cpu", copy=True) for parameter in kept]
        self.flights[iteration] = Flight(pending, self._thread.submit(self._run, pending), weights)

    def land(self, iteration: int) -> Landing:
        """Wait for the responses of an iteration, and return them with the waiting times.

        All processes call this method together, inside the context of `weights_of`.

        Args:
            iteration: The iteration that learns from the responses, as in `launch`.

        Raises:
            UserError: if the responses could not be generated.
        """
        flight, start = self.flights[iteration], time.monotonic()
        idle = flight.idle.result()
        return Landing(flight.pending.result(), time.monotonic() - start, idle)

    @contextmanager
    def weights_of(self, actor: Actor, iteration: int) -> Iterator[None]:
        """Make the actor use the weights that draw an iteration's responses, inside this context.

        If `launch` has not kept these weights, the actor's weights stay as they are.
        """
        kept = self.flights[iteration].weights
        pairs = list(zip(map(_local, _trained(actor)), kept, strict=True)) if kept else []
        now = [weight.to("cpu", copy=True) for weight, _ in pairs]
        for weight, old in pairs:
            weight.copy_(old)
        try:
            yield
        finally:
            for (weight, _), current in zip(pairs, now, strict=True):
                weight.copy_(current)

    def _run(self, pending: PendingRollout) -> float:
        """Generate a rollout, and return the seconds from the end of the previous rollout to the start of this one."""
        idle = time.monotonic() - self._idle_since
        pending.run()
        self._idle_since = time.monotonic()
        return idle

    def _start_working(self) -> None:
        """Start the worker processes, if the engine needs any, and the thread that generates the pending rollouts."""
        assert self._context is not None, "call start() first"
        if isinstance(self.engine, DetachedEngine):
            self._detached = self.engine
        elif self.workers:
            self._detached = self._start_workers(self._context)
        self._thread, self._idle_since = ThreadPoolExecutor(1, "rollouts"), time.monotonic()

    def _start_workers(self, context: EngineContext) -> Workers:
        devices = self._devices(context)
        if devices[0].type == "cpu":
            self._threads_before = torch.get_num_threads()
            torch.set_num_threads(max(1, self._threads_before - self.workers * self.threads))
        workers = Workers(self._unstarted, self.workers, slots=self.lag + 1, threads=self.threads, devices=devices)
        try:
            workers.start(context)
        except BaseException:
            workers.close()
            raise
        return workers

    def _devices(self, context: EngineContext) -> Sequence[torch.device]:
        """Return the device of each worker process of this training process.

        Raises:
            UserError: if there are not enough devices.
        """
        if self.devices is None and context.device.type == "cpu":
            return [context.device] * self.workers
        free = (number for number in range(torch.cuda.device_count()) if number not in context.device_ids)
        names = self.devices or [f"cuda:{number}" for number in free]
        mine = names[context.process * self.workers : (context.process + 1) * self.workers]
        if len(mine) < self.workers:
            needed = len(context.device_ids) * self.workers
            raise UserError(
                f"model.engine.devices: {needed} worker processes need {needed} devices besides those of the training, "
                f"not {len(names)}; use fewer GPUs for training (trainer.devices), or lag: 0"
            )
        return [torch.device(name) for name in mine]


class _InThisProcess(PendingRollout):
    """A rollout that this process generates when `result` is called, with the actor's weights at that time."""

    def __init__(self, generate: Callable[[], Rollout]) -> None:
        self.generate = generate

    def run(self) -> None:
        """Do nothing: `result` generates the responses, in the thread that trains."""

    def result(self) -> Rollout:
        return self.generate()


def _trained(actor: Actor) -> list[Tensor]:
    return [parameter.detach() for parameter in actor.own_parameters().values()]


def _local(tensor: Tensor) -> Tensor:
    """Return this process's shard of a parameter, or the whole parameter if it is not sharded; nothing is copied."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
