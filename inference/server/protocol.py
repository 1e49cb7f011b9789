"""The events on the wire: what a client may send, checked, and the shapes of what it is sent.

Names and fields are those of the OpenAI Realtime API (general availability, 2025), a subset of them; the whole of it
stands in `inference/PROTOCOL.md`. Nothing here does input or output or knows the model.
"""

from __future__ import annotations

import base64
import binascii
import json
import secrets
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from flowomni.strict import nearest

RATE_HZ = 24_000
Json = dict[str, Any]
Modality = Literal["text", "audio"]


class ProtocolError(ValueError):
    """What the client is told in an `error` event; the conversation goes on.

    Attributes:
        code: stable and machine-readable, the table in `inference/PROTOCOL.md` lists them.
        param: path of the field that is wrong, None where it is no single field.
        event_id: the client's own id of the event that is wrong, None if it gave none.
    """

    def __init__(self, code: str, message: str, param: str | None = None, event_id: str | None = None):
        super().__init__(message)
        self.code, self.param, self.event_id = code, param, event_id

    def as_event(self) -> Json:
        kind = "server_error" if self.code in SERVER_CODES else "invalid_request_error"
        detail = {"type": kind, "code": self.code, "message": str(self), "param": self.param, "event_id": self.event_id}
        return server_event("error", error=detail)


SERVER_CODES = {"session_failed", "server_full", "server_draining", "internal_error"}


def new_id(prefix: str) -> str:
    """A fresh id such as item_3f9c0a...; it does not repeat."""
    return f"{prefix}_{secrets.token_hex(10)}"


def server_event(type_: str, **fields: Any) -> Json:
    """An event for the client, with its own id."""
    return {"type": type_, "event_id": new_id("event")} | fields


# ------------------------------------------------------------------------------------------------------ client events


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class _Loose(BaseModel):  # fields of the Realtime API that have no effect here are taken and not looked at
    model_config = ConfigDict(extra="ignore", strict=True)


class AudioFormat(_Model):
    """The only one: PCM16, little endian, one channel."""

    type: Literal["audio/pcm"] = "audio/pcm"
    rate: Literal[24000] = 24_000


class TurnDetection(_Model):
    """The server finds the turns: speech probability over `threshold` begins one, silence ends it."""

    type: Literal["server_vad"] = "server_vad"
    threshold: Annotated[float, Field(ge=0, le=1)] = 0.5
    prefix_padding_ms: Annotated[int, Field(ge=0, le=2000)] = 300
    silence_duration_ms: Annotated[int, Field(ge=50, le=10_000)] = 500
    create_response: bool = True
    interrupt_response: bool = True
    idle_timeout_ms: None = None


class AudioInput(_Model):
    format: AudioFormat = AudioFormat()
    turn_detection: TurnDetection | None = TurnDetection()
    noise_reduction: Any = None
    transcription: Any = None


class AudioOutput(_Model):
    format: AudioFormat = AudioFormat()
    voice: Any = None
    speed: Annotated[float, Field(ge=1, le=1)] = 1.0


class Audio(_Model):
    input: AudioInput = AudioInput()
    output: AudioOutput = AudioOutput()


class SessionFields(_Model):
    """`session` of session.update. What has no effect is taken and not echoed by session.updated."""

    type: Literal["realtime"]
    audio: Audio = Audio()
    output_modalities: Annotated[list[Modality], Field(min_length=1, max_length=1)] = ["audio"]
    max_output_tokens: Annotated[int, Field(ge=1)] | Literal["inf"] = "inf"
    tools: Annotated[list[Any], Field(max_length=0)] = []
    model: Any = None
    instructions: Any = None
    include: Any = None
    parallel_tool_calls: Any = None
    prompt: Any = None
    reasoning: Any = None
    tool_choice: Any = None
    tracing: Any = None
    truncation: Any = None
    id: Any = None
    object: Any = None
    expires_at: Any = None


class Content(_Loose):
    type: Literal["input_text", "input_audio", "output_text"]
    text: Annotated[str, Field(max_length=20_000)] | None = None
    audio: str | None = None


class Item(_Loose):
    """`item` of conversation.item.create: one typed or one spoken message."""

    type: Literal["message"]
    role: Literal["user", "assistant", "system"]
    content: Annotated[list[Content], Field(min_length=1, max_length=16)]
    id: Annotated[str, Field(min_length=1, max_length=64)] | None = None


class ResponseFields(_Loose):
    """`response` of response.create."""

    output_modalities: Annotated[list[Modality], Field(min_length=1, max_length=1)] | None = None
    max_output_tokens: Annotated[int, Field(ge=1)] | Literal["inf"] | None = None
    conversation: Literal["auto"] | None = None
    input: None = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    metadata: dict[str, str] | None = None


class ClientEvent(_Loose):
    """What every event of a client has."""

    type: str
    event_id: Annotated[str, Field(max_length=512)] | None = None


class SessionUpdate(ClientEvent):
    session: SessionFields


class Append(ClientEvent):
    audio: str


class Commit(ClientEvent):
    pass


class Clear(ClientEvent):
    pass


class ItemCreate(ClientEvent):
    item: Item
    previous_item_id: str | None = None


class ItemRetrieve(ClientEvent):
    item_id: str


class ItemDelete(ClientEvent):
    item_id: str


class ItemTruncate(ClientEvent):
    item_id: str
    content_index: Literal[0]
    audio_end_ms: Annotated[int, Field(ge=0, le=86_400_000)]


class ResponseCreate(ClientEvent):
    response: ResponseFields | None = None


class ResponseCancel(ClientEvent):
    response_id: str | None = None


CLIENT_EVENTS: dict[str, type[ClientEvent]] = {
    "session.update": SessionUpdate,
    "input_audio_buffer.append": Append,
    "input_audio_buffer.commit": Commit,
    "input_audio_buffer.clear": Clear,
    "conversation.item.create": ItemCreate,
    "conversation.item.retrieve": ItemRetrieve,
    "conversation.item.delete": ItemDelete,
    "conversation.item.truncate": ItemTruncate,
    "response.create": ResponseCreate,
    "response.cancel": ResponseCancel,
}


def parse(message: str | bytes) -> ClientEvent:
    """One checked event.

    Args:
        message: a websocket message; binary frames (bytes) are refused.

    Raises:
        ProtocolError: with the field, what is wrong with it, and the client's event_id where it could be read.
    """
    if isinstance(message, bytes):
        raise ProtocolError("binary_frame", "binary frames are not taken: send events as JSON text, audio in base64")
    try:
        data = json.loads(message)
    except (ValueError, RecursionError) as error:
        raise ProtocolError("invalid_json", f"the message is not JSON: {str(error)[:200]}") from None
    if not isinstance(data, dict):
        raise ProtocolError("invalid_event", f"an event is a JSON object, this is a {type(data).__name__}")
    event_id = data.get("event_id")
    event_id = event_id[:512] if isinstance(event_id, str) else None
    kind = data.get("type")
    if not isinstance(kind, str):
        raise ProtocolError("invalid_event", "the event has no type: give one as a string", "type", event_id)
    if kind not in CLIENT_EVENTS:
        known = list(CLIENT_EVENTS)
        raise ProtocolError(
            "unknown_event", f"unknown event {kind[:80]!r}{nearest(kind[:80], known)}", "type", event_id
        )
    try:
        return CLIENT_EVENTS[kind].model_validate(data)
    except ValidationError as error:
        raise _explain(error, event_id) from None


def _explain(error: ValidationError, event_id: str | None) -> ProtocolError:
    first = error.errors(include_url=False, include_context=False)[0]
    param = ".".join(str(part) for part in first["loc"])
    code = {"missing": "missing_field", "extra_forbidden": "unknown_field"}.get(first["type"], "invalid_value")
    given = "" if first["type"] in ("missing", "extra_forbidden") else f", not {repr(first['input'])[:80]}"
    return ProtocolError(code, f"{param}: {first['msg']}{given}", param, event_id)


# --------------------------------------------------------------------------------------------------------------- audio


def decode_audio(audio: str, param: str = "audio") -> np.ndarray:
    """PCM16 in base64 to float32 samples [S] in [-1, 1).

    Raises:
        ProtocolError: not base64, or half a sample.
    """
    try:
        raw = base64.b64decode(audio, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ProtocolError("invalid_audio", f"{param} is not base64: {error}", param) from None
    if len(raw) % 2:
        raise ProtocolError("invalid_audio", f"{param} has {len(raw)} bytes: PCM16 has two for each sample", param)
    return np.frombuffer(raw, "<i2").astype(np.float32) / 32_768


def encode_audio(wav_S: np.ndarray) -> str:
    """Float32 samples [S] to PCM16 in base64; what is louder than full scale is clipped."""
    return base64.b64encode(np.rint(wav_S * 32_768).clip(-32_768, 32_767).astype("<i2").tobytes()).decode("ascii")
