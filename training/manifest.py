"""Conversations of a corpus: a JSONL manifest, one conversation a line, audio paths relative to its folder.

The schema (in the file, each conversation is one line):

    {"id": "call-17",            a name of its own
     "split": "train",           "train" (the default), "valid" or "test"
     "family": "", "voice_group": "",    groups that the evaluation reports by (optional)
     "turns": [                  user and assistant in turn, any number of them
       {"role": "user",
        "text": "what time is it",           "" or absent where there are no words to read
        "audio": "calls/17.wav",             a file of its own, or a part of one:
        "audio": {"path": "calls/17.wav", "channel": 1, "start_sec": 0.0, "end_sec": 1.9},
        "duration_sec": 1.9,                 of the audio; without it, read from the file's header
        "speaker": "anna",                   optional
        "words": [["what", 0.1, 0.3], ...]}  optional: word, start and end in seconds of this turn's audio
     ]}

A turn has words, audio or both. Every assistant turn is something to learn, in the context of the turns before it
(`examples`); user turns after the last of them are not read. A conversation of a single turn is a recording to speak
(assistant) or to transcribe (user). Further keys are ignored; `python -m training.prepare --check` lists them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import soundfile

from .recordings import Clip, Recording

ROLES = ("user", "assistant")
SPLITS = ("train", "valid", "test")
LINE_KEYS = ("id", "split", "family", "voice", "voice_group", "turns")
TURN_KEYS = ("role", "text", "audio", "duration_sec", "speaker", "words")
CLIP_KEYS = ("path", "channel", "start_sec", "end_sec")


class Word(NamedTuple):
    """A word and when it is said, in seconds of its turn's audio."""

    text: str
    start_sec: float
    end_sec: float


@dataclass(frozen=True)
class Utterance:
    """One turn: who, what, and the recording if there is one. See the schema above."""

    role: str
    text: str
    audio: Recording | None
    duration_sec: float
    speaker: str = ""
    words: tuple[Word, ...] = ()


@dataclass(frozen=True)
class Conversation:
    """One line of the manifest."""

    id: str
    split: str
    family: str
    voice_group: str
    turns: tuple[Utterance, ...]

    @property
    def question(self) -> Utterance:
        """The user's turn before `answer`; one without words and audio if there is none."""
        asked = [turn for turn in self.turns[-2:] if turn.role == "user"]
        return asked[0] if asked else Utterance("user", "", None, 0.0)

    @property
    def answer(self) -> Utterance:
        """The last turn, the assistant's; one without words and audio if there is none."""
        return self.turns[-1] if self.turns[-1].role == "assistant" else Utterance("assistant", "", None, 0.0)

    @property
    def context(self) -> tuple[Utterance, ...]:
        """The turns before the question."""
        return self.turns[: -1 - (len(self.turns) > 1 and self.turns[-2].role == "user")]


def manifest_file(path: str | Path) -> Path:
    """The manifest at `path`: the file itself, or manifest.jsonl in that folder; ValueError if there is none."""
    path = Path(path)
    if path.is_dir():
        path = path / "manifest.jsonl"
    if not path.is_file():
        raise ValueError(f"{path}: no such manifest; make the corpus first: python -m scripts.make_talk_corpus")
    return path


def read_manifest(path: str | Path, split: str | None = None) -> list[Conversation]:
    """All conversations of `split` (None: of every split).

    Raises:
        ValueError: the file is missing, or a line is bad; names file and line.
    """
    path = manifest_file(path)
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if not line.strip():
            continue
        try:
            item = parse_line(line, path.parent)
        except ValueError as error:
            raise ValueError(f"{path}:{number}: {error}") from None
        if split is None or item.split == split:
            found.append(item)
    if not found:
        raise ValueError(f"{path}: no conversation of split {split!r}")
    return found


def examples(conversation: Conversation, max_sec: float) -> Iterator[Conversation]:
    """The conversation up to each assistant turn, with as many of the turns before it as fit into `max_sec`.

    A question and its answer stay together, however long they are. Without an assistant turn, the last user turn alone.
    """
    ends = [index for index, turn in enumerate(conversation.turns, 1) if turn.role == "assistant"]
    for end in ends or [len(conversation.turns)]:
        first = max(0, end - (2 if ends else 1))
        seconds = sum(turn.duration_sec for turn in conversation.turns[first:end])
        while first > 0 and seconds + conversation.turns[first - 1].duration_sec <= max_sec:
            first -= 1
            seconds += conversation.turns[first].duration_sec
        while first < end - 2 and conversation.turns[first].role == "assistant":
            first += 1  # some chat templates insist that the user begins
        yield replace(conversation, turns=conversation.turns[first:end])


# ------------------------------------------------------------------------------------------------------------ parsing


def parse_line(line: str, folder: Path) -> Conversation:
    """One line of a manifest whose audio paths are relative to `folder`.

    Raises:
        ValueError: what is wrong with it, by the name of the key.
    """
    try:
        values = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error.msg} at column {error.colno})") from None
    if not isinstance(values, dict):
        raise ValueError("not a conversation: a line is one JSON object")
    if "id" not in values:
        raise ValueError("id is missing: name the conversation")
    split = values.get("split", "train")
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}; it must be one of {', '.join(SPLITS)}")
    turns = values.get("turns")
    if not isinstance(turns, list) or not turns:
        raise ValueError("turns is missing or empty: a conversation has at least one turn")
    parsed = tuple(_turn(turn, f"turns[{index}]", folder) for index, turn in enumerate(turns))
    for index, (before, after) in enumerate(zip(parsed, parsed[1:], strict=False), 1):
        if before.role == after.role:
            raise ValueError(f"turns[{index}] is the {after.role}'s again: join the two turns")
    if len(parsed) == 1 and not (parsed[0].text and parsed[0].audio):
        raise ValueError("turns has one turn only: a recording alone needs text and audio")
    return Conversation(
        str(values["id"]), split, str(values.get("family", "")), str(values.get("voice_group", "")), parsed
    )


def _turn(turn: Any, where: str, folder: Path) -> Utterance:
    if not isinstance(turn, dict):
        raise ValueError(f"{where} is not an object")
    role, text = turn.get("role"), turn.get("text") or ""
    if role not in ROLES:
        raise ValueError(f"{where}.role is {role!r}; it must be 'user' or 'assistant'")
    if not isinstance(text, str):
        raise ValueError(f"{where}.text is {text!r}; it must be a string")
    audio = _audio(turn.get("audio"), f"{where}.audio", folder)
    if audio is None and not text.strip():
        raise ValueError(f"{where} has neither text nor audio")
    duration_sec = _duration(turn, audio, where)
    words = _words(turn.get("words") or [], f"{where}.words", duration_sec if audio is not None else math.inf)
    return Utterance(role, text, audio, duration_sec, str(turn.get("speaker") or ""), words)


def _audio(value: Any, where: str, folder: Path) -> Recording | None:
    if not value:
        return None
    if isinstance(value, str):
        return folder / value
    if not isinstance(value, dict) or not isinstance(value.get("path"), str):
        raise ValueError(f"{where} is {value!r}; give a path, or an object with a path")
    unknown = sorted(set(value) - set(CLIP_KEYS))
    if unknown:
        raise ValueError(f"{where} has {unknown[0]!r}; it knows {', '.join(CLIP_KEYS)}")
    channel = value.get("channel")
    if channel is not None and (isinstance(channel, bool) or not isinstance(channel, int) or channel < 0):
        raise ValueError(f"{where}.channel is {channel!r}; channels count from 0")
    start_sec = _seconds(value.get("start_sec", 0.0), f"{where}.start_sec")
    end_sec = None if value.get("end_sec") is None else _seconds(value["end_sec"], f"{where}.end_sec")
    if end_sec is not None and end_sec <= start_sec:
        raise ValueError(f"{where} ends at {end_sec:g} s and starts at {start_sec:g} s: nothing is left")
    return Clip(folder / value["path"], channel, start_sec, end_sec)


def _duration(turn: dict[str, Any], audio: Recording | None, where: str) -> float:
    value = turn.get("duration_sec")
    if value is not None:
        duration_sec = _seconds(value, f"{where}.duration_sec")
        if audio is not None and duration_sec == 0:
            raise ValueError(f"{where}.duration_sec is 0: give the length of the audio, or leave the key out")
        return duration_sec
    if audio is None:
        return 0.0
    if isinstance(audio, Clip) and audio.end_sec is not None:
        return audio.end_sec - audio.start_sec
    return file_seconds(audio, where)


def file_seconds(audio: Recording, where: str) -> float:
    """Length of a recording by its file's header; ValueError where the file is missing, unreadable or too short."""
    path, start_sec = (audio.path, audio.start_sec) if isinstance(audio, Clip) else (audio, 0.0)
    try:
        duration_sec = soundfile.info(path).duration - start_sec
    except (soundfile.LibsndfileError, OSError):
        what = "cannot be read as audio" if path.is_file() else "does not exist"
        raise ValueError(f"{where}: {path} {what}") from None
    if duration_sec <= 0:
        raise ValueError(f"{where}: {path} has no sample from {start_sec:g} s on")
    return duration_sec


def _words(values: Any, where: str, duration_sec: float) -> tuple[Word, ...]:
    if not isinstance(values, list):
        raise ValueError(f"{where} is not a list of [word, start, end]")
    words: list[Word] = []
    for index, value in enumerate(values):
        if not isinstance(value, list) or len(value) != 3 or not isinstance(value[0], str):
            raise ValueError(f"{where}[{index}] is {value!r}; it must be [word, start, end]")
        word = Word(value[0], *(_seconds(time, f"{where}[{index}]") for time in value[1:]))
        if word.end_sec < word.start_sec or (words and word.start_sec < words[-1].start_sec):
            raise ValueError(f"{where}[{index}] ({word.text!r}) is out of order: times must not go back")
        if word.start_sec > duration_sec + 0.05:  # word times are rounded
            raise ValueError(f"{where}[{index}] ({word.text!r}) starts after the audio's {duration_sec:g} s")
        words.append(word)
    return tuple(words)


def _seconds(value: Any, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
        raise ValueError(f"{where} is {value!r}; it must be a number of seconds, not negative")
    return float(value)
