"""Heads of the same size: how many parameters a head has, and the width that gives it as many as another."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..tokenizers.base import TokenSpec
from . import build_head

WIDTH_STEP = 8  # widths are multiples of it, which every number of attention heads up to 8 then divides


def num_head_parameters(values: Mapping[str, Any], spec: TokenSpec, hidden_size: int) -> int:
    """Parameters of the head that `{"kind": .., ..}` describes, tables included; nothing is allocated."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in build_head(values, spec, hidden_size).parameters())


def matching_width(
    values: Mapping[str, Any], spec: TokenSpec, hidden_size: int, num_parameters: int, tolerance: float = 0.1
) -> int:
    """The `width` with which the head comes nearest to `num_parameters`.

    Raises:
        ValueError: no width comes within `tolerance` (a share); names what remains without any width.
    """

    def size(width: int) -> int:
        return num_head_parameters({**values, "width": width}, spec, hidden_size)

    high = WIDTH_STEP
    while size(high) < num_parameters:
        high *= 2
    low = WIDTH_STEP
    while high - low > WIDTH_STEP:  # size(low) < num_parameters <= size(high)
        middle = (low + high) // (2 * WIDTH_STEP) * WIDTH_STEP
        low, high = (middle, high) if size(middle) < num_parameters else (low, middle)
    best = min((low, high), key=lambda width: abs(size(width) - num_parameters))
    if abs(size(best) - num_parameters) > tolerance * num_parameters:
        raise ValueError(
            f"head.width: no width brings the {values.get('kind')!r} head within {tolerance:.0%} of {num_parameters:,} "
            f"parameters (width {best}: {size(best):,}): change code_dim or num_blocks"
        )
    return best
