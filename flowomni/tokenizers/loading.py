"""One way to load any speech tokenizer, ours or a public one."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoModel, PreTrainedConfig

from .base import SpeechTokenizer
from .codec_layers import CONTINUOUS, DISCRETE
from .codecs import CodecTokenizer
from .continuous_codecs import LatentCodecTokenizer
from .public_vocos import VocosMelTokenizer


def load_speech_tokenizer(path: str, kind: str | None = None, num_codebooks: int | None = None) -> SpeechTokenizer:
    """A speech tokenizer from a folder or Hub id, in float32 and evaluation mode.

    Args:
        path: a tokenizer saved by `save_pretrained`, a public codec of transformers (`kyutai/mimi`, ...), or the folder
            of a vocos checkpoint (`config.yaml` and `pytorch_model.bin`).
        kind: "discrete" or "continuous" to insist on one, and to choose for a codec that has both (Mimi); None means
            codes where it has some.
        num_codebooks: codebooks of a public codec to use; None means all.

    Raises:
        ValueError: nothing there, another class of model, or `kind` or `num_codebooks` that it does not have.
    """
    tokenizer = _load(path, kind, num_codebooks)
    spec = tokenizer.spec
    if kind not in (None, spec.kind):
        raise ValueError(f"kind is {kind!r}, but {path} holds a tokenizer of {spec.kind} speech tokens")
    if num_codebooks not in (None, spec.num_codebooks):
        raise ValueError(f"num_codebooks is {num_codebooks}, but {path} holds a tokenizer of {spec.num_codebooks}")
    return tokenizer


def _load(path: str, kind: str | None, num_codebooks: int | None) -> SpeechTokenizer:
    if (Path(path) / "config.yaml").is_file():
        return VocosMelTokenizer.from_vocos(path)
    try:
        values, _ = PreTrainedConfig.get_config_dict(path)
    except OSError as error:
        raise ValueError(f"{path}: no speech tokenizer there ({' '.join(str(error).split())[:200]})") from None
    model_type = values.get("model_type")
    if model_type in CONTINUOUS and (kind == "continuous" or model_type not in DISCRETE):
        return LatentCodecTokenizer.from_codec(path)
    if model_type in DISCRETE:
        return CodecTokenizer.from_codec(path, num_codebooks=num_codebooks)
    try:
        tokenizer = AutoModel.from_pretrained(path, dtype="float32")
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: {' '.join(str(error).split())[:300]}") from None
    if not isinstance(tokenizer, SpeechTokenizer):
        raise ValueError(f"{path} holds a {model_type!r} model, which is not a speech tokenizer")
    return tokenizer.eval()
