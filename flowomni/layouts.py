"""Layouts: a pure function from a conversation to Streams, and what a step means at generation time.

Shapes: B batch (1 here), L positions, T steps of an answer, D latent dimension, C Whisper mel bins,
F Whisper mel frames.

Layout `turn`: the prompt (chat template around text or heard positions), then the answer: text and speech in parallel.

    step        0     1      2     3     4    ...
    text        y0    y1     y2    eos   -    -     -
    state       PAD   START  GEN   GEN   GEN  GEN   STOP      (speech_delay_tokens = 2)
    speech      -     -      x0    x1    x2   x3    -
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .configuration import LayoutConfig
from .encoder import num_heard_positions
from .streams import NONE, SpeechState, Streams
from .strict import nearest


@dataclass(frozen=True)
class Turn:
    """One turn of a conversation.

    Attributes:
        role: "user" or "assistant".
        text: what is said; for a heard user turn it is only the auxiliary CTC target.
        heard_CF: Whisper log-mel of a heard user turn, float32.
        speech_LX: speech tokens of a spoken assistant turn.
    """

    role: str
    text: str | None = None
    heard_CF: Tensor | None = None
    speech_LX: Tensor | None = None

    def __post_init__(self) -> None:
        if self.role not in ("user", "assistant"):
            raise ValueError(f"role is {self.role!r}; it must be 'user' or 'assistant'")
        if self.text is None and self.heard_CF is None:
            raise ValueError(f"a {self.role} turn needs text or heard audio")
        if self.role == "assistant" and self.text is None:
            raise ValueError("an assistant turn needs text: only the user is heard")


PLAIN_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
_SLOT = "[[turn {}]]"
_SLOT_PATTERN = re.compile(r"\[\[turn (\d+)\]\]")


class TurnLayout:
    """Layout `turn` for one text tokenizer.

    Args:
        config: the layout section of the model's config.
        text_tokenizer: any Hugging Face tokenizer. Without a chat template, `PLAIN_TEMPLATE` is used.
        text_eos_id: id that ends an answer.
        encoder_stack: encoder frames per heard position.
        token_fill: one speech token [X] that stands for "no speech token": NaN latents or NONE codes.
    """

    def __init__(
        self, config: LayoutConfig, text_tokenizer: Any, text_eos_id: int, encoder_stack: int, token_fill: Tensor
    ):
        self.config = config
        self.text_tokenizer = text_tokenizer
        self.text_eos_id = text_eos_id
        self.encoder_stack = encoder_stack
        self.token_fill = token_fill
        self.template = getattr(text_tokenizer, "chat_template", None) or PLAIN_TEMPLATE

    def prompt(self, turns: Sequence[Turn], task: str = "answer") -> Streams:
        """Streams of a conversation that ends with the user; the model speaks next. Nothing is a target."""
        if not turns or turns[-1].role != "user":
            raise ValueError("the prompt must end with a user turn")
        return self._build(turns, None, task)

    def example(self, turns: Sequence[Turn], task: str = "answer") -> Streams:
        """Streams of a conversation whose last (assistant) turn is the training target."""
        if not turns or turns[-1].role != "assistant":
            raise ValueError("a training example must end with an assistant turn")
        return self._build(turns[:-1], turns[-1], task)

    def state_at(self, step: int, previous: SpeechState) -> SpeechState | None:
        """The speech state that answer step `step` must have, or None where the model chooses GENERATING or STOP."""
        if step < self.config.speech_delay_tokens - 1:
            return SpeechState.PAD
        if step == self.config.speech_delay_tokens - 1:
            return SpeechState.START
        return SpeechState.GENERATING if previous == SpeechState.START else None

    def _build(self, prompt: Sequence[Turn], answer: Turn | None, task: str) -> Streams:
        rows = _Rows(self.token_fill)
        messages = [{"role": t.role, "content": _SLOT.format(i)} for i, t in enumerate(prompt)]
        known = self.config.instructions
        if task not in known:
            raise ValueError(f"task is {task!r}{nearest(task, list(known))}; known tasks: {', '.join(known)}")
        instruction = known[task]
        if instruction:
            messages.insert(0, {"role": "system", "content": instruction})
        rendered = self.text_tokenizer.apply_chat_template(
            messages, chat_template=self.template, tokenize=False, add_generation_prompt=True
        )
        eos = self.text_tokenizer.convert_ids_to_tokens(self.text_eos_id)
        clips: list[Turn] = []
        for index, piece in enumerate(_SLOT_PATTERN.split(rendered)):
            if index % 2 == 0:
                rows.add_text(self._ids(piece))
                continue
            turn = prompt[int(piece)]
            if turn.role == "assistant":
                self._add_answer(rows, turn, target=False)
                # the answer's own steps hold the end-of-turn token that the template repeats after it
                rows.skip_text(self._ids(eos))
            elif turn.heard_CF is not None:
                rows.add_heard(num_heard_positions(turn.heard_CF.shape[-1], self.encoder_stack))
                clips.append(turn)
            else:
                rows.add_text(self._ids(turn.text or ""))
        if answer is not None:
            self._add_answer(rows, answer, target=True)
        return rows.streams(clips, [list((t.text or "").encode()) for t in clips])

    def _ids(self, text: str) -> list[int]:
        return self.text_tokenizer.encode(text, add_special_tokens=False) if text else []

    def _add_answer(self, rows: _Rows, turn: Turn, target: bool) -> None:
        text = [*self._ids(turn.text or ""), self.text_eos_id]
        if turn.speech_LX is None:
            for token in text:
                rows.add(text=token, text_loss=target)
            return
        length = turn.speech_LX.shape[0]
        states = [SpeechState.PAD] * (self.config.speech_delay_tokens - 1)
        states += [SpeechState.START, *[SpeechState.GENERATING] * length, SpeechState.STOP]
        first = self.config.speech_delay_tokens
        for step in range(max(len(text), len(states))):
            generating = first <= step < first + length
            rows.add(
                text=text[step] if step < len(text) else NONE,
                state=int(states[step]) if step < len(states) else NONE,
                speech=turn.speech_LX[step - first] if generating else None,
                text_loss=target and step < len(text),
                # only the choice between going on and stopping is the model's; the rest is forced
                state_loss=target and first <= step < len(states),
            )


class _Rows:
    """Positions under construction."""

    def __init__(self, token_fill: Tensor):
        self.token_fill = token_fill
        self.rows: list[tuple[int, int, Tensor, bool, bool, bool]] = []
        self._skip: list[int] = []

    def add(
        self,
        text: int = NONE,
        state: int = NONE,
        speech: Tensor | None = None,
        heard: bool = False,
        text_loss: bool = False,
        state_loss: bool = False,
    ) -> None:
        self.rows.append((text, state, self.token_fill if speech is None else speech, heard, text_loss, state_loss))

    def add_text(self, ids: list[int]) -> None:
        if self._skip and ids[: len(self._skip)] == self._skip:
            ids = ids[len(self._skip) :]
        self._skip = []
        for token in ids:
            self.add(text=token)

    def skip_text(self, ids: list[int]) -> None:
        self._skip = ids

    def add_heard(self, num_positions: int) -> None:
        for _ in range(num_positions):
            self.add(heard=True)

    def streams(self, clips: list[Turn], transcripts: list[list[int]]) -> Streams:
        text, state, speech, heard, text_loss, state_loss = zip(*self.rows, strict=True)
        features = lengths = ctc = None
        if clips:
            lengths = torch.tensor([c.heard_CF.shape[-1] for c in clips])  # type: ignore[union-attr]
            features = torch.nn.utils.rnn.pad_sequence([c.heard_CF.T for c in clips], batch_first=True).transpose(1, 2)  # type: ignore[union-attr]
            ctc = torch.nn.utils.rnn.pad_sequence(
                [torch.tensor(t, dtype=torch.int64) for t in transcripts], batch_first=True, padding_value=NONE
            )
        return Streams(
            text_BL=torch.tensor([text]),
            state_BL=torch.tensor([state]),
            speech_BLX=torch.stack(speech)[None],
            heard_BL=torch.tensor([heard]),
            mask_BL=torch.ones(1, len(text), dtype=torch.bool),
            text_loss_BL=torch.tensor([text_loss]),
            state_loss_BL=torch.tensor([state_loss]),
            features_BCF=features,
            feature_lengths_B=lengths,
            ctc_BT=ctc,
        )
