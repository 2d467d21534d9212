"""Attention without padding: the texts follow one another in a single row, and each attends only to itself.

The trunk then processes real tokens only. The attention is registered with transformers' attention interface, which
passes the texts' bounds under the argument names of flash attention (``cu_seq_lens_q``, …).
"""

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from lit_rlhf.compat import attention_can_be_set, attention_of
from lit_rlhf.models.weights import with_weights

try:  # flash attention over texts of different lengths; its options differ between versions of torch
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # pragma: no cover
    varlen_attn = None  # type: ignore[assignment]

UNPADDED = "lit_rlhf_unpadded"
"""The name under which this module's attention is registered with transformers."""


def last_hidden_state(trunk: nn.Module, tokens: Tensor, real: Tensor, positions: Tensor | None = None) -> Tensor:
    """Return the trunk's last hidden state, [B, S, H]; it is undefined at padding.

    Args:
        trunk: A transformers decoder without its head.
        tokens: Token ids, [B, S] int64.
        real: Bool [B, S], True at the tokens to process, which come before all others in each row.
        positions: The positions of the tokens, [B, S] int64, for packed rows: 0, 1, … within each text; the texts of a
            row do not attend to each other. None if each row is one text.
    """
    if not is_unpadded(trunk):
        return trunk(input_ids=tokens, position_ids=positions, use_cache=False).last_hidden_state
    places = (real.cumsum(1) - 1 if positions is None else positions)[real]
    starts = (places == 0).nonzero().squeeze(1)
    bounds = F.pad(starts, (0, 1), value=len(places)).int()
    longest = int(bounds.diff().max())
    hidden = trunk(
        input_ids=tokens[real][None],
        position_ids=places[None],
        use_cache=False,
        cu_seq_lens_q=bounds,
        cu_seq_lens_k=bounds,
        max_length_q=longest,
        max_length_k=longest,
    ).last_hidden_state[0]
    spread = torch.zeros(*tokens.shape, hidden.shape[-1], dtype=hidden.dtype, device=hidden.device)
    return spread.masked_scatter(real[..., None], hidden)


def is_unpadded(trunk: nn.Module) -> bool:
    """Return whether `last_hidden_state` skips padding for this trunk."""
    config: Any = trunk.config
    return attention_of(config) == UNPADDED or attention_of(config).startswith("flash_attention")


def may_be_unpadded(model: PreTrainedModel) -> bool:
    """Return whether a model's attention can be replaced.

    Chunked attention cannot be replaced, because only the attention mask contains the bounds of the chunks of a text.
    """
    chunked = "chunked_attention" in (getattr(model.config, "layer_types", None) or ())
    return attention_can_be_set(model) and not chunked


@torch.no_grad()
def use_unpadded_attention(model: PreTrainedModel) -> None:
    """Make a model use this module's attention if that leaves the model's output unchanged.

    The output would change for models that add something to causal or sliding-window softmax attention (ALiBi, soft
    caps, attention sinks), and for state-space models.
    """
    if not may_be_unpadded(model):
        return
    before = attention_of(model.config)
    tried = with_weights(model)
    model.set_attn_implementation(UNPADDED if keeps_texts_apart(tried, UNPADDED) else before)


@torch.no_grad()
def keeps_texts_apart(model: PreTrainedModel, attention: str | None = None) -> bool:
    """Return whether a model computes the same hidden states for two texts in one row as for each text alone.

    Args:
        model: A causal language model or a sequence classifier.
        attention: The name of the attention with which the model processes the packed row; the model keeps this
            attention afterwards. None for the model's own attention.
    """
    tokens = torch.arange(7, device=model.device)[None] % model.config.vocab_size
    places = torch.tensor([[0, 1, 2, 0, 1, 2, 3]], device=model.device)
    try:
        pieces = [model.base_model(input_ids=text, use_cache=False) for text in (tokens[:, :3], tokens[:, 3:])]
        apart = torch.cat([piece.last_hidden_state for piece in pieces], 1)
        if attention is not None:
            model.set_attn_implementation(attention)
        together = last_hidden_state(model.base_model, tokens, torch.ones_like(tokens, dtype=torch.bool), places)
    except (NotImplementedError, TypeError, ValueError, LookupError, AttributeError, RuntimeError):  # not supported
        return False
    return torch.allclose(together.float(), apart.float(), rtol=1e-3, atol=1e-3)


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int = 0,
    **others: Any,
) -> tuple[Tensor, None]:
    """Compute attention with the signature that transformers requires: query [B, heads, N, D] → [B, N, heads, D].

    Raises:
        NotImplementedError: if the attention depends on soft caps, attention sinks or a position bias.
    """
    if any(others.get(name) is not None for name in ("softcap", "s_aux", "position_bias")):
        raise NotImplementedError
    if cu_seq_lens_q is None:  # decoding: the mask also contains the sliding window
        if query.device.type == "cpu" and torch.is_autocast_enabled("cpu"):  # a single query is faster in float32
            with torch.autocast("cpu", enabled=False):
                query, key, value = query.float(), key.float(), value.float()
                return _attend_to_cache(module, query, key, value, attention_mask, scaling=scaling, **others)
        return _attend_to_cache(module, query, key, value, attention_mask, scaling=scaling, **others)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return _attend_within(query, key, value, scale, sliding_window, cu_seq_lens_q, max_length_q), None


def _attend_to_cache(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """Compute attention to cached keys and values, [B, heads, N, D] → [B, N, heads, D].

    In a decoding step, the heads of a group, which share keys and values, become the queries of a single head. Every
    key and value is then read once; transformers repeats keys and values for each head if the step is compiled.
    """
    groups = query.shape[1] // key.shape[1]
    if mask is None or groups == 1 or query.shape[2] > 1:
        return sdpa_attention_forward(module, query, key, value, mask, **options)
    grouped = query.reshape(len(query), key.shape[1], groups, query.shape[3])
    out = F.scaled_dot_product_attention(grouped, key, value, attn_mask=mask, scale=options["scaling"])
    return out.reshape(len(query), 1, query.shape[1], value.shape[3]), None


@torch.compiler.disable  # otherwise there would be a graph for every number of texts
def _attend_within(
    query: Tensor, key: Tensor, value: Tensor, scale: float, sliding_window: int | None, bounds: Tensor, longest: int
) -> Tensor:
    """Compute causal attention within each text of a row, [1, heads, N, D] → [1, N, heads, D]."""
    if query.is_cuda and _has_varlen(query):
        return _by_varlen(query, key, value, scale, sliding_window, bounds, longest)
    groups = query.shape[1] // key.shape[1]
    lengths = bounds.diff().tolist()
    key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    if query.device.type == "cpu" and _computes_in_half(query):
        return _by_products(query[0] * scale, key[0], value[0], lengths, sliding_window).transpose(0, 1)[None]
    texts = zip(query.split(lengths, 2), key.split(lengths, 2), value.split(lengths, 2), strict=True)
    return torch.cat([_by_sdpa(q, k, v, scale, sliding_window) for q, k, v in texts], 2).transpose(1, 2)


def _has_varlen(query: Tensor) -> bool:
    """Return whether flash attention for texts of different lengths may be used.

    Flash attention can be differentiated only once, so TRPO, which differentiates twice, disables it.
    """
    allowed = {"scale", "window_size"} <= _options_of(varlen_attn) and torch.backends.cuda.flash_sdp_enabled()
    return allowed and _computes_in_half(query) and query.shape[-1] % 8 == 0


@cache
def _options_of(function: Callable[..., Any] | None) -> frozenset[str]:
    return frozenset() if function is None else frozenset(inspect.signature(function).parameters)


def _by_varlen(
    query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None, bounds: Tensor, longest: int
) -> Tensor:
    """Compute causal attention within each text by flash attention, [1, heads, N, D] → [1, N, heads, D]."""
    half, groups = _dtype(query), query.shape[1] // key.shape[1]
    options: dict[str, Any] = {}
    if "enable_gqa" in _options_of(varlen_attn):
        options["enable_gqa"] = groups > 1
    else:
        key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    q, k, v = (x[0].transpose(0, 1).to(half).contiguous() for x in (query, key, value))
    sides = (-1 if window is None else window - 1, 0)
    out: Any = varlen_attn(q, k, v, bounds, bounds, longest, longest, scale=scale, window_size=sides, **options)
    return out.unsqueeze(0)


def _by_sdpa(query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None) -> Tensor:
    length = query.shape[2]
    if window is None or length <= window:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale)
    mask = _visible(length, window, query.device)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)


def _by_products(query: Tensor, key: Tensor, value: Tensor, lengths: list[int], window: int | None) -> Tensor:
    """Compute causal attention within each text by matrix products, from a query that is already scaled.

    All tensors are [heads, N, D]. The function is for CPUs, where the backward pass of half-precision flash attention
    is several times slower.
    """
    half, longest = _dtype(query), max(lengths)
    unseen = torch.zeros(longest, longest, dtype=half, device=query.device)
    unseen.masked_fill_(~_visible(longest, window, query.device), -torch.inf)
    outputs = []
    with torch.autocast(query.device.type, enabled=False):
        queries, keys, values = (x.to(half).split(lengths, 1) for x in (query, key, value))
        for q, k, v in zip(queries, keys, values, strict=True):
            hidden = unseen[: q.shape[1], : q.shape[1]].expand(len(q), -1, -1)
            outputs.append(torch.baddbmm(hidden, q, k.transpose(1, 2)).softmax(-1) @ v)
    return torch.cat(outputs, 1)


def _visible(length: int, window: int | None, device: torch.device) -> Tensor:
    """Return a bool mask [length, length], True where the token of the row attends to the token of the column."""
    place = torch.arange(length, device=device)
    distance = place[:, None] - place
    return (distance >= 0) & (distance < (length if window is None else window))


def _dtype(x: Tensor) -> torch.dtype:
    """Return the data type in which matrix products with a tensor are computed."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def _computes_in_half(x: Tensor) -> bool:
    return _dtype(x) in (torch.bfloat16, torch.float16)


def _mask(attention_mask: Tensor | None = None, **others: Any) -> Tensor | None:
    """Return the mask for ``scaled_dot_product_attention``, or None if the bounds of the texts replace the mask."""
    return None if attention_mask is None else sdpa_mask(attention_mask=attention_mask, **others)


_interface: Callable[..., Any] = _attend
AttentionInterface.register(UNPADDED, _interface)
AttentionMaskInterface.register(UNPADDED, _mask)
