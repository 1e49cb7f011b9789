"""What a training step costs, side by side in one run.

    python -m scripts.bench_training --json bench.json          # everything, on idle cores: about six minutes
    python -m scripts.bench_training --only peer --threads 2    # one section

    step        a speech step against a text-only step of the same language model with as many positions
    peer        positions per second against the training step of transformers' PocketTTSForConditionalGeneration
    processes   losses of two processes against one (the engines' full test is tests/test_engines.py)
    padding     how full the batches of the talk corpus are
    memory      what `--plan` says against what a process really takes

A step is forward, backward, clipping and AdamW, in float32 unless `--precision bf16` puts all models under autocast.
Rows are equally long and filled to the last position. The speech step is the whole model without its encoder, which is
shown apart: embeddings, language model, text targets, output blocks, speech state, and a flow head with four draws of
which one is self-distilled. The text-only step is the same language model in transformers' own forward pass, every
position a text target. PocketTTS distils all its draws in a quarter of its steps, drawn at random; ours one of four in
every step. So its steps "on average" are the fair opponent, those that do not distil the hardest one: each is a bar.

Steps alternate; a time or ratio is the median over the rounds, with the smallest and largest. FLOP are those of the
matrix products (counted), and the peak is that of one large product, measured between the steps. The exit status is 1
if a bar is missed.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers.utils.logging import disable_progress_bar

from flowomni.commands import Parser, exit_status
from scripts import benchmark
from scripts.benchmark import Bar
from scripts.training_memory import Case, Memory, measure, measure_apart
from scripts.training_runs import corpus_stage, padding_of, two_processes
from scripts.training_steps import (
    SHAPES,
    Shape,
    Spread,
    Step,
    alternate,
    encoder_step,
    flops_by_part,
    matmul_peak,
    peer_steps,
    ratio,
    seconds_by_part,
    speech_model,
    speech_step,
    text_step,
)

MAX_STEP_RATIO = 1.25
MIN_PEER_RATIO = 1.0
MAX_LOSS_DIFFERENCE = 2e-3  # as in tests/test_engines.py
MAX_PADDING = 0.10
MAX_PLAN_DEVIATION = 0.10
DISTILLING_SHARE = 0.25  # of PocketTTS's steps
PART_REPEATS = 2
PEAK_SIZE, PEAK_REPEATS = 2048, 6
MODEL = "flowomni/models/flowomni-tiny"
PEER_SHAPE = "wide"
# shape, heard or spoken, rows, longest audio in seconds, half precision
MEMORY_CASES = (
    ("small", False, 16, 10.0, False),
    ("small", False, 16, 10.0, True),
    ("small", True, 16, 10.0, False),
    ("medium", False, 2, 10.0, True),
)
TOY_MEMORY_CASES = (("toy", False, 2, 1.0, False), ("toy", True, 2, 1.0, True))
MIB = 2**20


# ---------------------------------------------------------------------------------------------------------- sections


def print_parts(title: str, step: Step, peaks: dict[str, float]) -> dict[str, dict[str, float]]:
    """A step's parts: floating-point operations, time, and which share of the peak that is."""
    flops, times = flops_by_part(step), seconds_by_part(step, PART_REPEATS)
    parts = {}
    for name, sec in times.items():
        in_half = step.half and name not in step.in_float32
        best = flops.get(name, 0.0) / peaks["bfloat16" if in_half else "float32"]
        parts[name] = {"flop": flops.get(name, 0.0), "sec": sec, "sec_at_peak": best}
    parts["total"] = {key: sum(part[key] for part in parts.values()) for key in ("flop", "sec", "sec_at_peak")}
    print(f"  {title}, {step.num_parameters:,} parameters\n    {'':20}{'GFLOP':>10}{'ms':>10}{'of peak':>9}")
    for name, part in parts.items():
        part["share_of_peak"] = part["sec_at_peak"] / part["sec"]
        share = f"{part['share_of_peak']:>8.1%}" if part["flop"] else f"{'-':>8}"
        print(f"    {name:20}{part['flop'] / 1e9:>10.2f}{1e3 * part['sec']:>10.1f} {share}")
    return parts


def measured_peaks(options: argparse.Namespace) -> dict[str, float]:
    """Best product of large matrices in float32 and bfloat16, FLOP/s."""
    size = 64 if options.shape == ["toy"] else PEAK_SIZE
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    return {name: matmul_peak(dtype, size, PEAK_REPEATS) for name, dtype in dtypes.items()}


def _words(peaks: dict[str, float]) -> str:
    return ", ".join(f"{peak / 1e9:.0f} GFLOP/s in {name}" for name, peak in peaks.items())


def step_section(options: argparse.Namespace) -> tuple[dict[str, Any], list[Bar]]:
    """A speech step against a text-only step."""
    found, bars = {}, []
    half = options.precision == "bf16"
    for name in options.shape:
        shape = SHAPES[name]
        print(f"\n{name}: {shape}")
        torch.manual_seed(0)
        model = speech_model(shape, options.attention)
        steps = {"speech": speech_step(model, shape, half), "text": text_step(model, shape, half)}
        times = alternate(steps, options.repeats)
        peaks = measured_peaks(options)
        parts = {step: print_parts(f"{step} step", steps[step], peaks) for step in steps}
        del steps, model
        ears = encoder_step(shape, options.attention, half)
        encoder_times = alternate({"encoder": ears}, options.repeats)["encoder"]
        parts["encoder"] = print_parts("encoder and projector, apart", ears, peaks)
        del ears
        whole = ratio(times["speech"], times["text"])
        blocks = parts["speech"].get("output blocks", {"sec": 0.0, "flop": 0.0})
        counted = parts["speech"]["total"]["flop"] / parts["text"]["total"]["flop"]
        bare = [t - blocks["sec"] for t in times["speech"]]
        result: dict[str, Any] = {
            "shape": dataclasses.asdict(shape),
            "speech_sec": Spread.of(times["speech"]),
            "text_sec": Spread.of(times["text"]),
            "ratio": whole,
            "ratio_without_output_blocks": ratio(bare, times["text"]),
            "flop_ratio": counted,
            "encoder_sec": Spread.of(encoder_times),
            "parts": parts,
            "peak_flops": peaks,
        }
        print(
            f"  speech step {result['speech_sec']} s, text-only step {result['text_sec']} s: ratio {whole}; "
            f"without output blocks {result['ratio_without_output_blocks']}; in FLOP {counted:.3f}\n"
            f"  encoder and projector besides: {result['encoder_sec']} s; measured peak: {_words(peaks)}"
        )
        bars.append(Bar(f"speech step / text-only step, {name}", whole.median, MAX_STEP_RATIO))
        found[name] = result
    return found, bars


def peer_section(options: argparse.Namespace) -> tuple[dict[str, Any], list[Bar]]:
    """Positions per second against PocketTTS."""
    name = "toy" if options.shape == ["toy"] else PEER_SHAPE
    # its rows: text, then speech alone
    prompt = 20 if name == PEER_SHAPE else SHAPES[name].num_prompt
    shape: Shape = dataclasses.replace(SHAPES[name], num_prompt=prompt, num_text=0)
    half = options.precision == "bf16"
    torch.manual_seed(0)
    peers = peer_steps(shape, half)
    ours = speech_step(speech_model(shape, options.attention), shape, half)
    print(f"\npeer: {shape}")
    steps = {"FlowOmni": ours, "PocketTTS": peers[False], "PocketTTS, distilling": peers[True]}
    times = alternate(steps, options.repeats)
    peaks = measured_peaks(options)
    parts = {step: print_parts(step, steps[step], peaks) for step in ("FlowOmni", "PocketTTS")}
    flops = {step: sum(flops_by_part(each).values()) for step, each in steps.items()}
    flops["PocketTTS, on average"] = _average(flops["PocketTTS"], flops["PocketTTS, distilling"])
    mixed = [
        _average(plain, distilling)
        for plain, distilling in zip(times["PocketTTS"], times["PocketTTS, distilling"], strict=True)
    ]
    times["PocketTTS, on average"] = mixed
    rates = {step: Spread.of([shape.num_positions / t for t in each]) for step, each in times.items()}
    ratios = {step: ratio(times[step], times["FlowOmni"]) for step in times if step != "FlowOmni"}
    print(f"  {'':24}{'GFLOP':>8}{'s a step':>26}{'positions/s':>32}{'FlowOmni is faster by':>26}")
    for step, each in times.items():
        factor = str(ratios[step]) if step in ratios else ""
        print(f"  {step:24}{flops[step] / 1e9:>8.1f}{Spread.of(each)!s:>26}{rates[step]!s:>32}{factor:>26}")
    print(f"  measured peak: {_words(peaks)}")
    result = {
        "shape": dataclasses.asdict(shape),
        "sec": {step: Spread.of(each) for step, each in times.items()},
        "positions_per_sec": rates,
        "ratios": ratios,
        "parts": parts,
        "flop": flops,
        "num_parameters": {step: each.num_parameters for step, each in steps.items()},
        "peak_flops": peaks,
    }
    opponents = {"PocketTTS, on average": "PocketTTS's", "PocketTTS": "PocketTTS's in steps that do not distil"}
    bars = [
        Bar(f"positions per second / {words}", ratios[step].median, MIN_PEER_RATIO, at_least=True)
        for step, words in opponents.items()
    ]
    return result, bars


def _average(plain: float, distilling: float) -> float:
    """Of PocketTTS's steps."""
    return (1 - DISTILLING_SHARE) * plain + DISTILLING_SHARE * distilling


def processes_section(options: argparse.Namespace) -> tuple[dict[str, Any], list[Bar]]:
    """Losses of two processes against one."""
    with TemporaryDirectory() as folder:
        result = two_processes(Path(folder))
    difference = result["largest_difference"]
    print(f"\ntwo processes: losses of {result['num_steps']} steps differ by at most {difference:.1e} of one process's")
    return result, [Bar("losses of two processes, relative difference", difference, MAX_LOSS_DIFFERENCE)]


def padding_section(options: argparse.Namespace) -> tuple[dict[str, Any], list[Bar]]:
    """Padding in the batches of a corpus."""
    for path, what in ((options.data, "corpus"), (MODEL, "model")):
        if not Path(path).exists():
            print(f"\npadding: not measured, there is no {what} {path}")
            return {"missing": path}, []
    found = padding_of(corpus_stage(options.data, MODEL), options.num_batches)
    titles = {"padding_share": "positions", "padding_share_heard": "heard frames"}
    words = ", ".join(f"{found[name]:.1%} of the {title}" for name, title in titles.items() if name in found)
    print(f"\npadding in {options.num_batches} batches of {options.data}: {words}")
    bars = [Bar(f"padding, {title}", found[name], MAX_PADDING) for name, title in titles.items() if name in found]
    return {"num_batches": options.num_batches, **found}, bars


def memory_section(options: argparse.Namespace) -> tuple[dict[str, Any], list[Bar]]:
    """What the plan says against what a fresh process grows by."""
    found, bars = {}, []
    toy = options.shape == ["toy"]
    print(
        "\nmemory in MiB; peak: by how much a new process has grown in two steps of two micro-batches, as the system"
        "\ncounts it; by part: what autograd keeps for the backward pass. Self-distillation is off."
    )
    for name, hears, rows, sec, half in TOY_MEMORY_CASES if toy else MEMORY_CASES:
        if name not in options.shape:
            continue
        case = Case(SHAPES[name], hears, rows, sec, half, options.attention)
        title = f"{name}, {'heard' if hears else 'spoken'}, {'bf16' if half else 'float32'}"
        memory = measure(case) if toy else measure_apart(case, options.threads)
        print_memory(f"{title}, {rows} rows of {sec:g} s", memory)
        found[title] = dataclasses.asdict(memory)
        if memory.peak:
            bars.append(Bar(f"|plan / measured - 1|, {title}", abs(memory.deviation), MAX_PLAN_DEVIATION))
    return found, bars


def print_memory(title: str, memory: Memory) -> None:
    """Part by part, and the whole."""
    print(f"  {title}\n    {'':26}{'plan':>10}{'measured':>10}{'weights and optimizer':>24}")
    for part in dict.fromkeys([*memory.of_parts, *memory.planned, *memory.kept]):
        planned, kept, states = (of.get(part, 0) / MIB for of in (memory.planned, memory.kept, memory.of_parts))
        print(f"    {part:26}{planned:>10.1f}{kept:>10.1f}{states:>24.1f}")
    print(f"    {'weights and optimizer':26}{memory.planned_states / MIB:>10.1f}{memory.states / MIB:>10.1f}")
    if memory.peak:
        peaks = f"{memory.planned_peak / MIB:>10.1f}{memory.peak / MIB:>10.1f}"
        print(f"    {'peak':26}{peaks}   plan {memory.deviation:+.1%}")


SECTIONS: dict[str, benchmark.Section] = {
    "step": step_section,
    "peer": peer_section,
    "processes": processes_section,
    "padding": padding_section,
    "memory": memory_section,
}


# ----------------------------------------------------------------------------------------------------------- command


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(prog="python -m scripts.bench_training", description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--only", nargs="+", choices=SECTIONS, default=list(SECTIONS), metavar="SECTION", help="%(choices)s"
    )
    parser.add_argument(
        "--shape",
        nargs="+",
        choices=SHAPES,
        default=[name for name in SHAPES if name != "toy"],
        metavar="SHAPE",
        help="of sections step and memory: %(choices)s (default: all but toy)",
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: %(default)s")
    parser.add_argument("--repeats", type=int, default=5, help="rounds of alternating steps (default: %(default)s)")
    parser.add_argument("--precision", choices=("no", "bf16"), default="no", help="default: %(default)s")
    parser.add_argument("--attention", choices=("eager", "sdpa"), default="eager", help="ours (default: %(default)s)")
    parser.add_argument("--data", default="data/talk", help="corpus of section padding (default: %(default)s)")
    parser.add_argument("--num-batches", type=int, default=12, help="of section padding (default: %(default)s)")
    parser.add_argument("--json", help="file for everything that was measured")
    options = parser.parse_args(arguments)
    for name in ("threads", "repeats", "num_batches"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} is {getattr(options, name)}; it must be at least 1")
    return options


def bench(options: argparse.Namespace) -> int:
    """Run the sections, print, write; 1 if a bar was missed."""

    def start() -> dict[str, Any]:
        peaks = measured_peaks(options)
        print(f"{options.threads} threads, torch {torch.__version__}; matrix products: {_words(peaks)}")
        return {"peak_flops": peaks}

    return benchmark.bench(options, SECTIONS, start)


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status: 1 if a bar was missed, 2 after bad input."""
    disable_progress_bar()
    return exit_status(lambda: bench(parse(arguments)))


if __name__ == "__main__":
    sys.exit(main())
