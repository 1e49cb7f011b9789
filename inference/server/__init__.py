"""The server: websocket events as in the OpenAI Realtime API (`inference/PROTOCOL.md`), and the page for it."""
