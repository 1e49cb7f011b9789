"""Listen to many clips at once: both recognisers and the quality score, over several processes.

Shape legend: S samples.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

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
    """Hears clips one after the other. `words`: the vocabulary of the word loop."""

    def __init__(self, words: Sequence[str]) -> None:
        self.loop = Recogniser(words)
        self.open = Recogniser()
        self.dnsmos = Dnsmos()

    def __call__(self, clip: Clip) -> Heard:
        return Heard(self.loop.recognise(*clip), self.open.recognise(*clip), self.dnsmos.score(*clip))


def listen(clips: Sequence[Clip], words: Sequence[str], num_workers: int = 2) -> Iterator[Heard]:
    """What is heard in each clip, in order and as it comes.

    Law: the number of workers changes nothing but the time.

    Args:
        num_workers: processes; 1 listens in this one.
    """
    if num_workers < 1:
        raise ValueError(f"num_workers is {num_workers}; it must be at least 1")
    if num_workers == 1 or len(clips) < 2:
        yield from map(Listener(words), clips)
        return
    # Not forked: a process that has run torch holds threads and locks that do not survive it.
    context = multiprocessing.get_context("spawn")
    with context.Pool(min(num_workers, len(clips)), _start, (list(words),)) as pool:
        yield from pool.imap(_hear, clips)


_listener: Listener | None = None  # of a worker process


def _start(words: list[str]) -> None:
    global _listener
    _listener = Listener(words)


def _hear(clip: Clip) -> Heard:
    assert _listener is not None, "the pool's initializer makes it"
    return _listener(clip)
