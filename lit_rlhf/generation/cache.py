"""Keys and values of the texts being decoded, in memory that is allocated before it is filled."""

from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import CacheLayerMixin, DynamicLayer

from lit_rlhf.errors import UserError


class RowCache(Cache):
    """Rows of keys and values whose newest tokens stand in the same column.

    A text that comes in later is put in with its last token at that column; one that has ended gives its row to
    another. So a step writes one column and reads one block, and nothing is copied but what moves.

    Args:
        rows: Texts at most.
        columns: Tokens that a row has room for.
        end: The first column to be written.
    """

    def __init__(self, rows: int, columns: int, end: int) -> None:
        super().__init__(layers=[])
        self.rows, self.columns = rows, columns
        self.used = 0
        """Rows that hold a text, the first ones."""
        self.start, self.end = 0, end
        """Columns from the oldest text's first token to the newest tokens."""

    def insert(self, prefilled: DynamicCache, responses: int) -> None:
        """Put texts behind the rows in use, each as often as it has responses; their newest token goes before ``end``.

        Raises:
            UserError: if the model keeps other things than keys and values.
        """
        if not prefilled.layers or not all(isinstance(layer, DynamicLayer) for layer in prefilled.layers):
            raise UserError("model.engine: the model keeps more than keys and values, which NativeEngine does not know")
        if not self.layers:
            self.layers = [_Layer(self, layer) for layer in prefilled.layers]
        width = prefilled.get_seq_length()
        used, self.used = self.used, self.used + responses * len(_held(prefilled)[0])
        for mine, theirs in zip(_held(self), _held(prefilled), strict=True):
            mine[used : self.used, :, self.end - width : self.end] = theirs.repeat_interleave(responses, 0)

    def move(self, source: Tensor, target: Tensor) -> None:
        """Copy rows over others."""
        for held in _held(self):
            held[target, :, self.start : self.end] = held[source, :, self.start : self.end]

    def make_room(self, rows: int, columns: int, end: int) -> None:
        """Change the size, and move all columns so that what is there now stands before ``end``."""
        width = self.end - self.start
        for layer in self.layers:
            for name, held in zip(("keys", "values"), _held_by(layer), strict=True):
                room = held.new_zeros(rows, held.shape[1], columns, held.shape[3])
                room[: self.used, :, end - width : end] = held[: self.used, :, self.start : self.end]
                setattr(layer, name, room)
        self.rows, self.columns, self.start, self.end = rows, columns, end - width, end


class _Layer(CacheLayerMixin):
    """A layer's [rows, heads, columns, D] keys and values."""

    is_sliding = False

    def __init__(self, cache: RowCache, like: Any) -> None:
        super().__init__()
        self.cache = cache
        for name, held in zip(("keys", "values"), _held_by(like), strict=True):
            kind = held.device.type
            dtype = held.dtype
            if torch.is_autocast_enabled(kind):  # what attention computes in, so that no step casts it again
                dtype = torch.float32 if kind == "cpu" else torch.get_autocast_dtype(kind)
            room = torch.zeros(cache.rows, held.shape[1], cache.columns, held.shape[3], dtype=dtype, device=held.device)
            setattr(self, name, room)  # zeros: what a mask hides must still be finite
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing is left to do."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write a column of the rows in use, and give all that they hold."""
        end = self.cache.end
        found = []
        for held, new in zip(_held_by(self), (key_states, value_states), strict=True):
            rows = held[: self.cache.used]
            rows[:, :, end : end + 1] = new
            found.append(rows[:, :, self.cache.start : end + 1])
        return found[0], found[1]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Columns that a query sees, and the first of them."""
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        """Columns held."""
        return self.cache.end - self.cache.start

    def get_max_length(self) -> int:
        """None."""
        return -1


def _held_by(layer: Any) -> tuple[Tensor, Tensor]:
    return layer.keys, layer.values


def _held(cache: Cache) -> list[Tensor]:
    """Keys and values of every layer."""
    return [held for layer in cache.layers for held in _held_by(layer)]
