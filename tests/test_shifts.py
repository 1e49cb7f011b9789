"""Altered speech: pitch keeps the duration, speed keeps the pitch, noise has its power."""

from __future__ import annotations

import numpy as np
import pytest

from flowomni.evaluation.shifts import SHIFTS, Shift

RATE_HZ = 24_000
F0_HZ = 220.0


def harmonics(seconds: float = 1.0, f0_hz: float = F0_HZ) -> np.ndarray:
    """A voice-like tone, silent in its first and last quarter."""
    time_S = np.arange(int(seconds * RATE_HZ)) / RATE_HZ
    tone_S = sum(np.sin(2 * np.pi * f0_hz * k * time_S) / k**2 for k in range(1, 6))
    tone_S[: len(tone_S) // 4] = tone_S[-(len(tone_S) // 4) :] = 0.0
    return (0.3 * tone_S).astype(np.float32)


def f0_hz(wav_S: np.ndarray) -> float:
    """The strongest frequency."""
    spectrum = np.abs(np.fft.rfft(wav_S * np.hanning(len(wav_S)), 1 << 18))
    return float(np.argmax(spectrum) * RATE_HZ / (1 << 18))


def sounding_sec(wav_S: np.ndarray) -> tuple[float, float]:
    """When the sound starts and ends."""
    energy_S = np.convolve(wav_S**2, np.ones(240) / 240, "same")
    loud = np.flatnonzero(energy_S > 0.1 * energy_S.max())
    return loud[0] / RATE_HZ, loud[-1] / RATE_HZ


def apply(shift: Shift, wav_S: np.ndarray, seed: int = 0) -> np.ndarray:
    return shift(wav_S, RATE_HZ, np.random.default_rng(seed))


@pytest.mark.parametrize("semitones", [-8, -4, 4, 8])
def test_pitch_moves_and_time_stays(semitones: int) -> None:
    wav_S = harmonics()
    shifted_S = apply(Shift("pitch", semitones), wav_S)
    assert len(shifted_S) == len(wav_S)
    assert f0_hz(shifted_S) == pytest.approx(F0_HZ * 2 ** (semitones / 12), rel=0.02)
    assert sounding_sec(shifted_S) == pytest.approx(sounding_sec(wav_S), abs=0.02)


@pytest.mark.parametrize("factor", [0.8, 1.25])
def test_speed_changes_time_and_pitch_stays(factor: float) -> None:
    wav_S = harmonics()
    shifted_S = apply(Shift("speed", factor), wav_S)
    assert len(shifted_S) == round(len(wav_S) / factor)
    assert f0_hz(shifted_S) == pytest.approx(F0_HZ, rel=0.01)
    assert sounding_sec(shifted_S) == pytest.approx([sec / factor for sec in sounding_sec(wav_S)], abs=0.02)


@pytest.mark.parametrize("snr_db", [20, 10, 5, 0])
def test_noise_has_the_power_that_its_name_says(snr_db: int) -> None:
    wav_S = 0.1 * harmonics()
    noise_S = apply(Shift("noise", snr_db), wav_S) - wav_S
    assert 10 * np.log10(np.mean(wav_S**2) / np.mean(noise_S**2)) == pytest.approx(snr_db, abs=0.2)


def test_what_exceeds_full_scale_is_scaled_as_a_whole() -> None:
    wav_S = 3.0 * harmonics()
    wav_S /= np.abs(wav_S).max()
    loud_S, quiet_S = apply(Shift("noise", 0), wav_S), apply(Shift("noise", 0), 0.1 * wav_S)
    assert np.abs(loud_S).max() == pytest.approx(1.0)
    np.testing.assert_allclose(loud_S, quiet_S / np.abs(quiet_S).max(), atol=1e-6)  # not clipped


@pytest.mark.parametrize("shift", SHIFTS, ids=lambda shift: shift.name)
def test_a_shift_is_a_pure_function(shift: Shift) -> None:
    wav_S = harmonics(0.3)
    kept_S = wav_S.copy()
    first_S = apply(shift, wav_S)
    np.testing.assert_array_equal(first_S, apply(shift, wav_S))
    np.testing.assert_array_equal(wav_S, kept_S)
    assert first_S.dtype == np.float32
    if shift.kind == "noise":
        assert not np.array_equal(first_S, apply(shift, wav_S, seed=1))


@pytest.mark.parametrize("shift", [Shift("none"), Shift("pitch", 0), Shift("speed", 1)], ids=lambda shift: shift.name)
def test_nothing_to_alter_alters_nothing(shift: Shift) -> None:
    wav_S = harmonics(0.3)
    np.testing.assert_array_equal(apply(shift, wav_S), wav_S)


@pytest.mark.parametrize("shift", SHIFTS, ids=lambda shift: shift.name)
@pytest.mark.parametrize("num_samples", [0, 1, 500])
def test_very_short_clips_and_silence_pass(shift: Shift, num_samples: int) -> None:
    expected = round(num_samples / shift.amount) if shift.kind == "speed" else num_samples
    for wav_S in (harmonics()[10_000 : 10_000 + num_samples], np.zeros(num_samples, np.float32)):
        altered_S = apply(shift, wav_S)
        assert len(altered_S) == expected
        assert np.isfinite(altered_S).all() and (wav_S.any() or not altered_S.any())


def test_names_tell_the_shifts_apart() -> None:
    names = [shift.name for shift in SHIFTS]
    assert names[:4] == ["none", "pitch -8", "pitch -4", "pitch +4"]
    assert names[-1] == "noise 0 dB" and "speed 0.8" in names
    assert len(set(names)) == len(SHIFTS) == 11


def test_bad_shifts_are_refused() -> None:
    with pytest.raises(ValueError, match="kind is 'tempo'"):
        Shift("tempo", 1.0)
    with pytest.raises(ValueError, match="speed is 0"):
        Shift("speed", 0.0)
    with pytest.raises(ValueError, match="NaN"):
        apply(Shift("pitch", 4), np.full(100, np.nan, np.float32))
