"""The regression head: the latent itself, guessed by an MLP. The control for heads that draw from a distribution.

It learns the mean (l2) or the median (l1) of what could be said next, which is nothing that would be said.

Shapes: B rows, L steps, N flattened valid positions, D latent dimension, H hidden width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..strict import strict
from ..tokenizers.base import TokenSpec
from .base import Generators, HeadLoss, check_generators
from .latent import LatentHead
from .layers import Linear, ResidualMlp

LOSSES = ("l1", "l2")


@dataclass(frozen=True)
class RegressionSampling:
    """There is nothing to choose: the same hidden state gives the same latent."""


@dataclass(frozen=True)
class RegressionHeadConfig:
    """Size and loss of a regression head.

    Attributes:
        width, num_blocks: of the network.
        loss: "l1", mean absolute error; "l2", mean squared error.
        feedback_noise, target_noise: as of the flow head.
        sampling: nothing, or {}; there for the same form as other heads.
    """

    kind: str = "regression"
    width: int = 384
    num_blocks: int = 5
    loss: str = "l1"
    feedback_noise: float = 0.0
    target_noise: float = 0.0
    sampling: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.kind != "regression":
            raise ValueError(f"kind is {self.kind!r}; a regression head's kind is 'regression'")
        for name in ("width", "num_blocks"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} is {value!r}; it must be a whole number of at least 1")
        if self.loss not in LOSSES:
            raise ValueError(f"loss is {self.loss!r}; it must be one of {', '.join(LOSSES)}")
        for name in ("feedback_noise", "target_noise"):
            value = getattr(self, name)
            if not (value >= 0 and math.isfinite(value)):
                raise ValueError(f"{name} is {value}; it must be a number of at least 0")
        strict(RegressionSampling, self.sampling, "sampling")


class RegressionHead(LatentHead):
    """Embed, teach and guess latents; see `LatentHead` for the arguments."""

    Config = RegressionHeadConfig
    Sampling = RegressionSampling

    def __init__(self, config: RegressionHeadConfig, spec: TokenSpec, hidden_size: int):
        super().__init__(config, spec, hidden_size)
        self.net = ResidualMlp(hidden_size, config.width, config.num_blocks)
        self.project = Linear(config.width, spec.dim)

    def default_sampling(self) -> RegressionSampling:
        """The only one there is."""
        return RegressionSampling()

    def loss(self, hidden_NH: Tensor, target_N: Tensor, row_N: Tensor, generator: torch.Generator | None) -> HeadLoss:
        """Mean error over D, summed over positions; count = N. Nothing is random.

        Returns:
            HeadLoss whose parts are both errors, `l1` and `l2`, whichever trains.
        """
        with torch.autocast(hidden_NH.device.type, enabled=False):
            error_ND = self.project(self.net(hidden_NH.float())) - target_N.float()
            sums = {"l1": error_ND.abs().mean(-1).sum(), "l2": error_ND.square().mean(-1).sum()}
            count = error_ND.new_tensor(float(len(target_N)))
            parts = {name: (total.detach(), count) for name, total in sums.items()}
            return HeadLoss(sums[self.config.loss], count, parts)

    @torch.no_grad()
    def sample(self, hidden_BH: Tensor, sampling: RegressionSampling, generator: Generators) -> Tensor:
        """The guessed latents `[B, D]`, float32; nothing is drawn from `generator`."""
        check_generators(len(hidden_BH), generator)
        with torch.autocast(hidden_BH.device.type, enabled=False):
            return self.project(self.net(hidden_BH.float()))
