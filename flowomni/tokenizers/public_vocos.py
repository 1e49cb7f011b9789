"""The public vocos (`charactr/vocos-mel-24khz`), which is not causal, as a vocoder that streams; and a speech tokenizer
of plain mel patches around it.

Its nine convolutions see three frames ahead each and its inverse STFT two more: 29 frames, 0.31 s. `PublicVocos` gives
what `vocos.Vocos.decode` gives on the same weights, frame by frame with that look-ahead (equal up to float32 rounding),
and the last hop, where vocos stops at the centre of the last frame.

Source: Vocos arXiv 2306.00814.

Shapes: B batch, S samples, F mel frames, C channels or mel bins, L speech tokens, D latent dimension, T time steps.
"""

from __future__ import annotations

import dataclasses
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
import yaml
from huggingface_hub import hf_hub_download
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoConfig, AutoModel, PreTrainedConfig
from vocos import Vocos
from vocos.heads import ISTFTHead
from vocos.models import VocosBackbone
from vocos.modules import ConvNeXtBlock

from ..strict import check_keys, strict
from .autoencoder import patchify, unpatchify
from .base import SpeechTokenizer, TokenSpec
from .mel import MelConfig, MelFront
from .streamed import Chain, Conv, Layer, Pointwise, Residual

CLASSES = {
    "feature_extractor": "vocos.feature_extractors.MelSpectrogramFeatures",
    "backbone": "vocos.models.VocosBackbone",
    "head": "vocos.heads.ISTFTHead",
}
VOCOS_FLOOR = 1e-7  # where vocos' own features clip the magnitudes


@dataclass(frozen=True)
class IstftState:
    """Sums that later frames still add to, (B, S) and their envelope; None before the first frame. Samples to trim."""

    tail_BS: Tensor | None
    envelope_S: Tensor | None
    trim: int


@dataclass(frozen=True)
class Istft:
    """vocos' `ISTFTHead` with centred frames: hidden states (B, C, T) to (B, 1, S), `hop` samples a frame in all."""

    head: ISTFTHead

    def init_state(self, batch_size: int) -> IstftState:
        return IstftState(None, None, self.head.istft.n_fft // 2)

    def step(self, x_BCT: Tensor, state: IstftState, last: bool) -> tuple[Tensor, IstftState]:
        istft, num_frames = self.head.istft, x_BCT.shape[2]
        sum_BS, envelope_S = state.tail_BS, state.envelope_S
        if num_frames > 0:
            sum_BS = self._fold(self._windowed(x_BCT))
            envelope_S = self._fold(istft.window.square()[None, :, None].expand(1, -1, num_frames))[0]
            if state.tail_BS is not None and state.envelope_S is not None:
                grow = (0, num_frames * istft.hop_length)
                sum_BS = sum_BS + functional.pad(state.tail_BS, grow)
                envelope_S = envelope_S + functional.pad(state.envelope_S, grow)
        if sum_BS is None or envelope_S is None:
            return x_BCT.new_zeros(x_BCT.shape[0], 1, 0), state
        end = num_frames * istft.hop_length + (istft.n_fft // 2 if last else 0)
        trim = min(state.trim, end)
        wav_BS = sum_BS[:, trim:end] / envelope_S[trim:end]
        return wav_BS[:, None], IstftState(sum_BS[:, end:], envelope_S[end:], state.trim - trim)

    def _windowed(self, x_BCT: Tensor) -> Tensor:
        """The windowed inverse FFT of each frame, (B, n_fft, T), as `ISTFTHead` has it; float32 under autocast too."""
        istft = self.head.istft
        with torch.autocast(x_BCT.device.type, enabled=False):
            log_magnitude_BNT, phase_BNT = self.head.out(x_BCT.float().transpose(1, 2)).transpose(1, 2).chunk(2, dim=1)
            magnitude_BNT = torch.clip(torch.exp(log_magnitude_BNT), max=1e2)
            frames_BST = torch.fft.irfft(torch.polar(magnitude_BNT, phase_BNT), istft.n_fft, dim=1)
            return frames_BST * istft.window[:, None]

    def _fold(self, frames_BST: Tensor) -> Tensor:
        istft = self.head.istft
        length = (frames_BST.shape[2] - 1) * istft.hop_length + istft.n_fft
        return functional.fold(frames_BST, (1, length), (1, istft.n_fft), stride=(1, istft.hop_length))[:, 0, 0]


class PublicVocos(nn.Module):
    """vocos' backbone and head under vocos' parameter names; log-mel (not standardised) to wave.

    Args:
        dim, intermediate_dim, num_layers: of the backbone.
        num_mels, n_fft, hop_length: of the mel front.
    """

    def __init__(self, dim: int, intermediate_dim: int, num_layers: int, num_mels: int, n_fft: int, hop_length: int):
        super().__init__()
        self.backbone = VocosBackbone(num_mels, dim, intermediate_dim, num_layers)
        self.head = ISTFTHead(dim, n_fft, hop_length, padding="center")
        # torch makes a periodic window as a view of a longer one, which safetensors refuses to load in place
        self.head.istft.window = self.head.istft.window.clone()

    def forward(self, log_mel_BFC: Tensor) -> Tensor:
        """All frames at once: wav_BS with S = F * hop_length. One step and a flush."""
        chunk_BS, state = self.step(log_mel_BFC, self.init_state(log_mel_BFC.shape[0]))
        return torch.cat([chunk_BS, self.flush(state)], dim=1)

    def init_state(self, batch_size: int) -> tuple[Any, ...]:
        """State before the first frame."""
        return self._layers().init_state(batch_size)

    def step(self, log_mel_BFC: Tensor, state: tuple[Any, ...]) -> tuple[Tensor, tuple[Any, ...]]:
        """F >= 1 more frames to the samples that no later frame changes, (B, S), S >= 0."""
        wav_B1S, state = self._layers().step(log_mel_BFC.transpose(1, 2), state, last=False)
        return wav_B1S[:, 0], state

    def flush(self, state: tuple[Any, ...]) -> Tensor:
        """The samples still owed."""
        past_BCP = state[0].past_BCP  # of the first convolution
        return self._layers().step(past_BCP[:, :, :0], state, last=True)[0][:, 0]

    def _layers(self) -> Chain:
        backbone = self.backbone
        layers: list[Layer] = [Conv(backbone.embed, 3, 3), Pointwise(_over_channels(backbone.norm))]
        layers += [_block(block) for block in backbone.convnext]
        return Chain([*layers, Pointwise(_over_channels(backbone.final_layer_norm)), Istft(self.head)])


def _over_channels(module: nn.Module) -> Any:
    return lambda x_BCT: module(x_BCT.transpose(1, 2)).transpose(1, 2)


def _block(block: ConvNeXtBlock) -> Residual:
    def mix(x_BCT: Tensor) -> Tensor:
        y_BTC = block.pwconv2(block.act(block.pwconv1(block.norm(x_BCT.transpose(1, 2)))))
        return (y_BTC if block.gamma is None else block.gamma * y_BTC).transpose(1, 2)

    return Residual(Chain([Conv(block.dwconv, 3, 3), Pointwise(mix)]))


class VocosMelConfig(PreTrainedConfig):
    """Configuration of `VocosMelTokenizer`; the defaults are those of `vocos-mel-24khz`.

    Args:
        mel: dict of `MelConfig` (or one); its floor is vocos' own unless given.
        frames_per_token: r, mel frames in one speech token.
        dim, intermediate_dim, num_layers: of vocos' backbone.

    Raises:
        ValueError: an unknown key or a bad value.
    """

    model_type = "flowomni_vocos_mel"

    def __init__(
        self,
        mel: Any = None,
        frames_per_token: int = 8,
        dim: int = 512,
        intermediate_dim: int = 1536,
        num_layers: int = 8,
        **kwargs: Any,
    ):
        check_keys(VocosMelConfig, kwargs, "speech_tokenizer.")
        if mel is None or isinstance(mel, dict):
            mel = {"floor": VOCOS_FLOOR} | (mel or {})
        self.mel = dataclasses.asdict(strict(MelConfig, mel, "mel"))
        self.frames_per_token = frames_per_token
        self.dim, self.intermediate_dim, self.num_layers = dim, intermediate_dim, num_layers
        for name in ("frames_per_token", "dim", "intermediate_dim", "num_layers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        super().__init__(**kwargs)

    @property
    def lookahead_frames(self) -> int:
        """Mel frames after its own on which a frame's samples depend: 29 for `vocos-mel-24khz`."""
        return -(-self.token_spec.lookahead_samples // self.mel["hop_length"])

    @property
    def token_spec(self) -> TokenSpec:
        """The spec of the tokenizer that this config describes."""
        mel = self.mel
        return TokenSpec(
            kind="continuous",
            dim=self.frames_per_token * mel["num_mels"],
            num_codebooks=0,
            codebook_size=0,
            sample_rate_hz=mel["sample_rate_hz"],
            samples_per_token=self.frames_per_token * mel["hop_length"],
            lookahead_samples=3 * (1 + self.num_layers) * mel["hop_length"] + mel["n_fft"] // 2,
        )


class VocosMelTokenizer(SpeechTokenizer):
    """Continuous speech tokens that are patches of standardised log-mel, heard through the public vocos.

    `VocosMelTokenizer.from_vocos("charactr/vocos-mel-24khz")` makes one; `front.fit_statistics` gives its tokens zero
    mean and unit variance.
    """

    config_class = VocosMelConfig
    base_model_prefix = "speech_tokenizer"
    main_input_name = "wav_BS"

    def __init__(self, config: VocosMelConfig):
        super().__init__(config)
        mel = strict(MelConfig, config.mel, "mel")
        self.front = MelFront(mel)
        self.vocoder = PublicVocos(
            config.dim, config.intermediate_dim, config.num_layers, mel.num_mels, mel.n_fft, mel.hop_length
        )
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing: every layer initialises itself; transformers' default would undo that."""

    @classmethod
    def from_vocos(cls, path: str, frames_per_token: int = 8) -> Self:
        """From a folder or Hub id with vocos' own `config.yaml` and `pytorch_model.bin`.

        Raises:
            ValueError: a file is missing or damaged, or it is another kind of vocos; names the path and the field.
        """
        vocos, sections = _load_vocos(path)
        features, backbone = sections["feature_extractor"], sections["backbone"]
        names = {"sample_rate": "sample_rate_hz", "n_fft": "n_fft", "hop_length": "hop_length", "n_mels": "num_mels"}
        mel = {ours: features[theirs] for theirs, ours in names.items() if theirs in features}
        sizes = {name: backbone[name] for name in ("dim", "intermediate_dim", "num_layers")}
        tokenizer = cls(VocosMelConfig(mel, frames_per_token, **sizes))
        tokenizer.vocoder.backbone.load_state_dict(vocos.backbone.state_dict())
        tokenizer.vocoder.head.load_state_dict(vocos.head.state_dict())
        return tokenizer.eval()

    def encode(self, wav_BS: Tensor, lengths_B: Tensor | None = None) -> tuple[Tensor, Tensor]:
        num_samples, per_token = wav_BS.shape[1], self.spec.samples_per_token
        if lengths_B is None:
            lengths_B = torch.full((wav_BS.shape[0],), num_samples, device=wav_BS.device)
        inside_BS = torch.arange(num_samples, device=wav_BS.device) < lengths_B[:, None]
        num_tokens = -(-num_samples // per_token)
        mask_BL = torch.arange(num_tokens, device=wav_BS.device) < (-(-lengths_B // per_token))[:, None]
        mel_BFC = self.front(torch.where(inside_BS, wav_BS, 0.0), num_tokens * self.config.frames_per_token)
        latent_BLD = patchify(mel_BFC, self.config.frames_per_token)
        return torch.where(mask_BL[..., None], latent_BLD, 0.0), mask_BL

    def init_state(self, batch_size: int) -> tuple[Any, ...]:
        return self.vocoder.init_state(batch_size)

    def step(self, latent_BLD: Tensor, state: tuple[Any, ...]) -> tuple[Tensor, tuple[Any, ...]]:
        mel_BFC = unpatchify(latent_BLD, self.config.frames_per_token)
        return self.vocoder.step(self.front.unstandardise(mel_BFC), state)

    def flush(self, state: tuple[Any, ...]) -> Tensor:
        return self.vocoder.flush(state)


def _load_vocos(path: str) -> tuple[Vocos, dict[str, dict[str, Any]]]:
    """vocos' own model, and the arguments of its parts by name."""
    files = []
    for name in ("config.yaml", "pytorch_model.bin"):
        file = Path(path) / name
        if Path(path).is_dir() and not file.is_file():
            raise ValueError(f"{path} has no {name}: give a folder as vocos publishes its checkpoints")
        try:
            files.append(file if file.is_file() else Path(hf_hub_download(path, name)))
        except (OSError, ValueError) as error:
            raise ValueError(f"{path}: no {name} there ({' '.join(str(error).split())[:200]})") from None
    config_file, weights_file = files
    sections = yaml.safe_load(config_file.read_text(encoding="utf-8"))
    for name, wanted in CLASSES.items():  # before vocos imports whatever class the file names
        section = sections.get(name) if isinstance(sections, dict) else None
        found = section.get("class_path") if isinstance(section, dict) else None
        if found != wanted:
            raise ValueError(f"{config_file}: {name}.class_path is {found!r}; only {wanted} streams here")
    arguments = {name: sections[name].get("init_args", {}) for name in CLASSES}
    if arguments["backbone"].get("adanorm_num_embeddings") is not None:
        raise ValueError(f"{config_file}: backbone.adanorm_num_embeddings is set: it wants a bandwidth, not mel alone")
    for name, default in (("feature_extractor", "center"), ("head", "same")):
        padding = arguments[name].get("padding", default)
        if padding != "center":
            raise ValueError(f"{config_file}: {name}.padding is {padding!r}; only 'center' streams here")
    vocos = Vocos.from_hparams(str(config_file))
    try:
        vocos.load_state_dict(torch.load(weights_file, map_location="cpu", weights_only=True))
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{weights_file} does not fit {config_file.name}: {reason}") from None
    return vocos, arguments


AutoConfig.register(VocosMelConfig.model_type, VocosMelConfig, exist_ok=True)
AutoModel.register(VocosMelConfig, VocosMelTokenizer, exist_ok=True)
