"""Interruptions and long conversations, small: the same logic that `scripts.soak` runs by the thousand and the hour.

Shapes: S samples.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from inference.engine import Engine
from inference.server.app import Server, ServerOptions
from scripts import soak
from scripts.barge_in import BargeIn, Found, Player
from scripts.soak import Minute, growth, interruptions, stays_as_it_was, stops_at_once
from tests.serving import SPOKEN, serving, talkative_model

QUESTION = str(sorted(soak.QUESTIONS.glob("*"))[2])


def test_twenty_interruptions(tmp_path: Path) -> None:
    """Over the true websocket: all stop, no chunk is stale, nothing stays behind."""
    with Engine(talkative_model(max_answer_tokens=40), max_sessions=4) as engine:
        server = Server(engine, ServerOptions(session=SPOKEN))
        with serving(server) as port:
            args = ["barge_in", "--num", "20", "--sessions", "4", "--within-sec", "1", "--questions", QUESTION]
            soak.main([*args, "--url", f"ws://127.0.0.1:{port}/v1/realtime", "--out", str(tmp_path)])
    found = json.loads((tmp_path / "barge_in.json").read_text())
    assert found["barge_ins"] >= 20 and found["stale_chunks"] == 0 and not found["errors"]
    assert found["vad_ms"]["p50"] >= 100 and found["stop_ms"]["max"] > 0
    assert {"while it is made", "while it is played"} & set(found["moments"])
    first, *_, last = found["server"]
    assert last["sessions"] == last["cache_positions"] == 0 and last["memory_bytes"] > 0
    assert last["tasks"] <= first["tasks"] and last["open_files"] <= first["open_files"]


def test_the_player_plays_in_real_time() -> None:
    """Half a second that comes at once is played for half a second; what comes late begins late."""
    player = Player()
    player.push("a", 12_000, now=10.0)
    player.push("a", 12_000, now=10.1)
    assert player.playing(10.99) and not player.playing(11.01)
    assert player.stop(10.25) == 6_000 and not player.playing(10.26)
    player.push("b", 2_400, now=20.0)
    player.push("b", 2_400, now=20.5)  # it had run dry
    assert player.playing(20.55) and player.stop(21.0) == 4_800


def result(**changes: object) -> dict[str, object]:
    state = {"memory_bytes": 1e9, "open_files": 20.0, "tasks": 3.0, "sessions": 0.0, "cache_positions": 0.0}
    barge_in = BargeIn("while it is made", 0.13, 0.01, 0.5)
    return interruptions(Found([barge_in]), [state, state]) | changes


def test_what_a_failure_of_interruptions_is() -> None:
    good = result()
    assert stops_at_once(good) and good["speech_to_stop_ms"]["p50"] == 140.0  # type: ignore[index]
    state = good["server"][0]  # type: ignore[index]
    for bad in (
        {"stale_chunks": 1},
        {"stop_ms": {"max": 101.0}},
        {"stop_ms": None},
        {"errors": {"turn_failed": 1}},
        {"memory_growth": 0.06},
        {"server": [state, state | {"sessions": 1.0}]},
        {"server": [state, state | {"tasks": 4.0}]},
    ):
        assert not stops_at_once(result(**bad))


def test_an_hour_of_seconds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two minutes of a random model's conversation: answered turn by turn, counted, drawn."""
    monkeypatch.setattr("flowomni.FlowOmni.from_pretrained", lambda _: talkative_model(max_answer_tokens=40))
    args = ["hour", "--minutes", "2", "--questions", QUESTION, "--max-context-positions", "400", "--threads", "1"]
    assert soak.main([*args, "--out", str(tmp_path)]) in (0, 1)
    found = json.loads((tmp_path / "hour.json").read_text())
    minutes = [Minute(**each) for each in found["minutes"]]
    assert [minute.number for minute in minutes] == [0, 1] and all(minute.turns > 5 for minute in minutes)
    assert all(minute.steps >= minute.turns and 0 < minute.cache_positions <= 400 for minute in minutes)
    assert (tmp_path / "hour.png").stat().st_size > 10_000


def test_what_a_failure_of_an_hour_is() -> None:
    first = Minute(0, 10, 100, 20.0, 20.0, 5.0, 5.0, 600.0, 500)
    assert stays_as_it_was(growth([first, dataclasses.replace(first, step_cpu_ms=20.9, memory_mb=605.0)]))
    assert not stays_as_it_was(growth([first, dataclasses.replace(first, step_cpu_ms=21.1)]))
    assert not stays_as_it_was(growth([first, dataclasses.replace(first, memory_mb=607.0)]))


@pytest.mark.parametrize(
    ("args", "said"), [(["barge_in", "--num", "0"], "--num"), (["hour", "--questions", "nobody.wav"], "nobody.wav")]
)
def test_wrong_command_lines(args: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        status = soak.main(args)
    except SystemExit as end:
        status = int(str(end.code))
    [line] = capsys.readouterr().err.splitlines()
    assert status == 2 and line.startswith("error: ") and said in line
