"""A key-value cache that appends in place and is a value all the same.

transformers' DynamicCache makes every key and value anew at each step, so that a step costs more the longer the
conversation is. Here they lie in storage with room behind them: who holds the newest state appends into the room; who
goes on from an older one, which others may have appended to, gets storage of its own. No state ever sees what was
appended to another.

Shapes: B batch rows, A attention heads, L positions, W width of a head, C positions there is room for.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

_LEAST = 64  # positions there is room for at first


class _Storage:
    """Room for keys or values [B, A, C, W], and how many positions of it are taken."""

    def __init__(self, start_BALW: Tensor, more_BALW: Tensor) -> None:
        length = start_BALW.shape[2] + more_BALW.shape[2]
        rows, heads, _, width = more_BALW.shape
        self.room_BACW = more_BALW.new_empty(rows, heads, max(_LEAST, length + length // 2), width)
        self.room_BACW[:, :, : start_BALW.shape[2]] = start_BALW
        self.taken = start_BALW.shape[2]

    def continues(self, start_BALW: Tensor, more_BALW: Tensor) -> bool:
        """Whether more can be appended here to what a state holds."""
        room, length = self.room_BACW, start_BALW.shape[2]
        return (
            self.taken == length
            and length + more_BALW.shape[2] <= room.shape[2]
            and start_BALW.data_ptr() == room.data_ptr()
            and start_BALW.shape[:2] == more_BALW.shape[:2] == room.shape[:2]
            and (torch.is_inference_mode_enabled() or not room.is_inference())
        )

    def append(self, more_BALW: Tensor) -> Tensor:
        """Everything there is then [B, A, L, W]."""
        end = self.taken + more_BALW.shape[2]
        self.room_BACW[:, :, self.taken : end] = more_BALW
        self.taken = end
        return self.room_BACW[:, :, :end]


class GrowingLayer(DynamicLayer):
    """Keys and values of one layer."""

    def __init__(self) -> None:
        super().__init__()
        self._storage: tuple[_Storage, _Storage] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        """Append positions; all keys and values."""
        if torch.is_grad_enabled() and key_states.requires_grad:
            return super().update(key_states, value_states)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
        assert self.keys is not None and self.values is not None
        if self._storage is None or not (
            self._storage[0].continues(self.keys, key_states) and self._storage[1].continues(self.values, value_states)
        ):
            self._storage = _Storage(self.keys, key_states), _Storage(self.values, value_states)
        self.keys, self.values = self._storage[0].append(key_states), self._storage[1].append(value_states)
        return self.keys, self.values


class GrowingCache(DynamicCache):
    """A cache whose layers are `GrowingLayer`."""

    def __init__(self) -> None:
        super().__init__()
        self.layer_class_to_replicate = GrowingLayer
