"""Words from speech, by pocketsphinx: a small recogniser that carries its English model and needs no download.

It is far from perfect even on clean speech, so its word error rate on a model's answers says something only beside its
rate on reference recordings of the same texts, the floor.

Shape legend: S samples.
"""

from __future__ import annotations

import math
import re
import tempfile
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from ..audio import resample

RECOGNISER_RATE_HZ = 16_000
# Shorter than any word; of so little audio pocketsphinx makes no frame, and complains.
_SHORTEST_SEC = 0.05
# The rest is tuned for the lowest word error rate on reference recordings of the corpus's answers (valid split, 371
# words), never on a model's: 15 % to 2 % in the loop, 21 % to 12 % in open vocabulary. The warp does most. It moves the
# knee of the mel scale from 700 to 1400 Hz, which suits the corpus's female voice; 1.8 to 2.3 do about as well.
_SILENCE_SEC = 0.15  # before and after the clip
_WARP = "2.0"
# In the loop the language weight is but a cost per word, and the search over the word lattice loses words.
_LOOP_OPTIONS = {"lw": 4.5, "fwdflatlw": 6.0, "bestpath": False}
_VARIANT = re.compile(r"\(\d+\)$")  # the dictionary's name of a further pronunciation, as in `either(2)`


class Recogniser:
    """English speech to lower-case words.

    Law: what is recognised in a clip depends on that clip alone, not on what was recognised before.

    Args:
        words: None for open vocabulary (pocketsphinx's own trigram model), else a loop over these words: any sequence
            of them, all words equally likely, so that only the sound decides.

    Attributes:
        unknown_words: those of `words` without an entry in the pronouncing dictionary; they are never recognised.

    Raises:
        ValueError: `words` is empty, or none of them has a pronunciation.
    """

    def __init__(self, words: Iterable[str] | None = None) -> None:
        self.unknown_words: tuple[str, ...] = ()
        if words is None:
            self._decoder = _decoder()
            return
        wanted = sorted(set(words))
        pronunciations = _pronunciations(wanted)
        self.unknown_words = tuple(word for word in wanted if word not in pronunciations)
        if not pronunciations:
            raise ValueError(f"words is {wanted[:5]}: none has a pronunciation; give lower-case English words, or None")
        if self.unknown_words:
            warnings.warn(
                f"the recogniser does not know {', '.join(self.unknown_words)}: every use of them counts as an error",
                stacklevel=2,
            )
        self._decoder = _word_loop(pronunciations)

    def recognise(self, wav_S: np.ndarray, sample_rate_hz: int) -> str:
        """The words in a mono clip, "" where there are none.

        Args:
            wav_S: float32, full scale 1, at any rate.

        Raises:
            ValueError: a sample is NaN or infinite.
        """
        wav_S = np.asarray(wav_S, dtype=np.float32)
        assert wav_S.ndim == 1, f"mono audio has one dimension, not shape {wav_S.shape}"
        if not np.isfinite(wav_S).all():
            raise ValueError("the audio to recognise holds NaN or infinite samples")
        if len(wav_S) < _SHORTEST_SEC * sample_rate_hz or not wav_S.any():
            return ""
        wav_S = resample(wav_S, sample_rate_hz, RECOGNISER_RATE_HZ)
        wav_S = np.pad(wav_S, int(_SILENCE_SEC * RECOGNISER_RATE_HZ))
        pcm_S = np.clip(np.rint(wav_S * 32767.0), -32768, 32767).astype("<i2")
        self._decoder.start_utt()
        # As one whole utterance, so that the cepstral mean is this clip's own and not a running one.
        self._decoder.process_raw(pcm_S.tobytes(), no_search=False, full_utt=True)
        self._decoder.end_utt()
        found = self._decoder.hyp()
        return "" if found is None else " ".join(_VARIANT.sub("", word) for word in found.hypstr.lower().split())


def _decoder(**options: Any) -> Any:
    import pocketsphinx

    return pocketsphinx.Decoder(samprate=RECOGNISER_RATE_HZ, loglevel="FATAL", warp_params=_WARP, **options)


def _pronunciations(words: list[str]) -> dict[str, list[str]]:
    """The lines of pocketsphinx's dictionary for each word that it has, further pronunciations included."""
    import pocketsphinx

    wanted = set(words)
    found: dict[str, list[str]] = {}
    with open(pocketsphinx.get_model_path("en-us/cmudict-en-us.dict"), encoding="utf-8") as file:
        for line in file:
            word = _VARIANT.sub("", line.split(maxsplit=1)[0])
            if word in wanted:
                found.setdefault(word, []).append(line)
    return found


def _word_loop(pronunciations: dict[str, list[str]]) -> Any:
    """A decoder for any sequence of the words.

    The loop is a unigram model of equal probabilities: the same language as a JSGF rule `(a | b | ..)+`, whose search
    took 20 times as long for 300 words.
    """
    import pocketsphinx

    log10_probability = -math.log10(len(pronunciations) + 1)
    unigrams = [f"{log10_probability:.6f} {word}" for word in ("</s>", *pronunciations)]
    lines = ["\\data\\", f"ngram 1={len(unigrams) + 1}", "", "\\1-grams:", "-99 <s>", *unigrams, "", "\\end\\", ""]
    with tempfile.TemporaryDirectory() as folder:
        dictionary, model = Path(folder, "words.dict"), Path(folder, "words.lm")
        dictionary.write_text("".join(line for lines in pronunciations.values() for line in lines), encoding="utf-8")
        model.write_text("\n".join(lines), encoding="utf-8")
        decoder = _decoder(lm=None, dict=str(dictionary), **_LOOP_OPTIONS)
        decoder.add_lm("loop", pocketsphinx.NGramModel(decoder.config, decoder.logmath, str(model)))
    decoder.activate_search("loop")
    return decoder
