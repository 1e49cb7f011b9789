"""The worker's side of one session: what its calls mean, what it wants to be read, and the answer in progress.

A turn, in time. The user speaks; at a pause the clip so far is encoded and read as if it were the turn (a guess). If
the silence lasts, that is the turn and the answer begins at once; if not, the guess is dropped: state is a value, and
the conversation was not touched. When an answer has ended, the rest of it and the template up to the next turn are
read while nobody waits.

Shapes: S samples.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np
import torch

from flowomni import FlowOmni
from flowomni.generation import Batch, GenerationOptions, Row, begin
from flowomni.layouts import Turn

from .context import Context, Entry, Memory, Positions
from .events import (
    AudioDelta,
    Committed,
    ResponseStarted,
    SessionError,
    SpeechStarted,
    SpeechStopped,
    TextDelta,
)
from .listening import (
    RATE_HZ,
    Overflowed,
    Paused,
    Resampler,
    Resumed,
    Signal,
    Started,
    Stopped,
    TurnRules,
    TurnTaker,
    samples,
)
from .session import Session, SessionOptions, new_id

MAX_CONTEXT_POSITIONS = 1024  # 80 s of speech: a step must not cost much more late in a conversation than early
_SEED_STEP = 0x9E3779B97F4A7C15  # between the seeds of one session's answers; odd, so that they all differ


def generation_options(omni: FlowOmni, options: SessionOptions) -> GenerationOptions:
    """What the generation loop needs to know.

    Raises:
        ValueError: the sampling has an unknown name or a bad value.
    """
    try:
        chosen = omni.generation_options(options.speak, options.sampling, options.stop_threshold)
    except TypeError as error:
        raise ValueError(f"sampling holds a value of a wrong kind: {error}") from None
    return dataclasses.replace(chosen, text_temperature=options.text_temperature, max_steps=options.max_answer_tokens)


def make_context(omni: FlowOmni, options: SessionOptions) -> Context:
    """The layout of a session's conversation.

    Raises:
        ValueError: `max_context_positions` is too small or too large for this model.
    """
    model, processor = omni.model, omni.processor
    placed = getattr(model.config.llm.get_text_config(), "max_position_embeddings", None) or MAX_CONTEXT_POSITIONS
    wanted = options.max_context_positions
    if wanted is not None and wanted > placed:
        raise ValueError(f"max_context_positions is {wanted}, but the language model can place {placed}: set it lower")
    max_answer = options.max_answer_tokens or processor.layout.config.max_answer_tokens
    max_positions = wanted or min(placed, MAX_CONTEXT_POSITIONS)
    return Context(model, processor, max_positions, options.instructions, max_answer)


class Urgency(IntEnum):
    """What is read first."""

    ANSWER = 0  # somebody waits
    GUESS = 1  # somebody may wait soon
    SETTLE = 2


@dataclass(frozen=True, eq=False)
class Task:
    """Something to read."""

    urgency: Urgency
    wanted: Positions
    entries: list[Entry]


@dataclass(eq=False)
class Guess:
    """The turn, if the user has finished, and what is read of it."""

    entry: Entry
    memory: Memory


@dataclass(eq=False)
class Answer:
    """An answer in progress, or the last one.

    Attributes:
        row: None before its first step.
        prompt: the memory that it began with.
        text: what was given out.
        num_samples: that were given out; played: the client's last word on how many were played.
    """

    id: str
    row: Row | None = None
    prompt: Memory | None = None
    text: str = ""
    num_samples: int = 0
    played: int | None = None


class Seat:
    """One session, as the engine's worker sees it.

    Args:
        pull: takes this seat's answer out of the batch and gives it as a batch of one; None if it is not in there.
        responses: counts how answers end.
    """

    def __init__(
        self,
        session: Session,
        omni: FlowOmni,
        pull: Callable[[Seat], Batch | None],
        responses: Counter[str],
    ) -> None:
        self.session, self.omni, self._pull, self._responses = session, omni, pull, responses
        self.options = session.options
        self.context = make_context(omni, self.options)
        self.ears = TurnTaker(self._rules())
        self.resampler = Resampler()
        self.entries: list[Entry] = []
        self.waiting: list[Entry] = []  # user turns that came during an answer
        self.memory = Memory()
        self.guess: Guess | None = None
        self.answer: Answer | None = None
        self.last: Answer | None = None  # while its playing may still be reported
        self.task: Task | None = None
        self.parked: Batch | None = None  # the answer, out of the batch while its consumer is slow
        self._answer_next = False
        self._num_answers = 0
        self._told_no_ears = False
        self._settle()

    @property
    def idle(self) -> bool:
        """Whether nothing is to be done before the next call."""
        return self.answer is None and self.task is None

    def _rules(self) -> TurnRules:
        options, features = self.options, self.omni.processor.heard_features
        return TurnRules(
            manual=options.vad is None,
            threshold=options.vad_threshold,
            silence_samples=samples(options.silence_sec),
            preroll_samples=samples(options.preroll_sec),
            tail_samples=samples(options.tail_sec),
            min_speech_samples=samples(options.min_speech_sec),
            max_samples=0 if features is None else features.max_samples,
        )

    # calls

    def handle(self, call: tuple[Any, ...]) -> None:
        """Carry out one call of the session."""
        name, *arguments = call
        getattr(self, f"_on_{name}")(*arguments)

    def _on_push(self, wav_S: np.ndarray, rate_hz: int) -> None:
        if self.omni.processor.heard_features is not None:
            self._hear(self.resampler.push(wav_S, rate_hz))
        elif not self._told_no_ears:
            self._told_no_ears = True
            self._refuse("no_ears", "this model has no speech encoder: it takes text only")

    def _on_commit(self, item_id: str) -> None:
        self._hear(self.resampler.flush())
        clip_S = self.ears.take()
        self._drop_guess()
        if len(clip_S):
            self._add_turn(self.context.heard(clip_S), item_id)
        else:
            self._refuse("buffer_empty", "there is no audio since the last turn")

    def _on_clear(self) -> None:
        self.resampler.flush()
        self.ears.reset()
        self._drop_guess()

    def _on_say_text(self, text: str, item_id: str) -> None:
        self._add_turn(self.context.typed(text), item_id)

    def _on_respond(self) -> None:
        if self.answer is not None:
            self._refuse("response_active", "an answer is in progress: cancel it first")
        elif not self.entries or self.entries[-1].turn.role != "user":
            self._refuse("nothing_to_answer", "the user has said nothing since the last answer")
        else:
            self._ask()

    def _on_cancel(self, response_id: str | None) -> None:
        if self.answer is not None and response_id in (None, self.answer.id):
            self.stop("cancelled")

    def _on_played(self, response_id: str, num_samples: int) -> None:
        for answer in (self.answer, self.last):
            if answer is not None and answer.id == response_id:
                answer.played = num_samples
        if self.ears.speaking:  # otherwise there is time: the next report may say more
            self._keep_what_was_played()

    def _on_update(self, options: SessionOptions) -> None:
        old, self.options = self.options, options
        self.ears.follow(self._rules())
        if options.vad is None:
            self.guess = None
        if options.seed != old.seed:
            self._num_answers = 0
        relevant = ("instructions", "max_context_positions", "max_answer_tokens")
        if any(getattr(old, name) != getattr(options, name) for name in relevant):
            self.context = make_context(self.omni, options)
            self.guess = None
        if self.answer is None:
            self._settle()

    def _refuse(self, code: str, message: str) -> None:
        self.session.put(SessionError(code, message))

    # listening

    def _hear(self, wav_S: np.ndarray) -> None:
        for signal in self.ears.hear(wav_S):
            self._on_signal(signal)

    def _on_signal(self, signal: Signal) -> None:
        if isinstance(signal, Started):
            self.session.put(SpeechStarted(signal.at_sample / RATE_HZ))
            if self.answer is not None and self.options.barge_in:
                self.stop("cancelled")
            self._keep_what_was_played()
        elif isinstance(signal, Paused):
            if self.answer is None:
                self.guess = Guess(self.context.heard(signal.clip_S), self.memory)
                self._plan_guess()
        elif isinstance(signal, Resumed):
            self._drop_guess()
        elif isinstance(signal, Overflowed):
            limit = self.omni.processor.max_heard_sec
            self._refuse(
                "buffer_full", f"a turn is at most {limit:g} s long, which the model can hear: the rest is lost"
            )
        else:
            self._on_stopped(signal)

    def _on_stopped(self, signal: Stopped) -> None:
        self.session.put(SpeechStopped(signal.at_sample / RATE_HZ))
        guess, self.guess = self.guess, None
        if guess is not None:
            self.memory = guess.memory
        entry = guess.entry if guess is not None else self.context.heard(signal.clip_S)
        self._add_turn(entry, new_id("item"))
        if self.options.auto_respond:
            if self.answer is None:
                self._ask()
            else:
                self._answer_next = True

    def _plan_guess(self) -> None:
        assert self.guess is not None
        entries = self.context.fit([*self.entries, self.guess.entry])
        assert entries is not None  # `make_context` has seen to it that a heard turn has room
        self.task = Task(Urgency.GUESS, self.context.prompt(entries), entries)

    def _drop_guess(self) -> None:
        if self.guess is not None:
            self.guess = None
            self._settle()

    # conversation

    def _add_turn(self, entry: Entry, item_id: str) -> None:
        if self.context.fit([entry]) is None:
            self._refuse("text_too_long", "the text has no room in the model's context: say it in parts")
            return
        self.session.put(Committed(item_id))
        if self.answer is not None:
            self.waiting.append(entry)
            return
        self.guess = None
        self._keep_what_was_played()
        self.last = None
        self.entries = self.context.fit([*self.entries, entry]) or [entry]
        self.task = Task(Urgency.GUESS, self.context.prompt(self.entries), self.entries)

    def _keep_what_was_played(self) -> None:
        """The last answer as it was really heard, as far as the client has told."""
        last = self.last
        if last is None or last.played is None or last.row is None or self.answer is not None:
            return
        heard = self.context.answered(last.row, min(last.played, last.num_samples))
        if _num_steps(heard) == _num_steps(self.entries[-1]):
            return
        self.entries = [*self.entries[:-1], heard]
        if self.guess is not None:
            self._plan_guess()
        else:
            self._settle()

    def _settle(self) -> None:
        """Read all that is certain before the next turn, forgetting old turns where there is no room."""
        if self.guess is not None:
            return
        if self.entries and self.entries[-1].turn.role == "user":
            wanted = self.context.prompt(self.entries)
        else:
            self.entries = self.context.settle(self.entries)
            wanted = self.context.opening(self.entries)
        self.task = Task(Urgency.SETTLE, wanted, self.entries) if len(wanted) else None

    # reading

    def read_piece(self, limit: int) -> None:
        """Read a piece of what is wanted, or encode a turn of it: between two steps of others, one of them."""
        task = self.task
        assert task is not None
        if self.context.encode(task.entries):
            return
        memory = self.guess.memory if self.guess is not None else self.memory
        memory = self.context.read_piece(memory, task.wanted, task.entries, limit)
        if self.guess is not None:
            self.guess.memory = memory
        else:
            self.memory = memory
        if len(memory) == len(task.wanted):
            self.task = None

    # answering

    def _ask(self) -> None:
        self._answer_next = False
        self.guess = self.last = None
        self.answer = Answer(new_id("resp"))
        self.session.put(ResponseStarted(self.answer.id))
        self.task = Task(Urgency.ANSWER, self.context.prompt(self.entries), self.entries)

    @property
    def ready(self) -> bool:
        """Whether an answer can take its first step."""
        return self.answer is not None and self.answer.row is None and self.task is None

    def begin(self) -> Batch:
        """The answer as a batch of one, before its first step."""
        assert self.answer is not None and self.memory.reading is not None
        seed = (self.options.seed + self._num_answers * _SEED_STEP) % 2**63
        self._num_answers += 1
        options = generation_options(self.omni, self.options)
        generator = torch.Generator().manual_seed(seed)
        batch = begin(self.omni.model, self.omni.processor, self.memory.reading, [options], [generator])
        self.answer.row, self.answer.prompt = batch.rows[0], self.memory
        self.memory = Memory()  # what it holds lives on in the batch
        return batch

    def stepped(self, row: Row, text: str, wav_S: np.ndarray) -> None:
        """Tell what a step brought."""
        answer = self.answer
        assert answer is not None
        answer.row = row
        text = text if answer.text else text.lstrip()
        if text:
            answer.text += text
            self.session.put(TextDelta(answer.id, text))
        if len(wav_S):
            self.session.put(AudioDelta(answer.id, wav_S, answer.num_samples))
            answer.num_samples += len(wav_S)

    def stop(self, status: str) -> None:
        """End the answer here."""
        answer, batch = self.answer, self.parked or self._pull(self)
        assert answer is not None
        self.answer = self.parked = None
        self._responses[status] += 1
        answer.num_samples = self.session.end_response(status, answer.text.strip())
        if batch is not None:
            assert answer.prompt is not None and answer.row is not None
            self.memory = self.context.after(answer.prompt, answer.row, batch.reading)
        if answer.row is None:
            self.entries = [*self.entries, Entry(Turn("assistant", "", text_ids=()))]
        else:
            self.entries = [*self.entries, self.context.answered(answer.row, answer.num_samples)]
            self.last = answer
        waiting, self.waiting = self.waiting, []
        if waiting:
            self.last = None
            self.entries = self.context.fit([*self.entries, *waiting]) or waiting[-1:]
        self._settle()
        if self._answer_next and status != "failed":
            self._ask()
        self._answer_next = False

    def fail(self, code: str, message: str) -> None:
        """Something went wrong with this session: what was read is forgotten, the conversation goes on."""
        self._refuse(code, message)
        self.guess = self.task = None
        self._answer_next = False
        if self.answer is not None:
            self.stop("failed")
        self.memory = Memory()
        self._settle()


def _num_steps(entry: Entry) -> tuple[int, int]:
    """What tells two ends of one answer apart."""
    turn = entry.turn
    return len(turn.text_ids or ()), 0 if turn.speech_LX is None else len(turn.speech_LX)
