"""Key-value caches with room to grow: a step writes its keys and values in place instead of copying all earlier ones.

**Law.** A cache is still a value. Several caches may share one room, each seeing the positions it had when it was made:
the one that reaches as far as the room is filled goes on in place; any other, such as an old state that is continued
a second time, is copied into a room of its own first. So nothing that somebody still holds is ever overwritten.

Shapes: B rows, N key-value heads, L positions, R rows there is room for, C positions there is room for, W head width.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

MIN_POSITIONS = 64


@dataclass
class Room:
    """Keys and values of one layer, and how many of the C positions the longest cache that shares it has filled."""

    keys_RNCW: Tensor
    values_RNCW: Tensor
    num_filled: int


class GrowingLayer(DynamicLayer):
    """transformers' `DynamicLayer`, whose `keys` and `values` [B, N, L, W] are the filled part of a `Room`."""

    keys: Any
    values: Any
    room: Room | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append keys and values; the arguments that other layers know have no effect."""
        if key_states.requires_grad:  # what a gradient still needs must not be written over
            return super().update(key_states, value_states)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        num_rows, _, num_new, _ = key_states.shape
        begin = self.get_seq_length()
        room = self._reserve(key_states, value_states, num_new, num_rows)
        room.keys_RNCW[:num_rows, :, begin : begin + num_new] = key_states
        room.values_RNCW[:num_rows, :, begin : begin + num_new] = value_states
        self.fill(num_new, num_rows)
        return self.keys, self.values

    def reserve(self, num_new: int, num_rows: int) -> Room:
        """The room of a layer that has read something, free for `num_new` more positions of `num_rows` rows."""
        return self._reserve(self.keys, self.values, num_new, num_rows)

    def fill(self, num_new: int, num_rows: int) -> None:
        """Count `num_new` more positions, which were written into the room, as part of this cache."""
        room = self.room
        assert room is not None
        room.num_filled += num_new
        self.keys = room.keys_RNCW[:num_rows, :, : room.num_filled]
        self.values = room.values_RNCW[:num_rows, :, : room.num_filled]

    def _reserve(self, keys_BNLW: Tensor, values_BNLW: Tensor, num_new: int, num_rows: int) -> Room:
        """See `reserve`; the tensors say what shape, type and device a new room has."""
        length, room = self.get_seq_length(), self.room
        if room is not None and self._owns(room, length) and _fits(room, length + num_new, num_rows):
            return room
        capacity = MIN_POSITIONS
        while capacity < length + num_new:
            capacity *= 2
        keys, values = (
            new.new_zeros(max(num_rows, new.shape[0]), new.shape[1], capacity, new.shape[3])
            for new in (keys_BNLW, values_BNLW)
        )
        if length:
            keys[: self.keys.shape[0], :, :length] = self.keys
            values[: self.values.shape[0], :, :length] = self.values
        self.room = Room(keys, values, length)
        return self.room

    def _owns(self, room: Room, length: int) -> bool:
        """Whether this layer's positions are all that the room holds: it may go on in place."""
        same = length > 0 and self.keys.data_ptr() == room.keys_RNCW.data_ptr()
        return same and room.num_filled == length and self.keys.stride() == room.keys_RNCW.stride()


def _fits(room: Room, num_positions: int, num_rows: int) -> bool:
    writable = torch.is_inference_mode_enabled() or not room.keys_RNCW.is_inference()
    return writable and room.keys_RNCW.shape[0] >= num_rows and room.keys_RNCW.shape[2] >= num_positions


def growing_cache() -> DynamicCache:
    """An empty cache; its layers come as they are needed."""
    cache = DynamicCache()
    cache.layer_class_to_replicate = GrowingLayer
    return cache


def fork(cache: DynamicCache) -> DynamicCache:
    """A cache that grows on its own: layers are copied, tensors are shared (see the law above)."""
    forked = copy.copy(cache)
    forked.layers = [copy.copy(layer) for layer in cache.layers]
    return forked
