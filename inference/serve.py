"""Serve a model to talk to: `python -m inference.serve`, then open http://127.0.0.1:8000 with a browser.

    client = AsyncOpenAI(api_key="none", websocket_base_url="ws://127.0.0.1:8000/v1")  # the official openai package
    async with client.realtime.connect(model="flowomni") as connection: ...

The events are specified in `inference/PROTOCOL.md`. SIGTERM and Ctrl-C refuse new conversations and let answers in
progress end; a second one stops at once. Errors are one line on stderr and exit status 2.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import re
import socket
import ssl
import sys
from collections.abc import Sequence
from types import FrameType
from typing import TYPE_CHECKING

import uvicorn

from flowomni.commands import Parser, add_model_options, exit_status, load

if TYPE_CHECKING:  # torch and transformers take seconds to import: a bad command line is answered before
    from .engine import Engine
    from .server.app import Server
    from .session import SessionOptions

KEY_VARIABLE = "FLOWOMNI_API_KEY"
KEY_LETTERS = r"[A-Za-z0-9!#$%&'*+.^_`|~-]+"  # of a websocket subprotocol (RFC 6455, 4.1), which is how a page sends it


def parse(args: Sequence[str] | None) -> argparse.Namespace:
    """The command line; what does not fit together ends the program."""
    parser = Parser(prog="python -m inference.serve", description="Serve a model to talk to, with a page for browsers.")
    add_model_options(parser)
    add = parser.add_argument
    add("--host", default="127.0.0.1", help="address to listen at; 0.0.0.0 for all (default: 127.0.0.1)")
    add("--port", type=int, default=8000, help="0 takes a free one (default: 8000)")
    add("--api-key", help=f"clients must show it; better given as environment variable {KEY_VARIABLE}")
    add(
        "--allowed-origin",
        action="append",
        default=[],
        metavar="https://site",
        help="whose pages may connect; repeat it",
    )
    add("--max-sessions", type=int, default=8, help="conversations at once; one more is refused (default: 8)")
    add("--max-session-sec", type=float, default=3600.0, help="a conversation ends after it (default: 3600)")
    add("--max-message-bytes", type=int, default=1 << 20, help="of one event (default: 1048576)")
    add("--rate-limit", type=float, default=200.0, help="events per second of a client, 0: any number (default: 200)")
    add("--threads", type=int, help="that the model computes on (default: one core is left to everything else)")
    add("--drain-sec", type=float, default=30.0, help="answers in progress may take so long at the end (default: 30)")
    add("--ssl-certfile", help="PEM file: serve https and wss")
    add("--ssl-keyfile", help="PEM file of its private key")
    add(
        "--take-instructions",
        action="store_true",
        help="hand clients' instructions to a model that was trained with some",
    )
    add("--temperature", type=float, help="of the sampled speech; 0 is no noise (default: the model's)")
    add("--seed", type=int, default=0, help="the same seed and questions give the same answers (default: 0)")
    add("--log-level", choices=["debug", "info", "warning", "error"], default="info", help="default: info")
    options = parser.parse_args(args)
    options.api_key = options.api_key or os.environ.get(KEY_VARIABLE) or None
    if options.api_key is not None and not re.fullmatch(KEY_LETTERS, options.api_key):
        parser.error("--api-key has letters that browsers cannot send: take letters, digits, - and _")
    for name in ("max_sessions", "max_message_bytes", "max_session_sec"):
        if getattr(options, name) <= 0:
            parser.error(f"--{name.replace('_', '-')} is {getattr(options, name):g}: it must be positive")
    for name in ("rate_limit", "drain_sec"):
        if not getattr(options, name) >= 0:
            parser.error(f"--{name.replace('_', '-')} is {getattr(options, name):g}: it must not be negative")
    if options.threads is not None and options.threads < 1:
        parser.error(f"--threads is {options.threads}: it must be at least 1")
    if not 0 <= options.port < 65_536:
        parser.error(f"--port is {options.port}: it must be from 0 to 65535")
    if options.ssl_keyfile and not options.ssl_certfile:
        parser.error("--ssl-keyfile needs --ssl-certfile")
    return options


class _Uvicorn(uvicorn.Server):
    """Drains before it stops: uvicorn by itself would cut websockets off."""

    def __init__(self, config: uvicorn.Config, server: Server, drain_sec: float):
        super().__init__(config)
        self.realtime, self.drain_sec = server, drain_sec
        self.draining: asyncio.Task[None] | None = None
        self.loop: asyncio.AbstractEventLoop | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self.loop = asyncio.get_running_loop()
        await super().startup(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.realtime.draining or self.loop is None:
            self.should_exit = self.force_exit = True
        else:
            self.realtime.draining = True
            self.loop.call_soon_threadsafe(self._drain)

    def _drain(self) -> None:
        async def drain() -> None:
            await self.realtime.drain(self.drain_sec)
            self.should_exit = True

        self.draining = asyncio.create_task(drain())


def serve(options: argparse.Namespace) -> int:
    """Load, warm up, listen until a signal.

    Raises:
        ValueError, OSError: with a message for the user.
    """
    from transformers.utils import logging

    from .engine import Engine
    from .server.app import Server, ServerOptions
    from .server.http import PromptH11Protocol
    from .session import SessionOptions
    from .threads import settle_threads

    settle_threads(options.threads)
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    _check_certificate(options)
    listener = _bind(options.host, options.port)
    omni = load(options)
    sampling = None if options.temperature is None else {"temperature": options.temperature}
    session = SessionOptions(sampling=sampling, seed=options.seed, max_session_sec=options.max_session_sec)
    with Engine(omni, max_sessions=options.max_sessions) as engine:
        _warm_up(engine, session)
        name = "flowomni-tiny" if options.model is None else os.path.basename(os.path.normpath(options.model))
        settings = ServerOptions(
            model=name,
            api_key=options.api_key,
            allowed_origins=tuple(options.allowed_origin),
            max_message_bytes=options.max_message_bytes,
            rate_limit=options.rate_limit,
            take_instructions=options.take_instructions,
            session=session,
        )
        server = Server(engine, settings)
        config = uvicorn.Config(
            server.app,
            http=PromptH11Protocol,
            log_level=options.log_level,
            ssl_certfile=options.ssl_certfile,
            ssl_keyfile=options.ssl_keyfile,
            ws_max_size=4 * options.max_message_bytes,  # up to here the client is told, beyond it is cut off
            timeout_graceful_shutdown=5,
        )
        if options.api_key is None and options.host not in ("127.0.0.1", "localhost", "::1"):
            print(f"warning: everyone who reaches {options.host} may talk: set --api-key", file=sys.stderr)
        web = _Uvicorn(config, server, options.drain_sec)
        listener.listen()  # whoever connects from here on waits in the queue until the first one is accepted
        scheme = "https" if options.ssl_certfile else "http"
        host, port = listener.getsockname()[:2]
        print(f"talk at {scheme}://{f'[{host}]' if ':' in host else host}:{port}", flush=True)
        web.run(sockets=[listener])
    return 0


def _bind(host: str, port: int) -> socket.socket:
    """Take the port before the model is loaded, so that a busy one is told at once; nobody is listened to yet."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # only where asyncio sees the protocol does it send small messages at once: without it, deltas came 40 ms late
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise ValueError(f"cannot listen at {host} port {port} ({error.strerror}): choose others") from error
    return listener


def _check_certificate(options: argparse.Namespace) -> None:
    if options.ssl_certfile:
        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(options.ssl_certfile, options.ssl_keyfile)
        except OSError as error:  # ssl.SSLError is one
            raise ValueError(f"--ssl-certfile {options.ssl_certfile} with its key cannot be used: {error}") from error


def _warm_up(engine: Engine, options: SessionOptions) -> None:
    """The first answer of a process is slow: give it to nobody."""
    session = engine.open(options)
    session.say_text("hello")
    session.respond()
    while not session.wait(0.0):
        session.poll(0.1)
    session.close()


def main(args: Sequence[str] | None = None) -> int:
    """Command line. Returns the exit status: 0 stopped by a signal, 2 bad input."""
    return exit_status(lambda: serve(parse(args)))


if __name__ == "__main__":
    sys.exit(main())
