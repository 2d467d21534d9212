"""The bytes that each process needs at the peak of each phase of a run: load, decode, judge and update."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from lit_rlhf.generation.native import CHECK_ENDED_EVERY_CPU, CHECK_ENDED_EVERY_GPU
from lit_rlhf.generation.packing import MOVED_BYTES
from lit_rlhf.models.adapters import adapted_layers
from lit_rlhf.planning.dry_run import Rounding, footprint, prefill
from lit_rlhf.planning.roles import FLOAT, HALF, Role, weight_bytes
from lit_rlhf.planning.setting import Setting

PROCESSES_ON_A_HOST = 8


class Part(NamedTuple):
    """A part of the memory that a process uses in a phase, such as the weights."""

    name: str
    bytes: float


@dataclass(frozen=True, slots=True)
class Phase:
    """The memory that a process uses at the peak of a phase, by part.

    >>> Phase("load", (Part("weights", 3.0), Part("optimizer", 4.0))).bytes
    7.0
    """

    name: str
    parts: tuple[Part, ...]

    @property
    def bytes(self) -> float:
        """The sum of the parts, in bytes."""
        return sum(part.bytes for part in self.parts)


def phases(setting: Setting) -> tuple[Phase, ...]:
    """Return the phases of a run in their order, with the memory that a process uses in each phase.

    Raises:
        UserError: if a model cannot be run without the values of its tensors.
    """
    weights, state, gradients = _held(setting)
    found = [Phase("load", (weights,))]
    if setting.generation is not None:
        found.append(Phase("decode", (weights, state, gradients, *_decoding(setting))))
    if setting.judges():  # DPO's texts are judged once, before the first optimizer step
        before = (weights, gradients) if setting.method == "DPO" else (weights, state, gradients)
        found.append(Phase("judge", (*before, *_judging(setting))))
    return (*found, Phase("update", (weights, state, *_updating(setting))))


class Held(NamedTuple):
    """The bytes that a process holds for a model; except under DDP, gradients exist only during the update."""

    weights: float
    gradients: float
    optimizer: float


def held(setting: Setting, role: Role) -> Held:
    """Return the bytes of a process's share of a role's weights, float32 gradients and optimizer state.

    The average of the actor's trained weights, if there is one, counts as weights.
    """
    weights = weight_bytes(role, _rounding(setting, role, used=False))
    if setting.averaged and role.name == "actor":
        weights += FLOAT * role.trained
    state = 0.0 if role.stepping is None else role.stepping.state
    return Held(*(size / setting.shards for size in (weights, FLOAT * role.trained, state * role.trained)))


def host_bytes(setting: Setting) -> float:
    """Return the maximum number of bytes that the models need in the memory of a host with up to eight GPUs.

    Models are loaded one after another, in float32. A process reads its share of a model that FSDP2 shards, and the
    whole of any other model. (With random weights under FSDP2, the result is too small, because each process then
    builds the whole model.) Shards that are offloaded stay on the host.
    """
    here = min(setting.processes, PROCESSES_ON_A_HOST)
    shares = setting.shards if setting.spread == "fsdp2" else 1
    loading = max(FLOAT * role.parameters for role in setting.models) * here / shares
    return loading + (here * sum(sum(held(setting, role)) for role in setting.models) if setting.offload else 0.0)


def _held(setting: Setting) -> tuple[Part, Part, Part]:
    """Return the memory of the weights, optimizer states and gradients that a device holds between updates.

    Between updates, only DDP holds gradients, in its buckets. If the models are offloaded, the device holds none of the
    three.
    """
    each = [] if setting.offload else [held(setting, role) for role in setting.models]
    buffers = [role.gradients for role in each] if setting.spread == "ddp" else []
    weights, state = sum(role.weights for role in each), sum(role.optimizer for role in each)
    return Part("weights", weights), Part("optimizer", state), Part("gradients", sum(buffers))


def _gathered(setting: Setting, role: Role) -> float:
    """Return the bytes of a role's weights that are gathered for decoding or judging.

    FSDP1 also holds the gathered weights in float32. A shared base model is gathered with the adapters of all roles.
    """
    shared = [model for model in setting.models if model is setting.base or model.own is not None]
    parameters = role.parameters if role.own is None else sum(model.parameters for model in shared)
    if setting.spread == "fsdp2":
        return parameters * (HALF if setting.half else FLOAT)
    if setting.spread == "fsdp":
        return parameters * (FLOAT + HALF if setting.half else FLOAT)
    return 0.0


def _rounding(setting: Setting, role: Role, used: bool) -> Rounding:
    """Return which weights of a role are in bfloat16: none, unless products are computed in bfloat16.

    FSDP gathers all weights in bfloat16 when they are ``used``. Otherwise, trained weights are in float32, and frozen
    models hold in bfloat16 the weights that each pass would round: those of linear layers or, under FSDP, all of them.
    Adapters are in float32, whether they are trained or not, but the base model below them counts as a frozen model.
    """
    gathered = used and setting.sharded
    is_float = role.is_trained if role.own is None else not used
    if not setting.half or (is_float and not gathered):
        return "none"
    return "all" if setting.sharded else "linear"


def _decoding(setting: Setting) -> Iterator[Part]:
    """Yield the memory that only decoding uses: gathered or copied weights, the cache, logits or a prefill."""
    actor, gpu = setting.role("actor"), not setting.device.is_cpu
    yield Part("gathered weights", _gathered(setting, actor))
    yield Part("copies of weights", _copied_weights(setting, actor))
    rows, columns = cache_size(setting)
    elements, prefilling = prefill(actor.model, setting.prefilled())
    yield Part("keys and values", rows * columns * elements * (HALF if setting.half and gpu else FLOAT))
    yield Part("logits", max(prefilling, rows * _bytes_of_logits(setting) * actor.model.config.vocab_size))


def cache_size(setting: Setting) -> tuple[int, int]:
    """Return the numbers of rows and columns of the key-value cache if all responses are as long as allowed.

    As in `lit_rlhf.generation.native`, a quarter is added to the columns if a limit on the cache's tokens applies.
    """
    generation = setting.generation
    assert generation is not None
    check_every = CHECK_ENDED_EVERY_CPU if setting.device.is_cpu else CHECK_ENDED_EVERY_GPU
    rows, columns, limit = setting.own_rows, setting.length + check_every, generation.cache_tokens
    if limit is not None and rows * columns > limit:
        columns += columns // 4
        responses = generation.sampling.responses
        rows = min(rows, max(1, limit // (columns * responses)) * responses)
    return rows, -(-columns // 8) * 8


def _copied_weights(setting: Setting, actor: Role) -> float:
    """Return the bytes of copies of the actor's linear weights in the form in which they are multiplied.

    On a CPU, unless the decoding step is compiled, these are copies in a blocked layout. In float32, adapters are
    merged into these copies. Large weights below adapters are moved instead of copied, unless they are sharded. In all
    other cases, if products are computed in bfloat16, these are bfloat16 copies of the weights that are held in
    float32, unless FSDP gathers the weights in bfloat16.
    """
    assert setting.generation is not None
    own = 0 if actor.own is None else actor.parameters - actor.value_head
    if setting.device.is_cpu and not setting.generation.compiled:
        size = HALF if setting.half else FLOAT
        adapted: list[Any] = [] if setting.sharded else adapted_layers(actor.model)
        below = [layer.get_base_layer().weight.numel() for layer in adapted]
        moved = sum(count for count in below if count * size >= MOVED_BYTES)
        return (actor.multiplied + actor.head - moved - (0 if setting.half else own)) * size
    is_tied = actor.model.get_output_embeddings().weight is actor.model.get_input_embeddings().weight
    weights = actor.multiplied + actor.head if actor.own is None else own + (actor.head if is_tied else 0)
    return weights * HALF if setting.half and not setting.sharded else 0.0


def _bytes_of_logits(setting: Setting) -> int:
    """Return the number of bytes that sampling a token needs for each logit.

    The logits, their quotients by the temperature (unless it is 0 or 1), the log-probabilities, the probabilities, and
    the products of the last two are in float32; the cumulative sums are in float64.
    """
    assert setting.generation is not None
    tempered = setting.generation.sampling.temperature not in (0, 1)
    return FLOAT * (5 if tempered else 4) + 8


def _judging(setting: Setting) -> Iterator[Part]:
    """Yield the memory that only judging uses, in its largest pass: gathered weights and activations."""
    passes = []
    for role in setting.judges():
        rounding = _rounding(setting, role, used=True)
        shape = setting.shape(role.max_tokens, setting.own_rows)
        passes.append((_gathered(setting, role), footprint(role.model, role.outputs, shape, rounding=rounding).rest))
    gathered, activations = max(passes, key=sum)
    both = setting.full_kl and setting.sharded
    yield Part("gathered weights", gathered * (2 if both else 1))
    yield Part("activations", activations)


class _Moment(NamedTuple):
    """The bytes that a process holds at a moment of the update, besides the weights and the optimizer's state."""

    gradients: float
    gathered: float
    activations: float
    temporaries: float = 0.0


def _updating(setting: Setting) -> tuple[Part, ...]:
    """Return the memory that the update uses at its peak, besides the weights and the optimizer's state."""
    peak = max(_moments(setting), key=sum)
    both = _gathered(setting, setting.role("reference")) if setting.full_kl else 0.0
    return (
        Part("gradients", 0.0 if setting.offload else peak.gradients),
        Part("gathered weights", peak.gathered + both),
        Part("activations", peak.activations),
        Part("temporaries of the optimizer", peak.temporaries),
    )


def _moments(setting: Setting) -> Iterator[_Moment]:
    """Yield the moments that may be the peak: during each backward pass, at its end, and during each optimizer step.

    Models are updated one after another. In a step of one micro-batch, the backward passes make gradients while they
    free activations; otherwise, all gradients exist from the second micro-batch on. Under DDP they always exist,
    and under FSDP they are counted as if they did.
    """
    rows = -(-setting.own_rows // setting.minibatches)
    shape = setting.shape(setting.max_tokens, rows)
    everything = sum(held(setting, role).gradients for role in setting.roles)
    fresh = shape.rows == rows and setting.spread == "one"
    made = 0.0 if fresh else everything
    for role in setting.trained():
        taken = footprint(
            role.model,
            role.outputs,
            shape,
            rounding=_rounding(setting, role, used=True),
            gradients="new" if fresh else "shards" if setting.sharded else "kept",
            recompute=setting.recompute,
        )
        in_layers, at_end = _gathered_in_training(setting, role)
        yield _Moment(made, in_layers, role.layers * taken.layer + taken.rest)
        made = min(everything, made + held(setting, role).gradients)
        yield _Moment(made, at_end, taken.end)
        if role.stepping is not None and not setting.device.is_cpu:
            yield _Moment(everything, 0.0, 0.0, role.trained * role.stepping.temporary / setting.shards)


def _gathered_in_training(setting: Setting, role: Role) -> tuple[float, float]:
    """Return the bytes of gathered weights and full gradients in a backward pass: within the layers, and at its end.

    The weights outside the layers stay gathered during the whole pass, and two layers are gathered at a time, one of
    them in advance, as under FSDP2; FSDP1 is counted in the same way. A gradient that is not reduced yet is held whole,
    in the precision of the gathered weights and again in float32: within the layers, the gradient of one layer; at the
    end, the gradient of the weights outside the layers. Only trained weights have gradients.
    """
    if not setting.sharded:
        return 0.0, 0.0
    each, layer, trained = HALF if setting.half else FLOAT, role.largest_layer, role.largest_trained_layer
    whole = role.parameters if role.own is None or setting.base is None else setting.base.parameters
    outside = max(0, whole - role.layers * layer)
    trained_outside = max(0, role.trained - role.layers * trained)
    in_layers = each * outside + 2 * each * layer + (each + FLOAT) * trained
    return in_layers, each * outside + (each + FLOAT) * trained_outside
