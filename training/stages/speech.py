"""Stage `speech`: the model learns to hear and to speak; alignment, speech-to-speech and fine-tuning are its configs.

Shapes: B batch, L speech tokens, D latents, S samples, C Whisper mel bins, F Whisper mel frames.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from flowomni.api import FlowOmni, Question
from flowomni.audio import read_audio
from flowomni.build import assemble, load_model, save_model
from flowomni.configuration import FlowOmniConfig
from flowomni.encoder import num_heard_positions, num_mel_frames
from flowomni.evaluation import hear
from flowomni.evaluation.metrics import word_error_rate
from flowomni.layouts import Turn
from flowomni.modeling import FlowOmniModel
from flowomni.processing import HEARD_RATE_HZ
from flowomni.streams import Streams, collate
from flowomni.tokenizers import SpeechTokenizer

from ..batching import length_batches, spec_augment
from ..lora import LoraOptions, add_lora, merge_lora
from ..manifest import Conversation, Utterance, read_manifest
from .base import Stage, rng_for

# task -> (what the user gives, what the assistant gives, the layout's instruction)
TASKS = {
    "speech_to_speech": ("audio", "speech", "answer"),
    "speech_to_text": ("audio", "text", "answer"),
    "text_to_speech": ("text", "speech", "answer"),
    "text_to_text": ("text", "text", "answer"),
    "transcribe": ("audio", "text", "transcribe"),
    "speak": ("text", "speech", "speak"),
}
Trains = Literal["frozen", "full", "lora"]


@dataclass
class PartsOptions:
    """What a new model is assembled from; see `flowomni.build.assemble`."""

    llm: str
    speech_tokenizer: str
    encoder: Any = None
    encoder_stack: int = 4
    head: dict[str, Any] = field(default_factory=lambda: {"kind": "flow"})
    output_blocks: dict[str, Any] = field(default_factory=dict)
    layout: dict[str, Any] = field(default_factory=dict)
    loss: dict[str, Any] = field(default_factory=dict)


@dataclass
class TrainsOptions:
    """Which parts train. The speech tokenizer never does."""

    llm: Trains = "full"
    encoder: Literal["frozen", "full"] = "full"
    projector: Literal["frozen", "full"] = "full"
    voice: Literal["frozen", "full"] = "full"  # output blocks, state head, flow head, state embedding


@dataclass
class SpeechOptions:
    """Options of stage `speech`.

    Attributes:
        manifest: JSONL of conversations, or the folder that holds manifest.jsonl.
        model: folder of a FlowOmni model to go on from; exclusive with `parts`.
        parts: what to assemble a new model from.
        tasks: relative frequency of each task; names in `TASKS`.
        trains, lora: what trains, and how LoRA is set where a part says "lora".
        head: overrides of the loaded model's head section (for another objective, say); sizes must stay.
        batch_size: conversations per micro-batch.
        max_example_sec: longer conversations are left out (counted and printed).
        mask_time_frames, mask_mel_bins: largest masked span of the heard features in training (SpecAugment).
        attention: implementation of attention in training; "eager" is faster on CPUs for short sequences (flash
            attention's backward pass costs more there than the score matrix), "sdpa" elsewhere.
        num_eval: held-out conversations that are answered aloud at each evaluation.
    """

    manifest: str
    model: str | None = None
    parts: PartsOptions | None = None
    tasks: dict[str, float] = field(default_factory=lambda: {"speech_to_speech": 1.0})
    trains: TrainsOptions = field(default_factory=TrainsOptions)
    lora: LoraOptions = field(default_factory=LoraOptions)
    head: dict[str, Any] = field(default_factory=dict)
    batch_size: int = 32
    max_example_sec: float = 30.0
    mask_time_frames: int = 20
    mask_mel_bins: int = 12
    attention: Literal["sdpa", "eager"] = "sdpa"
    num_eval: int = 24

    def __post_init__(self) -> None:
        if (self.model is None) == (self.parts is None):
            raise ValueError("options needs exactly one of model (a folder) and parts (what to assemble)")
        unknown = set(self.tasks) - set(TASKS)
        if unknown or not self.tasks:
            raise ValueError(f"options.tasks has {sorted(unknown)}; known tasks: {', '.join(TASKS)}")
        if self.head and self.model is None:
            raise ValueError("options.head overrides a loaded model's head: with parts, set parts.head")


class SpeechStage(Stage):
    """All tasks over one manifest, with the four streams' losses."""

    Options = SpeechOptions

    def __init__(self, options: SpeechOptions, seed: int):
        self.options, self.seed = options, seed
        self.model, self.processor = self._build()
        for part in self.model.modules():
            if isinstance(part, PreTrainedModel) and not isinstance(part, FlowOmniModel | SpeechTokenizer):
                part.set_attn_implementation(options.attention)
        self.module = self.model
        self.tuner = set_trainable(self.model, options.trains, options.lora)
        loss = self.model.loss_config
        self.weights = {"text": loss.text_weight, "state": loss.state_weight, "speech": loss.speech_weight}
        self.weights["ctc"] = loss.ctc_weight
        self.train = self._fitting(read_manifest(options.manifest, "train"))
        self.valid = read_manifest(options.manifest, "valid") if options.num_eval else []
        self.words = sorted({word for c in self.train for word in c.answer.text.split()})
        names = sorted(options.tasks)  # their order in the file means nothing
        shares = np.array([options.tasks[n] for n in names], dtype=float)
        self.task_names, self.task_shares = names, shares / shares.sum()
        self._features: dict[Path, np.ndarray] = {}
        self._tokens: dict[Path, Tensor] = {}
        self._plans: dict[int, list[list[tuple[int, str]]]] = {}

    def _build(self) -> tuple[FlowOmniModel, Any]:
        if self.options.parts is not None:
            return assemble(**asdict(self.options.parts))
        assert self.options.model is not None
        model, processor = load_model(self.options.model)
        return (with_head(model, self.options.head), processor) if self.options.head else (model, processor)

    def _fitting(self, items: list[Conversation]) -> list[Conversation]:
        kept = [c for c in items if sum(t.duration_sec for t in c.turns) <= self.options.max_example_sec]
        if len(kept) < len(items):
            print(f"{len(items) - len(kept)} conversations are longer than max_example_sec and left out")
        if not kept:
            raise ValueError(f"options.max_example_sec {self.options.max_example_sec} leaves no conversation")
        return kept

    # ------------------------------------------------------------------------------------------------- batches

    def batch(self, index: int, rank: int, world_size: int) -> Streams:
        place = index * world_size + rank
        per_epoch = max(1, len(self.train) // self.options.batch_size)
        epoch, position = divmod(place, per_epoch)
        rng = rng_for(self.seed, place, 3)
        return collate([self._example(self.train[i], task, rng) for i, task in self._plan(epoch)[position]])

    def _plan(self, epoch: int) -> list[list[tuple[int, str]]]:
        """Batches of (conversation, task) of one epoch, alike in length."""
        if epoch not in self._plans:
            rng = rng_for(self.seed, epoch, 4)
            drawn = rng.choice(self.task_names, size=len(self.train), p=self.task_shares)
            tasks = [self._possible(c, str(t)) for c, t in zip(self.train, drawn, strict=True)]
            lengths = [self._length(c, t) for c, t in zip(self.train, tasks, strict=True)]
            batches = length_batches(lengths, self.options.batch_size, rng)
            self._plans = {epoch: [[(i, tasks[i]) for i in batch] for batch in batches]}
        return self._plans[epoch]

    def _possible(self, item: Conversation, task: str) -> str:
        """The task, with what a side lacks replaced: no words to read, no recording to hear or to speak."""
        user, assistant, instruction = TASKS[task]
        if user == "audio" and item.question.audio is None:
            user = "text"
        if user == "text" and instruction == "answer" and not item.question.text:
            user = "audio"  # silence and noise can only be heard
        if assistant == "speech" and item.answer.audio is None:
            assistant = "text"
        if task == "transcribe" and not item.question.text:
            return "speech_to_text"
        if instruction == "answer":
            return {v: k for k, v in TASKS.items()}[user, assistant, instruction]
        return task

    def _length(self, item: Conversation, task: str) -> int:
        user, assistant, _ = TASKS[task]
        frames = num_mel_frames(int(item.question.duration_sec * HEARD_RATE_HZ))
        heard = num_heard_positions(frames, self.model.config.encoder_stack) if user == "audio" else 8
        return heard + (int(item.answer.duration_sec * self.model.speech_tokenizer.spec.tokens_per_sec) or 8)

    def _example(self, item: Conversation, task: str, rng: np.random.Generator | None) -> Streams:
        user, assistant, instruction = TASKS[task]
        answer, question = item.answer, item.question
        if task == "speak":
            asks = Turn("user", text=answer.text)
        elif user == "text":
            asks = Turn("user", text=question.text)
        else:
            heard_CF = self._heard(question)
            if rng is not None:
                heard_CF = spec_augment(heard_CF, rng, self.options.mask_time_frames, self.options.mask_mel_bins)
            asks = Turn("user", text=question.text, heard_CF=torch.from_numpy(heard_CF))
        says = Turn(
            "assistant",
            text=question.text if task == "transcribe" else answer.text,
            speech_LX=self._spoken(answer) if assistant == "speech" else None,
        )
        return self.processor.layout.example([asks, says], instruction)

    def _heard(self, turn: Utterance) -> np.ndarray:
        assert turn.audio is not None
        if turn.audio not in self._features:
            clip = read_audio(turn.audio, HEARD_RATE_HZ, max_sec=self.processor.max_heard_sec)
            self._features[turn.audio] = self.processor.heard_features.features(clip.wav_S).numpy().astype(np.float16)
        return self._features[turn.audio].astype(np.float32)

    def _spoken(self, turn: Utterance) -> Tensor:
        assert turn.audio is not None
        if turn.audio not in self._tokens:
            tokenizer = self.model.speech_tokenizer
            wav_S = read_audio(turn.audio, tokenizer.spec.sample_rate_hz).wav_S
            with torch.no_grad(), torch.autocast("cpu", enabled=False):
                token_BLX, mask_BL = tokenizer.encode(torch.from_numpy(wav_S)[None].to(self.model.device))
            self._tokens[turn.audio] = token_BLX[0, mask_BL[0]].cpu()
        return self._tokens[turn.audio]

    def counts(self, batch: Streams) -> dict[str, float]:
        return batch.counts()

    def num_tokens(self, batch: Streams) -> int:
        return int(batch.mask_BL.sum())

    # ---------------------------------------------------------------------------------------------- evaluation

    def evaluate(self, folder: Path, step: int) -> dict[str, float]:
        """Answer held-out questions aloud, listen with the recogniser, and measure the losses on held-out data."""
        if not self.valid:
            return {}
        items = [self.valid[i] for i in range(0, len(self.valid), max(1, len(self.valid) // self.options.num_eval))]
        items = items[: self.options.num_eval]
        values = self._held_out_losses(items)
        omni = FlowOmni(self.model, self.processor)
        speaks = any(TASKS[t][1] == "speech" for t in self.options.tasks)
        values |= self._answers(omni, items, speaks, folder)
        if "transcribe" in self.options.tasks:
            said = [c for c in items if c.question.text and c.question.audio]
            heard = [omni.transcribe(_path(c.question)) for c in said]
            values["transcribe_wer"] = word_error_rate([c.question.text for c in said], heard).rate
        return values

    def _held_out_losses(self, items: list[Conversation]) -> dict[str, float]:
        generator = torch.Generator().manual_seed(self.seed)
        task = max(self.options.tasks, key=lambda t: self.options.tasks[t])
        batch = collate([self._example(c, self._possible(c, task), None) for c in items]).to(self.model.device)
        losses = self.model(batch, generator)
        return {f"loss/{k}": float(v.sum) / max(1.0, float(v.count)) for k, v in losses.items() if "/" not in k}

    def _answers(self, omni: FlowOmni, items: list[Conversation], speaks: bool, folder: Path) -> dict[str, float]:
        questions = [self._question(c) for c in items]
        answers = omni.answers(questions, speak=speaks, batch_size=len(questions))
        wanted = [c.answer.text for c in items]
        values = {"accuracy": sum(a.text == w for a, w in zip(answers, wanted, strict=True)) / len(items)}
        if not speaks:
            return values
        recognised = hear([a.wav_S for a in answers], omni.sample_rate_hz, self.words)
        values["wer_own_text"] = word_error_rate([a.text or "-" for a in answers], recognised).rate
        values["wer_right_answer"] = word_error_rate(wanted, recognised).rate
        lines = [f"{'wanted':40} | {'text':40} | recognised"]
        for index, (answer, want, said) in enumerate(zip(answers, wanted, recognised, strict=True)):
            lines.append(f"{want:40} | {answer.text:40} | {said}")
            if index < 6 and answer.answer_sec:
                answer.save(folder / f"{index}.wav")
        (folder / "answers.txt").write_text("\n".join(lines) + "\n")
        return values

    def _question(self, item: Conversation) -> Question:
        hears = any(TASKS[t][0] == "audio" and TASKS[t][2] == "answer" for t in self.options.tasks)
        if not hears and TASKS.get("speak") and "speak" in self.options.tasks:
            return Question(text=item.answer.text, task="speak")
        return Question(audio=_path(item.question)) if item.question.audio else Question(text=item.question.text)

    def save(self, folder: Path) -> None:
        merge_lora(self.tuner)
        save_model(self.model, self.processor, folder)


def _path(turn: Utterance) -> Path:
    assert turn.audio is not None
    return turn.audio


def with_head(model: FlowOmniModel, changes: dict[str, Any]) -> FlowOmniModel:
    """The same weights under a head section with `changes` (another objective, other noise); sizes must stay."""
    values = model.config.to_dict()
    values["head"] = {**model.config.head, **changes}
    changed = FlowOmniModel(FlowOmniConfig(**{k: v for k, v in values.items() if k != "model_type"}))
    changed.load_state_dict(model.state_dict())
    return changed


def set_trainable(model: FlowOmniModel, trains: TrainsOptions, lora: LoraOptions) -> Any:
    """Freeze and thaw the parts; returns the LoRA tuner, or None."""
    model.requires_grad_(False)
    parts: dict[str, list[Any]] = {
        "llm": [model.llm],
        "encoder": [getattr(model, "encoder", None), getattr(model, "ctc", None)],
        "projector": [getattr(model, "projector", None)],
        "voice": [model.output_blocks, model.state_head, model.head, model.state_embedding],
    }
    tuner = None
    for name, modules in parts.items():
        how = getattr(trains, name)
        if how == "lora":
            tuner = add_lora(model.llm, lora)
        for module in modules:
            if module is not None and how == "full":
                module.requires_grad_(True)
    if hasattr(model, "encoder"):
        model.encoder.whisper.embed_positions.requires_grad_(False)
    return tuner
