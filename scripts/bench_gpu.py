"""What a language model of Qwen3-0.6B's shape costs on a GPU, side by side in one run (random weights).

    python -m scripts.bench_gpu --json bench.json

    speech      from text prompt to sound: times real time, and time to first audio; as it is, and compiled and replayed
                as CUDA graphs (`--compile` of the programs)
    training    a speech step against a text-only step of the same language model with as many positions (as in
                scripts.bench_training), under bf16 autocast, and the share of the measured peak of matrix products
    steps       the parts of a step of generation, of 1 and of 8 rows. A part's floor is the time to read its weights
                once at the measured memory bandwidth

Times are medians, with the smallest and largest of the rounds.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch

from flowomni import FlowOmni
from flowomni.commands import Parser, exit_status
from flowomni.devices import DTYPES, as_dtype, check_device, default_device
from flowomni.fast import accelerate
from scripts import benchmark, streaming_models, training_steps
from scripts.bench_streaming import bandwidth, print_parts
from scripts.benchmark import Bar
from scripts.streaming_models import our_model, our_speech, spoken
from scripts.training_steps import Shape, Spread, alternate, flops_by_part, matmul_peak, ratio

QWEN = dict(training_steps.llm_sizes("qwen3", 1024, 28, 16, 3072, 151_936, kv=8), head_dim=128)
SHAPES = {
    "0.6b": Shape(
        llm=QWEN,
        head=training_steps.head_sizes(512, 6),
        output_blocks={"num_layers": 6, "num_heads": 16},
        encoder=training_steps.whisper_sizes(768, 12, 12, 3072),
        num_rows=32,
        num_prompt=80,
        num_spoken=120,
        num_text=40,
    ),
    "toy": training_steps.SHAPES["toy"],
}
ROWS = (1, 8)
REPEATS = 30


@cache
def models(shape: str, device: str, dtype: str) -> dict[str, FlowOmni]:
    """Plain and compiled, with the same weights; the same in every section, so that nothing is compiled twice."""
    plain = our_model(streaming_models.SHAPES[shape], int8=False, compile=False, device=device, dtype=as_dtype(dtype))
    fast = FlowOmni(copy.deepcopy(plain.model), plain.processor)
    accelerate(fast.model)
    return {"plain": plain, "compiled": fast}


def steps_section(options: argparse.Namespace) -> tuple[dict[str, Any], list[Bar]]:
    """Each part of a step."""
    found: dict[str, Any] = {}
    for kind, omni in models(options.shape, options.device, options.dtype).items():
        for num_rows in ROWS:
            print(f"\nsteps, {kind}, {num_rows} rows, {options.dtype}")
            found[f"{kind}, {num_rows} rows"] = print_parts(omni, options.bandwidth, REPEATS, num_rows)
    return found, []


def speech_section(options: argparse.Namespace) -> tuple[dict[str, Any], list[Bar]]:
    """From text prompt to sound."""
    found: dict[str, Any] = {}
    speeds = {}
    print(f"\nspeech, {options.dtype}, {options.sec:g} s of it")
    for kind, omni in models(options.shape, options.device, options.dtype).items():
        runs = [spoken(our_speech(omni, options.sec), omni.sample_rate_hz) for _ in range(options.repeats + 1)][1:]
        speeds[kind] = [speed for speed, _, _ in runs]
        found[kind] = {"speed": Spread.of(speeds[kind]), "first_audio_sec": Spread.of([first for _, first, _ in runs])}
        print(f"  {kind:9} {found[kind]['speed']} x real time, first audio after {found[kind]['first_audio_sec']} s")
    found["ratio"] = ratio(speeds["compiled"], speeds["plain"])
    print(f"  compiled / plain: {found['ratio']}")
    return found, []


def training_section(options: argparse.Namespace) -> tuple[dict[str, Any], list[Bar]]:
    """A speech step against a text-only step."""
    shape = SHAPES[options.shape]
    torch.manual_seed(0)
    model = training_steps.speech_model(shape, options.attention).to(options.device)
    steps = {
        "speech": training_steps.speech_step(model, shape, half=True),
        "text": training_steps.text_step(model, shape, half=True),
    }
    times = alternate(steps, options.repeats)
    peak = matmul_peak(torch.bfloat16, 64 if options.shape == "toy" else 8192, 10, options.device)
    print(f"\ntraining, bf16: {shape}; {steps['speech'].num_parameters:,} parameters")
    found: dict[str, Any] = {"peak_flops": peak}
    for name, step in steps.items():
        sec, flop = Spread.of(times[name]), sum(flops_by_part(step).values())
        found[name] = {"sec": sec, "flop": flop, "positions_per_sec": shape.num_positions / sec.median}
        share = flop / sec.median / peak
        print(
            f"  {name:7} {sec} s a step, {shape.num_positions / sec.median:,.0f} positions/s, "
            f"{flop / 1e12:.2f} TFLOP, {share:.1%} of the measured peak of {peak / 1e12:.0f} TFLOP/s"
        )
    found["ratio"] = ratio(times["speech"], times["text"])
    print(f"  speech step / text-only step: {found['ratio']}")
    return found, []


SECTIONS: dict[str, benchmark.Section] = {
    "speech": speech_section,
    "training": training_section,
    "steps": steps_section,
}


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(prog="python -m scripts.bench_gpu", description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--only", nargs="+", choices=SECTIONS, default=list(SECTIONS), metavar="SECTION", help="%(choices)s"
    )
    parser.add_argument("--device", default=default_device(), help="default: %(default)s")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of generation (default: %(default)s)")
    parser.add_argument("--shape", choices=SHAPES, default="0.6b", help="%(choices)s (default: %(default)s)")
    parser.add_argument(
        "--attention", choices=("eager", "sdpa"), default="eager", help="of training (default: %(default)s)"
    )
    parser.add_argument("--repeats", type=int, default=5, help="rounds (default: %(default)s)")
    parser.add_argument("--sec", type=float, default=4.0, help="of sound in each run (default: %(default)s)")
    parser.add_argument("--json", help="file for everything that was measured")
    options = parser.parse_args(arguments)
    if options.repeats < 1:
        parser.error(f"--repeats is {options.repeats}; it must be at least 1")
    options.threads = torch.get_num_threads()
    return options


def bench(options: argparse.Namespace) -> int:
    """Run the sections, print, write."""
    check_device(options.device)

    def start() -> dict[str, Any]:
        options.bandwidth = bandwidth(options.device)
        name = torch.cuda.get_device_name(options.device) if options.device.startswith("cuda") else options.device
        print(f"{name}, torch {torch.__version__}; memory is read at {options.bandwidth / 1e9:.0f} GB/s")
        return {"device_name": name}

    return benchmark.bench(options, SECTIONS, start)


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status: 0, or 2 after bad input."""
    return exit_status(lambda: bench(parse(arguments)))


if __name__ == "__main__":
    sys.exit(main())
