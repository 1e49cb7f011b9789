"""Speak the talk corpus: questions in many voices, answers in one clean voice, and a manifest.

    python -m scripts.make_talk_corpus --out data/talk --num-pairs 24000 --seed 0

Needs Debian's flite, espeak-ng and festival. Spoken digits by real people are added where the recordings of the Free
Spoken Digit Dataset are present (`--fsdd`). The folder it writes:

    manifest.jsonl     one conversation a line; audio paths relative to this folder
    stats.json         counts by split, family and voice, hours
    questions/{train,valid,test}/000123.flac    16 kHz mono, varied in speed, pitch, level, room and noise
    answers/<sha1 of the text>.flac             24 kHz mono, flite `slt`, one file per distinct text

Every item draws from a generator seeded by (seed, id), so neither the order nor the number of workers matters. A file
that exists is not made again: a run that was stopped goes on where it was. The manifest is written last.

Shapes: S samples, K impulse-response samples.
"""

from __future__ import annotations

import argparse
import errno
import hashlib
import io
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import soundfile
import soxr
from scipy.signal import butter, fftconvolve, lfilter, sosfilt
from tqdm import tqdm

from training.talk_text import DIGITS, Pair, corpus_pairs, typed_pairs

QUESTION_HZ = 16_000
ANSWER_HZ = 24_000
CORPUS_VERSION = 1  # raise it when the same seed no longer gives the same audio
# Synthetic voices. kal and slt are in flite and festival both, so holding out either would hold out neither: the unseen
# voices are a person that only flite has, and a female voice of espeak-ng, whose trained variants have other formants.
TRAINED_VOICES = (
    "flite-kal16", "flite-awb", "flite-slt", "festival-kal_diphone", "festival-cmu_us_slt_arctic_hts",
    "espeak-en-us", "espeak-en-us+f1", "espeak-en-us+f4", "espeak-en-us+m1", "espeak-en-us+m3", "espeak-en-us+m7",
    "espeak-en-gb", "espeak-en-gb+f5", "espeak-en-gb-scotland",
)  # fmt: skip
UNSEEN_VOICES = ("flite-rms", "espeak-en-us+f2")
HUMAN_SPEAKERS = ("jackson", "nicolas", "yweweler")
UNSEEN_HUMAN_SPEAKERS = ("theo",)
NUM_HELD_OUT_TAKES = 5  # takes 0 to 4 of every digit are never in training
SPEAKERS = {
    "trained": TRAINED_VOICES,
    "unseen": UNSEEN_VOICES,
    "human": HUMAN_SPEAKERS,
    "unseen_human": UNSEEN_HUMAN_SPEAKERS,
}
PACKAGES = {
    "flite": "flite",
    "espeak-ng": "espeak-ng",
    "festival": "festival festvox-kallpc16k festvox-us-slt-hts",
}
DEFAULT_FSDD = Path("../shared/data/fsdd/recordings")


class CorpusError(ValueError):
    """Something the user can mend; its text is one line that says what and how."""


@dataclass(frozen=True)
class Question:
    """One question to be spoken."""

    id: str
    pair: Pair
    voice: str
    seed: int

    @property
    def path(self) -> str:
        return f"questions/{self.pair.split}/{self.id.rpartition('-')[2]}.flac"

    def rng(self) -> np.random.Generator:
        digest = hashlib.sha256(f"{self.seed}:{self.id}".encode()).digest()
        return np.random.default_rng(int.from_bytes(digest[:8], "big"))


def answer_path(text: str) -> str:
    """Where the audio of an answer lies, relative to the corpus folder."""
    return f"answers/{hashlib.sha1(text.encode()).hexdigest()[:16]}.flac"


# --- what is to be spoken -------------------------------------------------------------------------------------------


def plan_questions(num_pairs: int, seed: int, with_human: bool, num_lists: int = 0) -> list[Question]:
    """Ids, texts and voices of the whole corpus: a pure function of its arguments."""
    counts: Counter[str] = Counter()
    questions = []
    for pair in corpus_pairs(num_pairs, seed, with_human, num_lists):
        identity = f"{pair.split}-{counts[pair.split]:06d}"
        counts[pair.split] += 1
        rng = random.Random(f"voice:{seed}:{identity}")
        voice = rng.choice(SPEAKERS[pair.voice_group]) if pair.question else rng.choice(("silence", "noise"))
        questions.append(Question(identity, pair, voice, seed))
    return questions


def check_synthesisers() -> None:
    """Raises CorpusError naming the Debian packages of the first synthesiser or voice that is missing."""
    for program, packages in PACKAGES.items():
        if shutil.which(program) is None:
            raise CorpusError(
                f"{program} is missing: it speaks a part of the corpus. Install the Debian package with: "
                f"sudo apt-get install {packages}"
            )
    voices = subprocess.run(["festival", "-b", "(print (voice.list))"], capture_output=True, text=True).stdout
    for voice in TRAINED_VOICES:
        if voice.startswith("festival-") and voice.removeprefix("festival-") not in voices:
            raise CorpusError(
                f"festival has no voice {voice.removeprefix('festival-')}. Install it with: "
                f"sudo apt-get install {PACKAGES['festival']}"
            )


# --- speaking -------------------------------------------------------------------------------------------------------


def _read_wav(path: Path) -> tuple[np.ndarray, int]:
    wav_S, rate = soundfile.read(path, dtype="float32")
    return wav_S, rate


def _run(command: list[str], what: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise CorpusError(f"{command[0]} failed to speak {what!r}: {reason}")


def _spoken_text(question: Question, rng: np.random.Generator) -> str:
    """The text as the synthesiser gets it: half of all word and digit lists are read with a pause after each word."""
    if question.pair.family not in ("say", "digits", "add") or rng.random() < 0.5:
        return question.pair.question
    words = question.pair.question.split()
    head = words[:1] if question.pair.family in ("say", "add") else []
    return " ".join([*head, ", ".join(words[len(head) :])])


def _speak_flite(text: str, voice: str, path: Path, rng: np.random.Generator) -> None:
    settings = ["--setf", f"duration_stretch={rng.uniform(0.9, 1.15):.3f}"]
    if voice == "kal16":  # the other voices of flite carry their own pitch contours and ignore this
        settings += ["--setf", f"int_f0_target_mean={rng.uniform(80, 150):.1f}"]
    _run(["flite", "-voice", voice, *settings, "-t", text, "-o", str(path)], text)


def _speak_espeak(text: str, voice: str, path: Path, rng: np.random.Generator) -> None:
    speed, pitch = int(rng.integers(140, 190)), int(rng.integers(25, 75))
    _run(["espeak-ng", "-v", voice, "-s", str(speed), "-p", str(pitch), "-w", str(path), text], text)


def _speak_festival(texts: list[str], voice: str, paths: list[Path], rngs: list[np.random.Generator]) -> None:
    """All texts in one process, because festival takes longer to start than to speak."""
    lines = [f"(voice_{voice})"]
    for text, path, rng in zip(texts, paths, rngs, strict=True):
        lines.append(f"(Parameter.set 'Duration_Stretch {rng.uniform(0.9, 1.15):.3f})")
        lines.append(f'(utt.save.wave (utt.synth (Utterance Text "{text}")) "{path}" \'riff)')
    script = paths[0].with_name("say.scm")
    script.write_text("\n".join(lines), encoding="utf-8")
    _run(["festival", "-b", str(script)], texts[0])


def _speak_human(question: Question, fsdd: Path, rng: np.random.Generator) -> tuple[np.ndarray, int]:
    """Takes of one person, joined with small gaps. Training never draws the held-out takes, the rest only those."""
    parts, rate = [], 8000
    for word in question.pair.question.split():
        takes = sorted(
            fsdd.glob(f"{DIGITS.index(word)}_{question.voice}_*.wav"), key=lambda p: int(p.stem.split("_")[2])
        )
        if question.pair.voice_group == "human":
            training = question.pair.split == "train"
            takes = takes[NUM_HELD_OUT_TAKES:] if training else takes[:NUM_HELD_OUT_TAKES]
        take_S, rate = _read_wav(takes[rng.integers(len(takes))])
        loudness = np.sqrt(np.mean(take_S**2)) + 1e-6
        parts += [take_S * (0.1 / loudness * 10 ** (rng.uniform(-2, 2) / 20))]
        parts += [np.zeros(int(rate * rng.uniform(0.03, 0.3)), dtype=np.float32)]
    return np.concatenate(parts[:-1]).astype(np.float32), rate


# --- variation ------------------------------------------------------------------------------------------------------


def make_noise(kind: str, num_samples: int, rng: np.random.Generator) -> np.ndarray:
    """Noise of unit power at 16 kHz: white, pink (1/f power), or babble (bands that come and go like speech)."""
    white_S = rng.standard_normal(num_samples)
    if kind == "pink":
        spectrum = np.fft.rfft(white_S)
        white_S = np.fft.irfft(spectrum / np.sqrt(np.arange(len(spectrum)) + 1.0), num_samples)
    if kind == "babble":
        white_S = np.zeros(num_samples)
        for center_hz in rng.uniform(200, 3500, size=8):
            band = butter(2, [center_hz * 0.8, center_hz * 1.25], "bandpass", fs=QUESTION_HZ, output="sos")
            knots = rng.exponential(1.0, size=2 + num_samples // 3200)  # a new loudness every 0.2 s, as syllables have
            envelope_S = np.interp(np.linspace(0, len(knots) - 1, num_samples), np.arange(len(knots)), knots)
            white_S += sosfilt(band, rng.standard_normal(num_samples)) * envelope_S * np.sqrt(500 / center_hz)
    return white_S / (np.sqrt(np.mean(white_S**2)) + 1e-12)


def room_response(rng: np.random.Generator) -> np.ndarray:
    """Impulse response of a small room: the direct sound, and noise decaying by 60 dB in 0.15 to 0.5 s behind it."""
    decay_sec, gap = rng.uniform(0.15, 0.5), int(QUESTION_HZ * rng.uniform(0.002, 0.012))
    time_K = np.arange(int(QUESTION_HZ * decay_sec)) / QUESTION_HZ
    tail_K = rng.standard_normal(len(time_K)) * 10 ** (-3 * time_K / decay_sec)
    tail_K *= 10 ** (-rng.uniform(6, 20) / 20) / np.sqrt(np.sum(tail_K**2))  # direct to reverberant 6 to 20 dB
    return np.concatenate([[1.0], np.zeros(gap), tail_K])


def vary(wav_S: np.ndarray, rate: int, rng: np.random.Generator) -> np.ndarray:
    """Plain speech at `rate` to a question at 16 kHz: speed, silence around, band, room, noise and level.

    Speed is 0.9 to 1.15 by resampling, which moves pitch and formants too, as another speaker's would be.
    """
    wav_S = soxr.resample(wav_S, rate * rng.uniform(0.9, 1.15), QUESTION_HZ, quality="HQ").astype(np.float64)
    wav_S = np.pad(wav_S, [int(QUESTION_HZ * rng.uniform(0.02, 0.4)) for _ in range(2)])
    if rng.random() < 0.2:  # a telephone's band
        wav_S = sosfilt(butter(6, 3800, fs=QUESTION_HZ, output="sos"), wav_S)
    if rng.random() < 0.5:  # a microphone that is brighter or duller
        wav_S = lfilter([1.0, rng.uniform(-0.5, 0.3)], [1.0], wav_S)
    if rng.random() < 0.5:
        wav_S = fftconvolve(wav_S, room_response(rng))[: len(wav_S)]
    wav_S /= np.sqrt(np.mean(wav_S**2)) + 1e-9
    if rng.random() < 0.7:
        kind = ("white", "pink", "babble")[rng.integers(3)]
        wav_S += make_noise(kind, len(wav_S), rng) * 10 ** (-rng.uniform(15, 40) / 20)
    wav_S *= 10 ** (rng.uniform(-34, -16) / 20)
    return wav_S / max(1.0, np.abs(wav_S).max() / 0.99)


def without_speech(kind: str, rng: np.random.Generator) -> np.ndarray:
    """Half a second to three seconds of silence or noise at 16 kHz."""
    num_samples = int(QUESTION_HZ * rng.uniform(0.5, 3.0))
    if kind == "silence":
        level = 0.0 if rng.random() < 0.5 else 10 ** (rng.uniform(-80, -60) / 20)
        return make_noise("white", num_samples, rng) * level
    noise_S = make_noise(("white", "pink", "babble")[rng.integers(3)], num_samples, rng)
    noise_S = noise_S * 10 ** (rng.uniform(-50, -20) / 20)
    return noise_S / max(1.0, np.abs(noise_S).max() / 0.99)


# --- files ----------------------------------------------------------------------------------------------------------


def _write(path: Path, content: bytes) -> None:
    """Whole or not at all: written beside its place, then moved there."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _write_flac(path: Path, wav_S: np.ndarray, rate: int) -> None:
    buffer = io.BytesIO()
    soundfile.write(buffer, wav_S, rate, format="FLAC", subtype="PCM_16")
    _write(path, buffer.getvalue())


def speak_answers(texts: list[str], out: Path) -> int:
    """Answers in flite's slt, clean, 24 kHz. Returns how many there are."""
    with tempfile.TemporaryDirectory() as folder:
        wav = Path(folder) / "answer.wav"
        for text in texts:
            if not (out / answer_path(text)).exists():
                _run(["flite", "-voice", "slt", "-t", text, "-o", str(wav)], text)
                wav_S, rate = _read_wav(wav)
                _write_flac(out / answer_path(text), soxr.resample(wav_S, rate, ANSWER_HZ, quality="HQ"), ANSWER_HZ)
    return len(texts)


def speak_questions(questions: list[Question], out: Path, fsdd: Path | None) -> int:
    """Questions of one voice, varied, 16 kHz. Returns how many there are."""
    todo = [question for question in questions if not (out / question.path).exists()]
    if not todo:
        return len(questions)
    rngs = [question.rng() for question in todo]
    synthesiser, _, voice = todo[0].voice.partition("-")
    with tempfile.TemporaryDirectory() as folder:
        wavs = [Path(folder) / f"{index}.wav" for index in range(len(todo))]
        texts = [_spoken_text(question, rng) for question, rng in zip(todo, rngs, strict=True)]
        if synthesiser == "festival":
            _speak_festival(texts, voice, wavs, rngs)
        for question, text, wav, rng in zip(todo, texts, wavs, rngs, strict=True):
            if synthesiser in ("silence", "noise"):
                _write_flac(out / question.path, without_speech(synthesiser, rng), QUESTION_HZ)
                continue
            if synthesiser == "flite":
                _speak_flite(text, voice, wav, rng)
            elif synthesiser == "espeak":
                _speak_espeak(text, voice, wav, rng)
            if synthesiser in ("flite", "espeak", "festival"):
                plain_S, rate = _read_wav(wav)
                wav.unlink()
            else:
                assert fsdd is not None, f"{question.voice} is a person, and there are no recordings"
                plain_S, rate = _speak_human(question, fsdd, rng)
            _write_flac(out / question.path, vary(plain_S, rate, rng), QUESTION_HZ)
    return len(questions)


def _chunks(items: list, size: int) -> Iterator[list]:
    return (items[start : start + size] for start in range(0, len(items), size))


def _work(task: tuple[str, list], out: Path, fsdd: Path | None) -> int:
    kind, items = task
    return speak_answers(items, out) if kind == "answers" else speak_questions(items, out, fsdd)


def _plan_tasks(questions: list[Question], answers: list[str], only: str) -> list[tuple[str, list]]:
    """Chunks of one voice each, answers first."""
    tasks: list[tuple[str, list]] = []
    if only in ("all", "answers"):
        tasks += [("answers", chunk) for chunk in _chunks(answers, 32)]
    if only in ("all", "questions"):
        by_voice: dict[str, list[Question]] = {}
        for question in questions:
            by_voice.setdefault(question.voice, []).append(question)
        for voice in sorted(by_voice):
            tasks += [("questions", chunk) for chunk in _chunks(by_voice[voice], 64)]
    return tasks


def _check_settings(out: Path, settings: dict) -> None:
    """A folder holds one corpus: going on with other settings would mix two."""
    path = out / "settings.json"
    if not path.exists():
        _write(path, (json.dumps(settings) + "\n").encode())
        return
    found = json.loads(path.read_text(encoding="utf-8"))
    if found != settings:
        raise CorpusError(f"{out} holds a corpus made with {found}, not {settings}: choose another --out or delete it")


def _typed_lines(pairs: list[Pair]) -> list[dict]:
    """Conversations of text alone, a family of their own."""
    lines = []
    for index, pair in enumerate(pairs):
        turns = [{"role": "user", "text": pair.question}, {"role": "assistant", "text": pair.answer}]
        lines.append({"id": f"typed-{index:06d}", "split": pair.split, "family": "typed", "turns": turns})
    return lines


def write_manifest(questions: list[Question], typed: list[Pair], out: Path) -> dict:
    """manifest.jsonl and stats.json. Returns the statistics, which are of the spoken pairs."""
    lines, seconds_of_answer = [], {}
    hours: Counter[str] = Counter()
    for question in questions:
        pair, asked_sec = question.pair, soundfile.info(out / question.path).duration
        path = answer_path(pair.answer)
        if path not in seconds_of_answer:
            seconds_of_answer[path] = soundfile.info(out / path).duration
        user = {"role": "user", "text": pair.question, "audio": question.path, "duration_sec": round(asked_sec, 3)}
        assistant = {"role": "assistant", "text": pair.answer, "audio": path}
        assistant["duration_sec"] = round(seconds_of_answer[path], 3)
        lines.append(
            {
                "id": question.id,
                "split": pair.split,
                "family": pair.family,
                "voice": question.voice,
                "voice_group": pair.voice_group,
                "turns": [user, assistant],
            }
        )
        hours["questions"] += asked_sec / 3600
        hours["answers, as often as asked for"] += seconds_of_answer[path] / 3600
    hours["answers, distinct"] = sum(seconds_of_answer.values()) / 3600
    stats = corpus_stats(questions, len(seconds_of_answer), hours)
    _write(out / "stats.json", (json.dumps(stats, indent=2) + "\n").encode())
    lines += _typed_lines(typed)
    _write(out / "manifest.jsonl", "".join(json.dumps(line) + "\n" for line in lines).encode())
    return stats


def corpus_stats(questions: list[Question], num_answers: int, hours: Mapping[str, float]) -> dict:
    """Counts by split, family, voice group and voice."""
    splits: dict[str, dict] = {}
    for split in ("train", "valid", "test"):
        chosen = [question for question in questions if question.pair.split == split]
        splits[split] = {
            "pairs": len(chosen),
            "family": dict(Counter(question.pair.family for question in chosen)),
            "voice_group": dict(Counter(question.pair.voice_group for question in chosen)),
            "voice": dict(Counter(question.voice for question in chosen)),
        }
    rounded = {name: round(value, 3) for name, value in hours.items()}
    return {"pairs": len(questions), "distinct_answers": num_answers, "hours": rounded, "splits": splits}


def make_corpus(
    out: Path,
    num_pairs: int,
    seed: int,
    fsdd: Path | None,
    num_workers: int = 1,
    only: str = "all",
    num_lists: int = 0,
    num_typed: int = 0,
) -> dict | None:
    """Speak whatever is not there yet, then write the manifest. Returns the statistics (None if `only` is a part).

    Raises CorpusError for a missing synthesiser or a folder that holds another corpus, ValueError for `num_pairs`.
    """
    check_synthesisers()
    questions = plan_questions(num_pairs, seed, fsdd is not None, num_lists)
    answers = sorted({question.pair.answer for question in questions})
    for folder in ("answers", "questions/train", "questions/valid", "questions/test"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    settings = {"version": CORPUS_VERSION, "num_pairs": num_pairs, "num_lists": num_lists, "num_typed": num_typed}
    settings |= {"seed": seed, "human": fsdd is not None}
    _check_settings(out, settings)
    tasks = _plan_tasks(questions, answers, only)
    work = partial(_work, out=out, fsdd=fsdd)
    with tqdm(total=sum(len(items) for _, items in tasks), unit="utterance", desc="speaking") as bar:
        if num_workers == 1:
            for task in tasks:
                bar.update(work(task))
        else:
            ignore_interrupt = (signal.SIGINT, signal.SIG_IGN)  # the parent alone reports that it was stopped
            with multiprocessing.get_context("spawn").Pool(num_workers, signal.signal, ignore_interrupt) as pool:
                for count in pool.imap_unordered(work, tasks):
                    bar.update(count)
    return write_manifest(questions, typed_pairs(num_typed, seed), out) if only == "all" else None


def find_fsdd(folder: Path | None) -> Path | None:
    """The recordings to use: `folder`, or the default place if they are there. None where there are none.

    Raises CorpusError if `folder` was asked for and has no recordings.
    """
    chosen = folder or DEFAULT_FSDD
    takes = Counter(tuple(path.stem.split("_")[:2]) for path in chosen.glob("[0-9]_*_*.wav"))
    needed = [(str(digit), name) for digit in range(10) for name in HUMAN_SPEAKERS + UNSEEN_HUMAN_SPEAKERS]
    if all(takes[pair] > NUM_HELD_OUT_TAKES for pair in needed):
        return chosen
    if folder is not None:
        raise CorpusError(
            f"--fsdd {folder} needs more than {NUM_HELD_OUT_TAKES} recordings of every digit by every one of "
            f"{', '.join(HUMAN_SPEAKERS + UNSEEN_HUMAN_SPEAKERS)}, named like 9_theo_0.wav"
        )
    print(f"no recordings in {DEFAULT_FSDD}: the corpus will have no digits read by people (see --fsdd)")
    return None


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 done, 2 something the user can mend."""
    parser = argparse.ArgumentParser(description="Speak the talk corpus: questions in many voices, answers in one.")
    parser.add_argument("--out", type=Path, default=Path("data/talk"), help="folder to write (default: data/talk)")
    parser.add_argument("--num-pairs", type=int, default=24_000, help="questions with answers (default: 24000)")
    parser.add_argument(
        "--num-lists", type=int, help="more training pairs of say, digits and add (default: half of --num-pairs)"
    )
    parser.add_argument("--num-typed", type=int, help="sums that are only typed (default: as many as --num-pairs)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fsdd", type=Path, help=f"folder of real spoken digits (default: {DEFAULT_FSDD} if there)")
    parser.add_argument("--num-workers", type=int, default=os.cpu_count() or 1, help="processes (default: all cores)")
    parser.add_argument("--only", choices=("all", "answers", "questions"), default="all", help="speak just this part")
    options = parser.parse_args(argv)
    try:
        fsdd = find_fsdd(options.fsdd)
        num_workers = max(1, options.num_workers)
        num_lists = options.num_pairs // 2 if options.num_lists is None else max(0, options.num_lists)
        num_typed = options.num_pairs if options.num_typed is None else max(0, options.num_typed)
        stats = make_corpus(
            options.out, options.num_pairs, options.seed, fsdd, num_workers, options.only, num_lists, num_typed
        )
    except (ValueError, OSError) as error:
        full = isinstance(error, OSError) and error.errno == errno.ENOSPC
        remedy = f": free some for {options.out} (80 MB a thousand pairs), then repeat the command" if full else ""
        print(f"make_talk_corpus: {error}{remedy}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("make_talk_corpus: stopped; the same command goes on from here", file=sys.stderr)
        return 130
    if stats is not None:
        print(f"{stats['pairs']} pairs, {stats['distinct_answers']} distinct answers, hours: {stats['hours']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
