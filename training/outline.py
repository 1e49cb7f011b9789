"""The module of a stage without its weights: the same classes and shapes on torch's meta device, without any data.

What a stage starts from may not exist yet. Then the sizes come from the stage that makes it, and those of a checkpoint
of the Hub from `configs/architectures/`, so that a plan needs neither weights nor network.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, PreTrainedConfig, WhisperConfig

from flowomni.configuration import FlowOmniConfig
from flowomni.encoder import SpeechEncoder
from flowomni.modeling import FlowOmniModel, register
from flowomni.tokenizers import AutoencoderConfig, MelTokenizer, MelTokenizerConfig

from .config import parse, read_yaml
from .stages import STAGES
from .stages.hearing import HearingOptions, HearingTraining
from .stages.speech import SpeechOptions, section_changes, set_trainable
from .stages.text import TextOptions, TextStage
from .stages.tokenizer import TokenizerOptions, TokenizerTraining
from .stages.vocoder import VocoderOptions, VocoderTraining
from .train import RunOptions

CONFIGS = Path(__file__).resolve().parent.parent / "configs"


@dataclass
class Sizes:
    """Where the sizes of checkpoints come from.

    Attributes:
        configs: folder of the stages' YAML files and of `architectures/<owner>/<name>/config.json`.
        sources: what was asked for, and where it was found.
    """

    configs: Path = CONFIGS
    sources: dict[str, str] = field(default_factory=dict)
    _following: tuple[Path, ...] = ()

    def of(self, path: str, what: str) -> PreTrainedConfig:
        """The config of the checkpoint in folder `path`, or with that name on the Hub; loads no weights.

        Raises:
            ValueError: nothing says what that checkpoint is or will be; names `what` and `path`.
        """
        if (Path(path) / "config.json").is_file():
            return self._read(path, path, what)
        maker = self._maker(path)
        if maker is not None:
            self.sources[path] = f"not made yet, by {_shown(maker)}"
            return self._made_by(maker)
        try:
            return AutoConfig.from_pretrained(path, local_files_only=True)
        except (OSError, ValueError):
            stored = self.configs / "architectures" / path
        if not (stored / "config.json").is_file():
            raise ValueError(
                f"{what}: there is no folder {path!r} with a config.json, no stage under {_shown(self.configs)} makes "
                f"it, and {_shown(stored / 'config.json')} does not exist: train that stage, or put the checkpoint's "
                "config.json there"
            )
        self.sources[path] = _shown(stored)
        return self._read(stored, path, what)

    def _read(self, folder: str | Path, path: str, what: str) -> PreTrainedConfig:
        try:
            return AutoConfig.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError) as error:
            raise ValueError(f"{what}: {path!r} has no usable config.json ({' '.join(str(error).split())})") from None

    def _maker(self, path: str) -> Path | None:
        """The configuration whose run ends in `path`."""
        for file in sorted(self.configs.rglob("*.yaml")):
            if file not in self._following and "output_dir:" in file.read_text(encoding="utf-8"):
                output_dir = str(read_yaml(file).get("output_dir"))
                if os.path.normpath(path) == os.path.normpath(os.path.join(output_dir, "final")):
                    return file
        return None

    def _made_by(self, file: Path) -> PreTrainedConfig:
        parsed = parse(RunOptions, {name: stage.Options for name, stage in STAGES.items()}, ["--config", str(file)])
        inner = Sizes(self.configs, self.sources, (*self._following, file))
        module: Any = outline(parsed.options, inner)
        if isinstance(module, FlowOmniModel):
            return module.config
        if isinstance(module, HearingTraining):
            return module.encoder.config
        return (module.llm if isinstance(parsed.options, TextOptions) else module.tokenizer).config


def outline(options: Any, sizes: Sizes) -> nn.Module:
    """The module that the stage with these options trains, all on the meta device, frozen where it will be.

    Raises:
        ValueError: as when the stage starts, where sizes suffice to see it; or a checkpoint of unknown size.
    """
    register()
    with torch.device("meta"):
        return OUTLINES[type(options)](options, sizes)


def _vocoder(options: VocoderOptions, sizes: Sizes) -> nn.Module:
    if options.tokenizer is None:
        plain = AutoencoderConfig.plain_patch(options.frames_per_token, options.mel.num_mels)
        config = MelTokenizerConfig(options.mel, plain, options.vocoder)
    else:
        config = _tokenizer_config(sizes, options.tokenizer, "options.tokenizer")
    return VocoderTraining(MelTokenizer(config), options)


def _tokenizer(options: TokenizerOptions, sizes: Sizes) -> nn.Module:
    vocoder = _tokenizer_config(sizes, options.vocoder, "options.vocoder")
    config = MelTokenizerConfig(vocoder.mel, options.autoencoder, vocoder.vocoder)
    teachers: dict[str, str] = {}
    if options.distillation is not None:
        teachers = {kind: getattr(options.distillation, f"{kind}_teacher") for kind in options.distillation.teachers}
    dims = {kind: sizes.of(path, f"options.distillation.{kind}_teacher").hidden_size for kind, path in teachers.items()}
    return TokenizerTraining(MelTokenizer(config), options, dims)


def _text(options: TextOptions, sizes: Sizes) -> nn.Module:
    return TextStage(options, seed=0).module  # reads no data


def _hearing(options: HearingOptions, sizes: Sizes) -> nn.Module:
    return HearingTraining(SpeechEncoder(WhisperConfig(**options.encoder)))


def _speech(options: SpeechOptions, sizes: Sizes) -> nn.Module:
    model = FlowOmniModel(_speech_config(options, sizes))
    set_trainable(model, options.trains, options.lora)
    return model


def _speech_config(options: SpeechOptions, sizes: Sizes) -> FlowOmniConfig:
    parts = options.parts
    if parts is None:
        config = sizes.of(str(options.model), "options.model")
        if not isinstance(config, FlowOmniConfig):
            raise ValueError(f"options.model: {options.model!r} holds a {config.model_type!r} model, not 'flowomni'")
        values = {k: v for k, v in config.to_dict().items() if k != "model_type"}
        changes = section_changes(config.head, options)
        sections = {name: {**values[name], **changed} for name, changed in changes.items()}
        return FlowOmniConfig(**(values | sections))
    encoder = parts.encoder
    if isinstance(encoder, str):
        encoder = _part(sizes.of(encoder, "options.parts.encoder"), "encoder")
        if not isinstance(encoder, WhisperConfig):
            raise ValueError(
                f"options.parts.encoder: {parts.encoder!r} is a {encoder.model_type!r} checkpoint, not a Whisper"
            )
    speech_tokenizer: Any = _part(
        sizes.of(parts.speech_tokenizer, "options.parts.speech_tokenizer"), "speech_tokenizer"
    )
    return FlowOmniConfig(
        llm=_part(sizes.of(parts.llm, "options.parts.llm"), "llm"),
        encoder=encoder,
        speech_tokenizer=speech_tokenizer,
        head=parts.head,
        output_blocks=parts.output_blocks,
        layout=parts.layout,
        loss=parts.loss,
        encoder_stack=parts.encoder_stack,
    )


def _part(config: Any, name: str) -> Any:
    """Of a whole model's config, that of a part."""
    return getattr(config, name) if isinstance(config, FlowOmniConfig) else config


def _tokenizer_config(sizes: Sizes, path: str, what: str) -> MelTokenizerConfig:
    config = _part(sizes.of(path, what), "speech_tokenizer")
    if not isinstance(config, MelTokenizerConfig):
        raise ValueError(f"{what}: {path!r} holds a {config.model_type!r} model, not a mel tokenizer")
    return config


def _shown(path: Path) -> str:
    """Relative to the working directory where that is shorter."""
    return min(str(path), os.path.relpath(path), key=len)


OUTLINES: dict[type, Callable[..., nn.Module]] = {
    VocoderOptions: _vocoder,
    TokenizerOptions: _tokenizer,
    TextOptions: _text,
    HearingOptions: _hearing,
    SpeechOptions: _speech,
}
