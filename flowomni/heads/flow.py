"""The flow head: a continuous speech token drawn by a small velocity network conditioned on the hidden state.

A residual MLP with adaptive layer norm (AdaLN-zero; MAR, arXiv 2406.11838) on single latents: no attention, so a step
costs the same wherever it stands. Time runs t = 0 noise to t = 1 data; velocity = data - noise.

Shapes: B rows, L steps, N flattened valid positions, R draws (N positions times `num_draws`), D latent dimension,
H hidden width, W network width, A modulation width (shift, scale and gate of all blocks), T flow-time bins,
K solver steps, P passes a step (2 with guidance).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..flow import (
    GRID_SOLVERS,
    SOLVERS,
    TIME_SAMPLINGS,
    Velocity,
    flow_matching_loss,
    grid_times,
    guide,
    guided_velocity,
    sample_time_pairs,
    sample_times,
    self_distillation_loss,
    solve_ode,
    velocity_distillation_loss,
)
from ..strict import strict
from ..tokenizers.base import TokenSpec
from .base import Generators, HeadLoss, draw_noise, dropped_rows
from .latent import LatentHead
from .layers import Linear, layer_norm

OBJECTIVES = ("cfm", "lsd")
NUM_TIME_BINS = 4
NUM_TIME_FREQUENCIES = 32
TIME_WIDTH = 64
AnyVelocity = TypeVar("AnyVelocity", bound=Callable[..., Tensor])
Teacher = Callable[[Tensor], Velocity]  # the velocity to teach at the positions with these indices


@dataclass(frozen=True)
class FlowSampling:
    """How to draw a latent.

    Attributes:
        temperature: the noise is scaled by its square root; 0 draws without noise, 1 as trained.
        num_steps: solver steps (no effect on dopri5, which adapts them).
        solver: one of `flowomni.flow.SOLVERS`; "map" needs a head trained with objective "lsd".
        guidance: scale of classifier-free guidance; 1 is none, and saves the second pass. A head with guidance built in
            takes 1 alone.
    """

    temperature: float = 1.0
    num_steps: int = 16
    solver: str = "euler"
    guidance: float = 1.0

    def __post_init__(self) -> None:
        if not (self.temperature >= 0 and math.isfinite(self.temperature)):
            raise ValueError(f"temperature is {self.temperature}; it must be a number of at least 0")
        if isinstance(self.num_steps, bool) or not isinstance(self.num_steps, int) or self.num_steps < 1:
            raise ValueError(f"num_steps is {self.num_steps!r}; it must be a whole number of at least 1")
        if self.solver not in SOLVERS:
            raise ValueError(f"solver is {self.solver!r}; it must be one of {', '.join(SOLVERS)}")
        if not (self.guidance >= 0 and math.isfinite(self.guidance)):
            raise ValueError(f"guidance is {self.guidance}; it must be a number of at least 0 (1 means none)")


@dataclass(frozen=True)
class FlowHeadConfig:
    """Size and objective of a flow head.

    Attributes:
        width, num_blocks: of the velocity network (published optima: 1024 x 3 on mel, 512 x 6 on 32-d latents).
        objective: "cfm", conditional flow matching, sampled by an ODE solver; "lsd", the same plus Lagrangian
            self-distillation on `distill_fraction` of the draws, which also samples in one jump (solver "map").
        num_draws: noise draws per hidden state; the network is cheap beside the language model.
        time_sampling, time_mean, time_std: distribution of the flow times, see `flowomni.flow.sample_times`; the jumps
            that are distilled have their own, `flowomni.flow.sample_time_pairs`.
        condition_dropout: share of batch rows trained without their hidden state, for guidance.
        built_in_guidance: scale of the guidance that this head gives in one pass, by itself, because it was distilled
            into it (stage `speech`, `distill_guidance`); 1 is none. Such a head has no null condition to guide by.
            Further training on data alone unlearns the guidance.
        distill_fraction: see objective.
        feedback_noise: largest std of the noise on the latents that are fed back in training (uniform per row).
        target_noise: std of the noise on the latents in training, as if sampled from a sigma-VAE of that width.
        sampling: a trained head's best `FlowSampling`, kept with it; None takes what suits the objective.
    """

    kind: str = "flow"
    width: int = 256
    num_blocks: int = 4
    objective: str = "cfm"
    num_draws: int = 4
    time_sampling: str = "logit_normal"
    time_mean: float = 0.0
    time_std: float = 1.0
    condition_dropout: float = 0.1
    built_in_guidance: float = 1.0
    distill_fraction: float = 0.25
    feedback_noise: float = 0.0
    target_noise: float = 0.0
    sampling: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.kind != "flow":
            raise ValueError(f"kind is {self.kind!r}; a flow head's kind is 'flow'")
        for name in ("width", "num_blocks", "num_draws"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} is {value!r}; it must be a whole number of at least 1")
        if self.objective not in OBJECTIVES:
            raise ValueError(f"objective is {self.objective!r}; it must be one of {', '.join(OBJECTIVES)}")
        if self.time_sampling not in TIME_SAMPLINGS:
            raise ValueError(f"time_sampling is {self.time_sampling!r}; it must be one of {', '.join(TIME_SAMPLINGS)}")
        if not math.isfinite(self.time_mean):
            raise ValueError(f"time_mean is {self.time_mean}; it must be a finite number")
        if not (self.time_std > 0 and math.isfinite(self.time_std)):
            raise ValueError(f"time_std is {self.time_std}; it must be above 0")
        if not 0 <= self.condition_dropout < 1:
            raise ValueError(f"condition_dropout is {self.condition_dropout}; it must be in [0, 1)")
        if not 0 < self.distill_fraction < 1:
            raise ValueError(
                f"distill_fraction is {self.distill_fraction}; it must be between 0 and 1 (for none, objective 'cfm')"
            )
        sampling = strict(FlowSampling, self.sampling, "sampling")
        if self.built_in_guidance != 1.0:
            self._check_built_in(sampling)
        for name in ("feedback_noise", "target_noise"):
            value = getattr(self, name)
            if not (value >= 0 and math.isfinite(value)):
                raise ValueError(f"{name} is {value}; it must be a number of at least 0")

    def _check_built_in(self, sampling: FlowSampling) -> None:
        if not (self.built_in_guidance > 1 and math.isfinite(self.built_in_guidance)):
            raise ValueError(f"built_in_guidance is {self.built_in_guidance}; it must be above 1, or 1 for none")
        for name, value, wanted in (
            ("condition_dropout", self.condition_dropout, 0),
            ("sampling.guidance", sampling.guidance, 1),
        ):
            if value != wanted:
                raise ValueError(
                    f"{name} is {value} but built_in_guidance is {self.built_in_guidance}: a head with guidance built "
                    f"in has no null condition; set {name} to {wanted}"
                )

    @property
    def no_guidance_because(self) -> str:
        """Why this head cannot be guided; empty if it can."""
        if self.built_in_guidance != 1.0:
            return (
                f"head.built_in_guidance is {self.built_in_guidance}: one pass is guided already, and there is no null "
                "condition to guide by any more"
            )
        if self.condition_dropout == 0:
            return "head.condition_dropout is 0, so the head never learned to go without its condition"
        return ""


def _zeroed(layer: Linear) -> Linear:
    """AdaLN-zero: every block starts as the identity, and the velocity at zero."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


class Conditioner(nn.Module):
    """Hidden state -> its share of the modulation; a learned null condition stands for "no hidden state"."""

    def __init__(self, hidden_size: int, width: int, modulation_width: int):
        super().__init__()
        self.project = Linear(hidden_size, width)
        self.null_W = nn.Parameter(0.02 * torch.randn(width))
        self.modulation = _zeroed(Linear(width, modulation_width))

    def forward(self, hidden_NH: Tensor, dropped_N: Tensor | None = None) -> Tensor:
        """Modulation `[N, A]`; positions where `dropped_N` is True get the null condition's."""
        condition_NW = self.project(hidden_NH)
        if dropped_N is not None:
            condition_NW = torch.where(dropped_N[:, None], self.null_W.to(condition_NW.dtype), condition_NW)
        return self.modulation(F.silu(condition_NW))

    def null(self) -> Tensor:
        """Modulation `[1, A]` of the null condition, float32."""
        return self.modulation(F.silu(self.null_W.float()[None]))


class TimeConditioner(nn.Module):
    """Flow times `s_N1, t_N1` -> their share of the modulation, from sines of 1/4 to 8 cycles over the flow.

    No faster sines: the self-distillation loss differentiates the network in time, and they would drown the rest.
    """

    cycles: Tensor

    def __init__(self, modulation_width: int):
        super().__init__()
        # Persistent: a model that is built on the meta device gets it back from the checkpoint.
        self.register_buffer("cycles", torch.logspace(-2, 3, NUM_TIME_FREQUENCIES, base=2.0))
        self.expand = Linear(4 * NUM_TIME_FREQUENCIES, TIME_WIDTH)
        self.project = Linear(TIME_WIDTH, TIME_WIDTH)
        self.modulation = _zeroed(Linear(TIME_WIDTH, modulation_width))

    def forward(self, s_N1: Tensor, t_N1: Tensor) -> Tensor:
        """Modulation `[N, A]`."""
        angles = [2 * math.pi * self.cycles.to(time.dtype) * time for time in (s_N1, t_N1)]
        waves = torch.cat([wave for angle in angles for wave in (angle.cos(), angle.sin())], dim=-1)
        return self.modulation(F.silu(self.project(F.silu(self.expand(waves)))))


class Block(nn.Module):
    """Residual MLP, modulated by shift, scale and gate."""

    def __init__(self, width: int):
        super().__init__()
        self.expand = Linear(width, width)
        self.project = Linear(width, width)

    def forward(self, x_NW: Tensor, shift_NW: Tensor, scale_NW: Tensor, gate_NW: Tensor) -> Tensor:
        modulated_NW = layer_norm(x_NW) * (1 + scale_NW) + shift_NW
        return x_NW + gate_NW * self.project(F.silu(self.expand(modulated_NW)))


class VelocityNet(nn.Module):
    """`v(x | modulation)`, where the modulation is the sum of the condition's share and the times' share.

    Being a sum, the condition's share is computed once for all noise draws of a position and for all steps of a solver,
    and the times' share once for all rows: beside that, only these blocks run per draw and per step.
    """

    def __init__(self, dim: int, width: int, num_blocks: int):
        super().__init__()
        self.project_in = Linear(dim, width)
        self.blocks = nn.ModuleList([Block(width) for _ in range(num_blocks)])
        self.project_out = _zeroed(Linear(width, dim))

    def forward(self, x_ND: Tensor, modulation_NA: Tensor) -> Tensor:
        *per_block, last_shift_NW, last_scale_NW = modulation_NA.split(self.project_in.out_features, dim=-1)
        x_NW = self.project_in(x_ND)
        for i, block in enumerate(self.blocks):
            x_NW = block(x_NW, *per_block[3 * i : 3 * i + 3])
        return self.project_out(layer_norm(x_NW) * (1 + last_scale_NW) + last_shift_NW)


class FlowHead(LatentHead):
    """Embed, teach and draw latents with flow matching; see `LatentHead` for the arguments."""

    Config = FlowHeadConfig
    Sampling = FlowSampling
    compilable = ("modulations", "jump")

    def __init__(self, config: FlowHeadConfig, spec: TokenSpec, hidden_size: int):
        super().__init__(config, spec, hidden_size)
        self.dim = spec.dim
        modulation_width = (3 * config.num_blocks + 2) * config.width
        self.conditioner = Conditioner(hidden_size, config.width, modulation_width)
        self.time_conditioner = TimeConditioner(modulation_width)
        self.net = VelocityNet(spec.dim, config.width, config.num_blocks)

    @classmethod
    def with_guidance(cls, config: FlowHeadConfig, scale: float) -> dict[str, Any]:
        """No more null condition; the scale, and a default sampling without guidance, stand in the config."""
        if config.no_guidance_because:
            raise ValueError(config.no_guidance_because)
        sampling = None if config.sampling is None else {**config.sampling, "guidance": 1.0}
        return {"condition_dropout": 0.0, "built_in_guidance": scale, "sampling": sampling}

    def velocity(self, condition_NA: Tensor) -> Velocity:
        """The velocity `v(x_ND, s_N1, t_N1)` under a condition from the conditioner (N rows, or one for all)."""
        return lambda x_ND, s_N1, t_N1: self.net(x_ND, condition_NA + self.time_conditioner(s_N1, t_N1))

    @torch.no_grad()
    def guided(self, hidden_NH: Tensor, scale: float) -> Teacher:
        """This head's velocity with guidance, given the hidden states of positions: what `loss` takes as a teacher."""
        with torch.autocast(hidden_NH.device.type, enabled=False):
            condition_NA, null = self.conditioner(hidden_NH.float()), self.velocity(self.conditioner.null())
        return lambda index_R: guide(self.velocity(condition_NA[index_R]), null, scale)

    def default_sampling(self) -> FlowSampling:
        """The config's `sampling`; without it 16 Euler steps for "cfm", one jump of the flow map for "lsd"."""
        if self.config.sampling is not None:
            return strict(FlowSampling, self.config.sampling, "head.sampling")
        return FlowSampling() if self.config.objective == "cfm" else FlowSampling(solver="map", num_steps=1)

    def loss(
        self,
        hidden_NH: Tensor,
        target_N: Tensor,
        row_N: Tensor,
        generator: torch.Generator | None,
        teacher: Teacher | None = None,
    ) -> HeadLoss:
        """Mean over D and over the draws, summed over positions; count = N.

        Args:
            hidden_NH: hidden states of the positions whose speech token is taught.
            target_N: their latents `[N, D]`.
            row_N: int64, the batch row of each position; the condition is dropped for whole rows, in training mode.
            generator: of times, noise and dropped rows; None takes torch's global one.
            teacher: the velocity to give instead of the data's, at the same points of the same paths; see `guided`.

        Returns:
            HeadLoss whose parts are the flow matching error per quarter of the flow time, `flow_t0.00` (nearest
            noise) to `flow_t0.75`, and for "lsd" the `distillation` error, each summed over draws with their number.
            With a teacher, flow matching is to its velocity, and `guidance` is its error over all times.
        """
        generator = generator or torch.default_generator
        with torch.autocast(hidden_NH.device.type, enabled=False):
            condition_NA = self.conditioner(hidden_NH.float(), self._drop_rows(row_N, generator))
            return self._draw_losses(condition_NA, target_N.float(), generator, teacher)

    def _drop_rows(self, row_N: Tensor, generator: torch.Generator) -> Tensor | None:
        if not self.training:
            return None  # in training never None, so that the null condition is always in the graph (DDP wants that)
        return dropped_rows(row_N, self.config.condition_dropout, generator)

    def _draw_losses(
        self, condition_NA: Tensor, target_ND: Tensor, generator: torch.Generator, teacher: Teacher | None
    ) -> HeadLoss:
        config, device, num_positions = self.config, target_ND.device, len(target_ND)
        num_rows = num_positions * config.num_draws
        num_distilled = round(num_rows * config.distill_fraction) if config.objective == "lsd" else 0
        # Shuffled before it is repeated, so that a share which is no whole number of draws falls on any position.
        shuffled_N = torch.randperm(num_positions, generator=generator, device=generator.device).to(device)
        condition_RA = condition_NA[shuffled_N].repeat(config.num_draws, 1)
        target_RD = target_ND[shuffled_N].repeat(config.num_draws, 1)
        noise_RD = draw_noise(num_rows, self.dim, generator, device)
        sizes = [num_rows - num_distilled, num_distilled]
        condition, distill_condition = condition_RA.split(sizes)
        target, distill_target = target_RD.split(sizes)
        noise, distill_noise = noise_RD.split(sizes)
        index, distill_index = shuffled_N.repeat(config.num_draws).split(sizes)

        times = config.time_sampling, config.time_mean, config.time_std, generator, device
        t_R1 = sample_times(sizes[0], *times)
        if teacher is None:
            loss_R = flow_matching_loss(self.velocity(condition), target, noise, t_R1)
        else:
            loss_R = velocity_distillation_loss(self.velocity(condition), teacher(index), target, noise, t_R1)
        total, parts = loss_R.sum(), _parts_by_time(loss_R.detach(), t_R1)
        if teacher is not None:
            parts["guidance"] = total.detach(), total.new_tensor(float(len(loss_R)))
        if num_distilled > 0:
            s_R1, t_R1 = sample_time_pairs(num_distilled, generator=generator, device=device)
            followed = None if teacher is None else teacher(distill_index)
            distill_R = self_distillation_loss(
                self.velocity(distill_condition), distill_target, distill_noise, s_R1, t_R1, followed
            )
            total = total + distill_R.sum()
            parts["distillation"] = distill_R.detach().sum(), total.new_tensor(float(num_distilled))
        return HeadLoss(total / config.num_draws, total.new_tensor(float(num_positions)), parts)

    @torch.no_grad()
    def sample(self, hidden_BH: Tensor, sampling: FlowSampling, generator: Generators) -> Tensor:
        """Draw latents `[B, D]`, float32.

        Args:
            hidden_BH: hidden states.
            sampling: see `FlowSampling`.
            generator: of the noise: one for the batch, or one a row, which makes a row independent of its neighbours.

        Raises:
            ValueError: if the head was not trained for what `sampling` asks.
        """
        self._check_sampling(sampling)
        with torch.autocast(hidden_BH.device.type, enabled=False):
            noise_BD = draw_noise(len(hidden_BH), self.dim, generator, hidden_BH.device)
            noise_BD = noise_BD * math.sqrt(sampling.temperature)
            if sampling.solver in GRID_SOLVERS:
                return self._sample_on_grid(hidden_BH, noise_BD, sampling)
            condition_BA = self.conditioner(hidden_BH.float())
            if sampling.solver == "dopri5":  # its steps depend on all rows it sees: one at a time
                rows = zip(condition_BA.split(1), noise_BD.split(1), strict=True)
                return torch.cat([self._sample_ode(condition, noise, sampling) for condition, noise in rows])
            return self._sample_ode(condition_BA, noise_BD, sampling)

    def _check_sampling(self, sampling: FlowSampling) -> None:
        if sampling.solver == "map" and self.config.objective != "lsd":
            raise ValueError(
                f"solver is 'map' but head.objective is {self.config.objective!r}: only a head trained with 'lsd' "
                "knows the jumps of the flow map; use solver 'euler'"
            )
        if sampling.guidance != 1.0 and self.config.no_guidance_because:
            raise ValueError(f"guidance is {sampling.guidance} but {self.config.no_guidance_because}; use guidance 1")

    def _sample_ode(self, condition_BA: Tensor, noise_BD: Tensor, sampling: FlowSampling) -> Tensor:
        velocity = self._guided(self.velocity, condition_BA, sampling.guidance)
        return solve_ode(velocity, noise_BD, sampling.solver, sampling.num_steps)

    def _sample_on_grid(self, hidden_BH: Tensor, noise_BD: Tensor, sampling: FlowSampling) -> Tensor:
        """The fused path: all modulation before the first step, equal to `flow.solve` of `velocity`."""
        modulation_BKPA = self.modulations(hidden_BH, sampling)
        times = torch.linspace(0, 1, sampling.num_steps + 1, dtype=noise_BD.dtype, device=noise_BD.device)
        x_BD = noise_BD
        for k, dt in enumerate(times.diff()):
            x_BD = self.jump(x_BD, modulation_BKPA[:, k], dt.expand(len(x_BD), 1), sampling.guidance)
        return x_BD

    def modulations(self, hidden_BH: Tensor, sampling: FlowSampling) -> Tensor:
        """Modulation `[B, K, P, A]` of all steps, under the condition and, with guidance, under the null condition."""
        s_K, t_K = grid_times(sampling.solver, sampling.num_steps, self.conditioner.null_W.float())
        condition_BPA = self.conditioner(hidden_BH.float()).unsqueeze(1)
        if sampling.guidance != 1.0:
            null_BPA = self.conditioner.null().unsqueeze(1).expand_as(condition_BPA)
            condition_BPA = torch.cat([condition_BPA, null_BPA], dim=1)
        return condition_BPA.unsqueeze(1) + self.time_conditioner(s_K[:, None], t_K[:, None]).unsqueeze(1)

    def jump(self, x_BD: Tensor, modulation_BPA: Tensor, dt_B1: Tensor, scale: float) -> Tensor:
        """One step of a grid solver; both conditions of guidance in one pass, so that the weights are read once."""
        velocity_BPD = self.net(x_BD.unsqueeze(1).expand(-1, modulation_BPA.shape[1], -1), modulation_BPA)
        return x_BD + dt_B1 * guided_velocity(velocity_BPD, scale)

    def _guided(self, build: Callable[[Tensor], AnyVelocity], condition_BA: Tensor, scale: float) -> Any:
        if scale == 1.0:
            return build(condition_BA)
        return guide(build(condition_BA), build(self.conditioner.null()), scale)


def _parts_by_time(loss_R: Tensor, t_R1: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Sum and count of the flow matching error in each of `NUM_TIME_BINS` equal bins of the flow time."""
    bin_R1 = (t_R1 * NUM_TIME_BINS).long().clamp(max=NUM_TIME_BINS - 1)
    in_bin_RT = (bin_R1 == torch.arange(NUM_TIME_BINS, device=t_R1.device)).to(loss_R.dtype)
    sum_T, count_T = loss_R @ in_bin_RT, in_bin_RT.sum(dim=0)
    return {f"flow_t{i / NUM_TIME_BINS:.2f}": (sum_T[i], count_T[i]) for i in range(NUM_TIME_BINS)}
