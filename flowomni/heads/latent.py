"""What heads of continuous speech tokens share: how latents are read, and the noise they are trained with.

Shapes: B rows, L steps, D latent dimension, H hidden width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..tokenizers.base import TokenSpec
from .base import SpeechHead
from .layers import Linear, noisy_latents


class LatentHead(SpeechHead):
    """A head whose tokens are latents.

    Args:
        config: with `kind`, `target_noise` and `feedback_noise`.
        spec: of the tokenizer; its kind must be "continuous".
        hidden_size: width H of the hidden states.

    Raises:
        ValueError: naming both kinds, if the tokenizer's tokens are discrete.
    """

    token_kind = "continuous"

    def __init__(self, config: Any, spec: TokenSpec, hidden_size: int):
        super().__init__()
        self.check_spec(config.kind, self.token_kind, spec)
        self.config = config
        self.embedding = nn.Sequential(Linear(spec.dim, hidden_size), nn.SiLU(), Linear(hidden_size, hidden_size))

    def embed(self, token_BL: Tensor) -> Tensor:
        """Latents `[B, L, D]` -> `[B, L, H]`."""
        return self.embedding(token_BL)

    def perturb(self, token_BL: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        """Training noise on latents `[B, L, D]`: what is fed back, and what is the target. See `noisy_latents`."""
        return noisy_latents(token_BL, self.config.target_noise, self.config.feedback_noise, generator)
