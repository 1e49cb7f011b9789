"""The answers of a corpus as audio in memory: what the vocoder and the tokenizer learn from.

Shapes: S samples, B batch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Place:
    """Where a crop was taken: from sample `start` on of training answer `index`."""

    index: int
    start: int


class Answers:
    """Every answer of `corpus`/answers as int16 samples (two bytes a sample: an hour of 24 kHz takes 173 MB).

    Args:
        corpus: folder of a corpus manifest.
        sample_rate_hz: the rate that the files must have.
        max_answers: at most so many (a fixed selection), 0 for all.

    Attributes:
        training, evaluation: int16 wav_S of each answer.
        training_names: file name of each training answer.

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
        self.training_names = [file.name for file in files if not held_out(file.name)]
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

    def places(self, num_rows: int, num_samples: int, *keys: int) -> list[Place]:
        """Where `crops` with these arguments takes its rows from. One in eight starts where an answer starts."""
        rng = rng_for(*keys)
        found = []
        for _ in range(num_rows):
            index = int(rng.integers(len(self.training)))
            num_starts = max(1, len(self.training[index]) - num_samples + 1)
            found.append(Place(index, int(rng.integers(num_starts)) if rng.random() > 0.125 else 0))
        return found

    def crops(self, num_rows: int, num_samples: int, margin: int, *keys: int) -> Tensor:
        """Random stretches of training answers, (B, margin + S + margin), a pure function of `keys`.

        What lies before an answer's start or after its end is zero.
        """
        wav_BS = np.zeros((num_rows, num_samples + 2 * margin), dtype=np.float32)
        for row, place in enumerate(self.places(num_rows, num_samples, *keys)):
            wav_S, start = self.training[place.index], place.start
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
