"""Keys and values with room for the tokens to come."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DynamicLayer


class RoomyLayer(DynamicLayer):
    """One layer's keys and values, views of buffers that are longer: a token is written into them.

    transformers' own layer copies all earlier keys and values for every token. Its fixed-size one does not, but
    attention then reads the whole buffer.
    """

    def __init__(self, room: int) -> None:
        """Empty; the buffers are as long as what comes first, and ``room`` tokens more."""
        super().__init__()
        self.room = room

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Reserve the memory behind ``[B, heads, t, d]``, which are not written yet."""
        super().lazy_initialization(key_states, value_states)
        *outer, length, width = key_states.shape
        shape = (*outer, length + self.room, width)
        self._buffers = [states.new_empty(shape) for states in (key_states, value_states)]

    def _first(self, length: int) -> tuple[Tensor, Tensor]:
        keys, values = (buffer[..., :length, :] for buffer in self._buffers)
        self.keys, self.values = keys, values
        return keys, values

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write ``[B, heads, t, d]`` behind the others; returns all keys and all values so far."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start, end = self.get_seq_length(), self.get_seq_length() + key_states.shape[-2]
        if end > self._buffers[0].shape[-2]:
            raise ValueError(f"a cache with room for {self._buffers[0].shape[-2]} tokens was given {end}")
        for buffer, states in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[..., start:end, :] = states
        return self._first(end)


def empty_cache(layers: int, room: int) -> Cache:
    """For a prompt, read once, and ``room`` more tokens."""
    return Cache(layers=[RoomyLayer(room) for _ in range(layers)])


def with_room(cache: Cache, room: int, rows: Tensor | None = None) -> Cache:
    """A copy of a cache for ``room`` more tokens; with ``rows [B]`` int64 of these rows of it.

    Raises:
        TypeError: a layer keeps something else than all keys and values (a sliding window).
    """
    copy = empty_cache(len(cache.layers), room)
    for index, layer in enumerate(cache.layers):
        if type(layer) is not DynamicLayer or layer.keys is None or layer.values is None:
            raise TypeError(f"a cache of {type(layer).__name__} cannot be given room")
        keys, values = layer.keys, layer.values
        copy.update(keys if rows is None else keys[rows], values if rows is None else values[rows], index)
    return copy
