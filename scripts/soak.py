"""Does it last? Interruptions by the thousand, and a conversation of an hour.

    python -m scripts.soak barge_in --num 1000                 # starts a server of its own; or --url ws://..
    python -m scripts.soak hour --minutes 60 --out runs/soak   # sound is pushed as fast as it is heard

Exit status 0 if what was to be shown holds: every interruption stops the sound within 100 ms of when the detector can
know of it, no stale chunk comes, nothing is left behind; a step of the last minute costs within 5 % of the first
minute's, and memory grows by less than 1 % in between. 1 if not, 2 for bad input. What has been measured is written to
--out as it comes, so that a run that is ended early leaves it behind.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from flowomni.commands import Parser, exit_status
from scripts.evaluate import write_text
from scripts.load_test import own_server, read_question, spread

if TYPE_CHECKING:
    from flowomni import FlowOmni
    from inference.session import SessionOptions

    from .barge_in import Found

QUESTIONS = Path(__file__).parent.parent / "inference" / "demo_data" / "questions" / "test"
ROUND = 100  # interruptions
MAX_STOP_MS, MAX_STEP_GROWTH, MAX_MEMORY_GROWTH = 100.0, 0.05, 0.01
MAX_LEAK = 0.05
Keep = Callable[[dict[str, Any]], None]  # is given everything measured so far
WATCHED = {
    "memory_bytes": "process_resident_memory_bytes",
    "open_files": "process_open_fds",
    "tasks": "flowomni_tasks",
    "sessions": "flowomni_sessions",
    "cache_positions": "flowomni_cache_positions",
}


# ------------------------------------------------------------------------------------------------------ interruptions


def server_state(url: str, api_key: str | None) -> dict[str, float]:
    """What the server says of itself at /metrics, once its sessions have ended."""
    address = url.replace("ws", "http", 1).split("/v1/")[0] + "/metrics"
    request = urllib.request.Request(address, headers={"Authorization": f"Bearer {api_key}"} if api_key else {})
    for _ in range(100):
        with urllib.request.urlopen(request, timeout=30) as answer:
            lines = [line.rsplit(" ", 1) for line in answer.read().decode().splitlines() if not line.startswith("#")]
        told = {name: float(value) for name, value in lines}
        if not told[WATCHED["sessions"]]:
            break
        time.sleep(0.1)
    return {name: told[metric] for name, metric in WATCHED.items() if metric in told}


def interrupt(url: str, wavs: Sequence[np.ndarray], options: argparse.Namespace, keep: Keep) -> dict[str, Any]:
    """The interruptions in rounds, each with sessions of its own; the server's state after each."""
    from .barge_in import Found, barge_in

    found, states = Found(), []
    num_rounds = max(2, round(options.num / ROUND))
    for turn in range(num_rounds):
        number = options.num // num_rounds + (turn < options.num % num_rounds)
        if number:
            sessions = min(options.sessions, number)
            talks = barge_in(url, wavs, number, sessions, options.within_sec, options.seed + turn, options.api_key)
            found.add(asyncio.run(talks))
            states.append(server_state(url, options.api_key))
            measured = interruptions(found, states) | {"sessions": options.sessions}
            keep(measured)
            stopped = measured["stop_ms"] or {"p95": float("nan"), "max": float("nan")}
            print(
                f"{len(found.barge_ins)} of {options.num}: stopped within {stopped['p95']:.0f} ms (p95), "
                f"{stopped['max']:.0f} ms at most; {found.stale} stale chunks, {len(found.errors)} errors, "
                f"{states[-1]['memory_bytes'] / 1e6:.1f} MB",
                flush=True,
            )
    return measured


def interruptions(found: Found, states: Sequence[dict[str, float]]) -> dict[str, Any]:
    """Everything that was measured.

    `speech_to_stop_ms` is the sum of the two times before it. Memory grows in the first round, in which conversations
    reach the length that they may have: `memory_growth` is from its end to the end of the last one.
    """
    moments = [each.moment for each in found.barge_ins]
    return {
        "barge_ins": len(found.barge_ins),
        "moments": {moment: moments.count(moment) for moment in sorted(set(moments))},
        "vad_ms": spread([each.vad_sec for each in found.barge_ins]),
        "stop_ms": spread([each.stop_sec for each in found.barge_ins]),
        "speech_to_stop_ms": spread([each.vad_sec + each.stop_sec for each in found.barge_ins]),
        "played_ms": spread([each.played_sec for each in found.barge_ins if each.played_sec]),
        "stale_chunks": found.stale,
        "unheard": found.unheard,
        "errors": {code: found.errors.count(code) for code in sorted(set(found.errors))},
        "server": list(states),
        "memory_growth": round(states[-1]["memory_bytes"] / states[0]["memory_bytes"] - 1, 5) if states else None,
    }


def stops_at_once(found: dict[str, Any]) -> bool:
    """Whether the interruptions show what they are to show."""
    first, last = found["server"][0], found["server"][-1]
    clean = all(last[name] <= first[name] for name in ("open_files", "tasks")) and not last["sessions"]
    return (
        clean
        and not last["cache_positions"]
        and found["stop_ms"] is not None
        and found["stop_ms"]["max"] <= MAX_STOP_MS
        and not found["stale_chunks"]
        and not found["errors"]
        and found["memory_growth"] <= MAX_LEAK
    )


# ----------------------------------------------------------------------------------------------------- a conversation


@dataclass(frozen=True)
class Minute:
    """One minute of conversation.

    Attributes:
        number: from 0.
        turns, steps: answered turns, and steps of their answers.
        step_ms, step_cpu_ms: wall time of a step, and CPU time of the engine's thread in it: what a step costs on one
            thread, whoever else uses the machine.
        prefill_ms, listen_ms: wall time of a turn that went into reading and into listening.
        memory_mb: resident, at its end.
        cache_positions: at its end.
    """

    number: int
    turns: int
    steps: int
    step_ms: float
    step_cpu_ms: float
    prefill_ms: float
    listen_ms: float
    memory_mb: float
    cache_positions: int


def memory_bytes() -> int:
    """Resident memory of this process.

    Raises:
        ValueError: the system does not tell.
    """
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError as error:
        raise ValueError("this system has no /proc/self/statm to read memory from: use Linux") from error
    import resource

    return pages * resource.getpagesize()


def converse(
    omni: FlowOmni, wavs: Sequence[np.ndarray], minutes: int, options: SessionOptions, rate_hz: int
) -> Iterator[Minute]:
    """One session that is asked, answers, and is listened to; its time is that of the sound pushed."""
    from inference.engine import Engine
    from inference.session import AudioDelta, ResponseDone

    piece, turn = rate_hz // 10, 0
    with Engine(omni, max_sessions=1) as engine:
        session = engine.open(options)

        def push(wav_S: np.ndarray) -> list[Any]:
            found: list[Any] = []
            for start in range(0, len(wav_S), piece):
                session.push(wav_S[start : start + piece], rate_hz)
                while not session.wait(0.02):
                    found += iter(session.poll, None)
            return found + list(iter(session.poll, None))

        pushed_sec = 0.0
        for minute in range(minutes):
            before, turns = engine.stats(), 0
            while pushed_sec < 60.0 * (minute + 1):
                wav_S = wavs[turn % len(wavs)]
                quiet_S = np.zeros(round(rate_hz * (options.silence_sec + 0.3)), np.float32)
                found = push(np.concatenate([wav_S, quiet_S]))
                ends = [event for event in found if isinstance(event, ResponseDone)]
                if not ends:
                    raise ValueError(f"turn {turn} was not answered: {found}")
                sec = sum(len(e.wav_S) for e in found if isinstance(e, AudioDelta)) / session.sample_rate_hz
                push(np.zeros(round(rate_hz * sec), np.float32))
                session.played(ends[-1].response_id, ends[-1].num_samples)
                pushed_sec += (len(wav_S) + len(quiet_S)) / rate_hz + sec
                turn, turns = turn + 1, turns + 1
            now, steps = engine.stats(), engine.stats().steps - before.steps
            yield Minute(
                number=minute,
                turns=turns,
                steps=steps,
                step_ms=1000 * (now.step_sec - before.step_sec) / steps,
                step_cpu_ms=1000 * (now.step_cpu_sec - before.step_cpu_sec) / steps,
                prefill_ms=1000 * (now.prefill_sec - before.prefill_sec) / turns,
                listen_ms=1000 * (now.listen_sec - before.listen_sec) / turns,
                memory_mb=memory_bytes() / 1e6,
                cache_positions=now.cache_positions,
            )


def growth(minutes: Sequence[Minute]) -> dict[str, float]:
    """The last minute against the first, as shares."""
    first, last = minutes[0], minutes[-1]
    names = ("step_ms", "step_cpu_ms", "prefill_ms", "listen_ms", "memory_mb")
    return {name: round(getattr(last, name) / getattr(first, name) - 1, 5) for name in names}


def stays_as_it_was(grown: dict[str, float]) -> bool:
    """Whether the conversation shows what it is to show."""
    return grown["step_cpu_ms"] <= MAX_STEP_GROWTH and grown["memory_mb"] <= MAX_MEMORY_GROWTH


def draw(minutes: Sequence[Minute], path: Path) -> None:
    """Cost and memory over time."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 7), layout="constrained")
    axes = figure.subplots(3, 1, sharex=True)
    at = [minute.number + 1 for minute in minutes]
    axes[0].plot(at, [minute.step_ms for minute in minutes], label="wall")
    axes[0].plot(at, [minute.step_cpu_ms for minute in minutes], label="CPU")
    axes[0].set(ylabel="ms per step", ylim=(0, None))
    axes[0].legend()
    axes[1].plot(at, [minute.prefill_ms for minute in minutes], label="reading")
    axes[1].plot(at, [minute.listen_ms for minute in minutes], label="listening")
    axes[1].set(ylabel="ms per turn", ylim=(0, None))
    axes[1].legend()
    axes[2].plot(at, [minute.memory_mb for minute in minutes])
    axes[2].set(xlabel="minute", ylabel="resident MB")
    figure.savefig(path, dpi=120)


def hour(options: argparse.Namespace, keep: Keep) -> dict[str, Any]:
    """Talk for `options.minutes`.

    Raises:
        ValueError: with a message for the user.
    """
    from flowomni import FlowOmni
    from inference.session import SessionOptions
    from inference.threads import settle_threads

    settle_threads(options.threads)
    wavs = [read_question(path) for path in options.questions]
    sampling = {"solver": "euler", "num_steps": 1, "guidance": 1.0} if options.one_jump else None
    live = SessionOptions(sampling=sampling, max_session_sec=1e9, max_context_positions=options.max_context_positions)
    minutes: list[Minute] = []
    print(
        f"{'minute':>6}{'turns':>7}{'steps':>7}{'ms/step':>9}{'CPU':>7}{'read':>7}{'listen':>8}{'MB':>8}{'cached':>8}"
    )
    for each in converse(FlowOmni.from_pretrained(options.model), wavs, options.minutes, live, 24_000):
        minutes.append(each)
        costs = f"{each.step_ms:>9.2f}{each.step_cpu_ms:>7.2f}{each.prefill_ms:>7.1f}{each.listen_ms:>8.1f}"
        sizes = f"{each.memory_mb:>8.1f}{each.cache_positions:>8}"
        print(f"{each.number + 1:>6}{each.turns:>7}{each.steps:>7}{costs}{sizes}", flush=True)
        found = {"minutes": [asdict(each) for each in minutes], "growth": growth(minutes)}
        keep(found)
    return found


# ------------------------------------------------------------------------------------------------------------ command


def parse(args: Sequence[str] | None) -> argparse.Namespace:
    """The command line; what does not fit together ends the program."""
    parser = Parser(prog="python -m scripts.soak", description="Does it last?")
    parser.add_argument(
        "kind", choices=["barge_in", "hour"], help="interruptions at random moments, or one conversation"
    )
    barge = parser.add_argument_group("barge_in")
    barge.add_argument("--num", type=int, default=1000, help="interruptions (default: 1000)")
    barge.add_argument("--sessions", type=int, default=8, help="at once (default: 8)")
    barge.add_argument("--within-sec", type=float, default=2.0, help="after an answer begins (default: 2)")
    barge.add_argument("--speak-sec", type=float, default=1.0, help="of each question that is said (default: 1)")
    barge.add_argument("--url", help="ws://host:port/v1/realtime (default: start a server)")
    barge.add_argument("--api-key")
    barge.add_argument("--seed", type=int, default=0)
    talk = parser.add_argument_group("hour")
    talk.add_argument("--minutes", type=int, default=60, help="of conversation (default: 60)")
    talk.add_argument("--max-context-positions", type=int, help="what is remembered (default: as the sessions have it)")
    talk.add_argument(
        "--one-jump", action="store_true", help="draw speech in one step without guidance: what grows weighs more"
    )
    talk.add_argument("--threads", type=int, help="that the model computes on (default: one core is left free)")
    parser.add_argument("--model", help="model folder (default: the model in the box)")
    parser.add_argument("--questions", nargs="+", default=sorted(map(str, QUESTIONS.glob("*"))), metavar="WAV")
    parser.add_argument("--out", type=Path, help="folder for the numbers (JSON) and the plot")
    options = parser.parse_args(args)
    for name in ("num", "sessions", "minutes", "threads"):
        value = getattr(options, name)
        if value is not None and value < 1:
            parser.error(f"--{name} is {value}: it must be at least 1")
    return options


def soak(options: argparse.Namespace) -> int:
    """Returns the exit status.

    Raises:
        ValueError, OSError: with a message for the user.
    """
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)

    def keep(found: dict[str, Any]) -> None:
        if options.out:
            write_text(options.out / f"{options.kind}.json", json.dumps(found, indent=2) + "\n")

    if options.kind == "hour":
        found = hour(options, keep)
        held = stays_as_it_was(found["growth"])
        print("last minute against the first: " + ", ".join(f"{k} {v:+.1%}" for k, v in found["growth"].items()))
        if options.out:
            draw([Minute(**each) for each in found["minutes"]], options.out / "hour.png")
    else:
        wavs = [read_question(path)[: round(24_000 * options.speak_sec)] for path in options.questions]
        with contextlib.ExitStack() as stack:
            url = options.url or stack.enter_context(own_server(options.model, options.sessions))
            found = interrupt(url, wavs, options, keep)
        held = stops_at_once(found)
        print(json.dumps(found, indent=2))
    return int(not held)


def main(args: Sequence[str] | None = None) -> int:
    """Command line."""
    return exit_status(lambda: soak(parse(args)))


if __name__ == "__main__":
    sys.exit(main())
