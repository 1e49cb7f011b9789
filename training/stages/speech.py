"""Stage `speech`: the model learns to hear and to speak; alignment, speech-to-speech and fine-tuning are its configs.

Shapes: B batch, L speech tokens, D latents, S samples, C Whisper mel bins, F Whisper mel frames.
"""

from __future__ import annotations

import copy
import json
import math
from bisect import bisect_right
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from transformers import PreTrainedModel

from flowomni.api import FlowOmni, Question
from flowomni.build import assemble, load_model, save_model, spell
from flowomni.encoder import num_heard_positions, num_mel_frames
from flowomni.evaluation import hear
from flowomni.evaluation.metrics import word_error_rate
from flowomni.evaluation.spectrogram import write_spectrogram
from flowomni.heads import HEADS, head_config
from flowomni.layouts import Turn
from flowomni.modeling import FlowOmniModel
from flowomni.processing import HEARD_RATE_HZ
from flowomni.streams import Streams, collate
from flowomni.tokenizers import SpeechTokenizer

from ..batching import budget_batches, length_batches, spec_augment
from ..guidance import GuidedStudent
from ..lora import LoraOptions, merge_lora, save_adapters
from ..manifest import Conversation, Utterance, examples, read_manifest
from ..parts import TrainsOptions, set_trainable, with_sections
from ..recordings import Recordings, playable
from ..summary import ANSWERS
from .base import Stage, rng_for

NUM_KEPT = 6  # spoken answers of an evaluation that are kept as sound
# task -> (what the user gives, what the assistant gives, the layout's instruction)
TASKS = {
    "speech_to_speech": ("audio", "speech", "answer"),
    "speech_to_text": ("audio", "text", "answer"),
    "text_to_speech": ("text", "speech", "answer"),
    "text_to_text": ("text", "text", "answer"),
    "transcribe": ("audio", "text", "transcribe"),
    "speak": ("text", "speech", "speak"),
}
# what is asked and what is answered, each turn as "text", "audio" (heard) or "speech" (spoken)
Sides = tuple[list[tuple[Utterance, str]], tuple[Utterance, str]]


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
    projector: str | None = None


@dataclass
class SpeechOptions:
    """Options of stage `speech`.

    Attributes:
        manifest: JSONL of conversations, the folder that holds manifest.jsonl, or a folder that
            `python -m training.prepare` made of one for this model.
        model: folder of a FlowOmni model to go on from; exclusive with `parts`.
        parts: what to assemble a new model from.
        tasks: relative frequency of each task; names in `TASKS`.
        trains, lora: what trains, and how LoRA is set where a part says "lora".
        head, output_blocks, loss: overrides of the loaded model's sections (another objective, say, letters for the
            output blocks, or a loss of its own for the ears); what the model has stays, and so must its sizes.
        distill_guidance: scale of classifier-free guidance that the model learns to give in one pass, from itself: the
            loaded model stays in memory as the teacher, see `training.guidance`. None: speech is learned from data.
        families: share of each of the manifest's families ("" for none) in an epoch; those it leaves out do not train.
            Empty: as they come. A rare family with a large share repeats its conversations.
        batch_size: conversations per micro-batch.
        max_tokens_per_batch: positions per micro-batch, padding included; batch_size then means nothing.
        max_example_sec: longest question with its answer, others are left out (counted and printed); as many of the
            turns before them as fit into it are their context.
        mask_time_frames, mask_mel_bins: largest masked span of the heard features in training (SpecAugment).
        attention: implementation of attention in training; "eager" is faster on CPUs for short sequences (flash
            attention's backward pass costs more there than the score matrix), "sdpa" elsewhere.
        num_eval: held-out conversations, of the families that train, that are answered aloud at each evaluation.
    """

    manifest: str
    model: str | None = None
    parts: PartsOptions | None = None
    tasks: dict[str, float] = field(default_factory=lambda: {"speech_to_speech": 1.0})
    trains: TrainsOptions = field(default_factory=TrainsOptions)
    lora: LoraOptions = field(default_factory=LoraOptions)
    head: dict[str, Any] = field(default_factory=dict)
    output_blocks: dict[str, Any] = field(default_factory=dict)
    loss: dict[str, Any] = field(default_factory=dict)
    distill_guidance: float | None = None
    families: dict[str, float] = field(default_factory=dict)
    batch_size: int = 32
    max_tokens_per_batch: int | None = None
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
        if self.max_tokens_per_batch is not None and self.max_tokens_per_batch < 1:
            raise ValueError(f"options.max_tokens_per_batch is {self.max_tokens_per_batch}; it must be at least 1")
        for section in ("head", "output_blocks", "loss"):
            if getattr(self, section) and self.model is None:
                raise ValueError(f"options.{section} overrides a loaded model's: with parts, set parts.{section}")
        if self.families and not (min(self.families.values()) >= 0 < sum(self.families.values())):
            raise ValueError(f"options.families is {self.families}; shares are not negative, and one is above 0")
        if self.lora.save == "adapters" and self.model is None:
            raise ValueError("options.lora.save is 'adapters', but these fit a saved model alone: set options.model")
        if self.output_blocks and self.lora.save == "adapters":
            raise ValueError(
                "options.lora.save is 'adapters', but a model with options.output_blocks has another config than its "
                "base, which adapters do not carry: set options.lora.save to 'merged'"
            )
        if self.distill_guidance is not None:
            self._check_guidance(self.distill_guidance)

    def _check_guidance(self, scale: float) -> None:
        if not (scale > 1 and math.isfinite(scale)):
            raise ValueError(f"options.distill_guidance is {scale}; it must be above 1, which is no guidance")
        if self.model is None:
            raise ValueError("options.distill_guidance needs a trained model to learn from: set options.model")
        if self.lora.save == "adapters":
            raise ValueError(
                "options.lora.save is 'adapters', but a model with options.distill_guidance has another config than "
                "its base, which adapters do not carry: set options.lora.save to 'merged'"
            )


class SpeechStage(Stage):
    """All tasks over one manifest, with the four streams' losses."""

    Options = SpeechOptions

    def __init__(self, options: SpeechOptions, seed: int):
        self.options, self.seed = options, seed
        self.model, self.processor, teacher = self._build()
        for part in [*self.model.modules(), *(teacher.modules() if teacher is not None else ())]:
            if isinstance(part, PreTrainedModel) and not isinstance(part, FlowOmniModel | SpeechTokenizer):
                part.set_attn_implementation(options.attention)
        self.module: FlowOmniModel | GuidedStudent = self.model
        if teacher is not None and options.distill_guidance is not None:
            self.module = GuidedStudent(self.model, teacher, options.distill_guidance)
        self.tuners = set_trainable(self.model, options.trains, options.lora)
        loss = self.model.loss_config
        self.weights = {"text": loss.text_weight, "state": loss.state_weight, "speech": loss.speech_weight}
        self.weights |= {"ctc": loss.ctc_weight, "text_ctc": loss.text_ctc_weight}
        self.train = self._fitting(read_manifest(options.manifest, "train"))
        self._check_families()
        self.valid = self._held_out() if options.num_eval else []
        self.words = sorted({word for c in self.train for word in c.answer.text.split()})
        names = sorted(options.tasks)  # their order in the file means nothing
        shares = np.array([options.tasks[n] for n in names], dtype=float)
        self.task_names, self.task_shares = names, shares / shares.sum()
        self.recordings = Recordings(options.manifest, self.model.speech_tokenizer, self.processor.heard_features)
        self._plans: dict[int, list[list[tuple[int, str]]]] = {}
        self._first_places = [0]  # of each epoch, and of the one after
        self._num_ids: dict[str, int] = {}
        self._template_lengths: dict[tuple[str, ...], int] = {}

    def prepare_for_engine(self, engine: str) -> None:
        if self.options.distill_guidance is not None:
            raise ValueError(
                f"options.distill_guidance does not go with {engine}, which would have to hold the teacher too: use "
                "one_cpu, two_cpu, ddp or multi_node of configs/accelerate"
            )
        self.model.uniform = True
        self.recordings.tokenizer = copy.deepcopy(self.model.speech_tokenizer)

    def _build(self) -> tuple[FlowOmniModel, Any, FlowOmniModel | None]:
        """The model that trains, its processor, and the teacher if there is one."""
        if self.options.parts is not None:
            return *assemble(**asdict(self.options.parts)), None
        assert self.options.model is not None
        loaded, processor = load_model(self.options.model)
        changes = section_changes(loaded.config.head, self.options)
        model = with_sections(loaded, changes) if any(changes.values()) else loaded
        if self.options.output_blocks:
            spell(model, processor.text_tokenizer)
        return model, processor, loaded if self.options.distill_guidance is not None else None

    def _held_out(self) -> list[Conversation]:
        """The validation split, of the families that are trained; all of it where it has none of them."""
        found = read_manifest(self.options.manifest, "valid")
        return [c for c in found if self.options.families.get(c.family, 0.0) > 0] or found

    def _check_families(self) -> None:
        """ValueError where `families` names what the manifest's training split does not have."""
        known = {c.family for c in self.train}
        unknown = sorted(name for name in self.options.families if name not in known)
        if unknown:
            raise ValueError(
                f"options.families has {unknown}; {self.options.manifest} trains on {', '.join(sorted(known))}"
            )

    def _fitting(self, items: list[Conversation]) -> list[Conversation]:
        limit = self.options.max_example_sec
        found = [example for c in items for example in examples(c, limit)]
        kept = [c for c in found if sum(t.duration_sec for t in c.turns) <= limit]
        if len(kept) < len(found):
            print(f"{len(found) - len(kept)} conversations are longer than max_example_sec and left out")
        if not kept:
            raise ValueError(f"options.max_example_sec {limit} leaves no conversation")
        return kept

    # ------------------------------------------------------------------------------------------------- batches

    def batch(self, index: int, rank: int, world_size: int) -> Streams:
        place = index * world_size + rank
        epoch, position = self._locate(place)
        rng = rng_for(self.seed, place, 3)
        return collate([self._example(self.train[i], task, rng) for i, task in self._plan(epoch)[position]])

    def names(self, index: int, rank: int, world_size: int) -> list[str]:
        epoch, position = self._locate(index * world_size + rank)
        return [self.train[i].id for i, _ in self._plan(epoch)[position]]

    def _locate(self, place: int) -> tuple[int, int]:
        """Epoch of a micro-batch and its position there. By token budget, epochs differ in their number of batches."""
        if self.options.max_tokens_per_batch is None:
            return divmod(place, max(1, len(self.train) // self.options.batch_size))
        while self._first_places[-1] <= place:
            epoch = len(self._first_places) - 1
            self._first_places.append(self._first_places[-1] + len(self._plan(epoch)))
        epoch = bisect_right(self._first_places, place) - 1
        return epoch, place - self._first_places[epoch]

    def _plan(self, epoch: int) -> list[list[tuple[int, str]]]:
        """Batches of (conversation, task) of one epoch, alike in length."""
        if epoch not in self._plans:
            rng = rng_for(self.seed, epoch, 4)
            chosen = self._chosen(rng)
            drawn = rng.choice(self.task_names, size=len(chosen), p=self.task_shares)
            tasks = [self._possible(self.train[i], str(t)) for i, t in zip(chosen, drawn, strict=True)]
            sides = [self._sides(self.train[i], t) for i, t in zip(chosen, tasks, strict=True)]
            lengths = [self._length(side, t) for side, t in zip(sides, tasks, strict=True)]
            heard = [max((a.duration_sec for a, how in asks if how == "audio"), default=0.0) for asks, _ in sides]
            budget = self.options.max_tokens_per_batch
            if budget is None:
                batches = length_batches(lengths, self.options.batch_size, rng, heard)
            else:
                batches = budget_batches(lengths, budget, rng, heard)
            self._plans = {epoch: [[(chosen[i], tasks[i]) for i in batch] for batch in batches]}
        return self._plans[epoch]

    def _chosen(self, rng: np.random.Generator) -> list[int]:
        """The conversations of one epoch: each once, or by the shares of families, then as evenly as can be."""
        shares = self.options.families
        if not shares:
            return list(range(len(self.train)))
        members = {name: [i for i, c in enumerate(self.train) if c.family == name] for name in shares}
        ends = np.cumsum(list(shares.values())) / sum(shares.values()) * len(self.train)
        counts = np.diff(np.round(ends).astype(int), prepend=0)
        chosen: list[int] = []
        for found, count in zip(members.values(), counts, strict=True):
            rounds = [rng.permutation(found) for _ in range(math.ceil(count / len(found)))]
            chosen += np.concatenate(rounds)[:count].tolist() if rounds else []
        return chosen

    def _possible(self, item: Conversation, task: str) -> str:
        """The task, with what a side lacks replaced: no words to read, no recording to hear or to speak."""
        user, assistant, instruction = TASKS[task]
        asked, said = item.question, item.answer
        if not asked.text and asked.audio is None:
            return "speak"  # a recording alone
        if not said.text and said.audio is None:
            return "transcribe"
        if task == "transcribe" and (not asked.text or asked.audio is None):
            instruction = "answer"
        if task == "speak" and said.audio is None:
            instruction = "answer"
        if user == "audio" and asked.audio is None:
            user = "text"
        if user == "text" and instruction == "answer" and not asked.text:
            user = "audio"  # silence and noise can only be heard
        if assistant == "speech" and said.audio is None:
            assistant = "text"
        return {v: k for k, v in TASKS.items()}[user, assistant, instruction]

    def _sides(self, item: Conversation, task: str) -> Sides:
        """The turns of an example and what each is given as."""
        user, assistant, _ = TASKS[task]
        if task == "speak":
            return [(replace(item.answer, role="user"), "text")], (item.answer, "speech")
        if task == "transcribe":
            return [(item.question, "audio")], (replace(item.question, role="assistant"), "text")
        context = [(turn, _medium(turn, user if turn.role == "user" else assistant)) for turn in item.context]
        return [*context, (item.question, user)], (item.answer, assistant)

    def _length(self, sides: Sides, task: str) -> int:
        """Positions of an example, exact up to the rounding of durations."""
        asks, says = sides
        roles = tuple(turn.role for turn, _ in asks)
        return self._template_length(roles, TASKS[task][2]) + sum(self._turn_length(*side) for side in [*asks, says])

    def _template_length(self, roles: tuple[str, ...], instruction: str) -> int:
        key = (*roles, instruction)
        if key not in self._template_lengths:
            prompt = self.processor.layout.prompt([Turn(role, text="") for role in roles], instruction)
            # an empty answer in the context is its end-of-turn id, which `_turn_length` counts
            self._template_lengths[key] = prompt.mask_BL.shape[1] - roles.count("assistant")
        return self._template_lengths[key]

    def _turn_length(self, turn: Utterance, medium: str) -> int:
        if medium == "audio":
            frames = num_mel_frames(int(turn.duration_sec * HEARD_RATE_HZ))
            return num_heard_positions(frames, self.model.config.encoder_stack)
        if turn.text not in self._num_ids:
            self._num_ids[turn.text] = len(self.processor.text_tokenizer.encode(turn.text, add_special_tokens=False))
        num_ids = self._num_ids[turn.text] + (turn.role == "assistant")
        if medium == "text":
            return num_ids
        num_tokens = math.ceil(turn.duration_sec * self.model.speech_tokenizer.spec.tokens_per_sec)
        return max(num_ids, self.processor.layout.num_speech_steps(num_tokens))

    def _example(self, item: Conversation, task: str, rng: np.random.Generator | None) -> Streams:
        asks, says = self._sides(item, task)
        return self.processor.layout.example([self._turn(*side, rng) for side in [*asks, says]], TASKS[task][2])

    def _turn(self, turn: Utterance, medium: str, rng: np.random.Generator | None) -> Turn:
        if medium == "text" or turn.audio is None:
            return Turn(turn.role, text=turn.text)
        if medium == "speech":
            return Turn(turn.role, text=turn.text, speech_LX=self.recordings.spoken(turn.audio))
        heard_CF = self.recordings.heard(turn.audio)
        if rng is not None:
            heard_CF = spec_augment(heard_CF, rng, self.options.mask_time_frames, self.options.mask_mel_bins)
        return Turn(turn.role, text=turn.text, heard_CF=torch.from_numpy(heard_CF))

    def counts(self, batch: Streams) -> dict[str, float]:
        return batch.counts()

    def num_tokens(self, batch: Streams) -> int:
        return int(batch.mask_BL.sum())

    def filled(self, batch: Streams) -> dict[str, tuple[int, int]]:
        """Positions of the language model, and mel frames of what is heard."""
        found = {"padding_share": (self.num_tokens(batch), batch.mask_BL.numel())}
        if batch.features_BCF is not None and batch.feature_lengths_B is not None:
            slots = batch.features_BCF.shape[0] * batch.features_BCF.shape[2]
            found["padding_share_heard"] = (int(batch.feature_lengths_B.sum()), slots)
        return found

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
            heard = [omni.transcribe(playable(c.question.audio)) for c in said if c.question.audio]
            values["transcribe_wer"] = word_error_rate([c.question.text for c in said], heard).rate
        return values

    def _held_out_losses(self, items: list[Conversation]) -> dict[str, float]:
        generator = torch.Generator().manual_seed(self.seed)
        task = max(self.options.tasks, key=lambda t: self.options.tasks[t])
        batch = collate([self._example(c, self._possible(c, task), None) for c in items]).to(self.model.device)
        losses = self.module(batch, generator)
        return {f"loss/{k}": float(v.sum) / max(1.0, float(v.count)) for k, v in losses.items() if "/" not in k}

    def _answers(self, omni: FlowOmni, items: list[Conversation], speaks: bool, folder: Path) -> dict[str, float]:
        questions = [self._question(c) for c in items]
        answers = omni.answers(questions, speak=speaks, batch_size=len(questions))
        wanted = [c.answer.text for c in items]
        values = {"accuracy": sum(a.text == w for a, w in zip(answers, wanted, strict=True)) / len(items)}
        lines = [{"prompt": _prompt(c, q), "wanted": w} for c, q, w in zip(items, questions, wanted, strict=True)]
        for line, answer in zip(lines, answers, strict=True):
            line["text"] = answer.text
        if speaks:
            recognised = hear([a.wav_S for a in answers], omni.sample_rate_hz, self.words)
            values["wer_own_text"] = word_error_rate([a.text or "-" for a in answers], recognised).rate
            values["wer_right_answer"] = word_error_rate(wanted, recognised).rate
            for index, (line, answer, said) in enumerate(zip(lines, answers, recognised, strict=True)):
                line["recognised"] = said
                if index < NUM_KEPT and answer.answer_sec:
                    line["wav"] = f"{index}.wav"
                    answer.save(folder / line["wav"])
                    write_spectrogram(folder / f"{index}.png", answer.wav_S, answer.sample_rate_hz)
        (folder / ANSWERS).write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
        return values

    def _question(self, item: Conversation) -> Question:
        hears = any(TASKS[t][0] == "audio" and TASKS[t][2] == "answer" for t in self.options.tasks)
        alone = not item.question.text and item.question.audio is None
        if alone or (not hears and "speak" in self.options.tasks):
            return Question(text=item.answer.text, task="speak")
        audio = item.question.audio
        return Question(text=item.question.text) if audio is None else Question(audio=playable(audio))

    def save(self, folder: Path) -> None:
        if self.tuners:
            folder.mkdir(parents=True, exist_ok=True)
            save_adapters(self.model, self.tuners, folder / "adapters", base=self.options.model)
            if self.options.lora.save == "adapters":
                return
            for tuner in self.tuners.values():
                merge_lora(tuner)
            self.tuners = {}
        save_model(self.model, self.processor, folder)


def _prompt(item: Conversation, question: Question) -> str:
    """A held-out question in words."""
    return f"{question.task}: {question.text or item.question.text or item.id}"


def _medium(turn: Utterance, wanted: str) -> str:
    """What a turn of the context is given as: as `wanted`, or as what there is."""
    if turn.audio is None:
        return "text"
    if wanted == "text" and not turn.text:
        return "audio" if turn.role == "user" else "speech"
    return wanted


def section_changes(head: dict[str, Any], options: SpeechOptions) -> dict[str, dict[str, Any]]:
    """What is to be different in the config sections of a loaded model, whose head section is `head`.

    Raises:
        ValueError: guidance is to be distilled from a head that has none.
    """
    changes = options.head
    if options.distill_guidance is not None:
        teacher = head_config(head)
        try:
            changes = HEADS[teacher.kind].with_guidance(teacher, options.distill_guidance) | changes
        except ValueError as error:
            raise ValueError(f"options.distill_guidance is {options.distill_guidance}, but {error}") from None
    return {"head": changes, "output_blocks": options.output_blocks, "loss": options.loss}
