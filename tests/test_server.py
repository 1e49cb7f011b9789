"""The server as its clients meet it: the official client, the conformance checks, and clients that misbehave.

Shapes: S samples.
"""

from __future__ import annotations

import asyncio
import base64
import json
import random
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from openai import AsyncOpenAI
from openai.types.realtime import RealtimeServerEvent
from pydantic import TypeAdapter
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect as connect_here

from flowomni import FlowOmni
from flowomni.audio import read_audio
from inference.demo import DATA
from inference.engine import Engine
from inference.server.app import Server, ServerOptions, running
from inference.server.conformance import MANUAL, Target, closed, conformance, opened
from inference.server.fuzz import fuzz
from inference.server.http import PromptH11Protocol
from inference.server.protocol import encode_audio
from scripts import load_test
from tests.serving import SPOKEN, serving, talkative_model

RATE = 24_000
QUESTION = sorted((DATA / "questions" / "test").glob("*"))[0]
OFFICIAL: TypeAdapter[Any] = TypeAdapter(RealtimeServerEvent)
Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def omni() -> FlowOmni:
    return talkative_model()


@pytest.fixture(scope="module")
def engine(omni: FlowOmni) -> Iterator[Engine]:
    with Engine(omni, max_sessions=8) as engine:
        yield engine


def options(**changed: Any) -> ServerOptions:
    return ServerOptions(**({"session": SPOKEN} | changed))


def target(port: int, key: str | None = None) -> Target:
    return Target(f"ws://127.0.0.1:{port}/v1/realtime", key, timeout_sec=60)


def until_empty(server: Server, engine: Engine) -> None:
    """All sessions of clients that have left are closed."""
    deadline = time.monotonic() + 30
    while server.connections or engine.stats().num_sessions:
        assert time.monotonic() < deadline, f"leaked: {len(server.connections)}, {engine.stats()}"
        time.sleep(0.02)


# ------------------------------------------------------------------------------------------------------- the protocol


def test_conformance(engine: Engine) -> None:
    """Every check that a third party can run."""
    server = Server(engine, options(api_key="the-key"))
    with serving(server) as port:
        found = asyncio.run(conformance(target(port, "the-key")))
        assert len(found) > 10 and set(found.values()) == {"ok"}, found
        until_empty(server, engine)


def test_the_official_client_holds_a_conversation(engine: Engine) -> None:
    """Unmodified, with typed and spoken turns; each event is one that its own types allow."""

    async def converse(port: int) -> None:
        client = AsyncOpenAI(api_key="the-key", websocket_base_url=f"ws://127.0.0.1:{port}/v1")
        async with client.realtime.connect(model="flowomni") as connection:

            async def until(kind: str) -> list[Any]:
                events: list[Any] = []
                while not events or events[-1].type != kind:
                    async with asyncio.timeout(60):
                        raw = await connection.recv_bytes()
                    OFFICIAL.validate_json(raw)
                    events.append(connection.parse_event(raw))
                    assert events[-1].type != "error" or kind == "error", events[-1]
                return events

            await until("session.created")
            await connection.session.update(
                session={
                    "type": "realtime",
                    "instructions": "be brief",
                    "output_modalities": ["audio"],
                    "audio": {
                        "input": {"format": {"type": "audio/pcm", "rate": 24000}, "turn_detection": None},
                        "output": {"format": {"type": "audio/pcm", "rate": 24000}, "voice": "alloy"},
                    },
                }
            )
            assert (await until("session.updated"))[-1].session.audio.input.turn_detection is None
            await connection.conversation.item.create(
                item={"type": "message", "role": "user", "content": [{"type": "input_text", "text": "what is one"}]}
            )
            await connection.response.create()
            events = await until("response.done")
            spoken = [event for event in events if event.type == "response.output_audio.delta"]
            assert sum(len(base64.b64decode(event.delta)) for event in spoken) > RATE // 2
            assert events[-1].response.output[0].content[0].transcript

            await connection.input_audio_buffer.append(audio=encode_audio(np.zeros(RATE // 2, np.float32)))
            await connection.input_audio_buffer.commit()
            await until("input_audio_buffer.committed")
            await connection.response.create(response={"output_modalities": ["text"]})
            events = await until("response.done")
            assert [event for event in events if event.type == "response.output_text.delta"]
            assert not [event for event in events if event.type == "response.output_audio.delta"]

            await connection.conversation.item.create(
                item={"type": "message", "role": "user", "content": [{"type": "input_text", "text": "say hello"}]}
            )
            await connection.response.create()
            first = (await until("response.output_audio.delta"))[-1]
            await connection.response.cancel()
            events = await until("response.done")
            assert events[-1].response.status in ("cancelled", "incomplete", "completed")
            await connection.conversation.item.truncate(item_id=first.item_id, content_index=0, audio_end_ms=20)
            await until("conversation.item.truncated")
            await connection.input_audio_buffer.clear()
            await until("input_audio_buffer.cleared")
            await connection.response.cancel()
            assert (await until("error"))[-1].error.code == "response_cancel_not_active"

    server = Server(engine, options(api_key="the-key"))
    with serving(server) as port:
        asyncio.run(converse(port))
        until_empty(server, engine)


def test_the_server_finds_the_turns_and_the_user_may_interrupt(engine: Engine) -> None:
    """Real speech with silence behind it is answered by itself; more speech ends that answer; nothing stale follows."""
    question_S = read_audio(QUESTION, RATE).wav_S
    pieces = [question_S, np.zeros(RATE, np.float32), question_S, np.zeros(RATE, np.float32)]

    async def converse(port: int) -> list[dict[str, Any]]:
        events = []
        async with opened(target(port)) as client:
            await client.until("session.created")
            for piece in pieces:
                for start in range(0, len(piece), RATE // 10):
                    await client.send(
                        "input_audio_buffer.append", audio=encode_audio(piece[start : start + RATE // 10])
                    )
            while sum(event["type"] == "response.done" for event in events) < 2:
                events.append(await client.next())
        return events

    with serving(Server(engine, options())) as port:
        events = asyncio.run(converse(port))
    kinds = [event["type"] for event in events]
    assert "error" not in kinds
    for kind in ("speech_started", "speech_stopped", "committed"):
        assert kinds.count(f"input_audio_buffer.{kind}") == 2
    started, stopped = (
        [event for event in events if event["type"] == f"input_audio_buffer.speech_{what}"]
        for what in ("started", "stopped")
    )
    committed = [event for event in events if event["type"] == "input_audio_buffer.committed"]
    for begin, end, item in zip(started, stopped, committed, strict=True):
        assert begin["item_id"] == end["item_id"] == item["item_id"]
        assert begin["audio_start_ms"] < end["audio_end_ms"]
    responses: list[str] = []
    for event in events:
        if event["type"] == "response.created":
            responses.append(event["response"]["id"])
        assert event.get("response_id", responses[-1] if responses else None) == (responses[-1] if responses else None)


def test_instructions_reach_the_model_only_where_the_server_allows(engine: Engine) -> None:
    async def told(port: int) -> str:
        async with opened(target(port)) as client:
            await client.send("session.update", session={"type": "realtime", "instructions": "speak"})
            return (await client.until("session.updated"))["session"]["instructions"]

    for take, wanted in ((True, "speak"), (False, "")):
        with serving(Server(engine, options(take_instructions=take))) as port:
            assert asyncio.run(told(port)) == wanted


# ------------------------------------------------------------------------------------------------ who may, how much


def test_one_too_many_is_refused_and_gets_the_place_later(omni: FlowOmni) -> None:
    async def crowd(port: int) -> None:
        async with opened(target(port)) as first:
            await first.until("session.created")
            async with opened(target(port)) as second:
                await second.error("server_full")
                await closed(second, 1013)
            await first.alive()

    with Engine(omni, max_sessions=1) as engine:
        server = Server(engine, options())
        with serving(server) as port:
            asyncio.run(crowd(port))
            until_empty(server, engine)
            asyncio.run(crowd(port))
            assert b'flowomni_refused_total{reason="server_full"} 2.0' in server.metrics.page()


@pytest.mark.parametrize(
    ("origin", "host", "key", "allowed"),
    [
        ("http://127.0.0.1:8000", "127.0.0.1:8000", None, True),
        ("http://localhost:8000", "localhost:8000", None, True),
        ("http://[::1]:8000", "[::1]:8000", None, True),
        ("http://127.0.0.1:9000", "127.0.0.1:8000", None, False),
        ("http://rebound.example:8000", "rebound.example:8000", None, False),
        ("https://talk.example", "talk.example", "the-key", True),
        ("https://friend.example", "talk.example", None, True),
        ("https://foreign.example", "talk.example", "the-key", False),
        ("null", "127.0.0.1:8000", None, False),
    ],
)
def test_origins(engine: Engine, origin: str, host: str, key: str | None, allowed: bool) -> None:
    server = Server(engine, options(api_key=key, allowed_origins=("https://friend.example",)))
    assert server._may_connect(origin, host) is allowed


def test_large_messages(engine: Engine) -> None:
    """Told and not taken; far larger ones are not even read."""

    async def send(port: int) -> None:
        async with opened(target(port)) as client:
            await client.socket.send('{"type": "' + "x" * 3_000 + '"}')
            await client.error("message_too_large")
            await client.alive()
            await client.socket.send("x" * 30_000)
            with pytest.raises(ConnectionClosed) as end:
                await client.until("never")
            assert end.value.rcvd is not None and end.value.rcvd.code == 1009

    server = Server(engine, options(max_message_bytes=2_000))
    with serving(server, ws_max_size=8_000) as port:
        asyncio.run(send(port))
        until_empty(server, engine)


def test_hasty_clients_are_slowed_and_told_once(engine: Engine) -> None:
    """Ten seconds' worth at once; then so many per second, and none is lost."""

    async def hurry(port: int) -> tuple[list[str], float]:
        async with opened(target(port)) as client:
            await client.until("session.created")
            for number in range(260):
                await client.send("conversation.item.retrieve", item_id="none", event_id=str(number))
            began, codes = time.monotonic(), []
            while "259" not in codes:
                error = (await client.next())["error"]
                codes.append(error["event_id"] or error["code"])
            return codes, time.monotonic() - began

    with serving(Server(engine, options(rate_limit=20.0))) as port:
        codes, seconds = asyncio.run(hurry(port))
    assert codes.count("rate_limit_exceeded") == 1
    assert [code for code in codes if code != "rate_limit_exceeded"] == [str(number) for number in range(260)]
    assert seconds > 1.5  # 60 too many, at 20 per second


# -------------------------------------------------------------------------------------------- clients that misbehave


def test_fuzzed_messages_disturb_nobody(engine: Engine) -> None:
    """Thousands of them over several connections, with a well-behaved client beside; 100,000 by the command."""
    server = Server(engine, options(rate_limit=0.0))
    with serving(server) as port:
        codes = asyncio.run(fuzz(target(port), 2_000))
        until_empty(server, engine)
    assert {"invalid_json", "invalid_value", "missing_field", "unknown_event", "binary_frame"} <= set(codes)
    assert "internal_error" not in codes and "engine_failed" not in codes and "turn_failed" not in codes


def test_disconnects_at_any_moment_leave_nothing(engine: Engine) -> None:
    """Without a goodbye, during the handshake, a turn or an answer."""
    rng = random.Random(0)

    async def leave(port: int, delay_sec: float) -> None:
        try:
            async with connect(target(port).url, max_size=None) as client:
                for event in (
                    {"type": "session.update", "session": MANUAL},
                    {"type": "input_audio_buffer.append", "audio": encode_audio(np.zeros(RATE, np.float32))},
                    {"type": "input_audio_buffer.commit"},
                    {"type": "response.create"},
                ):
                    await client.send(json.dumps(event))
                await asyncio.sleep(delay_sec)
                client.transport.abort()
        except (ConnectionClosed, OSError):
            pass

    async def crowd(port: int) -> None:
        for _ in range(5):
            await asyncio.gather(*(leave(port, rng.uniform(0, 0.3)) for _ in range(8)))

    server = Server(engine, options())
    with serving(server) as port:
        half_open = socket.create_connection(("127.0.0.1", port))
        half_open.sendall(b"GET /v1/realtime HTTP/1.1\r\nUpgrade: websocket\r\n")  # and never the rest
        asyncio.run(crowd(port))
        until_empty(server, engine)
        half_open.close()
        found = asyncio.run(conformance(target(port)))
        assert not [result for result in found.values() if result != "ok" and not result.startswith("skipped")], found


def test_a_client_that_does_not_read_is_gone(engine: Engine) -> None:
    """It is not read from either, so that its unread answers stay bounded, and its session is freed."""

    async def ignore(port: int, server: Server) -> None:
        async with connect(target(port).url, max_queue=1) as client:
            client.transport.pause_reading()
            message = json.dumps({"type": "conversation.item.retrieve", "item_id": "x" * 80, "event_id": "y" * 500})

            async def flood() -> None:
                while True:  # until nothing fits into the buffers between here and there
                    await client.send(message)

            flooding = asyncio.create_task(flood())
            deadline = time.monotonic() + 60
            while server.connections:
                assert all(len(connection.unsent) < 200 for connection in server.connections)
                assert time.monotonic() < deadline, "it is still there"
                await asyncio.sleep(0.01)
            client.transport.abort()
            flooding.cancel()
            await asyncio.gather(flooding, return_exceptions=True)

    server = Server(engine, options(rate_limit=0.0, send_timeout_sec=0.3))
    with serving(server) as port:
        asyncio.run(ignore(port, server))
        until_empty(server, engine)


def test_a_client_whose_cable_was_pulled_is_gone(engine: Engine) -> None:
    """It says nothing any more and does not answer pings, but its socket stays open: its session is freed."""
    request = (
        "GET /v1/realtime HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
        "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
    )
    server = Server(engine, options())
    with serving(server, ws_ping_interval=0.2, ws_ping_timeout=0.2) as port:
        dead = socket.create_connection(("127.0.0.1", port))
        dead.sendall(request.encode())
        deadline = time.monotonic() + 30
        while b"session.created" not in dead.recv(4096):
            assert time.monotonic() < deadline
        until_empty(server, engine)
        dead.close()


def test_who_connects_and_asks_nothing_is_sent_away(engine: Engine) -> None:
    """Silent, or in the middle of a request's head; who asked in time stays, over HTTP and as a websocket."""

    class Hasty(PromptH11Protocol):
        header_sec = 0.3

    server = Server(engine, options())
    with serving(server, http=Hasty) as port, httpx.Client(base_url=f"http://127.0.0.1:{port}") as asking:
        silent, slow = (socket.create_connection(("127.0.0.1", port), timeout=10) for _ in range(2))
        with connect_here(f"ws://127.0.0.1:{port}/v1/realtime") as talking:
            slow.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n")
            connection = asking.get("/healthz").extensions["network_stream"]
            assert silent.recv(1) == b"" and slow.recv(1) == b""
            assert "session.created" in str(talking.recv())
            assert talking.ping().wait(10)
        assert asking.get("/healthz").extensions["network_stream"] is connection
        silent.close()
        slow.close()


# --------------------------------------------------------------------------------------------------- besides the socket


def test_pages_and_numbers(engine: Engine) -> None:
    """The page with its parts from here alone, health, and metrics behind the key."""
    server = Server(engine, options(api_key="the-key", model="tiny"))
    with serving(server) as port, httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as web:
        page = web.get("/")
        assert page.headers["content-security-policy"].startswith("default-src 'none'")
        for name in ("app.js", "audio.js", "capture-worklet.js", "playback-worklet.js", "style.css"):
            assert web.get(f"/static/{name}").status_code == 200
        assert web.get("/healthz").json() == {"status": "ok", "model": "tiny", "sessions": 0}
        assert web.get("/metrics").status_code == 401
        asyncio.run(conformance(target(port, "the-key")))
        for _ in range(100):  # the last connection may still be on its way out
            numbers = web.get("/metrics", headers={"authorization": "Bearer the-key"}).text
            if "flowomni_sessions 0.0" in numbers:
                break
            time.sleep(0.1)
    for name in ("flowomni_first_audio_seconds_bucket", "flowomni_steps_total", "flowomni_sessions 0.0"):
        assert name in numbers
    assert 'flowomni_errors_total{code="invalid_json"}' in numbers and 'reason="invalid_api_key"' in numbers


def test_draining_lets_answers_end(engine: Engine) -> None:
    """The answer in progress arrives whole, then both it and idle ones are told; new ones are refused."""
    server = Server(engine, options())

    async def drain() -> None:
        async with running(server) as port, opened(target(port)) as idle, opened(target(port)) as busy:
            await busy.ask()
            await busy.until("response.created")
            draining = asyncio.create_task(server.drain(60))
            await idle.error("server_draining")
            await closed(idle, 1001)
            assert (await busy.until("response.done"))["response"]["status"] in ("completed", "incomplete")
            await busy.error("server_draining")
            await closed(busy, 1001)
            await draining
            async with opened(target(port)) as late:
                await late.error("server_draining")

    asyncio.run(drain())


# ------------------------------------------------------------------------------------------------------ the load test


def test_load(engine: Engine, tmp_path: Path) -> None:
    """Two sessions speak and are answered; the numbers add up."""
    with serving(Server(engine, options())) as port:
        args = [str(QUESTION), "--url", target(port).url, "--sessions", "2", "--turns", "1", "--pause-sec", "0"]
        assert load_test.main([*args, "--ramp-sec", "0.5", "--json", str(tmp_path / "load.json")]) == 0
    found = json.loads((tmp_path / "load.json").read_text())
    assert found["turns"] == found["answered"] == 2
    silence_ms = found["end_to_audio_ms"]["p50"] - found["stop_to_audio_ms"]["p50"]
    assert silence_ms > 200 and found["chunks"] == found["gap_ms"]["count"] + 2


def test_a_late_chunk_is_one_that_left_the_player_dry() -> None:
    chunk = RATE // 10
    turn = load_test.Turn(arrivals=[(10.0, chunk), (10.05, chunk), (10.19, chunk), (10.35, chunk), (10.36, chunk)])
    assert turn.num_late() == 1 and turn.num_late(0.06) == 0 and turn.answer_sec == pytest.approx(0.5)
    assert turn.gaps_sec == pytest.approx([0.05, 0.14, 0.16, 0.01])


def test_load_needs_a_server(capsys: Capture) -> None:
    """A server that is not there is counted as unanswered turns, with the reason."""
    args = [str(QUESTION), "--url", "ws://127.0.0.1:9/v1/realtime", "--sessions", "1", "--turns", "1"]
    assert load_test.main(args) == 1
    assert "ConnectionRefusedError" in capsys.readouterr().out


def test_sigterm_ends_the_server_that_was_started(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    server = tmp_path / "server"
    server.write_text("#!/bin/sh\necho talk at http://here\nexec sleep 60\n")
    server.chmod(0o755)
    monkeypatch.setattr(load_test.sys, "executable", str(server))
    before, began = signal.getsignal(signal.SIGTERM), time.monotonic()
    with pytest.raises(KeyboardInterrupt), load_test.own_server(None, 1) as url:
        assert url == "ws://here/v1/realtime"
        signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) == before and time.monotonic() - began < 30
