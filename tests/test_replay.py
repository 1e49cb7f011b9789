"""The book-keeping of CUDA graphs on a CPU, where a recorded call stands for one; tests/test_gpu.py has true ones."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from flowomni.replay import MAX_RECORDS, Replayed


class Work:
    """A function that counts its calls, and writes into the room where it stands."""

    def __init__(self) -> None:
        self.calls = 0
        self.seen: tuple[Any, ...] = ()

    def __call__(self, x_B: Tensor, room: list[Tensor], factor: float) -> tuple[Tensor, Tensor]:
        self.calls += 1
        self.seen = x_B, room, factor
        room[0].copy_(x_B)
        return factor * x_B, x_B + 1


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> Work:
    work = Work()

    class Graph:
        def replay(self) -> None:  # works on the same memory again
            x_B, room, factor = self.arguments
            room[0].copy_(x_B)
            for own, new in zip(self.outputs, (factor * x_B, x_B + 1), strict=True):
                own.copy_(new)

    @contextmanager
    def record(graph: Any, **options: Any) -> Iterator[None]:
        yield
        graph.arguments = work.seen

    record_outputs = Replayed._record

    def keep_outputs(self: Replayed, record: Any) -> None:
        record_outputs(self, record)
        record.graph.outputs = record.outputs

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", record)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 0))
    monkeypatch.setattr(Replayed, "_record", keep_outputs)
    return work


def check(replayed: Callable[..., Any], x_B: Tensor, room: list[Tensor], factor: float = 2.0) -> None:
    twice_B, more_B = replayed(x_B, room, factor)
    assert torch.equal(twice_B, factor * x_B) and torch.equal(more_B, x_B + 1) and torch.equal(room[0], x_B)


def test_the_second_call_is_recorded_and_later_ones_replayed(work: Work) -> None:
    replayed, room = Replayed(work), [torch.zeros(3)]
    results = []
    for number in range(5):
        x_B = torch.arange(3.0) + number
        check(replayed, x_B, room)
        results.append(replayed(x_B, room, 2.0)[0])
    assert work.calls == 2
    assert all(torch.equal(each, 2 * (torch.arange(3.0) + n)) for n, each in enumerate(results))  # none is overwritten


def test_another_shape_place_value_or_mode_is_another_record(work: Work) -> None:
    replayed, room, x_B = Replayed(work), [torch.zeros(3)], torch.ones(3)
    for _ in range(3):
        check(replayed, x_B, room)
    elsewhere = [torch.zeros(3)]
    for other in ((x_B, elsewhere, 2.0), (x_B, room, 3.0), (torch.ones(4), [torch.zeros(4)], 2.0)):
        before = work.calls
        check(replayed, *other)
        assert work.calls == before + 1
    with torch.inference_mode():
        before = work.calls
        for _ in range(3):
            check(replayed, x_B, room)
        assert work.calls == before + 2


def test_only_the_latest_records_are_kept(work: Work) -> None:
    replayed = Replayed(work)
    for size in range(1, MAX_RECORDS + 9):
        check(replayed, torch.ones(size), [torch.zeros(size)])
    assert len(replayed._records) == MAX_RECORDS


def test_where_nothing_can_be_recorded_the_function_is_called(
    work: Work, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*arguments: Any, **options: Any) -> Any:
        raise RuntimeError("not while capturing\nC++ stack")

    monkeypatch.setattr(torch.cuda, "graph", fail)
    replayed, room = Replayed(work), [torch.zeros(3)]
    with caplog.at_level(logging.WARNING):
        for number in range(4):
            check(replayed, torch.full((3,), float(number)), room)
    assert work.calls == 4
    assert caplog.messages == ["kernels are not recorded: not while capturing"]
