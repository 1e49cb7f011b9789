"""How much of speech each speech tokenizer keeps, on speech like its training's and on speech that it never heard.

    python -m scripts.evaluate_tokenizers           # every runs/tokenizers/*/final, and that of the model in the box
    python -m scripts.evaluate_tokenizers vae=runs/vae/final mimi=kyutai/mimi,num_codebooks=8 --num 40

Every tokenizer is given the same audio: answers of the corpus that no tokenizer trained on (by the rule of
`training.stages.answers`), the same altered (`flowomni.evaluation.shifts`), questions of unseen synthetic voices, and
digits read by people. Prints tables and writes results.json, robustness.png, bitrate.png and index.html (with audio;
one file, nothing outside it). Each number has a 95 % bootstrap interval over clips; differences are paired by clip.

    WER, WIL       word error rate and word information lost, by a recogniser with a loop over the words of the corpus's
                   answers, of its questions, or over the digits
    over ceiling   WER less that of the tokenizer's own vocoder on the true mel, which has no bottleneck
    over untouched WER less that of the audio itself, altered as it is
    STOI, PESQ, mel   against what the tokenizer was given: of altered speech the altered audio, noise and all. So one
                   that took the noise away would be marked down
    DNSMOS         predicted mean opinion score (overall), of the sound alone
    codes          share of each codebook's codes in use, and the perplexity, mean over codebooks
    encode, decode, stream   seconds of sound per second of computing: the whole clip to tokens, all tokens to sound at
                   once, token by token; on one thread and on two, median of several turns. Encoding has no stream
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from tqdm import tqdm

from flowomni.api import BUNDLED_MODEL
from flowomni.build import is_whole_model, load_part_tokenizer
from flowomni.commands import exit_status
from flowomni.evaluation import Interval
from flowomni.evaluation.shifts import SHIFTS, Shift
from flowomni.tokenizers import CodebookUse, SpeechTokenizer, TokenSpec, load_speech_tokenizer
from scripts.evaluate import write_text
from scripts.make_talk_corpus import DEFAULT_FSDD
from scripts.tokenizer_conditions import ANSWERS, HUMAN, UNSEEN, Condition, conditions
from scripts.tokenizer_page import Summary, bitrate_figure, comparison_page, png, robustness_figure
from scripts.tokenizer_scores import (
    RATE_HZ,
    Clip,
    Examination,
    Metrics,
    Score,
    Sound,
    Speed,
    Version,
    measure,
    measure_speed,
    resynthesise,
    use_of_codes,
)

RUNS = Path("runs/tokenizers")
NUM_THREADS = (1, 2)
SPEED_SEC = 5.0
NUM_SAMPLES = 2  # clips of each condition to listen to
COLUMNS = [  # metric, heading, factor for display, digits after the point
    ("wer", "WER %", 100, 1),
    ("wer_over_ceiling", "over ceiling", 100, 1),
    ("wer_over_untouched", "over untouched", 100, 1),
    ("wil", "WIL %", 100, 1),
    ("stoi", "STOI", 1, 3),
    ("pesq", "PESQ", 1, 2),
    ("mel_distance", "mel", 1, 3),
    ("dnsmos", "DNSMOS", 1, 2),
]
Table = tuple[list[str], list[list[str]]]


# ----------------------------------------------------------------------------------------------------------- tokenizers


def load_tokenizers(given: Sequence[str]) -> tuple[dict[str, SpeechTokenizer], dict[str, str]]:
    """Tokenizers and where they came from, by name. Each is given as `name=path[,kind=K][,num_codebooks=N]`.

    Raises:
        ValueError: naming the argument that is bad, or that holds no tokenizer.
    """
    if not given:
        found = sorted(RUNS.glob("*/final"))
        given = [*(f"{path.parent.name}={path}" for path in found), f"{BUNDLED_MODEL.name}={BUNDLED_MODEL}"]
    tokenizers: dict[str, SpeechTokenizer] = {}
    sources: dict[str, str] = {}
    for text in tqdm(given, desc="loading", unit="tokenizer", leave=False):
        name, path, options = _parse_tokenizer(text)
        if name in tokenizers:
            raise ValueError(f"two tokenizers are called {name!r}: give each a name of its own, as name=path")
        tokenizers[name] = _load(path, **options)
        sources[name] = text.partition("=")[2] if Path(path) != BUNDLED_MODEL else "the model in the box"
    return tokenizers, sources


def _parse_tokenizer(text: str) -> tuple[str, str, dict[str, Any]]:
    name, equals, rest = text.partition("=")
    path, *extra = rest.split(",")
    options: dict[str, Any] = {}
    for each in extra:
        key, _, value = each.partition("=")
        if key not in ("kind", "num_codebooks") or (key == "num_codebooks" and not value.isdecimal()):
            raise ValueError(f"tokenizer {text!r}: {each!r} is not kind=continuous, kind=discrete or num_codebooks=N")
        options[key] = int(value) if key == "num_codebooks" else value
    if not equals or not name or not path:
        raise ValueError(f"tokenizer {text!r}: give it as name=path, such as vae=runs/tokenizers/vae/final")
    return name, path, options


def _load(path: str, **options: Any) -> SpeechTokenizer:
    if not Path(path).exists() and not re.fullmatch(r"[\w.-]+/[\w.-]+", path):
        raise ValueError(f"{path}: no such folder, and no Hub id either")
    if Path(path).exists() and not any((Path(path) / name).is_file() for name in ("config.json", "config.yaml")):
        raise ValueError(f"{path}: no speech tokenizer there: it has no config.json")
    try:
        return load_part_tokenizer(path) if is_whole_model(path) else load_speech_tokenizer(path, **options)
    except SafetensorError as error:
        raise ValueError(f"{path}: the weights are damaged ({error}): copy them again") from None


# --------------------------------------------------------------------------------------------------------------- tables


@dataclass(frozen=True)
class Found:
    """Everything measured."""

    specs: dict[str, TokenSpec]
    speeds: dict[str, dict[int, Speed]]
    summary: dict[str, dict[Version, Metrics]]
    codes: dict[str, dict[str, list[CodebookUse]]]  # condition -> tokenizer -> codebooks
    scores: dict[str, list[tuple[Clip, dict[Version, Score]]]]
    samples: dict[str, list[list[tuple[str, str, np.ndarray, int]]]]


def _cell(each: Interval | None, factor: float, digits: int) -> str:
    if each is None:
        return "-"
    low, value, high = (f"{factor * number:.{digits}f}" for number in (each.low, each.value, each.high))
    return f"{value} [{low}, {high}]"


def tables(found: Found) -> dict[str, Table]:
    """Title -> headings and rows: the tokenizers, the word errors they add, and all scores by condition."""
    made = {"The tokenizers": _token_table(found), "WER over the ceiling's, in points": _overview(found.summary)}
    for condition, versions in found.summary.items():
        headings = ["", *(heading for _, heading, _, _ in COLUMNS), "codes % (perplexity)"]
        rows = []
        for version, metrics in versions.items():
            uses = [] if version.is_ceiling else found.codes[condition].get(version.tokenizer, [])
            share, perplexity = (np.mean([getattr(u, name) for u in uses] or [0]) for name in ("share", "perplexity"))
            cells = [_cell(metrics.get(metric), factor, digits) for metric, _, factor, digits in COLUMNS]
            rows.append([version.name, *cells, f"{100 * share:.0f} ({perplexity:.0f})" if uses else "-"])
        made[f"{condition}, {len(found.scores[condition])} clips"] = headings, rows
    return made


def _token_table(found: Found) -> Table:
    headings = ["", "kind", "a token", "tokens/s", "bits/s", "look-ahead ms"]
    headings += [f"{what}, {num} thr." for num in NUM_THREADS for what in ("encode", "decode", "stream")]
    rows = []
    for name, spec in found.specs.items():
        token = f"{spec.num_codebooks} x {spec.codebook_size}" if spec.num_codebooks else f"{spec.dim} numbers"
        bitrate = "-" if spec.bitrate is None else f"{spec.bitrate:.0f}"
        lookahead_ms = 1000 * spec.lookahead_samples / spec.sample_rate_hz
        timed = found.speeds.get(name)
        speeds = [f"{x:.1f}" for num in NUM_THREADS for x in dataclasses.astuple(timed[num])] if timed else ["-"] * 6
        rows.append([name, spec.kind, token, f"{spec.tokens_per_sec:.2f}", bitrate, f"{lookahead_ms:.0f}", *speeds])
    return headings, rows


def _overview(summary: Summary) -> Table:
    names = [version for version in next(iter(summary.values())) if version.tokenizer and not version.is_ceiling]
    rows = [
        [condition, *(_cell(versions[version].get("wer_over_ceiling"), 100, 1) for version in names)]
        for condition, versions in summary.items()
    ]
    return ["", *(version.name for version in names)], rows


def print_tables(made: Mapping[str, Table]) -> None:
    """The tables as text."""
    for title, (headings, rows) in made.items():
        widths = [max(map(len, column)) for column in zip(headings, *rows, strict=True)]
        print(f"\n{title}")
        for row in (headings, *rows):
            first, *others = (cell.rjust(width) for cell, width in zip(row, widths, strict=True))
            print("  ".join([row[0].ljust(widths[0]), *others]))


def results(found: Found, run: dict[str, Any]) -> dict[str, Any]:
    """Everything as JSON values; what has no score is left out."""
    return {
        "run": run,
        "tokenizers": {
            name: {
                **dataclasses.asdict(spec),
                "tokens_per_sec": spec.tokens_per_sec,
                "bitrate": spec.bitrate,
                "speed_by_threads": {
                    str(num): dataclasses.asdict(each) for num, each in found.speeds.get(name, {}).items()
                },
            }
            for name, spec in found.specs.items()
        },
        "conditions": {
            condition: {
                "num_clips": len(found.scores[condition]),
                "versions": {
                    version.name: {metric: dataclasses.asdict(each) for metric, each in metrics.items()}
                    for version, metrics in versions.items()
                },
                "codebooks": {
                    name: [dataclasses.asdict(use) for use in uses] for name, uses in found.codes[condition].items()
                },
                "clips": [_clip_values(clip, versions) for clip, versions in found.scores[condition]],
            }
            for condition, versions in found.summary.items()
        },
    }


def _clip_values(clip: Clip, versions: Mapping[Version, Score]) -> dict[str, Any]:
    scores = {}
    for version, score in versions.items():
        values = dataclasses.asdict(score.fidelity) if version.tokenizer else {}
        values = {name: value if np.isfinite(value) else None for name, value in values.items()}
        scores[version.name] = {"heard": score.heard, "dnsmos": score.dnsmos, **values}
    return {"id": clip.id, "text": clip.text, "scores": scores}


# -------------------------------------------------------------------------------------------------------------- command


def compare(
    tokenizers: Mapping[str, SpeechTokenizer], some: Sequence[Condition], num_workers: int, num_repeats: int, seed: int
) -> Found:
    """Resynthesise, listen and time."""
    found = Found({name: tokenizer.spec for name, tokenizer in tokenizers.items()}, {}, {}, {}, {}, {})
    with Examination(num_workers) as examine:
        for condition in tqdm(some, desc="conditions", unit="condition"):
            clips = condition.clips
            sounds = [resynthesise(clip, tokenizers) for clip in tqdm(clips, desc="resynthesis", leave=False)]
            scores = examine(sounds, condition.words)
            found.codes[condition.name] = use_of_codes(sounds, tokenizers)
            found.scores[condition.name] = list(zip(clips, scores, strict=True))
            found.summary[condition.name] = {v: measure(clips, scores, v, seed) for v in sounds[0]}
            found.samples[condition.name] = [_playable(*row) for row in zip(clips, sounds, scores, strict=True)][
                :NUM_SAMPLES
            ]
    if num_repeats:
        wav_S = np.concatenate([clip.wav_S for clip in some[0].clips])
        wav_S = np.resize(wav_S, int(SPEED_SEC * RATE_HZ))
        found.speeds.update(measure_speed(tokenizers, wav_S, NUM_THREADS, num_repeats))
    return found


def _playable(
    clip: Clip, sounds: Mapping[Version, Sound], scores: Mapping[Version, Score]
) -> list[tuple[str, str, np.ndarray, int]]:
    """Heading, words, samples and rate of each version. Ceilings that sound the same are there once."""
    found: dict[bytes, tuple[str, str, np.ndarray, int]] = {}
    for version, sound in sounds.items():
        words = (
            f"heard: {scores[version].heard}" if version.tokenizer else f"{clip.text} (heard: {scores[version].heard})"
        )
        found.setdefault(sound.wav_S.tobytes(), (version.name, words, sound.wav_S, sound.sample_rate_hz))
    return list(found.values())


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.evaluate_tokenizers", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument(
        "tokenizers",
        nargs="*",
        metavar="name=path",
        help="a tokenizer's folder or Hub id, or a FlowOmni model's folder; a public codec may add ,kind=continuous or "
        f",num_codebooks=8 (default: every {RUNS}/*/final, and the model in the box)",
    )
    parser.add_argument("--corpus", type=Path, default=Path("data/talk"), help="default: %(default)s")
    parser.add_argument("--fsdd", type=Path, help=f"folder of real spoken digits (default: {DEFAULT_FSDD} if there)")
    parser.add_argument("--no-shifts", action="store_true", help="leave out other pitch, other speed and noise")
    parser.add_argument("--num", type=int, default=40, help="utterances of each condition (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("runs/tokenizer_evaluation"), help="default: %(default)s")
    parser.add_argument("--num-workers", type=int, default=2, help="processes that listen (default: %(default)s)")
    parser.add_argument(
        "--num-repeats", type=int, default=5, help="turns of the timing (default: %(default)s; 0: none)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of noise, digits and intervals (default: %(default)s)")
    return parser.parse_args(arguments)


def evaluate(options: argparse.Namespace) -> None:
    """Load, compare, print and write.

    Raises:
        ValueError, OSError: a file or an option is bad; the message says which and what to do.
    """
    for name, least in (("num", 1), ("num_workers", 1), ("num_repeats", 0), ("seed", 0)):
        if getattr(options, name) < least:
            raise ValueError(f"--{name.replace('_', '-')} is {getattr(options, name)}; it must be at least {least}")
    tokenizers, sources = load_tokenizers(options.tokenizers)
    shifts = SHIFTS[:1] if options.no_shifts else SHIFTS
    some = list(conditions(options.corpus, options.fsdd, options.num, options.seed, shifts))
    options.out.mkdir(parents=True, exist_ok=True)
    missing = [name for name in (UNSEEN, HUMAN) if name not in {condition.name for condition in some}]
    if missing:
        print(f"there are no recordings of {' and of '.join(missing)}: left out")
    if find_spec("pesq") is None:
        print("PESQ is left out: install a C compiler, then pip install 'flowomni[pesq]'")
    load_before = os.getloadavg()[0]
    found = compare(tokenizers, some, options.num_workers, options.num_repeats, options.seed)
    made = tables(found)
    print_tables(made)
    run = {
        "tokenizers": sources,
        "corpus": str(options.corpus),
        "num": options.num,
        "seed": options.seed,
        "conditions_left_out": missing,
        "pesq_installed": find_spec("pesq") is not None,
        "num_repeats": options.num_repeats,
        "load_average_before": round(load_before, 2),
        "num_cores": os.cpu_count(),
        "torch": torch.__version__,
    }
    write(options.out, found, made, run, {condition.name: condition.shift for condition in some})


def write(
    out: Path, found: Found, made: Mapping[str, Table], run: dict[str, Any], shifts: Mapping[str, Shift | None]
) -> None:
    """results.json, the plots and index.html."""
    # allow_nan: a number that is none would make the file unreadable for anything but Python.
    write_text(out / "results.json", json.dumps(results(found, run), indent=1, allow_nan=False) + "\n")
    altered = {name: shift for name, shift in shifts.items() if shift is not None}
    plots = {"Words over bits": png(bitrate_figure(found.summary, found.specs, ANSWERS))}
    (out / "bitrate.png").write_bytes(plots["Words over bits"])
    if len(altered) > 1:
        title = "What other pitch, other speed and noise add"
        plots[title] = png(robustness_figure(found.summary, found.specs, altered))
        (out / "robustness.png").write_bytes(plots[title])
    about = [
        "Tokenizers: " + "; ".join(f"{name} ({source})" for name, source in run["tokenizers"].items()) + ".",
        f"Corpus: {run['corpus']}, up to {run['num']} clips a condition, seed {run['seed']}. In brackets: 95 % "
        "bootstrap interval over clips, differences paired by clip. STOI, PESQ and mel distance compare with what the "
        "tokenizer was given, altered as it was.",
        f"Speeds are seconds of sound per second, median of {run['num_repeats']} turns (0: not timed); load average "
        f"before the run: {run['load_average_before']} on {run['num_cores']} cores.",
    ]
    write_text(out / "index.html", comparison_page(about, made, plots, found.samples))
    print(f"\nwrote {out / 'results.json'}, the plots and {out / 'index.html'}")


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status: 2 after bad input, with one line that says what is wrong."""
    return exit_status(lambda: evaluate(parse(arguments)))


if __name__ == "__main__":
    sys.exit(main())
