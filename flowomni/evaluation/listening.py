"""Listen to many clips at once: both recognisers and the quality score, over several processes.

Shape legend: S samples.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, TypeVar

import numpy as np

from .quality import Dnsmos, Quality
from .recognise import Recogniser

Task = TypeVar("Task")
Result = TypeVar("Result")
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


class Workers(Generic[Task, Result]):
    """Processes that do the same for many tasks, for as long as the context lasts.

    Law: the number of workers changes nothing but the time.

    Args:
        make: makes, once in each process, what is done to a task; must be picklable, and so must tasks and results.
        num_workers: processes; 1 works in this one.
    """

    def __init__(self, make: Callable[[], Callable[[Task], Result]], num_workers: int) -> None:
        if num_workers < 1:
            raise ValueError(f"num_workers is {num_workers}; it must be at least 1")
        self._make, self._num_workers = make, num_workers
        self._pool: Any = None
        self._here: Callable[[Task], Result] | None = None

    def __enter__(self) -> Workers[Task, Result]:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.terminate()

    def __call__(self, tasks: Sequence[Task]) -> Iterator[Result]:
        """The result of each task, in order and as it comes."""
        if self._num_workers == 1:
            self._here = self._here or self._make()
            return map(self._here, tasks)
        if self._pool is None:
            # Not forked: a process that has run torch holds threads and locks that do not survive it.
            context = multiprocessing.get_context("spawn")
            self._pool = context.Pool(self._num_workers, _start, (self._make,))
        return self._pool.imap(_work, tasks)


def listen(clips: Sequence[Clip], words: Sequence[str], num_workers: int = 2) -> Iterator[Heard]:
    """What is heard in each clip, in order and as it comes.

    Law: the number of workers changes nothing but the time.

    Args:
        num_workers: processes; 1 listens in this one.
    """
    if num_workers < 1:
        raise ValueError(f"num_workers is {num_workers}; it must be at least 1")
    make = partial(Listener, list(words))
    with Workers(make, 1 if len(clips) < 2 else min(num_workers, len(clips))) as listeners:
        yield from listeners(clips)


_worker: Callable[[Any], Any] | None = None  # of a worker process


def _start(make: Callable[[], Callable[[Any], Any]]) -> None:
    global _worker
    _worker = make()


def _work(task: Any) -> Any:
    assert _worker is not None, "the pool's initializer makes it"
    return _worker(task)
