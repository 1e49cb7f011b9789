"""Batches of similar length, so that padding stays small, in a seeded order."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

BATCHES_PER_POOL = 16


def length_batches(lengths: Sequence[float], batch_size: int, rng: np.random.Generator) -> list[list[int]]:
    """Indices of one epoch in batches: shuffled, cut into pools that are sorted by length, batches shuffled again.

    Args:
        lengths: of every example, in any unit.
        batch_size: examples per batch; what does not fill the last batch of a pool is left out this epoch.
    """
    if not len(lengths):
        raise ValueError("there is nothing to make batches of: the manifest has no example of the kind that trains")
    order = rng.permutation(len(lengths))
    size = min(batch_size, len(order))
    batches = []
    for start in range(0, len(order), size * BATCHES_PER_POOL):
        pool = sorted(order[start : start + size * BATCHES_PER_POOL].tolist(), key=lambda i: lengths[i])
        batches += [pool[i : i + size] for i in range(0, len(pool) - size + 1, size)]
    return [batches[i] for i in rng.permutation(len(batches))]


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
