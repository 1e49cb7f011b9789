"""What stands in a run's folder beside its training: its lock, and in `judged` what the judge keeps."""

from __future__ import annotations

import fcntl
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import soundfile

from scripts.evaluate import write_text

JUDGED, LOCK_FILE = "judged", ".lock"


@contextmanager
def locked(folder: Path) -> Iterator[TextIO | None]:
    """An exclusive lock on a run's folder; None where another process has it."""
    with (folder / LOCK_FILE).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield None
        else:
            yield lock


def is_trained_elsewhere(folder: Path) -> bool:
    """Whether another process trains in a run's folder."""
    if not (folder / LOCK_FILE).exists():
        return False
    with locked(folder) as lock:
        return lock is None


def slug(name: str) -> str:
    return re.sub(r"[^\w.+-]+", "_", name)


def keep_sound(folder: Path, name: str, wav_S: np.ndarray, rate: int) -> None:
    """A judged answer to listen to, float32 samples S."""
    (folder / JUDGED).mkdir(exist_ok=True)
    path = folder / JUDGED / f"{slug(name)}.flac"
    soundfile.write(path, np.clip(wav_S, -1.0, 1.0), rate, subtype="PCM_16")


def write_rows(
    folder: Path, name: str, key: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], seconds: float
) -> None:
    """What was judged under this key, and how long it took."""
    (folder / JUDGED).mkdir(parents=True, exist_ok=True)
    values = {"key": key, "seconds": round(seconds, 3), "rows": rows}
    write_text(folder / JUDGED / f"{slug(name)}.json", json.dumps(values, allow_nan=False) + "\n")


def read_rows(folder: Path, name: str, key: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """The rows that were written under this key; None where there are none, or those of another."""
    file = folder / JUDGED / f"{slug(name)}.json"
    if not file.is_file():
        return None
    values = json.loads(file.read_text(encoding="utf-8"))
    return values["rows"] if values["key"] == json.loads(json.dumps(key)) else None
