"""Speech tokenizers: wave to speech tokens and back."""

from .autoencoder import AutoencoderConfig, MelTokenizer, MelTokenizerConfig
from .base import SpeechTokenizer, TokenSpec
from .mel import MelConfig
from .vocoder import VocoderConfig

__all__ = [
    "AutoencoderConfig",
    "MelConfig",
    "MelTokenizer",
    "MelTokenizerConfig",
    "SpeechTokenizer",
    "TokenSpec",
    "VocoderConfig",
]
