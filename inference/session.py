"""One conversation: microphone audio in, events out. `Engine.open` gives a `Session`, its worker does the rest.

    engine = Engine(FlowOmni.from_pretrained())
    session = engine.open(SessionOptions())
    session.push(wav_S, 48_000)  # any chunk size and rate, from any thread, never blocks
    event = session.poll(timeout=0.1)  # SpeechStarted, .., AudioDelta, .., ResponseDone, or None

A turn's events come in this order: SpeechStarted, SpeechStopped, Committed, ResponseStarted, TextDelta and AudioDelta
in any mixture, ResponseDone. Nothing of a response follows its ResponseDone.

Shapes: S samples.
"""

from __future__ import annotations

import math
import threading
import uuid
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from .events import (
    AudioDelta,
    Committed,
    Event,
    Outbox,
    ResponseDone,
    ResponseStarted,
    SessionError,
    SpeechStarted,
    SpeechStopped,
    TextDelta,
)

__all__ = [
    "AudioDelta",
    "Committed",
    "Event",
    "ResponseDone",
    "ResponseStarted",
    "Session",
    "SessionError",
    "SessionOptions",
    "SpeechStarted",
    "SpeechStopped",
    "TextDelta",
]

MIN_RATE_HZ, MAX_RATE_HZ = 4_000, 384_000
_PIECE_SEC = 0.5
MAX_WAITING_SEC = 60.0  # of pushed audio that the engine has not heard yet


# ------------------------------------------------------------------------------------------------------------ options


@dataclass(frozen=True)
class SessionOptions:
    """How a session listens, answers and remembers. `Session.update` changes them between turns.

    Attributes:
        vad: "server" finds the turns by itself (silero-vad); None leaves it to `commit` and `respond`.
        silence_sec: silence that ends a turn.
        preroll_sec: audio before the detected start that belongs to the turn.
        tail_sec: audio after the detected end that belongs to the turn; at most `silence_sec`.
        vad_threshold: probability of speech from which a chunk of 32 ms counts as speech.
        min_speech_sec: speech shorter than this is not a turn and interrupts nothing.
        auto_respond: a turn that the VAD ended is answered without `respond`.
        barge_in: the user speaking cancels the answer; otherwise what is said meanwhile is answered after it.
        speak: False answers in text only.
        sampling: overrides of the head's sampling, such as {"temperature": 0.7}.
        text_temperature: 0 takes the most likely text token.
        stop_threshold: speech stops where the stop state's probability passes it.
        instructions: what the model is told first; None takes the layout's own for task "answer".
        max_context_positions: positions the caches may hold, so that a session's memory and cost per step are bounded;
            None takes 1024, or what the LLM can place if that is less. Older turns are forgotten; the sequence always
            begins with the template's opening and the instructions, its attention sink (see `inference.context`).
        max_session_sec: wall time after which the session ends with "session_expired".
        max_answer_tokens: steps of an answer; None takes the layout's limit.
        max_queued_sec: audio that may wait in `poll`'s queue; a session whose consumer is slower pauses, and no other.
        seed: of text and speech; turn n of equal sessions is equal.
    """

    vad: str | None = "server"
    silence_sec: float = 0.5
    preroll_sec: float = 0.3
    tail_sec: float = 0.1
    vad_threshold: float = 0.5
    min_speech_sec: float = 0.1
    auto_respond: bool = True
    barge_in: bool = True
    speak: bool = True
    sampling: dict[str, Any] | None = None
    text_temperature: float = 0.0
    stop_threshold: float = 0.5
    instructions: str | None = None
    max_context_positions: int | None = None
    max_session_sec: float = 3600.0
    max_answer_tokens: int | None = None
    max_queued_sec: float = 30.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.vad not in ("server", None):
            raise ValueError(f"vad is {self.vad!r}; it must be 'server' or None")
        for name in ("silence_sec", "preroll_sec", "tail_sec", "min_speech_sec", "text_temperature"):
            _check(name, getattr(self, name), 0.0)
        for name in ("max_session_sec", "max_queued_sec"):
            _check(name, getattr(self, name), 0.1)
        if self.tail_sec > self.silence_sec:
            raise ValueError(f"tail_sec is {self.tail_sec}; it must be at most silence_sec, {self.silence_sec}")
        for name in ("vad_threshold", "stop_threshold"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must lie between 0 and 1")
        for name in ("max_context_positions", "max_answer_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1, or None")
        if self.instructions is not None and "[[turn" in self.instructions:
            raise ValueError("instructions hold '[[turn', which marks turns in a prompt: leave it out")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed is {self.seed}; it must be at least 0 and below 2**63")


def _check(name: str, value: float, least: float) -> None:
    if not (math.isfinite(value) and value >= least):
        raise ValueError(f"{name} is {value}; it must be a number of at least {least:g}")


# ------------------------------------------------------------------------------------------------------------ session


class Session:
    """One conversation over a shared model; opened by `Engine.open`, used from any thread, no call blocks but `poll`.

    For asyncio, `on_event` is called (on the engine's thread, without arguments) after events were queued; it must
    only wake the consumer, which then takes them with `poll(0)` until it gives None:

        wake = asyncio.Event()
        session = engine.open(options, on_event=lambda: loop.call_soon_threadsafe(wake.set))
        while not session.closed:
            await wake.wait()
            wake.clear()
            while (event := session.poll(0)) is not None:
                await send(event)
    """

    def __init__(
        self,
        options: SessionOptions,
        sample_rate_hz: int,
        check: Callable[[SessionOptions], None],
        wake: Callable[[], None],
        on_event: Callable[[], None] | None = None,
    ) -> None:
        """For the engine: `check` refuses options that this model cannot take, `wake` tells that there is work."""
        self.id = f"sess_{uuid.uuid4().hex}"
        self._options = options
        self._sample_rate_hz = sample_rate_hz
        self._check, self._wake, self._on_event = check, wake, on_event
        self._changed = threading.Condition()
        self._closed = False
        self._calls: deque[tuple[Any, ...]] = deque()
        self._waiting_sec = 0.0  # of the audio in _calls
        self._late = False  # too much audio has waited, and that was told
        self._busy = False  # the worker has taken calls and is not done with what they ask for
        self._outbox = Outbox(sample_rate_hz)

    @property
    def options(self) -> SessionOptions:
        """What was last set by `Engine.open` or `update`."""
        return self._options

    @property
    def sample_rate_hz(self) -> int:
        """Rate of the answers' sound."""
        return self._sample_rate_hz

    @property
    def closed(self) -> bool:
        """Whether the session has ended; events that are queued can still be taken, and calls have no effect."""
        return self._closed

    def push(self, wav_S: np.ndarray, sample_rate_hz: int) -> None:
        """Hear mono float samples (full scale 1), any number of them; resampled as a stream.

        Raises:
            ValueError: not one-dimensional, not finite, or a rate outside of 4 to 384 kHz.
        """
        wav_S = np.array(wav_S, dtype=np.float32)  # a copy: the caller may fill its buffer again
        if wav_S.ndim != 1:
            raise ValueError(f"audio has shape {list(wav_S.shape)}: give mono samples [S]")
        if not MIN_RATE_HZ <= sample_rate_hz <= MAX_RATE_HZ:
            raise ValueError(f"sample_rate_hz is {sample_rate_hz}; it must be from {MIN_RATE_HZ} to {MAX_RATE_HZ}")
        if not np.isfinite(wav_S).all():
            raise ValueError("audio holds NaN or infinite samples")
        sec = len(wav_S) / sample_rate_hz
        with self._changed:
            was_late, self._late = self._late, self._waiting_sec + sec > MAX_WAITING_SEC
            self._waiting_sec += 0.0 if self._late else sec
        if not self._late:
            size = math.ceil(_PIECE_SEC * sample_rate_hz)  # so that nobody else waits long while it is heard
            for start in range(0, len(wav_S), size):
                self._call("push", wav_S[start : start + size], sample_rate_hz)
        elif not was_late:
            self.put(SessionError("buffer_full", f"over {MAX_WAITING_SEC:g} s of audio wait to be heard: some is lost"))

    def commit(self, item_id: str | None = None) -> None:
        """End the user's turn here: what was pushed since the last turn or `clear` is heard. No answer by itself.

        Events: Committed, or SessionError "buffer_empty".
        """
        self._call("commit", item_id or new_id("item"))

    def clear(self) -> None:
        """Forget the audio that was pushed and is not part of a turn yet."""
        self._call("clear")

    def say_text(self, text: str, item_id: str | None = None) -> None:
        """A typed user turn. No answer by itself. Events: Committed, or SessionError "text_too_long".

        Raises:
            ValueError: the text is empty.
        """
        if not text.strip():
            raise ValueError("the text is empty: give some words")
        self._call("say_text", text, item_id or new_id("item"))

    def respond(self) -> None:
        """Answer the conversation as it stands.

        Events: ResponseStarted, deltas, ResponseDone; or SessionError "response_active" or "nothing_to_answer".
        """
        self._call("respond")

    def cancel(self) -> None:
        """Stop answering at once; without an answer in progress nothing happens. Event: ResponseDone "cancelled".

        From this call on `poll` gives no AudioDelta of that answer any more.
        """
        with self._changed:
            response_id = self._outbox.mute()
        self._call("cancel", response_id)

    def played(self, response_id: str, num_samples: int) -> None:
        """What the client has really played of an answer, as often as it likes; the last word before the next user
        turn counts, and without any, all that was delivered counts as played.

        The conversation keeps the steps whose sound was played, and no text of later steps: report the end too, or the
        answer's last samples are taken for unheard.

        Raises:
            ValueError: num_samples is negative. (An unknown or forgotten response is ignored.)
        """
        if num_samples < 0:
            raise ValueError(f"num_samples is {num_samples}; it must be at least 0")
        self._call("played", response_id, num_samples)

    def update(self, options: SessionOptions) -> None:
        """Other options from here on; `max_session_sec` counts from the opening, a changed `seed` starts anew.

        Raises:
            ValueError: naming the field.
        """
        self._check(options)
        self._options = options
        self._call("update", options)

    def poll(self, timeout: float | None = 0.0) -> Event | None:
        """The next event; None if there is none within `timeout` seconds (None waits) or the session has ended."""
        with self._changed:
            self._changed.wait_for(lambda: bool(self._outbox) or self._closed, timeout)
            event, has_room = self._outbox.take()
        if has_room:
            self._wake()
        return event

    def wait(self, timeout: float | None = None) -> bool:
        """Until all calls so far are carried out and no answer is in progress; whether that came in time.

        Someone must `poll` where an answer is longer than `max_queued_sec`.
        """
        with self._changed:
            return self._changed.wait_for(lambda: self._closed or not (self._calls or self._busy), timeout)

    def close(self) -> None:
        """End the session and free its memory; an answer in progress is cancelled without an event."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._notify()
        self._wake()

    # for the engine's worker

    def take_calls(self, max_sec: float) -> list[tuple[Any, ...]]:
        """The next calls, at most about `max_sec` of audio; the session is busy until `rest`."""
        taken: list[tuple[Any, ...]] = []
        with self._changed:
            while self._calls and max_sec > 0:
                name, *arguments = taken_call = self._calls.popleft()
                taken.append(taken_call)
                if name == "push":
                    sec = len(arguments[0]) / arguments[1]
                    self._waiting_sec -= sec
                    max_sec -= sec
            self._busy = self._busy or bool(taken)
        return taken

    def rest(self) -> None:
        """All that was asked for is done."""
        with self._changed:
            if self._busy:
                self._busy = False
                self._changed.notify_all()

    def put(self, event: Event) -> None:
        """Queue an event."""
        with self._changed:
            if self._closed:
                return
            self._outbox.put(event)
            self._changed.notify_all()
        self._notify()

    def end_response(self, status: str, text: str) -> int:
        """Queue the ResponseDone of the answer in progress; returns the samples that are delivered, or will be."""
        with self._changed:
            if self._closed:
                return 0
            done = self._outbox.end(status, text)
            self._changed.notify_all()
        self._notify()
        return done.num_samples

    @property
    def has_calls(self) -> bool:
        """Whether calls wait."""
        return bool(self._calls)

    @property
    def waiting_sec(self) -> float:
        """Audio that waits for `poll`."""
        with self._changed:
            return self._outbox.waiting_sec

    @property
    def is_full(self) -> bool:
        """Whether more audio would be too much for the consumer."""
        return self.waiting_sec >= self._options.max_queued_sec

    def _call(self, *call: Any) -> None:
        with self._changed:
            if self._closed:
                return
            self._calls.append(call)
        self._wake()

    def _notify(self) -> None:
        if self._on_event is not None:
            self._on_event()


def new_id(kind: str) -> str:
    """A name that nothing else has."""
    return f"{kind}_{uuid.uuid4().hex[:24]}"
