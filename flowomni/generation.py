"""The generation loop: one step at a time, text and sound as they come. Offline generation is its concatenation.

    read (the prompt) -> begin -> step -> feed -> step -> feed -> .. -> step

`generate` runs it for prompts that begin together; a server calls the same functions, and between two steps lets
answers `join` the batch or leave it (`take`). A batch is a value: no function changes its arguments, but for the rows'
random generators, which move on with each draw.

Shapes: B batch rows, L positions, H hidden width, S samples, V vocabulary, X one speech token (D latents or K codes).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from . import batching
from .batching import Voices
from .modeling import FlowOmniModel, ModelState
from .processing import FlowOmniProcessor
from .streams import NONE, SpeechState, Streams, collate


@dataclass(frozen=True)
class GenerationOptions:
    """What shared code needs to know to generate.

    Attributes:
        speak: False gives text only.
        text_temperature: 0 takes the most likely text token.
        stop_threshold: speech stops where the stop state's probability passes it.
        max_steps: hard limit of answer steps; None takes the layout's.
        sampling: the head's own sampling dataclass; None takes its default.
    """

    speak: bool = True
    text_temperature: float = 0.0
    stop_threshold: float = 0.5
    max_steps: int | None = None
    sampling: Any = None

    def __post_init__(self) -> None:
        if self.text_temperature < 0:
            raise ValueError(f"text_temperature is {self.text_temperature}; it must not be negative")
        if not 0 < self.stop_threshold < 1:
            raise ValueError(f"stop_threshold is {self.stop_threshold}; it must lie between 0 and 1")
        if self.max_steps is not None and self.max_steps < 1:
            raise ValueError(f"max_steps is {self.max_steps}; it must be at least 1, or None for the layout's limit")


@dataclass(frozen=True)
class Step:
    """What one step brought, per row.

    Attributes:
        texts: newly finished text, often "".
        states: the speech state, or None for a row that does not speak (any more).
        wavs: float32 samples [S] at the speech tokenizer's rate that became final, often empty.
        done: whether the row has ended.
    """

    texts: list[str]
    states: list[SpeechState | None]
    wavs: list[Tensor]
    done: list[bool]


@dataclass(frozen=True)
class Reading:
    """What the model knows after reading: its last hidden states [B, H] and its state."""

    text_BH: Tensor
    speech_BH: Tensor
    model_state: ModelState


@dataclass(frozen=True)
class Row:
    """One answer between steps.

    Attributes:
        options: what it is generated with; rows of one batch may differ.
        generator: of its text and speech.
        max_steps: its limit.
        ids: the text id of each step, NONE after the end of the text.
        tokens: what was drawn at each step of speech so far: speech tokens [X], or parts of several where parts of a
            token come late (see `TurnLayout.join`).
        shown: the text that was given out; text_done: whether the text has ended.
        states: the speech state of each step, None after the end of speech or without it; state: the last one.
        tail: steps for which speech goes on after the first STOP, this one included: the last tokens' late parts.
    """

    options: GenerationOptions
    generator: torch.Generator
    max_steps: int
    ids: tuple[int, ...] = ()
    tokens: tuple[Tensor, ...] = ()
    shown: str = ""
    text_done: bool = False
    state: SpeechState | None = SpeechState.PAD
    states: tuple[SpeechState | None, ...] = ()
    tail: int = 0

    @property
    def speech_done(self) -> bool:
        return self.state is None or (self.state == SpeechState.STOP and not self.tail)

    @property
    def draws(self) -> bool:
        """Whether the last step has a speech token, or parts of some."""
        return self.state == SpeechState.GENERATING or self.tail > 0

    @property
    def done(self) -> bool:
        """Whether the answer has ended by itself."""
        return self.text_done and self.speech_done

    @property
    def at_limit(self) -> bool:
        """Whether no further step is allowed."""
        return len(self.ids) >= self.max_steps


@dataclass(frozen=True)
class Batch:
    """Answers in progress, in step: what has been read, and the rows that go on from there."""

    rows: tuple[Row, ...]
    reading: Reading
    voices: Voices = Voices()


@torch.inference_mode()
def generate(
    model: FlowOmniModel,
    processor: FlowOmniProcessor,
    prompts: Sequence[Streams],
    options: GenerationOptions,
    generators: Sequence[torch.Generator],
) -> Iterator[Step]:
    """Answer `prompts`, all rows in step; ends when every row has ended (or at the step limit).

    A row's result does not depend on the other rows: each has its own generator, and padding changes nothing.

    Args:
        prompts: one-row streams from `processor.prompt`.
        generators: one per row, for text and speech sampling.
    """
    streams = collate(list(prompts)).to(model.device)
    reading = read(model, streams, model.init_state(len(prompts)), _hear(model, streams))
    batch = begin(model, processor, reading, [options] * len(prompts), generators)
    while True:
        found, batch = step(model, processor, batch)
        yield found
        if all(found.done) or batch.rows[0].at_limit:
            return
        batch = feed(model, processor, batch)


@torch.inference_mode()
def read(model: FlowOmniModel, streams: Streams, state: ModelState, heard_NH: Tensor | None = None) -> Reading:
    """Read more positions: a prompt, or a piece of one.

    Args:
        heard_NH: one row per True in `streams.heard_BL`, of all rows in order (see `FlowOmniModel.hear`).
    """
    return Reading(*model.read(streams, state, heard_NH))


def begin(
    model: FlowOmniModel,
    processor: FlowOmniProcessor,
    reading: Reading,
    options: Sequence[GenerationOptions],
    generators: Sequence[torch.Generator],
) -> Batch:
    """Answers to the prompts that were read, before their first step. What options leave open is filled in."""
    rows = []
    for each, generator in zip(options, generators, strict=True):
        sampling = each.sampling if each.sampling is not None else model.head.default_sampling()
        max_steps = each.max_steps or processor.layout.config.max_answer_tokens
        state = SpeechState.PAD if each.speak else None
        rows.append(Row(replace(each, sampling=sampling), generator, max_steps, state=state))
    return Batch(tuple(rows), reading)


def join(batches: Sequence[Batch]) -> Batch:
    """One batch of several, their rows in order."""
    if len(batches) == 1:
        return batches[0]
    rows: tuple[Row, ...] = ()
    voices = Voices()
    for batch in batches:
        voices = voices.beside(batch.voices, len(rows))
        rows += batch.rows
    readings = [batch.reading for batch in batches]
    text_BH, speech_BH = (torch.cat([getattr(r, name) for r in readings]) for name in ("text_BH", "speech_BH"))
    return Batch(rows, Reading(text_BH, speech_BH, batching.join([r.model_state for r in readings])), voices)


def take(model: FlowOmniModel, batch: Batch, numbers: Sequence[int]) -> Batch:
    """Some rows of a batch, in this order."""
    index = torch.tensor(numbers, device=batch.reading.text_BH.device)
    reading = Reading(
        batch.reading.text_BH[index],
        batch.reading.speech_BH[index],
        batching.take(batch.reading.model_state, numbers),
    )
    voices = batch.voices.take(model.speech_tokenizer, {old: new for new, old in enumerate(numbers)})
    return Batch(tuple(batch.rows[number] for number in numbers), reading, voices)


@torch.inference_mode()
def step(model: FlowOmniModel, processor: FlowOmniProcessor, batch: Batch) -> tuple[Step, Batch]:
    """Decide one step of every row: its text id, its speech state, its speech token and the sound of that.

    The result waits for `feed`; a row that is `done` or `at_limit` has nothing more to say and should leave instead.
    """
    texts, rows = _next_text(model, processor, batch)
    rows, states = _next_states(model, processor.layout, batch.reading.speech_BH, rows)
    rows = _draw(model, processor.layout, batch.reading.speech_BH, rows)
    wavs = [torch.zeros(0)] * len(rows)

    def finish(voices: Voices, numbers: list[int]) -> Voices:
        owed, voices = voices.flush(model.speech_tokenizer, numbers)
        for number, wav_S in owed.items():
            wavs[number] = torch.cat([wavs[number], wav_S])
        return voices

    # before the voice goes on with the other rows: what is owed follows a row's own last token
    voices = batch.voices
    if stopping := [number for number, row in enumerate(rows) if row.state == SpeechState.STOP and row.speech_done]:
        voices = finish(voices, stopping)
    num_spanned = processor.layout.num_delay_steps + 1
    if speaking := [n for n, row in enumerate(rows) if row.draws and len(row.tokens) >= num_spanned]:
        whole = {number: processor.layout.join(rows[number].tokens[-num_spanned:]) for number in speaking}
        drawn, voices = voices.step(model.speech_tokenizer, whole)
        for number, wav_S in drawn.items():
            wavs[number] = wav_S
    # the limit cuts speech off: what is already drawn is still played
    if cut_off := [number for number in speaking if rows[number].at_limit]:
        voices = finish(voices, cut_off)
    return Step(texts, states, wavs, [row.done for row in rows]), Batch(tuple(rows), batch.reading, voices)


@torch.inference_mode()
def feed(model: FlowOmniModel, processor: FlowOmniProcessor, batch: Batch) -> Batch:
    """Read what `step` decided: text ids, speech states and speech tokens."""
    num_rows, device = len(batch.rows), model.device
    fill_X = processor.layout.token_fill.to(device)
    speech = [row.tokens[-1] if row.draws else fill_X for row in batch.rows]
    nothing_BL = torch.zeros(num_rows, 1, dtype=torch.bool, device=device)
    streams = Streams(
        text_BL=torch.tensor([[row.ids[-1]] for row in batch.rows], device=device),
        state_BL=torch.tensor([[NONE if row.state is None else int(row.state)] for row in batch.rows], device=device),
        speech_BLX=torch.stack(speech).unsqueeze(1),
        heard_BL=nothing_BL,
        mask_BL=~nothing_BL,
        text_loss_BL=nothing_BL,
        state_loss_BL=nothing_BL,
        tail_BL=torch.tensor([[row.tail > 0] for row in batch.rows], device=device),
    )
    return replace(batch, reading=read(model, streams, batch.reading.model_state))


def _hear(model: FlowOmniModel, streams: Streams) -> Tensor | None:
    if streams.features_BCF is None:
        return None
    assert streams.feature_lengths_B is not None
    return model.hear(streams.features_BCF, streams.feature_lengths_B)


def _next_text(model: FlowOmniModel, processor: FlowOmniProcessor, batch: Batch) -> tuple[list[str], list[Row]]:
    """Sample each row's next text id; what became readable."""
    if all(row.text_done for row in batch.rows):
        return [""] * len(batch.rows), [replace(row, ids=(*row.ids, NONE)) for row in batch.rows]
    logits_BV = model.text_logits(batch.reading.text_BH).float()
    likeliest = logits_BV.argmax(-1).tolist()
    texts, rows = [], []
    for number, row in enumerate(batch.rows):
        if row.text_done:
            texts.append("")
            rows.append(replace(row, ids=(*row.ids, NONE)))
            continue
        token, temperature = likeliest[number], row.options.text_temperature
        if temperature > 0:
            probabilities = (logits_BV[number] / temperature).softmax(-1)
            token = int(torch.multinomial(probabilities.to(row.generator.device), 1, generator=row.generator))
        ids = (*row.ids, token)
        ended = token == processor.text_eos_id
        readable = processor.decode_text(ids)
        # a byte-level token may end inside a character: wait for the rest
        shown = row.shown if readable.endswith("\ufffd") and not ended else readable
        texts.append(shown[len(row.shown) :])
        rows.append(replace(row, ids=ids, shown=shown, text_done=ended))
    return texts, rows


def _next_states(
    model: FlowOmniModel, layout: Any, speech_BH: Tensor, rows: list[Row]
) -> tuple[list[Row], list[SpeechState | None]]:
    """Each row's speech state at this step, None where it does not speak (any more)."""
    if all(row.speech_done for row in rows):
        return [replace(row, state=None, states=(*row.states, None)) for row in rows], [None] * len(rows)
    stop_B = model.state_head.stop_probability(speech_BH).tolist()
    states: list[SpeechState | None] = []
    tails = []
    for row, stop in zip(rows, stop_B, strict=True):
        state, tail = None, max(0, row.tail - 1)
        if row.tail:
            state = SpeechState.STOP
        elif not row.speech_done:
            assert row.state is not None
            state = layout.state_at(len(row.ids) - 1, row.state)
            if state is None:
                state = SpeechState.STOP if stop > row.options.stop_threshold else SpeechState.GENERATING
            tail = layout.num_delay_steps if state == SpeechState.STOP else 0
        states.append(state)
        tails.append(tail)
    rows = [
        replace(row, state=state, states=(*row.states, state), tail=tail)
        for row, state, tail in zip(rows, states, tails, strict=True)
    ]
    return rows, states


def _draw(model: FlowOmniModel, layout: Any, speech_BH: Tensor, rows: list[Row]) -> list[Row]:
    """Rows with this step's speech tokens.

    Only rows that speak draw, so that a row's generator gives what it would give alone; those of one sampling together.
    """
    alike: dict[Any, list[int]] = {}
    for number, row in enumerate(rows):
        if row.draws:
            alike.setdefault(row.options.sampling, []).append(number)
    rows = list(rows)
    for sampling, numbers in alike.items():
        hidden_NH = speech_BH if len(numbers) == len(rows) else speech_BH[numbers]
        drawn_NX = model.head.sample(hidden_NH, sampling, [rows[number].generator for number in numbers])
        for number, drawn_X in zip(numbers, drawn_NX, strict=True):
            row = rows[number]
            token_X = layout.only_there(drawn_X, len(row.tokens), row.tail)
            rows[number] = replace(row, tokens=(*row.tokens, token_X))
    return rows
