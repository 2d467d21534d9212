"""The assertion that a run that is resumed ends with the same bits as one that was not interrupted."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning
import torch
from torch import Tensor

from lit_rlhf.callbacks.checkpoint import IterationCheckpoint
from lit_rlhf.checkpoints import read_checkpoint
from lit_rlhf.modules.module import AlignmentModule
from lit_rlhf.testing.recorder import Recorder
from lit_rlhf.testing.runs import tiny_data, train

MEASURED = ("time/", "perf/")
"""The prefixes of the names of metrics that differ from run to run."""
SHOWN = 3
"""The number of differences that a message names."""


def assert_exact_resume(
    make: Callable[[], AlignmentModule],
    *,
    callbacks: Callable[[], Sequence[lightning.Callback]] = lambda: (),
    data: Callable[[], lightning.LightningDataModule] | None = None,
    iterations: int = 4,
    at: int = 2,
    ignore: Sequence[str] = (),
    seed: int = 0,
) -> None:
    """Assert that a run that is resumed from a checkpoint ends with the same bits as one that was not interrupted.

    One run goes through all iterations and saves a checkpoint on the way; a second run, with new objects, starts from
    this checkpoint. These must be equal in both runs: the metrics of the iterations after the checkpoint, except times,
    speeds and memory (``time/*``, ``perf/*``); the weights and the states of optimizers and schedules at the end; and
    the state of each callback, which is its ``state_dict`` and every public attribute that is a number, a string, a
    tensor, None, or a collection of these. Both runs are in the same process, so state that is kept in a global
    variable is not noticed. ::

        def test_my_callback():
            assert_exact_resume(tiny_ppo, callbacks=lambda: [MyCallback()])

    Args:
        make: A function that makes a new module, such as ``lambda: tiny_ppo([MyReward()])``.
        callbacks: A function that makes new callbacks.
        data: A function that makes a new data module; None for tiny data of the module's kind.
        iterations: The number of iterations, in place of the module's own.
        at: The iteration after which the checkpoint is saved.
        ignore: Names of metrics, or of attributes of callbacks, that may differ.
        seed: The seed of both runs.

    Raises:
        AssertionError: if something differs; the message names the first differences, with both values or, for
            tensors of several elements, the largest difference.
        ValueError: if ``at`` is not from 1 to ``iterations`` − 1.
    """
    if not 1 <= at < iterations:
        raise ValueError(f"at must be between 1 and {iterations - 1}, not {at}")
    with tempfile.TemporaryDirectory() as folder:

        def run(name: str, ckpt_path: str | None) -> tuple[Recorder, dict[str, Any]]:
            module, own = make(), list(callbacks())
            module.iterations = iterations
            source = tiny_data(module) if data is None else data()
            keep = IterationCheckpoint(every_n=iterations, keep_every_n=at, dirpath=str(Path(folder, name)))
            options: dict[str, Any] = {"folder": Path(folder, name), "ckpt_path": ckpt_path, "seed": seed}
            recorder = train(module, source, [*own, keep], **options)
            saved = read_checkpoint(Path(folder, name, "last.ckpt"))
            state = {key: saved[key] for key in ("state_dict", "optimizer_states", "lr_schedulers")}
            return recorder, {f"callback {type(c).__name__}": _state_of(c, ignore) for c in own} | state

        whole, expected = run("whole", None)
        resumed, state = run("resumed", str(Path(folder, "whole", f"iteration-{at:06d}.ckpt")))
    found = [
        f"iteration {at + number + 1}: {text}"
        for number, (one, other) in enumerate(zip(resumed.metrics, whole.metrics[at:], strict=True))
        for text in differences(_comparable(one, ignore), _comparable(other, ignore))
    ]
    found += differences(state, expected)
    if found:
        rest = f"; and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
        raise AssertionError(
            f"resumed after iteration {at} of {iterations}, the run differs from the uninterrupted one: "
            f"{'; '.join(found[:SHOWN])}{rest}"
        )


def _comparable(metrics: Mapping[str, float], ignore: Sequence[str]) -> dict[str, float]:
    """Return the metrics to compare, with the metrics of rewards first, since differences in these cause the others."""
    names = sorted(metrics, key=lambda name: not name.startswith("rewards/"))
    return {name: metrics[name] for name in names if not name.startswith(MEASURED) and name not in ignore}


def _state_of(callback: lightning.Callback, ignore: Sequence[str]) -> dict[str, Any]:
    public = {name: x for name, x in vars(callback).items() if not name.startswith("_") and name not in ignore}
    return {name: x for name, x in public.items() if _is_plain(x)} | {"state_dict": callback.state_dict()}


def _is_plain(value: Any) -> bool:
    """Return whether a value consists only of numbers, strings, bytes, tensors, None, and collections of these."""
    if isinstance(value, Mapping):
        return all(map(_is_plain, value.values()))
    if isinstance(value, list | tuple | set | frozenset):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str | bytes | Tensor)


def differences(found: Any, expected: Any, name: str = "") -> list[str]:
    """Describe each place at which two nested collections differ; tensors must have the same bits, and NaN equals NaN.

    >>> differences({"loss": 1.0, "steps": [1, 2]}, {"loss": 1.0, "steps": [1, 3]})
    ['steps[1] is 2, not 3']
    """
    return list(_differences(found, expected, name))


def _differences(found: Any, expected: Any, name: str) -> Iterator[str]:
    if isinstance(found, Mapping) and isinstance(expected, Mapping):
        for key in {**expected, **found}:
            inner = f"{name}[{key!r}]" if name else str(key)
            if key not in found or key not in expected:
                yield f"{inner} is {'missing' if key in expected else 'new'}"
            else:
                yield from _differences(found[key], expected[key], inner)
    elif isinstance(found, list | tuple) and isinstance(expected, list | tuple) and len(found) == len(expected):
        for number, pair in enumerate(zip(found, expected, strict=True)):
            yield from _differences(*pair, f"{name}[{number}]")
    elif isinstance(found, Tensor) and isinstance(expected, Tensor):
        if found.shape != expected.shape or not torch.equal(_bits(found), _bits(expected)):
            yield _of_tensors(found, expected, name)
    elif not (found == expected or (found != found and expected != expected)):  # NaN is the value that is not itself
        yield f"{name} is {found!r}, not {expected!r}"


def _bits(x: Tensor) -> Tensor:
    return x.detach().contiguous().reshape(-1).view(torch.uint8)


def _of_tensors(found: Tensor, expected: Tensor, name: str) -> str:
    if found.numel() == 1 == expected.numel() or found.shape != expected.shape:
        return f"{name} is {found.tolist()!r}, not {expected.tolist()!r}"
    return f"{name} differs by up to {float((found.double() - expected.double()).abs().max()):.3g}"
