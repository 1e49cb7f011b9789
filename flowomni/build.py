"""Assemble a FlowOmni model from pretrained parts."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast, WhisperConfig
from transformers.models.auto.tokenization_auto import get_tokenizer_config

from .configuration import FlowOmniConfig
from .encoder import SpeechEncoder
from .heads.codes import CodeHead
from .modeling import FlowOmniModel, register
from .processing import FlowOmniProcessor
from .strict import nearest


def assemble(
    llm: str,
    speech_tokenizer: str,
    encoder: str | dict[str, Any] | None = None,
    head: dict[str, Any] | None = None,
    output_blocks: dict[str, Any] | None = None,
    layout: dict[str, Any] | None = None,
    loss: dict[str, Any] | None = None,
    encoder_stack: int = 4,
    projector: str | None = None,
) -> tuple[FlowOmniModel, FlowOmniProcessor]:
    """A new model: pretrained LLM and speech tokenizer, a pretrained or new encoder, new projector, blocks and heads.

    Where a part's folder holds a whole FlowOmni model, that model's part is meant.

    Args:
        llm: folder or Hub id of a causal LM with its text tokenizer.
        speech_tokenizer: folder of a speech tokenizer (`MelTokenizer.save_pretrained`).
        encoder: folder or Hub id of a Whisper checkpoint; a WhisperConfig dict for a new encoder; None for no ears.
        head, output_blocks, layout, loss, encoder_stack: see `FlowOmniConfig`.
        projector: folder of a FlowOmni model whose projector is taken, with what else it reads off its encoder and this
            model does too (letters, text ids). None: a new one.

    Raises:
        ValueError: a part is missing or does not fit, naming it.
    """
    register()
    whole = functools.cache(lambda path: load_model(path)[0])  # a model may give several parts
    language_model = whole(llm).llm if is_whole_model(llm) else _load(AutoModelForCausalLM, llm, "llm")
    text_tokenizer = load_text_tokenizer(llm)
    voice: Any = (
        whole(speech_tokenizer).speech_tokenizer
        if is_whole_model(speech_tokenizer)
        else _load(AutoModel, speech_tokenizer, "speech_tokenizer")
    )
    ears = _ears(whole, encoder) if isinstance(encoder, str) else None
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
    if projector is not None:
        _take_projector(model, whole(projector), projector)
    spell(model, text_tokenizer)
    if isinstance(model.head, CodeHead) and model.head.config.tables_from == "codebooks":
        vector_KVD = model.speech_tokenizer.code_vectors()
        if vector_KVD is not None:
            model.head.tables.start_from(vector_KVD)
    return model, FlowOmniProcessor(config, text_tokenizer, model.speech_tokenizer.spec)


def spell(model: FlowOmniModel, text_tokenizer: Any) -> None:
    """Give output blocks that read letters those of the text tokenizer."""
    if model.output_blocks is not None and model.output_blocks.letters is not None:
        model.output_blocks.letters.spell(text_tokenizer)


def is_whole_model(path: str) -> bool:
    """Whether a folder holds a FlowOmni model, not a part of one."""
    file = Path(path) / "config.json"
    try:
        values = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except (OSError, ValueError):
        return False
    return isinstance(values, dict) and values.get("model_type") == FlowOmniConfig.model_type


def load_part_tokenizer(path: str) -> Any:
    """The speech tokenizer of a folder or Hub id, which may hold that alone or a whole FlowOmni model."""
    return load_model(path)[0].speech_tokenizer if is_whole_model(path) else _load(AutoModel, path, "speech_tokenizer")


def load_part_encoder(path: str) -> SpeechEncoder:
    """The speech encoder of a folder or Hub id, which may hold a Whisper or a whole FlowOmni model."""
    return _ears(lambda folder: load_model(folder)[0], path)


def _ears(whole: Callable[[str], Any], path: str) -> SpeechEncoder:
    if not is_whole_model(path):
        return SpeechEncoder.from_pretrained(path)
    if whole(path).config.encoder is None:
        raise ValueError(f"encoder: the model in {path!r} has no speech encoder: name another")
    return whole(path).encoder


def _take_projector(model: FlowOmniModel, giver: FlowOmniModel, path: str) -> None:
    for name in ("projector", "ctc", "text_ctc"):
        taker, given = getattr(model, name, None), getattr(giver, name, None)
        if name == "projector" and (taker is None or given is None):
            raise ValueError(f"projector: {'this model' if taker is None else repr(path)} has no ears, so no projector")
        if taker is None or given is None:
            continue
        try:
            taker.load_state_dict(given.state_dict())
        except RuntimeError as error:
            raise ValueError(f"projector: that of {path!r} does not fit ({_reason(error)})") from None


def load_model(folder: str | Path) -> tuple[FlowOmniModel, FlowOmniProcessor]:
    """Load a saved FlowOmni model with its processor, in float32 and evaluation mode.

    Raises:
        ValueError: the folder does not exist, holds another kind of model, or its config, weights or text tokenizer are
            missing, damaged or do not fit; one line that names the folder and the key or tensor.
    """
    register()
    folder = Path(folder)
    config = _load_config(folder)
    try:
        # wrong shapes are let through to the report, which names them; transformers' own error does not
        loaded: Any = FlowOmniModel.from_pretrained(
            folder,
            config=config,
            dtype="float32",
            output_loading_info=True,
            use_safetensors=True,
            ignore_mismatched_sizes=True,
        )
    except SafetensorError as error:
        raise ValueError(f"{folder}: the weights are damaged ({_reason(error)}): copy the model again") from None
    except (RuntimeError, OSError, ValueError) as error:
        raise ValueError(f"{folder}: {_reason(error)}") from None
    model, report = loaded
    _check_report(folder, report)
    model.eval()
    return model, FlowOmniProcessor(config, load_text_tokenizer(str(folder)), model.speech_tokenizer.spec)


def _load_config(folder: Path) -> FlowOmniConfig:
    file = folder / "config.json"
    if not file.is_file():
        raise ValueError(f"{folder} is not a model folder: it has no config.json")
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} cannot be read as JSON ({_reason(error)}): copy the model again") from None
    kind = values.get("model_type") if isinstance(values, dict) else None
    if kind != FlowOmniConfig.model_type:
        raise ValueError(f"{folder} holds a {kind!r} model, not {FlowOmniConfig.model_type!r}: give a FlowOmni model")
    valid = [*FlowOmniConfig().to_dict(), "_name_or_path"]
    for key in values:
        if key not in valid:
            raise ValueError(f"{file}: unknown key {key!r}{nearest(key, valid)}")
    for part in ("llm", "speech_tokenizer"):
        if not values.get(part):
            raise ValueError(f"{file} has no section {part!r}: is it the config of a whole model?")
    try:
        return FlowOmniConfig.from_pretrained(folder)
    except (ValueError, TypeError, KeyError, StrictDataclassError) as error:
        raise ValueError(f"{file}: {_reason(error)}") from None


def _check_report(folder: Path, report: dict[str, Any]) -> None:
    """Loading is strict: each tensor is there once, in its shape, and there is no other."""
    for name, found, wanted in sorted(report["mismatched_keys"]):
        raise ValueError(f"{folder}: tensor {name} has shape {list(found)}, but config.json makes it {list(wanted)}")
    for kind, what in (("missing_keys", "lacks"), ("unexpected_keys", "has unknown")):
        keys = sorted(report[kind])
        if keys:
            shown = ", ".join(keys[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")
            raise ValueError(f"{folder}: the checkpoint {what} tensors: {shown}. Is it this config.json's?")


def save_model(model: FlowOmniModel, processor: FlowOmniProcessor, folder: str | Path, half: bool = False) -> None:
    """Write config, weights (safetensors) and text tokenizer; `half` keeps matrices as float16 to halve the file."""
    state = model.state_dict()
    if half:
        # by storage, so that a tied matrix stays one tensor and is written once
        halves = {p.data_ptr(): p.detach().half() for p in model.parameters() if p.ndim > 1}
        state = {name: halves.get(value.data_ptr(), value) for name, value in state.items()}
    model.save_pretrained(folder, state_dict=state)
    processor.text_tokenizer.save_pretrained(folder)


def load_text_tokenizer(path: str) -> Any:
    """The text tokenizer of a folder or Hub id; a missing one is a ValueError."""
    try:
        declared = get_tokenizer_config(path).get("tokenizer_class")
        # AutoTokenizer would rebuild a tokenizer of one's own as that of the model's family beside it (Qwen2's
        # pre-tokenizer and decoder around our vocabulary): one that says it is generic is what its file holds
        generic = declared in ("TokenizersBackend", "PreTrainedTokenizerFast")
        tokenizer = (PreTrainedTokenizerFast if generic else AutoTokenizer).from_pretrained(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: no text tokenizer there ({_reason(error)})") from None
    if not tokenizer.encode("a", add_special_tokens=False):  # transformers makes an empty one where the file is missing
        raise ValueError(f"{path}: no text tokenizer there (it has no vocabulary): is tokenizer.json missing?")
    return tokenizer


def _reason(error: Exception) -> str:
    """One line of an error's text; some go on for pages."""
    text = " ".join(str(error).split())
    return text if len(text) <= 300 else text[:300] + " ..."


def _load(auto: Any, path: str, what: str) -> Any:
    try:
        return auto.from_pretrained(path, dtype="float32")
    except (OSError, ValueError) as error:
        raise ValueError(f"{what}: cannot load {path!r} ({_reason(error)})") from None
