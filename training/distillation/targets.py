"""What the teachers give for each answer of a corpus, kept on disk, and cut to the crops that a tokenizer trains on.

Everything is kept as vectors with times: a word's vector while it is spoken, a speech encoder's frame for its 20 ms. So
a crop may start anywhere, at any token rate.

Shape legend: S samples, N vectors of an answer, T width of a teacher, B batch, L speech tokens.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm

from ..manifest import Word, read_manifest
from .alignment import Aligner, Unusable, given_times
from .options import DistillationOptions
from .teachers import SpeechTeacher, TextTeacher

_log = logging.getLogger(__name__)
_ANSWERS_PER_PART = 200  # so much is lost at most when preparing is interrupted
_LEAST_COVER = 0.5


@dataclass(frozen=True)
class Targets:
    """What one teacher gives for a batch.

    Attributes:
        target_BLT: float32, zero where the mask is false.
        mask_BL: which speech tokens have a target.
    """

    target_BLT: Tensor
    mask_BL: Tensor

    def to(self, device: torch.device) -> Targets:
        """The same targets on `device`."""
        return Targets(self.target_BLT.to(device), self.mask_BL.to(device))


@dataclass(frozen=True)
class TimedVectors:
    """Vectors with the time that each covers.

    Attributes:
        span_N2: start and end of each in seconds, float32; they do not overlap.
        vector_NT: any float type.
    """

    span_N2: Tensor
    vector_NT: Tensor

    def at(self, start_sec: float, token_sec: float, num_tokens: int) -> tuple[Tensor, Tensor]:
        """target_LT and mask_L of the speech tokens from `start_sec` on, which may be negative.

        A token's target is the mean of the vectors in its span, weighted by how long each is there. It has one if they
        cover at least half of it.
        """
        starts_L1 = (start_sec + token_sec * torch.arange(num_tokens, dtype=torch.float64))[:, None]
        starts_N, ends_N = self.span_N2.double().unbind(1)
        overlap_LN = (torch.minimum(starts_L1 + token_sec, ends_N) - torch.maximum(starts_L1, starts_N)).clamp(min=0)
        covered_L = overlap_LN.sum(1)
        mask_L = covered_L >= _LEAST_COVER * token_sec
        target_LT = (overlap_LN / covered_L.clamp(min=1e-9)[:, None]).float() @ self.vector_NT.float()
        return target_LT.masked_fill(~mask_L[:, None], 0.0), mask_L


class CorpusTargets:
    """The targets of a corpus's answers; made by `prepare_targets`.

    Attributes:
        dims: width T of each kind of teacher.
        skipped: by kind of teacher, why an answer (by file name) has no targets from it. Its rows are all masked.
    """

    def __init__(
        self,
        stores: Mapping[str, Mapping[str, TimedVectors | str]],
        dims: Mapping[str, int],
        token_sec: float,
        silence: str,
        center: bool = False,
    ) -> None:
        self.dims = dict(dims)
        self._center_T = {kind: _mean(store.values()) for kind, store in stores.items()} if center else {}
        self.skipped = {
            kind: {name: entry for name, entry in store.items() if isinstance(entry, str)}
            for kind, store in stores.items()
        }
        self._stores = stores
        self._token_sec = token_sec
        self._silence = silence

    def batch(self, names: Sequence[str], starts_sec: Sequence[float], num_tokens: int) -> dict[str, Targets]:
        """The targets of crops, by kind of teacher.

        Args:
            names: file name of each row's answer.
            starts_sec: where each crop starts in its answer; it may be negative or reach past the end.
        """
        return {
            kind: self._targets(kind, list(zip(names, starts_sec, strict=True)), num_tokens) for kind in self._stores
        }

    def _targets(self, kind: str, crops: list[tuple[str, float]], num_tokens: int) -> Targets:
        target_BLT = torch.zeros(len(crops), num_tokens, self.dims[kind])
        mask_BL = torch.zeros(len(crops), num_tokens, dtype=torch.bool)
        for row, (name, start_sec) in enumerate(crops):
            entry = self._stores[kind][name]
            if isinstance(entry, str):
                continue
            target_LT, mask_L = entry.at(start_sec, self._token_sec, num_tokens)
            assert target_LT.shape == target_BLT.shape[1:], f"{target_LT.shape} for a row of {target_BLT.shape}"
            if kind in self._center_T:
                target_LT = (target_LT - self._center_T[kind]).masked_fill(~mask_L[:, None], 0.0)
            target_BLT[row] = target_LT
            mask_BL[row] = mask_L if kind == "speech" or self._silence == "masked" else True
        return Targets(target_BLT, mask_BL)


def _mean(entries: Iterable[TimedVectors | str]) -> Tensor:
    """mean_T of all vectors, weighted by how long each is there; zero without any."""
    total_T, seconds = torch.zeros(1, dtype=torch.float64), 0.0
    for entry in entries:
        if isinstance(entry, TimedVectors):
            length_N = entry.span_N2.double().diff(dim=1)[:, 0]
            total_T = total_T + length_N @ entry.vector_NT.double()
            seconds += float(length_N.sum())
    return (total_T / max(seconds, 1e-9)).float()


def prepare_targets(
    options: DistillationOptions, corpus: str, token_sec: float, names: Iterable[str] | None = None
) -> CorpusTargets:
    """Compute the targets of a corpus's answers, or read those that are in the cache already.

    Interrupted, it goes on where it was. The cache knows an answer by its file's name, size, text and word times, a
    teacher by its weights; nothing stale is read. Every answer that is skipped is listed, with the reason, in
    `skipped.json` beside its teacher's targets.

    Args:
        corpus: folder with `manifest.jsonl`; its assistant turns give the answers' texts, and the times of their words
            where it has them: those of other answers are found by forced alignment.
        token_sec: span of one speech token.
        names: file names of the answers; all of the manifest by default.

    Raises:
        ValueError: a teacher cannot be loaded, the manifest lacks an answer, or no answer at all gives targets.
    """
    turns = (turn for item in read_manifest(corpus) for turn in item.turns if turn.role == "assistant")
    said = {turn.audio: turn for turn in turns if isinstance(turn.audio, Path)}
    answers = {file.name: _Answer(file, said[file].text, said[file].words) for file in sorted(said)}
    if len(answers) < len(said):
        raise ValueError(f"corpus is {corpus!r}, where answers in several folders share a file name: rename them")
    wanted = list(answers) if names is None else list(dict.fromkeys(names))
    unknown = [name for name in wanted if name not in answers]
    if unknown:
        raise ValueError(
            f"corpus is {corpus!r}, whose manifest has no text for {unknown[0]} and {len(unknown) - 1} other answers: "
            "distillation needs the text of each"
        )
    chosen = {name: answers[name] for name in wanted}
    stores: dict[str, Mapping[str, TimedVectors | str]] = {}
    dims = {}
    for kind in options.teachers:
        make, settings, dims[kind] = (_text_maker if kind == "text" else _speech_maker)(options, token_sec)
        named = {key: value for key, value in settings.items() if key != "teacher"}  # whose folder may move
        folder = Path(options.cache) / f"{kind}-{_digest(json.dumps(named, sort_keys=True))[:12]}"
        stores[kind] = _prepare(folder, settings, chosen, make, f"{kind} targets")
    found = CorpusTargets(stores, dims, token_sec, options.silence, options.center)
    for kind, skipped in found.skipped.items():
        if len(skipped) == len(chosen):
            name, reason = next(iter(skipped.items()))
            raise ValueError(
                f"distillation.{kind}_teacher: none of the {len(chosen)} answers of corpus {corpus!r} gives a target "
                f"(the first, {name}: {reason})"
            )
    return found


# -------------------------------------------------------------------------------------------------------------- cache


@dataclass(frozen=True)
class _Answer:
    file: Path
    text: str
    words: tuple[Word, ...] = ()

    @property
    def key(self) -> str:
        size = self.file.stat().st_size if self.file.is_file() else -1
        times = "".join(f"|{word.text}|{word.start_sec}|{word.end_sec}" for word in self.words)
        return _digest(f"{self.file.name}|{size}|{self.text}{times}")

    def read(self) -> tuple[np.ndarray, int]:
        try:
            wav, rate_hz = soundfile.read(self.file, dtype="float32")
        except soundfile.LibsndfileError as error:
            raise Unusable(f"cannot be read: {error}") from error
        if wav.ndim != 1 or len(wav) == 0:
            raise Unusable("empty, or not mono")
        return wav, rate_hz


_Maker = Callable[[_Answer], TimedVectors]


def _prepare(
    folder: Path, settings: dict[str, Any], answers: dict[str, _Answer], make: _Maker, title: str
) -> dict[str, TimedVectors | str]:
    """The entries of `answers` by name, from the parts in `folder`; what is not there yet is made and added."""
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / "settings.json", json.dumps(settings, indent=2))
    keys = {name: answer.key for name, answer in answers.items()}
    entries = _read_parts(folder)
    pending = {keys[name]: answer for name, answer in answers.items() if keys[name] not in entries}
    with tqdm(total=len(pending), desc=title, unit="answer", disable=not pending) as progress:
        for part in _parts(pending.items()):
            made: dict[str, TimedVectors | str] = {}
            for key, answer in part:
                try:
                    made[key] = make(answer)
                except Unusable as error:
                    made[key] = str(error)
                progress.update()
            # Named by what it holds, so that two processes which make the same part write the same file.
            _write_part(folder / f"part-{_digest(''.join(made))}.safetensors", made)
    entries = _read_parts(folder) if pending else entries
    found = {name: entries[key] for name, key in keys.items()}
    skipped = {name: entry for name, entry in found.items() if isinstance(entry, str)}
    _write(folder / "skipped.json", json.dumps(skipped, indent=2))
    if skipped:
        _log.warning("%s: %d of %d answers skipped, see %s", title, len(skipped), len(found), folder / "skipped.json")
    return found


def _parts(pending: Iterable[tuple[str, _Answer]]) -> Iterator[list[tuple[str, _Answer]]]:
    items = iter(pending)
    while part := list(islice(items, _ANSWERS_PER_PART)):
        yield part


def _read_parts(folder: Path) -> dict[str, TimedVectors | str]:
    """Every entry of the parts; the tensors stay on disk until they are used (safetensors maps its files)."""
    entries: dict[str, TimedVectors | str] = {}
    for file in sorted(folder.glob("part-*.safetensors")):
        with safe_open(file, framework="pt") as part:
            names = part.keys()
            for key in [name.removesuffix(".span") for name in names if name.endswith(".span")]:
                entries[key] = TimedVectors(part.get_tensor(f"{key}.span"), part.get_tensor(f"{key}.vector"))
            entries |= json.loads(part.metadata()["skipped"])
    return entries


def _write_part(file: Path, made: dict[str, TimedVectors | str]) -> None:
    tensors: dict[str, Tensor] = {}
    for key, entry in made.items():
        if not isinstance(entry, str):
            assert entry.vector_NT.ndim == 2 and entry.span_N2.shape == (len(entry.vector_NT), 2)
            tensors[f"{key}.span"] = entry.span_N2.float().contiguous()
            tensors[f"{key}.vector"] = entry.vector_NT.half().contiguous()
    skipped = {key: entry for key, entry in made.items() if isinstance(entry, str)}
    temporary = file.with_suffix(f".{os.getpid()}.tmp")
    save_file(tensors, temporary, {"skipped": json.dumps(skipped)})
    os.replace(temporary, file)


def _write(file: Path, text: str) -> None:
    temporary = file.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, file)


def _digest(text: str) -> str:
    return hashlib.sha1(text.encode()).hexdigest()[:20]


# ------------------------------------------------------------------------------------------------------------- making


def _text_maker(options: DistillationOptions, token_sec: float) -> tuple[_Maker, dict[str, Any], int]:
    teacher = TextTeacher(options.text_teacher, options.layers)
    settings: dict[str, Any] = {
        "teacher": options.text_teacher,
        "weights": teacher.fingerprint,
        "layers": options.layers,
        "placement": options.placement,
    }
    if options.placement == "padded":

        def padded(answer: _Answer) -> TimedVectors:
            wav_S, rate_hz = answer.read()
            vector_LT = teacher.padded(answer.text, math.ceil(len(wav_S) / rate_hz / token_sec - 1e-6))
            return TimedVectors(_regular_spans(len(vector_LT), token_sec), vector_LT)

        return padded, settings | {"token_sec": token_sec}, teacher.dim

    aligner = Aligner(options.least_score)

    def aligned(answer: _Answer) -> TimedVectors:
        text = answer.text
        words = given_times(text, answer.words) if answer.words else aligner.align(*answer.read(), text)
        vector_WT = teacher.words(answer.text, [(word.first_char, word.end_char) for word in words])
        return TimedVectors(torch.tensor([(word.start_sec, word.end_sec) for word in words]), vector_WT)

    return aligned, settings | {"least_score": options.least_score}, teacher.dim


def _speech_maker(options: DistillationOptions, token_sec: float) -> tuple[_Maker, dict[str, Any], int]:
    teacher = SpeechTeacher(options.speech_teacher, options.layers)

    def frames(answer: _Answer) -> TimedVectors:
        vector_NT = teacher.frames(*answer.read())
        return TimedVectors(_regular_spans(len(vector_NT), teacher.frame_sec), vector_NT)

    settings = {"teacher": options.speech_teacher, "weights": teacher.fingerprint, "layers": options.layers}
    return frames, settings, teacher.dim


def _regular_spans(num: int, span_sec: float) -> Tensor:
    starts_N = span_sec * torch.arange(num, dtype=torch.float64)
    return torch.stack([starts_N, starts_N + span_sec], 1)
