"""One conversation between the wire and the model: client events become calls of a `Session`, its events become server
events. No input or output happens here.

    conversation = Conversation(session, "flowomni-tiny", metrics)
    for event in conversation.receive(message): ...  # a message of the client
    for event in conversation.tell(session.poll()): ...  # an event of the session
"""

from __future__ import annotations

import dataclasses
import time
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from inference import events as live
from inference.session import Session, SessionOptions

from . import protocol as wire
from .metrics import Metrics
from .protocol import Json, ProtocolError, new_id, server_event

MAX_ITEMS = 256  # that can be retrieved or truncated; older ones are forgotten, so that a session's memory is bounded
RATE = wire.RATE_HZ


@dataclass
class _Item:
    """A message of the conversation.

    Attributes:
        kind: type of its one content part.
        event_id: the client's id of the event that made it, for errors.
        num_samples: of an answer, sent so far.
    """

    id: str
    role: str
    kind: str
    text: str | None = None
    status: str = "completed"
    event_id: str | None = None
    response_id: str | None = None
    num_samples: int = 0

    def as_json(self) -> Json:
        field = "text" if self.kind.endswith("text") else "transcript"
        content = [] if self.status == "in_progress" else [{"type": self.kind, field: self.text}]
        head = {"id": self.id, "object": "realtime.item", "type": "message", "status": self.status, "role": self.role}
        return head | {"content": content}


@dataclass
class _Asked:
    event_id: str | None
    fields: wire.ResponseFields
    cancelled: bool = False


@dataclass
class _Response:
    id: str
    item: _Item
    modality: str
    text: str = ""
    cancel_asked: bool = False
    metadata: dict[str, str] | None = None

    def where(self) -> Json:
        return {"response_id": self.id, "item_id": self.item.id, "output_index": 0, "content_index": 0}


class Conversation:
    """Speaks the protocol for one session.

    Args:
        session: just opened, with its default options.
        model: name told to the client.
        take_instructions: hand the client's `instructions` to the model. A model that was not trained with instructions
            answers worse with them.
    """

    def __init__(self, session: Session, model: str, metrics: Metrics, take_instructions: bool = False):
        self.session, self.model, self.metrics = session, model, metrics
        self.take_instructions = take_instructions
        self.id = new_id("conv")
        self.config = wire.SessionFields(type="realtime")
        self.base = session.options
        self.items: OrderedDict[str, _Item] = OrderedDict()
        self.pending: list[_Item] = []  # handed to the session, which has not said Committed yet
        self.asked: _Asked | None = None  # response.create that has not begun yet
        self.response: _Response | None = None
        self.speaking: str | None = None  # id of the item that the speech being heard becomes
        self.speech_ended = 0.0  # on the clock of `time.perf_counter`: when the turn to be answered was over
        self.buffered = False
        self._apply(self._options())

    @property
    def idle(self) -> bool:
        """No answer is given or asked for."""
        return self.response is None and self.asked is None

    def opening(self) -> list[Json]:
        """What the client is told first."""
        return [server_event("session.created", session=self._described())]

    # ------------------------------------------------------------------------------------------------------ the client

    def receive(self, message: str | bytes) -> list[Json]:
        """Carry out a client's message. Whatever is wrong with it comes back as an `error` event."""
        event_id = None
        try:
            event = wire.parse(message)
            event_id = event.event_id
            return self._carry_out(event)
        except ProtocolError as error:
            error.event_id = error.event_id or event_id
            self.metrics.error(error.code)
            return [error.as_event()]

    def _carry_out(self, event: wire.ClientEvent) -> list[Json]:
        match event:
            case wire.SessionUpdate():
                return self._update(event)
            case wire.Append():
                wav_S = wire.decode_audio(event.audio)
                if len(wav_S):
                    self.session.push(wav_S, RATE)
                    self.buffered = True
                    self.metrics.heard_sec.inc(len(wav_S) / RATE)
            case wire.Commit():
                self._commit(event.event_id)
            case wire.Clear():
                self.session.clear()
                self.buffered, self.speaking = False, None
                return [server_event("input_audio_buffer.cleared")]
            case wire.ItemCreate():
                self._create(event)
            case wire.ItemRetrieve():
                return [server_event("conversation.item.retrieved", item=self._find(event.item_id).as_json())]
            case wire.ItemDelete():
                self._find(event.item_id)
                remedy = "what was said stays in the model's context; begin a new session to forget it"
                raise ProtocolError("unsupported", f"items cannot be deleted: {remedy}", "type")
            case wire.ItemTruncate():
                return self._truncate(event)
            case wire.ResponseCreate():
                self._respond(event)
            case wire.ResponseCancel():
                self._cancel(event)
        return []

    def _update(self, event: wire.SessionUpdate) -> list[Json]:
        before = self.config
        self.config = _merged(before, event.session)
        try:
            self._apply(self._options())
        except ValueError as error:
            self.config = before
            raise ProtocolError("invalid_value", str(error), "session") from None
        return [server_event("session.updated", session=self._described())]

    def _commit(self, event_id: str | None) -> None:
        item = _Item(self.speaking or new_id("item"), "user", "input_audio", event_id=event_id)
        self.pending.append(item)
        self.session.commit(item.id)
        self.buffered, self.speaking = False, None
        self.speech_ended = time.perf_counter()

    def _create(self, event: wire.ItemCreate) -> None:
        given = event.item
        last = next(reversed(self.items), None)
        if event.previous_item_id not in (None, last) and not (event.previous_item_id == "root" and last is None):
            message = "items are added at the end only: leave previous_item_id out"
            raise ProtocolError("unsupported", message, "previous_item_id")
        if given.role != "user":
            message = f"only user messages can be added, not {given.role!r}: the model remembers its own answers"
            raise ProtocolError("unsupported", message, "item.role")
        item_id = given.id or new_id("item")
        if item_id in self.items or any(item.id == item_id for item in self.pending):
            raise ProtocolError("invalid_value", f"the conversation has an item {item_id!r} already", "item.id")
        kinds = {part.type for part in given.content}
        if kinds == {"input_text"}:
            self._add_text(_Item(item_id, "user", "input_text", event_id=event.event_id), given.content)
        elif kinds == {"input_audio"} and len(given.content) == 1:
            self._add_audio(_Item(item_id, "user", "input_audio", event_id=event.event_id), given.content[0])
        else:
            message = "a message is either one part input_audio or any number of parts input_text"
            raise ProtocolError("unsupported", message, "item.content")

    def _add_text(self, item: _Item, content: list[wire.Content]) -> None:
        item.text = " ".join(part.text or "" for part in content).strip()
        if not item.text:
            raise ProtocolError("invalid_value", "the message has no words", "item.content.0.text")
        self.pending.append(item)
        try:
            self.session.say_text(item.text, item.id)
        except ValueError as error:
            self.pending.remove(item)
            raise ProtocolError("invalid_value", str(error), "item.content.0.text") from None

    def _add_audio(self, item: _Item, content: wire.Content) -> None:
        wav_S = wire.decode_audio(content.audio or "", "item.content.0.audio")
        if not len(wav_S):
            raise ProtocolError("invalid_audio", "the message has no sound", "item.content.0.audio")
        if self.speaking is not None or (self.buffered and self.config.audio.input.turn_detection is None):
            message = "the input audio buffer is in use: commit or clear it first"
            raise ProtocolError("buffer_in_use", message, "item.content.0.audio")
        self.pending.append(item)
        self._apply(dataclasses.replace(self._options(), vad=None))  # this turn is whole as it is
        self.session.clear()
        self.session.push(wav_S, RATE)
        self.session.commit(item.id)
        self._apply(self._options())
        self.buffered = False
        self.metrics.heard_sec.inc(len(wav_S) / RATE)

    def _find(self, item_id: str) -> _Item:
        if item_id not in self.items:
            raise ProtocolError("item_not_found", f"the conversation has no item {item_id[:80]!r}", "item_id")
        return self.items[item_id]

    def _truncate(self, event: wire.ItemTruncate) -> list[Json]:
        item = self._find(event.item_id)
        if item.response_id is None or item.kind != "output_audio":
            raise ProtocolError("invalid_value", f"{item.id} is no spoken answer: it has no sound to cut", "item_id")
        there_ms = item.num_samples * 1000 / RATE
        if event.audio_end_ms > there_ms + 1:
            message = f"{event.audio_end_ms} ms is longer than the {there_ms:.0f} ms that were sent"
            raise ProtocolError("invalid_value", message, "audio_end_ms")
        self.session.played(item.response_id, min(item.num_samples, event.audio_end_ms * RATE // 1000))
        if self.response is None or self.response.item is not item:
            item.text = None  # nobody knows which of the words were heard
        cut = {"item_id": item.id, "content_index": 0, "audio_end_ms": event.audio_end_ms}
        return [server_event("conversation.item.truncated", **cut)]

    def _respond(self, event: wire.ResponseCreate) -> None:
        ending = self.response is not None and self.response.cancel_asked and self.asked is None
        if not self.idle and not ending:
            message = "an answer is in progress: wait for its response.done or send response.cancel"
            raise ProtocolError("conversation_already_has_active_response", message)
        wanted = event.response or wire.ResponseFields()
        try:
            self._apply(self._options(wanted))
        except ValueError as error:
            raise ProtocolError("invalid_value", str(error), "response") from None
        self.asked = _Asked(event.event_id, wanted)
        self.speech_ended = time.perf_counter()
        self.session.respond()

    def _cancel(self, event: wire.ResponseCancel) -> None:
        active = self.response.id if self.response else None
        if self.idle or event.response_id not in (None, active):
            raise ProtocolError("response_cancel_not_active", "that answer is not in progress: nothing to cancel")
        if self.response:
            self.response.cancel_asked = True
        elif self.asked:
            self.asked.cancelled = True
        self.session.cancel()

    # ----------------------------------------------------------------------------------------------------- the session

    def tell(self, event: live.Event) -> list[Json]:
        """What the client is told of a session's event."""
        match event:
            case live.SpeechStarted():
                self.speaking = new_id("item")
                at = {"audio_start_ms": round(event.at_sec * 1000), "item_id": self.speaking}
                return [server_event("input_audio_buffer.speech_started", **at)]
            case live.SpeechStopped():
                self.speech_ended = time.perf_counter()
                at = {"audio_end_ms": round(event.at_sec * 1000), "item_id": self.speaking or new_id("item")}
                return [server_event("input_audio_buffer.speech_stopped", **at)]
            case live.Committed():
                return self._committed(event.item_id)
            case live.ResponseStarted():
                return self._started(event.response_id)
            case live.TextDelta() | live.AudioDelta():
                return self._delta(event)
            case live.ResponseDone():
                return self._done(event)
            case live.SessionError():
                return self._failed(event)

    def _committed(self, session_item_id: str) -> list[Json]:
        item = next((item for item in self.pending if item.id == session_item_id), None)
        if item is None:  # a turn that the VAD found
            item = _Item(self.speaking or new_id("item"), "user", "input_audio")
            self.speaking, self.buffered = None, False
        else:
            self.pending.remove(item)
        before = next(reversed(self.items), None)
        added = self._keep(item)
        done = server_event("conversation.item.done", previous_item_id=before, item=item.as_json())
        if item.kind != "input_audio":
            return [added, done]
        return [server_event("input_audio_buffer.committed", previous_item_id=before, item_id=item.id), added, done]

    def _keep(self, item: _Item) -> Json:
        before = next(reversed(self.items), None)
        self.items[item.id] = item
        if len(self.items) > MAX_ITEMS:
            self.items.popitem(last=False)
        return server_event("conversation.item.added", previous_item_id=before, item=item.as_json())

    def _started(self, response_id: str) -> list[Json]:
        asked, self.asked = self.asked or _Asked(None, wire.ResponseFields()), None
        wanted = asked.fields
        modality = (wanted.output_modalities or self.config.output_modalities)[0]
        item = _Item(new_id("item"), "assistant", f"output_{modality}", status="in_progress", response_id=response_id)
        self.response = _Response(response_id, item, modality, cancel_asked=asked.cancelled, metadata=wanted.metadata)
        if asked.cancelled:
            self.session.cancel()
        where = self.response.where()
        place = {"response_id": response_id, "output_index": 0, "item": item.as_json()}
        created = server_event("response.created", response=self._response_json("in_progress"))
        added = server_event("response.output_item.added", **place)
        part = server_event("response.content_part.added", **where, part=_part(modality, ""))
        return [created, added, self._keep(item), part]

    def _delta(self, event: live.TextDelta | live.AudioDelta) -> list[Json]:
        response = self.response
        assert response is not None and response.id == event.response_id, "the session's events are out of order"
        if isinstance(event, live.TextDelta):
            response.text += event.text
            kind = (
                "response.output_text.delta"
                if response.modality == "text"
                else "response.output_audio_transcript.delta"
            )
            return [server_event(kind, **response.where(), delta=event.text)] if event.text else []
        if response.item.num_samples == 0:
            self.metrics.first_audio_sec.observe(time.perf_counter() - self.speech_ended)
        response.item.num_samples += len(event.wav_S)
        self.metrics.spoken_sec.inc(len(event.wav_S) / RATE)
        delta = wire.encode_audio(event.wav_S)
        return [server_event("response.output_audio.delta", **response.where(), delta=delta)]

    def _done(self, event: live.ResponseDone) -> list[Json]:
        response = self.response
        assert response is not None and response.id == event.response_id, "the session's events are out of order"
        item, where = response.item, response.where()
        item.text, item.status = response.text, "completed" if event.status == "completed" else "incomplete"
        told = []
        if response.modality == "audio":
            told.append(server_event("response.output_audio.done", **where))
            told.append(server_event("response.output_audio_transcript.done", **where, transcript=response.text))
        else:
            told.append(server_event("response.output_text.done", **where, text=response.text))
        told.append(server_event("response.content_part.done", **where, part=_part(response.modality, response.text)))
        told.append(server_event("conversation.item.done", previous_item_id=self._before(item), item=item.as_json()))
        place = {"response_id": response.id, "output_index": 0, "item": item.as_json()}
        told.append(server_event("response.output_item.done", **place))
        told.append(server_event("response.done", response=self._response_json(event.status)))
        self.metrics.responses.labels(event.status).inc()
        self.response = None
        self._apply(self._options(self.asked.fields if self.asked else None))  # its own settings end with it
        return told

    def _failed(self, event: live.SessionError) -> list[Json]:
        error = ProtocolError(_CODES.get(event.code, event.code), event.message)
        kind = {"buffer_empty": "input_audio", "no_ears": "input_audio", "text_too_long": "input_text"}.get(event.code)
        refused = next((item for item in self.pending if item.kind == kind), None)
        if refused is not None:
            self.pending.remove(refused)
            error.event_id = refused.event_id
        elif event.code in ("nothing_to_answer", "response_active", "turn_failed") and self.asked:
            error.event_id, self.asked = self.asked.event_id, None
        self.metrics.error(error.code)
        return [error.as_event()]

    def _before(self, item: _Item) -> str | None:
        ids = list(self.items)
        place = ids.index(item.id) if item.id in self.items else 0
        return ids[place - 1] if place else None

    # ---------------------------------------------------------------------------------------------------- descriptions

    def _options(self, wanted: wire.ResponseFields | None = None) -> SessionOptions:
        config, vad = self.config, self.config.audio.input.turn_detection
        modalities = (wanted and wanted.output_modalities) or config.output_modalities
        limit = (wanted and wanted.max_output_tokens) or config.max_output_tokens
        changed: Json = {
            "vad": None if vad is None else "server",
            "speak": modalities == ["audio"],
            "max_answer_tokens": self.base.max_answer_tokens if limit == "inf" else limit,
        }
        if vad is not None:
            changed |= {
                "vad_threshold": vad.threshold,
                "silence_sec": vad.silence_duration_ms / 1000,
                "preroll_sec": vad.prefix_padding_ms / 1000,
                "tail_sec": min(self.base.tail_sec, vad.silence_duration_ms / 1000),
                "auto_respond": vad.create_response,
                "barge_in": vad.interrupt_response,
            }
        if self.take_instructions and isinstance(config.instructions, str):
            changed["instructions"] = config.instructions
        return dataclasses.replace(self.base, **changed)

    def _apply(self, options: SessionOptions) -> None:
        if options != self.session.options:
            self.session.update(options)

    def _described(self) -> Json:
        """`session` of session.created and session.updated: what is in effect."""
        effective = self.config.model_dump(include={"type", "output_modalities", "max_output_tokens", "tools"})
        effective["audio"] = self.config.audio.model_dump()
        effective["audio"]["output"]["voice"] = self.model
        effective["audio"]["input"] |= {"noise_reduction": None, "transcription": None}
        instructions = self.config.instructions if self.take_instructions else None
        head = {"id": self.session.id, "object": "realtime.session", "model": self.model}
        return head | effective | {"instructions": instructions or "", "tool_choice": "none"}

    def _response_json(self, status: str) -> Json:
        response = self.response
        assert response is not None
        details: Json | None = None
        if status == "cancelled":
            reason = "client_cancelled" if response.cancel_asked else "turn_detected"
            details = {"type": "cancelled", "reason": reason}
        elif status == "incomplete":
            details = {"type": "incomplete", "reason": "max_output_tokens"}
        elif status == "failed":
            details = {"type": "failed", "error": {"type": "server_error", "code": "turn_failed"}}
        return {
            "id": response.id,
            "object": "realtime.response",
            "status": status,
            "status_details": details,
            "output": [] if status == "in_progress" else [response.item.as_json()],
            "output_modalities": [response.modality],
            "conversation_id": self.id,
            "metadata": response.metadata,
            "usage": None,
        }


_CODES = {  # of the session, by the names that the Realtime API has for them
    "buffer_empty": "input_audio_buffer_commit_empty",
    "response_active": "conversation_already_has_active_response",
}


def _part(modality: str, text: str) -> Json:
    return {"type": modality, "text" if modality == "text" else "transcript": text}


def _merged(before: Any, given: BaseModel) -> Any:
    """`before` with what `given` really holds; turn_detection is replaced as a whole."""
    changed = {}
    for name in given.model_fields_set:
        value = getattr(given, name)
        nested = isinstance(value, wire.Audio | wire.AudioInput | wire.AudioOutput)
        changed[name] = _merged(getattr(before, name), value) if nested else value
    return before.model_copy(update=changed)
