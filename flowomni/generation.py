"""The generation loop: one step at a time, text and sound as they come. Offline generation is its concatenation.

Shapes: B batch rows, L positions, S samples, V vocabulary, X one speech token (D latents or K codes).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

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
class _Row:
    """One row of the batch between steps."""

    ids: tuple[int, ...] = ()
    shown: str = ""
    text_done: bool = False
    state: SpeechState | None = SpeechState.PAD

    @property
    def speech_done(self) -> bool:
        return self.state in (SpeechState.STOP, None)


@dataclass
class _Loop:
    """What the loop carries from step to step."""

    model_state: ModelState
    text_BH: Tensor
    speech_BH: Tensor
    rows: list[_Row]
    voice: Any = None
    wavs: list[Tensor] = field(default_factory=list)


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
    layout = processor.layout
    sampling = options.sampling if options.sampling is not None else model.head.default_sampling()
    max_steps = options.max_steps or layout.config.max_answer_tokens
    loop = _prefill(model, collate(list(prompts)).to(model.device), options.speak)
    for step in range(max_steps):
        texts = _next_text(model, processor, loop, options.text_temperature, generators)
        states = _next_states(model, layout, loop, step, options.stop_threshold) if options.speak else None
        token_BX = None
        loop.wavs = [torch.zeros(0)] * len(loop.rows)
        last = step == max_steps - 1
        if states is not None:
            # before the voice goes on with the other rows: what is owed follows a row's own last token
            _finish_speech(model, loop, [state == SpeechState.STOP for state in states])
            if SpeechState.GENERATING in states:
                token_BX = _draw(model, loop, states, sampling, generators)
                _speak(model, loop, token_BX, states)
            if last:  # the limit cuts speech off: what is already drawn is still played
                _finish_speech(model, loop, [state == SpeechState.GENERATING for state in states])
        done = [row.text_done and (row.speech_done or not options.speak) for row in loop.rows]
        yield Step(texts, list(states) if states else [None] * len(done), loop.wavs, done)
        if all(done) or last:
            return
        _read(model, processor, loop, token_BX)


def _prefill(model: FlowOmniModel, prompts: Streams, speak: bool) -> _Loop:
    heard_NH = None
    if prompts.features_BCF is not None:
        assert prompts.feature_lengths_B is not None
        heard_NH = model.hear(prompts.features_BCF, prompts.feature_lengths_B)
    batch = prompts.text_BL.shape[0]
    text_BH, speech_BH, state = model.advance(model.embed(prompts, heard_NH), prompts.mask_BL, model.init_state(batch))
    return _Loop(state, text_BH, speech_BH, [_Row(state=SpeechState.PAD if speak else None)] * batch)


def _next_text(
    model: FlowOmniModel,
    processor: FlowOmniProcessor,
    loop: _Loop,
    temperature: float,
    generators: Sequence[torch.Generator],
) -> list[str]:
    """Sample each row's next text id and return what became readable."""
    if all(row.text_done for row in loop.rows):
        loop.rows = [replace(row, ids=(*row.ids, NONE)) for row in loop.rows]
        return [""] * len(loop.rows)
    logits_BV = model.text_logits(loop.text_BH).float()
    texts = []
    for index, row in enumerate(loop.rows):
        if row.text_done:
            loop.rows[index] = replace(row, ids=(*row.ids, NONE))
            texts.append("")
            continue
        if temperature > 0:
            probabilities = (logits_BV[index] / temperature).softmax(-1)
            generator = generators[index]
            token = int(torch.multinomial(probabilities.to(generator.device), 1, generator=generator))
        else:
            token = int(logits_BV[index].argmax())
        ids = (*row.ids, token)
        ended = token == processor.text_eos_id
        readable = processor.decode_text(ids)
        # a byte-level token may end inside a character: wait for the rest
        shown = row.shown if readable.endswith("\ufffd") and not ended else readable
        texts.append(shown[len(row.shown) :])
        loop.rows[index] = replace(row, ids=ids, shown=shown, text_done=ended)
    return texts


def _next_states(
    model: FlowOmniModel, layout: Any, loop: _Loop, step: int, stop_threshold: float
) -> list[SpeechState | None]:
    stop_B = model.state_head.stop_probability(loop.speech_BH)
    states: list[SpeechState | None] = []
    for index, row in enumerate(loop.rows):
        if row.speech_done:
            state = None
        else:
            assert row.state is not None
            state = layout.state_at(step, row.state)
            if state is None:
                state = SpeechState.STOP if float(stop_B[index]) > stop_threshold else SpeechState.GENERATING
        states.append(state)
        loop.rows[index] = replace(row, state=state)
    return states


def _draw(
    model: FlowOmniModel,
    loop: _Loop,
    states: list[SpeechState | None],
    sampling: Any,
    generators: Sequence[torch.Generator],
) -> Tensor:
    """Speech tokens [B, X] of this step; zeros, which nothing reads, where a row does not speak.

    Only rows that speak draw, so that a row's generator gives what it would give alone.
    """
    speaking = [index for index, state in enumerate(states) if state == SpeechState.GENERATING]
    drawn_NX = model.head.sample(loop.speech_BH[speaking], sampling, [generators[index] for index in speaking])
    token_BX = drawn_NX.new_zeros(len(states), *drawn_NX.shape[1:])
    token_BX[speaking] = drawn_NX
    return token_BX


def _speak(model: FlowOmniModel, loop: _Loop, token_BX: Tensor, states: list[SpeechState | None]) -> None:
    """Turn this step's tokens into sound. Rows that do not speak are stepped along and ignored."""
    tokenizer = model.speech_tokenizer
    if loop.voice is None:
        loop.voice = tokenizer.init_state(len(states))
    wav_BS, loop.voice = tokenizer.step(token_BX.unsqueeze(1), loop.voice)
    for index, state in enumerate(states):
        if state == SpeechState.GENERATING:
            loop.wavs[index] = wav_BS[index].cpu()


def _finish_speech(model: FlowOmniModel, loop: _Loop, stopping: list[bool]) -> None:
    """Rows that stop now get what the look-ahead held back. The state is a value: other rows go on from it."""
    if any(stopping) and loop.voice is not None:
        rest_BS = model.speech_tokenizer.flush(loop.voice)
        for index, stops in enumerate(stopping):
            if stops:
                loop.wavs[index] = torch.cat([loop.wavs[index], rest_BS[index].cpu()])


def _read(model: FlowOmniModel, processor: FlowOmniProcessor, loop: _Loop, token_BX: Tensor | None) -> None:
    """Feed this step's text, states and speech tokens back."""
    batch, device = len(loop.rows), model.device
    fill = processor.layout.token_fill.to(device)
    streams = Streams(
        text_BL=torch.tensor([[row.ids[-1]] for row in loop.rows], device=device),
        state_BL=torch.tensor([[_fed_back(row)] for row in loop.rows], device=device),
        speech_BLX=(fill.expand(batch, *fill.shape) if token_BX is None else token_BX).unsqueeze(1),
        heard_BL=torch.zeros(batch, 1, dtype=torch.bool, device=device),
        mask_BL=torch.ones(batch, 1, dtype=torch.bool, device=device),
        text_loss_BL=torch.zeros(batch, 1, dtype=torch.bool, device=device),
        state_loss_BL=torch.zeros(batch, 1, dtype=torch.bool, device=device),
    )
    loop.text_BH, loop.speech_BH, loop.model_state = model.advance(
        model.embed(streams), streams.mask_BL, loop.model_state
    )


def _fed_back(row: _Row) -> int:
    return NONE if row.state is None else int(row.state)
