"""What the flow head promises beyond the contract of every head (see `tests.test_heads`)."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from flowomni import flow
from flowomni.heads import (
    FlowHead,
    FlowHeadConfig,
    FlowSampling,
)
from flowomni.tokenizers.base import TokenSpec
from tests.test_heads import CASES, DIM, HIDDEN, LATENTS, ROWS, N, hidden, seeded


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"width": 0}, "width is 0"),
        ({"num_draws": 1.5}, "num_draws is 1.5"),
        ({"objective": "gan"}, "objective is 'gan'.*cfm, lsd"),
        ({"time_sampling": "cosine"}, "time_sampling is 'cosine'.*uniform, logit_normal"),
        ({"time_std": 0.0}, "time_std is 0.0"),
        ({"condition_dropout": 1.0}, "condition_dropout is 1.0"),
        ({"distill_fraction": 0.0}, "distill_fraction is 0.0.*'cfm'"),
        ({"feedback_noise": -1.0}, "feedback_noise is -1.0"),
        ({"kind": "codes"}, "kind is 'codes'"),
        ({"built_in_guidance": 0.5}, "built_in_guidance is 0.5"),
        ({"built_in_guidance": 2.0}, "condition_dropout is 0.1 but built_in_guidance is 2.0"),
        (
            {"built_in_guidance": 2.0, "condition_dropout": 0.0, "sampling": {"guidance": 1.5}},
            "sampling.guidance is 1.5 but built_in_guidance is 2.0",
        ),
    ],
)
def test_bad_flow_config_values_are_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FlowHeadConfig(**values)


def flow_head(**values: Any) -> FlowHead:
    head = CASES["flow-lsd"].head(**values)
    assert isinstance(head, FlowHead)
    return head


def test_what_a_flow_head_was_not_trained_for_is_refused() -> None:
    with pytest.raises(ValueError, match="solver is 'map' but head.objective is 'cfm'"):
        flow_head(objective="cfm").sample(hidden(1), FlowSampling(solver="map"), seeded(0))
    with pytest.raises(ValueError, match="guidance is 2.0 but head.condition_dropout is 0"):
        flow_head(condition_dropout=0.0).sample(hidden(1), FlowSampling(guidance=2.0), seeded(0))
    with pytest.raises(ValueError, match="guidance is 2.0 but head.built_in_guidance is 3.0: one pass is guided"):
        guided = flow_head(condition_dropout=0.0, built_in_guidance=3.0)
        guided.sample(hidden(1), FlowSampling(guidance=2.0), seeded(0))


def test_default_sampling_follows_the_objective() -> None:
    assert flow_head(objective="cfm").default_sampling() == FlowSampling(solver="euler", num_steps=16)
    assert flow_head(objective="lsd").default_sampling() == FlowSampling(solver="map", num_steps=1)


def test_velocity_starts_at_zero_and_learns_from_there() -> None:
    """AdaLN-zero: the first loss is the mean square of data - noise."""
    head = FlowHead(FlowHeadConfig(num_draws=500, width=8, num_blocks=1), LATENTS, HIDDEN)
    loss = head.loss(hidden(N), torch.full((N, DIM), 2.0), ROWS, seeded(0))
    assert (loss.sum / loss.count).item() == pytest.approx(4 + 1, rel=0.02)


@pytest.mark.parametrize("objective", ["cfm", "lsd"])
def test_parts_add_up_to_the_loss(objective: str) -> None:
    head = flow_head(objective=objective, num_draws=4)
    loss = head.loss(hidden(N), torch.randn(N, DIM), ROWS, seeded(0))
    bins = ["flow_t0.00", "flow_t0.25", "flow_t0.50", "flow_t0.75"]
    assert list(loss.parts) == bins + ["distillation"] * (objective == "lsd")
    torch.testing.assert_close(sum(total for total, _ in loss.parts.values()), loss.sum.detach() * 4)
    assert sum(count for _, count in loss.parts.values()) == 4 * N
    if objective == "lsd":
        assert loss.parts["distillation"][1] == N, "a quarter of the four draws of each position"


def test_condition_is_dropped_for_whole_rows_and_only_in_training() -> None:
    head = flow_head(objective="cfm", condition_dropout=0.5)
    rows_N = torch.arange(200).repeat_interleave(3)
    hidden_NH = torch.randn(600, HIDDEN, requires_grad=True)

    def seen(head: FlowHead) -> Tensor:
        loss = head.loss(hidden_NH, torch.zeros(600, DIM), rows_N, seeded(0)).sum
        (grad_NH,) = torch.autograd.grad(loss, hidden_NH)
        return (grad_NH != 0).any(dim=-1).view(200, 3)

    by_row = seen(head.train())
    assert torch.equal(by_row.all(dim=1), by_row.any(dim=1)), "all positions of one row are dropped together"
    assert 0.35 < by_row[:, 0].float().mean() < 0.65
    assert bool(seen(head.eval()).all())


def test_null_condition_stays_in_the_graph_without_dropout() -> None:
    head = flow_head(condition_dropout=0.0).train()
    head.loss(hidden(N), torch.zeros(N, DIM), ROWS, seeded(0)).sum.backward()
    assert all(p.grad is not None for name, p in head.named_parameters() if not name.startswith("embedding"))


def test_dropped_rows_train_the_null_condition() -> None:
    head = flow_head(condition_dropout=0.99).train()
    head.loss(hidden(N), torch.zeros(N, DIM), ROWS, seeded(0)).sum.backward()
    assert bool((head.conditioner.null_W.grad != 0).any())


@pytest.mark.parametrize("guidance", [1.0, 0.0, 2.0])
@pytest.mark.parametrize(("solver", "num_steps"), [("euler", 1), ("euler", 5), ("map", 1), ("map", 4), ("midpoint", 3)])
def test_sample_is_the_solver_on_the_guided_velocity(solver: str, num_steps: int, guidance: float) -> None:
    """The fused path (all times' modulation at once) against the plain definition; Euler against torchdiffeq's."""
    head, hidden_BH = flow_head(), hidden(3)
    sampled_BD = head.sample(hidden_BH, FlowSampling(0.64, num_steps, solver, guidance), seeded(0))
    with torch.no_grad():
        noise_BD = 0.8 * torch.randn(3, DIM, generator=seeded(0))
        conditional = head.velocity(head.conditioner(hidden_BH))
        null = head.velocity(head.conditioner(hidden_BH, torch.ones(3, dtype=torch.bool)))
        velocity = flow.guide(conditional, null, guidance)
        solve = flow.solve if solver == "map" else flow.solve_ode
        expected_BD = solve(velocity, noise_BD, solver, num_steps)
    torch.testing.assert_close(sampled_BD, expected_BD, rtol=1e-4, atol=1e-5)


def test_guidance_zero_forgets_the_hidden_state() -> None:
    head = flow_head()
    sampled = [head.sample(h, FlowSampling(guidance=0.0), seeded(0)) for h in (hidden(2), torch.zeros(2, HIDDEN))]
    torch.testing.assert_close(*sampled)


def test_temperature_zero_draws_without_noise() -> None:
    head = flow_head()
    first, other = (head.sample(hidden(2), FlowSampling(temperature=0.0), seeded(seed)) for seed in (0, 1))
    assert torch.equal(first, other)


def test_perturb_adds_noise_to_target_and_more_to_what_is_fed_back() -> None:
    latent_BLD = torch.zeros(64, 50, DIM)
    head = flow_head(target_noise=0.3, feedback_noise=0.8)
    fed_back_BLD, target_BLD = head.perturb(latent_BLD, seeded(0))
    assert target_BLD.std().item() == pytest.approx(0.3, rel=0.02)
    added_B = (fed_back_BLD - target_BLD).std(dim=(1, 2))
    assert added_B.max() < 0.85 and added_B.min() < 0.1 and added_B.mean() == pytest.approx(0.4, abs=0.1)
    for clean in flow_head().perturb(latent_BLD, seeded(0)):
        assert clean is latent_BLD


def test_gradient_of_self_distillation_is_right_through_the_network() -> None:
    """Reverse-mode over forward-mode against finite differences; torch's fused layer norm fails here."""
    head = flow_head().double()
    condition_NA, data_ND = head.conditioner(torch.randn(4, HIDDEN).double()), torch.randn(4, DIM).double()
    noise_ND, s_N1 = torch.randn(4, DIM).double(), torch.full((4, 1), 0.2).double()
    velocity = head.velocity(condition_NA.detach())
    weight = head.net.blocks[0].get_parameter("expand.weight")

    def without_target(x_ND: Tensor, s_N1: Tensor, t_N1: Tensor) -> Tensor:
        """A finite difference would move the target too, so there is none: it alone is asked for s = t."""
        return torch.zeros_like(x_ND) if s_N1 is t_N1 else velocity(x_ND, s_N1, t_N1)

    def loss() -> Tensor:
        return flow.self_distillation_loss(without_target, data_ND, noise_ND, s_N1, s_N1 + 0.5).sum()

    (gradient,) = torch.autograd.grad(loss(), weight)
    step = 1e-5
    for i, j in itertools.product((0, 7), repeat=2):
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                weight[i, j] += sign * step
                values.append(loss().item())
                weight[i, j] -= sign * step
        assert gradient[i, j].item() == pytest.approx((values[0] - values[1]) / (2 * step), rel=1e-5)


def test_a_teacher_that_knows_the_data_teaches_what_the_data_does() -> None:
    """Its velocity is asked for at the points of the ordinary loss, each for its own position."""
    head, target_ND = flow_head(objective="cfm", num_draws=3, condition_dropout=0.0), torch.randn(N, DIM)

    def teacher(index_R: Tensor) -> flow.Velocity:
        return lambda x_RD, s_R1, t_R1: (target_ND[index_R] - x_RD) / (1 - t_R1)

    plain = head.loss(hidden(N), target_ND, ROWS, seeded(0))
    taught = head.loss(hidden(N), target_ND, ROWS, seeded(0), teacher)
    torch.testing.assert_close(taught.sum, plain.sum)
    assert taught.count == N
    guidance, count = taught.parts.pop("guidance")
    torch.testing.assert_close((guidance / 3, count), (plain.sum.detach(), torch.tensor(3.0 * N)))
    torch.testing.assert_close(taught.parts, plain.parts)


@pytest.mark.parametrize("objective", ["cfm", "lsd"])
def test_a_head_that_gives_the_guided_velocity_has_nothing_to_learn(objective: str) -> None:
    """Where the condition only shifts the last layer, guidance is a condition of its own: null + scale (c - null)."""
    teacher, scale = flow_head(objective=objective, num_draws=8), 2.5
    student = flow_head(objective=objective, num_draws=8, condition_dropout=0.0, built_in_guidance=scale)
    with torch.no_grad():
        modulation = teacher.conditioner.modulation
        modulation.weight[: -2 * 16] = 0.0  # all but the last shift and scale
        modulation.weight[-16:] = 0.0
        student.load_state_dict(teacher.state_dict())
        student.conditioner.modulation.weight *= scale
        student.conditioner.modulation.bias[:] = scale * modulation.bias + (1 - scale) * teacher.conditioner.null()[0]
    target_ND = torch.randn(N, DIM)
    for taught, least, most in ((student, 0.0, 1e-9), (teacher, 0.01, 100.0)):
        found = taught.eval().loss(hidden(N), target_ND, ROWS, seeded(0), teacher.guided(hidden(N), scale))
        guidance, count = found.parts["guidance"]
        assert least <= guidance / count <= most
        assert objective == "lsd" or found.sum * 8 == guidance


def draw_mixture(side_N1: Tensor, generator: torch.Generator) -> Tensor:
    """0.3 N(-1.5, 0.2^2) + 0.7 N(0.7, 0.4^2), mirrored where side is -1."""
    narrow_N1 = torch.rand(side_N1.shape, generator=generator) < 0.3
    z_N1 = torch.randn(side_N1.shape, generator=generator)
    return side_N1 * torch.where(narrow_N1, 0.2 * z_N1 - 1.5, 0.4 * z_N1 + 0.7)


@pytest.mark.parametrize("objective", ["cfm", "lsd"])
def test_a_tiny_head_recovers_a_mixture(objective: str) -> None:
    """Both modes with their weights, for either condition; the sampler is the objective's own (lsd: one jump)."""
    torch.manual_seed(0)
    generator, num_rows, num_updates = seeded(0), 128, 200
    config = FlowHeadConfig(width=32, num_blocks=2, objective=objective)
    head = FlowHead(config, TokenSpec("continuous", 1, 0, 0, 24_000, 2_048, 0), hidden_size=1)
    optimizer = torch.optim.Adam(head.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 8e-3, total_steps=num_updates, pct_start=0.1)
    for _ in range(num_updates):
        side_N1 = 1 - 2 * torch.randint(2, (num_rows, 1), generator=generator).float()
        loss = head.loss(side_N1, draw_mixture(side_N1, generator), torch.arange(num_rows), generator)
        optimizer.zero_grad()
        (loss.sum / loss.count).backward()
        optimizer.step()
        schedule.step()
    for side in (1.0, -1.0):
        side_N1 = torch.full((4_000, 1), side)
        sampled_N = side * head.sample(side_N1, head.default_sampling(), generator).flatten()
        true_N = side * draw_mixture(side_N1, generator).flatten()
        assert (sampled_N < -0.7).float().mean().item() == pytest.approx(0.3, abs=0.1)
        wasserstein = (sampled_N.sort().values - true_N.sort().values).abs().mean()
        assert wasserstein < 0.2, "between this and the noise the head starts from it is 0.5"
