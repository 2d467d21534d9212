"""Hidden states of the texts of a batch, of which a decoder processes no padding and each shared beginning only once.

The texts follow one another in a single row, and each attends only to itself (attention.py). Texts of a group, such as
the responses to one prompt, begin alike: the row holds their common beginning once, as a text of its own, and what
follows it in each text attends to it and to itself.
"""

import json
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from lit_rlhf.compat import attention_can_be_set, attention_of
from lit_rlhf.models.attention import UNPADDED
from lit_rlhf.models.positions import check_positions
from lit_rlhf.models.weights import with_weights

_NOT_SUPPORTED = (NotImplementedError, TypeError, ValueError, LookupError, AttributeError, RuntimeError)
"""The errors of a model that another attention does not fit."""
_NAMES = ("_name_or_path", "architectures")
"""The fields of a configuration that say where a model comes from, not how it computes."""
_fits: dict[tuple[type, str], bool] = {}
"""Whether the attention of attention.py fits the models of a class and a configuration that have been tried so far."""


class HiddenStates(NamedTuple):
    """The last hidden states of a batch of texts; those of a shared beginning are there once."""

    states: Tensor  # [N, H]
    places: Tensor  # [B, S] int64, the index of each token's state; any index at padding

    def before(self, mask: Tensor) -> Tensor:
        """Return the states one token *before* the tokens that a bool mask, [B, S − 1], marks among all but the first.

        The result has shape [number of marked tokens, H].
        """
        return self.states.index_select(0, self.places[:, :-1][mask])

    def spread(self, x: Tensor) -> Tensor:
        """Return the numbers that belong to the states, [N], at the tokens, [B, S]."""
        return x.index_select(0, self.places.flatten()).view_as(self.places)


class _Row(NamedTuple):
    """The single row that holds all texts of a batch.

    Each segment of the row is a text, the common beginning of several texts, or what follows it in one of them.
    """

    tokens: Tensor  # [N] int64, the indices in [B · S] of the tokens in the row
    positions: Tensor  # [N] int64, within each text
    places: Tensor  # [B, S] int64, the index of each token in the row
    query_bounds: Tensor  # [T + 1] int32, where each segment begins, and the length of the row
    key_bounds: Tensor  # [T + 1] int32, the same for the keys to which the segments attend, one after the other
    keys: Tensor | None  # [K] int64, the indices of these keys in the row; None if each segment attends to itself only


def last_hidden_state(
    trunk: nn.Module, tokens: Tensor, real: Tensor, positions: Tensor | None = None, shared: Tensor | None = None
) -> HiddenStates:
    """Return the trunk's last hidden states.

    Args:
        trunk: A transformers decoder without its head.
        tokens: Token ids, [B, S] int64.
        real: Bool [B, S], True at the tokens to process, which come before all others in each row.
        positions: The positions of the tokens, [B, S] int64, for packed rows: 0, 1, … within each text; the texts of a
            row do not attend to each other. None if each row is one text.
        shared: The number of leading tokens that a text has in common with the text before it, and that are computed
            once for both, [B] int64, as `shared_beginnings` returns it; None to share nothing, as for packed rows.

    Raises:
        UserError: if a text is longer than the positions that the model has learned.
    """
    if not is_unpadded(trunk):
        if positions is None:
            check_positions(trunk.config, tokens.shape[1])
        hidden = trunk(input_ids=tokens, position_ids=positions, use_cache=False).last_hidden_state
        return HiddenStates(hidden.flatten(0, 1), torch.arange(tokens.numel(), device=tokens.device).view_as(tokens))
    if shared is not None and shares_beginnings(trunk) and shared.any():
        row = _arrange_shared(real, shared)
    else:
        row = _arrange(real, positions)
    longest = torch.stack([row.query_bounds.diff().amax(), row.key_bounds.diff().amax()]).tolist()
    check_positions(trunk.config, longest[1])
    hidden = trunk(
        input_ids=tokens.flatten()[row.tokens][None],
        position_ids=row.positions[None],
        use_cache=False,
        cu_seq_lens_q=row.query_bounds,
        cu_seq_lens_k=row.key_bounds,
        max_length_q=longest[0],
        max_length_k=longest[1],
        **({} if row.keys is None else {"keys_of_texts": row.keys}),  # a name that only attention.py knows
    ).last_hidden_state[0]
    return HiddenStates(hidden, row.places)


def is_unpadded(trunk: nn.Module) -> bool:
    """Return whether `last_hidden_state` skips padding for this trunk."""
    config: Any = trunk.config
    return shares_beginnings(trunk) or attention_of(config).startswith("flash_attention")


def shares_beginnings(trunk: nn.Module) -> bool:
    """Return whether `last_hidden_state` computes shared beginnings once for this trunk, and skips padding."""
    config: Any = trunk.config
    return attention_of(config) == UNPADDED


def may_be_unpadded(model: PreTrainedModel) -> bool:
    """Return whether a model's attention can be replaced.

    Chunked attention cannot be replaced, because only the attention mask contains the bounds of the chunks of a text.
    """
    chunked = "chunked_attention" in (getattr(model.config, "layer_types", None) or ())
    return attention_can_be_set(model) and not chunked


@torch.no_grad()
def use_unpadded_attention(model: PreTrainedModel) -> None:
    """Make a model use the attention of attention.py if that leaves the model's output unchanged.

    The output would change for models that add something to causal or sliding-window softmax attention (ALiBi, soft
    caps, attention sinks), and for state-space models. A process tries it once for all models of a configuration.
    """
    if not may_be_unpadded(model):
        return
    before = attention_of(model.config)
    options = {name: value for name, value in model.config.to_dict().items() if name not in _NAMES}
    key = type(model), json.dumps(options, sort_keys=True, default=str)
    if key not in _fits:
        tried = with_weights(model)
        _fits[key] = keeps_texts_apart(tried, UNPADDED) and _continues_beginnings(tried)
    model.set_attn_implementation(UNPADDED if _fits[key] else before)


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
        apart = torch.cat([piece.last_hidden_state for piece in pieces], 1)[0]
        if attention is not None:
            model.set_attn_implementation(attention)
        together = last_hidden_state(model.base_model, tokens, torch.ones_like(tokens, dtype=torch.bool), places)
    except _NOT_SUPPORTED:
        return False
    return torch.allclose(together.states.float(), apart.float(), rtol=1e-3, atol=1e-3)


def _continues_beginnings(model: PreTrainedModel) -> bool:
    """Return whether a model computes the same hidden states with and without a shared beginning."""
    tokens = torch.tensor([[0, 1, 2, 3, 4], [0, 1, 2, 5, 6]], device=model.device) % model.config.vocab_size
    real, shared = torch.ones_like(tokens, dtype=torch.bool), torch.tensor([0, 3], device=model.device)
    try:
        found = [last_hidden_state(model.base_model, tokens, real, shared=once) for once in (None, shared)]
    except _NOT_SUPPORTED:
        return False
    apart, together = (hidden.states[hidden.places].float() for hidden in found)
    return torch.allclose(together, apart, rtol=1e-3, atol=1e-3)


def _arrange(real: Tensor, positions: Tensor | None) -> _Row:
    """Arrange the texts of a batch in a single row."""
    tokens = real.flatten().nonzero().squeeze(1)
    positions = (real.cumsum(1) - 1 if positions is None else positions).flatten()[tokens]
    places = (real.flatten().cumsum(0).view_as(real) - 1).clamp(min=0)
    bounds = F.pad((positions == 0).nonzero().squeeze(1), (0, 1), value=len(tokens)).int()
    return _Row(tokens, positions, places, bounds, bounds, keys=None)


def _arrange_shared(real: Tensor, shared: Tensor) -> _Row:
    """Arrange the texts of a batch in a single row that holds each shared beginning once."""
    column, first = torch.arange(real.shape[1], device=real.device), (shared == 0)[:, None]
    beginning = torch.maximum(shared, F.pad(shared[1:], (0, 1)))[:, None]  # of the first text of a group, too
    kept = (real | (column < beginning)) & (column >= shared[:, None])
    counted = kept.flatten().cumsum(0).view_as(kept) - 1
    leader = counted[torch.where(first[:, 0], torch.arange(len(shared), device=real.device), 0).cummax(0).values]
    places = torch.where(column < shared[:, None], leader, counted).clamp(min=0)

    tokens = kept.flatten().nonzero().squeeze(1)
    text, first_column = (kept & torch.where(column == 0, first, column == beginning)).nonzero().T  # of the segments
    starts, of_leader = counted[text, first_column], leader[text, 0]
    before = torch.where(first_column > 0, beginning[text, 0], 0)  # the keys of each segment that are not its own
    bounds = F.pad(starts, (0, 1), value=len(tokens))
    key_bounds = F.pad((bounds.diff() + before).cumsum(0), (1, 0))
    segment = torch.repeat_interleave(key_bounds.diff())
    number = torch.arange(len(segment), device=real.device) - key_bounds[segment]  # of each key in its segment
    own = number - before[segment]
    keys = torch.where(own < 0, of_leader[segment] + number, starts[segment] + own)
    return _Row(tokens, tokens % real.shape[1], places, bounds.int(), key_bounds.int(), keys)
