"""People who interrupt: a client that speaks into answers at random moments, and notes when their sound ends.

Its player is simple-minded: it plays whatever comes, in real time, and drops what it holds when `speech_started` comes.
So a chunk that the server sends too late would be played, and is counted as stale.

When the detector of the server can know that somebody speaks is known here too: the same detector hears what is sent
(`inference.listening`: the same audio gives the same turns). Three times are kept apart:

    the user speaks -- vad --> the detector has heard enough -- stop --> the player's last sample

Shapes: S samples.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import sys
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from websockets.asyncio.client import ClientConnection, connect

from inference.listening import RATE_HZ as HEARD_HZ
from inference.listening import Resampler, Started, TurnRules, TurnTaker, samples
from scripts.load_test import RATE_HZ, Pace

TICK_SEC = 0.02
SILENCE_SEC, PREROLL_SEC, TAIL_SEC, MIN_SPEECH_SEC, THRESHOLD = 0.25, 0.3, 0.1, 0.1, 0.5
DETECTION = {"type": "server_vad", "threshold": THRESHOLD, "silence_duration_ms": round(1000 * SILENCE_SEC)}


@dataclass(frozen=True)
class BargeIn:
    """One interruption.

    Attributes:
        moment: what was interrupted: "before the sound", "while it is made" or "while it is played", when all of it
            had been made.
        vad_sec: of audio, from where the detector puts the speech's start to where it has heard enough of it.
        stop_sec: from when that audio was sent to the last sample that the player played.
        played_sec: of the answer.
    """

    moment: str
    vad_sec: float
    stop_sec: float
    played_sec: float


@dataclass
class Player:
    """A loudspeaker in real time: what is pushed is played after what is there."""

    response: str | None = None
    end: float = 0.0
    num_samples: int = 0

    def push(self, response: str, num_samples: int, now: float) -> None:
        """More of a response."""
        if response != self.response:
            self.response, self.num_samples, self.end = response, 0, now
        self.end = max(self.end, now) + num_samples / RATE_HZ
        self.num_samples += num_samples

    def playing(self, now: float) -> bool:
        return now < self.end

    def stop(self, now: float) -> int:
        """Drop the rest; how many samples of the response were played."""
        dropped = max(0, round((self.end - now) * RATE_HZ))
        self.num_samples, self.end = self.num_samples - min(dropped, self.num_samples), min(self.end, now)
        return self.num_samples


@dataclass
class Found:
    """What the interruptions of one or more callers brought.

    Attributes:
        stale: chunks of an answer that came after it was interrupted or had ended.
        unheard: times that the user spoke and was not heard, or not answered.
        errors: codes of error events.
    """

    barge_ins: list[BargeIn] = field(default_factory=list)
    stale: int = 0
    unheard: int = 0
    errors: list[str] = field(default_factory=list)

    def add(self, other: Found) -> None:
        self.barge_ins += other.barge_ins
        self.stale += other.stale
        self.unheard += other.unheard
        self.errors += other.errors


class Ears:
    """The server's detector, hearing what is sent to it: when it could know that speech has begun."""

    def __init__(self) -> None:
        silence, preroll, tail, min_speech, longest = map(
            samples, (SILENCE_SEC, PREROLL_SEC, TAIL_SEC, MIN_SPEECH_SEC, 30.0)
        )
        self._taker = TurnTaker(TurnRules(False, THRESHOLD, silence, preroll, tail, min_speech, longest))
        self._resampler = Resampler()
        self._heard = 0
        self.started: list[tuple[float, float]] = []  # (seconds of audio that it took, when they had been sent)

    def hear(self, wav_S: np.ndarray, sent: float) -> None:
        heard_S = self._resampler.push(wav_S, RATE_HZ)
        self._heard += len(heard_S)
        for signal in self._taker.hear(heard_S):
            if isinstance(signal, Started):
                self.started.append(((self._heard - signal.at_sample) / HEARD_HZ, sent))


class Caller:
    """One session: a microphone that is always open, a player, and no manners.

    Args:
        wavs: what is said, float32 at 24 kHz, taken in turn.
        rng: of the moments.
        patience_sec: that an answer may take to begin.
    """

    def __init__(
        self, socket: ClientConnection, wavs: Sequence[np.ndarray], rng: np.random.Generator, patience_sec: float
    ) -> None:
        self.socket, self.wavs, self.rng, self.patience_sec = socket, wavs, rng, patience_sec
        self.found, self.player, self.ears = Found(), Player(), Ears()
        self.item: str | None = None  # of the answer in progress or played
        self.response: str | None = None
        self.making = False
        self.over: set[str] = set()
        self.answered = asyncio.Event()
        self._said = 0
        self._num_started = 0
        self._speech_S = np.zeros(0, np.float32)

    async def send(self, type_: str, **fields: Any) -> None:
        await self.socket.send(json.dumps({"type": type_} | fields))

    async def interrupt(self, number: int, most_sec: float) -> Found:
        """Speak into `number` answers, each at a moment from 0 to `most_sec` after it began."""
        audio = {"input": {"turn_detection": DETECTION}}
        await self.send("session.update", session={"type": "realtime", "audio": audio})
        async with _beside(self._microphone()), _beside(self._listen()):
            self._speak()
            while len(self.found.barge_ins) < number:
                try:
                    async with asyncio.timeout(self.patience_sec):
                        await self.answered.wait()
                except TimeoutError:
                    self.found.unheard += 1
                    if self.found.unheard > 10 + number:
                        raise ValueError("the server answers hardly anything of what is said to it") from None
                self.answered.clear()
                await asyncio.sleep(self.rng.uniform(0, most_sec))
                self._speak()
        return self.found

    def _speak(self) -> None:
        self._speech_S = self.wavs[self._said % len(self.wavs)]
        self._said += 1

    async def _microphone(self) -> None:
        pace, size = Pace(), round(TICK_SEC * RATE_HZ)
        while True:
            chunk_S, self._speech_S = self._speech_S[:size], self._speech_S[size:]
            chunk_S = np.pad(chunk_S, (0, size - len(chunk_S)))
            pcm_S = np.rint(chunk_S * 32_767).astype("<i2")
            await self.send("input_audio_buffer.append", audio=base64.b64encode(pcm_S.tobytes()).decode("ascii"))
            self.ears.hear(pcm_S.astype(np.float32) / 32_768, time.perf_counter())
            await pace.wait(TICK_SEC)

    async def _listen(self) -> None:
        async for message in self.socket:
            event, now = json.loads(message), time.perf_counter()
            match event["type"]:
                case "input_audio_buffer.speech_started":
                    await self._stop(now)
                case "response.created":
                    self.response, self.item, self.making = event["response"]["id"], None, True
                    self.answered.set()
                case "response.output_item.added":
                    self.item = event["item"]["id"]
                case "response.output_audio.delta":
                    num_samples = len(base64.b64decode(event["delta"])) // 2
                    self.found.stale += event["response_id"] in self.over or event["response_id"] != self.response
                    self.player.push(event["response_id"], num_samples, now)
                case "response.done":
                    self.over.add(event["response"]["id"])
                    self.making = False
                case "error":
                    self.found.errors.append(event["error"]["code"])

    async def _stop(self, now: float) -> None:
        """The server has heard the user speak: be silent, and say what was played."""
        number, self._num_started = self._num_started, self._num_started + 1
        for _ in range(100):  # what it heard, the ears here hear too, once the tick is over
            if len(self.ears.started) > number:
                break
            await asyncio.sleep(0.001)
        vad_sec, sent = self.ears.started[number]
        playing = self.player.playing(now)
        if self.response is None or not (self.making or playing):
            return
        began = self.player.response == self.response
        played = self.player.stop(now) if began else 0
        self.over.add(self.response)
        moment = "before the sound" if not began else "while it is made" if self.making else "while it is played"
        self.found.barge_ins.append(BargeIn(moment, vad_sec, now - sent, played / RATE_HZ))
        if began and self.item is not None:
            cut = {"item_id": self.item, "content_index": 0, "audio_end_ms": played * 1000 // RATE_HZ}
            await self.send("conversation.item.truncate", **cut)


@contextlib.asynccontextmanager
async def _beside(work: Any) -> AsyncIterator[None]:
    """`work` until the end of the block; what ended it early is raised."""
    task = asyncio.create_task(work)
    try:
        yield
    finally:
        if not task.done():
            task.cancel()
        await asyncio.wait([task])
    if not task.cancelled():
        task.result()


async def barge_in(
    url: str, wavs: Sequence[np.ndarray], number: int, sessions: int, most_sec: float, seed: int, api_key: str | None
) -> Found:
    """`number` interruptions, spread over sessions that run at once; how far they are is told on stderr."""
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}

    async def call(index: int) -> Found:
        share = number // sessions + (index < number % sessions)
        await asyncio.sleep(0.3 * index)
        async with connect(url, additional_headers=headers, max_size=None) as socket:
            turned = [wavs[(index + offset) % len(wavs)] for offset in range(len(wavs))]
            caller = Caller(socket, turned, np.random.default_rng([seed, index]), patience_sec=10.0)
            return await caller.interrupt(share, most_sec)

    found = Found()
    for talk in asyncio.as_completed([call(index) for index in range(sessions)]):
        found.add(await talk)
        print(f"{len(found.barge_ins)} of {number} interruptions", file=sys.stderr, flush=True)
    return found
