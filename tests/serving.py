"""A server for tests, on a thread and a free port of this process."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from flowomni import FlowOmni
from flowomni.streams import SpeechState
from inference.server.app import Server, running
from inference.session import SessionOptions
from tests.tiny import INSTRUCTIONS, tiny_model

SPOKEN = SessionOptions(stop_threshold=1 - 1e-9)  # a random model would fall silent at any moment


def talkative_model(max_answer_tokens: int = 12) -> FlowOmni:
    """A tiny model with random weights that answers with some words and speaks until its limit."""
    head = {"kind": "flow", "width": 32, "num_blocks": 1, "objective": "lsd"}  # draws in one step: quick
    layout = {"instructions": INSTRUCTIONS, "max_answer_tokens": max_answer_tokens}
    model, processor = tiny_model(seed=7, head=head, layout=layout)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        model.llm.lm_head = torch.nn.Linear(32, len(processor.text_tokenizer))
        model.llm.lm_head.weight.normal_(std=0.4, generator=generator)
        model.llm.lm_head.bias[:] = 0.0
        model.llm.lm_head.bias[:50] = -1e4  # no special tokens, few letters
        model.llm.lm_head.bias[processor.text_eos_id] = 2.0
        model.state_head.classify.bias[SpeechState.STOP] -= 3.0
    return FlowOmni(model, processor)


@contextmanager
def serving(server: Server, **uvicorn_options: Any) -> Iterator[int]:
    """Runs the server; gives its port."""
    ready, stop = threading.Event(), asyncio.Event()
    found: dict[str, Any] = {}

    async def serve() -> None:
        found["loop"] = asyncio.get_running_loop()
        async with running(server, **uvicorn_options) as port:
            found["port"] = port
            ready.set()
            await stop.wait()

    thread = threading.Thread(target=lambda: asyncio.run(serve()), daemon=True)
    thread.start()
    assert ready.wait(30), "the server did not start"
    try:
        yield found["port"]
    finally:
        found["loop"].call_soon_threadsafe(stop.set)
        thread.join(30)
        assert not thread.is_alive(), "the server did not stop"
