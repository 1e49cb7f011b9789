"""FlowOmniProcessor: text and audio to model inputs, and text ids back to text.

Shapes: S samples, L positions, X one speech token (D latents or K codes).
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np

from .configuration import FlowOmniConfig, LayoutConfig
from .encoder import HeardFeatures
from .heads import part_delays
from .layouts import Turn, TurnLayout
from .streams import Streams
from .strict import strict
from .tokenizers.base import TokenSpec

HEARD_RATE_HZ = 16_000


class FlowOmniProcessor:
    """The text tokenizer, the speech encoder's features and the layout of one model.

    Args:
        config: the model's config.
        text_tokenizer: the LLM's Hugging Face tokenizer.
        spec: of the model's speech tokenizer.

    Raises:
        ValueError: there is no id that ends an answer.
    """

    def __init__(self, config: FlowOmniConfig, text_tokenizer: Any, spec: TokenSpec):
        self.text_tokenizer = text_tokenizer
        eos = config.text_eos_id if config.text_eos_id is not None else text_tokenizer.eos_token_id
        if eos is None:
            raise ValueError("text_eos_id is not set and the text tokenizer has no eos token: set text_eos_id")
        self.text_eos_id: int = eos
        self.heard_features = None if config.encoder is None else HeardFeatures.from_whisper_config(config.encoder)
        self.max_heard_sec = 0.0 if self.heard_features is None else self.heard_features.max_heard_sec
        layout = strict(LayoutConfig, config.layout, "layout")
        delay_X = part_delays(config.head, spec)
        self.layout = TurnLayout(layout, text_tokenizer, eos, config.encoder_stack, spec.empty_token(), delay_X)

    def turn(self, role: str, text: str | None = None, wav_S: np.ndarray | None = None, total_sec: float = 0.0) -> Turn:
        """One turn of a conversation.

        Args:
            role: "user" or "assistant".
            text: what is said, for a typed turn (or the transcript of a heard one).
            wav_S: 16 kHz mono float32 audio of a heard turn.
            total_sec: length of the source where `wav_S` is only its beginning, for the warning.
        """
        if wav_S is None:
            if not (text or "").strip():
                raise ValueError("the text is empty: give some words or an audio file")
            return Turn(role, text=text)
        if self.heard_features is None:
            raise ValueError("this model has no speech encoder: it takes text only")
        limit = int(self.max_heard_sec * HEARD_RATE_HZ)
        heard_sec = max(total_sec, len(wav_S) / HEARD_RATE_HZ)
        if heard_sec > self.max_heard_sec:
            cut = heard_sec - self.max_heard_sec
            warnings.warn(
                f"the audio is {heard_sec:.1f} s long and the model hears {self.max_heard_sec:.1f} s: "
                f"the last {cut:.1f} s are cut off",
                stacklevel=2,
            )
        return Turn(role, text=text, heard_CF=self.heard_features.features(wav_S[:limit]))

    def prompt(self, turns: Sequence[Turn], task: str = "answer") -> Streams:
        """Streams (one row) of a conversation that ends with the user."""
        return self.layout.prompt(turns, task)

    def decode_text(self, ids: Sequence[int]) -> str:
        """Text of answer ids; special tokens are dropped."""
        return self.text_tokenizer.decode([i for i in ids if i >= 0], skip_special_tokens=True)
