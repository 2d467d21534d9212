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
    ended is reused. A decoding step therefore writes one column and reads one contiguous block of columns, without
    copying what is already in the cache.

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
        rows and columns; None if they compute only the rows and columns in use."""

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
        """Change the numbers of rows and columns, and move the contents so that they end just before column ``end``.

        Args:
            rows: The new number of rows, at least the number in use.
            columns: The new number of columns.
            end: The column that the next decoding step writes, at least the number of columns in use.
        """
        width = self.end - self.start
        for layer in self.layers:
            for name, old in zip(("keys", "values"), _keys_values(layer), strict=True):
                new = old.new_zeros(rows, old.shape[1], columns, old.shape[3])
                new[: self.used, :, end - width : end] = old[: self.used, :, self.start : self.end]
                setattr(layer, name, new)
        self.rows, self.columns, self.start, self.end = rows, columns, end - width, end


class _Layer(CacheLayerMixin):
    """The keys and values of one layer, each [rows, heads, columns, D], where D is the size of a head."""

    is_sliding = False

    def __init__(self, cache: RowCache, prefilled: Any) -> None:
        super().__init__()
        self.cache = cache
        for name, states in zip(("keys", "values"), _keys_values(prefilled), strict=True):
            device_type = states.device.type
            dtype = states.dtype
            if torch.is_autocast_enabled(device_type):  # attention's precision, so that no step casts the cache
                dtype = torch.float32 if device_type == "cpu" else torch.get_autocast_dtype(device_type)
            shape = (cache.rows, states.shape[1], cache.columns, states.shape[3])
            setattr(self, name, torch.zeros(shape, dtype=dtype, device=states.device))  # masked entries must be finite
        self.is_initialized = True

    @property
    def is_compileable(self) -> bool:  # type: ignore[override]
        """Whether transformers must keep every attention mask, instead of dropping a mask in which it finds no padding.

        To look for padding, the host would have to wait for the GPU at each token. A compiled step must not depend on
        the values in a mask either.
        """
        return self.cache.column is not None or _keys_values(self)[0].device.type != "cpu"

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Do nothing, because the constructor has already allocated the memory."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write the keys and values of the newest tokens into the next column, and return those of all tokens so far.

        Args:
            key_states: The keys of the newest tokens, [rows, heads, 1, D], in the rows in use, or in all rows if steps
                have a fixed shape.
            value_states: The values of the same tokens, [rows, heads, 1, D].
            args: Arguments of transformers' interface that are not used.
            kwargs: Arguments of transformers' interface that are not used.

        Returns:
            The keys and the values in the same rows and in n columns, each [rows, heads, n, D]. The columns are those
            from the cache's ``start`` to the new one, or all columns if steps have a fixed shape.
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
        """Return the number of columns that a step reads, including masked columns, and the first column's offset, 0.

        Args:
            query_length: The number of new tokens in each row.
        """
        if self.cache.column is not None:
            return self.cache.columns, 0
        return self.cache.end - self.cache.start + query_length, 0

    def get_seq_length(self) -> Any:
        """Return the index of the column to write among the columns that a step reads.

        The index is a tensor, [1] int64, if steps have a fixed shape, and an int otherwise.
        """
        return self.cache.end - self.cache.start if self.cache.column is None else self.cache.column

    def get_max_length(self) -> int:
        """Return -1, which means that there is no maximum length."""
        return -1

    get_max_cache_shape = get_max_length  # its name before transformers 5.13


def _keys_values(layer: Any) -> tuple[Tensor, Tensor]:
    return layer.keys, layer.values


def _all_keys_values(cache: Cache) -> list[Tensor]:
    """Return the keys and the values of every layer as one list of tensors."""
    return [states for layer in cache.layers for states in _keys_values(layer)]
