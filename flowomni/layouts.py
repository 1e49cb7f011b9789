"""Layouts: a pure function from a conversation to Streams, and what a step means at generation time.

Shapes: B batch (1 here), L positions, T steps of an answer, D latent dimension, C Whisper mel bins,
F Whisper mel frames, X parts of one speech token (D latents or K codes).

Layout `turn`: the prompt (chat template around text or heard positions), then the answer: text and speech in parallel.

    step        0     1      2     3     4    ...
    text        y0    y1     y2    eos   -    -     -
    state       PAD   START  GEN   GEN   GEN  GEN   STOP      (speech_delay_tokens = 2)
    speech      -     -      x0    x1    x2   x3    -

Some heads read and write the parts of a token at different steps. Speech that has stopped then goes on for as many
steps as the last part comes late, here with two parts a, b of which b comes one step later:

    state       PAD   START  GEN   GEN   GEN  GEN   STOP  STOP
    speech a    -     -      a0    a1    a2   a3    -     -
    speech b    -     -      -     b0    b1   b2    b3    -
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jinja2.exceptions import TemplateError
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
        text_ids: ids of an assistant turn's text as they were generated, which another spelling of the same text in ids
            must not replace; None takes the tokenizer's.
    """

    role: str
    text: str | None = None
    heard_CF: Tensor | None = None
    speech_LX: Tensor | None = None
    text_ids: tuple[int, ...] | None = None

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
        delay_X: int64, by how many steps each part of a speech token comes late; None means none.
    """

    def __init__(
        self,
        config: LayoutConfig,
        text_tokenizer: Any,
        text_eos_id: int,
        encoder_stack: int,
        token_fill: Tensor,
        delay_X: Tensor | None = None,
    ):
        self.config = config
        self.text_tokenizer = text_tokenizer
        self.text_eos_id = text_eos_id
        self.encoder_stack = encoder_stack
        self.token_fill = token_fill
        self.delay_X = torch.zeros(token_fill.shape, dtype=torch.int64) if delay_X is None else delay_X
        self.num_delay_steps = 0 if delay_X is None else int(delay_X.max())
        self.template = getattr(text_tokenizer, "chat_template", None) or PLAIN_TEMPLATE

    def prompt(self, turns: Sequence[Turn], task: str = "answer", instruction: str | None = None) -> Streams:
        """Streams of a conversation that ends with the user; the model speaks next. Nothing is a target.

        Args:
            task: one of the config's `instructions`.
            instruction: replaces the task's.
        """
        if not turns or turns[-1].role != "user":
            raise ValueError("the prompt must end with a user turn")
        return self._build(turns, None, task, instruction)

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

    def num_speech_steps(self, num_tokens: int) -> int:
        """Steps of an answer of that many speech tokens, from its first step to the one that ends it."""
        return self.config.speech_delay_tokens + num_tokens + self.num_delay_steps + 1

    def spread(self, token_LX: Tensor) -> Tensor:
        """Speech tokens -> what stands at each step [L + num_delay_steps, X]."""
        if not self.num_delay_steps:
            return token_LX
        num_tokens = len(token_LX)
        step_X = torch.arange(num_tokens).unsqueeze(1) + self.delay_X
        spread_TX = self.token_fill.repeat(num_tokens + self.num_delay_steps, 1)
        return spread_TX.scatter(0, step_X, token_LX)

    def only_there(self, drawn_X: Tensor, num_before: int, tail: int) -> Tensor:
        """A drawn step without the parts that `spread` leaves empty there.

        Args:
            num_before: steps of speech before this one.
            tail: 0 until speech stops; then the steps for which it still goes on, this one included.
        """
        if not self.num_delay_steps:
            return drawn_X
        num_ended = self.num_delay_steps + 1 - tail if tail else 0
        there_X = (self.delay_X <= num_before) & (self.delay_X >= num_ended)
        return torch.where(there_X.to(drawn_X.device), drawn_X, self.token_fill.to(drawn_X))

    def join(self, step_TX: Sequence[Tensor]) -> Tensor:
        """What stood at the last `num_delay_steps + 1` steps -> the token [X] that the last of them completed."""
        if not self.num_delay_steps:
            return step_TX[-1]
        index_X = self.delay_X.to(step_TX[-1].device)
        return torch.stack(list(step_TX)).gather(0, index_X.unsqueeze(0))[0]

    def _build(self, prompt: Sequence[Turn], answer: Turn | None, task: str, instruction: str | None = None) -> Streams:
        rows = _Rows(self.token_fill)
        messages = [{"role": t.role, "content": _SLOT.format(i)} for i, t in enumerate(prompt)]
        known = self.config.instructions
        if task not in known:
            raise ValueError(f"task is {task!r}{nearest(task, list(known))}; known tasks: {', '.join(known)}")
        rendered = self._render(messages, known[task] if instruction is None else instruction)
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
        letters = [list((t.text or "").encode()) for t in clips]
        return rows.streams(clips, letters, [self._ids(t.text or "") for t in clips])

    def _render(self, messages: list[dict[str, str]], instruction: str) -> str:
        """Text of the prompt. Where a template refuses a system turn, the instruction goes before the first turn."""
        if not instruction:
            return self._template(messages)
        try:
            return self._template([{"role": "system", "content": instruction}, *messages])
        except TemplateError:  # Gemma ("System role not supported"), Mistral ("roles must alternate")
            first, *others = messages
            return self._template([first | {"content": f"{instruction}\n\n{first['content']}"}, *others])

    def _template(self, messages: list[dict[str, str]]) -> str:
        return self.text_tokenizer.apply_chat_template(
            messages,
            chat_template=self.template,
            tokenize=False,
            add_generation_prompt=True,
            enable_thinking=False,  # Qwen3, SmolLM3: the answer begins at once; other templates ignore it
        )

    def _ids(self, text: str) -> list[int]:
        return self.text_tokenizer.encode(text, add_special_tokens=False) if text else []

    def _add_answer(self, rows: _Rows, turn: Turn, target: bool) -> None:
        ids = self._ids(turn.text or "") if turn.text_ids is None else turn.text_ids
        text = [*ids, self.text_eos_id]
        if turn.speech_LX is None:
            for token in text:
                rows.add(text=token, text_loss=target)
            return
        speech_TX, num_tokens = self.spread(turn.speech_LX), turn.speech_LX.shape[0]
        states = [SpeechState.PAD] * (self.config.speech_delay_tokens - 1)
        states += [SpeechState.START, *[SpeechState.GENERATING] * num_tokens]
        states += [SpeechState.STOP] * (self.num_delay_steps + 1)
        first = self.config.speech_delay_tokens
        for step in range(max(len(text), len(states))):
            holds_speech = first <= step < first + len(speech_TX)
            rows.add(
                text=text[step] if step < len(text) else NONE,
                state=int(states[step]) if step < len(states) else NONE,
                speech=speech_TX[step - first] if holds_speech else None,
                tail=holds_speech and step >= first + num_tokens,
                text_loss=target and step < len(text),
                # only the choice between going on and stopping is the model's; the rest is forced
                state_loss=target and first <= step < len(states),
            )


class _Rows:
    """Positions under construction."""

    def __init__(self, token_fill: Tensor):
        self.token_fill = token_fill
        self.rows: list[tuple[int, int, Tensor, bool, bool, bool, bool]] = []
        self._skip: list[int] = []

    def add(
        self,
        text: int = NONE,
        state: int = NONE,
        speech: Tensor | None = None,
        heard: bool = False,
        text_loss: bool = False,
        state_loss: bool = False,
        tail: bool = False,
    ) -> None:
        token = self.token_fill if speech is None else speech
        self.rows.append((text, state, token, heard, text_loss, state_loss, tail))

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

    def streams(self, clips: list[Turn], letters: list[list[int]], text_ids: list[list[int]]) -> Streams:
        text, state, speech, heard, text_loss, state_loss, tail = zip(*self.rows, strict=True)
        features = lengths = ctc = heard_text = None
        if clips:
            lengths = torch.tensor([c.heard_CF.shape[-1] for c in clips])  # type: ignore[union-attr]
            features = torch.nn.utils.rnn.pad_sequence([c.heard_CF.T for c in clips], batch_first=True).transpose(1, 2)  # type: ignore[union-attr]
            ctc, heard_text = [
                torch.nn.utils.rnn.pad_sequence(
                    [torch.tensor(ids, dtype=torch.int64) for ids in said], batch_first=True, padding_value=NONE
                )
                for said in (letters, text_ids)
            ]
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
            heard_text_BU=heard_text,
            tail_BL=torch.tensor([tail]),
        )
