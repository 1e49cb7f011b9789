"""The mathematics of flows, without modules: path and losses, training times, solvers, guidance.

Time runs t = 0 noise to t = 1 data; velocity = data - noise.
"""

from .guidance import guide, guided_velocity
from .path import (
    Velocity,
    data_from_velocity,
    flow_map,
    flow_matching_loss,
    interpolate,
    noise_from_velocity,
    self_distillation_loss,
    target_velocity,
    velocity_distillation_loss,
)
from .solvers import (
    GRID_SOLVERS,
    SOLVERS,
    grid_times,
    solve,
    solve_euler,
    solve_grid,
    solve_map,
    solve_ode,
)
from .times import TIME_SAMPLINGS, sample_time_pairs, sample_times

__all__ = [
    "GRID_SOLVERS",
    "SOLVERS",
    "TIME_SAMPLINGS",
    "Velocity",
    "data_from_velocity",
    "flow_map",
    "flow_matching_loss",
    "grid_times",
    "guide",
    "guided_velocity",
    "interpolate",
    "noise_from_velocity",
    "sample_time_pairs",
    "sample_times",
    "self_distillation_loss",
    "solve",
    "solve_euler",
    "solve_grid",
    "solve_map",
    "solve_ode",
    "target_velocity",
    "velocity_distillation_loss",
]
