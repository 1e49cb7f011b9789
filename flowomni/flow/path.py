"""The straight path from noise to data, and the losses that teach a velocity to follow it.

Time runs t = 0 noise to t = 1 data, and velocity = data - noise. Every velocity here is a callable
`velocity(x_ND, s_N1, t_N1) -> v_ND`: the AVERAGE velocity of the flow map `X_{s,t}(x) = x + (t - s) v(x, s, t)`, which
carries a point of time s to time t. Its diagonal `v(x, t, t)` is the instantaneous velocity of the flow's ODE.

Shapes: N independent rows, D latent dimension, N1 one time per row.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Velocity = Callable[[Tensor, Tensor, Tensor], Tensor]


def interpolate(data_ND: Tensor, noise_ND: Tensor, t_N1: Tensor) -> Tensor:
    """`x_t = t data + (1 - t) noise`, the optimal-transport path of Lipman et al. (arXiv 2210.02747), sigma_min 0."""
    return t_N1 * data_ND + (1 - t_N1) * noise_ND


def target_velocity(data_ND: Tensor, noise_ND: Tensor) -> Tensor:
    """`d x_t / dt = data - noise`, constant along the path."""
    return data_ND - noise_ND


def data_from_velocity(x_ND: Tensor, velocity_ND: Tensor, t_N1: Tensor) -> Tensor:
    """The data end of the straight line through `x_t` with this velocity: `x + (1 - t) v`."""
    return x_ND + (1 - t_N1) * velocity_ND


def noise_from_velocity(x_ND: Tensor, velocity_ND: Tensor, t_N1: Tensor) -> Tensor:
    """The noise end of the straight line through `x_t` with this velocity: `x - t v`."""
    return x_ND - t_N1 * velocity_ND


def flow_map(velocity: Velocity, x_ND: Tensor, s_N1: Tensor, t_N1: Tensor) -> Tensor:
    """One jump of the flow map, `X_{s,t}(x) = x + (t - s) v(x, s, t)`. Its inverse is the jump from t back to s."""
    return x_ND + (t_N1 - s_N1) * velocity(x_ND, s_N1, t_N1)


def flow_matching_loss(velocity: Velocity, data_ND: Tensor, noise_ND: Tensor, t_N1: Tensor) -> Tensor:
    """Conditional flow matching, `loss_N = mean over D of |v(x_t, t, t) - (data - noise)|^2`.

    The minimiser is the mean velocity of all lines through `x_t`: the velocity of an ODE that carries the noise
    distribution to the data distribution.
    """
    x_ND = interpolate(data_ND, noise_ND, t_N1)
    return (velocity(x_ND, t_N1, t_N1) - target_velocity(data_ND, noise_ND)).square().mean(dim=-1)


def velocity_distillation_loss(
    velocity: Velocity, teacher: Velocity, data_ND: Tensor, noise_ND: Tensor, t_N1: Tensor
) -> Tensor:
    """Flow matching to a teacher, `loss_N = mean over D of |v(x_t, t, t) - sg(teacher(x_t, t, t))|^2`.

    Zero exactly when the velocity is the teacher's, guided say (arXiv 2210.03142), wherever the path leads.
    """
    x_ND = interpolate(data_ND, noise_ND, t_N1)
    with torch.no_grad():
        target_ND = teacher(x_ND, t_N1, t_N1)
    return (velocity(x_ND, t_N1, t_N1) - target_ND).square().mean(dim=-1)


def self_distillation_loss(
    velocity: Velocity,
    data_ND: Tensor,
    noise_ND: Tensor,
    s_N1: Tensor,
    t_N1: Tensor,
    teacher: Velocity | None = None,
) -> Tensor:
    """Lagrangian self-distillation, `loss_N = mean over D of |d/dt X_{s,t}(x_s) - sg(v(X_{s,t}(x_s), t, t))|^2`.

    Zero for every s <= t exactly when the jumps follow the ODE of the diagonal velocity, so that one jump from 0 to 1
    samples. Boffi et al., "How to build a consistency model" (arXiv 2505.18825); the target (sg) carries no gradient.
    With a teacher the jumps follow the teacher's diagonal instead (Lagrangian map distillation, arXiv 2406.07507).
    The derivative is forward-mode, and the loss can be differentiated again by `backward`. Not every fused kernel is
    right there: https://github.com/pytorch/pytorch/issues/196700 (layer norm).
    """
    x_ND = interpolate(data_ND, noise_ND, s_N1)
    # Only t moves: x and s are constants of the derivative, so no tangents are spent on them.
    jump = torch.func.jvp(lambda end_N1: velocity(x_ND, s_N1, end_N1), (t_N1,), (torch.ones_like(t_N1),))
    jump_ND, jump_dt_ND = jump[0], jump[1]
    end_ND = x_ND + (t_N1 - s_N1) * jump_ND
    end_dt_ND = jump_ND + (t_N1 - s_N1) * jump_dt_ND
    with torch.no_grad():
        target_ND = (teacher or velocity)(end_ND, t_N1, t_N1)
    return (end_dt_ND - target_ND).square().mean(dim=-1)
