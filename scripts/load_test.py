"""Many people talk to a server at once: how long do they wait, and does the sound come in time?

    python -m scripts.load_test question.wav --sessions 8 --turns 3 --json load.json     # starts a server of its own
    python -m scripts.load_test question.wav --url ws://127.0.0.1:8000/v1/realtime       # asks one that runs

Every session speaks its question at the pace of real time, like a microphone that stays open, listens to the answer,
and speaks again. Times are taken at the client, so that network and server are both in them.

Shapes: S samples.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import WebSocketException

from flowomni.commands import exit_status

RATE_HZ = 24_000
CHUNK_SEC = 0.04
BUFFER_SEC = 0.06  # of a player that waits a little before it begins
PERCENTILES = (50, 95, 99)


@dataclass
class Turn:
    """What one question brought; times in seconds on the clock of `time.perf_counter`.

    Attributes:
        speech_end: when the last sample of the question was sent.
        stopped: when the server said that the turn is over, that is after the silence that ends it; None without.
        arrivals: of each chunk of the answer: (when, samples).
        status: of the answer, or what went wrong.
    """

    speech_end: float = 0.0
    stopped: float | None = None
    arrivals: list[tuple[float, int]] = field(default_factory=list)
    status: str = "no answer"
    text: str = ""

    @property
    def gaps_sec(self) -> list[float]:
        """Time between a chunk's arrival and the next one's."""
        times = [when for when, _ in self.arrivals]
        return [later - earlier for earlier, later in zip(times, times[1:], strict=False)]

    def num_late(self, buffer_sec: float = 0.0) -> int:
        """Chunks before which a player ran dry that starts `buffer_sec` after the first one."""
        due, late = 0.0, 0
        for when, samples in self.arrivals:
            if not due:
                due = when + buffer_sec
            elif when > due:
                late += 1
                due = when  # it goes on from here
            due += samples / RATE_HZ
        return late

    @property
    def answer_sec(self) -> float:
        return sum(samples for _, samples in self.arrivals) / RATE_HZ


class Talker:
    """One session: a microphone that is always open, and ears.

    Args:
        wav_S: the question, float32 at 24 kHz.
        push_to_talk: say where a turn ends instead of leaving it to the server.
    """

    def __init__(self, socket: ClientConnection, wav_S: np.ndarray, push_to_talk: bool):
        self.socket, self.wav_S, self.push_to_talk = socket, wav_S, push_to_talk
        self.turn = Turn()
        self.over = asyncio.Event()

    async def send(self, type_: str, **fields: Any) -> None:
        await self.socket.send(json.dumps({"type": type_} | fields))

    async def listen(self) -> None:
        """Note down when what arrives."""
        async for message in self.socket:
            event, now, turn = json.loads(message), time.perf_counter(), self.turn
            match event["type"]:
                case "input_audio_buffer.speech_started":
                    turn.stopped = None
                case "input_audio_buffer.speech_stopped":
                    turn.stopped = now
                case "response.output_audio.delta":
                    samples = len(base64.b64decode(event["delta"])) // 2
                    turn.arrivals.append((now, samples))
                case "response.output_audio_transcript.done":
                    turn.text = event["transcript"]
                case "response.done":
                    turn.status = event["response"]["status"]
                    self.over.set()
                case "error":
                    turn.status = f"error {event['error']['code']}"
                    self.over.set()

    async def talk(self, num_turns: int, pause_sec: float, timeout_sec: float) -> list[Turn]:
        """Ask `num_turns` times."""
        detection = None if self.push_to_talk else {"type": "server_vad"}
        audio = {"input": {"turn_detection": detection}}
        await self.send("session.update", session={"type": "realtime", "audio": audio})
        turns = []
        for _ in range(num_turns):
            self.turn = Turn()
            turns.append(self.turn)
            self.over.clear()
            await self._speak(timeout_sec)
            heard_sec = self.turn.answer_sec if self.turn.arrivals else 0.0
            await self._silence(heard_sec + pause_sec)
        return turns

    async def _speak(self, timeout_sec: float) -> None:
        pace = Pace()
        for chunk in _chunks(self.wav_S):
            await self._append(chunk, pace)
        self.turn.speech_end = time.perf_counter()
        if self.push_to_talk:
            await self.send("input_audio_buffer.commit")
            await self.send("response.create")
        quiet = np.zeros(round(CHUNK_SEC * RATE_HZ), np.float32)
        while not self.over.is_set() and time.perf_counter() - self.turn.speech_end < timeout_sec:
            await self._append(quiet, pace)

    async def _silence(self, seconds: float) -> None:
        pace = Pace()
        for chunk in _chunks(np.zeros(round(seconds * RATE_HZ), np.float32)):
            await self._append(chunk, pace)

    async def _append(self, wav_S: np.ndarray, pace: Pace) -> None:
        raw = (wav_S * 32_767).astype("<i2").tobytes()
        await self.send("input_audio_buffer.append", audio=base64.b64encode(raw).decode("ascii"))
        await pace.wait(len(wav_S) / RATE_HZ)


class Pace:
    """Real time without drift."""

    def __init__(self) -> None:
        self.due = time.perf_counter()

    async def wait(self, seconds: float) -> None:
        self.due += seconds
        await asyncio.sleep(max(0.0, self.due - time.perf_counter()))


def _chunks(wav_S: np.ndarray) -> Iterator[np.ndarray]:
    size = round(CHUNK_SEC * RATE_HZ)
    return (wav_S[start : start + size] for start in range(0, len(wav_S), size))


async def session(url: str, wav_S: np.ndarray, options: argparse.Namespace, delay_sec: float) -> list[Turn]:
    """One session from beginning to end; what fails is a turn with its reason."""
    await asyncio.sleep(delay_sec)
    headers = {"Authorization": f"Bearer {options.api_key}"} if options.api_key else {}
    try:
        async with connect(url, additional_headers=headers, max_size=None) as socket:
            talker = Talker(socket, wav_S, options.push_to_talk)
            listening = asyncio.create_task(talker.listen())
            try:
                return await talker.talk(options.turns, options.pause_sec, options.timeout_sec)
            finally:
                listening.cancel()
                await asyncio.gather(listening, return_exceptions=True)
    except (OSError, WebSocketException) as error:
        return [Turn(status=f"{type(error).__name__}: {error}")]


async def load(url: str, wavs: Sequence[np.ndarray], options: argparse.Namespace) -> list[list[Turn]]:
    """All sessions; they begin one after the other within `options.ramp_sec`, so that their turns do not coincide."""
    delays = [options.ramp_sec * index / options.sessions for index in range(options.sessions)]
    talks = [session(url, wavs[index % len(wavs)], options, delay) for index, delay in enumerate(delays)]
    return await asyncio.gather(*talks)


def summary(sessions: Sequence[Sequence[Turn]]) -> dict[str, Any]:
    """Everything that was measured.

    `end_to_audio_ms` is from the last sample of speech sent to the first sample received, `stop_to_audio_ms` the same
    without the silence that ends a turn; `gap_ms` is between chunks; a late chunk left a player dry that began at once.
    """
    turns = [turn for talked in sessions for turn in talked]
    answered = [turn for turn in turns if turn.arrivals]
    statuses = [turn.status for turn in turns]
    speech_sec = sum(turn.answer_sec for turn in answered)
    return {
        "sessions": len(sessions),
        "turns": len(turns),
        "answered": len(answered),
        "statuses": {status: statuses.count(status) for status in sorted(set(statuses))},
        "end_to_audio_ms": spread([turn.arrivals[0][0] - turn.speech_end for turn in answered]),
        "stop_to_audio_ms": spread([t.arrivals[0][0] - t.stopped for t in answered if t.stopped is not None]),
        "gap_ms": spread([gap for turn in answered for gap in turn.gaps_sec]),
        "chunks": sum(len(turn.arrivals) for turn in answered),
        "late_chunks": sum(turn.num_late() for turn in answered),
        "late_chunks_buffered": sum(turn.num_late(BUFFER_SEC) for turn in answered),
        "answer_sec": round(speech_sec, 2),
    }


def spread(seconds: Sequence[float]) -> dict[str, float] | None:
    """Percentiles in milliseconds; None of nothing."""
    if not seconds:
        return None
    ms = 1000 * np.asarray(seconds)
    found = {f"p{q}": round(float(np.percentile(ms, q)), 1) for q in PERCENTILES}
    return found | {"max": round(float(ms.max()), 1), "count": len(ms)}


def table(found: dict[str, Any]) -> str:
    """For reading."""
    head = f"{found['sessions']} sessions, {found['turns']} turns, {found['answered']} answered"
    lines = [head, "  ".join(f"{status}: {count}" for status, count in found["statuses"].items())]
    names = {
        "end_to_audio_ms": "end of speech to sound",
        "stop_to_audio_ms": "turn taken to sound",
        "gap_ms": "between chunks",
    }
    lines.append(f"{'ms':<24}{'p50':>9}{'p95':>9}{'p99':>9}{'max':>9}{'count':>8}")
    for key, name in names.items():
        if spread := found[key]:
            values = "".join(f"{spread[column]:>9.1f}" for column in ("p50", "p95", "p99", "max"))
            lines.append(f"{name:<24}{values}{spread['count']:>8}")
    buffered = f"{found['late_chunks_buffered']} in a player that buffers {1000 * BUFFER_SEC:.0f} ms"
    late = f"late chunks: {found['late_chunks']} of {found['chunks']}, {buffered}"
    lines.append(f"{late}; {found['answer_sec']} s of answers")
    return "\n".join(lines)


@contextlib.contextmanager
def own_server(model: str | None, sessions: int) -> Iterator[str]:
    """`inference.serve` in a process of its own; gives the websocket's address. SIGTERM is Ctrl-C while it runs.

    Raises:
        ValueError: it did not start; it has said why.
    """
    command = [sys.executable, "-m", "inference.serve", "--port", "0", "--max-sessions", str(sessions)]
    command += ["--log-level", "warning", *(["--model", model] if model else [])]
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # else the server outlives this process
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            said = process.stdout.readline()
            if not said.startswith("talk at "):
                raise ValueError("the server did not start")
            yield f"ws{said.removeprefix('talk at http').strip()}/v1/realtime"
        finally:
            process.terminate()
            signal.signal(signal.SIGTERM, before)


def read_question(path: str) -> np.ndarray:
    """Float32 samples [S] at 24 kHz."""
    from flowomni.audio import read_audio

    return np.asarray(read_audio(path, RATE_HZ).wav_S)


def main(args: Sequence[str] | None = None) -> int:
    """Command line. Returns the exit status: 0 all turns answered, 1 not, 2 bad input."""
    parser = argparse.ArgumentParser(prog="python -m scripts.load_test", description=__doc__)
    parser.add_argument("questions", nargs="+", metavar="question.wav", help="sessions take them in turn")
    parser.add_argument("--url", help="ws://host:port/v1/realtime (default: start a server)")
    parser.add_argument("--model", help="of the server that is started (default: the model in the box)")
    parser.add_argument("--api-key")
    parser.add_argument("--sessions", type=int, default=8, help="at once (default: 8)")
    parser.add_argument("--turns", type=int, default=3, help="questions of each session (default: 3)")
    parser.add_argument("--pause-sec", type=float, default=1.0, help="after hearing the answer (default: 1)")
    parser.add_argument("--ramp-sec", type=float, default=4.0, help="in which the sessions begin (default: 4)")
    parser.add_argument("--timeout-sec", type=float, default=60.0, help="for an answer (default: 60)")
    parser.add_argument("--push-to-talk", action="store_true", help="say where a turn ends; else the server finds out")
    parser.add_argument("--json", type=Path, help="write all numbers here")
    options = parser.parse_args(args)
    return exit_status(lambda: run(options))


def run(options: argparse.Namespace) -> int:
    """Returns 1 if a turn was not answered.

    Raises:
        ValueError, OSError: with a message for the user.
    """
    wavs = [read_question(path) for path in options.questions]
    with contextlib.ExitStack() as stack:
        url = options.url or stack.enter_context(own_server(options.model, options.sessions))
        found = summary(asyncio.run(load(url, wavs, options)))
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    print(table(found))
    return int(found["answered"] < found["turns"])


if __name__ == "__main__":
    sys.exit(main())
