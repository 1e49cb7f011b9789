"""HTTP connections that must say what they want: uvicorn itself waits for ever for the first request."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol


class PromptH11Protocol(H11Protocol):
    """Closes a connection whose first request has not come whole after `header_sec`."""

    header_sec = 10.0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._deadline = self.loop.call_later(self.header_sec, transport.close)

    def handle_events(self) -> None:
        super().handle_events()
        if self.cycle is not None:
            self._deadline.cancel()

    def handle_websocket_upgrade(self, event: Any) -> None:
        self._deadline.cancel()
        super().handle_websocket_upgrade(event)

    def connection_lost(self, exc: Exception | None) -> None:
        self._deadline.cancel()
        super().connection_lost(exc)
