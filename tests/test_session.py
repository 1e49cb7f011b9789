"""Laws of one session: turns do not depend on chunks, an answer is what the model answers offline to the same turns,
what was not played is not remembered, and a long conversation stays small.

Shapes: S samples, L positions.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import soxr
import torch

from flowomni.api import FlowOmni
from flowomni.generation import GenerationOptions, generate
from flowomni.layouts import Turn
from inference.engine import Engine
from inference.listening import (
    Overflowed,
    Paused,
    Resampler,
    Resumed,
    Signal,
    Started,
    Stopped,
    TurnRules,
    TurnTaker,
)
from inference.seat import Seat
from inference.session import (
    AudioDelta,
    Committed,
    Event,
    ResponseDone,
    ResponseStarted,
    Session,
    SessionError,
    SessionOptions,
    SpeechStarted,
    SpeechStopped,
    TextDelta,
)
from tests.conversing import WORDS, done, events, names, question, quiet, sound, spoken
from tests.tiny import tiny_model

RULES = TurnRules(False, 0.5, 8000, 4800, 1600, 1600, 80_000)
MANUAL = SessionOptions(vad=None)


def signals(rules: TurnRules, wav_S: np.ndarray, size: int) -> list[Signal]:
    ears = TurnTaker(rules)
    return [signal for start in range(0, len(wav_S), size) for signal in ears.hear(wav_S[start : start + size])]


def offline(omni: FlowOmni, turns: list[Turn], seed: int, **options: Any) -> tuple[str, np.ndarray]:
    """Text and sound that the generation loop gives for the conversation."""
    prompt = omni.processor.prompt(turns)
    generator = torch.Generator().manual_seed(seed)
    steps = list(generate(omni.model, omni.processor, [prompt], GenerationOptions(**options), [generator]))
    wav_S = torch.cat([step.wavs[0] for step in steps]).numpy()
    return "".join(step.texts[0] for step in steps).strip(), wav_S


def check_answer(found: list[Event], wanted: tuple[str, np.ndarray]) -> None:
    text, wav_S = wanted
    assert done(found).text == text == "".join(e.text for e in found if isinstance(e, TextDelta)).strip()
    assert len(sound(found)) == len(wav_S) == done(found).num_samples
    np.testing.assert_allclose(sound(found), wav_S, rtol=0, atol=1e-4)


def seat_of(engine: Engine, session: Session) -> Seat:
    [seat] = [seat for seat in engine._seats if seat.session is session]
    return seat


def turn_seed(number: int) -> int:
    return number * 0x9E3779B97F4A7C15 % 2**63


# ---------------------------------------------------------------------------------------------------------- listening


def test_turns_of_real_speech_are_found() -> None:
    """Each question is one turn: begun after the loudness rises and ended near where it falls for good."""
    found = signals(RULES, spoken(0, 1, 2), 1600)
    starts = [s.at_sample for s in found if isinstance(s, Started)]
    stops = [s for s in found if isinstance(s, Stopped)]
    assert len(starts) == len(stops) == 3
    offset = 0
    for number, (start, stop) in enumerate(zip(starts, stops, strict=True)):
        frames = question(number)[: len(question(number)) // 512 * 512].reshape(-1, 512).std(1)
        loud = np.flatnonzero(frames > 0.1 * frames.max()) * 512 + offset + 8000
        assert abs(start - loud[0]) < 0.25 * 16_000 and abs(stop.at_sample - loud[-1]) < 0.25 * 16_000
        assert len(stop.clip_S) == stop.at_sample + RULES.tail_samples - (start - RULES.preroll_samples)
        offset += 8000 + len(question(number)) + 12_800


@pytest.mark.parametrize("size", [7, 511, 512, 100_000])
def test_turns_do_not_depend_on_the_chunks(size: int) -> None:
    wav_S = spoken(2)
    wanted, found = signals(RULES, wav_S, 160), signals(RULES, wav_S, size)
    assert [type(s) for s in found] == [type(s) for s in wanted]
    for a, b in zip(found, wanted, strict=True):
        if isinstance(a, Paused | Stopped) and isinstance(b, Paused | Stopped):
            assert np.array_equal(a.clip_S, b.clip_S)
        else:
            assert a == b


def test_a_pause_is_a_guess_at_the_end_of_the_turn() -> None:
    """A pause shorter than the silence does not end the turn; the last pause's clip is the turn's."""
    half = len(question(0)) // 2
    broken = np.concatenate([quiet(0.5), question(0)[:half], quiet(0.25), question(0)[half:], quiet(0.8)])
    found = signals(RULES, broken, 160)
    assert [type(s) for s in found] == [Started, Paused, Resumed, Paused, Stopped]
    first, last, stopped = found[1], found[3], found[4]
    assert isinstance(first, Paused) and isinstance(last, Paused) and isinstance(stopped, Stopped)
    assert np.array_equal(last.clip_S, stopped.clip_S) and len(first.clip_S) < len(last.clip_S)
    assert np.array_equal(first.clip_S, last.clip_S[: len(first.clip_S)])


def test_what_is_no_speech_is_no_turn() -> None:
    noise = 0.05 * np.random.default_rng(0).standard_normal(32_000).astype(np.float32)
    click = np.where(np.arange(32_000) == 16_000, np.float32(0.9), np.float32(0.0))
    assert signals(RULES, np.concatenate([noise, quiet(1.0), click]), 512) == []


def test_a_turn_is_never_longer_than_the_model_hears() -> None:
    rules = TurnRules(False, 0.5, 8000, 4800, 1600, 1600, 24_000)
    stops = [s for s in signals(rules, spoken(0), 512) if isinstance(s, Stopped)]
    assert len(stops) == 2 and len(stops[0].clip_S) == 24_000


def test_without_detection_all_audio_is_the_turn() -> None:
    ears = TurnTaker(TurnRules(True, 0.5, 8000, 4800, 1600, 1600, 24_000))
    wav_S = np.random.default_rng(0).standard_normal(30_000).astype(np.float32)
    assert list(ears.hear(wav_S[:20_000])) == []
    assert np.array_equal(ears.take(), wav_S[:20_000]) and len(ears.take()) == 0
    assert list(ears.hear(wav_S)) == [Overflowed()]
    assert np.array_equal(ears.take(), wav_S[:24_000])


@pytest.mark.parametrize("rate", [8_000, 24_000, 44_100, 48_000])
def test_resampling_does_not_depend_on_the_chunks(rate: int) -> None:
    wav_S = np.random.default_rng(0).standard_normal(rate // 2).astype(np.float32)
    resampler, parts, start = Resampler(), [], 0
    for size in (1, 7, 480, 1, 333, rate):
        parts.append(resampler.push(wav_S[start : start + size], rate))
        start += size
    found = np.concatenate([*parts, resampler.flush()])
    np.testing.assert_allclose(found, soxr.resample(wav_S, rate, 16_000), rtol=0, atol=1e-6)


# ------------------------------------------------------------------------------------------------ a turn, its answer


def test_a_spoken_question_is_answered_as_offline(engine: Engine, omni: FlowOmni) -> None:
    """Events in order; text and sound are those of the offline call with the turn's clip."""
    session = engine.open()
    for start in range(0, len(spoken(0)), 320):
        session.push(spoken(0)[start : start + 320], 16_000)
    found = events(session)
    wanted = ["SpeechStarted", "SpeechStopped", "Committed", "ResponseStarted", "delta", "ResponseDone"]
    assert names(found) == wanted
    [stop] = [s for s in signals(RULES, spoken(0), 512) if isinstance(s, Stopped)]
    answer = omni.answer((stop.clip_S, 16_000))
    check_answer(found, (answer.text, answer.wav_S))
    assert isinstance(found[0], SpeechStarted) and isinstance(found[1], SpeechStopped)
    assert found[0].at_sec == pytest.approx(0.9, abs=0.1) and found[1].at_sec == pytest.approx(2.9, abs=0.3)
    starts = [e.first_sample for e in found if isinstance(e, AudioDelta)]
    sizes = [len(e.wav_S) for e in found if isinstance(e, AudioDelta)]
    assert starts == [sum(sizes[:i]) for i in range(len(sizes))]


def test_a_conversation_is_answered_as_its_turns_offline(engine: Engine, omni: FlowOmni) -> None:
    """Heard and typed turns; each answer is that of the generation loop to the whole conversation."""
    session, processor = engine.open(MANUAL), omni.processor
    turns: list[Turn] = []
    for number, ask in enumerate(["what is one", 1, "say hello", 2]):
        if isinstance(ask, int):
            session.push(question(ask), 16_000)
            session.commit("mine")
            turns.append(processor.turn("user", wav_S=question(ask)))
        else:
            session.say_text(ask)
            turns.append(processor.turn("user", text=ask))
        session.respond()
        found = events(session)
        check_answer(found, offline(omni, turns, turn_seed(number)))
        assert not isinstance(ask, int) or found[0] == Committed("mine")
        turns.append(seat_of(engine, session).entries[-1].turn)


def test_instructions_are_read_first(engine: Engine, omni: FlowOmni) -> None:
    session = engine.open(SessionOptions(vad=None, instructions="say apple"))
    session.say_text("what is one")
    session.respond()
    prompt = omni.processor.layout.prompt([Turn("user", "what is one")], instruction="say apple")
    generator = torch.Generator().manual_seed(0)
    steps = list(generate(omni.model, omni.processor, [prompt], GenerationOptions(), [generator]))
    assert done(events(session)).text == "".join(step.texts[0] for step in steps).strip()
    assert len(prompt.text_BL[0]) > len(omni.processor.prompt([Turn("user", "what is one")]).text_BL[0])


def test_all_is_read_before_the_silence_ends(omni: FlowOmni) -> None:
    """When the turn is found to have ended, nothing of it is left to read; a wrong guess leaves no trace."""
    session = Session(SessionOptions(), 24_000, lambda _: None, lambda: None)
    seat = Seat(session, omni, lambda _: None, Counter())
    half = len(question(0)) // 2
    parts = [quiet(0.5), question(0)[:half], quiet(0.25), question(0)[half:], quiet(0.35)]
    with torch.inference_mode():
        for start in range(0, len(wav_S := np.concatenate(parts)), 320):
            seat.handle(("push", wav_S[start : start + 320], 16_000))
            while seat.task is not None:
                seat.read_piece(16)
        assert session.poll() is not None and session.poll() is None  # speech started; not more is known
        assert not seat.entries and len(seat.memory) == len(seat.context.opening([]))
        seat.handle(("push", quiet(0.2), 16_000))
        assert seat.answer is not None and seat.task is not None
        assert seat.memory.known(seat.task.wanted) == len(seat.task.wanted) == len(seat.memory)


def test_text_only_answers_are_silent(engine: Engine, omni: FlowOmni) -> None:
    session = engine.open(SessionOptions(vad=None, speak=False))
    for number in range(2):
        session.say_text("what is one")
        session.respond()
        found = events(session)
        assert not len(sound(found)) and done(found).num_samples == 0
        if number == 0:
            check_answer(found, offline(omni, [omni.processor.turn("user", text="what is one")], 0, speak=False))
    assert seat_of(engine, session).entries[1].turn.speech_LX is None


def test_updates_hold_from_there_on(engine: Engine) -> None:
    """A turn detected by the model, then one that the client ends, then detected again."""
    session = engine.open()
    session.update(MANUAL)
    session.push(question(1), 16_000)
    assert events(session) == []
    session.commit("a")
    session.update(SessionOptions(auto_respond=False))
    session.push(spoken(2), 16_000)
    assert names(events(session)) == ["Committed", "SpeechStarted", "SpeechStopped", "Committed"]
    session.clear()
    session.commit()
    [error] = events(session)
    assert isinstance(error, SessionError) and error.code == "buffer_empty"


# ------------------------------------------------------------------------------------------------------- interruptions


def _interrupted(engine: Engine, played: int | None) -> tuple[Session, ResponseDone]:
    """A session whose first answer was cancelled while its queue was full; `played` samples of it were heard."""
    session = engine.open(SessionOptions(vad=None, stop_threshold=1 - 1e-9, max_queued_sec=0.3))
    session.say_text("what is one plus two")
    session.respond()
    taken = 0
    while taken < 4000:
        event = session.poll(10.0)
        taken += len(event.wav_S) if isinstance(event, AudioDelta) else 0
        if isinstance(event, ResponseStarted):
            response_id = event.response_id
    session.cancel()
    if played is not None:
        session.played(response_id, played)
    rest = events(session)
    assert not len(sound(rest))  # nothing stale after the call
    assert done(rest).status == "cancelled" and done(rest).num_samples == taken
    return session, done(rest)


@pytest.mark.parametrize("played", [None, 4500, 2049, 0])
def test_only_what_was_played_is_remembered(engine: Engine, omni: FlowOmni, played: int | None) -> None:
    session, first = _interrupted(engine, played)
    session.say_text("say hello")
    session.respond()
    found = events(session)
    asked, said, again = (entry.turn for entry in seat_of(engine, session).entries[:3])
    num_tokens = -(-min(first.num_samples, played if played is not None else 10**6) // 2048)
    assert (0 if said.speech_LX is None else len(said.speech_LX)) == num_tokens
    # text runs two steps ahead of speech; an answer of which nothing was heard has no text either
    words = said.text_ids or ()
    assert len(words) <= (2 + num_tokens if num_tokens else 0)
    check_answer(found, offline(omni, [asked, said, again], turn_seed(1), stop_threshold=1 - 1e-9))


def test_the_caches_are_cut_not_read_again(engine: Engine) -> None:
    """After an interruption the question and the steps that were heard stay; only the answer's new end is read."""
    session, _ = _interrupted(engine, 2049)
    seat = seat_of(engine, session)
    read: list[int] = []
    true_read = seat.context.read_piece

    def record(memory: Any, wanted: Any, entries: Any, limit: int) -> Any:
        read.append(len(wanted) - memory.known(wanted))
        return true_read(memory, wanted, entries, limit)

    seat.context.read_piece = record  # type: ignore[method-assign]
    session.say_text("say hello")
    session.respond()
    events(session)
    assert 0 < sum(read) < 12


def test_speaking_interrupts_the_answer(engine: Engine) -> None:
    options = SessionOptions(stop_threshold=1 - 1e-9, max_queued_sec=0.2)  # the queue is soon full: the answer waits
    session = engine.open(options)
    session.say_text("what is one")
    session.respond()
    while not isinstance(session.poll(10.0), AudioDelta):
        pass
    session.push(spoken(2)[: -round(0.6 * 16_000)], 16_000)
    found = events(session)
    started = next(number for number, event in enumerate(found) if isinstance(event, SpeechStarted))
    after = found[started:]  # a piece of sound may have come before the speaking was heard
    assert names([e for e in after if not isinstance(e, TextDelta)]) == ["SpeechStarted", "ResponseDone"]
    assert done(found).status == "cancelled"


def test_without_barge_in_the_turn_waits(engine: Engine) -> None:
    session = engine.open(SessionOptions(barge_in=False, stop_threshold=1 - 1e-9, max_queued_sec=0.2))
    session.say_text("what is one")
    session.respond()
    while not isinstance(session.poll(10.0), AudioDelta):
        pass
    session.push(spoken(2), 16_000)
    found = events(session)
    others = [e for e in found if not isinstance(e, TextDelta | AudioDelta)]
    kinds = ["SpeechStarted", "SpeechStopped", "Committed", "ResponseDone", "ResponseStarted", "ResponseDone"]
    assert sorted(names(others)) == sorted(kinds) and names(others)[-2:] == kinds[-2:]
    assert [e.status for e in others if isinstance(e, ResponseDone)] == ["incomplete", "incomplete"]


# ------------------------------------------------------------------------------------------------------ rolling window


def test_a_long_conversation_stays_small_and_does_not_drift(engine: Engine, omni: FlowOmni) -> None:
    """Positions stay under the limit for ever, and an answer late in the session is that of its turns offline."""
    session = engine.open(SessionOptions(vad=None, max_context_positions=180))
    seat, sizes = seat_of(engine, session), []
    for number in range(24):
        session.say_text(f"what is {WORDS[number % 5]} plus two")
        session.respond()
        found = events(session)
        sizes.append(len(seat.memory))
        assert seat.memory.reading is not None and len(seat.memory) < 180
        assert int(seat.memory.reading.model_state.num_seen_B) == len(seat.memory)
        if number == 22:
            before = [entry.turn for entry in seat.entries]
    # the last answer had the turns before it, as they are remembered now or (before the window rolled) one more
    turns = [*before, Turn("user", f"what is {WORDS[23 % 5]} plus two")]
    check_answer(found, offline(omni, turns, turn_seed(23)))
    assert max(sizes[12:]) <= max(sizes[:12]) and len(seat.entries) < 24
    assert min(sizes[3:]) < max(sizes)  # it did roll


def test_a_window_too_small_for_a_turn_is_refused(engine: Engine) -> None:
    with pytest.raises(ValueError, match="max_context_positions is 20, but one heard turn"):
        engine.open(SessionOptions(max_context_positions=20))
    with pytest.raises(ValueError, match="max_context_positions is 10000000, but the language model can place"):
        engine.open(SessionOptions(max_context_positions=10_000_000))


# ------------------------------------------------------------------------------------------------------------- refusals


def codes(session: Session) -> list[str]:
    return [e.code for e in events(session) if isinstance(e, SessionError)]


def test_calls_out_of_order_are_refused_and_the_session_goes_on(engine: Engine) -> None:
    session = engine.open(SessionOptions(vad=None, max_queued_sec=0.1, stop_threshold=1 - 1e-9))
    session.respond()
    session.commit()
    session.cancel()
    session.played("resp_unknown", 5)
    session.say_text("one " * 3000)
    assert codes(session) == ["nothing_to_answer", "buffer_empty", "text_too_long"]
    session.say_text("what is one")
    session.respond()
    session.respond()
    session.cancel()
    assert codes(session) == ["response_active"]
    session.say_text("what is two")
    session.respond()
    assert done(events(session)).status == "incomplete"


def test_a_model_without_ears_says_so_once() -> None:
    model, processor = tiny_model(encoder=None, loss={})
    with Engine(FlowOmni(model, processor)) as engine:
        session = engine.open()
        session.push(quiet(1.0), 16_000)
        session.push(quiet(1.0), 16_000)
        assert codes(session) == ["no_ears"]
        session.say_text("hello")
        session.respond()
        assert names(events(session)) == ["Committed", "ResponseStarted", "delta", "ResponseDone"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vad": "client"}, "vad is 'client'"),
        ({"silence_sec": float("nan")}, "silence_sec is nan"),
        ({"tail_sec": 0.6}, "tail_sec is 0.6; it must be at most silence_sec"),
        ({"vad_threshold": 1.0}, "vad_threshold is 1.0"),
        ({"max_answer_tokens": 0}, "max_answer_tokens is 0"),
        ({"max_session_sec": 0.0}, "max_session_sec is 0.0"),
        ({"instructions": "[[turn 3]]"}, r"instructions hold '\[\[turn'"),
        ({"seed": -1}, "seed is -1"),
        ({"sampling": {"temprature": 1.0}}, "temprature.*did you mean 'temperature'"),
        ({"sampling": {"temperature": "hot"}}, "sampling holds a value of a wrong kind"),
    ],
)
def test_bad_options_are_refused(engine: Engine, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        engine.open(SessionOptions(**options))
    assert engine.stats().num_sessions == 0


def test_bad_audio_is_refused(engine: Engine) -> None:
    session = engine.open()
    for wav_S, rate, message in [
        (np.zeros((2, 2)), 16_000, "audio has shape"),
        (np.array([0.0, np.nan]), 16_000, "NaN"),
        (np.zeros(5), 100, "sample_rate_hz is 100"),
    ]:
        with pytest.raises(ValueError, match=message):
            session.push(wav_S, rate)
    with pytest.raises(ValueError, match="the text is empty"):
        session.say_text("  ")
    with pytest.raises(ValueError, match="num_samples is -1"):
        session.played("resp", -1)
    assert events(session) == []
