"""Classifier-free guidance of a velocity (arXiv 2207.12598)."""

from __future__ import annotations

from collections.abc import Callable
from typing import ParamSpec

from torch import Tensor

P = ParamSpec("P")


def guide(conditional: Callable[P, Tensor], unconditional: Callable[P, Tensor], scale: float) -> Callable[P, Tensor]:
    """The velocity `u + scale (c - u)` of the conditional c and the unconditional u, of the same signature as both.

    Scale 1 is the conditional velocity itself, and costs no second pass; 0 is the unconditional one; above 1 the
    condition is exaggerated.
    """
    if scale == 1.0:
        return conditional

    def guided(*args: P.args, **kwargs: P.kwargs) -> Tensor:
        v_unconditional = unconditional(*args, **kwargs)
        return v_unconditional + scale * (conditional(*args, **kwargs) - v_unconditional)

    return guided


def guided_velocity(velocity_BPD: Tensor, scale: float) -> Tensor:
    """The same of both velocities, conditional then unconditional, side by side; a single one is its own."""
    if velocity_BPD.shape[1] == 1:
        return velocity_BPD[:, 0]
    conditional_BD, unconditional_BD = velocity_BPD.unbind(1)
    return unconditional_BD + scale * (conditional_BD - unconditional_BD)
