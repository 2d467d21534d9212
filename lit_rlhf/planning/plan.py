"""A plan: whether a run fits its devices, and the change that helps most if it does not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

from lit_rlhf.planning.dry_run import Outputs
from lit_rlhf.planning.hardware import GB
from lit_rlhf.planning.memory import PROCESSES_ON_A_HOST, Phase, cache_size, host_bytes, phases
from lit_rlhf.planning.setting import Setting
from lit_rlhf.planning.speed import Work, iteration_tokens, work

RESERVED = 2 * GB
"""The bytes of a device that are left to CUDA, to its libraries and to gaps between tensors; on a CPU, to Python."""
MORE_PROCESSES = (2, 4, 8, 16, 32, 64)
"""The numbers of GPUs that are tried if a run does not fit."""


class Change(NamedTuple):
    """A change to the configuration, as an option or in words, and its effect on memory."""

    text: str
    bytes: float  # that a process holds at the peak, after the change
    suffices: bool  # whether the run then fits


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The memory, the work and the time of a run.

    Args:
        setting: The run, with the changes that ``fit`` makes by itself.
        phases: The memory that a process uses in each phase.
        host: The maximum number of bytes that the models need in the memory of a host.
        tokens: The maximum number of tokens in an iteration, over all processes.
        work: The FLOPs and seconds of each phase.
        checkpointing_added: Whether ``fit`` turns on `ActivationCheckpointing`, without which the update does not fit.
        advice: The change that helps most; None if the run fits.
    """

    setting: Setting
    phases: tuple[Phase, ...]
    host: float
    tokens: int
    work: tuple[Work, ...]
    checkpointing_added: bool
    advice: Change | None

    @property
    def peak(self) -> Phase:
        """The phase that needs the most memory."""
        return max(self.phases, key=lambda phase: phase.bytes)

    @property
    def fits(self) -> bool:
        """Whether every phase fits into the memory of the devices."""
        return self.advice is None


def make_plan(setting: Setting, may_checkpoint: bool = True) -> Plan:
    """Plan a run.

    Args:
        setting: The run.
        may_checkpoint: Whether `ActivationCheckpointing` may be turned on where the update needs it, as in ``fit``.

    Raises:
        UserError: if a model cannot be run without the values of its tensors.
    """
    added = may_checkpoint and needs_checkpointing(setting)
    if added:
        setting = replace(setting, recompute=True)
    found = phases(setting)
    return Plan(
        setting=setting,
        phases=found,
        host=host_bytes(setting),
        tokens=iteration_tokens(setting),
        work=work(setting),
        checkpointing_added=added,
        advice=None if max(phase.bytes for phase in found) <= available(setting) else best_change(setting),
    )


def needs_checkpointing(setting: Setting) -> bool:
    """Return whether the update needs more memory than a GPU has, and `ActivationCheckpointing` is not on yet.

    On a CPU, this is always False.

    Raises:
        UserError: if a model cannot be run without the values of its tensors.
    """
    if setting.device.is_cpu or setting.recompute:
        return False
    return phases(setting)[-1].bytes > available(setting)


def available(setting: Setting) -> float:
    """Return the bytes of a process's device that are left to tensors; on CPUs, processes share a host's memory."""
    sharing = min(setting.processes, PROCESSES_ON_A_HOST) if setting.device.is_cpu else 1
    return setting.device.memory / sharing - RESERVED


def best_change(setting: Setting) -> Change:
    """Return the first change with which the run fits, or else the one with the lowest peak.

    Changes are tried in this order: those that cost time, those that cost quality, and further GPUs. If a change has
    several forms, such as the sizes of a micro-batch, the first form with which the run fits is returned. If there is
    no change to try, the text advises a smaller model, and the bytes are those of the setting itself.

    Raises:
        UserError: if a model cannot be run without the values of its tensors.
    """
    insufficient = []
    for ladder in filter(None, _changes(setting)):
        strongest = _try(*ladder[-1])
        if strongest.suffices:
            return next(change for change in (_try(*step) for step in ladder) if change.suffices)
        insufficient.append(strongest)
    return min(insufficient, key=lambda change: change.bytes, default=_try("a smaller model", setting))


def _try(text: str, changed: Setting) -> Change:
    peak = max(phase.bytes for phase in phases(changed))
    return Change(text, peak, suffices=peak <= available(changed))


def _changes(setting: Setting) -> Iterator[list[tuple[str, Setting]]]:
    """Yield each change that may save memory, as a list of its forms, the strongest last; the list may be empty.

    A change that helps a single phase is left out unless that phase has the peak.
    """
    peak = max(phases(setting), key=lambda phase: phase.bytes).name
    if not setting.half:
        yield [("--trainer.precision bf16-mixed", replace(setting, half=True))]
    if peak == "update":
        if not setting.recompute:
            yield [("--trainer.callbacks+=ActivationCheckpointing", replace(setting, recompute=True))]
        option, least = setting.max_tokens_option, setting.length * setting.together
        smaller = _halved(setting.max_tokens, least)
        yield [(f"--{option} {tokens}", replace(setting, max_tokens=tokens)) for tokens in smaller]
    if peak == "decode" and setting.generation is not None:
        rows, columns = cache_size(setting)
        smaller = _halved(rows * columns, columns * setting.generation.sampling.responses)
        yield [(f"--model.engine.cache_tokens {tokens}", _with_cache(setting, tokens)) for tokens in smaller]
    if setting.processes > 1 and not setting.sharded:
        yield [("--trainer.strategy fsdp2", replace(setting, spread="fsdp2"))]
    if any(role.name == "critic" for role in setting.roles):
        yield [("--model.critic shared", _with_shared_critic(setting))]
    if not setting.device.is_cpu:
        more = [number for number in MORE_PROCESSES if number > setting.processes]
        sharded = replace(setting, spread="fsdp2")
        yield [(f"{n} GPUs and --trainer.strategy fsdp2", replace(sharded, processes=n)) for n in more]


def _halved(number: int, least: int) -> list[int]:
    """Return the results of halving a number once, twice, …, as long as they are not below ``least``."""
    found = []
    while number // 2 >= least:
        number //= 2
        found.append(number)
    return found


def _with_cache(setting: Setting, tokens: int) -> Setting:
    assert setting.generation is not None
    return replace(setting, generation=replace(setting.generation, cache_tokens=tokens))


def _with_shared_critic(setting: Setting) -> Setting:
    roles = [role for role in setting.roles if role.name != "critic"]
    actor = replace(setting.role("actor"), outputs=Outputs(logprobs=True, values=True))
    return replace(setting, roles=(actor, *[role for role in roles if role.name != "actor"]))
