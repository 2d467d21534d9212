"""Texts without padding: they stand one after the other in a single row, and each sees only itself.

The trunk then works on real tokens alone. transformers' attention interface lets the attention be ours, and hands on
the texts' bounds under the names that its flash attention uses (``cu_seq_lens_q``, …).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

try:  # flash attention over texts of different lengths, part of torch since 2.11
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # pragma: no cover
    varlen_attn = None  # type: ignore[assignment]

UNPADDED = "lit_rlhf_unpadded"
"""The name under which transformers knows this attention."""


def last_hidden_state(trunk: nn.Module, tokens: Tensor, real: Tensor, positions: Tensor | None = None) -> Tensor:
    """The trunk's last hidden state at real tokens, 0 elsewhere, [B, S, H].

    Args:
        trunk: A decoder of transformers.
        tokens: [B, S] int64.
        real: Bool [B, S], the tokens that matter: from a row's first on, without gaps.
        positions: [B, S] int64, where a row holds several texts: they begin at 0 with each; None: one text a row.
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
    """Whether `last_hidden_state` leaves out padding for this trunk."""
    config: Any = trunk.config
    return config._attn_implementation == UNPADDED or config._attn_implementation.startswith("flash_attention")


@torch.no_grad()
def use_unpadded_attention(model: PreTrainedModel) -> None:
    """Give a model this attention, if it then still says the same; if not, leave it as it is.

    Not so for architectures whose attention is not a function of queries, keys, values and positions alone (ALiBi, soft
    caps, attention sinks, state spaces).
    """
    before = model.config._attn_implementation
    chunked = "chunked_attention" in (getattr(model.config, "layer_types", None) or ())  # only their mask knows
    if chunked or not model._can_set_attn_implementation() or model.device.type == "meta":
        return
    if not keeps_texts_apart(model, UNPADDED):
        model.set_attn_implementation(before)


@torch.no_grad()
def keeps_texts_apart(model: PreTrainedModel, attention: str | None = None) -> bool:
    """Whether two texts in one row get the hidden states that the model gives each alone.

    Args:
        model: A decoder.
        attention: What the model shall compute the row with, and keep; None: what it has.
    """
    tokens = torch.arange(7, device=model.device)[None] % model.config.vocab_size
    places = torch.tensor([[0, 1, 2, 0, 1, 2, 3]], device=model.device)
    try:
        pieces = [model.base_model(input_ids=text, use_cache=False) for text in (tokens[:, :3], tokens[:, 3:])]
        apart = torch.cat([piece.last_hidden_state for piece in pieces], 1)
        if attention is not None:
            model.set_attn_implementation(attention)
        together = last_hidden_state(model.base_model, tokens, torch.ones_like(tokens, dtype=torch.bool), places)
    except (NotImplementedError, TypeError, ValueError, IndexError, RuntimeError):  # it cannot at all
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
    """transformers' attention interface: query [B, heads, N, D] → [B, N, heads, D]."""
    if any(others.get(name) is not None for name in ("softcap", "s_aux", "position_bias")):
        raise NotImplementedError
    if cu_seq_lens_q is None:  # decoding: the mask says everything
        if query.device.type == "cpu" and torch.is_autocast_enabled("cpu"):  # one query: faster in float32
            with torch.autocast("cpu", enabled=False):
                query, key, value = query.float(), key.float(), value.float()
                return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **others)
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **others)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return _attend_within(query, key, value, scale, sliding_window, cu_seq_lens_q, max_length_q), None


@torch.compiler.disable  # a graph for every number of texts otherwise
def _attend_within(
    query: Tensor, key: Tensor, value: Tensor, scale: float, sliding_window: int | None, bounds: Tensor, longest: int
) -> Tensor:
    """Texts of [1, heads, N, D] one after the other, each for itself → [1, N, heads, D]."""
    groups = query.shape[1] // key.shape[1]
    if query.is_cuda and _has_varlen(query):
        half = _dtype(query)
        q, k, v = (x[0].transpose(0, 1).to(half).contiguous() for x in (query, key, value))
        window = (-1 if sliding_window is None else sliding_window - 1, 0)
        out: Any = varlen_attn(
            q, k, v, bounds, bounds, longest, longest,
            scale=scale, window_size=window, enable_gqa=groups > 1,
        )  # fmt: skip
        return out.unsqueeze(0)
    lengths = bounds.diff().tolist()
    key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    if query.device.type == "cpu" and _computes_in_half(query):
        return _by_products(query[0] * scale, key[0], value[0], lengths, sliding_window).transpose(0, 1)[None]
    texts = zip(query.split(lengths, 2), key.split(lengths, 2), value.split(lengths, 2), strict=True)
    return torch.cat([_by_sdpa(q, k, v, scale, sliding_window) for q, k, v in texts], 2).transpose(1, 2)


def _has_varlen(query: Tensor) -> bool:
    """Not where flash attention is switched off: it is differentiable once only."""
    allowed = varlen_attn is not None and torch.backends.cuda.flash_sdp_enabled()
    return allowed and _computes_in_half(query) and query.shape[-1] % 8 == 0


def _by_sdpa(query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None) -> Tensor:
    length = query.shape[2]
    if window is None or length <= window:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale)
    mask = _visible(length, window, query.device)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)


def _by_products(query: Tensor, key: Tensor, value: Tensor, lengths: list[int], window: int | None) -> Tensor:
    """As matrix products, all of [heads, N, D]: on CPUs, half-precision flash attention's backward is several times
    slower.
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
    """Bool [N, N], True where the row's token sees the column's."""
    place = torch.arange(length, device=device)
    distance = place[:, None] - place
    return (distance >= 0) & (distance < (length if window is None else window))


def _dtype(x: Tensor) -> torch.dtype:
    """What matrix products of it are computed in."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def _computes_in_half(x: Tensor) -> bool:
    return _dtype(x) in (torch.bfloat16, torch.float16)


def _mask(attention_mask: Tensor | None = None, **others: Any) -> Tensor | None:
    """None where the texts' bounds say it all; else scaled_dot_product_attention's mask."""
    return None if attention_mask is None else sdpa_mask(attention_mask=attention_mask, **others)


_interface: Callable[..., Any] = _attend
AttentionInterface.register(UNPADDED, _interface)
AttentionMaskInterface.register(UNPADDED, _mask)
