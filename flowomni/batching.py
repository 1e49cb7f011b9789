"""Rows join and leave: states of single rows to the state of a batch, and back.

Every function takes values and gives values. A row's numbers do not depend on where it stands or beside whom.

Shapes: B batch rows, L positions, S samples, X one speech token (D latents or K codes).
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache

from .modeling import ModelState
from .tokenizers.base import SpeechTokenizer

# ------------------------------------------------------------------------------------------------- the model's state


def join(states: Sequence[ModelState]) -> ModelState:
    """One batch of several states that have read something; shorter ones are padded at their start."""
    if len(states) == 1:
        return states[0]
    longest = max(state.mask_BL.shape[1] for state in states)
    missing = [longest - state.mask_BL.shape[1] for state in states]

    def joined(parts: Sequence[Tensor]) -> Tensor:
        return torch.cat([pad(part, (0, 0, num, 0)) for part, num in zip(parts, missing, strict=True)])

    return ModelState(
        llm_cache=_map_layers(joined, [state.llm_cache for state in states]),
        blocks_cache=_map_layers(joined, [state.blocks_cache for state in states]),
        mask_BL=torch.cat([pad(s.mask_BL, (num, 0)) for s, num in zip(states, missing, strict=True)]),
        num_seen_B=torch.cat([state.num_seen_B for state in states]),
    )


def take(state: ModelState, rows: Sequence[int]) -> ModelState:
    """Some rows of a batch, in this order; positions that are padding in all of them are dropped."""
    index = torch.tensor(rows, device=state.mask_BL.device)
    mask_BL = state.mask_BL[index]
    used_L = mask_BL.any(0)
    positions = None if bool(used_L.all()) else used_L.nonzero()[:, 0]

    def taken(parts: Sequence[Tensor]) -> Tensor:
        chosen = parts[0][index]
        return chosen if positions is None else chosen[:, :, positions]

    return ModelState(
        llm_cache=_map_layers(taken, [state.llm_cache]),
        blocks_cache=_map_layers(taken, [state.blocks_cache]),
        mask_BL=mask_BL if positions is None else mask_BL[:, positions],
        num_seen_B=state.num_seen_B[index],
    )


def cut(state: ModelState, num_positions: int) -> ModelState:
    """A single row's state as it was after its first `num_positions` positions."""
    assert state.mask_BL.shape[0] == 1 and 1 <= num_positions <= state.mask_BL.shape[1]

    def kept(parts: Sequence[Tensor]) -> Tensor:
        return parts[0][:, :, :num_positions]

    return ModelState(
        llm_cache=_map_layers(kept, [state.llm_cache]),
        blocks_cache=_map_layers(kept, [state.blocks_cache]),
        mask_BL=state.mask_BL[:, :num_positions],
        num_seen_B=torch.full_like(state.num_seen_B, num_positions),
    )


def _map_layers(function: Callable[[Sequence[Tensor]], Tensor], caches: Sequence[DynamicCache]) -> DynamicCache:
    """A cache whose keys and values [B, heads, L, width] are made of those of `caches`, layer by layer."""
    new = copy.copy(caches[0])
    new.layers = []
    for layers in zip(*(cache.layers for cache in caches), strict=True):
        layer = copy.copy(layers[0])
        layer.keys = function([each.keys for each in layers])
        layer.values = function([each.values for each in layers])
        new.layers.append(layer)
    return new


# ----------------------------------------------------------------------------------------------- the voice's states

_GONE = -1  # a member of a group that could not be taken out of its state


@dataclass(frozen=True)
class Voices:
    """Speech tokenizer states of a batch's rows, stepped together where they can be.

    A tokenizer's state may hold what all its rows share, such as how much of the first samples is yet to be trimmed:
    then only rows in the same phase can be one batch. Rows that begin at different times are groups of their own until
    their states agree, which a few tokens later they do.

    Attributes:
        groups: (row numbers, state) of each group. A state of unknown kind is neither joined nor taken apart; a row
            that leaves it is stepped along and ignored.
    """

    groups: tuple[tuple[tuple[int, ...], Any], ...] = ()

    def step(self, tokenizer: SpeechTokenizer, tokens: Mapping[int, Tensor]) -> tuple[dict[int, Tensor], Voices]:
        """One more token [X] of each row, all that speak and new ones: their final samples [S], and the next voices."""
        known = {row for rows, _ in self.groups for row in rows}
        new = tuple(row for row in tokens if row not in known)
        groups = [*self.groups, *([(new, tokenizer.init_state(len(new)))] if new else [])]
        wavs: dict[int, Tensor] = {}
        stepped = []
        for rows, state in groups:
            spare_X = next(tokens[row] for row in rows if row != _GONE)
            token_BX = torch.stack([tokens.get(row, spare_X) for row in rows])
            wav_BS, state = tokenizer.step(token_BX.unsqueeze(1), state)
            wavs |= _by_row(rows, wav_BS)
            stepped.append((rows, state))
        return wavs, Voices(_merged(tokenizer, stepped))

    def flush(self, tokenizer: SpeechTokenizer, rows: Sequence[int]) -> tuple[dict[int, Tensor], Voices]:
        """The samples still owed to `rows` [S], and the voices of the others. Who never spoke is owed nothing."""
        owed: dict[int, Tensor] = {}
        ending = self.take(tokenizer, dict(zip(rows, rows, strict=True)))
        for members, state in ending.groups:
            owed |= _by_row(members, tokenizer.flush(state))
        others = {row: row for members, _ in self.groups for row in members if row not in rows}
        return owed, self.take(tokenizer, others)

    def take(self, tokenizer: SpeechTokenizer, numbers: Mapping[int, int]) -> Voices:
        """The voices of some rows (old number -> new number)."""
        groups = []
        for rows, state in self.groups:
            kept = [place for place, row in enumerate(rows) if row in numbers and row != _GONE]
            if len(kept) == len(rows) or (kept and _batch_dims(tokenizer) is None):
                groups.append((tuple(numbers.get(row, _GONE) for row in rows), state))
            elif kept:
                taken = _take_state(_batch_dims(tokenizer), state, torch.tensor(kept, device=tokenizer.device))
                groups.append((tuple(numbers[rows[place]] for place in kept), taken))
        return Voices(tuple(groups))

    def beside(self, other: Voices, offset: int) -> Voices:
        """These voices and those of another batch, whose row 0 becomes row `offset`."""
        moved = ((tuple(r if r == _GONE else r + offset for r in rows), state) for rows, state in other.groups)
        return Voices((*self.groups, *moved))


def _by_row(rows: Iterable[int], wav_BS: Tensor) -> dict[int, Tensor]:
    return {row: wav_S for row, wav_S in zip(rows, wav_BS.cpu(), strict=True) if row != _GONE}


def _merged(tokenizer: SpeechTokenizer, groups: list[tuple[tuple[int, ...], Any]]) -> tuple[Any, ...]:
    """Groups whose states agree become one."""
    if len(groups) < 2 or (dims := _batch_dims(tokenizer)) is None:
        return tuple(groups)
    alike: list[list[tuple[tuple[int, ...], Any]]] = []
    for group in groups:
        for others in alike:
            if _agree(dims, others[0][1], group[1]):
                others.append(group)
                break
        else:
            alike.append([group])
    return tuple(
        (tuple(row for rows, _ in members for row in rows), _join_states(dims, [state for _, state in members]))
        for members in alike
    )


# A tokenizer's state as a tree: per tensor the batch dimension, or _SHARED. Found by looking at states of two sizes.
_SHARED = -1
_DIMS: WeakKeyDictionary[SpeechTokenizer, Any] = WeakKeyDictionary()


def _batch_dims(tokenizer: SpeechTokenizer) -> Any:
    """The tree of this tokenizer's state once sound comes out, or None if something in it is of unknown kind."""
    if tokenizer not in _DIMS:
        token_X = torch.zeros_like(tokenizer.spec.empty_token()).to(tokenizer.device)
        length = 2 + tokenizer.spec.lookahead_samples // tokenizer.spec.samples_per_token  # no layer is still waiting
        two, three = (
            tokenizer.step(token_X.expand(size, length, *token_X.shape), tokenizer.init_state(size))[1]
            for size in (2, 3)
        )
        try:
            _DIMS[tokenizer] = _compare(two, three)
        except TypeError:
            _DIMS[tokenizer] = None
    return _DIMS[tokenizer]


def _children(state: Any) -> list[Any] | None:
    """What a state is made of: fields or items; None of a leaf."""
    if dataclasses.is_dataclass(state):
        return [getattr(state, field.name) for field in dataclasses.fields(state)]
    return list(state) if isinstance(state, tuple | list) else None


def _rebuild(like: Any, children: list[Any]) -> Any:
    kind: Any = type(like)
    return kind(*children) if dataclasses.is_dataclass(like) else kind(children)


def _compare(two: Any, three: Any) -> Any:
    children = _children(two)
    if children is not None:
        others = _children(three)
        assert others is not None
        return [_compare(a, b) for a, b in zip(children, others, strict=True)]
    if isinstance(two, Tensor):
        differing = [dim for dim, sizes in enumerate(zip(two.shape, three.shape, strict=True)) if sizes == (2, 3)]
        return differing[0] if differing else _SHARED
    if two is None or isinstance(two, int | float | str):
        return _SHARED
    raise TypeError(f"a state that holds {type(two).__name__} is neither joined nor taken apart")


def _agree(dims: Any, a: Any, b: Any) -> bool:
    """Whether two states differ in their rows only."""
    if type(a) is not type(b):
        return False
    children, others = _children(a), _children(b)
    if children is not None and others is not None:
        if not isinstance(dims, list) or not len(dims) == len(children) == len(others):
            return False
        return all(_agree(*each) for each in zip(dims, children, others, strict=True))
    if not isinstance(a, Tensor):
        return dims == _SHARED and a == b
    if dims == _SHARED or not isinstance(dims, int):
        return dims == _SHARED and a.shape == b.shape and torch.equal(a, b)
    return a.ndim == b.ndim and all(each == dims or a.shape[each] == b.shape[each] for each in range(a.ndim))


def _join_states(dims: Any, states: list[Any]) -> Any:
    if len(states) == 1:
        return states[0]
    children = _children(states[0])
    if children is not None:
        parts = zip(*(_children(state) or [] for state in states), strict=True)
        return _rebuild(states[0], [_join_states(d, list(each)) for d, each in zip(dims, parts, strict=True)])
    return states[0] if dims == _SHARED else torch.cat(states, dims)


def _take_state(dims: Any, state: Any, index: Tensor) -> Any:
    children = _children(state)
    if children is not None:
        return _rebuild(state, [_take_state(d, child, index) for d, child in zip(dims, children, strict=True)])
    return state if dims == _SHARED or not isinstance(state, Tensor) else state.index_select(dims, index)
