"""Laws of the cache that appends in place: it holds what transformers' own holds, and no state sees another's future.

Shapes: B batch rows, A attention heads, L positions, W width.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import DynamicCache

from flowomni.cache import fork, growing_cache


def states(seed: int, num: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(2, 3, num, 4, generator=generator) for _ in range(2))  # type: ignore[return-value]


def held(cache: DynamicCache) -> list[Tensor]:
    return [part.clone() for layer in cache.layers for part in (layer.keys, layer.values)]


def test_it_holds_what_the_usual_cache_holds() -> None:
    ours, usual = growing_cache(), DynamicCache()
    for seed, num in enumerate([5, 1, 1, 200, 1, 64]):
        for layer in range(2):
            for mine, theirs in zip(
                ours.update(*states(seed, num), layer), usual.update(*states(seed, num), layer), strict=True
            ):
                assert torch.equal(mine, theirs)
    assert ours.get_seq_length() == usual.get_seq_length() == 272


def test_futures_of_one_state_do_not_see_each_other() -> None:
    """The first to go on appends in place; the second, and one that goes on from a shorter state, do not disturb it."""
    before = growing_cache()
    before.update(*states(0, 3), 0)
    kept = held(before)
    first, second, short = fork(before), fork(before), fork(before)
    short.layers[0].keys, short.layers[0].values = (part[:, :, :2] for part in (before.layers[0].keys, kept[1]))
    first.update(*states(1, 2), 0)
    assert first.layers[0].keys.data_ptr() == before.layers[0].keys.data_ptr(), "it was not appended in place"
    wanted = held(first)
    second.update(*states(2, 2), 0)
    short.update(*states(3, 1), 0)
    for cache, then in ((first, wanted), (before, kept)):
        assert all(torch.equal(a, b) for a, b in zip(held(cache), then, strict=True))
    for number, part in enumerate(held(second)):
        assert torch.equal(part, torch.cat([kept[number], states(2, 2)[number]], 2))
    assert torch.equal(short.layers[0].keys, torch.cat([kept[0][:, :, :2], states(3, 1)[0]], 2))


def test_what_is_learned_from_is_not_overwritten() -> None:
    """Keys with a gradient are copied, as autograd needs it."""
    cache, keys = growing_cache(), states(0, 2)[0].requires_grad_()
    cache.update(keys, keys, 0)
    found, _ = cache.update(keys * 2, keys * 2, 0)
    found.sum().backward()
    assert keys.grad is not None and torch.equal(keys.grad, torch.full_like(keys, 3.0))


def test_states_of_inference_mode_can_be_gone_on_from_outside() -> None:
    cache = growing_cache()
    with torch.inference_mode():
        cache.update(*states(0, 2), 0)
    with torch.no_grad():
        found, _ = cache.update(*states(1, 1), 0)
    assert torch.equal(found, torch.cat([states(0, 2)[0], states(1, 1)[0]], 2))
