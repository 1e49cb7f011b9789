"""The speech on which speech tokenizers are compared: like that of their training, altered, and never heard.

Shapes: S samples.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from flowomni.audio import read_audio
from flowomni.evaluation.shifts import SHIFTS, Shift
from scripts.make_talk_corpus import DEFAULT_FSDD, NUM_HELD_OUT_TAKES
from scripts.tokenizer_scores import RATE_HZ, Clip
from training.manifest import read_manifest
from training.recordings import Recording, read_recording
from training.stages.answers import held_out
from training.talk_text import DIGITS

ANSWERS, UNSEEN, HUMAN = "held-out answers", "unseen voices", "human digits"
NUM_DIGITS = 4  # in a clip: a digit alone is too short for STOI
GAP_SEC = 0.15


@dataclass(frozen=True)
class Condition:
    """Clips of one kind. `words` are those that the recogniser chooses from; `shift` is None for other speech."""

    name: str
    clips: tuple[Clip, ...]
    words: tuple[str, ...]
    shift: Shift | None = None


def conditions(
    corpus: Path, fsdd: Path | None, num: int, seed: int, shifts: Sequence[Shift] = SHIFTS
) -> Iterator[Condition]:
    """What to compare on, up to `num` clips each; unseen voices and people only where there are recordings of them.

    Raises:
        ValueError: the corpus has no held-out answer, or `fsdd` no recording; it names the folder.
    """
    items = read_manifest(corpus)
    answers = {path: item.answer.text for item in items if (path := item.answer.audio) and item.answer.text}
    kept = [(path, text) for path, text in answers.items() if isinstance(path, Path) and held_out(path.name)]
    if not kept:
        raise ValueError(f"--corpus {corpus} has no held-out answer (one file name in 50): give a larger corpus")
    words = _words(answers.values())
    spoken = [_read(path, text) for path, text in spread(kept, num)]
    for index, shift in enumerate(shifts):
        rng = np.random.default_rng((seed, index))
        clips = tuple(dataclasses.replace(clip, wav_S=shift(clip.wav_S, RATE_HZ, rng)) for clip in spoken)
        yield Condition(ANSWERS if shift.kind == "none" else shift.name, clips, words, shift)
    questions = [item.question for item in items if item.question.audio and item.question.text]
    unseen = [
        (item.question.audio, item.question.text)
        for item in items
        if item.voice_group == "unseen" and item.question.audio and item.question.text
    ]
    if unseen:
        clips = tuple(_read(path, text) for path, text in spread(unseen, num))
        yield Condition(UNSEEN, clips, _words(question.text for question in questions))
    digits = human_digits(fsdd, num, seed)
    if digits:
        yield Condition(HUMAN, digits, DIGITS)


def human_digits(fsdd: Path | None, num: int, seed: int) -> tuple[Clip, ...]:
    """`num` clips of `NUM_DIGITS` random digits, each read by one person, from the takes that no corpus trains on.

    Args:
        fsdd: folder of recordings named like 9_theo_0.wav, or its parent; None: the default place, if they are there.
    """
    folder = fsdd or DEFAULT_FSDD
    folder = folder / "recordings" if (folder / "recordings").is_dir() else folder
    takes: dict[str, dict[int, list[Path]]] = {}
    for path in sorted(folder.glob("[0-9]_*_*.wav")):
        digit, speaker, take = path.stem.split("_")
        if take.isdecimal() and int(take) < NUM_HELD_OUT_TAKES:
            takes.setdefault(speaker, {}).setdefault(int(digit), []).append(path)
    if not takes:
        if fsdd is not None:
            raise ValueError(f"--fsdd {fsdd} has no recording named like 9_theo_0.wav: give the folder that has them")
        return ()
    rng = np.random.default_rng(seed)
    clips = []
    for index in range(num):
        speaker = sorted(takes)[index % len(takes)]
        digits = rng.choice(sorted(takes[speaker]), NUM_DIGITS)
        gap_S = np.zeros(round(GAP_SEC * RATE_HZ), dtype=np.float32)
        parts = [gap_S]
        for digit in digits:
            some = takes[speaker][int(digit)]
            parts += [read_audio(some[rng.integers(len(some))], RATE_HZ).wav_S, gap_S]
        clips.append(Clip(f"{speaker}-{index}", " ".join(DIGITS[digit] for digit in digits), np.concatenate(parts)))
    return tuple(clips)


def _read(recording: Recording, text: str) -> Clip:
    path = recording if isinstance(recording, Path) else recording.path
    return Clip(path.stem, text, read_recording(recording, RATE_HZ).wav_S)


def _words(texts: Iterable[str]) -> tuple[str, ...]:
    return tuple(sorted({word for text in texts for word in text.split()}))


def spread(values: Sequence[Any], num: int) -> list[Any]:
    """`num` of them, evenly spread."""
    num = min(num, len(values))
    return [values[index * len(values) // num] for index in range(num)]
