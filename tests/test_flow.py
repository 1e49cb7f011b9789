"""The laws of `flowomni.flow`, checked against a flow that is known in closed form.

Noise N(0, 1) and data N(MEAN, STD^2), independent: x_t is Gaussian with mean m_t = t MEAN and standard deviation
c_t = sqrt(t^2 STD^2 + (1 - t)^2), so the flow map is X_{s,t}(x) = m_t + (c_t / c_s) (x - m_s).

Shapes: N rows, D latent dimension, N1 one time per row.
"""

import itertools
import math

import pytest
import torch
from torch import Tensor

from flowomni import flow

MEAN, STD, N, D = 1.5, 0.3, 64, 3


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(7)


def normal(generator: torch.Generator) -> Tensor:
    return torch.randn(N, D, generator=generator, dtype=torch.float64)


def uniform(generator: torch.Generator) -> Tensor:
    return torch.rand(N, 1, generator=generator, dtype=torch.float64)


def spread(t: Tensor) -> Tensor:
    return (t**2 * STD**2 + (1 - t) ** 2).sqrt()


def exact_map(x_ND: Tensor, s_N1: Tensor, t_N1: Tensor) -> Tensor:
    return t_N1 * MEAN + spread(t_N1) / spread(s_N1) * (x_ND - s_N1 * MEAN)


def exact_velocity(x_ND: Tensor, s_N1: Tensor, t_N1: Tensor) -> Tensor:
    """Average velocity of the exact map; on the diagonal, its limit."""
    spread_dt = (t_N1 * STD**2 - (1 - t_N1)) / spread(t_N1)
    diagonal_ND = MEAN + spread_dt / spread(t_N1) * (x_ND - t_N1 * MEAN)
    apart = t_N1 > s_N1
    span_N1 = torch.where(apart, t_N1 - s_N1, 1.0)
    return torch.where(apart, (exact_map(x_ND, s_N1, t_N1) - x_ND) / span_N1, diagonal_ND)


def error_of(method: str, num_steps: int) -> float:
    """Largest error on dx/dt = exp(-x), whose solution is log(exp(x_0) + t).

    Not on the Gaussian flow above: it is symmetric in time in a way that lifts midpoint to order 3.
    """
    noise_ND = normal(torch.Generator().manual_seed(3))
    x_ND = flow.solve(lambda x, s, t: torch.exp(-x), noise_ND, method, num_steps)
    return (x_ND - torch.log(torch.exp(noise_ND) + 1)).abs().max().item()


def test_time_runs_from_noise_to_data(generator: torch.Generator) -> None:
    data_ND, noise_ND = normal(generator), normal(generator)
    assert torch.equal(flow.interpolate(data_ND, noise_ND, torch.zeros(N, 1)), noise_ND)
    assert torch.equal(flow.interpolate(data_ND, noise_ND, torch.ones(N, 1)), data_ND)
    assert torch.equal(flow.target_velocity(data_ND, noise_ND), data_ND - noise_ND)


def test_every_solver_walks_from_noise_to_data(generator: torch.Generator) -> None:
    """A constant velocity data - noise ends at the data, for every solver; backwards it would end at 2 noise - data."""
    data_ND, noise_ND = normal(generator), normal(generator)
    for method in flow.SOLVERS:
        x_ND = flow.solve(lambda x, s, t: data_ND - noise_ND, noise_ND, method, 5)
        torch.testing.assert_close(x_ND, data_ND, rtol=0, atol=1e-12)


def test_velocity_is_the_derivative_of_the_path(generator: torch.Generator) -> None:
    data_ND, noise_ND, t_N1, step = normal(generator), normal(generator), uniform(generator), 1e-4
    ahead, behind = (flow.interpolate(data_ND, noise_ND, t_N1 + sign * step) for sign in (1, -1))
    torch.testing.assert_close((ahead - behind) / (2 * step), flow.target_velocity(data_ND, noise_ND))


def test_round_trips_in_float64(generator: torch.Generator) -> None:
    data_ND, noise_ND, t_N1 = normal(generator), normal(generator), uniform(generator)
    x_ND, v_ND = flow.interpolate(data_ND, noise_ND, t_N1), flow.target_velocity(data_ND, noise_ND)
    torch.testing.assert_close(flow.data_from_velocity(x_ND, v_ND, t_N1), data_ND, rtol=0, atol=1e-14)
    torch.testing.assert_close(flow.noise_from_velocity(x_ND, v_ND, t_N1), noise_ND, rtol=0, atol=1e-14)


def test_flow_maps_compose_and_begin_as_the_identity(generator: torch.Generator) -> None:
    x_ND, r_N1, s_N1, t_N1 = normal(generator), *torch.rand(3, N, 1, generator=generator).double().sort(dim=0).values
    assert torch.equal(flow.flow_map(exact_velocity, x_ND, s_N1, s_N1), x_ND)
    middle_ND = flow.flow_map(exact_velocity, x_ND, r_N1, s_N1)
    through_ND = flow.flow_map(exact_velocity, middle_ND, s_N1, t_N1)
    torch.testing.assert_close(through_ND, flow.flow_map(exact_velocity, x_ND, r_N1, t_N1), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("method", "order"), [("euler", 1), ("midpoint", 2)])
def test_measured_order_is_the_declared_order(method: str, order: int) -> None:
    errors = [error_of(method, num_steps) for num_steps in (64, 128, 256)]
    measured = [math.log2(coarse / fine) for coarse, fine in itertools.pairwise(errors)]
    assert measured == pytest.approx([order] * 2, abs=0.15)


def test_dopri5_is_accurate_whatever_the_number_of_steps() -> None:
    assert error_of("dopri5", 1) < 1e-3
    assert error_of("dopri5", 1) == error_of("dopri5", 100)


@pytest.mark.parametrize(("method", "num_steps", "tolerance"), [("euler", 500, 0.01), ("dopri5", 1, 0.001)])
def test_ode_solvers_carry_noise_to_the_data_distribution(method: str, num_steps: int, tolerance: float) -> None:
    noise_ND = normal(torch.Generator().manual_seed(3))
    x_ND = flow.solve(exact_velocity, noise_ND, method, num_steps)
    torch.testing.assert_close(x_ND, MEAN + STD * noise_ND, rtol=0, atol=tolerance)


@pytest.mark.parametrize("num_steps", [1, 2, 7])
def test_flow_map_is_exact_in_any_number_of_jumps(num_steps: int) -> None:
    noise_ND = normal(torch.Generator().manual_seed(3))
    x_ND = flow.solve_map(exact_velocity, noise_ND, num_steps)
    torch.testing.assert_close(x_ND, MEAN + STD * noise_ND, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("num_steps", [1, 3, 16])
def test_fused_euler_is_torchdiffeqs_euler(num_steps: int, dtype: torch.dtype, generator: torch.Generator) -> None:
    noise_ND = normal(generator).to(dtype)
    fused_ND = flow.solve_euler(exact_velocity, noise_ND, num_steps)
    assert torch.equal(fused_ND, flow.solve_ode(exact_velocity, noise_ND, "euler", num_steps))
    assert torch.equal(fused_ND, flow.solve(exact_velocity, noise_ND, "euler", num_steps))


@pytest.mark.parametrize("solve", [flow.solve, flow.solve_ode])
def test_unknown_solver_is_named(solve: object) -> None:
    with pytest.raises(ValueError, match=r"solver is 'heun'.*euler, midpoint, dopri5"):
        solve(exact_velocity, torch.zeros(1, D), "heun", 4)  # type: ignore[operator]


def test_loss_of_the_true_velocity_is_zero(generator: torch.Generator) -> None:
    """With one data point, the velocity towards it is known everywhere: v = (data - x) / (1 - t)."""
    point_D, noise_ND = normal(generator)[0], normal(generator)
    t_N1 = 0.95 * uniform(generator)

    def true_velocity(x_ND: Tensor, s_N1: Tensor, t_N1: Tensor) -> Tensor:
        return (point_D - x_ND) / (1 - t_N1)

    data_ND = point_D.expand(N, D)
    assert flow.flow_matching_loss(true_velocity, data_ND, noise_ND, t_N1).max() < 1e-24
    reversed_loss_N = flow.flow_matching_loss(lambda x, s, t: -true_velocity(x, s, t), data_ND, noise_ND, t_N1)
    assert reversed_loss_N.min() > 0.01


def test_flow_matching_is_least_at_the_true_velocity(generator: torch.Generator) -> None:
    """The mean loss of the marginal velocity is the variance of data - noise given x_t; any tilt adds its square."""
    noise_ND = torch.randn(100_000, 1, generator=generator, dtype=torch.float64)
    data_ND = MEAN + STD * torch.randn(100_000, 1, generator=generator, dtype=torch.float64)
    t_N1 = torch.rand(100_000, 1, generator=generator, dtype=torch.float64)
    true_loss = flow.flow_matching_loss(exact_velocity, data_ND, noise_ND, t_N1).mean()
    expected = (STD**2 / spread(t_N1) ** 2).mean()
    torch.testing.assert_close(true_loss, expected, rtol=0.02, atol=0)
    tilted_loss = flow.flow_matching_loss(lambda x, s, t: exact_velocity(x, s, t) + 0.5, data_ND, noise_ND, t_N1).mean()
    torch.testing.assert_close(tilted_loss - true_loss, torch.tensor(0.25, dtype=torch.float64), rtol=0.05, atol=0)


def test_self_distillation_loss_of_the_true_flow_map_is_zero(generator: torch.Generator) -> None:
    data_ND, noise_ND = normal(generator), normal(generator)
    s_N1, t_N1 = (time.double() for time in flow.sample_time_pairs(N, generator=generator))
    assert flow.self_distillation_loss(exact_velocity, data_ND, noise_ND, s_N1, t_N1).max() < 1e-20

    def diagonal_only(x_ND: Tensor, s_N1: Tensor, t_N1: Tensor) -> Tensor:
        return exact_velocity(x_ND, s_N1, s_N1)

    loss_N = flow.self_distillation_loss(diagonal_only, data_ND, noise_ND, s_N1, t_N1)
    assert loss_N.mean() > 0.01, "jumps along the first tangent are not the flow map"


def test_self_distillation_target_carries_no_gradient(generator: torch.Generator) -> None:
    """For v = theta + phi t: X' = theta + phi (2 t - s), and the target theta + phi t is held fixed."""
    theta, phi = (torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in (0.7, -0.4))
    s_N1, t_N1 = (time.double() for time in flow.sample_time_pairs(N, generator=generator))
    loss_N = flow.self_distillation_loss(
        lambda x, s, t: (theta + phi * t).expand_as(x), normal(generator), normal(generator), s_N1, t_N1
    )
    gap_N1 = phi.detach() * (t_N1 - s_N1)
    torch.testing.assert_close(loss_N, gap_N1.square().squeeze(1))
    loss_N.sum().backward()
    torch.testing.assert_close(theta.grad, (2 * gap_N1).sum())
    torch.testing.assert_close(phi.grad, (2 * gap_N1 * (2 * t_N1 - s_N1)).sum())


def test_distillation_is_least_at_the_teacher_and_its_flow_map(generator: torch.Generator) -> None:
    """Of a teacher that leads elsewhere than the data; it gets no gradient."""
    data_ND, noise_ND, t_N1 = normal(generator) + 7, normal(generator), uniform(generator)
    scale = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)

    def teacher(x_ND: Tensor, s_N1: Tensor, t_N1: Tensor) -> Tensor:
        return scale * exact_velocity(x_ND, s_N1, t_N1)

    loss_N = flow.velocity_distillation_loss(exact_velocity, teacher, data_ND, noise_ND, t_N1)
    assert loss_N.max() == 0 and not loss_N.requires_grad
    assert flow.flow_matching_loss(exact_velocity, data_ND, noise_ND, t_N1).mean() > 1
    shifted_N = flow.velocity_distillation_loss(lambda *at: teacher(*at) + 0.5, teacher, data_ND, noise_ND, t_N1)
    torch.testing.assert_close(shifted_N.detach(), torch.full((N,), 0.25, dtype=torch.float64))

    s_N1, t_N1 = (time.double() for time in flow.sample_time_pairs(N, generator=generator))
    points = data_ND, noise_ND, s_N1, t_N1
    assert flow.self_distillation_loss(exact_velocity, *points, teacher).max() < 1e-20
    assert flow.self_distillation_loss(exact_velocity, *points, lambda *at: -teacher(*at)).mean() > 1


def test_guidance(generator: torch.Generator) -> None:
    x_ND, t_N1 = normal(generator), uniform(generator)

    def unconditional(x_ND: Tensor, s_N1: Tensor, t_N1: Tensor) -> Tensor:
        return -x_ND

    assert flow.guide(exact_velocity, unconditional, 1.0) is exact_velocity, "scale 1 costs no second pass"
    conditional_ND = exact_velocity(x_ND, t_N1, t_N1)
    for scale, expected_ND in [(0.0, -x_ND), (2.0, 2 * conditional_ND + x_ND), (1.0, conditional_ND)]:
        guided_ND = flow.guide(exact_velocity, unconditional, scale)(x_ND, t_N1, t_N1)
        torch.testing.assert_close(guided_ND, expected_ND, rtol=0, atol=1e-12)


def test_times_follow_their_distribution(generator: torch.Generator) -> None:
    uniform_N1 = flow.sample_times(20_000, "uniform", generator=generator)
    assert uniform_N1.shape == (20_000, 1) and uniform_N1.dtype == torch.float32
    assert uniform_N1.mean() == pytest.approx(0.5, abs=0.01) and uniform_N1.var() == pytest.approx(1 / 12, abs=0.003)
    logit_N1 = flow.sample_times(20_000, "logit_normal", mean=0.4, std=0.8, generator=generator).logit()
    assert logit_N1.mean() == pytest.approx(0.4, abs=0.02) and logit_N1.std() == pytest.approx(0.8, abs=0.02)
    with pytest.raises(ValueError, match=r"time_sampling is 'cosine'.*uniform, logit_normal"):
        flow.sample_times(3, "cosine")


def test_time_pairs_are_in_order_and_cover_the_jump_from_noise(generator: torch.Generator) -> None:
    s_N1, t_N1 = flow.sample_time_pairs(20_000, from_noise=0.25, generator=generator)
    assert bool((s_N1 <= t_N1).all()) and s_N1.min() >= 0 and t_N1.max() <= 1
    from_noise_N1 = s_N1 == 0
    assert from_noise_N1.float().mean() == pytest.approx(0.25, abs=0.015)
    assert t_N1[from_noise_N1].mean() == pytest.approx(1 / 2, abs=0.02)
    assert s_N1[~from_noise_N1].mean() == pytest.approx(1 / 3, abs=0.01)
    assert t_N1[~from_noise_N1].mean() == pytest.approx(2 / 3, abs=0.01)


def test_times_are_a_function_of_the_generator() -> None:
    first, again = (flow.sample_times(5, "logit_normal", generator=torch.Generator().manual_seed(1)) for _ in range(2))
    assert torch.equal(first, again)
