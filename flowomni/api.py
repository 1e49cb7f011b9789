"""FlowOmni in five lines: load, ask, hear the answer.

Shapes: S samples.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .audio import Audio, read_audio, resample, write_audio
from .build import load_model
from .devices import as_dtype, check_device
from .fast import accelerate
from .generation import GenerationOptions, Step, generate
from .int8 import quantise
from .modeling import FlowOmniModel
from .processing import HEARD_RATE_HZ, FlowOmniProcessor
from .streams import SpeechState, Streams
from .strict import nearest

BUNDLED_MODEL = Path(__file__).parent / "models" / "flowomni-tiny"
Heard = str | Path | Audio | tuple[np.ndarray, int]


@dataclass(frozen=True)
class Question:
    """What the model is asked: exactly one of `audio` and `text`.

    Attributes:
        audio: path of an audio file, what `read_audio` made of one, or (mono float32 samples, rate in Hz).
        text: typed words.
        task: "answer", "speak" (read `text` aloud) or "transcribe" (write down `audio`).
    """

    audio: Heard | None = None
    text: str | None = None
    task: str = "answer"

    def __post_init__(self) -> None:
        if (self.audio is None) == (self.text is None):
            raise ValueError("a question has either audio or text: give exactly one of them")


@dataclass(frozen=True)
class Event:
    """What one step brought.

    Attributes:
        text: newly finished text, often "".
        wav_S: float32 samples that became final, often empty.
        state: "pad", "start", "generating", "stop" or "" when nothing is spoken.
    """

    text: str
    wav_S: np.ndarray
    state: str


@dataclass(frozen=True)
class Answer:
    """A whole answer.

    Attributes:
        text: what the model says, in words.
        wav_S: its voice, float32 [S] at `sample_rate_hz`.
        heard_sec: length of the audio that the model hears, 0 for typed questions.
        states: speech state of each step; texts: text that each step brought.
        first_audio_ms: from the end of the heard audio to the first sample: features, prompt and first steps, without
            the time to read the file. In a batch it is counted from the batch's start. None without speech.
        compute_sec: from the end of the heard audio to the end of generation. In a batch, the answer's share of the
            batch's time, in proportion to its length, so that shares add up to the time and nothing counts twice.
    """

    text: str
    wav_S: np.ndarray
    sample_rate_hz: int
    heard_sec: float
    states: list[str]
    texts: list[str]
    first_audio_ms: float | None
    compute_sec: float

    @property
    def answer_sec(self) -> float:
        """Length of the spoken answer."""
        return len(self.wav_S) / self.sample_rate_hz

    @property
    def realtime_factor(self) -> float | None:
        """Compute time over answer time, below 1 is faster than real time; in a batch, of the whole batch."""
        return self.compute_sec / self.answer_sec if self.answer_sec else None

    def save(self, path: str | Path) -> None:
        """Write the voice as a wav file (16 bit)."""
        write_audio(path, self.wav_S, self.sample_rate_hz)


@dataclass
class _Growing:
    texts: list[str] = field(default_factory=list)
    states: list[str] = field(default_factory=list)
    wavs: list[np.ndarray] = field(default_factory=list)
    first_audio_ms: float | None = None

    @property
    def num_samples(self) -> int:
        return sum(map(len, self.wavs))


class FlowOmni:
    """A model with its processor.

    >>> omni = FlowOmni.from_pretrained()
    >>> answer = omni.answer("question.wav")
    >>> print(answer.text)
    >>> answer.save("answer.wav")
    """

    def __init__(self, model: FlowOmniModel, processor: FlowOmniProcessor):
        self.model = model
        self.processor = processor

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path | None = None,
        device: str = "cpu",
        *,
        dtype: str | torch.dtype = "float32",
        compile: bool = False,
        int8: bool = False,
    ) -> FlowOmni:
        """Load a model folder; None loads the model in the box.

        Args:
            dtype: of the language model and the output blocks, such as "bfloat16" on a GPU. The ears, the head that
                draws speech and the speech tokenizer stay in float32.
            compile: compile the steps of generation. The first answer waits for that, for a minute or more; later
                processes find half of the work on disk (the model in the box on one core: 95 s, then 47).
            int8: int8 weights for the language model's linear layers; needs torchao, and pays off with `compile`.

        Raises:
            ValueError: there is no such device here, or `dtype` is none that a model can have.
        """
        check_device(device)
        chosen = as_dtype(dtype)
        model, processor = load_model(BUNDLED_MODEL if folder is None else folder)
        for part in (model.llm, model.output_blocks):
            if part is not None:
                part.to(dtype=chosen)
        model.to(device)  # type: ignore[arg-type]  # transformers wraps it in a way that mypy cannot follow
        if int8:
            quantise(model)
        if compile:
            accelerate(model)
        return cls(model, processor)

    @property
    def sample_rate_hz(self) -> int:
        """Rate of the spoken answers."""
        return self.model.speech_tokenizer.spec.sample_rate_hz

    def answer(
        self,
        audio: Heard | None = None,
        *,
        text: str | None = None,
        speak: bool = True,
        seed: int = 0,
        sampling: dict[str, Any] | None = None,
        stop_threshold: float = 0.5,
    ) -> Answer:
        """Answer one question, heard or typed.

        Args:
            speak: False answers in text only.
            seed: of the sampled speech; the same seed gives the same answer.
            sampling: overrides of the head's default sampling, such as {"temperature": 0.7, "num_steps": 4}.
        """
        question = Question(audio, text)
        return self.answers([question], speak=speak, seed=seed, sampling=sampling, stop_threshold=stop_threshold)[0]

    def say(self, text: str, *, seed: int = 0, sampling: dict[str, Any] | None = None) -> Answer:
        """Read `text` aloud."""
        return self.answers([Question(text=text, task="speak")], seed=seed, sampling=sampling)[0]

    def transcribe(self, audio: Heard) -> str:
        """Write down what `audio` says."""
        return self.answers([Question(audio, task="transcribe")], speak=False)[0].text

    def answers(
        self,
        questions: Sequence[Question],
        *,
        batch_size: int = 8,
        speak: bool = True,
        seed: int = 0,
        sampling: dict[str, Any] | None = None,
        stop_threshold: float = 0.5,
    ) -> list[Answer]:
        """Answer independent questions in batches; each answer is what it would be alone (same seed)."""
        options = self.generation_options(speak, sampling, stop_threshold)
        found: list[Answer] = []
        for start in range(0, len(questions), batch_size):
            batch = questions[start : start + batch_size]
            heard = [self._hear(q) for q in batch]
            growing = [_Growing() for _ in batch]
            began = time.perf_counter()
            prompts = [self._prompt(q, h) for q, h in zip(batch, heard, strict=True)]
            for step in self._generate(prompts, options, seed):
                _collect(growing, step, time.perf_counter() - began)
            found += self._finish(growing, heard, time.perf_counter() - began)
        return found

    def stream(
        self,
        question: Question,
        *,
        speak: bool = True,
        seed: int = 0,
        sampling: dict[str, Any] | None = None,
        stop_threshold: float = 0.5,
    ) -> Generator[Event, None, Answer]:
        """Answer one question step by step; the concatenated events equal `answer`, which the generator returns."""
        options = self.generation_options(speak, sampling, stop_threshold)
        heard, growing = self._hear(question), _Growing()
        began = time.perf_counter()
        for step in self._generate([self._prompt(question, heard)], options, seed):
            _collect([growing], step, time.perf_counter() - began)
            yield Event(step.texts[0], step.wavs[0].float().numpy(), _name(step.states[0]))
        return self._finish([growing], [heard], time.perf_counter() - began)[0]

    def _generate(self, prompts: Sequence[Streams], options: GenerationOptions, seed: int) -> Iterator[Step]:
        generators = [torch.Generator().manual_seed(seed) for _ in prompts]
        return generate(self.model, self.processor, prompts, options, generators)

    def generation_options(
        self, speak: bool, sampling: dict[str, Any] | None, stop_threshold: float
    ) -> GenerationOptions:
        """Options with overrides of the head's own sampling; a ValueError names an unknown one."""
        default = self.model.head.default_sampling()
        known = [f.name for f in dataclasses.fields(default)]
        for name in sampling or {}:
            if name not in known:
                raise ValueError(f"sampling has {name!r}, which this model's head does not know{nearest(name, known)}")
        chosen = dataclasses.replace(default, **(sampling or {}))
        return GenerationOptions(speak=speak, sampling=chosen, stop_threshold=stop_threshold)

    def _hear(self, question: Question) -> Audio | None:
        return None if question.audio is None else load_heard(question.audio, self.processor.max_heard_sec)

    def _prompt(self, question: Question, heard: Audio | None) -> Streams:
        if heard is None:
            turn = self.processor.turn("user", text=question.text)
        else:
            turn = self.processor.turn("user", wav_S=heard.wav_S, total_sec=heard.source_sec)
        return self.processor.prompt([turn], question.task)

    def _finish(self, growing: list[_Growing], heard: list[Audio | None], compute_sec: float) -> list[Answer]:
        total_samples = sum(row.num_samples for row in growing)
        answers = []
        for row, audio in zip(growing, heard, strict=True):
            share = row.num_samples / total_samples if total_samples else 1 / len(growing)
            answer = Answer(
                text="".join(row.texts).strip(),
                wav_S=np.concatenate([*row.wavs, np.zeros(0, np.float32)]),
                sample_rate_hz=self.sample_rate_hz,
                heard_sec=0.0 if audio is None else min(audio.duration_sec, self.processor.max_heard_sec),
                states=row.states,
                texts=row.texts,
                first_audio_ms=row.first_audio_ms,
                compute_sec=share * compute_sec,
            )
            answers.append(answer)
        return answers


def load_heard(audio: Heard, max_sec: float) -> Audio:
    """A heard question as mono audio at 16 kHz; of a file, at most the first `max_sec` (0: all of it) are decoded."""
    if isinstance(audio, tuple):
        wav_S, rate = audio
        audio = Audio(np.asarray(wav_S, np.float32), rate, len(wav_S) / rate)
    if isinstance(audio, Audio):
        return Audio(resample(audio.wav_S, audio.sample_rate_hz, HEARD_RATE_HZ), HEARD_RATE_HZ, audio.source_sec)
    return read_audio(audio, HEARD_RATE_HZ, max_sec=max_sec or None)


def _collect(growing: list[_Growing], step: Step, elapsed_sec: float) -> None:
    for index, row in enumerate(growing):
        if step.texts[index] or step.states[index] is not None:
            row.texts.append(step.texts[index])
            row.states.append(_name(step.states[index]))
        if len(step.wavs[index]):
            row.wavs.append(step.wavs[index].float().numpy())
            if row.first_audio_ms is None:
                row.first_audio_ms = elapsed_sec * 1000


def _name(state: SpeechState | None) -> str:
    return "" if state is None else state.name.lower()
