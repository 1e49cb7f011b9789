"""Other people's formats as our manifest: a folder of recordings, a data set of the Hugging Face Hub, Moshi's stereo.

Each function yields the lines of a manifest (see `training.manifest`) that is to stand in the folder `out`; audio that
is a file already stays where it is.

Shapes: S samples.
"""

from __future__ import annotations

import csv
import itertools
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from flowomni.audio import AudioError

from .recordings import Clip, read_recording

AUDIO_SUFFIXES = {".wav", ".flac", ".ogg", ".mp3", ".aiff", ".aif", ".opus"}
TEXT_COLUMNS = ("text", "transcription", "sentence", "transcript", "normalized_text")
MAIN_SPEAKER = "SPEAKER_MAIN"
PAUSE_SEC = 1.0  # a longer one ends a turn where the other side has no words to end it
MARGIN_SEC = 0.1
QUIET = 10 ** (-45 / 20)  # root mean square below which nobody speaks

Line = dict[str, Any]


# ------------------------------------------------------------------------------------------- folders and data sets


def from_folder(folder: Path, out: Path, columns: Mapping[str, str], limit: int | None) -> Iterator[Line]:
    """An audio folder (https://huggingface.co/docs/datasets/audio_dataset#audiofolder).

    metadata.csv or metadata.jsonl with a column file_name and a text column; without it, every recording that has a
    .txt file of the same name beside it. Further columns may name further files.

    Raises:
        ValueError: there is neither, a file is missing, or a column.
    """
    if not folder.is_dir():
        raise ValueError(f"--folder {folder}: no such folder")
    rows = list(itertools.islice(_folder_rows(folder), limit))
    if not rows:
        raise ValueError(f"--folder {folder}: no metadata.csv, no metadata.jsonl, and no recording with a .txt file")

    def place(value: Any, name: str) -> str:
        file = folder / str(value)
        if not file.is_file():
            raise ValueError(f"--folder {folder}: {value} ({name}) is not there")
        return os.path.relpath(file, out)

    for index, row in enumerate(rows):
        name = str(row.get("id") or row["file_name"])
        yield _conversation(name, row, _columns(columns, row, "file_name"), place, index)


def _folder_rows(folder: Path) -> Iterator[dict[str, Any]]:
    table, lines = folder / "metadata.csv", folder / "metadata.jsonl"
    if table.is_file():
        with table.open(encoding="utf-8", newline="") as opened:
            yield from csv.DictReader(opened)
    elif lines.is_file():
        yield from (json.loads(line) for line in lines.read_text(encoding="utf-8").split("\n") if line.strip())
    else:
        for file in sorted(p for p in folder.rglob("*") if p.suffix.lower() in AUDIO_SUFFIXES):
            words = file.with_suffix(".txt")
            if words.is_file():
                text = " ".join(words.read_text(encoding="utf-8").split())
                yield {"file_name": str(file.relative_to(folder)), "text": text}


def from_dataset(
    name: str, out: Path, columns: Mapping[str, str], limit: int | None, config: str | None, split: str, streaming: bool
) -> Iterator[Line]:
    """A data set of the Hub, or a local folder of parquet files. Needs the extra `data` (the datasets package).

    Audio is not decoded: its bytes are written to `out`/audio as they are. With `streaming`, no more is downloaded than
    is read.

    Raises:
        ValueError: no such data set or column, or the datasets package is missing.
    """
    try:
        import datasets
    except ImportError:
        raise ValueError("--dataset needs the datasets package: pip install 'flowomni[data]'") from None
    kind, where = ("parquet", {"data_dir": name}) if Path(name).is_dir() else (name, {})
    try:
        data = datasets.load_dataset(kind, config, split=split, streaming=streaming, **where)
        for column, feature in (data.features or {}).items():
            if isinstance(feature, datasets.Audio):
                data = data.cast_column(column, datasets.Audio(decode=False))
        rows: Iterable[Any] = itertools.islice(data, limit)
        (out / "audio").mkdir(parents=True, exist_ok=True)
        for index, row in enumerate(rows):
            yield _dataset_line(row, index, out, columns)
    except (OSError, ImportError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(f"--dataset {name}: {' '.join(str(error).split())[:300]}") from error


def _dataset_line(row: dict[str, Any], index: int, out: Path, columns: Mapping[str, str]) -> Line:
    def place(value: Any, name: str) -> str:
        if not isinstance(value, Mapping):
            raise ValueError(f"column {name!r} holds no audio: choose another with --columns")
        if value.get("bytes") is None:
            return os.path.relpath(value["path"], out)
        suffix = Path(value.get("path") or "").suffix.lower()
        file = out / "audio" / f"{index:08d}-{name}{suffix if suffix in AUDIO_SUFFIXES else '.wav'}"
        file.write_bytes(value["bytes"])
        return os.path.relpath(file, out)

    return _conversation(str(row.get("id") or f"{index:08d}"), row, _columns(columns, row, "audio"), place, index)


def parse_columns(values: Iterable[str]) -> dict[str, str]:
    """`["user.audio=question", "assistant.text=answer"]` as a dict.

    Raises:
        ValueError: a side that does not exist.
    """
    known = [f"{role}.{what}" for role in ("user", "assistant") for what in ("audio", "text", "speaker")]
    found = {}
    for value in values:
        side, _, column = value.partition("=")
        if side not in known or not column:
            raise ValueError(f"--columns {value}: give SIDE=COLUMN, where SIDE is one of {', '.join(known)}")
        found[side] = column
    return found


def _columns(columns: Mapping[str, str], row: Mapping[str, Any], audio: str) -> Mapping[str, str]:
    """What was asked for; or else one recording a row, in the voice that the model is to learn."""
    if columns:
        return columns
    text = next((name for name in TEXT_COLUMNS if name in row), None)
    if text is None or audio not in row:
        raise ValueError(f"no column {audio!r} with its words: name them by --columns (there are {', '.join(row)})")
    return {"assistant.audio": audio, "assistant.text": text}


def _conversation(name: str, row: Mapping[str, Any], columns: Mapping[str, str], place: Any, index: int) -> Line:
    turns = []
    for role in ("user", "assistant"):
        turn: dict[str, Any] = {}
        for side, column in columns.items():
            if not side.startswith(f"{role}."):
                continue
            if column not in row:
                raise ValueError(f"there is no column {column!r}; there are {', '.join(row)}")
            key, value = side.partition(".")[2], row[column]
            if value is not None and value != "":
                turn[key] = place(value, column) if key == "audio" else str(value)
        if turn:
            turns.append({"role": role, **turn})
    if not turns:
        raise ValueError(f"row {index} has nothing in {', '.join(columns.values())}")
    return {"id": name, "turns": turns}


# --------------------------------------------------------------------------------------------------- Moshi's stereo


def from_moshi(manifest: Path, out: Path, limit: int | None) -> Iterator[Line]:
    """Data of Moshi's fine-tuner (https://github.com/kyutai-labs/moshi-finetune): stereo recordings with word times.

    Lines {"path": "a.wav", "duration": 24.5}; beside a.wav stands a.json with {"alignments": [[word, [start, end],
    speaker], ...]}. The left channel is the assistant (SPEAKER_MAIN), the right one the user. A new turn begins where
    the speaker changes. Where only the assistant's words are known, which is what its annotation tool writes, the
    assistant's pauses of at least a second in which the right channel is not silent are the user's turns.

    Raises:
        ValueError: a line, a transcript or a recording is bad; names it.
    """
    if not manifest.is_file():
        raise ValueError(f"--moshi {manifest}: no such file")
    lines = [line for line in manifest.read_text(encoding="utf-8").split("\n") if line.strip()]
    for number, line in enumerate(lines[:limit], 1):
        try:
            path = manifest.parent / json.loads(line)["path"]
            words = _alignments(path.with_suffix(".json"))
            turns = _moshi_turns(path, words, out)
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"{manifest}:{number}: not a line of Moshi's format ({error!r})") from None
        except ValueError as error:
            raise ValueError(f"{manifest}:{number}: {error}") from None
        if turns:
            yield {"id": os.path.relpath(path, manifest.parent), "turns": turns}


def _alignments(file: Path) -> list[tuple[str, float, float, bool]]:
    """(word, start, end, whether the assistant says it) by start."""
    if not file.is_file():
        raise ValueError(f"{file} is not there: it holds the word times of the recording")
    values = json.loads(file.read_text(encoding="utf-8"))["alignments"]
    words = []
    for value in values:
        try:
            word, (start_sec, end_sec), speaker = value
        except (TypeError, ValueError):
            raise ValueError(f"{file}: {value!r} is not [word, [start, end], speaker]") from None
        if not 0 <= start_sec <= end_sec:
            raise ValueError(f"{file}: {word!r} lasts from {start_sec} to {end_sec} s")
        if str(word).strip():
            words.append((str(word).strip(), float(start_sec), float(end_sec), speaker == MAIN_SPEAKER))
    return sorted(words, key=lambda word: word[1])


def _moshi_turns(path: Path, words: list[tuple[str, float, float, bool]], out: Path) -> list[Line]:
    try:
        info = soundfile.info(path)
    except (soundfile.LibsndfileError, OSError):
        raise AudioError(f"{path} cannot be read as audio") from None
    if info.channels < 2:
        raise ValueError(f"{path} has one channel: the assistant belongs on the left one, the user on the right one")
    groups: list[list[tuple[str, float, float, bool]]] = []
    user_has_words = any(not is_main for *_, is_main in words)
    for word in words:
        same = groups and groups[-1][-1][3] == word[3]
        if same and (user_has_words or word[1] - groups[-1][-1][2] < PAUSE_SEC):
            groups[-1].append(word)
        else:
            groups.append([word])
    name = os.path.relpath(path, out)
    turns: list[Line] = []
    before_sec = 0.0  # where the assistant last ended
    for group in groups:
        first_sec, end_sec, is_main = group[0][1], max(word[2] for word in group), group[0][3]
        if not user_has_words and first_sec - before_sec >= PAUSE_SEC and _is_loud(path, before_sec, first_sec):
            turns.append(_moshi_turn(name, 1, before_sec, first_sec, []))
        before_sec = end_sec
        start_sec, end_sec = max(0.0, first_sec - MARGIN_SEC), min(info.duration, end_sec + MARGIN_SEC)
        if start_sec >= end_sec:
            raise ValueError(f"{path} ends before {group[0][0]!r} at {first_sec:g} s")
        turns.append(_moshi_turn(name, 0 if is_main else 1, start_sec, end_sec, group))
    return _joined(turns)


def _moshi_turn(name: str, channel: int, start_sec: float, end_sec: float, words: list[Any]) -> Line:
    start_sec, end_sec = round(start_sec, 3), round(end_sec, 3)
    times = [[word, round(start - start_sec, 3), round(end - start_sec, 3)] for word, start, end, _ in words]
    return {
        "role": "user" if channel else "assistant",
        "text": " ".join(word for word, *_ in words),
        "audio": {"path": name, "channel": channel, "start_sec": start_sec, "end_sec": end_sec},
        "duration_sec": round(end_sec - start_sec, 3),
        "words": times,
    }


def _joined(turns: list[Line]) -> list[Line]:
    """Turns of one side that follow each other as one: an assistant's that pauses while nobody speaks."""
    joined: list[Line] = []
    for turn in turns:
        if not joined or joined[-1]["role"] != turn["role"]:
            joined.append(turn)
            continue
        last, shift = joined[-1], turn["audio"]["start_sec"] - joined[-1]["audio"]["start_sec"]
        last["words"] += [[w, round(start + shift, 3), round(end + shift, 3)] for w, start, end in turn["words"]]
        last["text"] = f"{last['text']} {turn['text']}".strip()
        last["audio"]["end_sec"] = turn["audio"]["end_sec"]
        last["duration_sec"] = round(last["audio"]["end_sec"] - last["audio"]["start_sec"], 3)
    while joined and joined[-1]["role"] == "user":
        joined.pop()  # nobody answers it
    return joined


def _is_loud(path: Path, start_sec: float, end_sec: float) -> bool:
    wav_S = read_recording(Clip(path, 1, start_sec, end_sec), 16_000).wav_S
    return bool(np.sqrt(np.mean(wav_S**2)) > QUIET)


# ------------------------------------------------------------------------------------------------------------ splits


def with_splits(lines: Iterable[Line], valid_percent: float) -> list[Line]:
    """Every so many conversations are held out; of two or more, at least one is."""
    found = list(lines)
    every = round(100 / valid_percent) if valid_percent > 0 else 0
    held_out = set(range(every // 2, len(found), every)) if every else set()
    if every and not held_out and len(found) > 1:
        held_out = {len(found) - 1}
    return [{"id": v["id"], "split": "valid" if i in held_out else "train", **v} for i, v in enumerate(found)]
