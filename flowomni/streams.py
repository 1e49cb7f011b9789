"""Streams: the one data structure between data, model and generation.

Shapes: B batch, L positions, D latent dimension (or K codebooks), C Whisper mel bins, F Whisper mel frames.

Position p of the sequence holds what the model *reads* there: any of a text id, a speech state, an own speech token,
one heard position. The model's output at p predicts position p + 1, as in any language model, so one array serves as
input and as target: `*_loss` masks say which positions are also targets.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor

NONE = -1  # no text id, or no speech state, at a position


class SpeechState(IntEnum):
    """The class of a step of the speech stream. Speech is drawn only while GENERATING; STOP ends it."""

    PAD = 0
    START = 1
    GENERATING = 2
    STOP = 3


@dataclass(frozen=True)
class Streams:
    """One batch (or, with B = 1, one example) of aligned streams.

    Attributes:
        text_BL: int64 text ids, NONE where the text stream is silent.
        state_BL: int64 speech states, NONE where there is no speech stream (prompts, text-only answers).
        speech_BLX: own speech tokens (latents [B, L, D] or codes [B, L, K]); NaN (or -1) except where the state is
            GENERATING.
        heard_BL: bool, a heard position: takes the next row of the projected speech encoder output.
        mask_BL: bool, False at padding (always at the end).
        text_loss_BL: bool, the text id at this position is a target.
        state_loss_BL: bool, what the speech stream has at this position is a target: the state, where there is a
            choice, and the speech token.
        features_BCF: float32 Whisper log-mel of the heard clips in order of appearance, or None. B here counts clips.
        feature_lengths_B: int64 true number of mel frames of each clip.
        ctc_BT: int64 UTF-8 bytes of what each clip says (auxiliary CTC target), NONE-padded, or None.
        heard_text_BU: int64 text ids of what each clip says (likewise, of the language model's tokenizer), or None.
        tail_BL: bool, positions in the STOP state that hold what is still missing of the last speech tokens, where
            parts of a token come steps after it (`SpeechHead.part_delays`); None means nowhere.
    """

    text_BL: Tensor
    state_BL: Tensor
    speech_BLX: Tensor
    heard_BL: Tensor
    mask_BL: Tensor
    text_loss_BL: Tensor
    state_loss_BL: Tensor
    features_BCF: Tensor | None = None
    feature_lengths_B: Tensor | None = None
    ctc_BT: Tensor | None = None
    heard_text_BU: Tensor | None = None
    tail_BL: Tensor | None = None

    @property
    def generating_BL(self) -> Tensor:
        """bool: positions that hold an own speech token, or parts of some."""
        generating_BL = self.state_BL == SpeechState.GENERATING
        return generating_BL if self.tail_BL is None else generating_BL | self.tail_BL

    @property
    def speech_loss_BL(self) -> Tensor:
        """bool: positions whose speech token is a target of the head."""
        return self.generating_BL & self.state_loss_BL

    @property
    def state_target_BL(self) -> Tensor:
        """bool: positions whose state is a target of the state head: once stopped, there is nothing left to choose."""
        stop_BL = self.state_BL == SpeechState.STOP
        stopped_BL = torch.cat([torch.zeros_like(stop_BL[:, :1]), stop_BL[:, :-1]], dim=1)
        return self.state_loss_BL & ~(stop_BL & stopped_BL)

    def to(self, device: torch.device | str) -> Streams:
        """The same streams on another device."""
        moved = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return Streams(**{k: v.to(device) if isinstance(v, Tensor) else v for k, v in moved.items()})

    def counts(self) -> dict[str, float]:
        """Number of targets of each loss part, known before any forward pass."""
        shifted = slice(1, None)
        return {
            "text": float(self.text_loss_BL[:, shifted].sum()),
            "state": float(self.state_target_BL[:, shifted].sum()),
            "speech": float(self.speech_loss_BL[:, shifted].sum()),
            "ctc": _num_filled(self.ctc_BT),
            "text_ctc": _num_filled(self.heard_text_BU),
        }


def collate(rows: list[Streams], length: int | None = None) -> Streams:
    """Right-pad examples (each B = 1) to one batch. Padding is NONE, NaN (or -1) and False, so that a leak is loud."""
    length = max(row.text_BL.shape[1] for row in rows) if length is None else length

    def stack(name: str, fill: float | int | bool) -> Tensor:
        parts = []
        for row in rows:
            value = getattr(row, name)
            shape = (1, length - value.shape[1], *value.shape[2:])
            parts.append(torch.cat([value, torch.full(shape, fill, dtype=value.dtype)], dim=1))
        return torch.cat(parts)

    speech_fill = float("nan") if rows[0].speech_BLX.is_floating_point() else NONE
    clips = [row for row in rows if row.features_BCF is not None]
    return Streams(
        text_BL=stack("text_BL", NONE),
        state_BL=stack("state_BL", NONE),
        speech_BLX=stack("speech_BLX", speech_fill),
        heard_BL=stack("heard_BL", False),
        mask_BL=stack("mask_BL", False),
        text_loss_BL=stack("text_loss_BL", False),
        state_loss_BL=stack("state_loss_BL", False),
        features_BCF=_pad_last([f for row in clips for f in row.features_BCF], 0.0) if clips else None,  # type: ignore[union-attr]
        feature_lengths_B=torch.cat([row.feature_lengths_B for row in clips]) if clips else None,  # type: ignore[misc]
        ctc_BT=_pad_clips(clips, "ctc_BT"),
        heard_text_BU=_pad_clips(clips, "heard_text_BU"),
        tail_BL=None if rows[0].tail_BL is None else stack("tail_BL", False),
    )


def _num_filled(said_BU: Tensor | None) -> float:
    return float(0 if said_BU is None else (said_BU[:, :1] != NONE).sum())


def _pad_clips(rows: list[Streams], name: str) -> Tensor | None:
    if not rows or getattr(rows[0], name) is None:
        return None
    return _pad_last([said_U for row in rows for said_U in getattr(row, name)], NONE)


def _pad_last(values: list[Tensor], fill: float) -> Tensor:
    longest = max(v.shape[-1] for v in values)
    return torch.stack([torch.nn.functional.pad(v, (0, longest - v.shape[-1]), value=fill) for v in values])
