"""What tests say to a session, and how they listen to it.

Shapes: S samples.
"""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import soundfile

from inference.session import AudioDelta, Event, ResponseDone, Session, TextDelta

PATIENCE_SEC = 300.0
QUESTIONS = sorted((Path(__file__).parent.parent / "inference" / "demo_data" / "questions" / "test").glob("*.flac"))
WORDS = ["one", "two", "three", "four", "five"]


def question(number: int) -> np.ndarray:
    """Real speech at 16 kHz."""
    return soundfile.read(QUESTIONS[number], dtype="float32")[0]


def quiet(sec: float) -> np.ndarray:
    return np.zeros(round(sec * 16_000), np.float32)


def spoken(*numbers: int) -> np.ndarray:
    """Questions with half a second of silence before and 0.8 s after each."""
    return np.concatenate([part for n in numbers for part in (quiet(0.5), question(n), quiet(0.8))])


def events(session: Session, timeout: float = 300.0) -> list[Event]:
    """All events until nothing more is to come."""
    found: list[Event] = []
    deadline = time.monotonic() + timeout
    while True:
        at_rest = session.wait(0.01)
        found += iter(session.poll, None)
        if at_rest:
            return found
        assert time.monotonic() < deadline, f"no end after {names(found)}"


def names(found: list[Event]) -> list[str]:
    """Kinds in order, each run of deltas once."""
    kinds = ["delta" if isinstance(e, TextDelta | AudioDelta) else type(e).__name__ for e in found]
    return [kind for i, kind in enumerate(kinds) if i == 0 or kind != "delta" or kinds[i - 1] != "delta"]


def sound(found: list[Event]) -> np.ndarray:
    return np.concatenate([*(e.wav_S for e in found if isinstance(e, AudioDelta)), np.zeros(0, np.float32)])


def done(found: list[Event]) -> ResponseDone:
    [event] = [e for e in found if isinstance(e, ResponseDone)]
    return event


def until(session: Session, kind: type) -> list[Event]:
    """Events up to the first of a kind."""
    found: list[Event] = []
    while not found or not isinstance(found[-1], kind):
        event = session.poll(PATIENCE_SEC)
        assert event is not None, f"no {kind.__name__} came after {names(found)}"
        found.append(event)
    return found
