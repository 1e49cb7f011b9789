"""From noise (t = 0) to data (t = 1) along a velocity: ODE solvers and flow-map jumps.

    euler      order 1, one evaluation of the diagonal velocity a step
    midpoint   order 2, two evaluations a step
    dopri5     order 5, adaptive: `num_steps` has no effect
    map        jumps of the flow map between equal times; one jump is one-step sampling

Euler and map are *grid* solvers: they evaluate the velocity at times that are known beforehand, one evaluation a step,
so that a caller can prepare everything that depends on time alone (`grid_times`, `solve_grid`).

Shapes: N rows, D latent dimension, N1 one time per row, K steps.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torchdiffeq import odeint

from .path import Velocity

SOLVERS = ("euler", "midpoint", "dopri5", "map")
GRID_SOLVERS = ("euler", "map")
ODE_SOLVERS = ("euler", "midpoint", "dopri5")
ADAPTIVE_TOLERANCE = 1e-5

GridVelocity = Callable[[Tensor, int], Tensor]


def grid_times(method: str, num_steps: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """The times `s_K, t_K` at which step k of a grid solver evaluates the velocity, in the dtype and device of `like`.

    Euler takes the diagonal at the start of each step, map the jump over the step.
    """
    assert method in GRID_SOLVERS, method
    times = torch.linspace(0, 1, num_steps + 1, dtype=like.dtype, device=like.device)
    return times[:-1], times[:-1] if method == "euler" else times[1:]


def solve_grid(velocity_at: GridVelocity, noise_ND: Tensor, num_steps: int) -> Tensor:
    """`x <- x + dt velocity_at(x, k)` for k = 0 .. num_steps - 1, on equal steps from t = 0 to t = 1."""
    times = torch.linspace(0, 1, num_steps + 1, dtype=noise_ND.dtype, device=noise_ND.device)
    x_ND = noise_ND
    for k, dt in enumerate(times.diff()):
        x_ND = x_ND + dt * velocity_at(x_ND, k)
    return x_ND


def solve_euler(velocity: Velocity, noise_ND: Tensor, num_steps: int) -> Tensor:
    """Euler on equal steps, equal to `solve_ode(velocity, noise_ND, "euler", num_steps)` without its bookkeeping."""
    return _solve_on_grid(velocity, noise_ND, "euler", num_steps)


def solve_map(velocity: Velocity, noise_ND: Tensor, num_steps: int) -> Tensor:
    """`num_steps` jumps of the flow map over equal times; exact for the true map, whatever their number."""
    return _solve_on_grid(velocity, noise_ND, "map", num_steps)


def solve_ode(velocity: Velocity, noise_ND: Tensor, method: str, num_steps: int) -> Tensor:
    """Integrate the diagonal velocity with torchdiffeq, on `num_steps` equal steps, or adaptively for dopri5.

    An adaptive solver chooses its steps from all rows together; a caller whose rows must not know of each other solves
    them one at a time.
    """
    if method not in ODE_SOLVERS:
        raise ValueError(f"solver is {method!r}; an ODE solver is one of {', '.join(ODE_SOLVERS)}")

    def derivative(time: Tensor, x_ND: Tensor) -> Tensor:
        t_N1 = time.to(x_ND.dtype).expand(x_ND.shape[0], 1)
        return velocity(x_ND, t_N1, t_N1)

    num_times = 2 if method == "dopri5" else num_steps + 1
    times = torch.linspace(0, 1, num_times, dtype=noise_ND.dtype, device=noise_ND.device)
    return odeint(derivative, noise_ND, times, method=method, rtol=ADAPTIVE_TOLERANCE, atol=ADAPTIVE_TOLERANCE)[-1]


def solve(velocity: Velocity, noise_ND: Tensor, method: str, num_steps: int) -> Tensor:
    """Data `x_ND` from noise by any of `SOLVERS`; Euler takes the fused loop."""
    if method not in SOLVERS:
        raise ValueError(f"solver is {method!r}; it must be one of {', '.join(SOLVERS)}")
    if method in GRID_SOLVERS:
        return _solve_on_grid(velocity, noise_ND, method, num_steps)
    return solve_ode(velocity, noise_ND, method, num_steps)


def _solve_on_grid(velocity: Velocity, noise_ND: Tensor, method: str, num_steps: int) -> Tensor:
    s_K, t_K = grid_times(method, num_steps, noise_ND)
    num_rows = noise_ND.shape[0]
    return solve_grid(
        lambda x_ND, k: velocity(x_ND, s_K[k].expand(num_rows, 1), t_K[k].expand(num_rows, 1)), noise_ND, num_steps
    )
