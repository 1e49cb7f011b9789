"""The parts of a model in training: which of them train and how, and config sections with changes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from peft.tuners.lora import LoraModel
from torch import nn

from flowomni.configuration import FlowOmniConfig
from flowomni.modeling import FlowOmniModel

from .lora import LoraOptions, add_lora

Trains = Literal["frozen", "full", "lora"]


@dataclass
class TrainsOptions:
    """Which parts train: "frozen", "full" (every weight) or "lora" (adapters). The speech tokenizer never does.

    Attributes:
        llm, encoder: the language model; the Whisper encoder.
        projector: from the encoder into the language model, and the letters that are read off the encoder.
        output_blocks, heads: the transformer blocks after the language model; the speech head, the speech-state head
            and the state embedding ("lora" is for the speech head, the other two stay). None: as `voice` says.
        voice: output blocks and heads at once.
    """

    llm: Trains = "full"
    encoder: Trains = "full"
    projector: Trains = "full"
    voice: Trains = "full"
    output_blocks: Trains | None = None
    heads: Trains | None = None

    def by_part(self) -> dict[str, Trains]:
        """How each part trains."""
        return {
            "llm": self.llm,
            "encoder": self.encoder,
            "projector": self.projector,
            "output_blocks": self.output_blocks or self.voice,
            "heads": self.heads or self.voice,
        }


def with_sections(model: FlowOmniModel, changes: dict[str, dict[str, Any]]) -> FlowOmniModel:
    """The same weights under config sections with `changes`; sizes must stay.

    Another objective or other noise for the head changes no weights. A loss that the ears did not have brings its own,
    untrained, and one that is turned off (weight 0) takes them along; so do letters for the output blocks.
    """
    values = model.config.to_dict()
    for section, some in changes.items():
        values[section] = {**values[section], **some}
    changed = FlowOmniModel(FlowOmniConfig(**{k: v for k, v in values.items() if k != "model_type"}))
    auxiliary = ("ctc.", "text_ctc.", "output_blocks.letters.")
    kept = {k: v for k, v in model.state_dict().items() if not k.startswith(auxiliary) or k in changed.state_dict()}
    wanted = changed.state_dict()
    resized = [name for name, tensor in kept.items() if name in wanted and wanted[name].shape != tensor.shape]
    missing, unexpected = changed.load_state_dict({k: v for k, v in kept.items() if k not in resized}, strict=False)
    wrong = list(dict.fromkeys([*resized, *unexpected, *(n for n in missing if not n.startswith(auxiliary))]))
    if wrong:
        names = ", ".join(wrong[:3])
        sections = ", ".join(f"options.{section}" for section, some in changes.items() if some)
        raise ValueError(f"{sections} ({changes}) ask for other weights than the model's: {names}")
    return changed


def parts_of(model: FlowOmniModel) -> dict[str, list[nn.Module]]:
    """The modules of each part; the first of a part is the one that LoRA goes into."""
    found: dict[str, list[Any]] = {
        "llm": [model.llm],
        "encoder": [getattr(model, "encoder", None)],
        # what reads the encoder
        "projector": [getattr(model, name, None) for name in ("projector", "ctc", "text_ctc")],
        "output_blocks": [model.output_blocks],
        "heads": [model.head, model.state_head, model.state_embedding],
    }
    there = {part: [m for m in modules if m is not None] for part, modules in found.items()}
    return {part: modules for part, modules in there.items() if modules}


def set_trainable(model: FlowOmniModel, trains: TrainsOptions, lora: LoraOptions) -> dict[str, LoraModel]:
    """Freeze and thaw the parts; returns the LoRA tuner of each part that has one."""
    model.requires_grad_(False)
    parts, how = parts_of(model), trains.by_part()
    for part, modules in parts.items():
        for module in modules if how[part] == "full" else []:
            module.requires_grad_(True)
    if hasattr(model, "encoder"):
        model.encoder.whisper.embed_positions.requires_grad_(False)
    adapted = {part: modules[0] for part, modules in parts.items() if how[part] == "lora"}
    return add_lora(adapted, lora) if adapted else {}
