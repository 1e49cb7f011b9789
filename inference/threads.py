"""How many threads the model computes on, in programs where other threads have work at the same time.

A matrix product that is split over all cores waits for its slowest part. Where a core has another program to serve,
every product waits for that: on two cores with one busy program each (of low priority), an interrupted voice stopped
within 146 ms (p95) when the model had one thread, and within 439 ms when it had two. On idle cores both need 35 ms.
"""

from __future__ import annotations

import ctypes
import functools
import os
from pathlib import Path

import torch

_SOFT = 1  # omp_pause_soft: the threads end, and come back when the caller next computes


def settle_threads(wanted: int | None) -> int:
    """Set torch's number of threads, and return it.

    Args:
        wanted: None leaves one core to everything else, unless OMP_NUM_THREADS says how many.
    """
    if wanted is None:
        wanted = torch.get_num_threads() - ("OMP_NUM_THREADS" not in os.environ)
    torch.set_num_threads(max(1, wanted))
    return torch.get_num_threads()


def release_threads() -> None:
    """End the OpenMP threads that the calling thread has computed with; they come back when it computes again.

    GNU's OpenMP keeps threads for every thread that computes. Idle ones count, and where all of them are more than the
    machine's cores it puts waiting threads to sleep at once: each of the hundreds of small products of a step then has
    to wake them. On two cores, a step of eight rows in a second thread took 51 ms beside idle threads of the first one,
    and 21 ms without them. Other OpenMP libraries share their threads: there this does nothing.
    """
    for library in _gnu_openmp():
        library.omp_pause_resource_all(_SOFT)


@functools.cache
def _gnu_openmp() -> list[ctypes.CDLL]:
    """The libraries of that kind which this process has loaded (torch brings its own)."""
    maps = Path("/proc/self/maps")
    if not maps.exists():
        return []
    paths = {line.split(maxsplit=5)[-1].strip() for line in maps.read_text().splitlines() if "libgomp" in line}
    libraries = [ctypes.CDLL(path, mode=os.RTLD_NOLOAD) for path in sorted(paths) if Path(path).exists()]
    return [library for library in libraries if hasattr(library, "omp_pause_resource_all")]
