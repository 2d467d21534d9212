"""The assertion that a run on several processes has the same result as a run on one process."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import math
import multiprocessing
import os
import socket
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import lightning
import torch
from torch import Tensor

from lit_rlhf.modules.module import AlignmentModule
from lit_rlhf.testing.resuming import MEASURED, SHOWN
from lit_rlhf.testing.runs import tiny_data, train

ROUNDING = ("engine/mismatch_max",)
"""The metrics that measure only rounding errors, and may therefore differ."""

PRELOADED = [
    "datasets",
    "lit_rlhf.testing.ranks",
    "torch.distributed.fsdp",
    "transformers.models.llama.modeling_llama",
]
"""The modules that the fork server imports before it forks the processes."""


class Function(NamedTuple):
    """The location of a function at the top level of a module, from which another process can import the function."""

    file: str
    module: str
    name: str


def assert_same_on_ranks(
    make: Callable[[], AlignmentModule],
    *,
    callbacks: Callable[[], Sequence[lightning.Callback]] | None = None,
    data: Callable[[], lightning.LightningDataModule] | None = None,
    processes: int = 2,
    strategy: str = "ddp",
    iterations: int = 2,
    rtol: float = 1e-3,
    atol: float = 1e-4,
    ignore: Sequence[str] = (),
    seed: int = 0,
    timeout: float = 300.0,
) -> None:
    """Assert that a run on several processes ends with the weights and the metrics of a run on one process.

    Real processes run on this machine's CPU and communicate through Gloo. On each process, the metrics of every
    iteration, except times and speeds (``time/*``, ``perf/*``), and the final weights must be those of the run on one
    process, up to rounding. ::

        def make():
            return tiny_ppo([MyReward()])

        def test_on_two_processes():
            assert_same_on_ranks(make)

    Args:
        make: A function that makes the module. Other processes import the function, so it must be defined at the top
            level of a file. The same holds for ``callbacks`` and ``data``.
        callbacks: A function that makes callbacks, or None; the metrics that they log are compared.
        data: A function that makes the data module; None for tiny data of the module's kind.
        processes: The number of processes.
        strategy: The Trainer's strategy: ``ddp``, ``fsdp2`` or ``fsdp``.
        iterations: The number of iterations, in place of the module's own.
        rtol: The relative tolerance of metrics and weights.
        atol: The absolute tolerance of metrics and weights.
        ignore: Names of metrics that may differ.
        seed: The seed of all runs.
        timeout: The number of seconds to wait for each process in turn, before all are killed.

    Raises:
        AssertionError: if a metric or a weight differs, or a process fails or takes too long; the message names the
            first differences, with both values.
        ValueError: if a function is not at the top level of a file.
    """
    functions = [None if f is None else _function(f) for f in (make, callbacks, data)]
    with tempfile.TemporaryDirectory() as folder:
        common = functions, iterations, seed, folder
        _run([(strategy, rank, processes, *common) for rank in range(processes)], ("auto", 0, 1, *common), timeout)
        alone = torch.load(Path(folder, "auto-0.pt"))
        ranks = [torch.load(Path(folder, f"{strategy}-{rank}.pt")) for rank in range(processes)]
    found = [
        f"{text} on process {rank} of {processes}"
        for rank, result in enumerate(ranks)
        for text in _differences(result, alone, rtol, atol, ignore)
    ]
    if found:
        rest = f"; and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
        raise AssertionError(f"a run on one process gives something else: {'; '.join(found[:SHOWN])}{rest}")


def _function(function: Any) -> Function:
    name, module = getattr(function, "__qualname__", ""), getattr(function, "__module__", "")
    if not name.isidentifier():  # a lambda, a method or an inner function; a partial has no name
        raise ValueError(
            f"assert_same_on_ranks takes functions defined at the top level of a file, which other processes can "
            f"import, not {name or function!r}"
        )
    return Function(str(inspect.getsourcefile(function)), module, name)


def _differences(
    found: Mapping[str, Any], expected: Mapping[str, Any], rtol: float, atol: float, ignore: Sequence[str]
) -> Iterator[str]:
    for number, (one, other) in enumerate(zip(found["metrics"], expected["metrics"], strict=True), start=1):
        for name in sorted(one.keys() | other.keys(), key=lambda name: not name.startswith("rewards/")):
            a, b = one.get(name, math.nan), other.get(name, math.nan)
            skipped = name.startswith(MEASURED) or name in ROUNDING or name in ignore
            if not (skipped or math.isclose(a, b, rel_tol=rtol, abs_tol=atol) or (a != a and b != b)):
                yield f"{name} of iteration {number} is {b:.6g}, but {a:.6g}"
    for name, weight in expected["weights"].items():
        distance = float((found["weights"][name].double() - weight.double()).abs().max())
        if not torch.allclose(found["weights"][name], weight, rtol=rtol, atol=atol):
            yield f"{name} differs by up to {distance:.3g}"


def _run(group: list[tuple[Any, ...]], alone: tuple[Any, ...], timeout: float) -> None:
    """Run the processes of a group, and one process on its own, all at the same time.

    Raises:
        AssertionError: if a process fails or takes too long.
    """
    methods = multiprocessing.get_all_start_methods()
    context: Any = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
    if hasattr(context, "set_forkserver_preload"):
        context.set_forkserver_preload(PRELOADED)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    folder = alone[-1]
    started = [context.Process(target=_main, args=(work, port, sys.path, os.getcwd())) for work in [*group, alone]]
    for process in started:
        process.start()
    try:
        for process in started:
            process.join(timeout)
        failed = sorted(Path(folder).glob("*.txt"))
        assert not failed, failed[0].read_text(encoding="utf-8")
        assert all(process.exitcode == 0 for process in started), (
            f"the processes should have ended within {timeout:g} s with status 0; "
            f"their statuses are {', '.join(str(process.exitcode) for process in started)}"
        )
    finally:
        for process in started:
            process.kill()
            process.join()


def _main(work: tuple[Any, ...], port: int, path: list[str], cwd: str) -> None:
    """Train in a process of its own, and write the weights and the metrics, or the error."""
    strategy, rank, count, functions, iterations, seed, folder = work
    out = Path(folder, f"{strategy}-{rank}")
    if count > 1:
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "tests"}
        shared |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "GROUP_RANK": "0"}
        os.environ.update(shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
    try:
        os.chdir(cwd)
        sys.path[:] = path
        torch.set_num_threads(1)
        make, callbacks, data = (_nothing if f is None else _import(f) for f in functions)
        module: Any = make()
        module.iterations = iterations
        source = data() or tiny_data(module)
        options: dict[str, Any] = {"folder": folder, "seed": seed, "strategy": strategy, "devices": count}
        recorder = train(module, source, callbacks() or (), **options)
        weights: dict[str, Tensor] = recorder.weights
        torch.save({"metrics": recorder.metrics, "weights": weights}, out.with_suffix(".pt"))
    except BaseException as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{frame.filename}, line {frame.lineno}"
        out.with_suffix(".txt").write_text(
            f"process {rank} of {count} failed: {type(error).__name__}: {error} ({where})", encoding="utf-8"
        )
        os._exit(1)  # the other processes may wait in a collective for ever
    if count > 1:
        torch.distributed.destroy_process_group()


def _nothing() -> None:
    """Return None, in place of a function that was not given."""


def _import(function: Function) -> Any:
    """Import a function: from its module if the module's name leads to the function's file, or else from the file."""
    try:
        spec = importlib.util.find_spec(function.module)
    except (ImportError, ValueError):
        spec = None
    if spec is None or spec.origin is None or not os.path.samefile(spec.origin, function.file):
        spec = importlib.util.spec_from_file_location(function.module, function.file)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[function.module] = module
        spec.loader.exec_module(module)
    return getattr(importlib.import_module(function.module), function.name)
