"""The answers of a corpus as audio in memory: what the vocoder and the tokenizer learn from.

Shapes: S samples, B batch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import soundfile
import torch
from torch import Tensor
from tqdm.auto import tqdm

from .base import rng_for

HELD_OUT_PERCENT = 2


def held_out(name: str) -> bool:
    """Whether a file belongs to the evaluation: a property of its name, so the same in every run and corpus size."""
    return _hash(name) % 100 < HELD_OUT_PERCENT


def _hash(name: str) -> int:
    return int(hashlib.sha1(name.encode()).hexdigest()[:8], 16)


class Answers:
    """Every answer of `corpus`/answers as int16 samples (two bytes a sample: an hour of 24 kHz takes 173 MB).

    Args:
        corpus: folder of a corpus manifest.
        sample_rate_hz: the rate that the files must have.
        max_answers: at most so many (a fixed selection), 0 for all.

    Raises:
        ValueError: no usable files, or a file of another rate or with several channels.
    """

    def __init__(self, corpus: str, sample_rate_hz: int, max_answers: int = 0):
        folder = Path(corpus) / "answers"
        files = sorted(folder.glob("*.flac"), key=lambda file: (_hash(file.name), file.name))
        if max_answers:
            files = files[:max_answers]
        if not files:
            raise ValueError(f"corpus is {corpus!r}, but there are no {folder}/*.flac: make the corpus first")
        self.sample_rate_hz = sample_rate_hz
        with ThreadPoolExecutor(2) as pool:
            wavs = list(tqdm(pool.map(self._read, files), total=len(files), desc="load answers", unit="file"))
        pairs = list(zip(files, wavs, strict=True))
        self.training = [wav_S for file, wav_S in pairs if not held_out(file.name)]
        # A corpus of a few dozen files may have no held-out one; then the first file serves, seen in training.
        self.evaluation = [wav_S for file, wav_S in pairs if held_out(file.name)] or self.training[:1]

    def _read(self, file: Path) -> np.ndarray:
        wav_S, rate = soundfile.read(file, dtype="int16")
        if rate != self.sample_rate_hz or wav_S.ndim != 1 or len(wav_S) == 0:
            raise ValueError(
                f"{file}: {rate} Hz, shape {wav_S.shape}; answers must be mono, not empty, at {self.sample_rate_hz} Hz"
            )
        return wav_S

    def crops(self, num_rows: int, num_samples: int, margin: int, *keys: int) -> Tensor:
        """Random stretches of training answers, (B, margin + S + margin), a pure function of `keys`.

        What lies before an answer's start or after its end is zero. One crop in eight starts where an answer starts.
        """
        rng = rng_for(*keys)
        wav_BS = np.zeros((num_rows, num_samples + 2 * margin), dtype=np.float32)
        for row in range(num_rows):
            wav_S = self.training[rng.integers(len(self.training))]
            start = int(rng.integers(max(1, len(wav_S) - num_samples + 1))) if rng.random() > 0.125 else 0
            first, last = max(0, start - margin), min(len(wav_S), start + num_samples + margin)
            offset = first - (start - margin)
            wav_BS[row, offset : offset + last - first] = wav_S[first:last] / 32768.0
        return torch.from_numpy(wav_BS)

    def some_training(self, num_answers: int) -> Iterator[Tensor]:
        """The first `num_answers` training answers, wav_1S each."""
        return (to_tensor(wav_S) for wav_S in self.training[:num_answers])

    def some_evaluation(self, num_answers: int) -> Iterator[Tensor]:
        """The first `num_answers` held-out answers, wav_1S each."""
        return (to_tensor(wav_S) for wav_S in self.evaluation[:num_answers])


def to_tensor(wav_S: np.ndarray) -> Tensor:
    """int16 samples to float32 wav_1S in [-1, 1)."""
    return torch.from_numpy(wav_S.astype(np.float32) / 32768.0)[None]
