"""Attention without padding: the texts follow one another in a single row, and each attends only to itself.

A segment of the row may also continue another one, the beginning that several texts share (unpadded.py). The attention
is registered with transformers' attention interface, which passes the bounds of the segments under the argument names
of flash attention (``cu_seq_lens_q``, …).
"""

import inspect
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

try:  # flash attention over texts of different lengths; its options differ between versions of torch
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # pragma: no cover
    varlen_attn = None  # type: ignore[assignment]

Segment: TypeAlias = tuple[Tensor, Tensor, Tensor]
"""The queries of a segment, [1, heads, n, D], and the keys and the values to which they attend, [1, heads, k, D]."""
UNPADDED = "lit_rlhf_unpadded"
"""The name under which this module's attention is registered with transformers."""


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
    cu_seq_lens_k: Tensor | None = None,
    max_length_q: int = 0,
    max_length_k: int = 0,
    keys_of_texts: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Compute attention with the signature that transformers requires: query [B, heads, N, D] → [B, N, heads, D].

    Raises:
        NotImplementedError: if the attention depends on soft caps, attention sinks or a position bias.
    """
    if any(others.get(name) is not None for name in ("softcap", "s_aux", "position_bias")):
        raise NotImplementedError
    if cu_seq_lens_q is None or cu_seq_lens_k is None:  # decoding: the mask also contains the sliding window
        if query.device.type == "cpu" and torch.is_autocast_enabled("cpu"):  # a single query is faster in float32
            with torch.autocast("cpu", enabled=False):
                query, key, value = query.float(), key.float(), value.float()
                return _attend_to_cache(module, query, key, value, attention_mask, scaling=scaling, **others)
        return _attend_to_cache(module, query, key, value, attention_mask, scaling=scaling, **others)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    bounds, longest = (cu_seq_lens_q, cu_seq_lens_k), (max_length_q, max_length_k)
    return _attend_within(query, key, value, scale, sliding_window, bounds, longest, keys_of_texts), None


def _attend_to_cache(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """Compute attention to cached keys and values, [B, heads, N, D] → [B, N, heads, D].

    In a decoding step, the heads of a group, which share keys and values, become the queries of a single head. Every
    key and value is then read once; transformers repeats keys and values for each head.
    """
    if query.shape[2] > 1:
        return sdpa_attention_forward(module, query, key, value, mask, **options)
    grouped = query.reshape(len(query), key.shape[1], query.shape[1] // key.shape[1], query.shape[3])
    attend = _one_query_by_products if query.device.type == "cpu" else F.scaled_dot_product_attention
    out = attend(grouped, key, value, attn_mask=mask, scale=options["scaling"])
    return out.reshape(len(query), 1, query.shape[1], value.shape[3]), None


def _one_query_by_products(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, scale: float | None
) -> Tensor:
    """Compute the same as ``scaled_dot_product_attention``, for few queries of many rows on a CPU.

    With small heads, torch's function takes longer with two threads than with one; with larger ones, both take as long.
    """
    scores = query * (query.shape[-1] ** -0.5 if scale is None else scale) @ key.transpose(2, 3)
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, -torch.inf) if attn_mask.dtype == torch.bool else scores + attn_mask
    return scores.softmax(-1) @ value


@torch.compiler.disable  # otherwise there would be a graph for every number of texts
def _attend_within(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    sliding_window: int | None,
    bounds: tuple[Tensor, Tensor],
    longest: tuple[int, int],
    keys: Tensor | None,
) -> Tensor:
    """Compute causal attention within each segment of a row, and to the beginning that the segment continues, if any.

    A segment that has more keys than queries continues the last segment before it that has not.

    Args:
        query: [1, heads, N, D].
        key: [1, groups of heads, N, D].
        value: [1, groups of heads, N, D].
        scale: The factor of the products of queries and keys.
        sliding_window: The number of tokens to which a token attends, itself included; None for all before it.
        bounds: The bounds of the segments' queries and of their keys, [segments + 1] int32 each.
        longest: The largest number of queries and the largest number of keys of a segment.
        keys: The indices of the segments' keys in the row, [K] int64; None if no segment continues another one.

    Returns:
        [1, N, heads, D].
    """
    if query.is_cuda and _has_varlen(query, value):
        return _by_varlen(query, key, value, scale, sliding_window, bounds, longest, keys)
    groups = query.shape[1] // key.shape[1]
    key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    lengths = bounds[0].diff().tolist()
    before = [0] * len(lengths) if keys is None else (bounds[1].diff() - bounds[0].diff()).tolist()
    segments = zip(query.split(lengths, 2), _keys(key, lengths, before), _keys(value, lengths, before), strict=True)
    compute = _by_products if query.device.type == "cpu" and _computes_in_half(query) else _by_sdpa
    return compute(segments, scale, sliding_window, longest[1]).transpose(1, 2)


def _keys(x: Tensor, lengths: list[int], before: list[int]) -> list[Tensor]:
    """Return the keys or values of each segment, [1, heads, n, D], from those of the whole row, [1, heads, N, D].

    Args:
        x: The keys or values.
        lengths: The number of tokens in each segment.
        before: The number of keys of each segment that belong to the beginning that it continues.
    """
    segments, beginning = list(x.split(lengths, 2)), x[:, :, :0]
    for number, count in enumerate(before):
        if count:
            segments[number] = torch.cat([beginning, segments[number]], 2)
        else:
            beginning = segments[number]
    return segments


def _has_varlen(query: Tensor, value: Tensor) -> bool:
    """Return whether flash attention for texts of different lengths may be used.

    Flash attention has heads of at most 256 numbers, as many in values as in queries and keys; the values of multi-head
    latent attention (DeepSeek-V2) have fewer. It can be differentiated only once, so TRPO, which differentiates twice,
    disables it.
    """
    allowed = {"scale", "window_size"} <= _options_of(varlen_attn) and torch.backends.cuda.flash_sdp_enabled()
    size = query.shape[-1]
    return allowed and _computes_in_half(query) and size % 8 == 0 and size <= 256 and value.shape[-1] == size


@cache
def _options_of(function: Callable[..., Any] | None) -> frozenset[str]:
    return frozenset() if function is None else frozenset(inspect.signature(function).parameters)


def _by_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    window: int | None,
    bounds: tuple[Tensor, Tensor],
    longest: tuple[int, int],
    keys: Tensor | None,
) -> Tensor:
    """Compute the same as `_attend_within` by flash attention.

    Flash attention aligns the last query of a segment with its last key, so that a window works in segments that
    continue others, too.
    """
    half, groups = _dtype(query), query.shape[1] // key.shape[1]
    if keys is not None:
        key, value = key.index_select(2, keys), value.index_select(2, keys)
    options: dict[str, Any] = {}
    if "enable_gqa" in _options_of(varlen_attn):
        options["enable_gqa"] = groups > 1
    else:
        key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    q, k, v = (x[0].transpose(0, 1).to(half).contiguous() for x in (query, key, value))
    sides = (-1 if window is None else window - 1, 0)
    out: Any = varlen_attn(q, k, v, *bounds, *longest, scale=scale, window_size=sides, **options)
    return out.unsqueeze(0)


def _by_sdpa(segments: Iterable[Segment], scale: float, window: int | None, longest: int) -> Tensor:
    """Compute causal attention of segments by torch's function, [1, heads, n, D] each → [1, heads, N, D]."""
    outputs: list[Tensor] = []
    unseen: Tensor | None = None
    for query, key, value in segments:
        queries, keys = query.shape[2], key.shape[2]
        if queries == keys and (window is None or keys <= window):
            outputs.append(F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale))
            continue
        unseen = _unseen(longest, window, query) if unseen is None else unseen
        mask = unseen[keys - queries : keys, :keys]
        outputs.append(F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale))
    return torch.cat(outputs, 2)


def _by_products(segments: Iterable[Segment], scale: float, window: int | None, longest: int) -> Tensor:
    """Compute the same as `_by_sdpa` by matrix products.

    The function is for CPUs, where the backward pass of half-precision flash attention is several times slower.
    """
    outputs: list[Tensor] = []
    unseen: Tensor | None = None
    for segment in segments:
        query, key, value = (x[0].to(_dtype(x)) for x in segment)
        queries, keys = query.shape[1], key.shape[1]
        unseen = _unseen(longest, window, query) if unseen is None else unseen
        hidden = unseen[keys - queries : keys, :keys].expand(len(query), -1, -1)
        with torch.autocast(query.device.type, enabled=False):
            outputs.append(torch.baddbmm(hidden, query, key.transpose(1, 2), alpha=scale).softmax(-1) @ value)
    return torch.cat(outputs, 1)[None]


def _unseen(length: int, window: int | None, like: Tensor) -> Tensor:
    """Return a mask [length, length], −∞ where the token of the row does not attend to the token of the column."""
    place = torch.arange(length, device=like.device)
    distance = place[:, None] - place
    hidden = (distance < 0) | (distance >= (length if window is None else window))
    return torch.zeros(length, length, dtype=_dtype(like), device=like.device).masked_fill_(hidden, -torch.inf)


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
