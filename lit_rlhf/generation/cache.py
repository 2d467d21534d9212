"""A key-value cache for decoding, in memory that is allocated in advance."""

from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import CacheLayerMixin, DynamicLayer

from lit_rlhf.errors import UserError


class RowCache(Cache):
    """A key-value cache with one row per sequence, in which the newest tokens of all rows share a column.

    A prompt that joins later is written so that its last token is in that column; the row of a sequence that has
    ended is reused. A decoding step therefore writes one column and reads one block, and only rows that move are
    copied.

    Args:
        rows: The maximum number of sequences.
        columns: The number of tokens that a row has memory for.
        end: The column that the first decoding step writes; the first prompts end just before this column.
    """

    def __init__(self, rows: int, columns: int, end: int) -> None:
        super().__init__(layers=[])
        self.rows, self.columns = rows, columns
        self.used = 0
        """The number of rows that contain a sequence; these rows come first."""
        self.start, self.end = 0, end
        """The column of the longest sequence's first token, and the column after the newest tokens."""
        self.column: Tensor | None = None
        """The column ``end`` as a tensor, [1] int64, if decoding steps have a fixed shape, that is, if they compute all
        rows and columns; None if they compute those in use."""

    def insert(self, prefilled: DynamicCache, responses: int) -> None:
        """Append prefilled prompts after the rows in use, with the prompts' last tokens in the newest column.

        Args:
            prefilled: The keys and values of left-padded prompts.
            responses: The number of rows for each prompt.

        Raises:
            UserError: if the model caches anything besides keys and values.
        """
        if not prefilled.layers or not all(isinstance(layer, DynamicLayer) for layer in prefilled.layers):
            raise UserError("model.engine: NativeEngine supports only models that cache keys and values alone")
        if not self.layers:
            self.layers = [_Layer(self, layer) for layer in prefilled.layers]
        width = prefilled.get_seq_length()
        used, self.used = self.used, self.used + responses * len(_all_keys_values(prefilled)[0])
        for target, source in zip(_all_keys_values(self), _all_keys_values(prefilled), strict=True):
            target[used : self.used, :, self.end - width : self.end] = source.repeat_interleave(responses, 0)

    def move(self, source: Tensor, target: Tensor) -> None:
        """Copy the rows at the indices ``source``, [N] int64, to the rows at the indices ``target``, [N] int64."""
        for states in _all_keys_values(self):
            states[target, :, self.start : self.end] = states[source, :, self.start : self.end]

    def resize(self, rows: int, columns: int, end: int) -> None:
        """Change the number of rows and columns, and move the contents so that they end just before column ``end``."""
        width = self.end - self.start
        for layer in self.layers:
            for name, old in zip(("keys", "values"), _keys_values(layer), strict=True):
                new = old.new_zeros(rows, old.shape[1], columns, old.shape[3])
                new[: self.used, :, end - width : end] = old[: self.used, :, self.start : self.end]
                setattr(layer, name, new)
        self.rows, self.columns, self.start, self.end = rows, columns, end - width, end


class _Layer(CacheLayerMixin):
    """The keys and values of one layer, each [rows, heads, columns, D]."""

    is_sliding = False

    def __init__(self, cache: RowCache, prefilled: Any) -> None:
        super().__init__()
        self.cache = cache
        for name, states in zip(("keys", "values"), _keys_values(prefilled), strict=True):
            device_type = states.device.type
            dtype = states.dtype
            if torch.is_autocast_enabled(device_type):  # store attention's precision, so that no step casts it again
                dtype = torch.float32 if device_type == "cpu" else torch.get_autocast_dtype(device_type)
            shape = (cache.rows, states.shape[1], cache.columns, states.shape[3])
            setattr(self, name, torch.zeros(shape, dtype=dtype, device=states.device))  # masked entries must be finite
        self.is_initialized = True

    @property
    def is_compileable(self) -> bool:  # type: ignore[override]
        """Whether transformers must keep every mask; otherwise, it looks for padding and drops masks that have none.

        To look, the host would have to wait for a GPU at each token. Besides, compiled operations must not depend on
        values.
        """
        return self.cache.column is not None or _keys_values(self)[0].device.type != "cpu"

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Do nothing, because the constructor has already allocated the memory."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write the next column of the rows in use, and return all keys and values of these rows.

        If steps have a fixed shape, this includes the rows and columns that are not in use.

        Args:
            key_states: [rows, heads, 1, D], of the rows in use, or of all rows if steps have a fixed shape.
            value_states: [rows, heads, 1, D].
            args: Arguments of transformers' interface that are not used.
            kwargs: Arguments of transformers' interface that are not used.

        Returns:
            The keys and the values in the n columns from the cache's ``start`` to the new column, or in all columns if
            steps have a fixed shape; each [rows, heads, n, D].
        """
        if self.cache.column is not None:
            for states, new in zip(_keys_values(self), (key_states, value_states), strict=True):
                states.index_copy_(2, self.cache.column, new.to(states.dtype))
            return _keys_values(self)
        end = self.cache.end
        cached = []
        for states, new in zip(_keys_values(self), (key_states, value_states), strict=True):
            rows = states[: self.cache.used]
            rows[:, :, end : end + 1] = new
            cached.append(rows[:, :, self.cache.start : end + 1])
        return cached[0], cached[1]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the number of columns of keys, including masked ones, and the index of the first one in the mask."""
        if self.cache.column is not None:
            return self.cache.columns, 0
        return self.cache.end - self.cache.start + query_length, 0

    def get_seq_length(self) -> Any:
        """Return the index, among a step's columns, of the column to write; a tensor if steps have a fixed shape."""
        return self.cache.end - self.cache.start if self.cache.column is None else self.cache.column

    def get_max_length(self) -> int:
        """Return -1, which means that there is no maximum length."""
        return -1

    get_max_cache_shape = get_max_length  # its name before transformers 5.13


def _keys_values(layer: Any) -> tuple[Tensor, Tensor]:
    return layer.keys, layer.values


def _all_keys_values(cache: Cache) -> list[Tensor]:
    """Return the keys and values of every layer in one list."""
    return [states for layer in cache.layers for states in _keys_values(layer)]
