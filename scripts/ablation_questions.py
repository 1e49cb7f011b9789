"""What every cell of an ablation is asked: the same held-out questions, as they are and altered.

    speak            the right answer, given as text, read aloud: the voice alone
    typed            typed questions
    heard            spoken questions, of voices that the ears were trained on
    noise 5 dB, ..   the same spoken questions, altered (`flowomni.evaluation.shifts`)
    unseen voices, unseen humans    spoken questions of others
    voice ..         recordings of the right answers, altered, given to the model as its own voice: see
                     `scripts.ablation_voice`

Shapes: S samples.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from flowomni.api import Question
from flowomni.encoder import HEARD_SAMPLE_RATE_HZ
from flowomni.evaluation.shifts import SHIFTS, Shift
from scripts.tokenizer_conditions import spread
from training.manifest import Conversation, read_manifest
from training.recordings import playable, read_recording

SPEAK, TYPED, HEARD = "speak", "typed", "heard"
UNSEEN = {"unseen voices": "unseen", "unseen humans": "unseen_human"}
SHIFTED, VOICE = "shifts", "voice"
KINDS = (SPEAK, TYPED, HEARD, SHIFTED, *UNSEEN, VOICE)
OF_EARS = (HEARD, SHIFTED, *UNSEEN)
HEARD_SHIFTS = tuple(shift for shift in SHIFTS if shift.kind != "none")
VOICE_SHIFTS = tuple(shift for shift in SHIFTS if shift.kind != "noise")


@dataclass(frozen=True)
class JudgeOptions:
    """How a grid is judged; the grid's key `judge`.

    Attributes:
        conditions: which of `KINDS`, or one of `SHIFTED` by its name ("noise 5 dB"); empty: all that every cell can do.
        manifest: of the questions; None: the reference cell's.
        split: of the manifest.
        families: of the questions; empty: those that the reference cell trains on.
        num_questions: of each condition that is not altered.
        num_shifted: of each altered condition, of other voices, and of the target voice.
        num_samples: how often the questions of the first condition are asked, each time with another seed of the
            sampling; the others are asked once.
        num_quality: answers of each condition that is not altered whose DNSMOS is taken, which is slow.
        num_turns: of the timing; 0: none.
        batch_size: questions answered at once.
        seed: of noise and intervals.
    """

    conditions: list[str] = field(default_factory=list)
    manifest: str | None = None
    split: str = "test"
    families: list[str] = field(default_factory=list)
    num_questions: int = 24
    num_shifted: int = 12
    num_samples: int = 2
    num_quality: int = 8
    num_turns: int = 5
    batch_size: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        known = (*KINDS, *(shift.name for shift in HEARD_SHIFTS))
        for name in self.conditions:
            if name not in known:
                raise ValueError(f"judge.conditions has {name!r}; known: {', '.join(known)}")
        for name in ("num_questions", "num_shifted", "num_samples", "num_quality", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"judge.{name} is {getattr(self, name)}; it must be at least 1")
        if self.num_turns < 0 or self.seed < 0:
            raise ValueError(f"judge.num_turns is {self.num_turns}, seed {self.seed}; neither may be negative")


@dataclass(frozen=True)
class Condition:
    """Questions of one kind.

    Attributes:
        kind: one of `KINDS`.
        num_samples: how often each is asked, each time with another seed of the sampling.
        shift: what is done to the spoken question; its noise is drawn for each question anew, the same for every cell.
    """

    name: str
    kind: str
    items: tuple[Conversation, ...]
    num_samples: int = 1
    shift: Shift | None = None
    seed: int = 0

    @property
    def ids(self) -> list[str]:
        """Of its questions."""
        return [item.id for item in self.items]

    @cached_property
    def questions(self) -> list[Question]:
        """Of its items, in order."""
        return [self._question(index, item) for index, item in enumerate(self.items)]

    def _question(self, index: int, item: Conversation) -> Question:
        if self.kind == SPEAK:
            return Question(text=item.answer.text, task="speak")
        if self.kind == TYPED:
            return Question(text=item.question.text)
        assert item.question.audio is not None, "chosen for it"
        if self.shift is None:
            return Question(audio=playable(item.question.audio))
        wav_S = read_recording(item.question.audio, HEARD_SAMPLE_RATE_HZ).wav_S
        generator = np.random.default_rng((self.seed, HEARD_SHIFTS.index(self.shift), index))
        return Question(audio=(self.shift(wav_S, HEARD_SAMPLE_RATE_HZ, generator), HEARD_SAMPLE_RATE_HZ))


def questions_of(
    options: JudgeOptions, manifest: str, kinds: Sequence[str], families: Collection[str] = ()
) -> list[Condition]:
    """The conditions of some kinds; those that the manifest has nothing for are left out. `VOICE` is not among them.

    Args:
        families: only these, where there are any.

    Raises:
        ValueError: the manifest cannot be read, or no held-out answer in it has a recording to compare with.
    """
    items = [item for item in read_manifest(manifest, options.split) if item.answer.audio and item.answer.text]
    items = [item for item in items if not families or item.family in families]
    if not items:
        raise ValueError(f"{manifest}: no answer of split {options.split!r} has words and a recording to compare with")
    items.sort(key=lambda item: (item.family, item.id))  # so that what is spread over them has every family
    heard = [item for item in items if item.question.audio]
    trained = [item for item in heard if item.voice_group not in ("unseen", "human", "unseen_human")]
    num, num_shifted = options.num_questions, options.num_shifted
    found = [
        Condition(SPEAK, SPEAK, tuple(spread(_once(items, lambda item: item.answer.text), num))),
        Condition(
            TYPED,
            TYPED,
            tuple(spread(_once([i for i in items if i.question.text], lambda item: item.question.text), num)),
        ),
        Condition(HEARD, HEARD, tuple(spread(trained, num))),
    ]
    for shift in HEARD_SHIFTS:
        found.append(Condition(shift.name, SHIFTED, tuple(spread(trained, num_shifted)), 1, shift, options.seed))
    for name, group in UNSEEN.items():
        some = [item for item in heard if item.voice_group == group]
        found.append(Condition(name, name, tuple(spread(some, num_shifted))))
    asked = set(options.conditions) or set(KINDS)
    found = [c for c in found if c.kind in kinds and asked & {c.kind, c.name} and c.items]
    return [replace(found[0], num_samples=options.num_samples), *found[1:]] if found else []


def _once(items: Sequence[Conversation], text_of: Callable[[Conversation], str]) -> list[Conversation]:
    """The first item with each text."""
    first: dict[str, Conversation] = {}
    for item in items:
        first.setdefault(text_of(item), item)
    return list(first.values())
