"""What stands between the encoder and the decoder of a mel tokenizer, and nothing else.

The quantisers are such that everything they learn is an ordinary parameter: no k-means start, no running averages of
codes, no codes replaced while training. So a resumed run is the run that never stopped, processes agree as they do on
any gradient, averaged weights (EMA) fit their codebooks, and `from_pretrained` finds all of it in the checkpoint.

Shapes: B batch, L speech tokens, D latent dimension, E encoder output (D, or 2 D with a learned variance),
K codebooks, V codebook size, N tokens of any rows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from .autoencoder import AutoencoderConfig

COMMITMENT = 0.25  # of the encoder to the codebook, against that of the codebook to the encoder (van den Oord 2017)


@dataclass(frozen=True)
class BottleneckOutput:
    """What a bottleneck makes of the encoder's output.

    Attributes:
        latent_BLD: what the decoder reads. Gradients go straight through a quantiser to the encoder.
        penalty_BL: the bottleneck's own loss per token: 0, mean(latent^2) / 2, KL divergence, or commitment.
        code_BLK: the codes, int64, of all codebooks; None of a continuous bottleneck.
        level_KBLD: what the first 1, 2, ... K codebooks say together, without quantiser dropout; None where the
            codebooks do not refine each other.
    """

    latent_BLD: Tensor
    penalty_BL: Tensor
    code_BLK: Tensor | None = None
    level_KBLD: Tensor | None = None


class Bottleneck(nn.Module):
    """`forward(encoded_BLE, generator)` gives a `BottleneckOutput`; without a generator nothing random happens."""

    def forward(self, encoded_BLE: Tensor, generator: torch.Generator | None) -> BottleneckOutput:
        """Noise or dropout is drawn from `generator`; None is for encoding, where neither is wanted."""
        raise NotImplementedError


class Quantiser(Bottleneck):
    """A bottleneck with codes."""

    def lookup(self, code_BLK: Tensor) -> Tensor:
        """latent_BLD of codes that are in range: what `forward` without a generator gave with these codes."""
        raise NotImplementedError


class NoBottleneck(Bottleneck):
    """Latents as they are."""

    def __init__(self, config: AutoencoderConfig):
        super().__init__()

    def forward(self, encoded_BLE: Tensor, generator: torch.Generator | None) -> BottleneckOutput:
        """The latents and a zero penalty."""
        return BottleneckOutput(encoded_BLE, torch.zeros_like(encoded_BLE[..., 0]))


class SigmaVae(Bottleneck):
    """Gaussian noise whose scale is drawn anew for each row, as in VibeVoice (arXiv 2508.19205).

    The scale is |N(0, sigma)|, so that the decoder meets clean and noisy latents. The penalty is the part of the KL
    divergence from a standard normal which concerns the mean, mean(latent^2) / 2: it bounds the latents, which else
    would outgrow the noise.
    """

    def __init__(self, config: AutoencoderConfig):
        super().__init__()
        self.sigma = config.sigma

    def forward(self, encoded_BLE: Tensor, generator: torch.Generator | None) -> BottleneckOutput:
        """Noisy latents."""
        penalty_BL = encoded_BLE.float().square().mean(-1) / 2
        if generator is None:
            return BottleneckOutput(encoded_BLE, penalty_BL)
        scale_B = torch.randn(encoded_BLE.shape[0], 1, 1, generator=generator, device=encoded_BLE.device).abs()
        noise_BLD = torch.randn(encoded_BLE.shape, generator=generator, device=encoded_BLE.device)
        return BottleneckOutput(encoded_BLE + self.sigma * scale_B * noise_BLD, penalty_BL)


class KlVae(Bottleneck):
    """A variational autoencoder (arXiv 1312.6114): the encoder gives mean and log-variance of a normal.

    The penalty is the KL divergence from a standard normal, mean over dimensions. Encoding takes the mean.
    """

    def __init__(self, config: AutoencoderConfig):
        super().__init__()

    def forward(self, encoded_BLE: Tensor, generator: torch.Generator | None) -> BottleneckOutput:
        """A draw, or the mean without a generator."""
        mean_BLD, log_variance_BLD = encoded_BLE.float().chunk(2, dim=-1)
        log_variance_BLD = log_variance_BLD.clamp(-30, 20)  # as latent diffusion has it: exp stays finite
        penalty_BL = (mean_BLD.square() + log_variance_BLD.exp() - 1 - log_variance_BLD).mean(-1) / 2
        if generator is None:
            return BottleneckOutput(mean_BLD, penalty_BL)
        noise_BLD = torch.randn(mean_BLD.shape, generator=generator, device=mean_BLD.device)
        return BottleneckOutput(mean_BLD + (log_variance_BLD / 2).exp() * noise_BLD, penalty_BL)


class ResidualQuantiser(Quantiser):
    """K codebooks, each of what those before it left over (arXiv 2107.03312); with K = 1 plain vector quantisation.

    The codebooks are SimVQ's (arXiv 2411.02038): fixed random vectors through a learned matrix, so that all codes of
    a codebook move together and few are left behind. Quantiser dropout: in a share of the rows the decoder gets only
    the first k codebooks, k uniform over 1 ... K (arXiv 2306.06546). The penalty is the squared distance of codebook
    to encoder plus `COMMITMENT` times the same for the encoder, mean over dimensions and codebooks.
    """

    def __init__(self, config: AutoencoderConfig):
        super().__init__()
        # late: it takes seconds to import (einx imports torch._dynamo), and continuous tokenizers do without
        from vector_quantize_pytorch import SimVQ

        num_codebooks, codebook_size = config.codebooks
        self.dropout = config.quantizer_dropout
        self.layers = nn.ModuleList(
            [SimVQ(dim=config.latent_dim, codebook_size=codebook_size) for _ in range(num_codebooks)]
        )

    def forward(self, encoded_BLE: Tensor, generator: torch.Generator | None) -> BottleneckOutput:
        """The nearest codes, one codebook after the other."""
        with torch.autocast(encoded_BLE.device.type, enabled=False):
            encoded_BLD = encoded_BLE.float()
            total_BLD, penalty_BL = torch.zeros_like(encoded_BLD), torch.zeros_like(encoded_BLD[..., 0])
            codes, levels = [], []
            layer: Any
            for layer in self.layers:
                rest_BLD = encoded_BLD - total_BLD
                # not SimVQ.forward and .indices_to_codes, the same: einx compiles itself anew for each length
                codebook_VD = layer.codebook
                with torch.no_grad():
                    code_BL = torch.cdist(rest_BLD, codebook_VD).argmin(-1)
                entry_BLD = codebook_VD[code_BL]
                distance_BLD = (rest_BLD.detach() - entry_BLD).square()
                penalty_BL = penalty_BL + distance_BLD.mean(-1)
                penalty_BL = penalty_BL + COMMITMENT * (rest_BLD - entry_BLD.detach()).square().mean(-1)
                total_BLD = total_BLD + entry_BLD.detach()
                codes.append(code_BL)
                levels.append(encoded_BLD + (total_BLD - encoded_BLD).detach())
        level_KBLD = torch.stack(levels)
        latent_BLD = levels[-1] if generator is None else self._dropped(level_KBLD, generator)
        return BottleneckOutput(latent_BLD, penalty_BL / len(levels), torch.stack(codes, dim=-1), level_KBLD)

    def _dropped(self, level_KBLD: Tensor, generator: torch.Generator) -> Tensor:
        """The level that each row is given."""
        num_levels, num_rows = level_KBLD.shape[:2]
        device = level_KBLD.device
        drop_B = torch.rand(num_rows, generator=generator, device=device) < self.dropout
        last_B = torch.randint(num_levels, (num_rows,), generator=generator, device=device)
        return level_KBLD[torch.where(drop_B, last_B, num_levels - 1), torch.arange(num_rows, device=device)]

    def lookup(self, code_BLK: Tensor) -> Tensor:
        """The sum of all codebooks' entries."""
        layers: Any = self.layers
        entries = [layer.code_transform(layer.frozen_codebook[code_BLK[..., k]]) for k, layer in enumerate(layers)]
        return torch.stack(entries).sum(0)


# Not a submodule: its buffers are constants of the config and not saved, and `from_pretrained`, which builds on the
# meta device, would leave them empty.
@lru_cache(maxsize=8)
def _fsq(levels: tuple[int, ...], num_codebooks: int, device: torch.device) -> Any:
    from vector_quantize_pytorch import FSQ  # late, see above

    with torch.device("cpu"):
        quantiser = FSQ(list(levels), num_codebooks=num_codebooks, keep_num_codebooks_dim=True)
    return quantiser.to(device)


class FiniteScalarQuantiser(Quantiser):
    """Finite scalar quantisation (arXiv 2309.15505): a few numbers, each rounded to a few levels.

    K codebooks stand side by side, each of its own numbers: K * len(levels) in all, from and to D by a linear layer.
    There is no codebook to learn and nothing to penalise.
    """

    def __init__(self, config: AutoencoderConfig):
        super().__init__()
        self.levels, self.num_codebooks = config.fsq_levels, config.num_codebooks
        num_scalars = len(self.levels) * self.num_codebooks
        self.project_in = nn.Linear(config.latent_dim, num_scalars)
        self.project_out = nn.Linear(num_scalars, config.latent_dim)

    def forward(self, encoded_BLE: Tensor, generator: torch.Generator | None) -> BottleneckOutput:
        """The rounded numbers."""
        with torch.autocast(encoded_BLE.device.type, enabled=False):
            fsq = _fsq(self.levels, self.num_codebooks, encoded_BLE.device)
            scalar_BLX, code_BLK = fsq(self.project_in(encoded_BLE.float()))
            latent_BLD = self.project_out(scalar_BLX)
        return BottleneckOutput(latent_BLD, torch.zeros_like(latent_BLD[..., 0]), code_BLK.long())

    def lookup(self, code_BLK: Tensor) -> Tensor:
        """The numbers that the codes stand for."""
        return self.project_out(_fsq(self.levels, self.num_codebooks, code_BLK.device).indices_to_codes(code_BLK))


BOTTLENECKS: dict[str, type[Any]] = {
    "none": NoBottleneck,
    "sigma_vae": SigmaVae,
    "kl_vae": KlVae,
    "vq": ResidualQuantiser,
    "fsq": FiniteScalarQuantiser,
    "rvq": ResidualQuantiser,
}


def check_codes(code_BLK: Tensor, num_codebooks: int, codebook_size: int) -> None:
    """Refuse what is not `num_codebooks` integers below `codebook_size` per token.

    Raises:
        ValueError: naming what was found and what belongs there.
    """
    if code_BLK.dtype not in (torch.int64, torch.int32) or code_BLK.shape[-1] != num_codebooks:
        raise ValueError(
            f"code_BLK has dtype {str(code_BLK.dtype).removeprefix('torch.')} and shape {list(code_BLK.shape)}; this "
            f"tokenizer takes integers, {num_codebooks} in the last dimension (num_codebooks)"
        )
    low, high = (int(value) for value in code_BLK.aminmax())
    if low < 0 or high >= codebook_size:
        raise ValueError(
            f"code_BLK holds {low if low < 0 else high}; codes must be in 0 to {codebook_size - 1} "
            f"(codebook_size is {codebook_size}): were they made by another tokenizer?"
        )


@dataclass(frozen=True)
class CodebookUse:
    """How a codebook is used.

    Attributes:
        num_used: codes that occur.
        share: num_used over the codes that could occur, min(V, N).
        perplexity: exp of the entropy of the codes' distribution: V if all are used alike, 1 if only one is.
    """

    num_used: int
    share: float
    perplexity: float


def codebook_use(code_NK: Tensor, codebook_size: int) -> list[CodebookUse]:
    """The use of each of the K codebooks, measured on N tokens."""
    uses = []
    for code_N in code_NK.unbind(-1):
        count_V = torch.bincount(code_N, minlength=codebook_size).double()
        num_used = int((count_V > 0).sum())
        share_V = count_V / count_V.sum()
        entropy = -float(torch.special.xlogy(share_V, share_V).sum())
        uses.append(CodebookUse(num_used, num_used / min(codebook_size, len(code_N)), math.exp(entropy)))
    return uses
