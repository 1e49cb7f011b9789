"""FlowOmni in five lines: load, ask, hear the answer.

Shapes: S samples.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .audio import read_audio, write_audio
from .build import load_model
from .generation import GenerationOptions, Step, generate
from .modeling import FlowOmniModel
from .processing import HEARD_RATE_HZ, FlowOmniProcessor
from .streams import SpeechState, Streams

BUNDLED_MODEL = Path(__file__).parent / "models" / "flowomni-tiny"


@dataclass(frozen=True)
class Question:
    """What the model is asked: exactly one of `audio` and `text`.

    Attributes:
        audio: path of an audio file, or (mono float32 samples, rate in Hz).
        text: typed words.
        task: "answer", "speak" (read `text` aloud) or "transcribe" (write down `audio`).
    """

    audio: str | Path | tuple[np.ndarray, int] | None = None
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
        heard_sec: length of the heard audio, 0 for typed questions.
        states: speech state of each step; texts: text that each step brought.
        first_audio_ms: from the end of the heard audio (the call) to the first sample; None without speech.
        compute_sec: from the call to the last sample (of the whole batch, when there were several questions).
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
        """Compute time over answer time: below 1 is faster than real time."""
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
    compute_sec: float = 0.0


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
    def from_pretrained(cls, folder: str | Path | None = None, device: str = "cpu") -> FlowOmni:
        """Load a model folder; None loads the model in the box."""
        model, processor = load_model(BUNDLED_MODEL if folder is None else folder)
        return cls(model.to(device), processor)

    @property
    def sample_rate_hz(self) -> int:
        """Rate of the spoken answers."""
        return self.model.speech_tokenizer.spec.sample_rate_hz

    def answer(
        self,
        audio: str | Path | tuple[np.ndarray, int] | None = None,
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

    def transcribe(self, audio: str | Path | tuple[np.ndarray, int]) -> str:
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
        options = self._options(speak, sampling, stop_threshold)
        found: list[Answer] = []
        for start in range(0, len(questions), batch_size):
            prompts, heard = zip(*[self._prompt(q) for q in questions[start : start + batch_size]], strict=True)
            growing = [_Growing() for _ in prompts]
            began = time.perf_counter()
            for step in self._generate(prompts, options, seed):
                _collect(growing, step, time.perf_counter() - began)
            found += [self._finish(g, sec) for g, sec in zip(growing, heard, strict=True)]
        return found

    def stream(
        self,
        question: Question,
        *,
        speak: bool = True,
        seed: int = 0,
        sampling: dict[str, Any] | None = None,
        stop_threshold: float = 0.5,
    ) -> Iterator[Event]:
        """Answer one question step by step; the concatenated events equal `answer`."""
        prompt, _ = self._prompt(question)
        for step in self._generate([prompt], self._options(speak, sampling, stop_threshold), seed):
            yield Event(step.texts[0], step.wavs[0].float().numpy(), _name(step.states[0]))

    def _generate(self, prompts: Sequence[Streams], options: GenerationOptions, seed: int) -> Iterator[Step]:
        generators = [torch.Generator().manual_seed(seed) for _ in prompts]
        return generate(self.model, self.processor, prompts, options, generators)

    def _options(self, speak: bool, sampling: dict[str, Any] | None, stop_threshold: float) -> GenerationOptions:
        head = self.model.head
        chosen = dataclasses.replace(head.default_sampling(), **(sampling or {}))
        return GenerationOptions(speak=speak, sampling=chosen, stop_threshold=stop_threshold)

    def _prompt(self, question: Question) -> tuple[Streams, float]:
        if question.audio is None:
            turn = self.processor.turn("user", text=question.text)
            return self.processor.prompt([turn], question.task), 0.0
        wav_S, total_sec = load_heard(question.audio, self.processor.max_heard_sec)
        turn = self.processor.turn("user", wav_S=wav_S, total_sec=total_sec)
        return self.processor.prompt([turn], question.task), len(wav_S) / HEARD_RATE_HZ

    def _finish(self, growing: _Growing, heard_sec: float) -> Answer:
        wav_S = np.concatenate([*growing.wavs, np.zeros(0, np.float32)])
        text = "".join(growing.texts).strip()
        return Answer(
            text=text,
            wav_S=wav_S,
            sample_rate_hz=self.sample_rate_hz,
            heard_sec=heard_sec,
            states=growing.states,
            texts=growing.texts,
            first_audio_ms=growing.first_audio_ms,
            compute_sec=growing.compute_sec,
        )


def load_heard(audio: str | Path | tuple[np.ndarray, int], max_sec: float) -> tuple[np.ndarray, float]:
    """16 kHz mono samples of a heard question (at most `max_sec` and one second) and the source's length in seconds."""
    if isinstance(audio, tuple):
        import soxr

        wav_S, rate = audio
        return soxr.resample(np.asarray(wav_S, np.float32), rate, HEARD_RATE_HZ), len(wav_S) / rate
    clip = read_audio(audio, HEARD_RATE_HZ, max_sec=max_sec or None)
    return clip.wav_S, clip.source_sec


def _collect(growing: list[_Growing], step: Step, elapsed_sec: float) -> None:
    for index, row in enumerate(growing):
        if step.texts[index] or step.states[index] is not None:
            row.texts.append(step.texts[index])
            row.states.append(_name(step.states[index]))
        if len(step.wavs[index]):
            row.wavs.append(step.wavs[index].float().numpy())
            if row.first_audio_ms is None:
                row.first_audio_ms = elapsed_sec * 1000
            row.compute_sec = elapsed_sec
        elif not row.wavs:
            row.compute_sec = elapsed_sec


def _name(state: SpeechState | None) -> str:
    return "" if state is None else state.name.lower()
