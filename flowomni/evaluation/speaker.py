"""Whose voice it is: the embedding of the network that the `resemblyzer` package carries (GE2E, arXiv 1710.10467).

That package's own code needs librosa and a compiled voice activity detector; here only its weights are read.

Shape legend: S samples, F mel frames, C mel bins, W windows, E embedding.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import nn

from ..audio import resample

SPEAKER_RATE_HZ = 16_000
_WINDOW_FRAMES, _HOP_SAMPLES, _FFT_SAMPLES, _NUM_MELS, _WIDTH = 160, 160, 400, 40, 256
_STEP_FRAMES = 77  # 1.3 windows a second
_LEAST_FILLED = 0.75  # of the last window
_LOUDNESS_DB = -30.0


def speaker_network() -> Path | None:
    """The network's file; None where it is not installed: pip install --no-deps resemblyzer."""
    spec = find_spec("resemblyzer")
    folders = (spec.submodule_search_locations if spec else None) or []
    found = [path for folder in folders if (path := Path(folder, "pretrained.pt")).is_file()]
    return found[0] if found else None


class SpeakerEncoder:
    """Embeds clips one after the other; the cosine of two embeddings is near 1 for one speaker.

    Differs from the package in that pauses stay, which it cuts out.

    Raises:
        ValueError: the network is not installed.
    """

    def __init__(self) -> None:
        import torchaudio

        path = speaker_network()
        if path is None:
            raise ValueError("the speaker network is not installed: pip install --no-deps resemblyzer")
        state = torch.load(path, map_location="cpu", weights_only=True)["model_state"]
        self._lstm = nn.LSTM(_NUM_MELS, _WIDTH, 3, batch_first=True)
        self._linear = nn.Linear(_WIDTH, _WIDTH)
        for name, module in (("lstm", self._lstm), ("linear", self._linear)):
            module.load_state_dict(
                {key.removeprefix(f"{name}."): value for key, value in state.items() if key.startswith(f"{name}.")}
            )
        self._mel = torchaudio.transforms.MelSpectrogram(
            SPEAKER_RATE_HZ,
            n_fft=_FFT_SAMPLES,
            hop_length=_HOP_SAMPLES,
            n_mels=_NUM_MELS,
            norm="slaney",
            mel_scale="slaney",
            pad_mode="constant",
        )

    @torch.inference_mode()
    def embed(self, wav_S: np.ndarray, sample_rate_hz: int) -> np.ndarray | None:
        """The embedding [E] of a mono float32 clip, of length 1; None of silence."""
        wav_S = resample(np.asarray(wav_S, np.float32), sample_rate_hz, SPEAKER_RATE_HZ)
        loudness = float(np.sqrt(np.mean(wav_S.astype(np.float64) ** 2))) if len(wav_S) else 0.0
        if loudness < 1e-6:
            return None
        wav_S = wav_S * max(1.0, 10 ** (_LOUDNESS_DB / 20) / loudness)
        num_frames = -(-(len(wav_S) + 1) // _HOP_SAMPLES)
        starts = list(range(0, max(1, num_frames - _WINDOW_FRAMES + _STEP_FRAMES + 1), _STEP_FRAMES))
        last = len(wav_S) - starts[-1] * _HOP_SAMPLES
        if len(starts) > 1 and last < _LEAST_FILLED * _WINDOW_FRAMES * _HOP_SAMPLES:
            starts.pop()
        wav_S = np.pad(wav_S, (0, max(0, (starts[-1] + _WINDOW_FRAMES) * _HOP_SAMPLES - len(wav_S))))
        mel_FC = self._mel(torch.from_numpy(np.ascontiguousarray(wav_S, np.float32))).T
        _, (hidden, _) = self._lstm(torch.stack([mel_FC[start : start + _WINDOW_FRAMES] for start in starts]))
        each_WE = nn.functional.normalize(self._linear(hidden[-1]).relu(), dim=1)
        return nn.functional.normalize(each_WE.mean(0), dim=0).numpy()
