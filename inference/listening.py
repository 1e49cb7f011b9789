"""Ears of a session: any chunks at any rate to 16 kHz, and where the user's turns begin, pause and end.

Turn taking is silero-vad's (https://github.com/snakers4/silero-vad): a chunk of 32 ms is speech from `vad_threshold`
on, silence from 0.15 below that, and what it was before in between. All decisions are taken in samples, never in wall
time: the same audio gives the same turns whatever the chunks and however late it is heard.

**What can be done while the user speaks, exactly.** Whisper's encoder looks at the whole clip and its features are
scaled by the clip's loudest bin, so that no part of a clip can be encoded before its end is known. But its end is known
long before the turn's: a clip ends `tail_sec` after the speech, and that it was the end is decided only after
`silence_sec`. So each pause is told as soon as its tail is there (`Paused`), with the clip that the turn will be if
nothing more is said. The engine encodes and reads it at once, while it waits for the silence to grow old enough; if the
user goes on (`Resumed`) the result is dropped, and the next pause gives a longer clip. At the end of a turn everything
is read, and read as an offline question of the same clip is.

Shapes: S samples.
"""

from __future__ import annotations

import importlib.util
import math
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import onnxruntime
import soxr

RATE_HZ = 16_000
CHUNK_SAMPLES = 512
_CONTEXT_SAMPLES = 64
_HYSTERESIS = 0.15  # silero-vad's own


@dataclass(frozen=True, eq=False)
class VadState:
    """What the detector remembers of one stream. A value."""

    hidden: np.ndarray
    context_S: np.ndarray


class Vad:
    """silero-vad by onnxruntime alone; one for all sessions.

    The package's own Python is not imported: it sets torch's number of threads to one for the whole process.

    Raises:
        ValueError: the package is not installed.
    """

    def __init__(self) -> None:
        found = importlib.util.find_spec("silero_vad")
        if found is None or not found.submodule_search_locations:
            raise ValueError("turn detection needs the package silero-vad: pip install silero-vad, or set vad to None")
        options = onnxruntime.SessionOptions()
        options.inter_op_num_threads = options.intra_op_num_threads = 1
        path = Path(found.submodule_search_locations[0]) / "data" / "silero_vad.onnx"
        self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self._rate = np.array(RATE_HZ, np.int64)

    def init_state(self) -> VadState:
        return VadState(np.zeros((2, 1, 128), np.float32), np.zeros(_CONTEXT_SAMPLES, np.float32))

    def step(self, chunk_S: np.ndarray, state: VadState) -> tuple[float, VadState]:
        """The probability that the next 512 samples are speech, and the next state."""
        input_S = np.concatenate([state.context_S, chunk_S])
        feed = {"input": input_S[None], "state": state.hidden, "sr": self._rate}
        probability, hidden = self._session.run(None, feed)
        return float(probability[0, 0]), VadState(hidden, input_S[-_CONTEXT_SAMPLES:])


@cache
def load_vad() -> Vad:
    """The one detector of this process."""
    return Vad()


# ------------------------------------------------------------------------------------------------------------ signals


@dataclass(frozen=True)
class Started:
    """Speech began at this sample (it may be long enough only now)."""

    at_sample: int


@dataclass(frozen=True, eq=False)
class Paused:
    """Speech ended, perhaps: the turn's clip if it did."""

    clip_S: np.ndarray


@dataclass(frozen=True)
class Resumed:
    """It had not ended."""


@dataclass(frozen=True)
class Overflowed:
    """Audio was dropped, since no turn may be longer (without turn detection); told once a turn."""


@dataclass(frozen=True, eq=False)
class Stopped:
    """The turn has ended at this sample. Its clip is the last `Paused` one, unless the turn was too long."""

    at_sample: int
    clip_S: np.ndarray


Signal = Started | Paused | Resumed | Overflowed | Stopped


@dataclass(frozen=True)
class TurnRules:
    """`SessionOptions` of the same names, in samples at 16 kHz; `max_samples` is the longest clip.

    Where `manual` is set nothing is detected: all audio belongs to the turn.
    """

    manual: bool
    threshold: float
    silence_samples: int
    preroll_samples: int
    tail_samples: int
    min_speech_samples: int
    max_samples: int


class Recording:
    """The audio that may still be needed, addressed by sample since the stream began."""

    def __init__(self) -> None:
        self.start = self.end = 0
        self._chunks: deque[np.ndarray] = deque()

    def append(self, chunk_S: np.ndarray) -> None:
        self._chunks.append(chunk_S)
        self.end += len(chunk_S)

    def clip(self, start: int, end: int) -> np.ndarray:
        """Samples `start` to `end`, both within what is kept."""
        assert self.start <= start <= end <= self.end
        joined_S = np.concatenate([*self._chunks, np.zeros(0, np.float32)])
        return joined_S[start - self.start : end - self.start].copy()

    def forget(self, before: int) -> None:
        """Drop what lies before a sample."""
        while self._chunks and self.start < before:
            first_S = self._chunks.popleft()
            kept_S = first_S[before - self.start :]
            self.start += len(first_S) - len(kept_S)
            if len(kept_S):
                self._chunks.appendleft(kept_S)
        if not self._chunks:
            self.start = self.end


class TurnTaker:
    """Finds turns in 16 kHz audio. Not thread-safe: one stream, one owner."""

    def __init__(self, rules: TurnRules) -> None:
        self.recording = Recording()
        self._vad_state: VadState | None = None
        self._pending_S = np.zeros(0, np.float32)
        self.rules = rules
        self.reset()

    @property
    def speaking(self) -> bool:
        """Whether a detected turn is in progress."""
        return self._told

    def follow(self, rules: TurnRules) -> None:
        """Other rules from here on; audio that is no turn yet is kept."""
        if rules.manual != self.rules.manual:
            self._begin_anew()
        self.rules = rules

    def reset(self) -> None:
        """Forget the turn in progress and the audio before now."""
        self._pending_S = self._pending_S[:0]
        self.recording.forget(self.recording.end)
        self._begin_anew()

    def _begin_anew(self) -> None:
        self._begin: int | None = None  # where speech began
        self._speech_samples = 0
        self._told = False  # whether it was long enough to be told
        self._silence: int | None = None  # where the present silence began
        self._paused = self._overflowed = False

    def take(self) -> np.ndarray:
        """End the turn here: its audio so far, empty if there is none."""
        if not self.rules.manual and self._begin is None:
            return np.zeros(0, np.float32)
        start = self.recording.start if self.rules.manual else self._clip_start()
        clip_S = np.concatenate([self.recording.clip(start, self.recording.end), self._pending_S])
        self.reset()
        return clip_S[: self.rules.max_samples]

    def hear(self, wav_S: np.ndarray) -> Iterator[Signal]:
        """More audio; signals in order, each as soon as its chunk is heard."""
        self._pending_S = np.concatenate([self._pending_S, wav_S])
        while len(self._pending_S) >= CHUNK_SAMPLES:
            chunk_S, self._pending_S = self._pending_S[:CHUNK_SAMPLES].copy(), self._pending_S[CHUNK_SAMPLES:]
            if self.rules.manual:
                yield from self._keep(chunk_S)
            else:
                yield from self._detect(chunk_S)

    def _keep(self, chunk_S: np.ndarray) -> Iterator[Signal]:
        if self.recording.end - self.recording.start < self.rules.max_samples:
            self.recording.append(chunk_S)
        elif not self._overflowed:
            self._overflowed = True
            yield Overflowed()

    def _detect(self, chunk_S: np.ndarray) -> Iterator[Signal]:
        vad = load_vad()
        probability, self._vad_state = vad.step(chunk_S, self._vad_state or vad.init_state())
        start = self.recording.end
        self.recording.append(chunk_S)
        if probability >= self.rules.threshold:
            yield from self._speech(start)
        elif probability < max(self.rules.threshold - _HYSTERESIS, 0.01):
            self._quiet(start)
        yield from self._decide()

    def _speech(self, start: int) -> Iterator[Signal]:
        if self._begin is None:
            self._begin, self._speech_samples = start, 0
        self._speech_samples += CHUNK_SAMPLES
        self._silence = None
        if self._paused:
            self._paused = False
            yield Resumed()
        if not self._told and self._speech_samples >= self.rules.min_speech_samples:
            self._told = True
            yield Started(self._begin)

    def _quiet(self, start: int) -> None:
        if self._begin is not None and not self._told:  # a click, a breath
            self._begin = None
        elif self._told and self._silence is None:
            self._silence = start

    def _decide(self) -> Iterator[Signal]:
        rules, end = self.rules, self.recording.end
        if not self._told:
            if self._begin is None:
                self.recording.forget(end - rules.preroll_samples)
            return
        clip_start = self._clip_start()
        if end - clip_start >= rules.max_samples:
            clip_end = clip_start + rules.max_samples
            yield self._stop(clip_end, self.recording.clip(clip_start, clip_end), clip_end)
        elif self._silence is not None:
            clip_end = self._silence + rules.tail_samples
            if not self._paused and end >= clip_end:
                self._paused = True
                yield Paused(self.recording.clip(clip_start, clip_end))
            if end - self._silence >= rules.silence_samples:
                yield self._stop(self._silence, self.recording.clip(clip_start, clip_end), clip_end)

    def _stop(self, at_sample: int, clip_S: np.ndarray, clip_end: int) -> Stopped:
        self._begin, self._told, self._silence, self._paused = None, False, None, False
        self.recording.forget(clip_end)
        return Stopped(at_sample, clip_S)

    def _clip_start(self) -> int:
        assert self._begin is not None
        return max(self._begin - self.rules.preroll_samples, self.recording.start)


class Resampler:
    """A stream of chunks at any rate to 16 kHz; the same samples whatever the chunks."""

    def __init__(self) -> None:
        self._rate_hz = RATE_HZ
        self._stream: soxr.ResampleStream | None = None

    def push(self, wav_S: np.ndarray, rate_hz: int) -> np.ndarray:
        """What came out for one more chunk; a new rate first gives what the old one owed."""
        owed_S = np.zeros(0, np.float32)
        if rate_hz != self._rate_hz:
            owed_S = self.flush()
            self._rate_hz = rate_hz
        if rate_hz == RATE_HZ:
            return np.concatenate([owed_S, wav_S])
        if self._stream is None:
            self._stream = soxr.ResampleStream(rate_hz, RATE_HZ, 1, dtype="float32")
        return np.concatenate([owed_S, self._stream.resample_chunk(np.ascontiguousarray(wav_S))])

    def flush(self) -> np.ndarray:
        """What is owed; the next chunk begins a new stream."""
        if self._stream is None:
            return np.zeros(0, np.float32)
        owed_S = self._stream.resample_chunk(np.zeros(0, np.float32), last=True)
        self._stream = None
        return owed_S


def samples(sec: float) -> int:
    """Seconds to whole samples at 16 kHz."""
    return math.floor(sec * RATE_HZ + 0.5)
