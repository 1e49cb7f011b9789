"""A picture of sound: its log-mel spectrogram, alone or inside a larger figure.

Shapes: S samples, F mel frames, C mel bins.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ..tokenizers.mel import MelConfig, MelFront


def draw_mel(axes: Axes, wav_S: np.ndarray, sample_rate_hz: int) -> None:
    """Draw the log-mel of mono float32 audio, in seconds from its start."""
    config = MelConfig(sample_rate_hz=sample_rate_hz)
    num_frames = max(1, len(wav_S) // config.hop_length)
    mel_FC = MelFront(config).log_mel(torch.from_numpy(wav_S)[None], num_frames)[0]
    extent = (0.0, num_frames * config.hop_length / sample_rate_hz, 0.0, float(config.num_mels))
    axes.imshow(mel_FC.T.numpy(), origin="lower", aspect="auto", extent=extent, cmap="magma")


def write_spectrogram(path: str | Path, wav_S: np.ndarray, sample_rate_hz: int) -> None:
    """Write the picture of mono float32 audio as a png file."""
    figure = Figure(figsize=(max(2.5, 1.5 * len(wav_S) / sample_rate_hz), 1.8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    draw_mel(axes, wav_S, sample_rate_hz)
    axes.set_yticks([])
    axes.tick_params(labelsize=7)
    figure.savefig(path, format="png", dpi=90)
