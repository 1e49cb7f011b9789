"""Conversations of a corpus: a JSONL manifest, one conversation a line, audio paths relative to its folder."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Utterance:
    """One turn: who, what, and the recording if there is one."""

    role: str
    text: str
    audio: Path | None
    duration_sec: float


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
        return self.turns[-2]

    @property
    def answer(self) -> Utterance:
        return self.turns[-1]


def read_manifest(path: str | Path, split: str | None = None) -> list[Conversation]:
    """All conversations of `split` (None: of every split).

    Raises:
        ValueError: the file is missing, or a line is bad; names file and line.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "manifest.jsonl"
    if not path.is_file():
        raise ValueError(f"{path}: no such manifest; make the corpus first: python -m scripts.make_talk_corpus")
    found = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            item = _conversation(json.loads(line), path.parent)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}:{number}: not a conversation ({type(error).__name__}: {error})") from None
        if split is None or item.split == split:
            found.append(item)
    if not found:
        raise ValueError(f"{path}: no conversation of split {split!r}")
    return found


def _conversation(line: dict[str, Any], folder: Path) -> Conversation:
    turns = tuple(
        Utterance(
            turn["role"],
            turn["text"],
            folder / turn["audio"] if turn.get("audio") else None,
            float(turn.get("duration_sec", 0.0)),
        )
        for turn in line["turns"]
    )
    if len(turns) < 2 or turns[-1].role != "assistant" or turns[-2].role != "user":
        raise ValueError("turns must end with a user turn and the assistant's answer")
    return Conversation(
        line["id"], line.get("split", "train"), line.get("family", ""), line.get("voice_group", ""), turns
    )
