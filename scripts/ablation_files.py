"""What the judge keeps of a run, in the folder `judged` beside its model."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from scripts.evaluate import write_text

JUDGED = "judged"


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
