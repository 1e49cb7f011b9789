"""What Prometheus reads at /metrics."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    GCCollector,
    Histogram,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from inference.engine import EngineStats

LATENCY_SEC = (0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1.0, 2.0, 5.0)


class _EngineCollector(Collector):
    """The engine counts by itself; its numbers are read when Prometheus asks."""

    def __init__(self, stats: Callable[[], EngineStats]):
        self.stats = stats

    def collect(self) -> Iterator[Metric]:
        stats = self.stats()
        yield GaugeMetricFamily("flowomni_sessions", "open sessions", stats.num_sessions)
        yield GaugeMetricFamily("flowomni_rows", "sessions that are being answered", stats.num_rows)
        yield GaugeMetricFamily("flowomni_cache_positions", "positions held in all caches", stats.cache_positions)
        yield CounterMetricFamily("flowomni_sessions_opened", "sessions since the start", stats.sessions_opened)
        yield CounterMetricFamily("flowomni_steps", "steps of the batch: its rate is steps per second", stats.steps)
        yield CounterMetricFamily("flowomni_row_steps", "steps summed over sessions", stats.row_steps)
        yield CounterMetricFamily("flowomni_speech_tokens", "speech tokens drawn", stats.tokens)
        busy = CounterMetricFamily("flowomni_busy_seconds", "what the worker's time went into", labels=["part"])
        parts = {"step": stats.step_sec, "prefill": stats.prefill_sec, "listen": stats.listen_sec}
        for part, seconds in parts.items():
            busy.add_metric([part], seconds)
        yield busy


class Metrics:
    """Counters of one server, in a registry of their own."""

    def __init__(self, stats: Callable[[], EngineStats] | None = None):
        self.registry = registry = CollectorRegistry()
        self.first_audio_sec = Histogram(
            "flowomni_first_audio_seconds",
            "from the end of the turn (after the silence that ends it) to the first sample sent",
            buckets=LATENCY_SEC,
            registry=registry,
        )
        self.responses = Counter("flowomni_responses", "ended answers", ["status"], registry=registry)
        self.refused = Counter("flowomni_refused", "connections refused", ["reason"], registry=registry)
        self.errors = Counter("flowomni_errors", "error events sent", ["code"], registry=registry)
        self.heard_sec = Counter("flowomni_heard_seconds", "audio taken", registry=registry)
        self.spoken_sec = Counter("flowomni_spoken_seconds", "audio sent", registry=registry)
        ProcessCollector(registry=registry)  # memory, open files, CPU time
        GCCollector(registry=registry)
        Gauge("flowomni_tasks", "asyncio tasks", registry=registry).set_function(_num_tasks)
        if stats is not None:
            registry.register(_EngineCollector(stats))

    def error(self, code: str) -> None:
        """Count an error event."""
        self.errors.labels(code).inc()

    def page(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self.registry)


def _num_tasks() -> float:
    try:
        return len(asyncio.all_tasks())
    except RuntimeError:  # asked for outside of the event loop
        return math.nan
