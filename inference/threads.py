"""How many threads the model computes on, in programs where other threads have work at the same time.

A matrix product that is split over all cores waits for its slowest part. Where one of the cores also has a socket, a
sound card or a turn detector to serve, every product waits for that: on two cores, a server's steps took 70 ms on two
threads and 26 ms on one.
"""

from __future__ import annotations

import os

import torch


def settle_threads(wanted: int | None) -> int:
    """Set torch's number of threads, and return it.

    Args:
        wanted: None leaves one core to everything else, unless OMP_NUM_THREADS says how many.
    """
    if wanted is None:
        wanted = torch.get_num_threads() - ("OMP_NUM_THREADS" not in os.environ)
    torch.set_num_threads(max(1, wanted))
    return torch.get_num_threads()
