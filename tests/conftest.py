"""Fixtures of several files: a lively model of random weights, and an engine over it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from flowomni import FlowOmni
from inference.engine import Engine
from tests.tiny import lively_model


@pytest.fixture(scope="session")
def omni() -> FlowOmni:
    return FlowOmni(*lively_model())


@pytest.fixture
def engine(omni: FlowOmni) -> Iterator[Engine]:
    with Engine(omni, max_sessions=4) as engine:
        yield engine
