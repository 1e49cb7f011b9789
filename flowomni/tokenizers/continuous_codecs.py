"""Public codecs as speech tokenizers: Mimi's latents before quantisation, and the continuous latents of pocket-tts and
VibeVoice, standardised by statistics that are fitted to speech and saved with the weights.

Mimi's decoder was trained on quantised latents, which approximate those before quantisation. VibeVoice's feature
extractor brings audio to -25 dB full scale first; here nothing is scaled, so that loudness survives. Its sigma-VAE
noise is not drawn: a token is the mean.

Sources: Mimi arXiv 2410.00037, pocket-tts (CALM) arXiv 2509.06926, VibeVoice arXiv 2508.19205.

Shapes: B batch, S samples, L speech tokens, D latent dimension, C channels.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModel

from .base import TokenSpec, latent_statistics
from .codec_layers import CONTINUOUS
from .codecs import WrappedCodec, WrappedCodecConfig


class LatentCodecConfig(WrappedCodecConfig):
    """Configuration of `LatentCodecTokenizer`; its keys are those of `WrappedCodecConfig`."""

    model_type = "flowomni_latent_codec"
    codec_types = CONTINUOUS

    def __init__(
        self, codec: Any = None, sample_rate_hz: int | None = None, samples_per_token: int | None = None, **kwargs: Any
    ):
        super().__init__(codec, sample_rate_hz, samples_per_token, **kwargs)

    @property
    def token_spec(self) -> TokenSpec:
        """The spec of the tokenizer that this config describes."""
        sizes = self.sizes
        return TokenSpec(
            kind="continuous",
            dim=sizes.latent_dim,
            num_codebooks=0,
            codebook_size=0,
            sample_rate_hz=sizes.sample_rate_hz,
            samples_per_token=sizes.samples_per_token,
            lookahead_samples=sizes.lookahead_samples,
        )


class LatentCodecTokenizer(WrappedCodec):
    """Continuous speech tokens of a public codec: its latents, standardised.

    `LatentCodecTokenizer.from_codec("kyutai/mimi")` wraps a codec with statistics of zero and one;
    `fit_latent_statistics` sets them.
    """

    config_class = LatentCodecConfig
    latent_mean_D: Tensor
    latent_std_D: Tensor

    def __init__(self, config: LatentCodecConfig):
        super().__init__(config)
        self.register_buffer("latent_mean_D", torch.zeros(self.spec.dim, dtype=torch.float32))
        self.register_buffer("latent_std_D", torch.ones(self.spec.dim, dtype=torch.float32))
        self.post_init()

    def raw_latents(self, wav_BS: Tensor) -> Tensor:
        """Wave of whole tokens to latents as the codec gives them, (B, L, D)."""
        codec, wav_B1S = self.codec, wav_BS[:, None]
        kind = self.config.codec.model_type
        if kind == "mimi":
            return codec.encoder(wav_B1S, use_streaming=False).latents.transpose(1, 2)
        if kind == "pocket_tts_audio_tokenizer":
            return codec.encode(wav_B1S, use_streaming=False).latents
        return codec.encode(wav_B1S, sample=False).latents

    def encode_whole(self, wav_BS: Tensor) -> Tensor:
        return (self.raw_latents(wav_BS).float() - self.latent_mean_D) / self.latent_std_D

    def to_hidden(self, latent_BLD: Tensor) -> Tensor:
        raw_BCL = (latent_BLD * self.latent_std_D + self.latent_mean_D).transpose(1, 2)
        if self.config.codec.model_type == "pocket_tts_audio_tokenizer":
            return self.codec.latent_proj(raw_BCL)
        return raw_BCL

    def fit_latent_statistics(self, latents_LD: Iterable[Tensor]) -> None:
        """Set mean and deviation per dimension from `raw_latents`, (L, D) each."""
        mean_D, std_D = latent_statistics(latents_LD)
        self.latent_mean_D.copy_(mean_D)
        self.latent_std_D.copy_(std_D)


AutoConfig.register(LatentCodecConfig.model_type, LatentCodecConfig, exist_ok=True)
AutoModel.register(LatentCodecConfig, LatentCodecTokenizer, exist_ok=True)
