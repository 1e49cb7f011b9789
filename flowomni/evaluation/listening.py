"""Listen to many clips at once: both recognisers and the quality score, over several processes.

Shape legend: S samples.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .quality import Dnsmos, Quality
from .recognise import Recogniser

Clip = tuple[np.ndarray, int]  # mono float32 samples [S], rate in Hz


@dataclass(frozen=True)
class Heard:
    """What was heard in a clip.

    Attributes:
        loop: the words, of a loop over a given vocabulary.
        open: the words, of the recogniser's whole vocabulary.
        quality: DNSMOS.
    """

    loop: str
    open: str
    quality: Quality


class Listener:
    """Hears clips one after the other.

    Args:
        words: the vocabulary of the word loop.
        with_open: whether to listen with open vocabulary too, which takes four times as long; else `open` is "".
    """

    def __init__(self, words: Sequence[str], with_open: bool = True) -> None:
        self.loop = Recogniser(words)
        self.open = Recogniser() if with_open else None
        self.dnsmos = Dnsmos()

    def __call__(self, clip: Clip) -> Heard:
        heard = self.open.recognise(*clip) if self.open is not None else ""
        return Heard(self.loop.recognise(*clip), heard, self.dnsmos.score(*clip))


class Listeners:
    """Processes that listen, for as long as the context lasts.

    Law: the number of workers changes nothing but the time.

    Args:
        words, with_open: see `Listener`.
        num_workers: processes; 1 listens in this one.
    """

    def __init__(self, words: Sequence[str], num_workers: int = 2, with_open: bool = True) -> None:
        if num_workers < 1:
            raise ValueError(f"num_workers is {num_workers}; it must be at least 1")
        self._settings, self._num_workers = (list(words), with_open), num_workers
        self._pool: Any = None
        self._here: Listener | None = None

    def __enter__(self) -> Listeners:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.terminate()

    def __call__(self, clips: Sequence[Clip]) -> Iterator[Heard]:
        """What is heard in each clip, in order and as it comes."""
        if self._num_workers == 1:
            self._here = self._here or Listener(*self._settings)
            return map(self._here, clips)
        if self._pool is None:
            # Not forked: a process that has run torch holds threads and locks that do not survive it.
            context = multiprocessing.get_context("spawn")
            self._pool = context.Pool(self._num_workers, _start, self._settings)
        return self._pool.imap(_hear, clips)


def listen(clips: Sequence[Clip], words: Sequence[str], num_workers: int = 2) -> Iterator[Heard]:
    """What is heard in each clip, in order and as it comes; see `Listeners`."""
    if num_workers < 1:
        raise ValueError(f"num_workers is {num_workers}; it must be at least 1")
    with Listeners(words, 1 if len(clips) < 2 else min(num_workers, len(clips))) as listeners:
        yield from listeners(clips)


_listener: Listener | None = None  # of a worker process


def _start(words: list[str], with_open: bool) -> None:
    global _listener
    _listener = Listener(words, with_open)


def _hear(clip: Clip) -> Heard:
    assert _listener is not None, "the pool's initializer makes it"
    return _listener(clip)
