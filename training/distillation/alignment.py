"""When each word of a transcript is spoken: as a manifest says, or by forced alignment.

The aligner is pocketsphinx, which carries its English model.

Shape legend: S samples.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from flowomni.audio import resample
from flowomni.evaluation.recognise import RECOGNISER_RATE_HZ

from ..manifest import Word

_FRAMES_PER_SEC = 100
_SILENCE_SEC = 0.15  # before and after the clip, so that its first and last words have an edge
# As for the recogniser (see there). It also tells right transcripts from wrong ones better than none: the gap between
# the worst right one and the best wrong one is 1.7 with it and 1.1 without.
_WARP = "2.0"
_WORD = re.compile(r"[A-Za-z]+(?:'[A-Za-z]+)*'?")
_UNSPOKEN = re.compile(r"[^\w]|_")  # punctuation and spaces
_EDGES = re.compile(r"^[\W_]+|[\W_]+$")
_VARIANT = re.compile(r"\(\d+\)$")  # the dictionary's name of a further pronunciation, as in `either(2)`


class Unusable(ValueError):
    """A transcript or a recording from which no target can be made; the message says why. It is skipped and listed."""


@dataclass(frozen=True)
class TimedWord:
    """A word of a transcript, and when it is spoken.

    Attributes:
        first_char, end_char: the word is `text[first_char:end_char]`.
        start_sec, end_sec: from the start of the clip.
    """

    first_char: int
    end_char: int
    start_sec: float
    end_sec: float


class Aligner:
    """Finds the words of a known English text in a clip.

    Law: the times depend on the clip and its text alone, not on what was aligned before.

    Measured on isolated words of three synthetic voices at known places: 10 ms off on average at the start of a word
    of flite's slt and awb (at most 22 ms), 28 ms at its end; kal16, whose words begin with a click, 68 and 28 ms.

    Args:
        least_score: least log-likelihood of a frame within the words, relative to the best sound for that frame, on
            average. Of 250 answers of the tiny corpus the right transcript scored -0.8 (-1.4 at worst), another
            answer's was not found at all in 150 and scored -4.9 (-3.1 at best) in 100.
    """

    def __init__(self, least_score: float = -2.2) -> None:
        import pocketsphinx

        self._least_score = least_score
        self._decoder: Any = pocketsphinx.Decoder(
            samprate=RECOGNISER_RATE_HZ, loglevel="FATAL", warp_params=_WARP, lm=None
        )

    def align(self, wav_S: np.ndarray, sample_rate_hz: int, text: str) -> list[TimedWord]:
        """The text's words in order, each within the clip and with a length above zero.

        Args:
            wav_S: mono float32, full scale 1, at any rate.

        Raises:
            Unusable: there is no word in the text, something else than words and punctuation, a word without a
                pronunciation, or the text is not what is said.
        """
        spans = word_spans(text)
        words = [text[first:end].lower() for first, end in spans]
        unknown = sorted({word for word in words if self._decoder.lookup_word(word) is None})
        if unknown:
            raise Unusable(f"no pronunciation of {', '.join(unknown)}")
        found = self._times(wav_S, sample_rate_hz, words)
        if [word for word, _, _ in found] != words:
            raise Unusable("the words are not found in the audio")
        length_sec = len(wav_S) / sample_rate_hz
        timed = [
            TimedWord(first, end, max(0.0, start_sec), min(length_sec, end_sec))
            for (first, end), (_, start_sec, end_sec) in zip(spans, found, strict=True)
        ]
        if any(word.start_sec >= word.end_sec for word in timed):
            raise Unusable("a word lies outside the audio")
        return timed

    def _times(self, wav_S: np.ndarray, sample_rate_hz: int, words: list[str]) -> list[tuple[str, float, float]]:
        """(word, start, end) as found; nothing where the search does not reach the end of the text."""
        decoder = self._decoder
        wav_S = np.pad(resample(wav_S, sample_rate_hz, RECOGNISER_RATE_HZ), int(_SILENCE_SEC * RECOGNISER_RATE_HZ))
        pcm_S = np.clip(np.rint(wav_S * 32767.0), -32768, 32767).astype("<i2")
        decoder.set_align_text(" ".join(words))
        decoder.reinit_feat()  # forgets the clips before: a first one differed from a second by a frame
        decoder.start_utt()
        # As one whole utterance, so that the cepstral mean is this clip's own and not a running one.
        decoder.process_raw(pcm_S.tobytes(), no_search=False, full_utt=True)
        decoder.end_utt()
        if decoder.hyp() is None:
            return []
        segments = [segment for segment in decoder.seg() if segment.word[0] not in "<["]  # silences and noises
        num_frames = sum(segment.end_frame + 1 - segment.start_frame for segment in segments)
        fit = sum(math.log(max(segment.ascore, sys.float_info.min)) for segment in segments)
        if num_frames == 0 or fit / num_frames < self._least_score:
            return []
        return [
            (
                _VARIANT.sub("", segment.word),
                segment.start_frame / _FRAMES_PER_SEC - _SILENCE_SEC,
                (segment.end_frame + 1) / _FRAMES_PER_SEC - _SILENCE_SEC,
            )
            for segment in segments
        ]


def given_times(text: str, words: Sequence[Word]) -> list[TimedWord]:
    """The words that a manifest gives with their times, each found in the text after the one before it.

    Case and punctuation around a word do not matter; a word of no length, or of punctuation alone, is left out. A word
    ends where the next begins at the latest.

    Raises:
        Unusable: the text does not have a word there, or no word is left.
    """
    ends_sec = [min(word.end_sec, after.start_sec) for word, after in zip(words, words[1:], strict=False)]
    found: list[TimedWord] = []
    place = 0
    for word, end_sec in zip(words, [*ends_sec, *(word.end_sec for word in words[-1:])], strict=True):
        said = _EDGES.sub("", word.text)
        if not said:
            continue
        match = re.compile(rf"(?<!\w){re.escape(said)}(?!\w)", re.IGNORECASE).search(text, place)
        if match is None:
            raise Unusable(f"the manifest's word {word.text!r} at {word.start_sec:g} s is not in the text there")
        place = match.end()
        if end_sec > word.start_sec:
            found.append(TimedWord(*match.span(), word.start_sec, end_sec))
    if not found:
        raise Unusable("the manifest's words have no length")
    return found


def word_spans(text: str) -> list[tuple[int, int]]:
    """Where the words of an English text stand: (first character, one past the last) of each.

    Raises:
        Unusable: there is no word, or a digit or a letter beyond a-z, of which it is not known how it is said.
    """
    spans = [match.span() for match in _WORD.finditer(text)]
    if not spans:
        raise Unusable("no word in the transcript")
    rest = _UNSPOKEN.sub("", _WORD.sub("", text))
    if rest:
        raise Unusable(f"{rest[:20]!r} is not spelled out in words")
    return spans
