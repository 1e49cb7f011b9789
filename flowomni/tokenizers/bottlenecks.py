"""What stands between the encoder and the decoder of a mel tokenizer, and nothing else.

Shapes: B batch, L speech tokens, D latent dimension.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class NoBottleneck(nn.Module):
    """Latents as they are."""

    def forward(self, latent_BLD: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        """The latents and a zero penalty per token."""
        return latent_BLD, torch.zeros_like(latent_BLD[..., 0])


class SigmaVae(nn.Module):
    """Gaussian noise whose scale is drawn anew for each row, as in VibeVoice (arXiv 2508.19205).

    The scale is |N(0, sigma)|, so that the decoder meets clean and noisy latents. The penalty is the part of the KL
    divergence from a standard normal which concerns the mean, mean(latent^2) / 2: it bounds the latents, which else
    would outgrow the noise.
    """

    def __init__(self, sigma: float):
        super().__init__()
        self.sigma = sigma

    def forward(self, latent_BLD: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        """Noisy latents (B, L, D) and the penalty per token (B, L)."""
        scale_B = torch.randn(latent_BLD.shape[0], 1, 1, generator=generator, device=latent_BLD.device).abs()
        noise_BLD = torch.randn(latent_BLD.shape, generator=generator, device=latent_BLD.device)
        return latent_BLD + self.sigma * scale_B * noise_BLD, latent_BLD.float().square().mean(-1) / 2


BOTTLENECKS = ("none", "sigma_vae")


def build_bottleneck(kind: str, sigma: float) -> nn.Module:
    """The bottleneck named `kind`, one of `BOTTLENECKS`."""
    return SigmaVae(sigma) if kind == "sigma_vae" else NoBottleneck()
