"""Talk with a model in the terminal: `python -m inference.chat`, with microphone and speaker, or `--wav question.wav`.

Speak, wait, listen; speak again at any time to interrupt. The text is printed as it comes, Ctrl-C ends it all.
With `--wav` a file stands for the microphone and nothing is played: in real time, or with `--fast` as fast as it can be
computed, with the same turns. `--out` keeps the conversation as a stereo file, you on the left, the model on the right.

A loudspeaker's sound gets back into the microphone, and the model would interrupt itself: use headphones, or
`--no-barge-in`. Errors are one line on stderr and exit status 2.

Shapes: S samples.
"""

from __future__ import annotations

import argparse
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from flowomni.commands import Parser, add_model_options, exit_status, load

if TYPE_CHECKING:  # torch and transformers take seconds to import: a bad command line is answered before
    from .session import Event, Session, SessionOptions

TICK_SEC = 0.02
_NO_SOUND = "or let a file speak: --wav question.wav"


def parse(args: Sequence[str] | None) -> argparse.Namespace:
    """The command line; what does not fit together ends the program."""
    parser = Parser(prog="python -m inference.chat", description="Talk with a model; Ctrl-C ends the conversation.")
    parser.add_argument("--wav", metavar="FILE", help="a file as the microphone, and nothing is played")
    parser.add_argument("--fast", action="store_true", help="with --wav: do not wait for the clock")
    parser.add_argument("--out", type=Path, help="keep the conversation here (.wav or .flac, stereo)")
    add_model_options(parser)
    parser.add_argument("--instructions", help="what the model is told first")
    parser.add_argument("--silence", type=float, default=0.5, help="seconds of silence that end a turn (default: 0.5)")
    parser.add_argument("--no-barge-in", action="store_true", help="speaking does not interrupt the model")
    parser.add_argument("--temperature", type=float, help="of the sampled speech; 0 is no noise (default: the model's)")
    parser.add_argument("--threads", type=int, help="that the model computes on (default: one core is left free)")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same voice (default: 0)")
    options = parser.parse_args(args)
    if options.threads is not None and options.threads < 1:
        parser.error(f"--threads is {options.threads}: it must be at least 1")
    if options.fast and not options.wav:
        parser.error("--fast needs --wav FILE: a microphone has its own time")
    if options.out and (options.out.suffix.lower() not in (".wav", ".flac") or not options.out.parent.is_dir()):
        parser.error(f"--out {options.out} cannot be written: end it in .wav or .flac, in a folder that exists")
    return options


class Player:
    """What is being played, sample by sample; filled and emptied by different threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._chunks: deque[np.ndarray] = deque()
        self._response_id: str | None = None
        self._played = 0

    @property
    def playing(self) -> bool:
        return bool(self._chunks)

    def add(self, response_id: str, wav_S: np.ndarray) -> None:
        """More of a response; a new one follows the old one's end."""
        with self._lock:
            if response_id != self._response_id:
                self._response_id, self._played = response_id, 0
            self._chunks.append(wav_S)

    def pull(self, num_samples: int) -> np.ndarray:
        """The next samples to play, zeros where there are none."""
        wav_S, filled = np.zeros(num_samples, np.float32), 0
        with self._lock:
            while self._chunks and filled < num_samples:
                chunk_S = self._chunks.popleft()
                part_S, rest_S = chunk_S[: num_samples - filled], chunk_S[num_samples - filled :]
                wav_S[filled : filled + len(part_S)] = part_S
                filled += len(part_S)
                if len(rest_S):
                    self._chunks.appendleft(rest_S)
            self._played += filled
        return wav_S

    def stop(self) -> tuple[str, int] | None:
        """Play nothing more; the response that was played last, and how much of it."""
        with self._lock:
            self._chunks.clear()
            return None if self._response_id is None else (self._response_id, self._played)


class Conversation:
    """Shows a session's events and feeds the player."""

    def __init__(self, session: Session, player: Player) -> None:
        self.session, self.player = session, player
        self.answering = self.heard = False
        self._line_open = False

    def drain(self, timeout: float = 0.0) -> None:
        """Take all events that are there, and wait `timeout` seconds for the first."""
        while (event := self.session.poll(timeout)) is not None:
            self.show(event)
            timeout = 0.0

    def show(self, event: Event) -> None:
        """One event."""
        from . import session as live

        if isinstance(event, live.SpeechStarted):
            self._interrupt()
        elif isinstance(event, live.SpeechStopped):
            self._print("(heard)", end="\n")
            self.heard = True
        elif isinstance(event, live.ResponseStarted):
            self._print("answer: ")
            self.answering, self._line_open = True, True
        elif isinstance(event, live.TextDelta):
            self._print(event.text)
        elif isinstance(event, live.AudioDelta):
            self.player.add(event.response_id, event.wav_S)
        elif isinstance(event, live.ResponseDone):
            self.answering, self._line_open = False, False
            self._print("" if event.status == "completed" else f" [{event.status}]", end="\n")
        elif isinstance(event, live.SessionError):
            print(f"error: {event.message}", file=sys.stderr, flush=True)

    def _interrupt(self) -> None:
        if self.session.options.barge_in and (heard := self.player.stop()) is not None:
            self.session.played(*heard)

    def _print(self, text: str, end: str = "") -> None:
        if end and self._line_open:
            print(flush=True)
            self._line_open = False
        print(text, end=end, flush=True)


class Tape:
    """The conversation as it was heard, you on the left and the model on the right, from one beginning."""

    def __init__(self, path: Path | None, heard_rate_hz: int, played_rate_hz: int) -> None:
        self._path, self._heard_rate, self._rate = path, heard_rate_hz, played_rate_hz
        self._heard: list[np.ndarray] = []
        self._played: list[np.ndarray] = []

    def heard(self, wav_S: np.ndarray) -> None:
        if self._path is not None:
            self._heard.append(wav_S.copy())

    def played(self, wav_S: np.ndarray) -> None:
        if self._path is not None:
            self._played.append(wav_S.copy())

    def save(self) -> None:
        """Write the file, if one is wanted and there is anything to write."""
        from flowomni.audio import resample, write_audio

        if self._path is None or not self._heard:
            return
        left_S = resample(np.concatenate(self._heard), self._heard_rate, self._rate)
        right_S = np.concatenate([*self._played, np.zeros(0, np.float32)])
        length = max(len(left_S), len(right_S))
        sides = [np.pad(side_S, (0, length - len(side_S))) for side_S in (left_S, right_S)]
        write_audio(self._path, np.stack(sides, axis=1), self._rate)
        print(f"kept: {self._path}")


def talk_to_file(talk: Conversation, wav_S: np.ndarray, rate_hz: int, tape: Tape, fast: bool) -> None:
    """A file as the microphone, then silence until all is said; without `fast` a second takes a second."""
    session, size = talk.session, round(TICK_SEC * rate_hz)
    play_size = round(TICK_SEC * session.sample_rate_hz)
    quiet_sec = session.options.silence_sec + 0.5  # the file's end is not the end of a turn: silence is
    wav_S = np.concatenate([wav_S, np.zeros(round(quiet_sec * rate_hz), np.float32)])
    began, tick = time.monotonic(), 0
    while tick * size < len(wav_S) or talk.answering or talk.player.playing or not session.wait(0):
        chunk_S = wav_S[tick * size : (tick + 1) * size]
        chunk_S = np.pad(chunk_S, (0, size - len(chunk_S)))
        session.push(chunk_S, rate_hz)
        tape.heard(chunk_S)
        while fast and not session.wait(TICK_SEC):
            talk.drain()
        talk.drain()
        tape.played(talk.player.pull(play_size))
        tick += 1
        if session.closed:
            return
        if not fast:
            time.sleep(max(0.0, began + tick * TICK_SEC - time.monotonic()))


@contextmanager
def devices(talk: Conversation, tape: Tape) -> Iterator[None]:
    """Microphone and speaker, until the end of the block.

    Raises:
        ValueError: there is no sound on this machine, with what to do about it.
    """
    try:
        import sounddevice
    except ImportError as error:
        raise ValueError(f"sound needs the package sounddevice: pip install sounddevice, {_NO_SOUND}") from error
    except OSError as error:
        raise ValueError(f"sound needs PortAudio: apt-get install libportaudio2, {_NO_SOUND}") from error
    session = talk.session
    rate_hz = session.sample_rate_hz

    def listen(indata: np.ndarray, *_: Any) -> None:
        tape.heard(indata[:, 0])
        session.push(indata[:, 0], rate_hz)

    def play(outdata: np.ndarray, num_samples: int, *_: Any) -> None:
        outdata[:, 0] = talk.player.pull(num_samples)
        tape.played(outdata[:, 0])

    settings = {"samplerate": rate_hz, "channels": 1, "dtype": "float32", "blocksize": round(TICK_SEC * rate_hz)}
    try:
        speaker = sounddevice.OutputStream(callback=play, **settings)
        microphone = sounddevice.InputStream(callback=listen, **settings)
        with speaker, microphone:
            yield
    except sounddevice.PortAudioError as error:
        raise ValueError(f"no microphone or no speaker can be opened ({error}): connect one, {_NO_SOUND}") from error


def session_options(options: argparse.Namespace) -> SessionOptions:
    """The command line's share of a session.

    Raises:
        ValueError: naming the field.
    """
    from .session import SessionOptions

    return SessionOptions(
        silence_sec=options.silence,
        tail_sec=min(SessionOptions.tail_sec, options.silence),
        barge_in=not options.no_barge_in,
        sampling=None if options.temperature is None else {"temperature": options.temperature},
        instructions=options.instructions,
        seed=options.seed,
        max_session_sec=24 * 3600.0,
    )


def chat(options: argparse.Namespace) -> None:
    """One conversation.

    Raises:
        ValueError, OSError: with a message for the user.
    """
    from transformers.utils import logging

    from flowomni.audio import read_audio

    from .engine import Engine
    from .threads import settle_threads

    heard = read_audio(options.wav, 16_000) if options.wav else None
    settle_threads(options.threads)
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    omni = load(options)
    if omni.processor.heard_features is None:
        raise ValueError("this model has no speech encoder and cannot hear: choose another --model")
    with Engine(omni, max_sessions=1) as engine:
        session = engine.open(session_options(options))
        talk = Conversation(session, Player())
        tape = Tape(options.out, heard.sample_rate_hz if heard else session.sample_rate_hz, session.sample_rate_hz)
        try:
            if heard is not None:
                talk_to_file(talk, heard.wav_S, heard.sample_rate_hz, tape, options.fast)
                if not talk.heard:
                    print(f"no speech was found in {options.wav}", file=sys.stderr)
            else:
                with devices(talk, tape):
                    print("speak; Ctrl-C ends the conversation", flush=True)
                    while not session.closed:
                        talk.drain(timeout=0.1)
        except KeyboardInterrupt:
            print()
        finally:
            session.close()
            tape.save()


def main(args: Sequence[str] | None = None) -> int:
    """Command line. Returns the exit status: 0 done or ended by Ctrl-C, 2 bad input, 130 stopped before it began."""
    return exit_status(lambda: chat(parse(args)))


if __name__ == "__main__":
    sys.exit(main())
