"""What survives a tokenizer: word information, intelligibility, quality, mel distance, and their intervals."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import astuple
from importlib.util import find_spec
from pathlib import Path

import jiwer
import numpy as np
import pytest
import soundfile

from flowomni.evaluation.resynthesis import (
    Fidelity,
    fidelity,
    fidelity_intervals,
    mel_distance,
    word_information,
    word_information_interval,
)
from flowomni.evaluation.shifts import Shift

needs_flite = pytest.mark.skipif(shutil.which("flite") is None, reason="needs sudo apt-get install flite")
needs_pesq = pytest.mark.skipif(find_spec("pesq") is None, reason="needs a C compiler and pip install pesq")
RATE_HZ = 16_000


@pytest.fixture(scope="module")
def spoken_S(tmp_path_factory: pytest.TempPathFactory) -> np.ndarray:
    file = tmp_path_factory.mktemp("spoken") / "a.wav"
    subprocess.run(["flite", "-voice", "slt", "-t", "the answer to your question is seven", "-o", file], check=True)
    wav_S, rate_hz = soundfile.read(file, dtype="float32")
    assert rate_hz == RATE_HZ
    return wav_S


def noisy(wav_S: np.ndarray, snr_db: float) -> np.ndarray:
    return Shift("noise", snr_db)(wav_S, RATE_HZ, np.random.default_rng(0))


# --- words ----------------------------------------------------------------------------------------------------------


def test_word_information_is_jiwers() -> None:
    references = ["a b c", "a b", "c d e f", "a"]
    hypotheses = ["a x c d", "", "c d f e", "a"]
    found = word_information(references, hypotheses)
    assert found.hits_N.tolist() == [2, 0, 3, 1]
    assert found.lost == pytest.approx(jiwer.process_words(references, hypotheses).wil)


def test_word_information_without_words() -> None:
    assert word_information(["a b"], [""]).lost == 1.0
    assert word_information(["a", ""], ["a", "b"]).lost == pytest.approx(1 - 1 / 1 * 1 / 2)  # an inserted word
    assert word_information_interval(word_information([], [])).num == 0
    with pytest.raises(ValueError, match="2 references, but 1 hypotheses"):
        word_information(["a", "b"], ["a"])


def test_word_information_interval_forms_the_ratio_after_drawing() -> None:
    references = ["a b c d"] * 30
    hypotheses = ["a b c d"] * 20 + ["a x"] * 10
    found = word_information(references, hypotheses)
    interval = word_information_interval(found)
    assert interval.value == pytest.approx(found.lost) and interval.num == 30
    assert interval.low < interval.value < interval.high
    assert interval == word_information_interval(found)  # a pure function
    certain = word_information_interval(word_information(["a b"] * 5, ["a b"] * 5))
    assert (certain.value, certain.low, certain.high) == (0.0, 0.0, 0.0)


# --- signals --------------------------------------------------------------------------------------------------------


@needs_flite
@needs_pesq
def test_the_original_is_perfect_and_noise_makes_every_score_worse(spoken_S: np.ndarray) -> None:
    perfect = fidelity(spoken_S, spoken_S, RATE_HZ)
    assert perfect.stoi == pytest.approx(1.0) and perfect.pesq > 4.6 and perfect.mel_distance == 0.0
    scores = [perfect, *(fidelity(spoken_S, noisy(spoken_S, snr_db), RATE_HZ) for snr_db in (30, 10, 0))]
    for better, worse in zip(scores, scores[1:], strict=False):
        assert better.stoi > worse.stoi and better.pesq > worse.pesq and better.mel_distance < worse.mel_distance


@needs_flite
@needs_pesq
def test_a_padded_last_token_does_not_count(spoken_S: np.ndarray) -> None:
    assert fidelity(spoken_S, np.pad(spoken_S, (0, 700)), RATE_HZ) == fidelity(spoken_S, spoken_S, RATE_HZ)


@needs_flite
@needs_pesq
def test_silence_is_the_worst_and_no_original_no_score(spoken_S: np.ndarray) -> None:
    silent = fidelity(spoken_S, np.zeros_like(spoken_S), RATE_HZ)
    assert (silent.stoi, silent.pesq) == (0.0, 1.0)
    of_nothing = fidelity(np.zeros_like(spoken_S), spoken_S, RATE_HZ)
    too_short = fidelity(spoken_S[8000:10_000], spoken_S[8000:10_000], RATE_HZ)
    for found in (of_nothing, too_short):
        assert np.isnan(found.stoi) and np.isnan(found.pesq) and np.isfinite(found.mel_distance)


@needs_pesq
@pytest.mark.parametrize("bad", [[], [np.nan] * 10], ids=["empty", "nan"])
def test_bad_clips_are_refused(bad: list[float]) -> None:
    with pytest.raises(ValueError, match="must hold samples, none of them NaN"):
        fidelity(np.zeros(10, np.float32), np.array(bad, np.float32), RATE_HZ)


def test_mel_distance_of_a_louder_clip_is_its_gain() -> None:
    wav_S = 0.05 * np.random.default_rng(0).standard_normal(24_000).astype(np.float32)
    assert mel_distance(wav_S, 2.0 * wav_S, 24_000) == pytest.approx(np.log(2.0), rel=1e-3)


def test_intervals_leave_out_what_is_not_defined() -> None:
    found = fidelity_intervals([Fidelity(0.5, float("nan"), 1.0), Fidelity(0.7, 2.0, 3.0), Fidelity(0.6, 4.0, 2.0)])
    assert [(each.value, each.num) for each in found.values()] == [(pytest.approx(0.6), 3), (3.0, 2), (2.0, 3)]
    assert list(found) == ["stoi", "pesq", "mel_distance"] and len(astuple(found["stoi"])) == 4


def test_the_compiled_package_is_asked_for_by_name() -> None:
    """PESQ alone needs a compiler, so it is an extra, and the message tells how to get it."""
    assert "pesq = [" in Path("pyproject.toml").read_text()
