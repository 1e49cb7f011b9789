"""What a session tells, and the queue in which it waits to be taken.

Shapes: S samples.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np

ANSWER_STATUSES = ("completed", "cancelled", "incomplete", "failed")


@dataclass(frozen=True)
class SpeechStarted:
    """The user began to speak (told once `min_speech_sec` of it is heard): whatever is playing should stop now.

    Attributes:
        at_sec: where speech began, in seconds of the audio pushed to this session.
    """

    at_sec: float


@dataclass(frozen=True)
class SpeechStopped:
    """The user has been silent for `silence_sec`.

    Attributes:
        at_sec: where speech ended (the silence began), in seconds of the audio pushed to this session.
    """

    at_sec: float


@dataclass(frozen=True)
class Committed:
    """A user turn, heard or typed, is part of the conversation now."""

    item_id: str


@dataclass(frozen=True)
class ResponseStarted:
    """The model begins to answer."""

    response_id: str


@dataclass(frozen=True)
class TextDelta:
    """More of the answer's text; runs ahead of the sound."""

    response_id: str
    text: str


@dataclass(frozen=True, eq=False)
class AudioDelta:
    """More of the answer's sound.

    Attributes:
        wav_S: float32 at `Session.sample_rate_hz` (24 kHz of every mel tokenizer).
        first_sample: number of the answer's samples that came before.
    """

    response_id: str
    wav_S: np.ndarray
    first_sample: int


@dataclass(frozen=True)
class ResponseDone:
    """The answer has ended.

    Attributes:
        status: "completed"; "cancelled" (by `cancel` or by the user speaking); "incomplete" (the limit of its length
            was reached); "failed" (an error, told by a SessionError before).
        text: all of its text.
        num_samples: samples delivered by AudioDelta events. What was made but not taken by `poll` when a response was
            cancelled is dropped and not counted.
    """

    response_id: str
    status: str
    text: str
    num_samples: int


@dataclass(frozen=True)
class SessionError:
    """Something was refused or failed; the session goes on, except after "session_expired" and "engine_failed".

    Attributes:
        code: "buffer_empty" (commit without audio), "buffer_full" (audio is dropped: the turn is longer than the model
            can hear, or the engine is late), "nothing_to_answer", "response_active", "text_too_long", "no_ears" (the
            model cannot hear), "session_expired", "engine_failed", "turn_failed".
        message: one line for the user.
    """

    code: str
    message: str


Event = (
    SpeechStarted | SpeechStopped | Committed | ResponseStarted | TextDelta | AudioDelta | ResponseDone | SessionError
)


class Outbox:
    """Events on their way to the consumer. Not locked: `Session` does that.

    When a response is cancelled, its sound that is still here is dropped, so that nobody plays it.
    """

    def __init__(self, sample_rate_hz: int) -> None:
        self._rate = sample_rate_hz
        self._events: deque[Event] = deque()
        self._waiting = 0  # samples in the queue
        self._response_id: str | None = None
        self._muted = False
        self._num_samples = 0  # of the present response, put and not dropped

    def __len__(self) -> int:
        return len(self._events)

    @property
    def waiting_sec(self) -> float:
        """Audio that waits to be taken."""
        return self._waiting / self._rate

    def put(self, event: Event) -> None:
        """Queue an event, but not the sound of a response that was muted."""
        if isinstance(event, ResponseStarted):
            self._response_id, self._muted, self._num_samples = event.response_id, False, 0
        elif isinstance(event, AudioDelta):
            if self._muted:
                return
            self._waiting += len(event.wav_S)
            self._num_samples += len(event.wav_S)
        self._events.append(event)

    def take(self) -> tuple[Event | None, bool]:
        """The next event, and whether it made room for audio."""
        if not self._events:
            return None, False
        event = self._events.popleft()
        if not isinstance(event, AudioDelta):
            return event, False
        self._waiting -= len(event.wav_S)
        return event, True

    def mute(self) -> str | None:
        """Drop the present response's sound, now and from now on; its id, or None if there is none."""
        if self._response_id is None:
            return None
        kept: deque[Event] = deque()
        for event in self._events:
            if isinstance(event, AudioDelta) and event.response_id == self._response_id:
                self._waiting -= len(event.wav_S)
                self._num_samples -= len(event.wav_S)
            else:
                kept.append(event)
        self._events, self._muted = kept, True
        return self._response_id

    def end(self, status: str, text: str) -> ResponseDone:
        """Queue the end of the present response."""
        if status in ("cancelled", "failed"):
            self.mute()
        elif self._muted:  # it was cancelled just before its last step
            status = "cancelled"
        assert self._response_id is not None and status in ANSWER_STATUSES
        done = ResponseDone(self._response_id, status, text, self._num_samples)
        self._response_id = None
        self._events.append(done)
        return done
