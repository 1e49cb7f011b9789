"""The mel tokenizer: standardised log-mel through a causal encoder and decoder, then the vocoder.

    wave -> log-mel -> patches of r frames -> causal encoder -> bottleneck -> standardised latent, or codes
    wave <- vocoder <- mel frames          <- causal decoder <---------------+

Shapes: B batch, S samples, F mel frames, C channels or mel bins, L speech tokens, D latent dimension, K codebooks,
X whichever of D or K a token has, E encoder output (D, or 2 D with a learned variance), r mel frames per token.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig
from vocos.modules import ConvNeXtBlock

from ..strict import check_keys, strict
from .base import SpeechTokenizer, TokenSpec, latent_statistics
from .bottlenecks import BOTTLENECKS, Bottleneck, BottleneckOutput, Quantiser, check_codes
from .causal import causal_stack, init_pasts
from .mel import MelConfig, MelFront
from .vocoder import Vocoder, VocoderConfig, VocoderState

# Of the standardised mel that the encoder reads. Bins that were empty in all training data (above the band of a 16 kHz
# voice) have a tiny deviation: another recording's few decibels there would be dozens of them and drown the rest.
MAX_DEVIATIONS = 5.0


@dataclass(frozen=True)
class AutoencoderConfig:
    """The learned part between mel and latent.

    Attributes:
        frames_per_token: r, mel frames in one speech token.
        latent_dim: D.
        width, intermediate_dim: of the blocks that run once per token.
        num_encoder_layers, num_decoder_layers: blocks that run once per token.
        frame_width, num_frame_layers: blocks of the decoder that run once per mel frame.
        bottleneck: "none", "sigma_vae" or "kl_vae" (continuous tokens), "vq", "fsq" or "rvq" (discrete tokens).
        sigma: noise scale of the sigma-VAE in training.
        num_codebooks: K of "rvq" and "fsq"; the others have one codebook, or none.
        codebook_size: V of "vq" and "rvq".
        fsq_levels: levels of each number of an FSQ codebook; V is their product.
        quantizer_dropout: share of rows that lose their last codebooks in training, of "rvq".

    With no layers at all and bottleneck "none" the latent is the patch of standardised mel frames itself.
    """

    frames_per_token: int = 8
    latent_dim: int = 32
    width: int = 256
    intermediate_dim: int = 512
    num_encoder_layers: int = 2
    num_decoder_layers: int = 3
    frame_width: int = 128
    num_frame_layers: int = 2
    bottleneck: str = "sigma_vae"
    sigma: float = 0.5
    num_codebooks: int = 1
    codebook_size: int = 1024
    fsq_levels: tuple[int, ...] = (8, 5, 5, 5)
    quantizer_dropout: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "fsq_levels", tuple(self.fsq_levels))  # a list, from JSON
        for name in ("frames_per_token", "latent_dim", "width", "intermediate_dim", "frame_width", "num_codebooks"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("num_encoder_layers", "num_decoder_layers", "num_frame_layers", "sigma"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must not be negative")
        if self.bottleneck not in BOTTLENECKS:
            raise ValueError(f"bottleneck is {self.bottleneck!r}; known bottlenecks: {', '.join(BOTTLENECKS)}")
        self._check_codebooks()

    def _check_codebooks(self) -> None:
        if self.num_codebooks > 1 and self.bottleneck not in ("rvq", "fsq"):
            raise ValueError(
                f"num_codebooks is {self.num_codebooks}, but bottleneck is {self.bottleneck!r}: only 'rvq' and 'fsq' "
                "have several"
            )
        if self.codebook_size < 2:
            raise ValueError(f"codebook_size is {self.codebook_size}; it must be at least 2")
        if not self.fsq_levels or min(self.fsq_levels) < 3 or math.prod(self.fsq_levels) >= 2**31:
            raise ValueError(
                f"fsq_levels is {list(self.fsq_levels)}; it must be one or more numbers from 3 up, with a product "
                "below 2^31"
            )
        if not 0 <= self.quantizer_dropout <= 1:
            raise ValueError(f"quantizer_dropout is {self.quantizer_dropout}; it must be between 0 and 1")
        if self.quantizer_dropout and self.bottleneck != "rvq":
            raise ValueError(
                f"quantizer_dropout is {self.quantizer_dropout}, but bottleneck is {self.bottleneck!r}: only the "
                "codebooks of 'rvq' can be dropped; set it to 0"
            )

    @property
    def codebooks(self) -> tuple[int, int]:
        """K and V; both 0 of a continuous bottleneck."""
        if not issubclass(BOTTLENECKS[self.bottleneck], Quantiser):
            return 0, 0
        return self.num_codebooks, math.prod(self.fsq_levels) if self.bottleneck == "fsq" else self.codebook_size

    @property
    def encoded_dim(self) -> int:
        """E, what the encoder gives per token; the first D are the latent, or its mean."""
        return 2 * self.latent_dim if self.bottleneck == "kl_vae" else self.latent_dim

    @property
    def plain(self) -> bool:
        """Whether the latent is the mel patch itself."""
        num_layers = self.num_encoder_layers + self.num_decoder_layers + self.num_frame_layers
        return num_layers == 0 and self.bottleneck == "none"

    @classmethod
    def plain_patch(cls, frames_per_token: int, num_mels: int) -> AutoencoderConfig:
        """The variant without any learned part."""
        latent_dim = frames_per_token * num_mels
        return cls(
            frames_per_token=frames_per_token,
            latent_dim=latent_dim,
            num_encoder_layers=0,
            num_decoder_layers=0,
            num_frame_layers=0,
            bottleneck="none",
        )


class MelTokenizerConfig(PreTrainedConfig):
    """Configuration of `MelTokenizer`.

    Args:
        mel, autoencoder, vocoder: dicts of `MelConfig`, `AutoencoderConfig`, `VocoderConfig` (or those themselves).

    Raises:
        ValueError: an unknown key (with the nearest valid one), a bad value, or sections that do not fit together.
    """

    model_type = "flowomni_mel_tokenizer"

    def __init__(self, mel: Any = None, autoencoder: Any = None, vocoder: Any = None, **kwargs: Any):
        check_keys(MelTokenizerConfig, kwargs, "speech_tokenizer.")
        mel_config = strict(MelConfig, mel, "mel")
        autoencoder_config = strict(AutoencoderConfig, autoencoder, "autoencoder")
        patch_dim = autoencoder_config.frames_per_token * mel_config.num_mels
        if autoencoder_config.plain and autoencoder_config.latent_dim != patch_dim:
            raise ValueError(
                f"autoencoder.latent_dim is {autoencoder_config.latent_dim}, but without layers and bottleneck a token "
                f"is autoencoder.frames_per_token * mel.num_mels = {autoencoder_config.frames_per_token} * "
                f"{mel_config.num_mels} = {patch_dim} numbers: set latent_dim to {patch_dim}, or give it layers"
            )
        self.mel = dataclasses.asdict(mel_config)
        self.autoencoder = dataclasses.asdict(autoencoder_config)
        self.vocoder = dataclasses.asdict(strict(VocoderConfig, vocoder, "vocoder"))
        super().__init__(**kwargs)

    @property
    def token_spec(self) -> TokenSpec:
        """The spec of the tokenizer that this config describes."""
        mel, lookahead_frames = self.mel, self.vocoder["lookahead_frames"]
        num_codebooks, codebook_size = AutoencoderConfig(**self.autoencoder).codebooks
        return TokenSpec(
            kind="discrete" if num_codebooks else "continuous",
            dim=0 if num_codebooks else self.autoencoder["latent_dim"],
            num_codebooks=num_codebooks,
            codebook_size=codebook_size,
            sample_rate_hz=mel["sample_rate_hz"],
            samples_per_token=self.autoencoder["frames_per_token"] * mel["hop_length"],
            lookahead_samples=lookahead_frames * mel["hop_length"] + mel["n_fft"] // 2,
        )


def _blocks(num_layers: int, dim: int, intermediate_dim: int) -> nn.ModuleList:
    return nn.ModuleList(
        [ConvNeXtBlock(dim, intermediate_dim, layer_scale_init_value=1 / num_layers) for _ in range(num_layers)]
    )


class MelEncoder(nn.Module):
    """Standardised mel to latents, causal in tokens."""

    def __init__(self, config: AutoencoderConfig, num_mels: int):
        super().__init__()
        self.frames_per_token = config.frames_per_token
        self.patch = nn.Linear(config.frames_per_token * num_mels, config.width)
        self.blocks = _blocks(config.num_encoder_layers, config.width, config.intermediate_dim)
        self.norm = nn.LayerNorm(config.width)
        self.out = nn.Linear(config.width, config.encoded_dim)

    def forward(self, mel_BFC: Tensor) -> Tensor:
        """F = L * r frames to encoded_BLE, what the bottleneck reads."""
        hidden_BLC = self.patch(patchify(mel_BFC, self.frames_per_token))
        hidden_BCL, _ = causal_stack(self.blocks, hidden_BLC.transpose(1, 2), init_pasts(self.blocks, mel_BFC.shape[0]))
        return self.out(self.norm(hidden_BCL.transpose(1, 2)))


@dataclass(frozen=True)
class MelDecoderState:
    """Pasts of the blocks at token rate and at frame rate."""

    token_pasts: tuple[Tensor, ...]
    frame_pasts: tuple[Tensor, ...]


class MelDecoder(nn.Module):
    """Latents to standardised mel, causal in tokens: token l gives frames l * r to (l + 1) * r - 1."""

    def __init__(self, config: AutoencoderConfig, num_mels: int):
        super().__init__()
        self.frames_per_token = config.frames_per_token
        self.embed = nn.Linear(config.latent_dim, config.width)
        self.token_blocks = _blocks(config.num_decoder_layers, config.width, config.intermediate_dim)
        self.token_norm = nn.LayerNorm(config.width)
        self.unpatch = nn.Linear(config.width, config.frames_per_token * config.frame_width)
        self.frame_blocks = _blocks(config.num_frame_layers, config.frame_width, 2 * config.frame_width)
        self.frame_norm = nn.LayerNorm(config.frame_width)
        self.out = nn.Linear(config.frame_width, num_mels)

    def init_state(self, batch_size: int) -> MelDecoderState:
        """State before the first token."""
        return MelDecoderState(init_pasts(self.token_blocks, batch_size), init_pasts(self.frame_blocks, batch_size))

    def step(self, latent_BLD: Tensor, state: MelDecoderState) -> tuple[Tensor, MelDecoderState]:
        """L more latents (not standardised) to L * r mel frames, and the next state."""
        hidden_BCL = self.embed(latent_BLD).transpose(1, 2)
        hidden_BCL, token_pasts = causal_stack(self.token_blocks, hidden_BCL, state.token_pasts)
        hidden_BLC = self.unpatch(self.token_norm(hidden_BCL.transpose(1, 2)))
        hidden_BCF = unpatchify(hidden_BLC, self.frames_per_token).transpose(1, 2)
        hidden_BCF, frame_pasts = causal_stack(self.frame_blocks, hidden_BCF, state.frame_pasts)
        return self.out(self.frame_norm(hidden_BCF.transpose(1, 2))), MelDecoderState(token_pasts, frame_pasts)


def patchify(mel_BFC: Tensor, frames_per_token: int) -> Tensor:
    """(B, L * r, C) to (B, L, r * C)."""
    batch_size, num_frames, num_mels = mel_BFC.shape
    return mel_BFC.reshape(batch_size, num_frames // frames_per_token, frames_per_token * num_mels)


def unpatchify(patch_BLC: Tensor, frames_per_token: int) -> Tensor:
    """(B, L, r * C) to (B, L * r, C)."""
    batch_size, num_tokens, width = patch_BLC.shape
    return patch_BLC.reshape(batch_size, num_tokens * frames_per_token, width // frames_per_token)


@dataclass(frozen=True)
class MelTokenizerState:
    """State of one batch of streams; `decoder` is None in the plain-patch variant."""

    decoder: MelDecoderState | None
    vocoder: VocoderState


class MelTokenizer(SpeechTokenizer):
    """Mel patches through a bottleneck, and a vocoder to hear them.

    The bottleneck decides what a speech token is: a latent or codes. All else is the same for both. A checkpoint holds
    everything: mel statistics, encoder, bottleneck, decoder, latent statistics, vocoder.
    """

    config_class = MelTokenizerConfig
    base_model_prefix = "speech_tokenizer"
    main_input_name = "wav_BS"
    compilable = ("extend",)
    latent_mean_D: Tensor
    latent_std_D: Tensor

    def __init__(self, config: MelTokenizerConfig):
        super().__init__(config)
        mel = strict(MelConfig, config.mel, "mel")
        self.autoencoder_config = strict(AutoencoderConfig, config.autoencoder, "autoencoder")
        vocoder = strict(VocoderConfig, config.vocoder, "vocoder")
        self.front = MelFront(mel)
        plain = self.autoencoder_config.plain
        self.encoder = None if plain else MelEncoder(self.autoencoder_config, mel.num_mels)
        self.decoder = None if plain else MelDecoder(self.autoencoder_config, mel.num_mels)
        self.bottleneck: Bottleneck = BOTTLENECKS[self.autoencoder_config.bottleneck](self.autoencoder_config)
        self.vocoder = Vocoder(vocoder, mel.num_mels, mel.n_fft, mel.hop_length)
        dim = self.autoencoder_config.latent_dim
        self.register_buffer("latent_mean_D", torch.zeros(dim, dtype=torch.float32))
        self.register_buffer("latent_std_D", torch.ones(dim, dtype=torch.float32))
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing: every layer initialises itself; transformers' default would undo that."""

    @property
    def spec(self) -> TokenSpec:
        return self.config.token_spec

    @property
    def frames_per_token(self) -> int:
        """r, mel frames in one speech token."""
        return self.autoencoder_config.frames_per_token

    # wave and mel to latents

    def mel(self, wav_BS: Tensor, lengths_B: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Standardised log-mel of whole tokens, (B, L * r, C), and mask_BL. Samples beyond a row's length are zero."""
        num_samples = wav_BS.shape[1]
        if lengths_B is None:
            lengths_B = torch.full((wav_BS.shape[0],), num_samples, device=wav_BS.device)
        inside_BS = torch.arange(num_samples, device=wav_BS.device) < lengths_B[:, None]
        wav_BS = torch.where(inside_BS, wav_BS, 0.0)
        per_token = self.spec.samples_per_token
        num_tokens = -(-num_samples // per_token)
        mask_BL = torch.arange(num_tokens, device=wav_BS.device) < (-(-lengths_B // per_token))[:, None]
        return self.front(wav_BS, num_tokens * self.frames_per_token), mask_BL

    def encode_mel(self, mel_BFC: Tensor) -> Tensor:
        """Standardised mel of whole tokens to what the decoder reads, (B, L, D): latents before their standardisation.

        Continuous ones are without noise; discrete ones are the codebooks' entries.
        """
        return self._encoded(mel_BFC).latent_BLD

    def _encoded(self, mel_BFC: Tensor) -> BottleneckOutput:
        if self.encoder is None:
            return self.bottleneck(patchify(mel_BFC, self.frames_per_token), None)
        return self.bottleneck(self.encoder(mel_BFC.clamp(-MAX_DEVIATIONS, MAX_DEVIATIONS)), None)

    def encode(self, wav_BS: Tensor, lengths_B: Tensor | None = None) -> tuple[Tensor, Tensor]:
        mel_BFC, mask_BL = self.mel(wav_BS, lengths_B)
        encoded = self._encoded(mel_BFC)
        if encoded.code_BLK is not None:
            return torch.where(mask_BL[..., None], encoded.code_BLK, 0), mask_BL
        latent_BLD = (encoded.latent_BLD.float() - self.latent_mean_D) / self.latent_std_D
        return torch.where(mask_BL[..., None], latent_BLD, 0.0), mask_BL

    # tokens to mel and wave

    def decode_mel(self, latent_BLD: Tensor) -> Tensor:
        """Latents before their standardisation to standardised mel, (B, L * r, C)."""
        if self.decoder is None:
            return unpatchify(latent_BLD, self.frames_per_token)
        return self.decoder.step(latent_BLD, self.decoder.init_state(latent_BLD.shape[0]))[0]

    @torch.no_grad()
    def code_vectors(self) -> Tensor | None:
        if not isinstance(self.bottleneck, Quantiser):
            return None
        num_codebooks, codebook_size = self.autoencoder_config.codebooks
        code_KVK = torch.zeros(num_codebooks, codebook_size, num_codebooks, dtype=torch.int64, device=self.device)
        for level in range(num_codebooks):  # the other levels' codes stay at 0, and so add the same to all
            code_KVK[level, :, level] = torch.arange(codebook_size)
        vector_KVD = self.bottleneck.lookup(code_KVK)
        return vector_KVD - vector_KVD.mean(dim=1, keepdim=True)

    def perturb(self, latent_BLD: Tensor, scale_B: Tensor, generator: torch.Generator) -> Tensor:
        """What `encode_mel` gives, with noise of `scale` times each dimension's deviation: a head errs a little too.

        Codebooks' entries stay as they are: between two codes there is nothing.
        """
        if isinstance(self.bottleneck, Quantiser):
            return latent_BLD
        noise_BLD = torch.randn(latent_BLD.shape, generator=generator, device=latent_BLD.device) * self.latent_std_D
        return latent_BLD + scale_B[:, None, None] * noise_BLD

    def vocode(self, log_mel_BFC: Tensor) -> Tensor:
        """Log-mel as vocos has it (not standardised) to wave: F * hop_length samples."""
        floor = torch.tensor(self.front.config.floor).log().item()
        return self.vocoder(self.front.standardise(log_mel_BFC.clamp(min=floor)))

    def through_vocoder(self, wav_BS: Tensor) -> Tensor:
        """The wave to its mel and back, past every bottleneck: what no token can better. Whole tokens, so S or more."""
        num_tokens = -(-wav_BS.shape[1] // self.spec.samples_per_token)
        return self.vocode(self.front.log_mel(wav_BS, num_tokens * self.frames_per_token))

    def init_state(self, batch_size: int) -> MelTokenizerState:
        decoder = None if self.decoder is None else self.decoder.init_state(batch_size)
        return MelTokenizerState(decoder, self.vocoder.init_state(batch_size))

    def raw_latent(self, token_BLX: Tensor) -> Tensor:
        """Tokens, as `encode` gives them, to what the decoder reads, (B, L, D).

        Raises:
            ValueError: codes out of range.
        """
        if isinstance(self.bottleneck, Quantiser):
            check_codes(token_BLX, *self.autoencoder_config.codebooks)
            return self.bottleneck.lookup(token_BLX)
        return token_BLX * self.latent_std_D + self.latent_mean_D

    def step(self, token_BLX: Tensor, state: MelTokenizerState) -> tuple[Tensor, MelTokenizerState]:
        wav_BS, extended = self.extend(self.raw_latent(token_BLX), state)
        wav_BS, vocoder = self.vocoder.trim(wav_BS, extended.vocoder, state.vocoder.trim_samples)
        return wav_BS, MelTokenizerState(extended.decoder, vocoder)

    def extend(self, raw_BLD: Tensor, state: MelTokenizerState) -> tuple[Tensor, MelTokenizerState]:
        """What `step` does, from what the decoder reads, without the trimming at the start (see `Vocoder.extend`)."""
        decoder_state = None
        if self.decoder is None:
            mel_BFC = unpatchify(raw_BLD, self.frames_per_token)
        else:
            assert state.decoder is not None
            mel_BFC, decoder_state = self.decoder.step(raw_BLD, state.decoder)
        wav_BS, vocoder_state = self.vocoder.extend(mel_BFC, state.vocoder)
        return wav_BS, MelTokenizerState(decoder_state, vocoder_state)

    def flush(self, state: MelTokenizerState) -> Tensor:
        return self.vocoder.flush(state.vocoder)

    # statistics

    def fit_latent_statistics(self, latents_LD: Iterable[Tensor]) -> None:
        """Set mean and deviation per dimension from what `encode_mel` gives, (L, D) each. Codes make no use of them."""
        mean_D, std_D = latent_statistics(latents_LD)
        self.latent_mean_D.copy_(mean_D)
        self.latent_std_D.copy_(std_D)


AutoConfig.register(MelTokenizerConfig.model_type, MelTokenizerConfig, exist_ok=True)
AutoModel.register(MelTokenizerConfig, MelTokenizer, exist_ok=True)
