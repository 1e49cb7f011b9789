"""Many sessions over one model: one worker thread listens, reads and steps for all of them.

Answers in progress are one batch (continuous batching): a row joins when its prompt has been read and leaves when it
ends, is interrupted, or when its consumer is slow; only then are caches regrouped. Between two steps of the batch at
most one piece of one prompt is read, so that a long prompt does not stop the voices of others.

**Law.** A session's events are what they would be if it were alone, whoever else is there: same turns, texts and number
of samples, and the same samples up to float rounding (a matrix product of another size rounds otherwise).

    with Engine(omni, max_sessions=8) as engine:
        session = engine.open()
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from flowomni import FlowOmni
from flowomni.generation import Batch, feed, join, step, take

from .listening import load_vad
from .seat import Seat, generation_options, make_context
from .session import Session, SessionError, SessionOptions
from .threads import release_threads

_LISTEN_SEC = 1.0  # of audio that one session is listened to before the others have their turn
_ROOM = 0.5  # share of its queue that a slow consumer must have taken before the answer goes on
_log = logging.getLogger(__name__)


class EngineFull(RuntimeError):
    """All places are taken, or the engine is closing; the message is one line for the user."""


@dataclass(frozen=True)
class EngineStats:
    """Counts since the engine began, and what is there now.

    Attributes:
        num_sessions, num_rows: open sessions, and how many of them are being answered in the batch now.
        sessions_opened, sessions_refused: how often `open` gave a session, or EngineFull.
        responses: ended responses by status.
        steps, row_steps, tokens: steps of the batch, steps summed over rows, speech tokens drawn.
        step_sec, prefill_sec, listen_sec: seconds the worker spent stepping, encoding and reading prompts, and on the
            calls of sessions (turn detection).
        step_cpu_sec: CPU time of the worker's thread in steps: what they cost, whoever else uses the machine.
        cache_positions: positions held in all caches.
    """

    num_sessions: int
    num_rows: int
    sessions_opened: int
    sessions_refused: int
    responses: dict[str, int]
    steps: int
    row_steps: int
    tokens: int
    step_sec: float
    prefill_sec: float
    listen_sec: float
    step_cpu_sec: float
    cache_positions: int


class Engine:
    """One worker thread that steps all answers together.

    Who computes with torch in other threads of this process slows it down, see `release_threads`.

    Args:
        omni: model and processor.
        max_sessions: places; one more is refused.
        prefill_positions: longest piece of a prompt that is read between two steps of the others.
    """

    def __init__(self, omni: FlowOmni, max_sessions: int = 8, prefill_positions: int = 128) -> None:
        for name, value in (("max_sessions", max_sessions), ("prefill_positions", prefill_positions)):
            if value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        self.omni, self.max_sessions, self.prefill_positions = omni, max_sessions, prefill_positions
        self._lock = threading.Lock()  # of _seats and _closing
        self._seats: dict[Seat, float] = {}  # and when they were opened
        self._closing_at: float | None = None
        self._work = threading.Event()
        self._batch: Batch | None = None
        self._members: list[Seat] = []  # whose rows the batch has
        self._opened = self._refused = 0
        self._responses: Counter[str] = Counter()
        self._steps = self._row_steps = self._tokens = 0
        self._sec = {"step": 0.0, "prefill": 0.0, "listen": 0.0}
        self._cpu_sec = dict(self._sec)
        release_threads()
        self._worker = threading.Thread(target=self._run, name="flowomni-engine", daemon=True)
        self._worker.start()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *error: object) -> None:
        self.close(drain_sec=0.0)

    def open(self, options: SessionOptions | None = None, on_event: Callable[[], None] | None = None) -> Session:
        """A new session.

        Raises:
            EngineFull: `max_sessions` are open, or the engine is closing.
            ValueError: the options are bad, naming the field.
        """
        options = options or SessionOptions()
        self._refuse_if_full()
        self.check(options)
        session = Session(options, self.omni.sample_rate_hz, self.check, self._work.set, on_event)
        seat = Seat(session, self.omni, self._pull, self._responses)
        release_threads()
        with self._lock:
            if self._room() > 0:
                self._seats[seat] = time.monotonic()
                self._opened += 1
        self._refuse_if_full(seat)
        self._work.set()
        return session

    def check(self, options: SessionOptions) -> None:
        """Refuse options that this model cannot take, with a ValueError that names the field."""
        chosen = generation_options(self.omni, options)
        make_context(self.omni, options)
        if options.vad is not None:
            load_vad()
        head, hidden = self.omni.model.head, self.omni.model.config.hidden_size
        with torch.inference_mode():  # a head may find out only when it draws
            hidden_BH = torch.zeros(1, hidden, device=self.omni.model.device, dtype=self.omni.model.dtype)
            head.sample(hidden_BH, chosen.sampling, [torch.Generator()])
        release_threads()

    def _room(self) -> int:
        return 0 if self._closing_at is not None else self.max_sessions - len(self._seats)

    def _refuse_if_full(self, seat: Seat | None = None) -> None:
        with self._lock:
            if seat in self._seats or (seat is None and self._room() > 0):
                return
            self._refused += 1
            closing = self._closing_at is not None
        number = f"all {self.max_sessions} places are taken"
        raise EngineFull("the engine is closing" if closing else f"{number}: try again when a session has ended")

    def stats(self) -> EngineStats:
        """For monitoring; cheap."""
        with self._lock:
            seats = list(self._seats)
        batch = self._batch
        cached = 0 if batch is None else batch.reading.model_state.mask_BL.numel()
        return EngineStats(
            num_sessions=len(seats),
            num_rows=len(self._members),
            sessions_opened=self._opened,
            sessions_refused=self._refused,
            responses=dict(self._responses),
            steps=self._steps,
            row_steps=self._row_steps,
            tokens=self._tokens,
            step_sec=self._sec["step"],
            prefill_sec=self._sec["prefill"],
            listen_sec=self._sec["listen"],
            step_cpu_sec=self._cpu_sec["step"],
            cache_positions=cached + sum(len(seat.memory) for seat in seats),
        )

    def close(self, drain_sec: float = 10.0) -> None:
        """Refuse new sessions, let answers in progress end for `drain_sec`, close all sessions, stop the worker."""
        with self._lock:
            self._closing_at = time.monotonic() + drain_sec
        self._work.set()
        if threading.current_thread() is not self._worker:
            self._worker.join()

    # ------------------------------------------------------------------------------------------------------ worker

    def _run(self) -> None:
        try:
            with torch.inference_mode():
                while not self._finished():
                    self._work.clear()
                    if not self._turn():
                        self._work.wait(self._patience())
        except Exception:  # a session's own failures do not come here
            _log.exception("the engine has failed")
            error = SessionError("engine_failed", "the engine has failed, see its log: open a new session elsewhere")
            self._close_all(error)
        else:
            self._close_all(None)

    def _turn(self) -> bool:
        """Everything once; whether there is more to do."""
        self._read(self._listen_to_all())
        seats = self._listen_to_all()  # again: an interruption does not wait for a piece and for a step
        for seat in seats:
            if seat.ready:
                self._add(seat, seat.begin())
            elif seat.parked is not None and self._has_room(seat):
                batch, seat.parked = seat.parked, None
                self._add(seat, batch)
        self._step()
        for seat in seats:
            if seat.idle and not seat.session.has_calls:
                seat.session.rest()
        return bool(self._members) or any(seat.task is not None or seat.session.has_calls for seat in seats)

    def _listen_to_all(self) -> list[Seat]:
        """Carry out what sessions have asked for; those that are there then."""
        with self._lock:
            seats = list(self._seats)
        for seat in seats:
            self._listen(seat)
        return [seat for seat in seats if seat in self._seats]

    def _listen(self, seat: Seat) -> None:
        """Carry out a session's calls; end it where it is closed or its time is over."""
        session = seat.session
        expired = time.monotonic() - self._seats[seat] > seat.options.max_session_sec
        if expired:
            limit = seat.options.max_session_sec
            session.put(SessionError("session_expired", f"the session has reached its limit of {limit:g} s"))
        if expired or session.closed:
            self._remove(seat)
            return
        calls = session.take_calls(_LISTEN_SEC)
        if calls:
            with self._timed("listen"), self._guarded([seat]):
                for call in calls:
                    seat.handle(call)

    def _read(self, seats: list[Seat]) -> None:
        """A piece of what is wanted most; all that somebody waits for if nobody is being answered."""
        while tasks := [seat for seat in seats if seat.task is not None]:
            seat = min(tasks, key=lambda each: each.task.urgency if each.task else 0)
            with self._timed("prefill"), self._guarded([seat]):
                seat.read_piece(self.prefill_positions)
            # the one that was read goes to the end of the line
            self._to_the_end(seat)
            if self._members or any(each.session.has_calls for each in seats) or seat.ready:
                return

    def _step(self) -> None:
        """One step of the batch; rows that have ended leave it."""
        for seat in [seat for seat in self._members if seat.session.is_full]:
            seat.parked = self._pull(seat)
        if self._batch is None:
            return
        model, processor, members = self.omni.model, self.omni.processor, list(self._members)
        with self._timed("step"), self._guarded(members):
            found, self._batch = step(model, processor, self._batch)
            self._steps += 1
            self._row_steps += len(members)
            rows = self._batch.rows
            self._tokens += sum(row.draws for row in rows)
            for seat, row, text, wav_S in zip(members, rows, found.texts, found.wavs, strict=True):
                seat.stepped(row, text, wav_S.float().numpy())
            for seat, row in zip(members, rows, strict=True):
                if row.done or row.at_limit:
                    seat.stop("completed" if row.done else "incomplete")
            if self._batch is not None:
                self._batch = feed(model, processor, self._batch)

    def _has_room(self, seat: Seat) -> bool:
        return seat.session.waiting_sec <= _ROOM * seat.options.max_queued_sec

    @contextmanager
    def _timed(self, part: str) -> Iterator[None]:
        began, began_cpu = time.perf_counter(), time.thread_time()
        yield
        self._sec[part] += time.perf_counter() - began
        self._cpu_sec[part] += time.thread_time() - began_cpu

    @contextmanager
    def _guarded(self, seats: list[Seat]) -> Iterator[None]:
        """A failure ends the answers of these sessions, not those of others, and not the engine."""
        try:
            yield
        except Exception as error:
            _log.exception("a turn has failed")
            if set(self._members) <= set(seats):
                self._batch, self._members = None, []  # it may be half stepped
            for seat in seats:
                self._fail(seat, f"this turn has failed ({type(error).__name__}): {error}")

    def _fail(self, seat: Seat, message: str) -> None:
        try:
            seat.fail("turn_failed", message)
        except Exception:  # beyond repair: the session ends, and no other
            _log.exception("a session has failed")
            seat.session.put(SessionError("engine_failed", "the session has failed: open a new one"))
            seat.session.close()

    # the batch

    def _add(self, seat: Seat, batch: Batch) -> None:
        self._batch = batch if self._batch is None else join([self._batch, batch])
        self._members.append(seat)

    def _pull(self, seat: Seat) -> Batch | None:
        """Take one row out of the batch."""
        if seat not in self._members:
            return None
        assert self._batch is not None
        number = self._members.index(seat)
        alone = take(self.omni.model, self._batch, [number])
        others = [each for each in range(len(self._members)) if each != number]
        self._members.remove(seat)
        self._batch = take(self.omni.model, self._batch, others) if others else None
        return alone

    # sessions

    def _to_the_end(self, seat: Seat) -> None:
        with self._lock:
            if seat in self._seats:
                self._seats[seat] = self._seats.pop(seat)

    def _remove(self, seat: Seat) -> None:
        self._pull(seat)
        with self._lock:
            self._seats.pop(seat, None)
        seat.session.close()

    def _close_all(self, error: SessionError | None) -> None:
        with self._lock:
            self._closing_at = self._closing_at or time.monotonic()
            seats, self._seats = list(self._seats), {}
        self._batch, self._members = None, []
        for seat in seats:
            if error is not None:
                seat.session.put(error)
            seat.session.close()

    def _finished(self) -> bool:
        if self._closing_at is None:
            return False
        answering = any(seat.answer is not None for seat in self._seats)
        return not answering or time.monotonic() >= self._closing_at

    def _patience(self) -> float | None:
        """Seconds until something happens by itself."""
        now = time.monotonic()
        with self._lock:
            ends = [opened + seat.options.max_session_sec for seat, opened in self._seats.items()]
        if self._closing_at is not None:
            ends.append(self._closing_at)
        return max(0.0, min(ends) - now) + 0.001 if ends else None
