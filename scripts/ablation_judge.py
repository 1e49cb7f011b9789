"""Judge the finished runs of a grid: ask all the same, listen, and keep what was heard beside each run.

What a run answered stands in `<run>/judged/<condition>.json`, written when the condition is done, so that an
interrupted judgement goes on; it is done again when the model, its sampling or the questions have changed. A few
answers are there as sound. What was heard in the recordings of the right answers, and what speech costs, stands in
`<grid>/judged/`.

Shapes: S samples, E embedding.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F
from tqdm import tqdm

from flowomni.api import Answer, FlowOmni
from flowomni.evaluation import Dnsmos, Recogniser, Workers, word_error_rate
from flowomni.evaluation.resynthesis import mel_distance, word_information
from flowomni.evaluation.speaker import SpeakerEncoder, speaker_network
from flowomni.tokenizers.mel import MelConfig, MelFront
from scripts.ablation_files import JUDGED, keep_sound, read_rows, slug, write_rows
from scripts.ablation_grid import Cell, Checked, Grid
from scripts.ablation_questions import (
    HEARD,
    HEARD_SHIFTS,
    OF_EARS,
    SHIFTED,
    SPEAK,
    TYPED,
    VOICE,
    VOICE_SHIFTS,
    Condition,
    questions_of,
)
from scripts.ablation_voice import altered, measure_cost, through_the_voice
from scripts.tokenizer_conditions import spread
from training.manifest import Conversation, read_manifest
from training.recordings import read_recording
from training.stages.speech import TASKS, SpeechOptions

REFERENCE_RATE_HZ = 24_000
Sound = tuple[np.ndarray, int, bool]  # wav_S, its rate in Hz, whether its DNSMOS is wanted
Heard = tuple[str, float | None]  # its words, its DNSMOS
Listeners = Workers[Sound, Heard]
NUM_KEPT, NUM_KEPT_SHIFTED = 4, 1  # answers of a condition that are kept as sound
GUESSED_SEC = 0.8  # an answer takes, until one has been judged
FORMAT = 1
STOPPED = ("stop", "")


@dataclass(frozen=True)
class Judged:
    """What was found.

    Attributes:
        rows: cell -> condition -> training seed -> answers.
        voice: cell -> "<shift>/<tokenizer or head>" -> training seed -> clips.
        references: condition, or "voice <shift>" -> what the recordings of the right answers score.
        costs: cell -> seconds of computing for one second of speech.
        missing: runs without samples, and why.
        with_speaker: whether the network that knows speakers was there.
    """

    rows: dict[str, dict[str, dict[int, list[dict[str, Any]]]]]
    voice: dict[str, dict[str, dict[int, list[dict[str, Any]]]]]
    references: dict[str, list[dict[str, Any]]]
    costs: dict[str, dict[str, Any]]
    missing: list[str]
    with_speaker: bool


# ---------------------------------------------------------------------------------------------------------- what to do


def kinds_of(grid: Grid, cells: Sequence[Checked]) -> list[str]:
    """The kinds of conditions that every cell was trained for, of those that the grid asks for."""
    asked = set(grid.judge.conditions)
    if asked & {shift.name for shift in HEARD_SHIFTS}:
        asked.add(SHIFTED)
    able = [SPEAK, TYPED, *OF_EARS, VOICE]
    for each in cells:
        assert each.parsed is not None and isinstance(each.parsed.options, SpeechOptions), "checked before"
        options = each.parsed.options
        tasks = {name for name, share in options.tasks.items() if share > 0}
        ears = options.model is not None or (options.parts is not None and options.parts.encoder is not None)
        taught = any(TASKS[name][0] == "audio" for name in tasks)
        taught = taught or options.model is not None or (options.parts is not None and bool(options.parts.projector))
        if "speak" not in tasks:
            able = [kind for kind in able if kind != SPEAK]
        if "text_to_speech" not in tasks:
            able = [kind for kind in able if kind != TYPED]
        if not (ears and taught):
            able = [kind for kind in able if kind not in OF_EARS]
    return [kind for kind in able if not asked or kind in asked]


def speaks(cells: Sequence[Checked]) -> bool:
    """Whether there is a voice to judge in every cell."""
    return all(each.parsed is not None and isinstance(each.parsed.options, SpeechOptions) for each in cells)


def manifest_of(grid: Grid) -> str:
    """The manifest that questions are taken from."""
    return grid.judge.manifest or grid.cell(grid.reference).content["options"]["manifest"]


@dataclass(frozen=True)
class Task:
    """A run to judge, and what is left to do: conditions, and shifts of the target voice."""

    cell: Cell
    seed: int
    folder: Path
    conditions: tuple[Condition, ...]
    with_voice: bool


class Judge:
    """Judges the runs of one grid.

    Args:
        cells: as they were checked, all with a voice.
        num_workers: processes that listen.
    """

    def __init__(self, grid: Grid, cells: Sequence[Checked], num_workers: int):
        self.grid, self.num_workers = grid, num_workers
        self.kinds = kinds_of(grid, cells)
        self.task = "speak" if SPEAK in self.kinds else "answer"
        self.manifest = manifest_of(grid)
        trained = grid.cell(grid.reference).content["options"].get("families") or {}
        families = grid.judge.families or [name for name, share in trained.items() if share > 0]
        self.conditions = questions_of(grid.judge, self.manifest, self.kinds, families)
        spoken = next((c for c in self.conditions if c.kind in (SPEAK, TYPED, HEARD)), None)
        if spoken is None:
            raise ValueError(f"{grid.file}: there is nothing to ask: judge.conditions leaves {self.kinds or 'none'}")
        step = max(1, len(spoken.items) // grid.judge.num_shifted)
        self.of_voice = spoken.items[::step][: grid.judge.num_shifted] if VOICE in self.kinds else ()
        self.words = sorted(
            {word for item in read_manifest(self.manifest) for word in item.answer.text.split() if item.answer.text}
        )
        self.speaker = SpeakerEncoder() if speaker_network() is not None else None

    # --------------------------------------------------------------------------------------------------------- plan

    def tasks(self) -> list[Task]:
        """Of every finished run, what has not been judged yet."""
        found = []
        for cell in self.grid.cells:
            for seed in cell.seeds:
                folder = self.grid.run_folder(cell, seed)
                if not (folder / "final").is_dir():
                    continue
                key = self._key_of_run(cell, folder)
                left = [c for c in self.conditions if read_rows(folder, c.name, key | _key_of(c)) is None]
                with_voice = bool(self.of_voice) and read_rows(folder, VOICE, key | self._voice_key()) is None
                if left or with_voice:
                    found.append(Task(cell, seed, folder, tuple(left), with_voice))
        return found

    def print_plan(self, tasks: Sequence[Task]) -> None:
        """What is asked, and how long that may take."""
        runs = [self.grid.run_folder(cell, seed) for cell in self.grid.cells for seed in cell.seeds]
        num_later = sum(not (folder / "final").is_dir() for folder in runs)
        num_voice = 2 * len(VOICE_SHIFTS) * len(self.of_voice)
        left = [c for t in tasks for c in t.conditions] + num_later * self.conditions
        num_clips = sum(len(condition.items) * condition.num_samples for condition in left)
        num_clips += num_voice * (num_later + sum(task.with_voice for task in tasks))
        for condition in self.conditions:
            times = f", {condition.num_samples} times" if condition.num_samples > 1 else ""
            print(f"  {condition.name:16} {len(condition.items):>4} questions{times}")
        if self.of_voice:
            print(f"  {VOICE:16} {len(self.of_voice):>4} recordings, {len(VOICE_SHIFTS)} shifts")
        sec, source = self._sec_per_clip()
        later = f" ({num_later} not trained yet)" if num_later else ""
        minutes = num_clips * sec / 60
        num_runs = len(tasks) + num_later
        print(f"to judge: {num_runs} runs{later}, {num_clips} answers, about {minutes:.0f} minutes ({source})")
        if self.speaker is None:
            print("speaker similarity is left out: pip install --no-deps resemblyzer")
        print(flush=True)

    def _sec_per_clip(self) -> tuple[float, str]:
        seconds = clips = 0.0
        for file in self.grid.folder.glob(f"*/seed_*/{JUDGED}/*.json"):
            done = json.loads(file.read_text(encoding="utf-8"))
            seconds, clips = seconds + done["seconds"], clips + len(done["rows"])
        return (seconds / clips, "as those before") if clips else (GUESSED_SEC, "a guess: none is judged yet")

    # ------------------------------------------------------------------------------------------------------ judging

    def run(self, tasks: Sequence[Task]) -> None:
        """Do what is left, and write it down as it is done. A run that cannot be judged is named; the others go on."""
        with Workers(partial(Ear, self.words), self.num_workers) as listeners:
            references = self._references(listeners)
            for number, task in enumerate(tasks, 1):
                label = f"[{number}/{len(tasks)}] {task.cell.name}, seed {task.seed}"
                print(f"{label}: judging", flush=True)
                try:
                    self._judge(task, references, listeners)
                except (ValueError, RuntimeError) as error:  # such as a model whose sound is NaN
                    print(f"{label}: CANNOT BE JUDGED, the others go on: {' '.join(str(error).split())}", flush=True)
        self.costs(True)

    def _judge(self, task: Task, references: Mapping[str, Sequence[Mapping[str, Any]]], listeners: Listeners) -> None:
        omni = FlowOmni.from_pretrained(task.folder / "final")
        key, voice_E = self._key_of_run(task.cell, task.folder), _mean_voice(references)
        for condition in tqdm(task.conditions, desc="conditions", unit="condition", leave=False):
            began = time.perf_counter()
            rows = self._ask(omni, task, condition, references[condition.name], listeners, voice_E)
            write_rows(task.folder, condition.name, key | _key_of(condition), rows, time.perf_counter() - began)
        if task.with_voice:
            began = time.perf_counter()
            rows = self._shift_voice(omni, task, listeners)
            write_rows(task.folder, VOICE, key | self._voice_key(), rows, time.perf_counter() - began)

    def _ask(
        self,
        omni: FlowOmni,
        task: Task,
        condition: Condition,
        references: Sequence[Mapping[str, Any]],
        listeners: Listeners,
        voice_E: np.ndarray | None,
    ) -> list[dict[str, Any]]:
        reference_sec = {row["id"]: row["answer_sec"] for row in references}
        first: dict[str, Answer] = {}
        rows = []
        for sample in range(condition.num_samples):
            answers = omni.answers(
                condition.questions, batch_size=self.grid.judge.batch_size, seed=sample, sampling=task.cell.sampling
            )
            scored = self._scored(condition) if not sample else set()
            sounds = [
                (answer.wav_S, answer.sample_rate_hz, item.id in scored)
                for item, answer in zip(condition.items, answers, strict=True)
            ]
            for item, answer, heard in zip(condition.items, answers, listeners(sounds), strict=True):
                row = _row(item, answer.text, answer.wav_S, answer.sample_rate_hz, heard)
                row |= {"sample": sample, "reference_sec": reference_sec[item.id]}
                row |= {"stopped": bool(answer.states) and answer.states[-1] in STOPPED}
                if condition.shift is None:
                    row["speaker"] = self._likeness(answer.wav_S, answer.sample_rate_hz, voice_E)
                if sample:
                    row["distance"] = distance(first[item.id].wav_S, answer.wav_S, answer.sample_rate_hz)
                rows.append(row)
                first.setdefault(item.id, answer)
        num_kept = NUM_KEPT if condition.shift is None else NUM_KEPT_SHIFTED
        for index, item in enumerate(condition.items[:: max(1, len(condition.items) // num_kept)][:num_kept]):
            keep_sound(task.folder, f"{condition.name}-{index}", first[item.id].wav_S, omni.sample_rate_hz)
            next(row for row in rows if row["id"] == item.id)["kept"] = f"{slug(condition.name)}-{index}.flac"
        return rows

    def _scored(self, condition: Condition) -> set[str]:
        """Questions whose answers are given a DNSMOS."""
        return set() if condition.shift else set(spread(condition.ids, self.grid.judge.num_quality))

    def _shift_voice(self, omni: FlowOmni, task: Task, listeners: Listeners) -> list[dict[str, Any]]:
        rate = omni.sample_rate_hz
        rows = []
        for shift in VOICE_SHIFTS:
            names, clips = [], []
            for item in self.of_voice:
                for name, wav_S in through_the_voice(omni, item, shift, task.cell.sampling, self.task).items():
                    names.append((item, name))
                    clips.append((wav_S, rate, False))
            for (item, name), (wav_S, *_), heard in zip(names, clips, listeners(clips), strict=True):
                row = _row(item, item.answer.text, wav_S, rate, heard) | {"version": name, "shift": shift.name}
                rows.append(row | {"mel_distance": mel_distance(altered(item, shift, rate), wav_S, rate)})
        return rows

    def _likeness(self, wav_S: np.ndarray, rate: int, voice_E: np.ndarray | None) -> float | None:
        if self.speaker is None or voice_E is None:
            return None
        own_E = self.speaker.embed(wav_S, rate)
        return None if own_E is None else float(own_E @ voice_E)

    # --------------------------------------------------------------------------------------------------- references

    def references(self) -> dict[str, list[dict[str, Any]]]:
        """What the right answers' recordings score, as they were heard in an earlier judgement."""
        found = read_rows(self.grid.folder, "references", self._reference_key())
        return {} if found is None else {name: [r for r in found if r["of"] == name] for name in _names(found)}

    def _references(self, listeners: Listeners) -> dict[str, list[dict[str, Any]]]:
        if not self.references():
            began = time.perf_counter()
            rows = self._listen_to_references(listeners)
            write_rows(self.grid.folder, "references", self._reference_key(), rows, time.perf_counter() - began)
        return self.references()

    def _listen_to_references(self, listeners: Listeners) -> list[dict[str, Any]]:
        places: list[tuple[str, Conversation]] = [(c.name, item) for c in self.conditions for item in c.items]
        recordings = list(dict.fromkeys(item.answer.audio for _, item in places if item.answer.audio))
        wavs = {recording: read_recording(recording, REFERENCE_RATE_HZ).wav_S for recording in recordings}
        scored = {i.answer.audio for c in self.conditions for i in c.items if i.id in self._scored(c)}
        sounds = [(wav_S, REFERENCE_RATE_HZ, recording in scored) for recording, wav_S in wavs.items()]
        heard = dict(zip(wavs, listeners(sounds), strict=True))
        embedded = {}
        if self.speaker is not None:
            each = {recording: self.speaker.embed(wav_S, REFERENCE_RATE_HZ) for recording, wav_S in wavs.items()}
            embedded = {recording: voice_E for recording, voice_E in each.items() if voice_E is not None}
        mean_E = _unit(np.mean(list(embedded.values()), axis=0)) if embedded else None
        rows = []
        for name, item in places:
            recording = item.answer.audio
            assert recording is not None, "chosen for it"
            row = _row(item, item.answer.text, wavs[recording], REFERENCE_RATE_HZ, heard[recording])
            row |= {"of": name, "reference_sec": row["answer_sec"], "stopped": True}
            if mean_E is not None and recording in embedded:
                row |= {"speaker": float(embedded[recording] @ mean_E), "mean": mean_E.round(6).tolist()}
            rows.append(row)
        for shift in VOICE_SHIFTS if self.of_voice else ():
            clips = [(altered(item, shift, REFERENCE_RATE_HZ), REFERENCE_RATE_HZ, False) for item in self.of_voice]
            for item, (wav_S, rate, _), each_heard in zip(self.of_voice, clips, listeners(clips), strict=True):
                rows.append(_row(item, item.answer.text, wav_S, rate, each_heard) | {"of": f"{VOICE} {shift.name}"})
        first = True  # one copy of the mean voice is enough
        for row in rows:
            if "mean" in row and not first:
                del row["mean"]
            first = first and "mean" not in row
        return rows

    # --------------------------------------------------------------------------------------------------------- cost

    def costs(self, measure: bool) -> dict[str, dict[str, Any]]:
        """What speech costs in each cell that has a finished run; where that is not known, nothing, or measured now."""
        runs: dict[str, tuple[Cell, Path]] = {}
        for cell in self.grid.cells:
            done = [self.grid.run_folder(cell, seed) for seed in cell.seeds]
            done = [folder for folder in done if (folder / "final").is_dir()]
            runs |= {cell.name: (cell, done[0])} if done else {}
        if not runs or not self.grid.judge.num_turns:
            return {}
        key: dict[str, Any] = {"cells": {name: _run_key(*run) for name, run in runs.items()}}
        key |= {"num_turns": self.grid.judge.num_turns, "num_threads": torch.get_num_threads()}
        rows = read_rows(self.grid.folder, "costs", key)
        if rows is None and measure:
            began = time.perf_counter()
            load = round(os.getloadavg()[0], 2)
            print("measuring what speech costs ...", flush=True)
            models = {n: (FlowOmni.from_pretrained(f / "final"), c.sampling) for n, (c, f) in runs.items()}
            text = self.conditions[0].items[0].answer.text
            found = measure_cost(models, text, self.grid.judge.num_turns)
            rows = [{"cell": name, **cost, "load_average": load} for name, cost in found.items()]
            write_rows(self.grid.folder, "costs", key, rows, time.perf_counter() - began)
        return {row["cell"]: row for row in rows or ()}

    # ------------------------------------------------------------------------------------------------------ reading

    def collect(self) -> Judged:
        """All that has been judged."""
        found = Judged({}, {}, self.references(), self.costs(False), [], self.speaker is not None)
        for cell in self.grid.cells:
            found.rows[cell.name], found.voice[cell.name] = {}, {}
            for seed in cell.seeds:
                folder, label = self.grid.run_folder(cell, seed), f"{cell.name}, seed {seed}"
                if not (folder / "final").is_dir():
                    found.missing.append(f"{label}: its training is not finished")
                    continue
                key = self._key_of_run(cell, folder)
                some = {c.name: read_rows(folder, c.name, key | _key_of(c)) for c in self.conditions}
                lacking = [name for name, rows in some.items() if rows is None]
                if lacking:
                    found.missing.append(f"{label}: not judged on {', '.join(lacking)}")
                judged = [row for rows in some.values() for row in rows or ()]
                if judged and not any(row["answer_sec"] for row in judged):
                    found.missing.append(f"{label}: no answer has a sound")
                for name, rows in some.items():
                    if rows is not None:
                        found.rows[cell.name].setdefault(name, {})[seed] = rows
                for row in read_rows(folder, VOICE, key | self._voice_key()) or ():
                    name = f"{row['shift']}/{row['version']}"
                    found.voice[cell.name].setdefault(name, {}).setdefault(seed, []).append(row)
        return found

    def _key_of_run(self, cell: Cell, folder: Path) -> dict[str, Any]:
        options = self.grid.judge
        key = {"batch_size": options.batch_size, "num_quality": options.num_quality, "words": _hash(self.words)}
        return _run_key(cell, folder) | key

    def _voice_key(self) -> dict[str, Any]:
        return {"task": self.task, "ids": [item.id for item in self.of_voice], "shifts": [s.name for s in VOICE_SHIFTS]}

    def _reference_key(self) -> dict[str, Any]:
        key: dict[str, Any] = {"format": FORMAT, "words": _hash(self.words), "with_speaker": self.speaker is not None}
        key |= {"asked": {c.name: c.ids for c in self.conditions}, "num_quality": self.grid.judge.num_quality}
        return key | self._voice_key()


# --------------------------------------------------------------------------------------------------------------- a clip


class Ear:
    """Hears one clip after the other: its words, by a loop over `words`, and its DNSMOS where that is wanted."""

    def __init__(self, words: Sequence[str]) -> None:
        self._recogniser, self._dnsmos = Recogniser(words), Dnsmos()

    def __call__(self, sound: Sound) -> Heard:
        wav_S, rate, with_quality = sound
        dnsmos = self._dnsmos.score(wav_S, rate).overall if with_quality else None
        return self._recogniser.recognise(wav_S, rate), dnsmos


def distance(first_S: np.ndarray, second_S: np.ndarray, sample_rate_hz: int) -> float | None:
    """Mean absolute difference of the log-mels of two clips, the second one stretched to the first one's length.

    None where one of them has no sound.
    """
    if not len(first_S) or not len(second_S):
        return None
    config = MelConfig(sample_rate_hz=sample_rate_hz)
    front = MelFront(config)
    mels = [
        front.log_mel(torch.from_numpy(np.asarray(wav_S, np.float32))[None], max(1, len(wav_S) // config.hop_length))
        for wav_S in (first_S, second_S)
    ]
    stretched = F.interpolate(mels[1].transpose(1, 2), mels[0].shape[1], mode="linear").transpose(1, 2)
    return float((mels[0] - stretched).abs().mean())


def _row(item: Conversation, text: str, wav_S: np.ndarray, rate: int, heard: Heard) -> dict[str, Any]:
    """What is kept of one clip."""
    right = item.answer.text
    words, dnsmos = heard
    own_errors, right_errors = (word_error_rate([wanted], [words]) for wanted in (text, right))
    information = word_information([right], [words])
    return {
        "id": item.id,
        "family": item.family,
        "right": right,
        "text": text,
        "heard": words,
        "answer_sec": len(wav_S) / rate,
        "dnsmos": dnsmos,
        "own_errors": float(own_errors.errors_N[0]),
        "own_words": float(own_errors.words_N[0]),
        "right_errors": float(right_errors.errors_N[0]),
        "right_words": float(right_errors.words_N[0]),
        "heard_words": float(information.hypothesis_words_N[0]),
        "hits": float(information.hits_N[0]),
    }


def _unit(values_E: np.ndarray) -> np.ndarray:
    return values_E / np.linalg.norm(values_E)


def _mean_voice(references: Mapping[str, Sequence[Mapping[str, Any]]]) -> np.ndarray | None:
    found = [row["mean"] for rows in references.values() for row in rows if "mean" in row]
    return np.array(found[0]) if found else None


# --------------------------------------------------------------------------------------------------------------- files


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def _run_key(cell: Cell, folder: Path) -> dict[str, Any]:
    """What the answers of a run depend on, but for the questions."""
    return {"format": FORMAT, "model": _digest(folder / "final"), "sampling": cell.sampling}


def _digest(folder: Path) -> str:
    """Of a model's config and weights."""
    found = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb") as opened:
            found.update(hashlib.file_digest(opened, "sha256").digest())
    return found.hexdigest()[:16]


def _names(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(row["of"] for row in rows))


def _key_of(condition: Condition) -> dict[str, Any]:
    shift = condition.shift.name if condition.shift else ""
    return {"kind": condition.kind, "ids": condition.ids, "num_samples": condition.num_samples, "shift": shift} | (
        {"seed": condition.seed} if shift else {}
    )
