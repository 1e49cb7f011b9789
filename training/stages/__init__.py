"""The stages that `training.train` can train."""

from __future__ import annotations

from .base import Stage
from .hearing import HearingStage
from .speech import SpeechStage
from .text import TextStage
from .tokenizer import TokenizerStage
from .vocoder import VocoderStage

STAGES: dict[str, type[Stage]] = {
    "vocoder": VocoderStage,
    "tokenizer": TokenizerStage,
    "text": TextStage,
    "hearing": HearingStage,
    "speech": SpeechStage,
}
