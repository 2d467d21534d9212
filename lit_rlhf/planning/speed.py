"""The FLOPs of an iteration, and the seconds that they take at an assumed share of a device's peak rates."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from lit_rlhf.models.unpadded import may_be_unpadded
from lit_rlhf.planning.dry_run import prefill
from lit_rlhf.planning.memory import cache_size
from lit_rlhf.planning.roles import FLOAT, HALF, Role
from lit_rlhf.planning.setting import Setting

UTILISATION = 0.4
"""The share of the peak FLOPs per second that computation is assumed to reach, in every phase."""
BANDWIDTH = 0.6
"""The share of the peak bandwidth that decoding is assumed to reach."""
LAUNCHES = 86
"""The number of operations of a decoder layer in a decoding step, from a count on a Llama model: 2,060 in 24 layers."""
LAUNCH_SECONDS = 5e-6
"""The number of seconds that a CPU is assumed to need for each operation that it launches on a GPU."""


class Work(NamedTuple):
    """The FLOPs of a phase, summed over all processes, and the seconds that the processes take for it in parallel."""

    phase: str
    flops: float
    seconds: float | None  # None if the rates of the device are not known


def iteration_tokens(setting: Setting) -> int:
    """Return the number of tokens in an iteration, over all processes, if all texts are as long as allowed."""
    return setting.rows * setting.length


def forward_flops(role: Role, rows: int, length: int, scored: int) -> float:
    """Return the FLOPs of a forward pass.

    The FLOPs are rows × (length × (2 P + 2 L H length) + 2 scored × V H), where P is the number of weights in linear
    layers below the head, L the number of layers, H the hidden size and V the size of the vocabulary. A query attends
    to half of the text on average, and each key that it attends to takes two products of 2 H FLOPs in each layer.

    Args:
        role: The role whose model runs.
        rows: The number of texts.
        length: The number of tokens in each text.
        scored: The number of tokens in each text whose logits are computed.
    """
    config = role.model.config
    attention = 2.0 * role.layers * config.hidden_size * length
    return rows * (length * (2.0 * role.multiplied + attention) + 2.0 * scored * role.head)


def training_flops(role: Role, rows: int, length: int, scored: int, recompute: bool) -> float:
    """Return the FLOPs of a forward and a backward pass: those of 3 forward passes, or 4 if activations are recomputed.

    For the head, the factor is always 4, since the backward pass always recomputes the logits. With a frozen base
    model, each factor is lower by 1, because the base model's weights have no gradients. ``recompute`` says whether the
    backward pass recomputes the activations of the layers; the other arguments are those of `forward_flops`.
    """
    trunk, whole = forward_flops(role, rows, length, 0), forward_flops(role, rows, length, scored)
    less = 0 if role.own is None else 1
    return (4 - less if recompute else 3 - less) * trunk + (4 - less) * (whole - trunk)


def work(setting: Setting) -> tuple[Work, ...]:
    """Return the work of each phase of an iteration, in the order of the phases.

    Raises:
        UserError: if a model cannot be run without the values of its tensors.
    """
    found = [] if setting.generation is None else [_decoding(setting)]
    if judges := setting.judges():
        found.append(_at_peak(setting, "judge", sum(_of_texts(setting, role, forward_flops) for role in judges)))
    train = partial(training_flops, recompute=setting.recompute)
    learning = sum(_of_texts(setting, role, train) for role in setting.trained())
    beside = [role for role in setting.roles if not role.is_trained and role.name not in setting.judged]
    learning += sum(_of_texts(setting, role, forward_flops) for role in beside)  # DPO's reference without a cache
    return (*found, _at_peak(setting, "update", setting.epochs * learning))


def _of_texts(setting: Setting, role: Role, flops: Callable[[Role, int, int, int], float]) -> float:
    """Return the FLOPs for all texts of an iteration, of which models that skip padding process each prompt once."""
    whole = flops(role, setting.rows, setting.length, setting.scored)
    if not may_be_unpadded(role.model):
        return whole
    repeated = setting.rows - setting.rows // setting.responses
    return whole - flops(role, repeated, setting.length - setting.scored, 0)


def _at_peak(setting: Setting, phase: str, flops: float) -> Work:
    peak = setting.device.half if setting.half else setting.device.single
    return Work(phase, flops, None if peak is None else flops / setting.processes / (UTILISATION * peak))


def _decoding(setting: Setting) -> Work:
    """Return the work of decoding, in which each step reads the weights and the cached keys and values.

    On average, the cache holds the prompts and half of the responses. Decoding takes the longest of three times: the
    time to read, the time to compute and, on a GPU where the decoding step is not compiled, the time to launch its
    operations. If the cache does not hold all rows, the steps are repeated for the rows that wait.
    """
    generation = setting.generation
    assert generation is not None
    actor, device, steps = setting.role("actor"), setting.device, setting.scored
    prefilled = forward_flops(actor, setting.rows // generation.sampling.responses, generation.prompt_tokens, 1)
    whole = forward_flops(actor, setting.rows, setting.length, setting.scored)
    flops = prefilled + whole - forward_flops(actor, setting.rows, generation.prompt_tokens, 0)
    computing = _at_peak(setting, "decode", flops).seconds
    if computing is None or device.bandwidth is None:
        return Work("decode", flops, None)
    rows, _ = cache_size(setting)
    each = HALF if setting.half else FLOAT
    elements, _ = prefill(actor.model, setting.prefilled())
    read = each * (actor.multiplied + actor.head + rows * elements * (setting.length - steps / 2))
    rounds = -(-setting.own_rows // rows)
    reading = rounds * steps * read / (BANDWIDTH * device.bandwidth)
    launched = 0.0 if device.is_cpu or generation.compiled else LAUNCHES * actor.layers * LAUNCH_SECONDS
    return Work("decode", flops, max(computing, reading, rounds * steps * launched))
