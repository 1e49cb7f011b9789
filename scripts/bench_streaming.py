"""How fast it speaks, side by side in one run.

    python -m scripts.bench_streaming --json bench.json     # everything, on two idle cores
    python -m scripts.bench_streaming --only 7m             # one section

    100m, 7m    from text prompt to sound against the official pocket-tts package (pip install 'flowomni[bench]'):
                its configuration with random weights, and FlowOmni with the same backbone and head width
    0.6b        a language model of Qwen3-0.6B's shape with random weights, in int8
    tiny        the model in the box: end of speech to the first sample, gaps between chunks, sessions at once

pocket-tts runs as it ships: one thread for the backbone and one for its decoder. FlowOmni runs its compiled steps on
`--threads` threads. Runs alternate; a value is the median over the rounds, with the smallest and largest. A part's
floor is the time to read its weights once at the measured memory bandwidth: weights that a cache holds may beat it.
Graphs are compiled before anything is timed; how long that took is shown. The exit status is 1 if a bar is missed.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from transformers.utils.logging import disable_progress_bar

from flowomni import FlowOmni
from flowomni.audio import read_audio
from flowomni.commands import Parser, exit_status
from inference.engine import Engine
from inference.session import AudioDelta, ResponseDone, Session, SessionOptions
from scripts import benchmark
from scripts.benchmark import Bar
from scripts.streaming_models import (
    SHAPES,
    our_model,
    our_speech,
    pocket_model,
    pocket_speech,
    spoken,
    step_parts,
)
from scripts.training_steps import Spread, ratio, seconds

MIN_SPEED = {("100m", "float32"): 1.5, ("100m", "int8"): 2.0, ("7m", "float32"): 5.0}
MAX_FIRST = {("100m", "float32"): 0.5, ("100m", "int8"): 0.5}
MAX_REALTIME_FACTOR = 1.0
MAX_FIRST_SAMPLE_SEC = 0.150
NUM_SESSIONS = 8
CHUNK_SEC = 0.04
MIB = 2**20


def bandwidth(device: str = "cpu") -> float:
    """Bytes per second of a product with a matrix that no cache holds."""
    matrix, vector = torch.randn(16_384, 4096, device=device), torch.randn(4096, device=device)
    times = [seconds(lambda: torch.mv(matrix, vector)) for _ in range(8)]
    return matrix.nbytes / statistics.median(times[2:])


def print_parts(omni: FlowOmni, bytes_per_sec: float, repeats: int, num_rows: int = 1) -> dict[str, dict[str, float]]:
    """Each part of a step: its time, and the floor."""
    found = {}
    print(f"    {'':20}{'MB of weights':>14}{'floor ms':>10}{'ms':>9}{'floor/time':>12}")
    with torch.inference_mode():
        for name, (run, size) in step_parts(omni, num_rows=num_rows).items():
            for _ in range(4):
                run()
            times = [seconds(run) for _ in range(repeats)]
            found[name] = {"bytes": size, "floor_sec": size / bytes_per_sec, "sec": statistics.median(times)}
    found["step"] = {key: sum(part[key] for part in found.values()) for key in ("bytes", "floor_sec", "sec")}
    for name, part in found.items():
        share = part["floor_sec"] / part["sec"]
        print(
            f"    {name:20}{part['bytes'] / 1e6:>14.1f}{1e3 * part['floor_sec']:>10.2f}{1e3 * part['sec']:>9.2f}"
            f"{share:>11.0%}"
        )
    return found


def _compiled(build: Callable[[], FlowOmni]) -> FlowOmni:
    """A model that has spoken once, so that its graphs are there."""
    torch._dynamo.reset()  # graphs of another model count towards the same limit
    began = time.perf_counter()
    omni = build()
    for _ in our_speech(omni, 1.0):
        pass
    print(f"  model built and compiled in {time.perf_counter() - began:.0f} s")
    return omni


def peer_section(name: str, options: argparse.Namespace) -> tuple[dict[str, Any], list[Bar]]:
    """Against pocket-tts."""
    shape, found, bars = SHAPES[name], {}, []
    for precision in options.precision:
        int8 = precision == "int8"
        print(f"\n{name}, {precision}")
        omni = _compiled(lambda int8=int8: our_model(shape, int8))  # type: ignore[misc]
        with TemporaryDirectory() as folder:
            pocket = pocket_model(shape.pocket, int8, Path(folder))
        torch.set_num_threads(options.threads)  # importing pocket-tts has set one
        rates = {"FlowOmni": omni.sample_rate_hz, "pocket-tts": pocket.sample_rate}
        speeds: dict[str, list[float]] = {who: [] for who in rates}
        firsts: dict[str, list[float]] = {who: [] for who in rates}
        for number in range(options.repeats + 1):  # the first round warms up
            for who, rate in rates.items():
                torch.set_num_threads(1 if who == "pocket-tts" else options.threads)
                chunks = pocket_speech(pocket, options.sec) if who == "pocket-tts" else our_speech(omni, options.sec)
                speed, first, _ = spoken(chunks, rate)
                if number:
                    speeds[who].append(speed)
                    firsts[who].append(first)
        torch.set_num_threads(options.threads)
        faster = ratio(speeds["FlowOmni"], speeds["pocket-tts"])
        sooner = ratio(firsts["FlowOmni"], firsts["pocket-tts"])
        for who in rates:
            print(f"  {who:12} {Spread.of(speeds[who])} x real time, first audio after {Spread.of(firsts[who])} s")
        print(f"  FlowOmni / pocket-tts: speed {faster}, time to first audio {sooner}")
        parts = print_parts(omni, options.bandwidth, 20)
        found[precision] = {
            "speed": {who: Spread.of(each) for who, each in speeds.items()},
            "first_audio_sec": {who: Spread.of(each) for who, each in firsts.items()},
            "speed_ratio": faster,
            "first_audio_ratio": sooner,
            "parts": parts,
        }
        if least := MIN_SPEED.get((name, precision)):
            bars.append(Bar(f"speed / pocket-tts's, {name} {precision}", faster.median, least, at_least=True))
        if most := MAX_FIRST.get((name, precision)):
            bars.append(Bar(f"time to first audio / pocket-tts's, {name} {precision}", sooner.median, most))
    return found, bars


def llm_section(options: argparse.Namespace) -> tuple[dict[str, Any], list[Bar]]:
    """A language model of real size."""
    print("\n0.6b, int8")
    omni = _compiled(lambda: our_model(SHAPES["0.6b"], int8=True))
    runs = [spoken(our_speech(omni, options.sec), omni.sample_rate_hz) for _ in range(options.repeats)]
    factor, first = Spread.of([1 / speed for speed, _, _ in runs]), Spread.of([first for _, first, _ in runs])
    print(f"  real-time factor {factor}, first audio after {first} s")
    parts = print_parts(omni, options.bandwidth, 10)
    result = {"realtime_factor": factor, "first_audio_sec": first, "parts": parts}
    return result, [Bar("real-time factor, 0.6b int8", factor.median, MAX_REALTIME_FACTOR)]


# ------------------------------------------------------------------------------------------------- the model in the box


def tiny_section(options: argparse.Namespace) -> tuple[dict[str, Any], list[Bar]]:
    """Questions through the engine, plain and compiled."""
    questions = [read_audio(path, 16_000).wav_S for path in options.questions]
    if not questions:
        print("\ntiny: not measured, there are no --questions")
        return {"missing": "questions"}, []
    found: dict[str, Any] = {}
    for kind in ("plain", "compiled"):
        print(f"\ntiny, {kind}")
        omni = FlowOmni.from_pretrained(compile=kind == "compiled")
        with Engine(omni, max_sessions=NUM_SESSIONS) as engine:
            began = time.perf_counter()
            for _ in range(2):  # compiles, warms up
                _ask(engine, questions[:1], 1)
            print(f"  warm after {time.perf_counter() - began:.0f} s")
            one = _ask(engine, questions, 1)
        gap, first = np.concatenate([run.gaps for run in one]), [run.first_sec for run in one]
        p50, p95 = (float(np.percentile(first, q)) for q in (50, 95))
        found[kind] = {"first_sec": {"p50": p50, "p95": p95}, "gap_sec": {"p95": float(np.percentile(gap, 95))}}
        period = 1 / omni.model.speech_tokenizer.spec.tokens_per_sec
        print(
            f"  end of speech to first sample: p50 {1e3 * p50:.0f} ms, p95 {1e3 * p95:.0f} ms (no silence is waited "
            f"for); gaps between chunks: p95 {1e3 * found[kind]['gap_sec']['p95']:.0f} ms of {1e3 * period:.0f} ms"
        )
        with torch.inference_mode():
            found[kind]["parts"] = print_parts(omni, options.bandwidth, 20)
        found[kind]["sessions"] = _many(omni, questions)
    best = min(found.values(), key=lambda each: each["first_sec"]["p95"])
    bars = [
        Bar("end of speech to first sample, p95, s", best["first_sec"]["p95"], MAX_FIRST_SAMPLE_SEC),
        Bar("real-time factor of 8 sessions", best["sessions"]["realtime_factor"], MAX_REALTIME_FACTOR),
    ]
    return found, bars


@dataclasses.dataclass(frozen=True)
class Run:
    """One answer: seconds to its first sample, between its chunks, of its sound, and until its end."""

    first_sec: float
    gaps: list[float]
    answer_sec: float
    took_sec: float


def _ask(engine: Engine, questions: Sequence[np.ndarray], speed: float) -> list[Run]:
    """Ask one after the other, at the pace of real time (times `speed`)."""
    runs = []
    for wav_S in questions:
        session = engine.open(SessionOptions(vad=None))
        size = round(16_000 * CHUNK_SEC)
        began = time.perf_counter()
        for number, start in enumerate(range(0, len(wav_S), size)):
            session.push(wav_S[start : start + size], 16_000)
            time.sleep(max(0.0, began + (number + 1) * CHUNK_SEC / speed - time.perf_counter()))
        runs.append(_hear(session))
        session.close()
    return runs


def _hear(session: Session) -> Run:
    began = time.perf_counter()
    session.commit()
    session.respond()
    times, num_samples = [], 0
    while True:
        event = session.poll(1.0)
        if isinstance(event, AudioDelta):
            times.append(time.perf_counter())
            num_samples += len(event.wav_S)
        elif isinstance(event, ResponseDone):
            break
    took = time.perf_counter() - began
    first = times[0] - began if times else float("nan")
    gaps = [b - a for a, b in zip(times, times[1:], strict=False)]
    return Run(first, gaps, num_samples / session.sample_rate_hz, took)


def _many(omni: FlowOmni, questions: Sequence[np.ndarray]) -> dict[str, float]:
    """As many sessions as there are places ask at the same moment: time of all answers over the longest one's sound."""
    with Engine(omni, max_sessions=NUM_SESSIONS) as engine:
        for _ in range(2):  # the first round compiles what a full batch needs
            sessions = [engine.open(SessionOptions(vad=None)) for _ in range(NUM_SESSIONS)]
            for number, session in enumerate(sessions):
                session.push(questions[number % len(questions)], 16_000)
            time.sleep(1.0)  # what was heard is read
            before, began = engine.stats(), time.perf_counter()
            for session in sessions:
                session.commit()
                session.respond()
            runs = [_drain(session) for session in sessions]
            took = time.perf_counter() - began
            after = engine.stats()
    step = (after.step_sec - before.step_sec) / max(1, after.steps - before.steps)
    longest = max(runs)
    print(
        f"  {NUM_SESSIONS} sessions at once: {took:.2f} s for answers of up to {longest:.2f} s, real-time factor "
        f"{took / longest:.2f}; {1e3 * step:.1f} ms a step of the batch"
    )
    return {"realtime_factor": took / longest, "step_sec": step}


def _drain(session: Session) -> float:
    """Seconds of sound of the answer."""
    num_samples = 0
    while not isinstance(event := session.poll(1.0), ResponseDone):
        num_samples += len(event.wav_S) if isinstance(event, AudioDelta) else 0
    session.close()
    return num_samples / session.sample_rate_hz


# ----------------------------------------------------------------------------------------------------------- command

SECTIONS: dict[str, benchmark.Section] = {
    "100m": lambda options: peer_section("100m", options),
    "7m": lambda options: peer_section("7m", options),
    "0.6b": llm_section,
    "tiny": tiny_section,
}


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(prog="python -m scripts.bench_streaming", description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--only", nargs="+", choices=SECTIONS, default=list(SECTIONS), metavar="SECTION", help="%(choices)s"
    )
    parser.add_argument("--precision", nargs="+", choices=("float32", "int8"), default=["float32", "int8"])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: %(default)s")
    parser.add_argument("--repeats", type=int, default=3, help="rounds of alternating runs (default: %(default)s)")
    parser.add_argument("--sec", type=float, default=4.0, help="of sound in each run (default: %(default)s)")
    parser.add_argument("--questions", nargs="*", default=[], metavar="q.wav", help="spoken questions, of section tiny")
    parser.add_argument("--json", help="file for everything that was measured")
    options = parser.parse_args(arguments)
    for name in ("threads", "repeats"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} is {getattr(options, name)}; it must be at least 1")
    if not 0.5 <= options.sec <= 10:
        parser.error(f"--sec is {options.sec}; it must be 0.5 to 10")
    return options


def bench(options: argparse.Namespace) -> int:
    """Run the sections, print, write; 1 if a bar was missed."""

    def start() -> dict[str, Any]:
        options.bandwidth = bandwidth()
        speed = f"{options.bandwidth / 1e9:.1f} GB/s"
        print(f"{options.threads} threads, torch {torch.__version__}; memory is read at {speed}")
        return {}

    return benchmark.bench(options, SECTIONS, start)


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status: 1 if a bar was missed, 2 after bad input."""
    disable_progress_bar()
    return exit_status(lambda: bench(parse(arguments)))


if __name__ == "__main__":
    sys.exit(main())
