"""Assemble a FlowOmni model from pretrained parts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, WhisperConfig

from .configuration import FlowOmniConfig
from .encoder import SpeechEncoder
from .modeling import FlowOmniModel, register
from .processing import FlowOmniProcessor


def assemble(
    llm: str,
    speech_tokenizer: str,
    encoder: str | dict[str, Any] | None = None,
    head: dict[str, Any] | None = None,
    output_blocks: dict[str, Any] | None = None,
    layout: dict[str, Any] | None = None,
    loss: dict[str, Any] | None = None,
    encoder_stack: int = 4,
) -> tuple[FlowOmniModel, FlowOmniProcessor]:
    """A new model: pretrained LLM and speech tokenizer, a pretrained or new encoder, new projector, blocks and heads.

    Args:
        llm: folder or Hub id of a causal LM with its text tokenizer.
        speech_tokenizer: folder of a speech tokenizer (`MelTokenizer.save_pretrained`).
        encoder: folder or Hub id of a Whisper checkpoint; a WhisperConfig dict for a new encoder; None for no ears.
        head, output_blocks, layout, loss, encoder_stack: see `FlowOmniConfig`.

    Raises:
        ValueError: a part is missing or does not fit, naming it.
    """
    register()
    language_model = _load(AutoModelForCausalLM, llm, "llm")
    text_tokenizer = load_text_tokenizer(llm)
    voice = _load(AutoModel, speech_tokenizer, "speech_tokenizer")
    ears = SpeechEncoder.from_pretrained(encoder) if isinstance(encoder, str) else None
    encoder_config = WhisperConfig(**encoder) if isinstance(encoder, dict) else (ears.whisper.config if ears else None)
    config = FlowOmniConfig(
        llm=language_model.config,
        encoder=encoder_config,
        speech_tokenizer=voice.config,
        head=head,
        output_blocks=output_blocks,
        layout=layout,
        loss=loss,
        encoder_stack=encoder_stack,
        text_eos_id=text_tokenizer.eos_token_id,
    )
    model = FlowOmniModel(config)
    model.llm.load_state_dict(language_model.state_dict())
    model.speech_tokenizer.load_state_dict(voice.state_dict())
    if ears is not None:
        model.encoder.load_state_dict(ears.state_dict())
    return model, FlowOmniProcessor(config, text_tokenizer, model.speech_tokenizer.spec)


def load_model(folder: str | Path) -> tuple[FlowOmniModel, FlowOmniProcessor]:
    """Load a saved FlowOmni model with its processor, in float32 and evaluation mode.

    Raises:
        ValueError: the folder does not exist, holds another kind of model, or lacks tensors, naming them.
    """
    register()
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} is not a model folder: it has no config.json")
    config = AutoConfig.from_pretrained(folder)
    if not isinstance(config, FlowOmniConfig):
        raise ValueError(f"{folder} holds a {config.model_type!r} model, not 'flowomni'")
    try:
        model, report = FlowOmniModel.from_pretrained(
            folder, config=config, dtype="float32", output_loading_info=True, use_safetensors=True
        )
    except RuntimeError as error:  # transformers reports wrong shapes this way
        raise ValueError(f"{folder}: {' '.join(str(error).split())[:400]}") from None
    except OSError as error:
        raise ValueError(f"{folder}: {' '.join(str(error).split())[:400]}") from None
    for kind in ("missing_keys", "mismatched_keys", "unexpected_keys"):
        keys = sorted(str(k) for k in report[kind])
        if keys:
            shown = ", ".join(keys[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")
            raise ValueError(f"{folder}: the checkpoint has {kind.replace('_', ' ')}: {shown}. Is it complete?")
    model.eval()
    return model, FlowOmniProcessor(config, load_text_tokenizer(str(folder)), model.speech_tokenizer.spec)


def save_model(model: FlowOmniModel, processor: FlowOmniProcessor, folder: str | Path, half: bool = False) -> None:
    """Write config, weights (safetensors) and text tokenizer; `half` keeps matrices as float16 to halve the file."""
    state = model.state_dict()
    if half:
        names = {name for name, p in model.named_parameters() if p.ndim > 1}
        state = {name: value.half() if name in names else value for name, value in state.items()}
    model.save_pretrained(folder, state_dict=state)
    processor.text_tokenizer.save_pretrained(folder)


def load_text_tokenizer(path: str) -> Any:
    """The text tokenizer of a folder or Hub id; a missing one is a ValueError."""
    try:
        return AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: no text tokenizer there ({' '.join(str(error).split())[:200]})") from None


def _load(auto: Any, path: str, what: str) -> Any:
    try:
        return auto.from_pretrained(path, dtype="float32")
    except (OSError, ValueError) as error:
        raise ValueError(f"{what}: cannot load {path!r} ({' '.join(str(error).split())[:300]})") from None
