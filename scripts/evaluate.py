"""How well a model answers the spoken questions of a corpus, by family and by voice group.

    python -m scripts.evaluate --model flowomni/models/flowomni-tiny --out runs/evaluation

Prints tables and writes results.json (every number, every question) and index.html (the tables, and audio to listen to;
one file, nothing outside it). What is measured, each with a 95 % bootstrap interval over questions:

    text        the model's text equals the right answer, word for word
    digits      share of the digits right, in the family `digits`
    own         word error rate (WER) of the recognised speech against the model's own text: is it intelligible?
    right       WER of the recognised speech against the right answer: is it also correct?
    floor       WER of the recognised reference recording of the right answer: the recogniser's own errors
    excess      own - floor, both on the same resampled questions
    DNSMOS      predicted mean opinion score (overall) of the answer, of the reference, and their difference
    speech/s    seconds of speech per second of computing, at the batch size in use

Two recognisers: a loop over the words of the corpus's answers, and open vocabulary. With --text-only nothing is spoken,
which is soon done for every question of a corpus: text and digits alone are measured, of answers that do not hear
themselves speak.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from flowomni.commands import exit_status
from flowomni.evaluation import Clip, Heard, Interval, bootstrap_interval, listen, right_share, word_error_rate
from scripts.evaluation_page import listening_page
from training.manifest import Conversation, read_manifest
from training.recordings import Recording, playable, read_recording
from training.talk_text import DIGITS, HELD_OUT_FAMILIES

if TYPE_CHECKING:
    from flowomni.api import Answer, FlowOmni

REFERENCE_RATE_HZ = 24_000
VOICE_GROUPS = ("trained", "unseen", "human", "unseen_human")
# Title -> columns: (metric, heading, factor for display, digits after the point).
TABLES: dict[str, list[tuple[str, str, float, int]]] = {
    "Text, voice and speed": [
        ("text_accuracy", "text %", 100, 1),
        ("digit_accuracy", "digits %", 100, 1),
        ("dnsmos_answer", "DNSMOS", 1, 2),
        ("dnsmos_reference", "reference", 1, 2),
        ("dnsmos_difference", "difference", 1, 2),
        ("speech_per_sec", "speech/s", 1, 2),
    ],
    "Word error rate in %, recogniser with a loop over the corpus's words": [
        ("wer_own_loop", "own", 100, 1),
        ("wer_right_loop", "right", 100, 1),
        ("wer_floor_loop", "floor", 100, 1),
        ("wer_excess_loop", "excess", 100, 1),
    ],
    "Word error rate in %, recogniser with open vocabulary": [
        ("wer_own_open", "own", 100, 1),
        ("wer_right_open", "right", 100, 1),
        ("wer_floor_open", "floor", 100, 1),
        ("wer_excess_open", "excess", 100, 1),
    ],
}


@dataclass(frozen=True)
class Scored:
    """One question, what the model answered, and what was heard in the answer and in the reference recording.

    Attributes:
        compute_sec: of its batch, divided by the batch's rows.
        heard, reference: None where nothing was spoken.
    """

    item: Conversation
    answer: Answer
    compute_sec: float
    heard: Heard | None = None
    reference: Heard | None = None


# ------------------------------------------------------------------------------------------------- choosing, answering


def choose(items: Sequence[Conversation], num_per_group: int | None) -> list[Conversation]:
    """Up to `num_per_group` questions of each family and voice group, spread evenly over those there are; None: all."""
    if num_per_group is None:
        return list(items)
    if num_per_group < 1:
        raise ValueError(f"num_per_group is {num_per_group}; it must be at least 1")
    cells: defaultdict[tuple[str, str], list[int]] = defaultdict(list)
    for index, item in enumerate(items):
        cells[item.family, item.voice_group].append(index)
    chosen = [
        cell[i * len(cell) // min(num_per_group, len(cell))]
        for cell in cells.values()
        for i in range(min(num_per_group, len(cell)))
    ]
    return [items[index] for index in sorted(chosen)]


def answer_all(
    omni: FlowOmni,
    items: Sequence[Conversation],
    batch_size: int,
    seed: int,
    sampling: dict[str, Any],
    speak: bool = True,
) -> tuple[list[Answer], list[float]]:
    """The model's answers, and the seconds each took: its batch's, divided by the rows."""
    from flowomni.api import Question

    answers: list[Answer] = []
    seconds: list[float] = []
    with tqdm(total=len(items), desc="answering", unit="question") as progress:
        for start in range(0, len(items), batch_size):
            batch = items[start : start + batch_size]
            questions = [
                Question(playable(i.question.audio)) if i.question.audio else Question(text=i.question.text)
                for i in batch
            ]
            began = time.perf_counter()
            answers += omni.answers(questions, speak=speak, batch_size=batch_size, seed=seed, sampling=sampling)
            seconds += [(time.perf_counter() - began) / len(batch)] * len(batch)
            progress.update(len(batch))
    return answers, seconds


# ------------------------------------------------------------------------------------------------------------- scoring


def score(
    items: Sequence[Conversation],
    answers: Sequence[Answer],
    compute_sec: Sequence[float],
    listener: Callable[[Sequence[Clip]], Iterable[Heard]],
) -> list[Scored]:
    """Listen to the answers and, once each, to the reference recordings. `listener` hears clips in order.

    Raises:
        ValueError: an item has no reference recording, or it cannot be read.
    """
    references: dict[Recording, Clip] = {}
    for item in items:
        path = reference_path(item)
        if path not in references:
            references[path] = (read_recording(path, REFERENCE_RATE_HZ).wav_S, REFERENCE_RATE_HZ)
    clips = [*references.values(), *((answer.wav_S, answer.sample_rate_hz) for answer in answers)]
    heard = list(tqdm(listener(clips), desc="listening", unit="clip", total=len(clips)))
    of_reference = dict(zip(references, heard[: len(references)], strict=True))
    of_answers = heard[len(references) :]
    return [
        Scored(item, answer, seconds, one, of_reference[reference_path(item)])
        for item, answer, seconds, one in zip(items, answers, compute_sec, of_answers, strict=True)
    ]


def reference_path(item: Conversation) -> Recording:
    """The recording of the right answer; ValueError if there is none."""
    if item.answer.audio is None:
        raise ValueError(f"{item.id} has no recording of its answer to compare with: add `audio` to its last turn")
    return item.answer.audio


def measure(rows: Sequence[Scored], seed: int = 0) -> dict[str, Interval]:
    """Every metric of questions, all spoken or none. A metric without a question (digits elsewhere) has `num` 0."""
    right = [row.item.answer.text for row in rows]
    own = [row.answer.text for row in rows]
    digits = [row for row in rows if row.item.family == "digits"]
    found = {
        "text_accuracy": bootstrap_interval(_floats(a == b for a, b in zip(own, right, strict=True)), seed=seed),
        "digit_accuracy": bootstrap_interval(
            *right_share([row.item.answer.text for row in digits], [row.answer.text for row in digits], DIGITS),
            seed=seed,
        ),
    }
    spoken = [(row.heard, row.reference) for row in rows if row.heard and row.reference]
    if not spoken:
        return found
    for name in ("loop", "open"):
        heard = [getattr(answer, name) for answer, _ in spoken]
        errors = {
            "own": word_error_rate(own, heard),
            "right": word_error_rate(right, heard),
            "floor": word_error_rate(right, [getattr(reference, name) for _, reference in spoken]),
        }
        for key, each in errors.items():
            found[f"wer_{key}_{name}"] = bootstrap_interval(each.errors_N, each.words_N, seed=seed)
        floor = (errors["floor"].errors_N, errors["floor"].words_N)
        found[f"wer_excess_{name}"] = bootstrap_interval(
            errors["own"].errors_N, errors["own"].words_N, minus=floor, seed=seed
        )
    answered_N = _floats(answer.quality.overall for answer, _ in spoken)
    reference_N = _floats(reference.quality.overall for _, reference in spoken)
    found["dnsmos_answer"] = bootstrap_interval(answered_N, seed=seed)
    found["dnsmos_reference"] = bootstrap_interval(reference_N, seed=seed)
    found["dnsmos_difference"] = bootstrap_interval(answered_N - reference_N, seed=seed)
    found["speech_per_sec"] = bootstrap_interval(
        _floats(row.answer.answer_sec for row in rows), _floats(row.compute_sec for row in rows), seed=seed
    )
    return found


def summarise(rows: Sequence[Scored], seed: int = 0) -> dict[str, dict[str, Interval]]:
    """Group -> metrics: all questions, each voice group, the same of the held-out families alone, each family."""
    seen = {row.item.voice_group for row in rows}
    voices = [voice for voice in VOICE_GROUPS if voice in seen] + sorted(seen - set(VOICE_GROUPS))
    held_out = [row for row in rows if row.item.family in HELD_OUT_FAMILIES]
    groups = {"all": list(rows)}
    for suffix, some in (("", rows), (", held-out families", held_out)):
        groups |= {f"voice {voice}{suffix}": [row for row in some if row.item.voice_group == voice] for voice in voices}
    for row in rows:
        groups.setdefault(f"family {row.item.family}", []).append(row)
    return {name: measure(some, seed) for name, some in groups.items() if some}


def _floats(values: Any) -> np.ndarray:
    return np.array([float(value) for value in values])


# ------------------------------------------------------------------------------------------------------------- writing


def cells(metrics: dict[str, Interval], columns: Sequence[tuple[str, str, float, int]]) -> list[str]:
    """One row of a table: `value [low, high]`, or `-` where there is nothing to measure."""
    found = []
    for metric, _, factor, digits in columns:
        each = metrics[metric]
        low, value, high = (f"{factor * number:.{digits}f}" for number in (each.low, each.value, each.high))
        found.append(f"{value} [{low}, {high}]" if each.num else "-")
    return found


def tables_of(summary: dict[str, dict[str, Interval]]) -> dict[str, list[tuple[str, str, float, int]]]:
    """`TABLES`, of what was measured."""
    measured = summary["all"]
    found = {title: [column for column in columns if column[0] in measured] for title, columns in TABLES.items()}
    return {title: columns for title, columns in found.items() if columns}


def print_tables(summary: dict[str, dict[str, Interval]]) -> None:
    """The tables as text. `n` is the number of questions."""
    width = max(map(len, summary))
    for title, columns in tables_of(summary).items():
        print(f"\n{title}\n{'':{width}} {'n':>5}" + "".join(f"{heading:>24}" for _, heading, _, _ in columns))
        for name, metrics in summary.items():
            row = "".join(f"{cell:>24}" for cell in cells(metrics, columns))
            print(f"{name:{width}} {metrics['text_accuracy'].num:>5}{row}")


def results(summary: dict[str, dict[str, Interval]], rows: Sequence[Scored], run: dict[str, Any]) -> dict[str, Any]:
    """Everything as JSON values. A metric that has no question is left out of its group."""
    return {
        "run": run,
        "groups": {
            name: {metric: dataclasses.asdict(each) for metric, each in metrics.items() if each.num}
            for name, metrics in summary.items()
        },
        "questions": [
            {
                "id": row.item.id,
                "family": row.item.family,
                "voice_group": row.item.voice_group,
                "question": row.item.question.text,
                "right_answer": row.item.answer.text,
                "text": row.answer.text,
                **{
                    name: dataclasses.asdict(each)
                    for name, each in (("heard", row.heard), ("reference", row.reference))
                    if each is not None
                },
                "answer_sec": row.answer.answer_sec,
                "first_audio_ms": row.answer.first_audio_ms,
                "compute_sec": row.compute_sec,
            }
            for row in rows
        ],
    }


def write_text(path: Path, text: str) -> None:
    """Whole or not at all."""
    temporary = path.with_name(f".{path.name}.part")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


# ------------------------------------------------------------------------------------------------------------- command


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m scripts.evaluate", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", help="model folder (default: the model in the box)")
    parser.add_argument("--manifest", default="data/talk/manifest.jsonl", help="corpus (default: %(default)s)")
    parser.add_argument("--split", default="test", help="default: %(default)s")
    parser.add_argument("--num-per-group", type=int, help="questions of each family and voice group (default: all)")
    parser.add_argument("--text-only", action="store_true", help="nothing is spoken: text alone, soon done")
    parser.add_argument("--out", default="runs/evaluation", help="folder for the results (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=8, help="questions answered at once (default: %(default)s)")
    parser.add_argument("--num-workers", type=int, default=2, help="processes that listen (default: %(default)s)")
    parser.add_argument("--device", help="of the model (default: a GPU if there is one)")
    parser.add_argument("--dtype", default="float32", help="of the language model (default: %(default)s)")
    parser.add_argument("--int8", action="store_true", help="int8 weights: what do they cost?")
    parser.add_argument("--seed", type=int, default=0, help="of the sampled speech (default: %(default)s)")
    parser.add_argument("--num-steps", type=int, help="solver steps (default of these four: the head's)")
    parser.add_argument("--solver", help="euler, midpoint, dopri5 or map")
    parser.add_argument("--temperature", type=float)
    parser.add_argument("--guidance", type=float)
    options = parser.parse_args(arguments)
    for name in ("batch_size", "num_workers"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} is {getattr(options, name)}; it must be at least 1")
    return options


def evaluate(options: argparse.Namespace) -> None:
    """Run the model, listen, print and write.

    Raises:
        ValueError, OSError: a file or an option is bad; the message says which and what to do.
    """
    every = read_manifest(options.manifest)
    items = choose([item for item in every if item.split == options.split], options.num_per_group)
    if not items:
        splits = ", ".join(sorted({item.split for item in every}))
        raise ValueError(f"--split is {options.split}, but {options.manifest} has only {splits}")
    words = sorted({word for item in every for word in item.answer.text.split()})
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)

    from flowomni.api import FlowOmni
    from flowomni.devices import default_device

    names = ("num_steps", "solver", "temperature", "guidance")
    sampling = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    device = options.device or default_device()
    omni = FlowOmni.from_pretrained(options.model, device, dtype=options.dtype, int8=options.int8)
    speak = not options.text_only
    answers, seconds = answer_all(omni, items, options.batch_size, options.seed, sampling, speak)
    if speak:
        rows = score(items, answers, seconds, partial(listen, words=words, num_workers=options.num_workers))
    else:
        rows = [Scored(*each) for each in zip(items, answers, seconds, strict=True)]
    summary = summarise(rows)
    print_tables(summary)
    run = {
        "model": options.model or "the model in the box",
        "manifest": str(options.manifest),
        "split": options.split,
        "num_questions": len(items),
        "batch_size": options.batch_size,
        "device": device,
        "dtype": options.dtype,
        "int8": options.int8,
        "seed": options.seed,
        "sampling": sampling,
        "text_only": options.text_only,
    }
    # allow_nan: a number that is none would make the file unreadable for anything but Python.
    write_text(out / "results.json", json.dumps(results(summary, rows, run), indent=1, allow_nan=False) + "\n")
    if not speak:
        print(f"\nwrote {out / 'results.json'}")
        return
    tables = {
        title: (
            ["", "n", *(heading for _, heading, _, _ in columns)],
            [[name, str(m["text_accuracy"].num), *cells(m, columns)] for name, m in summary.items()],
        )
        for title, columns in TABLES.items()
    }
    write_text(out / "index.html", listening_page(run, tables, rows))
    print(f"\nwrote {out / 'results.json'} and {out / 'index.html'}")


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status: 2 after bad input, with one line that says what is wrong."""
    return exit_status(lambda: evaluate(parse(arguments)))


if __name__ == "__main__":
    sys.exit(main())
