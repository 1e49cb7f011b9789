"""Does a server speak the protocol? `python -m inference.server.conformance ws://127.0.0.1:8000/v1/realtime`.

Needs only `websockets`; any server that claims to speak `inference/PROTOCOL.md` can be asked. Each check opens a
connection of its own and is numbered after the document's section. Exit status 0 if all hold, 1 if not.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import math
import struct
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, WebSocketException

Json = dict[str, Any]
RATE_HZ = 24_000
MANUAL = {"type": "realtime", "audio": {"input": {"turn_detection": None}}}
ORDER = [  # of an answer's events; deltas between the two halves
    "response.created",
    "response.output_item.added",
    "conversation.item.added",
    "response.content_part.added",
    "response.output_audio.done",
    "response.output_audio_transcript.done",
    "response.content_part.done",
    "conversation.item.done",
    "response.output_item.done",
    "response.done",
]
DELTAS = ("response.output_audio.delta", "response.output_audio_transcript.delta")


@dataclass(frozen=True)
class Target:
    """The server to check.

    Attributes:
        timeout_sec: for one event; generous, since a loaded server is slow and not wrong.
    """

    url: str
    api_key: str | None = None
    timeout_sec: float = 30.0


class Client:
    """A connection that sends and awaits events; what is not as it should be is an AssertionError with the reason."""

    def __init__(self, socket: ClientConnection, timeout_sec: float):
        self.socket, self.timeout_sec = socket, timeout_sec

    async def send(self, type_: str, **fields: Any) -> None:
        await self.socket.send(json.dumps({"type": type_} | fields))

    async def next(self) -> Json:
        """The next event, which has a type and an id."""
        async with asyncio.timeout(self.timeout_sec):
            message = await self.socket.recv()
        assert isinstance(message, str), "a binary frame came: events are text"
        event = json.loads(message)
        assert isinstance(event.get("type"), str), f"an event without a type: {message[:200]}"
        assert isinstance(event.get("event_id"), str), f"{event['type']} has no event_id"
        return event

    async def until(self, type_: str) -> Json:
        """Skip to an event of this type; an error on the way fails."""
        while (event := await self.next())["type"] != type_:
            assert event["type"] != "error", f"instead of {type_} came an error: {event['error']}"
        return event

    async def error(self, code: str, event_id: str | None = None) -> Json:
        """The next error, which must be this one and answer the event with `event_id`."""
        while (event := await self.next())["type"] != "error":
            pass
        found = event["error"]
        assert found["code"] == code, f"error {found['code']!r} instead of {code!r}: {found['message']}"
        assert found["message"], "the error says nothing"
        assert found["event_id"] == event_id, f"the error names event {found['event_id']!r}, not {event_id!r}"
        return found

    async def alive(self) -> None:
        """The conversation goes on."""
        await self.send("session.update", session={"type": "realtime"})
        await self.until("session.updated")

    async def answer(self) -> list[Json]:
        """All events from response.created to response.done."""
        events = [await self.until("response.created")]
        while events[-1]["type"] != "response.done":
            events.append(await self.next())
        return events

    async def ask(self, words: str = "what day comes after monday") -> None:
        """A typed question, to be answered."""
        content = [{"type": "input_text", "text": words}]
        await self.send("conversation.item.create", item={"type": "message", "role": "user", "content": content})
        await self.send("response.create")


@asynccontextmanager
async def opened(target: Target, key: str | None = None, **options: Any) -> AsyncIterator[Client]:
    """A client that has not read anything yet."""
    key = target.api_key if key is None else key
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    async with connect(target.url, additional_headers=headers, max_size=None, **options) as socket:
        yield Client(socket, target.timeout_sec)


def tone(seconds: float) -> str:
    """A sound that is no speech, as base64 PCM16."""
    samples = [int(8000 * math.sin(0.3 * n)) for n in range(int(seconds * RATE_HZ))]
    return base64.b64encode(struct.pack(f"<{len(samples)}h", *samples)).decode("ascii")


# -------------------------------------------------------------------------------------------------------------- checks


async def session_described(target: Target) -> None:
    """1 session.created comes first and says what is in effect"""
    async with opened(target) as client:
        event = await client.next()
        assert event["type"] == "session.created", f"the first event is {event['type']}"
        session = event["session"]
        assert session["type"] == "realtime" and session["id"] and session["model"]
        for side in ("input", "output"):
            assert session["audio"][side]["format"] == {"type": "audio/pcm", "rate": RATE_HZ}, side
        assert session["audio"]["input"]["turn_detection"]["type"] == "server_vad"


async def session_updated(target: Target) -> None:
    """2 session.update changes what it names and nothing else"""
    async with opened(target) as client:
        before = (await client.until("session.created"))["session"]
        detection = {"type": "server_vad", "silence_duration_ms": 700}
        wanted = {"type": "realtime", "audio": {"input": {"turn_detection": detection}}}
        await client.send("session.update", session=wanted)
        after = (await client.until("session.updated"))["session"]
        assert after["audio"]["input"]["turn_detection"]["silence_duration_ms"] == 700
        assert after["audio"]["output"] == before["audio"]["output"]
        await client.send("session.update", session=MANUAL)
        assert (await client.until("session.updated"))["session"]["audio"]["input"]["turn_detection"] is None


async def wrong_rate(target: Target) -> None:
    """2 another format or rate is refused with the field's name, and changes nothing"""
    async with opened(target) as client:
        for given in ({"type": "audio/pcm", "rate": 16_000}, {"type": "audio/pcmu"}):
            session = {"type": "realtime", "audio": {"input": {"format": given}}}
            await client.send("session.update", session=session, event_id="mine")
            error = await client.error("invalid_value", "mine")
            assert (error["param"] or "").startswith("session.audio.input.format"), f"param is {error['param']!r}"
        await client.alive()


async def typed_answer(target: Target) -> None:
    """5 a typed question is answered by events in their order, with ids on every delta"""
    async with opened(target) as client:
        await client.until("session.created")
        await client.ask()
        added = await client.until("conversation.item.added")
        assert added["item"]["role"] == "user"
        events = await client.answer()
        kinds = [event["type"] for event in events if event["type"] not in DELTAS]
        assert kinds == ORDER, f"the order is {kinds}"
        assert len({event["event_id"] for event in events}) == len(events), "an event_id came twice"
        item_id, response_id = events[1]["item"]["id"], events[0]["response"]["id"]
        for event in events:
            if event["type"] in DELTAS or event["type"] == "response.output_audio.done":
                assert event["response_id"] == response_id and event["item_id"] == item_id, event["type"]
        check_whole(events)


def check_whole(events: list[Json]) -> None:
    """Deltas add up to the whole."""
    text = "".join(event["delta"] for event in events if event["type"] == DELTAS[1])
    told = next(event["transcript"] for event in events if event["type"] == "response.output_audio_transcript.done")
    assert told == text, f"the transcript is {told!r}, its deltas are {text!r}"
    for event in events:
        if event["type"] == DELTAS[0]:
            assert len(base64.b64decode(event["delta"], validate=True)) % 2 == 0, "half a sample"
    done = events[-1]["response"]
    assert done["status"] in ("completed", "incomplete"), f"the answer ended as {done['status']}"
    assert done["output"][0]["content"][0]["transcript"] == text


async def spoken_turn(target: Target) -> None:
    """3 without turn detection the client says when a turn ends, and nothing is answered by itself"""
    async with opened(target) as client:
        await client.send("session.update", session=MANUAL)
        await client.until("session.updated")
        for _ in range(5):
            await client.send("input_audio_buffer.append", audio=tone(0.1))
        await client.send("input_audio_buffer.commit")
        committed = await client.until("input_audio_buffer.committed")
        added = await client.until("conversation.item.added")
        assert added["item"]["id"] == committed["item_id"]
        assert added["item"]["content"][0]["type"] == "input_audio"
        await client.until("conversation.item.done")
        await client.send("response.create")
        check_whole(await client.answer())


async def cleared(target: Target) -> None:
    """3 clear empties the buffer; an empty one cannot be committed"""
    async with opened(target) as client:
        await client.send("session.update", session=MANUAL)
        await client.send("input_audio_buffer.append", audio=tone(0.5))
        await client.send("input_audio_buffer.clear")
        await client.until("input_audio_buffer.cleared")
        await client.send("input_audio_buffer.commit", event_id="mine")
        await client.error("input_audio_buffer_commit_empty", "mine")
        await client.alive()


async def spoken_item(target: Target) -> None:
    """4 a message may bring its sound with it; items can be retrieved by the id that the client chose"""
    async with opened(target) as client:
        await client.send("session.update", session=MANUAL)
        content = [{"type": "input_audio", "audio": tone(0.5)}]
        item = {"type": "message", "role": "user", "content": content, "id": "my_item"}
        await client.send("conversation.item.create", item=item)
        assert (await client.until("conversation.item.done"))["item"]["id"] == "my_item"
        await client.send("conversation.item.retrieve", item_id="my_item")
        assert (await client.until("conversation.item.retrieved"))["item"]["role"] == "user"
        await client.send("conversation.item.create", item=item, event_id="again")
        await client.error("invalid_value", "again")
        await client.send("conversation.item.retrieve", item_id="never", event_id="mine")
        await client.error("item_not_found", "mine")


async def cancelled(target: Target) -> None:
    """5 response.cancel ends an answer as cancelled, and nothing of it follows; the next one works"""
    async with opened(target) as client:
        await client.ask()
        created = await client.until("response.created")
        await client.send("response.cancel", response_id=created["response"]["id"])
        done = (await client.until("response.done"))["response"]
        if done["status"] == "cancelled":  # a short answer may be complete before the cancel arrives
            assert done["status_details"]["reason"] == "client_cancelled"
            await client.ask("what is one plus one")
            second = await client.answer()
            old = created["response"]["id"]
            assert all(event.get("response_id") != old for event in second), "a stale delta"


async def truncated(target: Target) -> None:
    """5 an answer can be cut to what was heard; not beyond its end, nor can what is no answer"""
    async with opened(target) as client:
        await client.ask()
        question = (await client.until("conversation.item.done"))["item"]["id"]
        events = await client.answer()
        item = events[1]["item"]["id"]
        sent = sum(len(base64.b64decode(event["delta"])) // 2 for event in events if event["type"] == DELTAS[0])
        sent_ms = sent * 1000 // RATE_HZ
        cut = {"item_id": item, "content_index": 0, "audio_end_ms": sent_ms // 2}
        await client.send("conversation.item.truncate", **cut)
        event = await client.until("conversation.item.truncated")
        assert {name: event[name] for name in cut} == cut
        await client.send("conversation.item.truncate", **(cut | {"audio_end_ms": sent_ms + 1000}), event_id="far")
        await client.error("invalid_value", "far")
        await client.send("conversation.item.truncate", **(cut | {"item_id": question}), event_id="who")
        await client.error("invalid_value", "who")


async def out_of_order(target: Target) -> None:
    """6 what comes at the wrong time is refused with its reason"""
    async with opened(target) as client:
        await client.send("response.cancel", event_id="early")
        await client.error("response_cancel_not_active", "early")
        await client.send("response.create", event_id="nothing")
        await client.error("nothing_to_answer", "nothing")
        await client.ask()
        await client.until("response.created")
        await client.send("response.create", event_id="twice")
        while (event := await client.next())["type"] not in ("error", "response.done"):
            pass
        if event["type"] == "error":  # or the answer was quicker
            assert event["error"]["code"] == "conversation_already_has_active_response"
            assert event["error"]["event_id"] == "twice"


async def nonsense(target: Target) -> None:
    """6 nonsense is answered by an error that says why, and the conversation goes on"""
    cases: list[tuple[str | bytes, str, str | None]] = [
        ("{", "invalid_json", None),
        ("[" * 5_000, "invalid_json", None),
        ("[1, 2]", "invalid_event", None),
        ('{"event_id": "e1"}', "invalid_event", "e1"),
        ('{"type": 7, "event_id": "e2"}', "invalid_event", "e2"),
        ('{"type": "response.craete", "event_id": "e3"}', "unknown_event", "e3"),
        ('{"type": "input_audio_buffer.append", "event_id": "e4"}', "missing_field", "e4"),
        ('{"type": "input_audio_buffer.append", "audio": "not base64!", "event_id": "e5"}', "invalid_audio", "e5"),
        ('{"type": "input_audio_buffer.append", "audio": "AAAA", "event_id": "e6"}', "invalid_audio", "e6"),
        (
            '{"type": "session.update", "session": {"type": "realtime", "voise": 1}, "event_id": "e7"}',
            "unknown_field",
            "e7",
        ),
        (b"\x00\x01\x02", "binary_frame", None),
    ]
    async with opened(target) as client:
        await client.until("session.created")
        for message, code, event_id in cases:
            await client.socket.send(message)
            await client.error(code, event_id)
        await client.alive()


async def wrong_key(target: Target) -> None:
    """7 a wrong key is told as an error event before the connection is closed"""
    if target.api_key is None:
        raise Skipped("the server wants no key (give --api-key)")
    async with opened(target, key="wrong") as client:
        await client.error("invalid_api_key")
        await closed(client, 3000)


async def browser_key(target: Target) -> None:
    """7 the key may come as a subprotocol, as browsers send it"""
    offered = ["realtime", f"openai-insecure-api-key.{target.api_key or 'any'}"]
    async with connect(target.url, subprotocols=offered, max_size=None) as socket:  # type: ignore[arg-type]
        assert socket.subprotocol == "realtime", f"the subprotocol is {socket.subprotocol!r}"
        await Client(socket, target.timeout_sec).until("session.created")


async def foreign_origin(target: Target) -> None:
    """7 a page of a foreign origin is told so and shut out"""
    async with opened(target, origin="https://foreign.example") as client:
        await client.error("origin_not_allowed")
        await closed(client, 3003)


async def closed(client: Client, code: int) -> None:
    """The server closes the connection with this code."""
    try:
        await client.next()
    except ConnectionClosed as end:
        assert end.rcvd is not None and end.rcvd.code == code, f"closed with {end.rcvd}, not {code}"
    else:
        raise AssertionError("the connection was not closed")


# -------------------------------------------------------------------------------------------------------------- report


class Skipped(Exception):
    """The check does not apply to this server."""


CHECKS: list[Callable[[Target], Awaitable[None]]] = [
    session_described,
    session_updated,
    wrong_rate,
    spoken_turn,
    cleared,
    spoken_item,
    typed_answer,
    cancelled,
    truncated,
    out_of_order,
    nonsense,
    wrong_key,
    browser_key,
    foreign_origin,
]


async def conformance(target: Target) -> dict[str, str]:
    """Run all checks. Returns what each found, by the check's description: "ok", "skipped: ..." or what is wrong."""
    found = {}
    for check in CHECKS:
        name = (check.__doc__ or check.__name__).strip()
        try:
            await check(target)
            found[name] = "ok"
        except Skipped as reason:
            found[name] = f"skipped: {reason}"
        except TimeoutError:
            found[name] = f"no event within {target.timeout_sec:g} s"
        except (AssertionError, KeyError, ValueError, OSError, WebSocketException) as error:
            found[name] = f"{type(error).__name__}: {error}"
    return found


def main(args: Sequence[str] | None = None) -> int:
    """Command line. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m inference.server.conformance", description=__doc__)
    parser.add_argument("url", help="such as ws://127.0.0.1:8000/v1/realtime")
    parser.add_argument("--api-key")
    parser.add_argument("--timeout-sec", type=float, default=30.0, help="for one event (default: 30)")
    options = parser.parse_args(args)
    found = asyncio.run(conformance(Target(options.url, options.api_key, options.timeout_sec)))
    for name, result in found.items():
        print(f"{'ok  ' if result == 'ok' else 'skip' if result.startswith('skipped') else 'FAIL'}  {name}", end="")
        print("" if result == "ok" else f"\n      {result}")
    return int(any(result != "ok" and not result.startswith("skipped") for result in found.values()))


if __name__ == "__main__":
    sys.exit(main())
