"""What is left of speech after a tokenizer, and how fast the tokenizer is.

Each clip is resynthesised by every tokenizer, and by every tokenizer's own vocoder from the true mel: the ceiling,
which has no bottleneck. What was heard and seen in a clip is compared with what the tokenizer was given.

Shapes: S samples, L speech tokens, K codebooks, N tokens of all clips; a 1 is a batch of one.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import statistics
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from flowomni.audio import resample
from flowomni.evaluation import Dnsmos, Interval, Recogniser, bootstrap_interval, word_error_rate
from flowomni.evaluation.resynthesis import Fidelity, fidelity, word_information, word_information_interval
from flowomni.tokenizers import CodebookUse, MelTokenizer, SpeechTokenizer, codebook_use

RATE_HZ = 24_000  # of every clip as it is given
UNTOUCHED = "untouched"
MEANS = ("stoi", "pesq", "mel_distance", "dnsmos")


@dataclass(frozen=True, eq=False)
class Clip:
    """Speech as every tokenizer is given it: mono float32 wav_S at `RATE_HZ`, and its words."""

    id: str
    text: str
    wav_S: np.ndarray


@dataclass(frozen=True)
class Version:
    """A row of the tables: the untouched audio, a tokenizer, or a tokenizer's ceiling."""

    tokenizer: str = ""
    is_ceiling: bool = False

    @property
    def name(self) -> str:
        if not self.tokenizer:
            return UNTOUCHED
        return f"{self.tokenizer}, its ceiling" if self.is_ceiling else self.tokenizer


@dataclass(frozen=True, eq=False)
class Sound:
    """One version of a clip, of exactly the clip's length; `original_S` is the clip at the same rate."""

    wav_S: np.ndarray
    sample_rate_hz: int
    original_S: np.ndarray
    code_LK: Tensor | None = None


@dataclass(frozen=True)
class Score:
    """What one version of a clip scored."""

    heard: str
    dnsmos: float
    fidelity: Fidelity


# ------------------------------------------------------------------------------------------------------- resynthesising


@torch.inference_mode()
def resynthesise(clip: Clip, tokenizers: Mapping[str, SpeechTokenizer]) -> dict[Version, Sound]:
    """The clip untouched, through each tokenizer, and through the vocoder of each that has one of its own.

    Law: sample i of every version belongs to sample i of the original. `decode` owes nothing: the look-ahead is time to
    wait in a stream, not a shift.
    """
    found = {Version(): Sound(clip.wav_S, RATE_HZ, clip.wav_S)}
    for name, tokenizer in tokenizers.items():
        rate = tokenizer.spec.sample_rate_hz
        original_S = resample(clip.wav_S, RATE_HZ, rate)
        wav_1S = torch.from_numpy(original_S)[None].to(tokenizer.device)
        token_1LX, _ = tokenizer.encode(wav_1S)
        code_LK = token_1LX[0].cpu() if tokenizer.spec.kind == "discrete" else None
        wavs = {Version(name): (tokenizer.decode(token_1LX), code_LK)}
        if isinstance(tokenizer, MelTokenizer):
            wavs[Version(name, True)] = tokenizer.through_vocoder(wav_1S), None
        for version, (decoded_1S, codes) in wavs.items():
            wav_S = decoded_1S[0, : len(original_S)].float().cpu().numpy()
            found[version] = Sound(wav_S, rate, original_S, codes)
    return found


# ------------------------------------------------------------------------------------------------------------ listening


Task = tuple[
    np.ndarray, int, np.ndarray, tuple[str, ...]
]  # wav_S, its rate, original_S, words of the recogniser's loop


class Examiner:
    """Scores one version of a clip after the other. Recognisers are kept by their words."""

    def __init__(self) -> None:
        self.with_pesq = find_spec("pesq") is not None
        self._recognisers: dict[tuple[str, ...], Recogniser] = {}
        self._dnsmos = Dnsmos()

    def __call__(self, task: Task) -> Score:
        wav_S, rate, original_S, words = task
        if words not in self._recognisers:
            self._recognisers[words] = Recogniser(words)
        return Score(
            self._recognisers[words].recognise(wav_S, rate),
            self._dnsmos.score(wav_S, rate).overall,
            fidelity(original_S, wav_S, rate, self.with_pesq),
        )


_examiner: Examiner | None = None  # of a worker process


def _start() -> None:
    global _examiner
    torch.set_num_threads(1)
    _examiner = Examiner()


def _examine(task: Task) -> Score:
    assert _examiner is not None, "the pool's initializer makes it"
    return _examiner(task)


class Examination:
    """Examines many versions of clips over `num_workers` processes (1: in this one). A context manager.

    Law: the number of workers changes nothing but the time.
    """

    def __init__(self, num_workers: int) -> None:
        # Not forked: a process that has run torch holds threads and locks that do not survive it.
        context = multiprocessing.get_context("spawn")
        self._pool = context.Pool(num_workers, _start) if num_workers > 1 else None
        self._here = Examiner() if num_workers == 1 else None

    def __enter__(self) -> Examination:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.terminate()

    def __call__(self, sounds: Iterable[Mapping[Version, Sound]], words: tuple[str, ...]) -> list[dict[Version, Score]]:
        """The scores of each version of each clip. Versions that are the same audio, as ceilings of tokenizers with the
        same vocoder, are examined once."""
        tasks: list[Task] = []
        where: list[dict[Version, int]] = []
        for versions in sounds:
            places: dict[tuple[int, bytes], int] = {}
            row = {}
            for version, sound in versions.items():
                key = sound.sample_rate_hz, sound.wav_S.tobytes()
                if key not in places:
                    places[key] = len(tasks)
                    tasks.append((sound.wav_S, sound.sample_rate_hz, sound.original_S, words))
                row[version] = places[key]
            where.append(row)
        scores = list(tqdm(self._map(tasks), total=len(tasks), desc="listening", unit="clip", leave=False))
        return [{version: scores[index] for version, index in row.items()} for row in where]

    def _map(self, tasks: Sequence[Task]) -> Iterator[Score]:
        if self._pool is not None:
            return self._pool.imap(_examine, tasks)
        assert self._here is not None
        return map(self._here, tasks)


# -------------------------------------------------------------------------------------------------------------- summing


Metrics = dict[str, Interval]


def measure(clips: Sequence[Clip], scores: Sequence[Mapping[Version, Score]], version: Version, seed: int) -> Metrics:
    """Every score of one version with its 95 % bootstrap interval over clips, and its paired differences.

    `X_over_ceiling` and `X_over_untouched` are X less that of the tokenizer's ceiling, or of the untouched audio, on
    the same resampled clips. There is no fidelity of the untouched audio to itself, and no score where no clip has one.
    """
    texts = [clip.text for clip in clips]
    bases: dict[str, Version | None] = {"": None}
    if version != Version():
        bases |= {"_over_untouched": Version()}
        ceiling = Version(version.tokenizer, True)
        bases |= {"_over_ceiling": ceiling} if ceiling in scores[0] and not version.is_ceiling else {}
    heard = {each: [row[each].heard for row in scores] for each in {version, *filter(None, bases.values())}}
    errors = {each: word_error_rate(texts, some) for each, some in heard.items()}
    information = {each: word_information(texts, some) for each, some in heard.items()}
    found: Metrics = {}
    for suffix, base in bases.items():
        minus = (errors[base].errors_N, errors[base].words_N) if base else None
        own = errors[version]
        found[f"wer{suffix}"] = bootstrap_interval(own.errors_N, own.words_N, minus=minus, seed=seed)
        found[f"wil{suffix}"] = word_information_interval(
            information[version], minus=information[base] if base else None, seed=seed
        )
        for metric in MEANS:
            if metric == "dnsmos" or (version != Version() and base != Version()):
                found[metric + suffix] = _mean(scores, metric, version, base, seed)
    return {metric: each for metric, each in found.items() if each.num}


def _mean(
    scores: Sequence[Mapping[Version, Score]], metric: str, version: Version, base: Version | None, seed: int
) -> Interval:
    def values(of: Version) -> np.ndarray:
        return np.array([getattr(row[of] if metric == "dnsmos" else row[of].fidelity, metric) for row in scores])

    value_N = values(version) - (values(base) if base else 0.0)
    return bootstrap_interval(value_N[np.isfinite(value_N)], seed=seed)


def use_of_codes(
    sounds: Sequence[Mapping[Version, Sound]], tokenizers: Mapping[str, SpeechTokenizer]
) -> dict[str, list[CodebookUse]]:
    """The use of each codebook over all clips, by tokenizer; continuous ones are left out."""
    found = {}
    for name, tokenizer in tokenizers.items():
        codes = [codes for row in sounds if (codes := row[Version(name)].code_LK) is not None]
        if codes:
            found[name] = codebook_use(torch.cat(codes), tokenizer.spec.codebook_size)
    return found


# --------------------------------------------------------------------------------------------------------------- speed


@dataclass(frozen=True)
class Speed:
    """Seconds of sound per second of computing, one stream at a time, median over the repeats.

    Attributes:
        encode: the whole clip to tokens.
        decode: all tokens to sound at once.
        stream: token by token, and the flush.
    """

    encode: float
    decode: float
    stream: float


def measure_speed(
    tokenizers: Mapping[str, SpeechTokenizer], wav_S: np.ndarray, num_threads: Sequence[int], num_repeats: int
) -> dict[str, dict[int, Speed]]:
    """Tokenizer -> threads -> speed, on a clip at `RATE_HZ`.

    Tokenizers and numbers of threads take turns within each repeat, so that a load that comes and goes hits all alike;
    the first turn warms up and does not count.
    """
    seconds: dict[tuple[str, int], list[Speed]] = {(name, num): [] for name in tokenizers for num in num_threads}
    for repeat in tqdm(range(num_repeats + 1), desc="timing", unit="repeat", leave=False):
        for (name, num), taken in seconds.items():
            with _threads(num):
                each = _time_once(tokenizers[name], wav_S)
            if repeat:
                taken.append(each)
    sound_sec = len(wav_S) / RATE_HZ
    found: dict[str, dict[int, Speed]] = {name: {} for name in tokenizers}
    for (name, num), taken in seconds.items():
        medians = (
            statistics.median(getattr(each, field.name) for each in taken) for field in dataclasses.fields(Speed)
        )
        found[name][num] = Speed(*(sound_sec / median for median in medians))
    return found


@torch.inference_mode()
def _time_once(tokenizer: SpeechTokenizer, wav_S: np.ndarray) -> Speed:
    """The seconds that each took."""
    wav_1S = torch.from_numpy(resample(wav_S, RATE_HZ, tokenizer.spec.sample_rate_hz))[None].to(tokenizer.device)
    marks = [time.perf_counter()]

    def mark(result: Any) -> Any:
        if wav_1S.is_cuda:
            torch.cuda.synchronize(wav_1S.device)
        marks.append(time.perf_counter())
        return result

    token_1LX, _ = mark(tokenizer.encode(wav_1S))
    mark(tokenizer.decode(token_1LX))
    state = tokenizer.init_state(1)
    for token_1X in token_1LX.unbind(1):
        _, state = tokenizer.step(token_1X[:, None], state)
    mark(tokenizer.flush(state))
    return Speed(*(after - before for before, after in zip(marks, marks[1:], strict=False)))


@contextmanager
def _threads(num: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(num)
    try:
        yield
    finally:
        torch.set_num_threads(before)
