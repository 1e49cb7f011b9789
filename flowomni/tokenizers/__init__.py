"""Speech tokenizers: wave to speech tokens and back."""

from .autoencoder import AutoencoderConfig, MelTokenizer, MelTokenizerConfig
from .base import SpeechTokenizer, TokenSpec
from .bottlenecks import CodebookUse, codebook_use
from .codecs import CodecConfig, CodecTokenizer
from .continuous_codecs import LatentCodecConfig, LatentCodecTokenizer
from .loading import load_speech_tokenizer
from .mel import MelConfig
from .public_vocos import VocosMelConfig, VocosMelTokenizer
from .vocoder import VocoderConfig

__all__ = [
    "AutoencoderConfig",
    "CodebookUse",
    "CodecConfig",
    "CodecTokenizer",
    "LatentCodecConfig",
    "LatentCodecTokenizer",
    "MelConfig",
    "MelTokenizer",
    "MelTokenizerConfig",
    "SpeechTokenizer",
    "TokenSpec",
    "VocoderConfig",
    "VocosMelConfig",
    "VocosMelTokenizer",
    "codebook_use",
    "load_speech_tokenizer",
]
