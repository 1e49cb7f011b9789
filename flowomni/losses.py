"""Losses are sums with counts; whoever trains divides once, by the global count."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Loss:
    """A summed loss and the number of targets in it (both scalars)."""

    sum: Tensor
    count: Tensor
