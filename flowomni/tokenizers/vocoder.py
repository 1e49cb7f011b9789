"""A causal Vocos: standardised log-mel frames to a wave, frame by frame, with a declared look-ahead.

The layers are vocos' own (`VocosBackbone`, `ISTFTHead`) under vocos' parameter names, so that its checkpoints load;
only the padding of the convolutions differs. Frames are centred: frame i stands at sample i * hop_length.

Shapes: B batch, F mel frames, C mel bins (or channels), S samples, N frequency bins.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional
from vocos.heads import ISTFTHead
from vocos.models import VocosBackbone

from .causal import causal_conv, causal_stack, init_past, init_pasts


@dataclass(frozen=True)
class VocoderConfig:
    """Sizes of the vocoder.

    Attributes:
        dim: channels of the ConvNeXt blocks.
        intermediate_dim: hidden width inside a block.
        num_layers: number of blocks.
        lookahead_frames: mel frames that the first convolution sees ahead (0 to 3).
    """

    dim: int = 256
    intermediate_dim: int = 768
    num_layers: int = 6
    lookahead_frames: int = 2

    def __post_init__(self) -> None:
        for name in ("dim", "intermediate_dim", "num_layers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if not 0 <= self.lookahead_frames <= 3:
            raise ValueError(f"lookahead_frames is {self.lookahead_frames}; it must be 0 to 3")


@dataclass(frozen=True)
class VocoderState:
    """Everything a stream carries from one `Vocoder.step` to the next.

    Attributes:
        embed_past_BCP: inputs the first convolution still needs.
        pasts: the same for each block, (B, C, P).
        tail_BS: windowed samples that later frames still add to, n_fft - hop_length of them.
        envelope_S: the squared window's overlap-add over the same span.
        trim_samples: samples before time zero that are yet to be dropped.
    """

    embed_past_BCP: Tensor
    pasts: tuple[Tensor, ...]
    tail_BS: Tensor
    envelope_S: Tensor
    trim_samples: int


class Vocoder(nn.Module):
    """Mel to wave: F frames give exactly F * hop_length samples.

    Args:
        config: sizes.
        num_mels, n_fft, hop_length: of the mel front; hop_length must not exceed 3/8 of n_fft.
    """

    def __init__(self, config: VocoderConfig, num_mels: int, n_fft: int, hop_length: int):
        super().__init__()
        assert hop_length * 8 <= n_fft * 3
        self.config = config
        self.n_fft, self.hop_length = n_fft, hop_length
        self.backbone = VocosBackbone(num_mels, config.dim, config.intermediate_dim, config.num_layers)
        self.head = ISTFTHead(config.dim, n_fft, hop_length, padding="center")
        # torch makes a periodic window as a view of a longer one, which safetensors refuses to load in place
        self.head.istft.window = self.head.istft.window.clone()

    @property
    def lookahead_samples(self) -> int:
        """After F frames, F * hop_length - lookahead_samples samples are out."""
        return self.config.lookahead_frames * self.hop_length + self.n_fft // 2

    def forward(self, mel_BFC: Tensor) -> Tensor:
        """All frames at once: wav_BS with S = F * hop_length. The same path as streaming: one step and a flush."""
        chunk_BS, state = self.step(mel_BFC, self.init_state(mel_BFC.shape[0]))
        return torch.cat([chunk_BS, self.flush(state)], dim=1)

    def init_state(self, batch_size: int) -> VocoderState:
        """State before the first frame."""
        overlap = self.n_fft - self.hop_length
        window_S = self.head.istft.window
        return VocoderState(
            embed_past_BCP=init_past(self.backbone.embed, batch_size, self.config.lookahead_frames),
            pasts=init_pasts(self.backbone.convnext, batch_size),
            tail_BS=torch.zeros(batch_size, overlap, device=window_S.device),
            envelope_S=torch.zeros(overlap, device=window_S.device),
            trim_samples=self.n_fft // 2,
        )

    def step(self, mel_BFC: Tensor, state: VocoderState) -> tuple[Tensor, VocoderState]:
        """Take F >= 1 more standardised frames; give the samples that no later frame changes, (B, S), S >= 0."""
        return self.trim(*self.extend(mel_BFC, state), state.trim_samples)

    def extend(self, mel_BFC: Tensor, state: VocoderState) -> tuple[Tensor, VocoderState]:
        """What `step` does, but for the trimming: samples before time zero are among those that are final."""
        hidden_BCF, embed_past = causal_conv(self.backbone.embed, mel_BFC.transpose(1, 2), state.embed_past_BCP)
        hidden_BCF = self.backbone.norm(hidden_BCF.transpose(1, 2)).transpose(1, 2)
        hidden_BCF, pasts = causal_stack(self.backbone.convnext, hidden_BCF, state.pasts)
        hidden_BFC = self.backbone.final_layer_norm(hidden_BCF.transpose(1, 2))
        if hidden_BFC.shape[1] == 0:
            return state.tail_BS[:, :0], VocoderState(embed_past, pasts, state.tail_BS, state.envelope_S, 0)
        sum_BS, envelope_S = self._overlap_add(self._windowed(hidden_BFC), state)
        final = hidden_BFC.shape[1] * self.hop_length
        # empty at the first sample, which is trimmed: 0 / 0 there would come back as a gradient
        final_S = torch.where(envelope_S[:final] > 0, envelope_S[:final], 1.0)
        wav_BS = sum_BS[:, :final] / final_S
        return wav_BS, VocoderState(embed_past, pasts, sum_BS[:, final:], envelope_S[final:], 0)

    def trim(self, wav_BS: Tensor, state: VocoderState, trim_samples: int) -> tuple[Tensor, VocoderState]:
        """Drop what is left of the `trim_samples` samples before time zero."""
        trim = min(trim_samples, wav_BS.shape[1])
        return wav_BS[:, trim:], replace(state, trim_samples=trim_samples - trim)

    def flush(self, state: VocoderState) -> Tensor:
        """The samples still owed: the look-ahead is filled with zeros, the mean of standardised mel."""
        batch_size, num_mels = state.embed_past_BCP.shape[:2]
        num_ahead = self.config.lookahead_frames
        chunk_BS = state.tail_BS[:, :0]
        if num_ahead > 0:
            chunk_BS, state = self.step(state.embed_past_BCP.new_zeros(batch_size, num_ahead, num_mels), state)
        half = self.n_fft // 2
        # No frame has come out yet exactly where the envelope is empty; then nothing is owed.
        end = half if bool(state.envelope_S[-1] > 0) else 0
        trim = min(state.trim_samples, end)
        return torch.cat([chunk_BS, state.tail_BS[:, trim:end] / state.envelope_S[trim:end]], dim=1)

    def _windowed(self, hidden_BFC: Tensor) -> Tensor:
        """The windowed inverse FFT of each frame, (B, n_fft, F), as `ISTFTHead` has it; float32 under autocast too."""
        with torch.autocast(hidden_BFC.device.type, enabled=False):
            log_magnitude_BNF, phase_BNF = self.head.out(hidden_BFC.float()).float().transpose(1, 2).chunk(2, dim=1)
            magnitude_BNF = torch.clip(torch.exp(log_magnitude_BNF), max=1e2)
            spectrum_BNF = torch.polar(magnitude_BNF, phase_BNF)
            frames_BSF = torch.fft.irfft(spectrum_BNF, self.n_fft, dim=1)
            return frames_BSF * self.head.istft.window[:, None]

    def _overlap_add(self, frames_BSF: Tensor, state: VocoderState) -> tuple[Tensor, Tensor]:
        """Add frames and squared windows onto the state's tails: (B, F * hop + n_fft - hop) and its envelope."""
        num_frames = frames_BSF.shape[2]
        window_S = self.head.istft.window
        envelope_S = self._fold(window_S.square()[None, :, None].expand(1, -1, num_frames))[0]
        sum_BS = self._fold(frames_BSF)
        grow = (0, num_frames * self.hop_length)
        return sum_BS + functional.pad(state.tail_BS, grow), envelope_S + functional.pad(state.envelope_S, grow)

    def _fold(self, frames_BSF: Tensor) -> Tensor:
        num_rows, n_fft, num_frames = frames_BSF.shape
        if n_fft % self.hop_length == 0:  # as sums of shifted pieces, which compile to one loop
            num_pieces = n_fft // self.hop_length
            pieces = frames_BSF.reshape(num_rows, num_pieces, self.hop_length, num_frames).transpose(2, 3).unbind(1)
            shifted = [functional.pad(p_BFS, (0, 0, i, num_pieces - 1 - i)) for i, p_BFS in enumerate(pieces)]
            return torch.stack(shifted).sum(0).flatten(1)
        length = (num_frames - 1) * self.hop_length + n_fft
        return functional.fold(frames_BSF, (1, length), (1, n_fft), stride=(1, self.hop_length))[:, 0, 0]
