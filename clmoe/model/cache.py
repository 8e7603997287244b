"""Keys and values with room for the tokens to come."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin, DummyLayer, DynamicLayer, LinearAttentionCacheLayerMixin


class RoomyLayer(DynamicLayer):
    """One layer's keys and values, views of buffers that are longer: a token is written into them.

    transformers' own layer copies all earlier keys and values for every token. Its fixed-size one does not, but
    attention then reads the whole buffer.
    """

    def __init__(self, keys: Tensor, values: Tensor, room: int, rows: Tensor | None) -> None:
        """Copies of ``keys`` and ``values [G, heads, T, d]``, of the rows ``[B]`` if given, before ``room`` tokens."""
        super().__init__()
        self.lazy_initialization(keys, values)
        self._buffers = [_with_room(states, room, rows) for states in (keys, values)]
        self._first(keys.shape[-2])

    def _first(self, length: int) -> tuple[Tensor, Tensor]:
        keys, values = (buffer[..., :length, :] for buffer in self._buffers)
        self.keys, self.values = keys, values
        return keys, values

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write ``[B, heads, t, d]`` behind the others; returns all keys and all values so far."""
        start, end = self.get_seq_length(), self.get_seq_length() + key_states.shape[-2]
        if end > self._buffers[0].shape[-2]:
            raise ValueError(f"a cache with room for {self._buffers[0].shape[-2]} tokens was given {end}")
        for buffer, states in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[..., start:end, :] = states
        return self._first(end)


def with_room(cache: Cache, room: int, rows: Tensor | None = None) -> Cache:
    """A copy of a cache for ``room`` more tokens; with ``rows [B]`` int64 of these rows of it.

    Raises:
        TypeError: a layer keeps something else than all keys and values (a sliding window).
    """
    layers: list[CacheLayerMixin | LinearAttentionCacheLayerMixin | DummyLayer] = []
    for layer in cache.layers:
        if type(layer) is not DynamicLayer or layer.keys is None or layer.values is None:
            raise TypeError(f"a cache of {type(layer).__name__} cannot be given room")
        layers.append(RoomyLayer(layer.keys, layer.values, room, rows))
    return Cache(layers=layers)


def _with_room(states: Tensor, room: int, rows: Tensor | None) -> Tensor:
    count, heads, length, width = states.shape
    buffer = states.new_empty(count if rows is None else len(rows), heads, length + room, width)
    buffer[..., :length, :] = states if rows is None else states[rows]
    return buffer
