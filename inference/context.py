"""What a session remembers: the conversation as turns, and the keys and values of what the model has read of it.

**Law.** An answer in a session is what `generate` answers to `layout.prompt` of the same turns. The conversation is the
truth; the caches are only what was read of it so far. Before each answer the whole prompt is laid out again, compared
with what was read, position by position, and only what differs is read: usually the last step of the previous answer
and the new turn. An answer that was interrupted simply is a shorter turn, so that the caches are cut to the steps whose
sound was played.

**Rolling window.** When no room for another turn is left, the oldest turns are forgotten, until half of the room for
history is free, and the rest is read anew from position 0, between turns, while nobody waits. So the sequence always
begins as a conversation begins, with the template's opening and the instructions, which is what attention sinks need
(StreamingLLM, arXiv 2309.17453, whose reference this re-reading is); positions never pass `max_positions`; and a key
is never rotated again or kept beside neighbours it was not computed with, so that nothing can drift. Heard turns keep
their encoder output and are not encoded again.

Shapes: L positions, P heard positions, C mel bins, F mel frames, H hidden width, X one speech token.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from flowomni.batching import cut
from flowomni.encoder import num_heard_positions
from flowomni.generation import Reading, Row, read
from flowomni.layouts import Turn
from flowomni.modeling import FlowOmniModel
from flowomni.processing import FlowOmniProcessor
from flowomni.streams import NONE, SpeechState, Streams

_NUMBERS = itertools.count()


@dataclass(eq=False)
class Entry:
    """One turn of the conversation.

    Attributes:
        turn: for the layout.
        heard_PH: encoder output of a heard turn, once `Context.encode` has made it.
        number: tells heard turns apart.
    """

    turn: Turn
    heard_PH: Tensor | None = None
    number: int = field(default_factory=lambda: next(_NUMBERS))


@dataclass(frozen=True, eq=False)
class Positions:
    """A piece of sequence: one-row streams, and at heard positions the number of their turn (NONE elsewhere)."""

    streams: Streams
    clip_L: Tensor

    def __len__(self) -> int:
        return len(self.clip_L)

    def __getitem__(self, part: slice) -> Positions:
        return Positions(_sliced(self.streams, part), self.clip_L[part])

    def then(self, other: Positions) -> Positions:
        a, b = self.streams, other.streams
        joined = {name: torch.cat([getattr(a, name), getattr(b, name)], 1) for name in _FIELDS}
        tail_BL = torch.cat([_tail(a), _tail(b)], 1)
        return Positions(Streams(**joined, tail_BL=tail_BL), torch.cat([self.clip_L, other.clip_L]))

    def common(self, other: Positions) -> int:
        """Number of positions at the start that are the same."""
        num = min(len(self), len(other))
        a, b = self.streams, other.streams
        speech_a, speech_b = a.speech_BLX[0, :num], b.speech_BLX[0, :num]
        same_L = (self.clip_L[:num] == other.clip_L[:num]) & (a.text_BL[0, :num] == b.text_BL[0, :num])
        same_L &= (a.state_BL[0, :num] == b.state_BL[0, :num]) & (_tail(a)[0, :num] == _tail(b)[0, :num])
        same_L &= ((speech_a == speech_b) | (speech_a.isnan() & speech_b.isnan())).flatten(1).all(1)
        return num if bool(same_L.all()) else int((~same_L).nonzero()[0, 0])


# what every position has; of a piece, the features are the encoder's output already
_FIELDS = ["text_BL", "state_BL", "speech_BLX", "heard_BL", "mask_BL", "text_loss_BL", "state_loss_BL"]


def _tail(streams: Streams) -> Tensor:
    return torch.zeros_like(streams.heard_BL) if streams.tail_BL is None else streams.tail_BL


def _sliced(streams: Streams, part: slice) -> Streams:
    tail_BL = None if streams.tail_BL is None else streams.tail_BL[:, part]
    return Streams(**{name: getattr(streams, name)[:, part] for name in _FIELDS}, tail_BL=tail_BL)


@dataclass(frozen=True, eq=False)
class Memory:
    """What the model has read, with its reading of it. A value: reading more gives another memory."""

    positions: Positions | None = None
    reading: Reading | None = None

    def __len__(self) -> int:
        return 0 if self.positions is None else len(self.positions)

    def known(self, wanted: Positions) -> int:
        """How many of the wanted positions need not be read; the last one must, unless it was the last one read."""
        if self.positions is None:
            return 0
        num = self.positions.common(wanted)
        return num if num == len(wanted) == len(self) else min(num, len(wanted) - 1)


class Context:
    """The layout of conversations for one model.

    Args:
        max_positions: of one sequence, an answer included.
        instructions: what the model is told first; None takes the layout's own.
        max_answer: steps of an answer.

    Raises:
        ValueError: a turn as long as the model can hear, with its answer, has no room.
    """

    def __init__(
        self,
        model: FlowOmniModel,
        processor: FlowOmniProcessor,
        max_positions: int,
        instructions: str | None,
        max_answer: int,
    ) -> None:
        self.model, self.processor = model, processor
        self.max_positions, self.instructions, self.max_answer = max_positions, instructions, max_answer
        stack = processor.layout.encoder_stack
        features = processor.heard_features
        self.max_heard = 0 if features is None else num_heard_positions(features.max_frames, stack)
        # of an answer its steps and the end that a cut one gets; then the template's words around the next turn
        least = len(self.opening([])) + self.max_heard + self._words_between() + max_answer + 1
        if max_positions < least:
            raise ValueError(
                f"max_context_positions is {max_positions}, but one heard turn with its answer may take {least}: "
                "set it to at least that, or max_answer_tokens lower"
            )
        self._history = max_positions - least

    # turns

    def heard(self, wav_S: np.ndarray) -> Entry:
        """A user turn of 16 kHz audio, not encoded yet."""
        return Entry(self.processor.turn("user", wav_S=wav_S))

    def encode(self, entries: Sequence[Entry]) -> bool:
        """Encode the first heard turn that is not; whether there was one. It costs as much as reading a long piece."""
        for entry in entries:
            if entry.turn.heard_CF is not None and entry.heard_PH is None:
                heard_1CF = entry.turn.heard_CF[None].to(self.model.device)
                lengths_B = torch.tensor([heard_1CF.shape[-1]], device=heard_1CF.device)
                entry.heard_PH = self.model.hear(heard_1CF, lengths_B)
                return True
        return False

    def typed(self, text: str) -> Entry:
        """A user turn of words."""
        return Entry(self.processor.turn("user", text=text))

    def answered(self, row: Row, num_samples: int) -> Entry:
        """An assistant turn: the steps of an answer whose sound was played, or all of one without sound.

        With nothing played it is an empty turn. A token that was played only in part counts as played.
        """
        spec, layout = self.model.speech_tokenizer.spec, self.processor.layout
        ids, speech_LX = row.ids, None
        if row.options.speak:
            span = layout.num_delay_steps + 1
            num_tokens = max(0, len(row.tokens) - layout.num_delay_steps)
            played = min(num_tokens, -(-num_samples // spec.samples_per_token))
            if played < num_tokens or not played:
                ids = ids[: layout.num_speech_steps(played) - 1] if played else ()
            if played:
                whole = [layout.join(row.tokens[start : start + span]) for start in range(played)]
                speech_LX = torch.stack(whole).cpu()
        said = tuple(i for i in ids if i not in (NONE, self.processor.text_eos_id))
        return Entry(Turn("assistant", self.processor.decode_text(said), speech_LX=speech_LX, text_ids=said))

    def fed(self, row: Row, num_positions: int) -> Positions:
        """The first positions of an answer, as `generation.feed` has read them."""
        layout, num_steps = self.processor.layout, len(row.ids)
        first = layout.config.speech_delay_tokens
        speech_LX = layout.token_fill.repeat(num_steps, 1)
        if row.tokens:
            speech_LX[first : first + len(row.tokens)] = torch.stack(row.tokens).cpu()
        states = [NONE if state is None else int(state) for state in row.states]
        drawn_L = torch.zeros(num_steps, dtype=torch.bool)
        drawn_L[first : first + len(row.tokens)] = True
        state_L = torch.tensor(states)
        nothing_BL = torch.zeros(1, num_steps, dtype=torch.bool)
        streams = Streams(
            text_BL=torch.tensor([row.ids]),
            state_BL=state_L[None],
            speech_BLX=speech_LX[None],
            heard_BL=nothing_BL,
            mask_BL=~nothing_BL,
            text_loss_BL=nothing_BL,
            state_loss_BL=nothing_BL,
            tail_BL=(drawn_L & (state_L == SpeechState.STOP))[None],
        )
        return Positions(streams, torch.full((num_steps,), NONE))[:num_positions]

    # layout

    def prompt(self, entries: Sequence[Entry]) -> Positions:
        """Positions of a conversation that ends with the user."""
        turns = [entry.turn for entry in entries]
        streams = self.processor.layout.prompt(turns, instruction=self.instructions)
        clip_L = torch.full((streams.text_BL.shape[1],), NONE)
        clips = [entry for entry in entries if entry.turn.heard_CF is not None]
        if clips:
            stack = self.processor.layout.encoder_stack
            lengths = [num_heard_positions(e.turn.heard_CF.shape[-1], stack) for e in clips]  # type: ignore[union-attr]
            numbers = torch.tensor([entry.number for entry in clips])
            clip_L[streams.heard_BL[0]] = numbers.repeat_interleave(torch.tensor(lengths))
        return Positions(streams, clip_L)

    def opening(self, entries: Sequence[Entry]) -> Positions:
        """All positions of a conversation that are known before the next user turn."""
        positions = self.prompt([*entries, Entry(Turn("user", heard_CF=torch.zeros(1, 1)))])
        return positions[: int(positions.streams.heard_BL[0].nonzero()[-1, 0])]

    def _words_between(self) -> int:
        """Positions of the template between a turn and its answer, and between that and the next turn."""
        turn = Entry(Turn("user", heard_CF=torch.zeros(1, 1)))
        answer = Entry(Turn("assistant", "", text_ids=()))
        return len(self.opening([turn, answer])) - len(self.opening([])) - 1

    def fit(self, entries: Sequence[Entry]) -> list[Entry] | None:
        """The newest turns that leave room for an answer, the last one a user's; None if that alone is too long."""
        kept = list(entries)
        while len(self.prompt(kept)) + self.max_answer + 1 > self.max_positions:
            kept = _without_oldest(kept)
            if not kept:
                return None
        return kept

    def settle(self, entries: Sequence[Entry]) -> list[Entry]:
        """The turns to remember between an answer and the next turn (see the head of this file)."""
        kept, base = list(entries), len(self.opening([]))
        if len(self.opening(kept)) - base <= self._history:
            return kept
        while kept and len(self.opening(kept)) - base > self._history // 2:
            kept = _without_oldest(kept)
        return kept

    # reading

    def read_piece(self, memory: Memory, wanted: Positions, entries: Sequence[Entry], limit: int) -> Memory:
        """Read at most `limit` more of the wanted positions; done when the memory holds just those."""
        known = memory.known(wanted)
        if known == len(wanted):
            return memory
        piece = wanted[known : known + limit]
        heard = {entry.number: entry for entry in entries}
        state = self.model.init_state(1)
        if known:
            assert memory.reading is not None
            state = cut(memory.reading.model_state, known)
        heard_NH = []
        for number in dict.fromkeys(piece.clip_L[piece.streams.heard_BL[0]].tolist()):
            all_PH = heard[number].heard_PH
            assert all_PH is not None
            before = int((wanted.clip_L[:known] == number).sum())
            heard_NH.append(all_PH[before : before + int((piece.clip_L == number).sum())])
        streams = piece.streams.to(self.model.device)
        reading = read(self.model, streams, state, torch.cat(heard_NH) if heard_NH else None)
        return Memory(wanted[: known + len(piece)], reading)

    def after(self, memory: Memory, row: Row, reading: Reading) -> Memory:
        """The memory of a prompt and of what was fed back of its answer."""
        assert memory.positions is not None
        num_fed = reading.model_state.mask_BL.shape[1] - len(memory)
        return Memory(memory.positions.then(self.fed(row, num_fed)), reading) if num_fed else memory


def _without_oldest(entries: list[Entry]) -> list[Entry]:
    """Without the first user turn and what follows it up to the next one."""
    later = [number for number, entry in enumerate(entries) if entry.turn.role == "user" and number > 0]
    return entries[later[0] :] if later else []
