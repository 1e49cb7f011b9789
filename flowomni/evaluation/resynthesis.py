"""How much of speech survives a tokenizer: its words, its intelligibility, its quality, its mel.

Every score compares with the original, sample by sample or word by word, and knows nothing about the speaker.

Shape legend: S samples, N clips.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cache
from typing import Any

import numpy as np

from ..audio import resample
from .metrics import Interval, bootstrap_interval, draws

_PESQ_RATE_HZ = 16_000
_PESQ_LOWEST = 1.0
_STOI_SHORTEST = "Not enough STFT frames"


@dataclass(frozen=True, eq=False)
class WordInformation:
    """Words of references, of hypotheses, and in both, by clip; all float64.

    Attributes:
        hits_N: words that are right.
        reference_words_N, hypothesis_words_N: all words.
    """

    hits_N: np.ndarray
    reference_words_N: np.ndarray
    hypothesis_words_N: np.ndarray

    @property
    def lost(self) -> float:
        """Word information lost, from 0 to 1; see `word_information`."""
        return float(_lost(self.hits_N.sum(), self.reference_words_N.sum(), self.hypothesis_words_N.sum()))


def word_information(references: Sequence[str], hypotheses: Sequence[str]) -> WordInformation:
    """What word information lost (WIL) is made of: 1 - hits / reference words * hits / hypothesis words (jiwer).

    The sums are over all clips before the ratio is taken, as jiwer does. An empty reference or hypothesis is allowed.
    Source: Morris, Maier, Green, "From WER and RIL to MER and WIL", Interspeech 2004.

    Raises:
        ValueError: the two differ in length.
    """
    import jiwer

    if len(references) != len(hypotheses):
        raise ValueError(f"{len(references)} references, but {len(hypotheses)} hypotheses: give one for each")
    hits = [
        jiwer.process_words(reference, hypothesis).hits if reference.split() else 0
        for reference, hypothesis in zip(references, hypotheses, strict=True)
    ]
    words = [[len(text.split()) for text in texts] for texts in (references, hypotheses)]
    return WordInformation(*(np.array(counts, dtype=np.float64) for counts in (hits, *words)))


def word_information_interval(
    information: WordInformation, *, minus: WordInformation | None = None, seed: int = 0
) -> Interval:
    """Word information lost with its 95 % percentile bootstrap interval over clips, as `bootstrap_interval`.

    Clips are drawn anew, with the same draws as there, and the sums are formed again before the ratio.

    Args:
        minus: of other hypotheses for the same clips, to be subtracted; both are resampled together.
    """
    num = len(information.hits_N)
    if num == 0 or information.reference_words_N.sum() == 0:
        return Interval(float("nan"), float("nan"), float("nan"), 0)
    draws_RN = draws(num, seed)
    lost_R = _lost(*(draws_RN @ getattr(information, field.name) for field in fields(information)))
    if minus is not None:
        assert len(minus.hits_N) == num, "one value a clip"
        lost_R = lost_R - _lost(*(draws_RN @ getattr(minus, field.name) for field in fields(minus)))
    low, high = np.quantile(lost_R[1:], [0.025, 0.975])
    return Interval(float(lost_R[0]), float(low), float(high), num)


def _lost(hits: Any, reference_words: Any, hypothesis_words: Any) -> Any:
    # Without any word on one side there is no hit, and everything is lost.
    return 1.0 - hits**2 / np.maximum(1.0, reference_words * hypothesis_words)


@dataclass(frozen=True)
class Fidelity:
    """How near a clip is to its original.

    Attributes:
        stoi: short-time objective intelligibility, from about 0 to 1; NaN where the original has less than about 0.4 s
            of sound in it.
        pesq: wide-band PESQ, an opinion score from 1 to 4.64; NaN where the original holds no utterance, or less than
            a quarter of a second.
        mel_distance: mean absolute difference of the natural log-mel.
    """

    stoi: float
    pesq: float
    mel_distance: float


def fidelity(original_S: np.ndarray, wav_S: np.ndarray, sample_rate_hz: int, with_pesq: bool = True) -> Fidelity:
    """Compare a mono float32 clip with its original, sample by sample: they must not be shifted in time.

    Of two lengths the shorter counts for both, for a tokenizer may pad its last token. Without `with_pesq` PESQ is NaN.

    Raises:
        ValueError: a clip has no sample, or one that is NaN or infinite; or there is no pesq package.
    """
    num_samples = min(len(original_S), len(wav_S))
    original_S, wav_S = (np.asarray(clip, dtype=np.float32)[:num_samples] for clip in (original_S, wav_S))
    assert original_S.ndim == wav_S.ndim == 1, "mono audio has one dimension"
    if num_samples == 0 or not (np.isfinite(original_S).all() and np.isfinite(wav_S).all()):
        raise ValueError("the clips to compare must hold samples, none of them NaN or infinite")
    return Fidelity(
        stoi=_stoi(original_S, wav_S, sample_rate_hz),
        pesq=_pesq(original_S, wav_S, sample_rate_hz) if with_pesq else float("nan"),
        mel_distance=mel_distance(original_S, wav_S, sample_rate_hz),
    )


def fidelity_intervals(found: Sequence[Fidelity]) -> dict[str, Interval]:
    """The mean of each score with its 95 % bootstrap interval, over the clips for which it is defined."""
    scores = {field.name: np.array([getattr(each, field.name) for each in found]) for field in fields(Fidelity)}
    return {name: bootstrap_interval(score_N[np.isfinite(score_N)]) for name, score_N in scores.items()}


def mel_distance(original_S: np.ndarray, wav_S: np.ndarray, sample_rate_hz: int) -> float:
    """Mean absolute difference of the log-mels (natural logarithm) that the tokenizers read: 100 bins at 24 kHz.

    Magnitudes below 1e-5 count as 1e-5, so that digital silence is not infinitely far from a faint noise.
    """
    import torch

    log_mel = _mel_front()
    rate_hz, hop = log_mel.config.sample_rate_hz, log_mel.config.hop_length
    clips = [torch.from_numpy(resample(clip, sample_rate_hz, rate_hz))[None] for clip in (original_S, wav_S)]
    num_frames = clips[0].shape[1] // hop + 1
    with torch.inference_mode():
        original_1FC, mel_1FC = (log_mel.log_mel(clip, num_frames) for clip in clips)
    return float((original_1FC - mel_1FC).abs().mean())


@cache
def _mel_front() -> Any:
    from ..tokenizers.mel import MelConfig, MelFront  # here, because it takes torchaudio and a second to load

    return MelFront(MelConfig())


def _stoi(original_S: np.ndarray, wav_S: np.ndarray, sample_rate_hz: int) -> float:
    """Source: Taal et al., "An Algorithm for Intelligibility Prediction", 2011; by pystoi."""
    from pystoi import stoi

    if not original_S.any():
        return float("nan")
    with warnings.catch_warnings():
        # Too short: pystoi warns and gives 1e-5, which would pass for a score.
        warnings.filterwarnings("error", message=_STOI_SHORTEST)
        try:
            return float(stoi(original_S.astype(np.float64), wav_S.astype(np.float64), sample_rate_hz))
        except RuntimeWarning:
            return float("nan")


def _pesq(original_S: np.ndarray, wav_S: np.ndarray, sample_rate_hz: int) -> float:
    """Wide-band PESQ (ITU-T P.862.2), by the pesq package."""
    try:
        from pesq import BufferTooShortError, NoUtterancesError, pesq
    except ImportError as error:
        raise ValueError(
            "PESQ needs the package pesq, which compiles on installation: "
            "install a C compiler, then pip install 'flowomni[pesq]'"
        ) from error

    original_S, wav_S = (resample(clip, sample_rate_hz, _PESQ_RATE_HZ) for clip in (original_S, wav_S))
    if not original_S.any():
        return float("nan")
    if not wav_S.any():  # of which the package would make NaN
        return _PESQ_LOWEST
    try:
        return float(pesq(_PESQ_RATE_HZ, original_S, wav_S, "wb"))
    except (BufferTooShortError, NoUtterancesError):
        return float("nan")
