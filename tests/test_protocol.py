"""The events on the wire: what is taken, what is refused and why, and sound as text.

Shapes: S samples.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from inference.server import protocol as wire
from inference.server.fuzz import GOOD, fuzzed
from inference.server.protocol import ProtocolError, decode_audio, encode_audio, parse


def refused(message: str | bytes) -> ProtocolError:
    with pytest.raises(ProtocolError) as caught:
        parse(message)
    return caught.value


def refused_event(**event: Any) -> ProtocolError:
    return refused(json.dumps(event))


@pytest.mark.parametrize("event", GOOD, ids=lambda event: event["type"])
def test_good_events(event: dict[str, Any]) -> None:
    parsed = parse(json.dumps(event))
    assert type(parsed) is wire.CLIENT_EVENTS[event["type"]] and parsed.event_id == event.get("event_id")


def test_every_event_is_tested() -> None:
    assert {event["type"] for event in GOOD} == set(wire.CLIENT_EVENTS)


@pytest.mark.parametrize(
    ("message", "code"),
    [
        ("", "invalid_json"),
        ("{", "invalid_json"),
        ("[" * 100_000, "invalid_json"),
        ("9" * 10_000, "invalid_json"),
        ("null", "invalid_event"),
        ("[]", "invalid_event"),
        ("{}", "invalid_event"),
        ('{"type": null}', "invalid_event"),
        (b"{}", "binary_frame"),
        (b"", "binary_frame"),
    ],
)
def test_no_events(message: str | bytes, code: str) -> None:
    error = refused(message)
    assert error.code == code and str(error)


def test_unknown_event_names_the_nearest() -> None:
    error = refused_event(type="response.craete", event_id="mine")
    assert error.code == "unknown_event" and "response.create" in str(error) and error.event_id == "mine"


@pytest.mark.parametrize(
    ("session", "param"),
    [
        ({"type": "realtime", "audio": {"input": {"format": {"type": "audio/pcm", "rate": 16_000}}}}, "format.rate"),
        ({"type": "realtime", "audio": {"output": {"format": {"type": "audio/pcmu"}}}}, "format.type"),
        ({"type": "realtime", "audio": {"input": {"turn_detection": {"type": "semantic_vad"}}}}, "turn_detection.type"),
        ({"type": "realtime", "audio": {"input": {"turn_detection": {"threshold": 2}}}}, "turn_detection.threshold"),
        (
            {"type": "realtime", "audio": {"input": {"turn_detection": {"threshold": "0.5"}}}},
            "turn_detection.threshold",
        ),
        ({"type": "realtime", "audio": {"output": {"speed": 1.5}}}, "output.speed"),
        ({"type": "realtime", "output_modalities": ["text", "audio"]}, "output_modalities"),
        ({"type": "realtime", "max_output_tokens": 0}, "max_output_tokens"),
        ({"type": "realtime", "tools": [{"type": "function"}]}, "tools"),
        ({"type": "transcription"}, "session.type"),
    ],
)
def test_wrong_values_are_named(session: dict[str, Any], param: str) -> None:
    error = refused_event(type="session.update", session=session, event_id="mine")
    assert error.code == "invalid_value" and error.event_id == "mine"
    assert error.param is not None and error.param.startswith("session.") and param in error.param
    assert str(error).startswith(error.param)


def test_fields_of_the_api_without_effect_are_taken() -> None:
    session = {
        "type": "realtime",
        "instructions": "be brief",
        "tracing": "auto",
        "audio": {"output": {"voice": "alloy"}},
    }
    assert isinstance(parse(json.dumps({"type": "session.update", "session": session})), wire.SessionUpdate)


def test_missing_and_unknown_fields() -> None:
    error = refused_event(type="input_audio_buffer.append")
    assert (error.code, error.param) == ("missing_field", "audio")
    error = refused_event(type="session.update", session={"type": "realtime", "voice": "alloy"})
    assert (error.code, error.param) == ("unknown_field", "session.voice")


def test_text_that_is_no_unicode_is_refused() -> None:
    """Half a surrogate pair passes JSON, and would fail in the tokenizer's native code."""
    item = {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "a\ud800"}]}
    assert refused_event(type="conversation.item.create", item=item).code == "invalid_value"


def test_error_event() -> None:
    event = ProtocolError("invalid_value", "no", "session.type", "mine").as_event()
    assert event["type"] == "error" and event["event_id"]
    wanted = {"type": "invalid_request_error", "code": "invalid_value", "message": "no"}
    assert event["error"] == wanted | {"param": "session.type", "event_id": "mine"}
    assert ProtocolError("server_full", "no").as_event()["error"]["type"] == "server_error"


def test_sound_survives_the_wire() -> None:
    wav_S = np.random.default_rng(0).uniform(-1, 1, 999).astype(np.float32)
    np.testing.assert_allclose(decode_audio(encode_audio(wav_S)), wav_S, atol=1.5 / 32_768)


def test_too_loud_sound_is_clipped() -> None:
    loud = decode_audio(encode_audio(np.array([2.0, -2.0], np.float32)))
    np.testing.assert_allclose(loud, [1, -1], atol=1e-3)


@pytest.mark.parametrize("audio", ["A", "AAA", "AA AA", "AAAA\n", "äöü", "AAAA", "%%%%"])
def test_wrong_sound(audio: str) -> None:
    """Not base64, white space in it, or three bytes, which is one sample and a half."""
    with pytest.raises(ProtocolError, match="audio") as caught:
        decode_audio(audio)
    assert caught.value.code == "invalid_audio"


def test_fuzzed_messages_are_taken_or_refused() -> None:
    """Nothing but a checked event or an explained error ever comes out, and the error can be sent."""
    taken = 0
    for seed in range(5_000):
        try:
            parse(fuzzed(seed))
            taken += 1
        except ProtocolError as error:
            assert error.code and len(json.dumps(error.as_event())) < 5_000
    assert 250 < taken < 4_000, "the fuzz is either all good or all bad"
