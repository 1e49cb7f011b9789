"""What each bottleneck does to latents.

Shapes: B batch, L speech tokens, D latent dimension, E encoder output, K codebooks, N tokens.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from flowomni.tokenizers import AutoencoderConfig, codebook_use
from flowomni.tokenizers.bottlenecks import BOTTLENECKS, Bottleneck, BottleneckOutput

CODES = {
    "vq": {"codebook_size": 16},
    "fsq": {"num_codebooks": 2, "fsq_levels": (5, 4)},
    "rvq": {"codebook_size": 16, "num_codebooks": 4, "quantizer_dropout": 0.5},
}


def bottleneck(kind: str, **values: object) -> Bottleneck:
    torch.manual_seed(0)
    config = AutoencoderConfig(bottleneck=kind, latent_dim=6, **CODES.get(kind, {}) | values)  # type: ignore[arg-type]
    return BOTTLENECKS[kind](config)


def encoded(num_rows: int = 3, num_tokens: int = 7, width: int = 6) -> Tensor:
    return torch.randn(num_rows, num_tokens, width, generator=torch.Generator().manual_seed(1))


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("kind", BOTTLENECKS)
def test_randomness_is_the_generators(kind: str) -> None:
    """The same generator gives the same; none gives nothing random; torch's own generator is not touched."""
    layer, encoded_BLE = bottleneck(kind), encoded(40, 3, 12 if kind == "kl_vae" else 6)
    before = torch.get_rng_state()
    quiet, first, again = layer(encoded_BLE, None), layer(encoded_BLE, seeded()), layer(encoded_BLE, seeded())
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first.latent_BLD, again.latent_BLD)
    assert torch.equal(quiet.latent_BLD, layer(encoded_BLE, None).latent_BLD)
    assert torch.equal(first.latent_BLD, quiet.latent_BLD) == (kind in ("none", "vq", "fsq"))
    assert first.penalty_BL.shape == (40, 3) and torch.equal(first.penalty_BL, quiet.penalty_BL)


def test_sigma_vae_noise_differs_by_row_and_leaves_the_mean() -> None:
    layer, latent_BLD = bottleneck("sigma_vae", sigma=0.5), torch.ones(2000, 4, 8)
    output = layer(latent_BLD, seeded())
    torch.testing.assert_close(output.penalty_BL, torch.full((2000, 4), 0.5))
    scale_B = (output.latent_BLD - 1).square().mean((1, 2)).sqrt()
    torch.testing.assert_close(scale_B.square().mean().sqrt(), torch.tensor(0.5), rtol=0.1, atol=0)
    assert float(scale_B.min()) < 0.05 and float(scale_B.max()) > 1.0
    assert torch.equal(layer(latent_BLD, None).latent_BLD, latent_BLD)


def test_kl_vae_is_torchs_kl_divergence_and_draws_what_the_encoder_says() -> None:
    layer, encoded_BLE = bottleneck("kl_vae"), encoded(1, 2, 12).repeat(5000, 1, 1)
    output = layer(encoded_BLE, seeded())
    mean_BLD, deviation_BLD = encoded_BLE[..., :6], (encoded_BLE[..., 6:] / 2).exp()
    normal = torch.distributions.Normal(mean_BLD, deviation_BLD)
    divergence_BLD = torch.distributions.kl_divergence(normal, torch.distributions.Normal(0.0, 1.0))
    torch.testing.assert_close(output.penalty_BL, divergence_BLD.mean(-1))
    torch.testing.assert_close(output.latent_BLD.std(0), deviation_BLD[0], rtol=0.1, atol=0)
    torch.testing.assert_close(output.latent_BLD.mean(0), mean_BLD[0], rtol=0, atol=0.1)
    assert torch.equal(layer(encoded_BLE, None).latent_BLD, mean_BLD)


@pytest.mark.parametrize("kind", CODES)
def test_codes_say_all_that_the_decoder_reads(kind: str) -> None:
    layer = bottleneck(kind)
    output = layer(encoded(), None)
    assert output.code_BLK.dtype == torch.int64
    torch.testing.assert_close(layer.lookup(output.code_BLK), output.latent_BLD, rtol=0, atol=1e-5)  # type: ignore[operator]


@pytest.mark.parametrize("kind", ["vq", "rvq"])
def test_each_codebook_refines_those_before_it(kind: str) -> None:
    """Nearest entries, one codebook after the other; level k is what the first k say; all codes are searched."""
    layer, encoded_BLE = bottleneck(kind), encoded()
    output = layer(encoded_BLE, None)
    total_BLD = torch.zeros_like(encoded_BLE)
    for index, book in enumerate(layer.layers):  # type: ignore[arg-type]
        distance_BLV = (encoded_BLE - total_BLD)[:, :, None].sub(book.codebook).square().sum(-1)
        assert torch.equal(output.code_BLK[..., index], distance_BLV.argmin(-1))
        total_BLD = total_BLD + book.codebook[output.code_BLK[..., index]]
        torch.testing.assert_close(output.level_KBLD[index], total_BLD, rtol=0, atol=1e-5)
    assert torch.equal(output.latent_BLD, output.level_KBLD[-1])
    library_BLD, code_BL, _ = layer.layers[0](encoded_BLE)  # type: ignore[index, operator]
    assert torch.equal(code_BL, output.code_BLK[..., 0])
    torch.testing.assert_close(library_BLD, output.level_KBLD[0], rtol=0, atol=1e-5)


def test_gradients_go_straight_through_once() -> None:
    """Every level hands the decoder's gradient to the encoder once, not once for each codebook."""
    layer, encoded_BLE = bottleneck("rvq"), encoded().requires_grad_()
    output: BottleneckOutput = layer(encoded_BLE, seeded())
    for value_BLD in (output.latent_BLD, *output.level_KBLD):
        (gradient_BLD,) = torch.autograd.grad(value_BLD.sum(), encoded_BLE, retain_graph=True)
        assert torch.equal(gradient_BLD, torch.ones_like(gradient_BLD))
    output.penalty_BL.sum().backward()
    for parameter in layer.parameters():
        assert float(parameter.grad.abs().sum()) > 0


def test_quantiser_dropout_is_by_row_and_even() -> None:
    layer, encoded_BLE = bottleneck("rvq"), encoded(4000, 1)
    output = layer(encoded_BLE, seeded())
    same_KB = (output.level_KBLD == output.latent_BLD).all(-1).all(-1)
    assert bool(same_KB.any(0).all())
    share_K = same_KB.float().mean(1)
    torch.testing.assert_close(share_K, torch.tensor([0.125, 0.125, 0.125, 0.625]), rtol=0, atol=0.03)


@pytest.mark.parametrize("kind", CODES)
def test_a_codebook_learns_what_it_is_given(kind: str) -> None:
    """The error of fixed targets falls, and the codes do not collapse."""
    layer, target_BLD = bottleneck(kind), encoded(64, 4) * 3
    first = float((layer(target_BLD, None).latent_BLD - target_BLD).square().mean().detach())
    optimizer = torch.optim.AdamW(layer.parameters(), lr=2e-2)
    for _ in range(150):
        output = layer(target_BLD, None)
        # a linear layer at the end (FSQ) learns from the reconstruction, a codebook from its penalty
        loss = (output.latent_BLD - target_BLD).square().mean() + output.penalty_BL.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    output = layer(target_BLD, None)
    assert float((output.latent_BLD - target_BLD).square().mean().detach()) < 0.7 * first
    size = 20 if kind == "fsq" else 16
    assert min(use.perplexity for use in codebook_use(output.code_BLK.flatten(0, 1), size)) > 0.4 * size


def test_codebook_use_by_hand() -> None:
    code_NK = torch.tensor([[0, 1], [1, 1], [0, 1], [3, 1]])
    first, second = codebook_use(code_NK, 8)
    assert (first.num_used, first.share) == (3, 0.75)  # four tokens could show four codes
    assert first.perplexity == pytest.approx(math.exp(-0.5 * math.log(0.5) - 0.5 * math.log(0.25)))
    assert (second.num_used, second.share, second.perplexity) == (1, 0.25, 1.0)


@pytest.mark.parametrize("kind", CODES)
def test_half_precision_autocast_changes_no_code(kind: str) -> None:
    layer, encoded_BLE = bottleneck(kind), encoded()
    with torch.autocast("cpu", torch.bfloat16):
        half = layer(encoded_BLE, None)
    assert torch.equal(half.code_BLK, layer(encoded_BLE, None).code_BLK) and half.latent_BLD.dtype == torch.float32
