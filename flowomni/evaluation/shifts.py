"""Speech as a tokenizer never heard it: other pitch, other speed, noise.

Pitch and speed are changed apart from each other by Signalsmith Stretch (package python-stretch): a shift of pitch
keeps the duration, a change of speed keeps the pitch. With the pitch the formants move too, as with a smaller or larger
speaker.

Shape legend: S samples.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Shift:
    """One way in which speech is altered.

    Law: a pure function of its arguments; the amount 0 of pitch and 1 of speed alter nothing.

    Attributes:
        kind: "pitch" (amount in semitones), "speed" (a factor; above 1 is faster), "noise" (signal-to-noise ratio in
            dB) or "none".
        amount: how much.
    """

    kind: str
    amount: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in _KINDS:
            raise ValueError(f"kind is {self.kind!r}; it must be one of {', '.join(_KINDS)}")
        if self.kind == "speed" and self.amount <= 0:
            raise ValueError(f"speed is {self.amount}; it must be above 0")

    @property
    def name(self) -> str:
        """Such as "pitch +4", "speed 0.8", "noise 20 dB" or "none"."""
        forms = {"pitch": "pitch {:+g}", "speed": "speed {:g}", "noise": "noise {:g} dB", "none": "none"}
        return forms[self.kind].format(self.amount)

    def __call__(self, wav_S: np.ndarray, sample_rate_hz: int, generator: np.random.Generator) -> np.ndarray:
        """A mono float32 clip, altered; scaled down as a whole where it would exceed full scale.

        Args:
            generator: draws the noise.

        Raises:
            ValueError: a sample is NaN or infinite.
        """
        wav_S = np.asarray(wav_S, dtype=np.float32)
        assert wav_S.ndim == 1, f"mono audio has one dimension, not shape {wav_S.shape}"
        if not np.isfinite(wav_S).all():
            raise ValueError("the audio to alter holds NaN or infinite samples")
        altered_S = _KINDS[self.kind](wav_S, sample_rate_hz, self.amount, generator)
        return altered_S / max(1.0, float(np.abs(altered_S).max(initial=0.0)))


def _none(wav_S: np.ndarray, sample_rate_hz: int, amount: float, generator: np.random.Generator) -> np.ndarray:
    return wav_S


def _pitch(wav_S: np.ndarray, sample_rate_hz: int, semitones: float, generator: np.random.Generator) -> np.ndarray:
    stretched_S = _stretch(wav_S, sample_rate_hz, semitones=semitones)
    assert len(stretched_S) == len(wav_S)
    return stretched_S


def _speed(wav_S: np.ndarray, sample_rate_hz: int, factor: float, generator: np.random.Generator) -> np.ndarray:
    return _stretch(wav_S, sample_rate_hz, factor=factor)


def _stretch(wav_S: np.ndarray, sample_rate_hz: int, semitones: float = 0.0, factor: float = 1.0) -> np.ndarray:
    if (semitones == 0.0 and factor == 1.0) or not wav_S.any():
        return np.resize(wav_S, round(len(wav_S) / factor))  # nothing to alter; silence is as silent at another speed
    from python_stretch import Signalsmith

    stretch = Signalsmith.Stretch()
    stretch.preset(1, sample_rate_hz)
    stretch.setTransposeSemitones(semitones)
    stretch.setTimeFactor(factor)
    return np.asarray(stretch.process(np.ascontiguousarray(wav_S[None])))[0]


def _noise(wav_S: np.ndarray, sample_rate_hz: int, snr_db: float, generator: np.random.Generator) -> np.ndarray:
    """White Gaussian noise, its power so far below that of the whole clip."""
    power = float(np.mean(wav_S.astype(np.float64) ** 2)) if wav_S.size else 0.0
    scale = np.sqrt(power / 10 ** (snr_db / 10))
    return (wav_S + scale * generator.standard_normal(len(wav_S))).astype(np.float32)


_KINDS: dict[str, Callable[[np.ndarray, int, float, np.random.Generator], np.ndarray]] = {
    "none": _none,
    "pitch": _pitch,
    "speed": _speed,
    "noise": _noise,
}

SHIFTS = (
    Shift("none"),
    *(Shift("pitch", semitones) for semitones in (-8, -4, 4, 8)),
    *(Shift("speed", factor) for factor in (0.8, 1.25)),
    *(Shift("noise", snr_db) for snr_db in (20, 10, 5, 0)),
)
