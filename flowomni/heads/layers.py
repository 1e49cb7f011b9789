"""What several heads are built of.

Shapes: N positions (any leading dimensions), B rows, L steps, D latent dimension, W network width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Linear(nn.Linear):
    """A linear layer whose weights follow its input's dtype, so that bfloat16 weights still compute in float32."""

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight.to(input.dtype), self.bias.to(input.dtype))


def layer_norm(x: Tensor) -> Tensor:
    """Layer norm without affine, written out: the fused kernel's gradient is wrong behind a forward-mode derivative.

    https://github.com/pytorch/pytorch/issues/196700; `F.layer_norm` can come back when the supported torch has the fix.
    """
    centred = x - x.mean(dim=-1, keepdim=True)
    return centred * torch.rsqrt(centred.square().mean(dim=-1, keepdim=True) + 1e-6)


class ResidualMlp(nn.Module):
    """Hidden states `[N, H]` -> features `[N, W]`: a projection, then residual MLP blocks as wide as the projection."""

    def __init__(self, in_features: int, width: int, num_blocks: int):
        super().__init__()
        self.project = Linear(in_features, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(Linear(width, width), nn.SiLU(), Linear(width, width)) for _ in range(num_blocks)
        )

    def forward(self, hidden_NH: Tensor) -> Tensor:
        x_NW = self.project(hidden_NH)
        for block in self.blocks:
            x_NW = x_NW + block(layer_norm(x_NW))
        return layer_norm(x_NW)


def noisy_latents(
    token_BLD: Tensor, target_noise: float, feedback_noise: float, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """Training noise on latents: what is fed back, and what is the target.

    The target gets noise of std `target_noise`; what is fed back is that target with more noise, of a std drawn per row
    up to `feedback_noise`, so that the model learns to go on from its own imperfect tokens.
    """
    generator = generator or torch.default_generator

    def noise_like(x: Tensor) -> Tensor:
        noise = torch.randn(x.shape, generator=generator, device=generator.device)
        return noise.to(device=x.device, dtype=x.dtype)

    target_BLD = fed_back_BLD = token_BLD
    if target_noise > 0:
        target_BLD = fed_back_BLD = token_BLD + target_noise * noise_like(token_BLD)
    if feedback_noise > 0:
        std_B11 = torch.rand(len(token_BLD), 1, 1, generator=generator, device=generator.device).to(target_BLD)
        fed_back_BLD = target_BLD + feedback_noise * std_B11 * noise_like(token_BLD)
    return fed_back_BLD, target_BLD
