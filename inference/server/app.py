"""The web application: the websocket `/v1/realtime`, the page, `/healthz` and `/metrics`.

One task reads a client's messages and one writes to it, so that neither waits for the other. The engine works on a
thread of its own; a session wakes its writer, which takes one event at a time: what a slow client has not taken yet
waits in its own session, which pauses, and holds up no other.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import logging
import time
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import HTTPConnection, Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Mount, Route, WebSocketRoute
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from starlette.websockets import WebSocket, WebSocketDisconnect

from inference.engine import Engine, EngineFull
from inference.session import SessionOptions

from .conversation import Conversation
from .metrics import Metrics
from .protocol import Json, ProtocolError

PAGE = Path(__file__).parent / "page"
KEY_PROTOCOL = "openai-insecure-api-key."  # browsers cannot set headers: the key comes as a websocket subprotocol
MAX_UNSENT = 64  # answers to a client's events that it has not taken: more are not read from it
UNAUTHORIZED, FORBIDDEN, GOING_AWAY, POLICY, TRY_LATER, FAILED = 3000, 3003, 1001, 1008, 1013, 1011
CONTENT_POLICY = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'"
HEADERS = {
    "content-security-policy": CONTENT_POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
}
log = logging.getLogger("inference.serve")


@dataclass(frozen=True)
class ServerOptions:
    """How the server treats its clients.

    Attributes:
        model: name told to the clients.
        api_key: what clients must show; None lets all in.
        allowed_origins: origins of other sites' pages that may connect, "*" for all. The server's own page always may.
        max_message_bytes: of one event.
        rate_limit: events per second that are read from one client, 0 for any number; ten seconds' worth may come at
            once.
        send_timeout_sec: a client that takes nothing for so long is gone.
        take_instructions: hand the client's `instructions` to the model.
        session: defaults of every session.
    """

    model: str = "flowomni"
    api_key: str | None = None
    allowed_origins: tuple[str, ...] = ()
    max_message_bytes: int = 1 << 20
    rate_limit: float = 200.0
    send_timeout_sec: float = 20.0
    take_instructions: bool = False
    session: SessionOptions = SessionOptions()


class Server:
    """The application (`app`), and draining it.

    Args:
        engine: open; the caller closes it.
    """

    def __init__(self, engine: Engine, options: ServerOptions):
        self.engine, self.options = engine, options
        self.metrics = Metrics(engine.stats)
        self.connections: set[_Connection] = set()
        self.draining = False
        routes = [
            Route("/", lambda _: FileResponse(PAGE / "index.html")),
            Route("/healthz", self._health),
            Route("/metrics", self._metrics),
            WebSocketRoute("/v1/realtime", self._realtime),
            Mount("/static", StaticFiles(directory=PAGE)),
        ]
        self.app = Starlette(routes=routes, middleware=[Middleware(_SafeHeaders)])

    async def drain(self, limit_sec: float) -> None:
        """Refuse new conversations, let answers in progress end, close all."""
        self.draining = True
        for connection in self.connections:
            connection.wake.set()
        deadline = time.monotonic() + limit_sec
        while self.connections and time.monotonic() < deadline:
            await asyncio.sleep(0.05)
        left = [connection.stop() for connection in self.connections]
        if left:
            log.warning("%d conversations were cut off", len(left))
            await asyncio.wait(left, timeout=5)

    async def _health(self, _: Request) -> Response:
        stats = self.engine.stats()
        state = {"status": "draining" if self.draining else "ok", "model": self.options.model}
        return JSONResponse(state | {"sessions": stats.num_sessions}, 503 if self.draining else 200)

    async def _metrics(self, request: Request) -> Response:
        if not self._knows_key(request):
            return JSONResponse({"error": "wrong API key"}, 401, {"www-authenticate": "Bearer"})
        return Response(self.metrics.page(), media_type="text/plain; version=0.0.4")

    async def _realtime(self, socket: WebSocket) -> None:
        offered = socket.scope.get("subprotocols", [])
        await socket.accept(subprotocol="realtime" if "realtime" in offered else None)
        refusal = self._refusal(socket)
        connection = None
        if refusal is None:
            try:
                connection = _Connection(self, socket)
            except EngineFull as error:
                refusal = TRY_LATER, ProtocolError("server_full", str(error))
        if refusal is not None:
            code, why = refusal
            self.metrics.refused.labels(why.code).inc()
            with contextlib.suppress(WebSocketDisconnect):
                await socket.send_text(json.dumps(why.as_event()))
                await socket.close(code, why.code)
            return
        assert connection is not None
        self.connections.add(connection)
        try:
            await connection.run()
        finally:
            self.connections.discard(connection)

    def _refusal(self, socket: WebSocket) -> tuple[int, ProtocolError] | None:
        if self.draining:
            return GOING_AWAY, ProtocolError("server_draining", "the server is going down: try again later")
        origin = socket.headers.get("origin")
        if origin is not None and not self._may_connect(origin, socket.headers.get("host", "")):
            message = (
                f"pages of {origin[:200]} may not connect here: start the server with --allowed-origin {origin[:200]}"
            )
            return FORBIDDEN, ProtocolError("origin_not_allowed", message)
        if not self._knows_key(socket):
            message = "wrong or no API key: send it as Authorization: Bearer, or as a subprotocol"
            return UNAUTHORIZED, ProtocolError("invalid_api_key", message)
        return None

    def _may_connect(self, origin: str, host: str) -> bool:
        if origin in self.options.allowed_origins or "*" in self.options.allowed_origins:
            return True
        # Without a key a foreign page could have its own name resolve to this machine (DNS rebinding) and would then
        # pass for the page served here: only names that cannot be bent count as the same.
        return urlsplit(origin).netloc == host and (self.options.api_key is not None or _is_fixed(host))

    def _knows_key(self, request: HTTPConnection) -> bool:
        if self.options.api_key is None:
            return True
        given = [request.headers.get("authorization", "").removeprefix("Bearer ")]
        given += [name.removeprefix(KEY_PROTOCOL) for name in request.scope.get("subprotocols", [])]
        wanted = self.options.api_key.encode()
        return any(hmac.compare_digest(key.encode(errors="replace"), wanted) for key in given)


def _is_fixed(host: str) -> bool:
    """Whether a Host header names this machine by address or as localhost."""
    name = urlsplit(f"//{host}").hostname or ""
    if name == "localhost":
        return True
    try:
        ip_address(name)
    except ValueError:
        return False
    return True


class _Connection:
    """One client.

    Raises:
        EngineFull: there is no place for it.
    """

    def __init__(self, server: Server, socket: WebSocket):
        loop = asyncio.get_running_loop()
        self.server, self.socket, self.options = server, socket, server.options
        self.wake, self.room = asyncio.Event(), asyncio.Event()
        self.room.set()
        self.session = server.engine.open(self.options.session, lambda: _wake(loop, self.wake))
        self.conversation = Conversation(
            self.session, self.options.model, server.metrics, self.options.take_instructions
        )
        self.unsent: deque[Json] = deque(self.conversation.opening())
        self.bucket = _Bucket(self.options.rate_limit)
        self.task: asyncio.Task[Any] | None = None

    async def run(self) -> None:
        """Until the client leaves or the session ends; the session is closed in any case."""
        self.task = asyncio.current_task()
        sides = [asyncio.create_task(self._read()), asyncio.create_task(self._write())]
        try:
            done, _ = await asyncio.wait(sides, return_when=asyncio.FIRST_COMPLETED)
            for side in done:
                side.result()  # raises what ended it
        except (WebSocketDisconnect, TimeoutError, RuntimeError) as error:  # RuntimeError: written to a closed socket
            log.debug("a client is gone: %r", error)
        except Exception:
            log.exception("a conversation failed")
            self.server.metrics.error("internal_error")
            await self._close(ProtocolError("internal_error", "the server failed; its log says why"), FAILED)
        finally:
            for side in sides:
                side.cancel()
            self.session.close()
            await asyncio.gather(*sides, return_exceptions=True)

    def stop(self) -> asyncio.Task[Any]:
        """End it from outside."""
        assert self.task is not None
        self.task.cancel()
        return self.task

    async def _read(self) -> None:
        while True:
            message = await self.socket.receive()
            if message["type"] == "websocket.disconnect":
                return
            text = message.get("text")
            self._answer(self._admitted(message.get("bytes") or b"" if text is None else text))
            if delay_sec := self.bucket.take():
                if self.bucket.tell():
                    self._answer([self._rate_error().as_event()])
                await asyncio.sleep(delay_sec)
            await self.room.wait()

    def _admitted(self, message: str | bytes) -> list[Json]:
        limit = self.options.max_message_bytes
        if len(message) <= limit:
            return self.conversation.receive(message)
        self.server.metrics.error("message_too_large")
        text = f"the message has {len(message)} bytes, at most {limit} are taken: send the audio in smaller pieces"
        return [ProtocolError("message_too_large", text).as_event()]

    def _rate_error(self) -> ProtocolError:
        self.server.metrics.error("rate_limit_exceeded")
        message = (
            f"more than {self.options.rate_limit:g} events per second: they are read more slowly now, none is lost"
        )
        return ProtocolError("rate_limit_exceeded", message)

    def _answer(self, events: list[Json]) -> None:
        self.unsent.extend(events)
        if len(self.unsent) > MAX_UNSENT:
            self.room.clear()
        if self.unsent:
            self.wake.set()

    async def _write(self) -> None:
        while True:
            self.wake.clear()
            closed = self.session.closed  # asked first: its last event was queued before
            while events := self._next():
                for event in events:
                    await self._send(event)
            if closed:
                return await self._close(None, FAILED)
            if self.server.draining and self.conversation.idle:
                error = ProtocolError("server_draining", "the server is going down: connect again later")
                return await self._close(error, GOING_AWAY)
            await self.wake.wait()

    def _next(self) -> list[Json]:
        """What is to be sent next: replies first, then one event of the session."""
        if self.unsent:
            events = list(self.unsent)
            self.unsent.clear()
            self.room.set()
            return events
        while (event := self.session.poll(0)) is not None:
            if events := self.conversation.tell(event):
                return events
        return []

    async def _send(self, event: Json) -> None:
        async with asyncio.timeout(self.options.send_timeout_sec):
            await self.socket.send_text(json.dumps(event))

    async def _close(self, error: ProtocolError | None, code: int) -> None:
        with contextlib.suppress(WebSocketDisconnect, TimeoutError, RuntimeError):
            if error is not None:
                await self._send(error.as_event())
            async with asyncio.timeout(self.options.send_timeout_sec):
                await self.socket.close(code, error.code if error else "")


def _wake(loop: asyncio.AbstractEventLoop, event: asyncio.Event) -> None:
    """From the engine's thread, which may outlive the loop."""
    with contextlib.suppress(RuntimeError):
        loop.call_soon_threadsafe(event.set)


class _Bucket:
    """Ten seconds' worth of events at once, then so many per second."""

    def __init__(self, rate: float):
        self.rate = rate
        self.there = self.most = 10 * rate
        self.at = time.monotonic()
        self.told = False

    def take(self) -> float:
        """Take one; returns the seconds to wait before the next."""
        if not self.rate:
            return 0.0
        now = time.monotonic()
        self.there = min(self.most, self.there + (now - self.at) * self.rate) - 1
        self.at = now
        if self.there > self.most / 2:
            self.told = False
        return max(0.0, -self.there / self.rate)

    def tell(self) -> bool:
        """Whether the client has to be told: once until it has behaved for a while."""
        told, self.told = self.told, True
        return not told


class _SafeHeaders:
    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_safe(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *((k.encode(), v.encode()) for k, v in HEADERS.items())]
            await send(message)

        await self.app(scope, receive, send_safe)


@contextlib.asynccontextmanager
async def running(server: Server, port: int = 0, **uvicorn_options: Any) -> AsyncIterator[int]:
    """The server on a port of this process, 0 for a free one: `async with running(server) as port`."""
    import uvicorn

    config = uvicorn.Config(server.app, port=port, log_level="warning", **uvicorn_options)
    web = uvicorn.Server(config)
    task = asyncio.create_task(web._serve())
    while not web.started:
        if task.done():
            task.result()
        await asyncio.sleep(0.01)
    try:
        yield web.servers[0].sockets[0].getsockname()[1]
    finally:
        await server.drain(0)
        web.should_exit = True
        await task
