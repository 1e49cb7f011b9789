"""LoRA on the language model through peft, in place, and merged back before saving."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from peft import LoraConfig
from peft.tuners.lora import LoraModel
from torch import nn

from flowomni.strict import nearest


@dataclass
class LoraOptions:
    """LoRA settings.

    Attributes:
        rank, alpha: the update is alpha / rank * B A.
        targets: names of the linear layers that get an adapter.
    """

    rank: int = 16
    alpha: int = 32
    targets: list[str] = field(
        default_factory=lambda: ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    )


def add_lora(llm: nn.Module, options: LoraOptions) -> LoraModel:
    """Put adapters into `llm`'s layers; only they are trainable afterwards.

    Raises:
        ValueError: a target that names no linear layer, with the nearest name that does.
    """
    linear = sorted({n.rsplit(".", 1)[-1] for n, m in llm.named_modules() if isinstance(m, nn.Linear)})
    for target in options.targets:
        if target not in linear:
            raise ValueError(
                f"lora.targets has {target!r}, which is no linear layer{nearest(target, linear)}; "
                f"there are {', '.join(linear)}"
            )
    config = LoraConfig(r=options.rank, lora_alpha=options.alpha, target_modules=options.targets, lora_dropout=0.0)
    return LoraModel(llm, {"default": config}, "default")


def merge_lora(tuner: Any) -> None:
    """Fold the adapters into the layers they stand beside and take them out; None does nothing."""
    if tuner is not None:
        tuner.merge_and_unload()
