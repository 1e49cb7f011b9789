"""Messages of a client that is up to no good: `python -m inference.server.fuzz URL --number 100000`.

They are sent over a few connections, some of which break off without a goodbye. The connections must live through it,
and a well-behaved conversation beside them must not notice.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import random
import string
import sys
from collections import Counter
from collections.abc import Sequence
from typing import Any

from .conformance import Client, Target, check_whole, opened

GOOD: list[dict[str, Any]] = [
    {"type": "session.update", "session": {"type": "realtime"}},
    {"type": "session.update", "session": {"type": "realtime", "audio": {"input": {"turn_detection": None}}}},
    {"type": "input_audio_buffer.append", "audio": "AAAA////"},
    {"type": "input_audio_buffer.commit", "event_id": "mine"},
    {"type": "input_audio_buffer.clear"},
    {
        "type": "conversation.item.create",
        "item": {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "hello"}]},
    },
    {"type": "conversation.item.retrieve", "item_id": "item_1"},
    {"type": "conversation.item.delete", "item_id": "item_1"},
    {"type": "conversation.item.truncate", "item_id": "item_1", "content_index": 0, "audio_end_ms": 1500},
    {"type": "response.create"},
    {"type": "response.create", "response": {"output_modalities": ["text"], "metadata": {"a": "b"}}},
    {"type": "response.cancel", "response_id": "resp_1"},
]


def mutated(rng: random.Random, value: Any, depth: int = 0) -> Any:
    """An event with something wrong in it: values of other types, missing and foreign keys, nonsense."""
    nonsense: list[Any] = [None, True, -1, 10**30, 1e308, "", "x" * 1000, "\x00", "😀", "AAAA", [], {}, [[]], {"a": 1}]
    if rng.random() < 0.15 or depth > 6:
        return rng.choice(nonsense)
    if isinstance(value, dict):
        kept = {key: mutated(rng, entry, depth + 1) for key, entry in value.items() if rng.random() > 0.08}
        return kept | ({rng.choice(string.ascii_letters): rng.choice(nonsense)} if rng.random() < 0.1 else {})
    if isinstance(value, list):
        return [mutated(rng, entry, depth + 1) for entry in value] * rng.choice([0, 1, 1, 1, 3])
    return value


def fuzzed(seed: int) -> str | bytes:
    """A message of a client that is up to no good; the same seed gives the same one."""
    rng = random.Random(seed)
    event = mutated(rng, rng.choice(GOOD))
    message = json.dumps(event)
    match rng.randrange(10):
        case 0:  # cut off
            return message[: rng.randrange(len(message) + 1)]
        case 1:  # letters exchanged
            letters = list(message)
            for _ in range(rng.randrange(1, 5)):
                letters[rng.randrange(len(letters))] = chr(rng.randrange(32, 0x2FF))
            return "".join(letters)
        case 2:
            return rng.randbytes(rng.randrange(64))
        case 3:
            return base64.b64encode(rng.randbytes(rng.randrange(64))).decode()
    return message


async def misbehave(target: Target, seeds: Sequence[int]) -> Counter[str]:
    """One connection that sends fuzzed messages. Returns how often each error code came.

    Raises:
        AssertionError: the server did not answer as it should.
    """
    codes: Counter[str] = Counter()
    async with opened(target) as client:
        await client.until("session.created")
        listening = asyncio.create_task(_count(client, codes))
        for seed in seeds:
            await client.socket.send(fuzzed(seed))
        await client.send("conversation.item.retrieve", item_id="the end", event_id="the end")
        await listening
        if seeds[0] % 2:
            client.socket.transport.abort()  # no goodbye
    return codes


async def _count(client: Client, codes: Counter[str]) -> None:
    """Until the answer to the last message."""
    while True:
        event = await client.next()
        if event["type"] != "error":
            continue
        assert event["error"]["message"], "an error says nothing"
        if event["error"]["event_id"] == "the end":
            return
        codes[event["error"]["code"]] += 1


async def fuzz(target: Target, number: int, connections: int = 4) -> Counter[str]:
    """Send `number` fuzzed messages while a well-behaved client asks its question. Returns the errors by code.

    Raises:
        AssertionError: the server failed one of them.
    """
    per = -(-number // connections)
    codes: Counter[str] = Counter()
    for start in range(0, per, 1000):  # every thousand messages a connection ends and another begins
        groups = [range(first * per + start, first * per + min(per, start + 1000)) for first in range(connections)]
        found, _ = await asyncio.gather(asyncio.gather(*(misbehave(target, group) for group in groups)), behave(target))
        codes.update(code for each in found for code in each.elements())
    return codes


async def behave(target: Target) -> None:
    """A client that asks and is answered."""
    async with opened(target) as client:
        await client.ask()
        check_whole(await client.answer())


def main(args: Sequence[str] | None = None) -> int:
    """Command line. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m inference.server.fuzz", description=__doc__)
    parser.add_argument("url", help="such as ws://127.0.0.1:8000/v1/realtime; start it with --rate-limit 0")
    parser.add_argument("--api-key")
    parser.add_argument("--number", type=int, default=100_000, help="of messages (default: 100000)")
    parser.add_argument("--timeout-sec", type=float, default=60.0, help="for one event (default: 60)")
    options = parser.parse_args(args)
    try:
        codes = asyncio.run(fuzz(Target(options.url, options.api_key, options.timeout_sec), options.number))
    except (AssertionError, OSError, TimeoutError) as error:
        print(f"failed: {error or 'no answer in time'}", file=sys.stderr)
        return 1
    for code, count in codes.most_common():
        print(f"{count:>8}  {code}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
