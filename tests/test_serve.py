"""The command `python -m inference.serve`: bad command lines, TLS, signals, small messages at once."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
from pathlib import Path

import pytest

from flowomni.build import save_model
from inference import serve
from inference.server.conformance import Target, opened
from tests.test_server import Capture
from tests.tiny import tiny_model


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--port", "70000"], "--port"),
        (["--max-sessions", "0"], "--max-sessions"),
        (["--rate-limit", "-1"], "--rate-limit"),
        (["--threads", "0"], "--threads"),
        (["--api-key", "two words"], "--api-key"),
        (["--ssl-keyfile", "k.pem"], "--ssl-certfile"),
        (["--ssl-certfile", "/nowhere.pem"], "/nowhere.pem"),
        (["--model", "/nowhere"], "/nowhere"),
        (["--host", "203.0.113.7"], "203.0.113.7"),
    ],
)
def test_wrong_command_lines(capsys: Capture, args: list[str], said: str) -> None:
    """One line, status 2."""
    try:
        status = serve.main(["--port", "0", *args])
    except SystemExit as stop:
        status = int(str(stop.code))
    lines = capsys.readouterr().err.splitlines()
    assert status == 2 and len(lines) == 1 and said in lines[0], lines


def test_a_delta_is_sent_at_once() -> None:
    """asyncio did not recognise the listener as TCP, so that small messages waited 40 ms for an acknowledgement."""

    async def no_delay(listener: socket.socket) -> int:
        accepted: asyncio.Future[int] = asyncio.get_running_loop().create_future()

        def look(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            accepted.set_result(writer.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
            writer.close()

        async with await asyncio.start_server(look, sock=listener):
            _, writer = await asyncio.open_connection(*listener.getsockname()[:2])
            found = await accepted
            writer.close()
            return found

    assert asyncio.run(no_delay(serve._bind("127.0.0.1", 0)))


@pytest.mark.skipif(shutil.which("openssl") is None, reason="no openssl to make a certificate with")
def test_the_command_serves_over_tls_and_ends_on_a_signal(tmp_path: Path) -> None:
    save_model(*tiny_model(), tmp_path / "model")
    pem, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    make = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", str(key), "-out", str(pem)]
    subprocess.run([*make, "-subj", "/CN=localhost", "-days", "2"], check=True, capture_output=True)
    command = [sys.executable, "-m", "inference.serve", "--port", "0", "--model", str(tmp_path / "model")]
    command += ["--ssl-certfile", str(pem), "--ssl-keyfile", str(key), "--log-level", "warning"]
    root = Path(__file__).resolve().parent.parent
    environment = os.environ | {serve.KEY_VARIABLE: "the-key"}
    trusting = ssl.create_default_context(cafile=str(pem))
    trusting.check_hostname = False

    async def converse(port: int, process: subprocess.Popen[str]) -> None:
        url = f"wss://127.0.0.1:{port}/v1/realtime"
        async with opened(Target(url, "the-key", 60), ssl=trusting) as client:
            await client.ask()
            await client.answer()
            process.send_signal(signal.SIGTERM)
            await client.error("server_draining")

    with subprocess.Popen(command, cwd=root, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            said = process.stdout.readline()
            assert said.startswith("talk at https://127.0.0.1:"), said
            asyncio.run(converse(int(said.rsplit(":", 1)[1]), process))
            assert process.wait(60) == 0
        finally:
            process.kill()
