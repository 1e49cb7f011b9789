"""Batches of similar length, so that padding stays small, in a seeded order."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

BATCHES_PER_POOL = 16
BATCHES_PER_POOL_OF_TWO = 128  # two lengths to sort by ask for more to choose from
GROUPS_PER_POOL = 8


def length_batches(
    lengths: Sequence[float], batch_size: int, rng: np.random.Generator, seconds: Sequence[float] | None = None
) -> list[list[int]]:
    """Indices of one epoch in batches: shuffled, cut into pools that are sorted by length, batches shuffled again.

    Args:
        lengths: of every example, in any unit.
        batch_size: examples per batch; what does not fill the last batch of a pool is left out this epoch.
        seconds: a second length that is padded apart from the first (of what is heard), or None. Examples that have
            none of it (0) are spread over all batches, so that a batch mixes tasks.
    """
    if not len(lengths):
        raise ValueError("there is nothing to make batches of: the manifest has no example of the kind that trains")
    order = rng.permutation(len(lengths))
    size = min(batch_size, len(order))
    batches = []
    per_pool = size * (BATCHES_PER_POOL if seconds is None else BATCHES_PER_POOL_OF_TWO)
    for start in range(0, len(order), per_pool):
        pool = _sorted(order[start : start + per_pool].tolist(), lengths, seconds, rng)
        batches += [pool[i : i + size] for i in range(0, len(pool) - size + 1, size)]
    return [batches[i] for i in rng.permutation(len(batches))]


def _sorted(
    pool: list[int], lengths: Sequence[float], seconds: Sequence[float] | None, rng: np.random.Generator
) -> list[int]:
    """A pool by length. With a second length: groups alike in that, each sorted by the first, up and down in turn."""
    if seconds is None:
        return sorted(pool, key=lambda i: lengths[i])
    known = [seconds[i] for i in pool if seconds[i] > 0] or [0.0]
    stand_ins = rng.choice(known, size=len(pool))
    keys = {i: seconds[i] or stand_in for i, stand_in in zip(pool, stand_ins, strict=True)}
    pool = sorted(pool, key=lambda i: keys[i])
    bounds = [len(pool) * group // GROUPS_PER_POOL for group in range(GROUPS_PER_POOL + 1)]
    return [
        index
        for group, (first, end) in enumerate(zip(bounds, bounds[1:], strict=False))
        for index in sorted(pool[first:end], key=lambda i: lengths[i], reverse=bool(group % 2))
    ]


def budget_batches(
    lengths: Sequence[int], max_tokens: int, rng: np.random.Generator, seconds: Sequence[float] | None = None
) -> list[list[int]]:
    """Indices of one epoch in batches of at most `max_tokens` positions, padding included: every example once.

    As `length_batches`, but a batch holds as many examples as fit. What does not fill the last batch of a pool joins
    the next pool, so that only the epoch's last batch is small.

    Args:
        lengths: positions of every example.
        max_tokens: largest (number of examples) x (longest example) of a batch.
        seconds: see `length_batches`.

    Raises:
        ValueError: an example alone is longer, or there is none.
    """
    if not len(lengths):
        raise ValueError("there is nothing to make batches of: the manifest has no example of the kind that trains")
    longest = max(lengths)
    if longest > max_tokens:
        raise ValueError(
            f"max_tokens_per_batch is {max_tokens}, and the longest example has {longest} positions: "
            "raise it, or leave long conversations out by max_example_sec"
        )
    order = rng.permutation(len(lengths)).tolist()
    per_pool = max(1, max_tokens * len(lengths) // sum(lengths))
    per_pool *= BATCHES_PER_POOL if seconds is None else BATCHES_PER_POOL_OF_TWO
    batches: list[list[int]] = []
    rest: list[int] = []
    for start in range(0, len(order), per_pool):
        pool, rest = _sorted(rest + order[start : start + per_pool], lengths, seconds, rng), []
        longest = 0
        for index in pool:
            longest = max(longest, lengths[index])
            if (len(rest) + 1) * longest > max_tokens:
                batches.append(rest)
                rest, longest = [], lengths[index]
            rest.append(index)
    batches.append(rest)
    return [batches[i] for i in rng.permutation(len(batches))]


def padding_share(num_real: float, num_slots: float) -> float:
    """Share of positions that hold nothing."""
    return 1.0 - num_real / num_slots if num_slots else 0.0


def spec_augment(features_CF: np.ndarray, rng: np.random.Generator, max_frames: int, max_bins: int) -> np.ndarray:
    """A copy of log-mel features with a span of time and one of frequency at the mean (SpecAugment, arXiv 1904.08779).

    Args:
        max_frames, max_bins: largest width of each span; a time span never covers more than an eighth of the clip.
    """
    features_CF = features_CF.copy()
    fill = features_CF.mean()
    num_bins, num_frames = features_CF.shape
    width = int(rng.integers(0, max_bins + 1))
    start = int(rng.integers(0, max(1, num_bins - width)))
    features_CF[start : start + width] = fill
    width = min(int(rng.integers(0, max_frames + 1)), num_frames // 8)
    start = int(rng.integers(0, max(1, num_frames - width)))
    features_CF[:, start : start + width] = fill
    return features_CF
