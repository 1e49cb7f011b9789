"""Your own data: check it, bring it into our format, and compute once what training would compute again and again.

    python -m training.prepare --check data/mine                      every bad line with its reason; status 2 if any
    python -m training.prepare --folder recordings --out data/mine    an audio folder -> manifest
    python -m training.prepare --dataset USER/NAME --out data/mine    a data set of the Hugging Face Hub -> manifest
    python -m training.prepare --moshi data.jsonl --out data/mine     stereo with word times -> manifest
    python -m training.prepare --manifest data/mine --model MODEL --out data/mine-prepared    features and tokens

The last one runs on several processes of its own (`--workers`) and under `accelerate launch`, and goes on where a
killed one stopped: shards are written beside their place and moved there. Stage `speech` takes the folder that it makes
in place of the manifest and trains on the same numbers as from the recordings.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, multiprocessing
from tqdm.auto import tqdm

from flowomni.build import load_model
from flowomni.encoder import HeardFeatures
from flowomni.tokenizers import SpeechTokenizer

from .check import check_manifest
from .formats import Line, from_dataset, from_folder, from_moshi, parse_columns, with_splits
from .manifest import manifest_file, parse_line, read_manifest
from .recordings import (
    INDEX,
    Clip,
    Kind,
    Recording,
    check_fingerprint,
    fingerprint,
    heard_features,
    recording_key,
    spoken_tokens,
)

CLIPS_PER_SHARD = 256


@dataclass(frozen=True)
class Item:
    """One thing to compute."""

    key: str
    kind: Kind
    recording: Recording


@dataclass(frozen=True)
class Shard:
    """One file of a prepared folder."""

    name: str
    items: tuple[Item, ...]


# ---------------------------------------------------------------------------------------------------------- preparing


def prepare(
    manifest: str | Path,
    out: str | Path,
    tokenizer: SpeechTokenizer,
    features: HeardFeatures | None,
    num_workers: int = 1,
    clips_per_shard: int = CLIPS_PER_SHARD,
) -> Path:
    """Features of whatever a user says and speech tokens of whatever an assistant says, in `out`.

    Process r of n (under `accelerate launch`) makes shards r, r + n, ...; whoever finishes the last one writes
    index.json, without which nothing reads the folder.

    Args:
        features: of the model's encoder; None for a model without ears.
        num_workers: processes of each launched process; 1 works in it.

    Raises:
        ValueError: the manifest is bad, a recording is, or `out` holds shards of other data or for another model.
    """
    out, state = Path(out), PartialState()
    out.mkdir(parents=True, exist_ok=True)
    manifest = manifest_file(manifest)
    if manifest.parent.resolve() == out.resolve():
        raise ValueError(f"--out {out} is the folder of the manifest: choose another, so that it stays")
    tokenizer = tokenizer.to(state.device).eval()
    known = fingerprint(tokenizer, features)
    shards = plan_shards(manifest, out, features is not None, clips_per_shard)
    marks = {"fingerprint": known, "data": _digest(shards)}
    todo = [
        shard for shard in shards[state.process_index :: state.num_processes] if not _is_done(out / shard.name, marks)
    ]
    mine = sum(len(shard.items) for shard in todo)
    with tqdm(total=mine, desc="prepare", unit="clip", disable=not state.is_main_process) as progress:
        for num_clips in _make(todo, out, marks, tokenizer, features, num_workers):
            progress.update(num_clips)
    if all((out / shard.name).is_file() for shard in shards):
        _write(out / "manifest.jsonl", "".join(_moved(manifest, out)).encode())
        index = {"fingerprint": known, "shards": {s.name: [item.key for item in s.items] for s in shards}}
        _write(out / INDEX, json.dumps(index).encode())
    return out


def plan_shards(manifest: Path, out: Path, hears: bool, clips_per_shard: int) -> list[Shard]:
    """Every recording once, in the manifest's order: the same on every process and in every run."""
    items: dict[str, Item] = {}
    for conversation in read_manifest(manifest):
        for turn in conversation.turns:
            kind: Kind = "heard" if turn.role == "user" else "spoken"
            if turn.audio is not None and (hears or kind == "spoken"):
                key = recording_key(kind, turn.audio, out)
                items.setdefault(key, Item(key, kind, turn.audio))
    found = list(items.values())
    if not found:
        raise ValueError(f"{manifest}: no recording in it, so that there is nothing to prepare")
    starts = range(0, len(found), clips_per_shard)
    return [
        Shard(f"shard-{index:05d}.safetensors", tuple(found[start : start + clips_per_shard]))
        for index, start in enumerate(starts)
    ]


def _digest(shards: Sequence[Shard]) -> str:
    """Of what is to be computed: names and sizes of the files."""
    found = hashlib.sha256()
    for shard in shards:
        for item in shard.items:
            path = item.recording.path if isinstance(item.recording, Clip) else item.recording
            size = path.stat().st_size if path.is_file() else -1
            found.update(f"{shard.name} {item.key} {size}\n".encode())
    return found.hexdigest()[:24]


def _is_done(file: Path, marks: dict[str, Any]) -> bool:
    """Whether a shard is there already; ValueError if it was made of other data or for another model."""
    if not file.is_file():
        return False
    with safe_open(file, framework="pt") as shard:
        made = json.loads(shard.metadata()["prepared"])
    remedy = "delete that folder, or give another --out"
    check_fingerprint(made["fingerprint"], marks["fingerprint"], file.parent, remedy)
    if made["data"] != marks["data"]:
        raise ValueError(f"{file.parent} was begun with other recordings or another shard size: {remedy}")
    return True


Worker = tuple[Path, dict[str, Any], SpeechTokenizer, HeardFeatures | None]


def _make(
    shards: Sequence[Shard],
    out: Path,
    marks: dict[str, Any],
    tokenizer: SpeechTokenizer,
    features: HeardFeatures | None,
    num_workers: int,
) -> Iterator[int]:
    """Make shards, in any order; yields the number of clips of each."""
    num_workers = min(num_workers, len(shards))
    if num_workers <= 1:
        worker = (out, marks, tokenizer, features)
        yield from (_make_shard(shard, worker) for shard in shards)
        return
    # Not forked: a process that has run torch holds threads and locks that do not survive it.
    context = multiprocessing.get_context("spawn")
    with context.Pool(num_workers, _start, (out, marks, tokenizer, features)) as pool:
        yield from pool.imap_unordered(_in_worker, shards)


_worker: Worker | None = None  # of a worker process


def _start(*worker: Any) -> None:
    global _worker
    torch.set_num_threads(1)  # the workers are the threads
    _worker = worker


def _in_worker(shard: Shard) -> int:
    assert _worker is not None, "the pool's initializer makes it"
    return _make_shard(shard, _worker)


def _make_shard(shard: Shard, worker: Worker) -> int:
    out, marks, tokenizer, features = worker
    tensors: dict[str, Tensor] = {}
    for item in shard.items:
        if item.kind == "heard":
            assert features is not None
            tensors[item.key] = torch.from_numpy(heard_features(item.recording, features))
        else:
            tensors[item.key] = spoken_tokens(item.recording, tokenizer).contiguous()
    _write(out / shard.name, save(tensors, {"prepared": json.dumps(marks)}))
    return len(shard.items)


def _write(file: Path, content: bytes) -> None:
    """The file appears whole or not at all."""
    partial = file.with_name(f".{file.name}.{os.getpid()}.part")
    try:
        with open(partial, "wb") as opened:
            opened.write(content)
            opened.flush()
            os.fsync(opened.fileno())
        os.replace(partial, file)
    finally:
        partial.unlink(missing_ok=True)


def _moved(manifest: Path, out: Path) -> Iterator[str]:
    """The manifest's lines with audio paths relative to `out`, and durations, which nobody can look up elsewhere."""
    for line in manifest.read_text(encoding="utf-8").split("\n"):
        if not line.strip():
            continue
        values = json.loads(line)
        for turn, parsed in zip(values["turns"], parse_line(line, manifest.parent).turns, strict=True):
            audio = turn.get("audio")
            if audio:
                turn["duration_sec"] = parsed.duration_sec
            if isinstance(audio, str) and audio:
                turn["audio"] = os.path.relpath(manifest.parent / audio, out)
            elif audio:
                audio["path"] = os.path.relpath(manifest.parent / audio["path"], out)
        yield json.dumps(values, ensure_ascii=False) + "\n"


# ------------------------------------------------------------------------------------------------------- command line


def convert(lines: Iterator[Line], out: Path, valid_percent: float) -> int:
    """Write the manifest of converted data and return the number of its conversations."""
    if (out / "manifest.jsonl").exists():
        raise ValueError(f"--out {out} has a manifest.jsonl already: choose another folder, or delete it")
    out.mkdir(parents=True, exist_ok=True)
    found = with_splits(tqdm(lines, desc="convert", unit=" conversations", disable=None), valid_percent)
    if not found:
        raise ValueError("there is no conversation in it")
    _write(out / "manifest.jsonl", "".join(json.dumps(v, ensure_ascii=False) + "\n" for v in found).encode())
    return len(found)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="training.prepare", description="Check, convert and precompute data.")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--check", metavar="MANIFEST", help="report every bad line, totals and durations")
    what.add_argument("--folder", type=Path, help="convert an audio folder (metadata.csv or .jsonl, or .txt files)")
    what.add_argument("--dataset", metavar="NAME", help="convert a data set of the Hugging Face Hub, or parquet files")
    what.add_argument("--moshi", type=Path, metavar="JSONL", help="convert stereo recordings with word times")
    what.add_argument("--manifest", help="compute features and speech tokens for --model")
    parser.add_argument("--out", type=Path, help="folder to write")
    parser.add_argument("--model", help="FlowOmni model that will be trained on what --manifest holds")
    parser.add_argument("--llm", help="with --check: model whose text tokenizer must be able to encode the text")
    parser.add_argument("--workers", type=int, default=0, help="processes, with --check threads; 0: one for each CPU")
    parser.add_argument("--clips-per-shard", type=int, default=CLIPS_PER_SHARD, help="default: %(default)s")
    parser.add_argument(
        "--columns", nargs="+", default=[], metavar="SIDE=COLUMN",
        help="what the columns are, such as user.audio=question assistant.audio=reply assistant.text=reply_text; "
        "by default every row is one recording with its words in the assistant's voice",
    )  # fmt: skip
    parser.add_argument("--config", help="with --dataset: its configuration")
    parser.add_argument("--split", default="train", help="with --dataset: its split (default: train)")
    parser.add_argument("--streaming", action="store_true", help="with --dataset: download no more than is read")
    parser.add_argument("--limit", type=int, help="convert at most so many rows")
    parser.add_argument("--valid-percent", type=float, default=2.0, help="share held out (default: %(default)s)")
    return parser


def _run(options: argparse.Namespace) -> int:
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if options.check:
        report = check_manifest(options.check, options.llm, options.workers or cpus)
        print("\n".join(report.lines()))
        return 2 if report.problems else 0
    if options.out is None:
        raise ValueError("--out is missing: give a folder to write")
    if options.manifest:
        if not options.model:
            raise ValueError("--model is missing: features and speech tokens are those of a model")
        model, processor = load_model(options.model)
        state = PartialState()
        num_workers = options.workers or (1 if state.device.type != "cpu" else max(1, cpus // state.num_processes))
        prepare(
            options.manifest,
            options.out,
            model.speech_tokenizer,
            processor.heard_features,
            num_workers,
            options.clips_per_shard,
        )
        if state.is_main_process:
            finished = (options.out / INDEX).is_file()
            print(f"prepared: {options.out}" if finished else "the other processes are still at work")
        return 0
    print(f"{convert(_lines(options), options.out, options.valid_percent)} conversations in {options.out}")
    return 0


def _lines(options: argparse.Namespace) -> Iterator[Line]:
    columns = parse_columns(options.columns)
    if options.folder:
        return from_folder(options.folder, options.out, columns, options.limit)
    if options.moshi:
        return from_moshi(options.moshi, options.out, options.limit)
    return from_dataset(
        options.dataset, options.out, columns, options.limit, options.config, options.split, options.streaming
    )


def main(args: list[str] | None = None) -> None:
    """Command line. Bad data and bad options end with status 2."""
    try:
        status = _run(_parser().parse_args(args))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        status = 2
    except KeyboardInterrupt:
        print("\nstopped: the same command goes on", file=sys.stderr)
        status = 130
    raise SystemExit(status)


if __name__ == "__main__":
    main()
