"""Dry runs: passes of a model on tensors without memory, to count the bytes that these tensors would take.

A dry run needs no weights and takes a tenth of a second. It runs the model's own code, and therefore works for every
architecture whose operations do not depend on the values of tensors. Two decoder layers run; the other layers are
assumed to need as much as the second one.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias
from weakref import finalize

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, PreTrainedModel

from lit_rlhf.compat import select_adapters, selected_adapters, share_inputs, tensors_without_memory, watch_results
from lit_rlhf.errors import UserError
from lit_rlhf.models.adapters import adapted_layers
from lit_rlhf.models.attention import UNPADDED
from lit_rlhf.models.head import chunk_rows, logprobs_and_entropy
from lit_rlhf.models.precision import rounded_weights
from lit_rlhf.models.sharding import decoder_layers
from lit_rlhf.models.unpadded import may_be_unpadded
from lit_rlhf.models.weights import first_layers

if TYPE_CHECKING:
    from peft import LoraConfig

LAYERS, CHUNKS = 2, 3
"""The number of decoder layers that run, and the number of chunks of scored tokens whose logits are computed."""
PLANNED = "lit_rlhf_planned"
"""The name under which the stand-in for flash attention is registered with transformers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """The shape of a pass and the precision of its matrix products.

    >>> Shape(rows=2, length=5, scored=3, half=False, gpu=False).tokens
    10
    """

    rows: int
    length: int  # the number of tokens in each row
    scored: int  # the number of tokens in each row whose logits are computed
    half: bool  # whether products are computed in bfloat16
    gpu: bool  # whether to count the bytes that a GPU needs; its attention differs from a CPU's

    @property
    def tokens(self) -> int:
        """The number of tokens in all rows."""
        return self.rows * self.length


class Footprint(NamedTuple):
    """The bytes that a pass takes besides the weights."""

    layer: int  # that each decoder layer keeps for the backward pass
    rest: int  # at the peak, besides the bytes that the layers keep
    end: int  # at the end of the backward pass, when the layers no longer keep anything; excludes new gradients


class LiveBytes:
    """A count of the bytes of all tensors that watched operations have made and that still exist.

    The attribute ``now`` is the current count, and ``peak`` is the highest count since `take_peak` was last called.

    >>> live = LiveBytes()
    >>> with watch_results(live.see):
    ...     x = torch.zeros(10).exp()
    >>> live.now, live.peak
    (40, 80)
    """

    def __init__(self) -> None:
        self.now = self.peak = 0
        self._known: set[int] = set()

    def see(self, tensor: Tensor, size: int | None = None) -> None:
        """Count the storage of a tensor, unless it is already counted, as the storage of a view usually is.

        Args:
            tensor: The tensor.
            size: The bytes to count; None for the storage's own size.
        """
        storage = tensor.untyped_storage()
        key, size = id(storage), storage.nbytes() if size is None else size
        if key not in self._known:
            self._known.add(key)
            self.now += size
            self.peak = max(self.peak, self.now)
            finalize(storage, self._forget, key, size)

    def take_peak(self) -> int:
        """Return the peak, and reset it to the current count."""
        peak, self.peak = self.peak, self.now
        return peak

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


Rounding: TypeAlias = Literal["none", "linear", "all"]
"""Which weights are held in bfloat16: none, those that autocast rounds in each pass (``linear``), or all."""
Gradients: TypeAlias = Literal["new", "kept", "shards"]
"""How a backward pass treats gradients: it makes new ones, adds to those that are kept, or reduces each to a shard."""


def held_in_half(model: nn.Module, rounding: Rounding) -> list[nn.Parameter]:
    """Return the parameters of a model that are held in bfloat16; adapters are among them only if all weights are."""
    if rounding == "none":
        return []
    adapters = {id(weight) for name, weight in model.named_parameters() if ".lora_" in name and rounding == "linear"}
    return [x for x in rounded_weights(model, all_weights=rounding == "all") if id(x) not in adapters]


@dataclass(frozen=True, slots=True, kw_only=True)
class Outputs:
    """The outputs that a pass computes from the last hidden state."""

    logprobs: bool  # of the scored tokens
    values: bool  # after each token


@lru_cache(maxsize=256)
def footprint(
    model: PreTrainedModel,
    outputs: Outputs,
    shape: Shape,
    *,
    rounding: Rounding = "none",
    gradients: Gradients | None = None,
    recompute: bool = False,
) -> Footprint:
    """Count the bytes that a pass takes besides the weights.

    Args:
        model: The model, on the meta device.
        outputs: The outputs that the pass computes.
        shape: The shape of the pass, and the precision of its matrix products.
        rounding: Which weights are held in bfloat16.
        gradients: The treatment of gradients in the backward pass (see `Gradients`); None for a forward pass alone.
        recompute: Whether each layer keeps only its inputs for the backward pass, as with `ActivationCheckpointing`.

    Raises:
        UserError: if the model cannot be run without the values of its tensors.
    """
    attention = PLANNED if shape.half and shape.gpu else UNPADDED
    run = partial(_run, model, outputs, shape, rounding, gradients, recompute)
    with _refused(model):
        if may_be_unpadded(model):
            with suppress(NotImplementedError, TypeError):  # the attention needs more inputs, or takes no bounds
                return run(attention)
        return run(None)


@lru_cache(maxsize=256)
def prefill(model: PreTrainedModel, shape: Shape) -> tuple[int, int]:
    """Count the elements that a forward pass over left-padded prompts caches, and the bytes that the pass takes.

    Args:
        model: The causal language model, on the meta device.
        shape: The number and the length of the prompts, and the precision of matrix products.

    Returns:
        The number of elements (keys and values) that all layers together cache for each token, and the bytes that
        the pass takes at its peak, without the weights and the cache.

    Raises:
        UserError: if the model cannot be run without the values of its tensors.
    """
    short, live, cache = _shortened(model), LiveBytes(), DynamicCache()
    with _refused(model), tensors_without_memory(), _products(shape):
        tokens = torch.zeros(shape.rows, shape.length, dtype=torch.long)
        inputs = {"input_ids": tokens, "position_ids": tokens, "attention_mask": tokens == 0, "use_cache": True}
        weights = _weights(short.base_model, live, None)
        with watch_results(live.see), torch.no_grad():
            functional_call(short.base_model, weights, (), {**inputs, "past_key_values": cache})
        layers: list[Any] = cache.layers
        cached: list[Tensor] = [states for layer in layers for states in (layer.keys, layer.values)]
        elements = sum(states.numel() for states in cached) / shape.tokens / len(cache.layers)
        return round(elements * _layer_count(model)), live.peak - sum(states.nbytes for states in cached)


def _run(
    model: PreTrainedModel,
    outputs: Outputs,
    shape: Shape,
    rounding: Rounding,
    gradients: Gradients | None,
    recompute: bool,
    attention: str | None,
) -> Footprint:
    short, live = _shortened(model), LiveBytes()
    if attention is not None:
        short.set_attn_implementation(attention)
    whole = _Pass(short, outputs, unpadded=attention is not None)
    for parameter in held_in_half(whole, rounding):
        parameter.data = parameter.data.to(torch.bfloat16)
    layers = list(decoder_layers(short))
    moments: dict[str, int] = {}

    def start_first(layer: nn.Module, args: Any, kwargs: Any) -> None:
        states = args[0] if args else kwargs["hidden_states"]
        if states.requires_grad:  # when its gradient is known, no layer keeps anything
            states.register_hook(lambda gradient: moments.update(layers=live.take_peak()))

    layers[0].register_forward_pre_hook(start_first, with_kwargs=True)
    layers[-1].register_forward_pre_hook(lambda *_: moments.update(before=live.now))
    layers[-1].register_forward_hook(lambda *_: moments.update(after=live.now))
    if recompute:
        for layer in layers:
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)
    with tensors_without_memory(), _products(shape):
        weights = _weights(whole, live, gradients)
        with watch_results(live.see), torch.no_grad() if gradients is None else nullcontext():
            functional_call(whole, weights, (shape,))
    if gradients is None:
        return Footprint(layer=0, rest=live.peak, end=0)
    kept = moments["after"] - moments["before"]
    made = sum(x.nbytes for x in whole.parameters() if x.requires_grad) if gradients == "new" else 0
    # with a frozen embedding, the backward pass ends within the layers
    in_layers = moments["layers"] if "layers" in moments else live.take_peak()
    return Footprint(kept, in_layers - len(layers) * kept, live.peak - made)


class _Pass(nn.Module):
    """A stand-in for `Actor` or `ScalarModel` whose operations do not depend on the values of tensors.

    If gradients are enabled, the forward pass also runs the backward pass.
    """

    def __init__(self, model: PreTrainedModel, outputs: Outputs, unpadded: bool) -> None:
        super().__init__()
        self.trunk, self.unpadded = model.base_model, unpadded
        self.head = model.get_output_embeddings() if outputs.logprobs else None
        self.value_head = nn.Linear(model.config.hidden_size, 1, device="meta") if outputs.values else None

    def forward(self, shape: Shape) -> None:
        hidden, loss = self.hidden(shape), torch.zeros(())
        if self.value_head is not None:
            loss = loss + self.value_head(hidden).squeeze(-1).float().sum()
        if self.head is not None:
            loss = loss + self.logprobs(hidden, shape).sum()
        if torch.is_grad_enabled():  # here, where functional_call also gives its weights to what is recomputed
            loss.backward()

    def hidden(self, shape: Shape) -> Tensor:
        """Return the last hidden states, [tokens, H], with the same operations as `last_hidden_state`."""
        if not self.unpadded:
            tokens = torch.zeros(shape.rows, shape.length, dtype=torch.long)
            return self.trunk(input_ids=tokens, use_cache=False).last_hidden_state.flatten(0, 1)
        tokens = torch.zeros(1, shape.tokens, dtype=torch.long)
        bounds, longest = _Bounds([shape.length] * shape.rows), shape.length
        texts = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": longest, "max_length_k": longest}
        return self.trunk(input_ids=tokens, position_ids=tokens, use_cache=False, **texts).last_hidden_state[0]

    def logprobs(self, hidden: Tensor, shape: Shape) -> Tensor:
        """Return the log-probabilities of the first chunks of scored tokens, computed as in `Actor.forward`."""
        head: Any = self.head
        states = hidden.index_select(0, torch.zeros(shape.rows * shape.scored, dtype=torch.long))
        weights = [x for x in (head.weight, getattr(head, "bias", None)) if x is not None]
        rows = chunk_rows(head.weight.shape[0], torch.device("cuda" if shape.gpu else "cpu"))
        states = states[: CHUNKS * rows]  # a view; further chunks would take time, but no more bytes
        targets = torch.zeros(len(states), dtype=torch.long)
        return logprobs_and_entropy(lambda x: head(x).float(), weights, states, targets, rows)[0]


class _Bounds(NamedTuple):
    """The lengths of the texts, in place of the tensor of the texts' bounds, whose values the attention would read."""

    lengths: list[int]

    def diff(self) -> "_Bounds":
        return self

    def tolist(self) -> list[int]:
        return self.lengths


class _Flash(torch.autograd.Function):
    """A stand-in for flash attention: it keeps its inputs, its output, and one number for each query and head."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out, normalizer = torch.empty_like(query), torch.empty(query.shape[:2], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, out, normalizer)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        query, key, value, _, _ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """Stand in for `lit_rlhf.models.attention` where that module uses flash attention: on GPUs in bfloat16.

    Raises:
        NotImplementedError: if the attention depends on soft caps, attention sinks or a position bias.
    """
    if any(options.get(name) is not None for name in ("softcap", "s_aux", "position_bias")):
        raise NotImplementedError
    half = (x[0].transpose(0, 1).to(torch.bfloat16).contiguous() for x in (query, key, value))
    return _Flash.apply(*half)[None], None


AttentionInterface.register(PLANNED, _attend)
AttentionMaskInterface.register(PLANNED, lambda *_, **__: None)


def _layer_count(model: PreTrainedModel) -> int:
    return sum(1 for _ in decoder_layers(model))


def _shortened(model: PreTrainedModel) -> PreTrainedModel:
    """Return a copy of a model on the meta device, with the model's adapters, but only the first decoder layers."""
    config = first_layers(model.config, min(model.config.num_hidden_layers, LAYERS))
    with torch.device("meta"):
        short = type(model)(config).eval()
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    for name, adapter in getattr(model, "peft_config", {}).items():
        add_without_weights(short, name, adapter)
    for name, parameter in short.named_parameters():
        parameter.requires_grad_(name in trained)
    if layers := adapted_layers(model):
        select_adapters(adapted_layers(short), selected_adapters(layers[0]))
    return short


def add_without_weights(model: PreTrainedModel, name: str, config: "LoraConfig") -> None:
    """Add an adapter to a model on the meta device, as `add_adapter` does, but without memory for the adapter.

    All parameters of the model, including the adapter's, are then frozen.

    Args:
        model: The model.
        name: The adapter's name.
        config: The adapter's configuration, which lists the target modules by name.
    """
    from peft import inject_adapter_in_model

    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")  # for the reasons given in `add_adapter`
        inject_adapter_in_model(config, model, name, low_cpu_mem_usage=True)
    share_inputs(adapted_layers(model))
    model.requires_grad_(False)


def _weights(module: nn.Module, live: LiveBytes, gradients: Gradients | None) -> dict[str, Tensor]:
    """Return a module's parameters and buffers, by name, as tensors without memory.

    ``live`` counts neither these tensors nor gradients that exist before the pass.
    """
    weights = {}
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        weights[name] = torch.empty(tensor.shape, dtype=tensor.dtype)
        live.see(weights[name], 0)
        if gradients is None or not tensor.requires_grad:
            continue
        weight = weights[name].requires_grad_()
        if gradients == "shards":
            weight.register_post_accumulate_grad_hook(lambda x: setattr(x, "grad", None))
        if gradients == "kept":
            weight.grad = torch.empty_like(weight)
            live.see(weight.grad, 0)
    return weights


def _products(shape: Shape) -> torch.autocast:
    return torch.autocast("cpu", dtype=torch.bfloat16, enabled=shape.half, cache_enabled=False)


@contextmanager
def _refused(model: PreTrainedModel) -> Iterator[None]:
    """Return a context that turns any error of a dry run into a `UserError` that names the model's class."""
    try:
        yield
    except Exception as error:  # of many types: an operation needs values, or refuses tensors without memory
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"plan: {type(model).__name__} cannot be run without weights: {reason}") from error
