"""The mel front: vocos' log-mel of 24 kHz audio, standardised per bin.

Shapes: B batch, S samples, F mel frames, C mel bins.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.nn import functional

from .._torchaudio import require_torchaudio

require_torchaudio()
from vocos.feature_extractors import MelSpectrogramFeatures  # noqa: E402


@dataclass(frozen=True)
class MelConfig:
    """The log-mel of the public `vocos-mel-24khz` checkpoint.

    Attributes:
        sample_rate_hz, n_fft, hop_length, num_mels: of the magnitude mel spectrogram (Hann window of n_fft samples).
        floor: mel magnitudes below it count as silence, so that digital zero is not far outside what speech is.
    """

    sample_rate_hz: int = 24000
    n_fft: int = 1024
    hop_length: int = 256
    num_mels: int = 100
    floor: float = 1e-5

    def __post_init__(self) -> None:
        for name in ("sample_rate_hz", "n_fft", "hop_length", "num_mels"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        # with less overlap the wave's last samples lie where the window is almost zero and cannot be recovered
        if self.hop_length * 8 > self.n_fft * 3:
            raise ValueError(f"hop_length is {self.hop_length} but n_fft is {self.n_fft}; use at most 3/8 of n_fft")
        if self.floor <= 0:
            raise ValueError(f"floor is {self.floor}; it must be above 0")


# Not a submodule: its buffers are constants of the config, which a checkpoint need not carry, a half-precision cast
# must not touch, and which cannot be built on the meta device that `from_pretrained` builds on.
@lru_cache(maxsize=8)
def _vocos_features(config: MelConfig, device: torch.device) -> MelSpectrogramFeatures:
    with torch.device("cpu"):
        features = MelSpectrogramFeatures(config.sample_rate_hz, config.n_fft, config.hop_length, config.num_mels)
    return features.to(device)


class MelFront(nn.Module):
    """Wave to standardised log-mel; the statistics are float32 buffers saved with the weights."""

    mean_C: Tensor
    std_C: Tensor

    def __init__(self, config: MelConfig):
        super().__init__()
        self.config = config
        self.register_buffer("mean_C", torch.zeros(config.num_mels, dtype=torch.float32))
        self.register_buffer("std_C", torch.ones(config.num_mels, dtype=torch.float32))

    def log_mel(self, wav_BS: Tensor, num_frames: int) -> Tensor:
        """Log-mel of the first `num_frames` frames, (B, F, C) float32, not standardised.

        Equal to vocos' features above the floor. Frame i is centred at sample i * hop_length; the wave is continued by
        zeros on the right, so that a row does not depend on how far it is padded.
        """
        needed = num_frames * self.config.hop_length + self.config.n_fft
        with torch.autocast(wav_BS.device.type, enabled=False):
            wav_BS = functional.pad(wav_BS.float(), (0, max(0, needed - wav_BS.shape[1])))[:, :needed]
            mel_BCF = _vocos_features(self.config, wav_BS.device)(wav_BS)[:, :, :num_frames]
        return mel_BCF.transpose(1, 2).clamp(min=torch.tensor(self.config.floor).log().item())

    def standardise(self, log_mel_BFC: Tensor) -> Tensor:
        """Log-mel to zero mean and unit variance per bin."""
        return (log_mel_BFC - self.mean_C) / self.std_C

    def unstandardise(self, mel_BFC: Tensor) -> Tensor:
        """The inverse of `standardise`."""
        return mel_BFC * self.std_C + self.mean_C

    def forward(self, wav_BS: Tensor, num_frames: int) -> Tensor:
        """Standardised log-mel of the first `num_frames` frames, (B, F, C)."""
        return self.standardise(self.log_mel(wav_BS, num_frames))

    @torch.no_grad()
    def fit_statistics(self, log_mels_FC: Iterable[Tensor]) -> None:
        """Set the statistics from log-mels of shape (F, C), one per utterance."""
        count, total_C, square_C = 0, torch.zeros_like(self.mean_C).double(), torch.zeros_like(self.mean_C).double()
        for log_mel_FC in log_mels_FC:
            count += log_mel_FC.shape[0]
            total_C += log_mel_FC.double().sum(0)
            square_C += log_mel_FC.double().square().sum(0)
        assert count > 1
        mean_C = total_C / count
        self.mean_C.copy_(mean_C)
        self.std_C.copy_((square_C / count - mean_C.square()).clamp(min=1e-4).sqrt())
