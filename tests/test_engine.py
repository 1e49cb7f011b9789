"""Laws of the engine: a session among others is that session alone, rows join and leave without a trace, nobody waits
for a slow consumer, and what is refused is refused clearly.

Shapes: B batch rows, L positions, S samples, H hidden width.
"""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from flowomni import batching
from flowomni.api import FlowOmni
from flowomni.batching import Voices
from flowomni.generation import Batch, GenerationOptions, begin, feed, join, read, step, take
from inference.engine import Engine, EngineFull
from inference.session import (
    AudioDelta,
    Event,
    ResponseDone,
    ResponseStarted,
    Session,
    SessionError,
    SessionOptions,
    TextDelta,
)
from inference.threads import release_threads
from tests.conversing import PATIENCE_SEC, WORDS, done, events, names, quiet, sound, spoken, until

ALWAYS_ON = 1 - 1e-9  # the stop threshold of an answer that speaks up to its limit


# ------------------------------------------------------------------------------------------------ rows join and leave


def _alone(omni: FlowOmni, text: str, seed: int, **options: Any) -> Batch:
    model, processor = omni.model, omni.processor
    prompt = processor.prompt([processor.turn("user", text=text)])
    reading = read(model, prompt, model.init_state(1))
    return begin(model, processor, reading, [GenerationOptions(**options)], [torch.Generator().manual_seed(seed)])


ROWS: list[tuple[str, int, dict[str, Any]]] = [
    ("what is one", 1, {"stop_threshold": ALWAYS_ON}),
    ("say hello", 2, {"text_temperature": 1.0}),
    ("one two three plus four five", 3, {"stop_threshold": ALWAYS_ON, "max_steps": 9}),
    ("apple", 4, {"speak": False}),
    ("banana", 5, {"stop_threshold": ALWAYS_ON}),
]


def _run(omni: FlowOmni, starts: list[int]) -> tuple[list[tuple[str, list[Any], torch.Tensor]], int]:
    """Each row begins at its step of the batch and leaves when it has ended; the most voices that were one batch."""
    batch: Batch | None = None
    who: list[int] = []
    found: list[tuple[str, list[Any], torch.Tensor]] = [("", [], torch.zeros(0)) for _ in starts]
    most = 0
    for now in range(100):
        for number, start in enumerate(starts):
            if start == now:
                text, seed, options = ROWS[number]
                row = _alone(omni, text, seed, **options)
                batch = row if batch is None else join([batch, row])
                who.append(number)
        if batch is None:
            continue
        result, batch = step(omni.model, omni.processor, batch)
        for place, number in enumerate(who):
            text, states, wav_S = found[number]
            wav_S = torch.cat([wav_S, result.wavs[place]])
            found[number] = (text + result.texts[place], [*states, result.states[place]], wav_S)
        most = max([most, *(len(rows) for rows, _ in batch.voices.groups)])
        staying = [place for place, row in enumerate(batch.rows) if not (row.done or row.at_limit)]
        if len(staying) < len(who):
            who = [who[place] for place in staying]
            batch = take(omni.model, batch, staying) if staying else None
        if batch is not None:
            batch = feed(omni.model, omni.processor, batch)
    assert not who
    return found, most


@torch.inference_mode()
def test_rows_that_join_and_leave_are_what_they_are_alone(omni: FlowOmni) -> None:
    together, most = _run(omni, [0, 3, 1, 3, 6])
    assert most > 2  # though they began one after the other
    for number in range(len(ROWS)):
        alone, _ = _run(omni, [0 if each == number else -1 for each in range(len(ROWS))])
        text, states, wav_S = alone[number]
        assert together[number][:2] == (text, states)
        torch.testing.assert_close(together[number][2], wav_S, rtol=0, atol=1e-4)
    assert sum(len(wav_S) for _, _, wav_S in together) > 20 * 2048


@torch.inference_mode()
def test_voices_are_one_batch_once_they_agree(omni: FlowOmni) -> None:
    """Three rows that begin one after the other: groups of their own at first, later one; rows leave it again."""
    tokenizer = omni.model.speech_tokenizer
    generator = torch.Generator().manual_seed(0)
    token_RLX = torch.randn(3, 8, omni.model.speech_tokenizer.spec.dim, generator=generator)
    wanted = tokenizer.decode(token_RLX)
    voices, got = Voices(), [torch.zeros(0)] * 3
    for now in range(10):
        tokens = {row: token_RLX[row, now - row] for row in range(3) if 0 <= now - row < 8}
        ended = [row for row in range(3) if now - row == 8]
        owed, voices = voices.flush(tokenizer, ended)
        wavs, voices = voices.step(tokenizer, tokens)
        for row, wav_S in (owed | wavs).items():
            got[row] = torch.cat([got[row], wav_S])
        if now == 6:
            assert [sorted(rows) for rows, _ in voices.groups] == [[0, 1, 2]]
    owed, voices = voices.flush(tokenizer, [2])
    got[2] = torch.cat([got[2], owed[2]])
    assert voices.groups == ()
    for row in range(3):
        torch.testing.assert_close(got[row], wanted[row], rtol=0, atol=1e-5)


@torch.inference_mode()
def test_states_join_split_and_are_cut_without_a_trace(omni: FlowOmni) -> None:
    """Rows of other lengths in one batch, taken out again, cut, and read on: as if each had always been alone."""
    model = omni.model
    generator = torch.Generator().manual_seed(0)
    long_1LH, short_1LH = torch.randn(1, 9, 32, generator=generator), torch.randn(1, 4, 32, generator=generator)

    def advance(x_BLH: torch.Tensor, state: Any) -> Any:
        return model.advance(x_BLH, torch.ones(x_BLH.shape[:2], dtype=torch.bool), state)

    states = [advance(x, model.init_state(1))[2] for x in (long_1LH, short_1LH)]
    joined = batching.join(states)
    assert joined.mask_BL.tolist() == [[True] * 9, [False] * 5 + [True] * 4] and joined.num_seen_B.tolist() == [9, 4]
    next_BLH = torch.randn(2, 1, 32, generator=generator)
    _, speech_BH, both = advance(next_BLH, joined)
    for number, state in enumerate(states):
        _, wanted_BH, alone = advance(next_BLH[number : number + 1], state)
        torch.testing.assert_close(speech_BH[number : number + 1], wanted_BH, rtol=0, atol=1e-5)
        back = batching.take(both, [number])
        assert bool(back.mask_BL.all()) and back.mask_BL.shape == alone.mask_BL.shape
        cut = batching.cut(back, 3)
        _, again_BH, _ = advance((long_1LH, short_1LH)[number][:, 3:], cut)
        _, whole_BH, _ = advance((long_1LH, short_1LH)[number], model.init_state(1))
        torch.testing.assert_close(again_BH, whole_BH, rtol=0, atol=1e-5)


# --------------------------------------------------------------------------------------------------- sessions together


def _converse(session: Session, number: int) -> list[Event]:
    """Two typed turns and a spoken one."""
    found: list[Event] = []
    for turn in range(2):
        session.say_text(f"what is {WORDS[(number + turn) % 5]} plus two")
        session.respond()
        found += until(session, ResponseDone)
    session.update(SessionOptions(seed=number))
    session.push(spoken(number % 3), 16_000)
    return found + until(session, ResponseDone)


def _heard(found: list[Event]) -> tuple[list[str], list[str], list[str], np.ndarray]:
    texts = [e.text for e in found if isinstance(e, TextDelta)]
    ends = [f"{e.status} {e.text} {e.num_samples}" for e in found if isinstance(e, ResponseDone)]
    return names(found), texts, ends, sound(found)


def test_sessions_together_are_what_they_are_alone(omni: FlowOmni) -> None:
    """Four conversations at once, each on a thread of its own, against each in an engine of its own."""
    results: dict[int, list[Event]] = {}

    def talk(engine: Engine, number: int) -> None:
        results[number] = _converse(engine.open(SessionOptions(vad=None, seed=number)), number)

    with Engine(omni, max_sessions=4, prefill_positions=16) as engine:
        threads = [threading.Thread(target=talk, args=(engine, number)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        stats = engine.stats()
    assert stats.row_steps > stats.steps  # they did share steps
    together = dict(results)
    for number in range(4):
        with Engine(omni, max_sessions=1) as engine:
            talk(engine, number)
        *said, wav_S = _heard(together[number])
        *wanted, wanted_S = _heard(results[number])
        assert said == wanted
        np.testing.assert_allclose(wav_S, wanted_S, rtol=0, atol=1e-4)
    assert sum(len(sound(found)) for found in together.values()) > 10 * 2048


def test_a_slow_consumer_pauses_itself_alone(engine: Engine) -> None:
    """One session takes nothing: its answer stops at the limit of its queue, another's does not; later all comes."""
    options = SessionOptions(vad=None, stop_threshold=ALWAYS_ON, max_queued_sec=0.2)
    slow, quick = engine.open(options), engine.open(options)
    for session in (slow, quick):
        session.say_text("what is one")
        session.respond()
    wanted = until(quick, ResponseDone)
    assert quick.wait(PATIENCE_SEC) and not slow.wait(0.1)
    assert 0.2 <= slow.waiting_sec < 0.4
    assert engine.stats().num_rows == 0  # the slow one waits outside of the batch
    found = until(slow, ResponseDone)
    assert done(found).text == done(wanted).text and done(found).num_samples == done(wanted).num_samples
    np.testing.assert_allclose(sound(found), sound(wanted), rtol=0, atol=1e-4)


def test_a_turn_that_fails_ends_alone(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error in the model ends the answers that were in it; the sessions and the engine go on."""
    session = engine.open(SessionOptions(vad=None))
    true_sample = engine.omni.model.head.sample

    def fail(*_: Any) -> Any:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(engine.omni.model.head, "sample", fail)
    session.say_text("what is one")
    session.respond()
    found = until(session, ResponseDone)
    assert done(found).status == "failed"
    [error] = [e for e in found if isinstance(e, SessionError)]
    assert error.code == "turn_failed" and "out of memory" in error.message
    monkeypatch.setattr(engine.omni.model.head, "sample", true_sample)
    session.say_text("what is two")
    session.respond()
    assert done(until(session, ResponseDone)).status in ("completed", "incomplete")
    assert engine.stats().responses["failed"] == 1


# ------------------------------------------------------------------------------------------------------------- limits


def test_one_session_too_many_is_refused(engine: Engine) -> None:
    sessions = [engine.open() for _ in range(4)]
    with pytest.raises(EngineFull, match="all 4 places are taken"):
        engine.open()
    sessions[0].close()
    deadline = time.monotonic() + PATIENCE_SEC
    while engine.stats().num_sessions == 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    again = engine.open()
    assert not again.closed and sessions[0].closed and sessions[0].poll() is None
    stats = engine.stats()
    assert (stats.num_sessions, stats.sessions_opened, stats.sessions_refused) == (4, 5, 1)


def test_a_session_ends_with_its_time(engine: Engine) -> None:
    session = engine.open(SessionOptions(vad=None, max_session_sec=0.2))
    [error] = until(session, SessionError)
    assert isinstance(error, SessionError) and error.code == "session_expired" and "0.2 s" in error.message
    assert session.poll(PATIENCE_SEC) is None and session.closed
    session.push(quiet(1.0), 16_000)
    session.say_text("too late")  # without effect
    assert session.wait(1.0) and engine.stats().num_sessions == 0


def test_audio_that_nobody_hears_is_bounded() -> None:
    session = Session(SessionOptions(), 24_000, lambda _: None, lambda: None)  # no engine takes its calls
    for _ in range(100):
        session.push(quiet(1.0), 16_000)
    waiting = list(iter(session.poll, None))
    assert [e.code for e in waiting if isinstance(e, SessionError)] == ["buffer_full"] and len(waiting) == 1
    taken = session.take_calls(1e9)
    assert sum(len(call[1]) for call in taken) == 60 * 16_000
    session.push(quiet(1.0), 16_000)
    assert session.has_calls and session.poll() is None


def test_closing_lets_answers_end(omni: FlowOmni) -> None:
    engine = Engine(omni, max_sessions=2)
    session, waiting = engine.open(SessionOptions(vad=None)), engine.open(SessionOptions(vad=None))
    session.say_text("what is one")
    session.respond()
    until(session, ResponseStarted)
    engine.close(drain_sec=PATIENCE_SEC)
    assert done(until(session, ResponseDone)).status in ("completed", "incomplete")
    assert session.closed and waiting.closed
    with pytest.raises(EngineFull, match="the engine is closing"):
        engine.open()
    engine.close()  # once more does nothing


def test_bad_settings_are_refused(omni: FlowOmni) -> None:
    for settings, message in (({"max_sessions": 0}, "max_sessions is 0"), ({"prefill_positions": 0}, "prefill")):
        with pytest.raises(ValueError, match=message):
            Engine(omni, **settings)


# -------------------------------------------------------------------------------------------------------------- faults


def test_interruptions_at_any_moment_leave_nothing_behind(engine: Engine) -> None:
    """Forty answers cancelled after 0 to 5 events: no sound after the call, small caches, and the session goes on."""
    random = np.random.default_rng(0)
    session = engine.open(SessionOptions(vad=None, stop_threshold=ALWAYS_ON, max_queued_sec=0.3))
    sizes = []
    for number in range(40):
        session.say_text(f"what is {WORDS[number % 5]}")
        session.respond()
        for _ in range(random.integers(0, 6)):
            session.poll(PATIENCE_SEC)
        session.cancel()
        rest = events(session)
        assert not any(isinstance(e, AudioDelta) for e in rest)
        assert [type(e) for e in rest].count(ResponseDone) == 1 and isinstance(rest[-1], ResponseDone)
        sizes.append(engine.stats().cache_positions)
    assert max(sizes) <= 2048 and engine.stats().num_rows == 0
    session.say_text("what is one")
    session.respond()
    assert done(until(session, ResponseDone)).status == "incomplete"
    session.close()
    deadline = time.monotonic() + PATIENCE_SEC
    while engine.stats().num_sessions and time.monotonic() < deadline:
        time.sleep(0.01)
    assert engine.stats().cache_positions == 0


def test_the_consumer_is_woken_not_called_with_events(engine: Engine) -> None:
    """`on_event` comes from the engine's thread, after the event is there to be taken."""
    woken, threads = threading.Event(), set()

    def wake() -> None:
        threads.add(threading.current_thread().name)
        woken.set()

    session = engine.open(SessionOptions(vad=None), on_event=wake)
    session.say_text("what is one")
    session.respond()
    found: list[Event] = []
    while not found or not isinstance(found[-1], ResponseDone):
        assert woken.wait(PATIENCE_SEC)
        woken.clear()
        found += list(iter(session.poll, None))
    assert names(found) == ["Committed", "ResponseStarted", "delta", "ResponseDone"]
    assert threads == {"flowomni-engine"}


def test_idle_threads_of_the_caller_do_not_stay_beside_the_engine(engine: Engine) -> None:
    """They would slow every step down, see `release_threads`."""
    tasks = Path("/proc/self/task")
    if not tasks.exists() or torch.get_num_threads() < 2:
        pytest.skip("needs Linux and two threads")
    x = torch.randn(512, 512)
    release_threads()
    before = len(list(tasks.iterdir()))
    assert (x @ x).shape == x.shape
    if len(list(tasks.iterdir())) == before:
        pytest.skip("this torch computes with another kind of threads")
    engine.open().close()
    left = len(list(tasks.iterdir()))
    release_threads()
    assert len(list(tasks.iterdir())) == left  # none was left to release
