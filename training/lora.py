"""LoRA on parts of the model through peft: put in, saved alone, proven to be applied when they are merged.

Shapes: O outputs and I inputs of a linear layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer, LoraModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from flowomni.strict import nearest

# peft's own file names, so that `PeftModel.from_pretrained(part, folder)` reads what we write
TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model."  # what a PeftModel puts before the names of its tuner
TRAINED = "trained.safetensors"


@dataclass
class LoraOptions:
    """LoRA settings, for every part that says "lora".

    Attributes:
        rank, alpha: the update is alpha / rank * B A.
        ranks: rank of a part where it is another one, by the part's name.
        targets: names of the linear layers that get an adapter; None means every one but the output embeddings.
        use_dora: learn the magnitude of each output apart (DoRA, arXiv 2402.09353).
        save: "merged" writes the whole model with the adapters folded in, and the adapters beside it; "adapters" writes
            the adapters alone, for `python -m training.export_adapter`.
    """

    rank: int = 16
    alpha: int = 32
    ranks: dict[str, int] = field(default_factory=dict)
    targets: list[str] | None = None
    use_dora: bool = False
    save: Literal["merged", "adapters"] = "merged"


def add_lora(parts: Mapping[str, nn.Module], options: LoraOptions) -> dict[str, LoraModel]:
    """Put adapters into the layers of `parts`, in place; only they are trainable there afterwards.

    Raises:
        ValueError: a target that names no linear layer of any part, with the nearest name that does; a part without a
            target; the output embeddings where they share their weight with the input embeddings.
    """
    unknown = set(options.ranks) - set(parts)
    if unknown:
        raise ValueError(f"lora.ranks has {sorted(unknown)}; the parts that are 'lora': {', '.join(parts)}")
    layers = {part: _linear_names(module) for part, module in parts.items()}
    every = sorted({name.rsplit(".", 1)[-1] for names in layers.values() for name in names})
    for target in options.targets or []:
        if not any(_named(name, target) for names in layers.values() for name in names):
            raise ValueError(
                f"lora.targets has {target!r}, which is no linear layer{nearest(target, every)}; "
                f"there are {', '.join(every)}"
            )
    return {part: _add(part, module, layers[part], options) for part, module in parts.items()}


def _add(part: str, module: nn.Module, linear: list[str], options: LoraOptions) -> LoraModel:
    output = _output_embeddings(module)
    if options.targets is None:
        targets = _shortest(module, [name for name in linear if name != output])
    else:
        targets = [target for target in options.targets if any(_named(name, target) for name in linear)]
        if not targets:
            raise ValueError(f"lora.targets {options.targets} names no layer of {part}: there are {', '.join(linear)}")
        if output and any(_named(output, t) for t in targets) and getattr(module.config, "tie_word_embeddings", False):
            raise ValueError(f"lora.targets has {output!r}, whose weight is the embedding's too: leave it out")
    rank = options.ranks.get(part, options.rank)
    config = LoraConfig(
        r=rank, lora_alpha=options.alpha, target_modules=targets, lora_dropout=0.0, use_dora=options.use_dora
    )
    return LoraModel(module, {"default": config}, "default")


def _linear_names(module: nn.Module) -> list[str]:
    return [name for name, layer in module.named_modules() if isinstance(layer, nn.Linear)]


def _named(name: str, target: str) -> bool:
    """Whether peft takes the layer for one of `target`."""
    return name == target or name.endswith(f".{target}")


def _output_embeddings(module: Any) -> str | None:
    """Name of a language model's output embeddings."""
    layer = module.get_output_embeddings() if hasattr(module, "get_output_embeddings") else None
    return next((name for name, each in module.named_modules() if each is layer), None) if layer is not None else None


def _shortest(module: nn.Module, names: list[str]) -> list[str]:
    """Last components of the names where they mean these layers alone ("q_proj"), else whole names ("embedding.0")."""
    others = {name for name, _ in module.named_modules()} - set(names)
    short = {name: name.rsplit(".", 1)[-1] for name in names}
    return sorted({short[n] if not any(_named(other, short[n]) for other in others) else n for n in names})


# ---------------------------------------------------------------------------------------------------- save and load


def save_adapters(model: nn.Module, tuners: Mapping[str, LoraModel], folder: Path, base: str | None) -> None:
    """Write what training changed, and nothing else: a peft adapter per part, and parameters that trained in full.

        folder/<part>/adapter_model.safetensors, adapter_config.json    loadable by peft onto that part
        folder/trained.safetensors                                      named as in the model; if there are any

    Args:
        base: folder or name of the model that was trained, kept in the config.
    """
    inside = {id(p) for tuner in tuners.values() for p in tuner.parameters()}
    for part, tuner in tuners.items():
        (folder / part).mkdir(parents=True, exist_ok=True)
        state = get_peft_model_state_dict(tuner, save_embedding_layers=False)
        save_file({PREFIX + name: value.detach().cpu().contiguous() for name, value in state.items()},
                  folder / part / TENSORS, metadata={"format": "pt"})  # fmt: skip
        config = tuner.peft_config["default"]
        config.base_model_name_or_path = base
        config.inference_mode = True
        config.save_pretrained(str(folder / part))
        config.inference_mode = False
    trained = {n: p.detach().cpu() for n, p in model.named_parameters() if p.requires_grad and id(p) not in inside}
    if trained:
        save_file(trained, folder / TRAINED, metadata={"format": "pt"})


def load_adapter(part: nn.Module, folder: Path) -> LoraModel:
    """Put the saved adapter into `part`, in place, and see that each of its tensors has arrived.

    Raises:
        ValueError: no adapter there, a damaged file, or tensors and layers that do not fit; names them.
    """
    if not (folder / CONFIG).is_file() or not (folder / TENSORS).is_file():
        raise ValueError(f"{folder} is not an adapter: it needs {CONFIG} and {TENSORS}")
    found = _tensors(folder / TENSORS)
    try:
        tuner = LoraModel(part, {"default": LoraConfig.from_pretrained(str(folder))}, "default")
        wanted = get_peft_model_state_dict(tuner, save_embedding_layers=False)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{folder}: the adapter does not fit this model ({' '.join(str(error).split())})") from None
    found = {name.removeprefix(PREFIX): value for name, value in found.items()}
    for what, names in (("unknown", set(found) - set(wanted)), ("missing", set(wanted) - set(found))):
        if names:
            shown = ", ".join(sorted(names)[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            raise ValueError(f"{folder}: {what} tensors: {shown}. Is it this model's adapter?")
    for name, value in found.items():
        if value.shape != wanted[name].shape:
            raise ValueError(
                f"{folder}: {name} is {list(value.shape)}, but this model's is {list(wanted[name].shape)}: "
                "is it this model's adapter?"
            )
    set_peft_model_state_dict(tuner, found)
    for name, value in get_peft_model_state_dict(tuner, save_embedding_layers=False).items():
        if not torch.equal(value.cpu(), found[name].to(value.dtype)):
            raise ValueError(f"{folder}: {name} was not loaded; please report it with the versions of peft and torch")
    return tuner


def merge_lora(tuner: LoraModel) -> dict[str, float]:
    """Fold the adapters into the layers they stand beside and take them out.

    Returns:
        For each layer the largest change of a weight; an adapter that was never trained changes nothing.
    """
    changes = {}
    for name, layer in tuner.model.named_modules():
        if isinstance(layer, LoraLayer):
            adapted: Any = layer
            before_OI: Tensor = adapted.get_base_layer().weight.detach().clone()
            adapted.merge()
            changes[name] = float((adapted.get_base_layer().weight - before_OI).abs().max())
    tuner.unload()
    return changes


def apply_adapters(model: nn.Module, parts: Mapping[str, nn.Module], folder: str | Path) -> dict[str, int]:
    """Merge what `save_adapters` wrote into the model it was trained from.

    Returns:
        Number of changed weight matrices by part.

    Raises:
        ValueError: nothing there; a tensor that is unknown, missing or of another shape; an adapter that changes no
            weight.
    """
    folder = Path(folder)
    named = sorted(file.parent.name for file in folder.glob(f"*/{CONFIG}"))
    if not named and not (folder / TRAINED).is_file():
        raise ValueError(f"{folder} holds no adapters: it needs <part>/{CONFIG} or {TRAINED}")
    unknown = sorted(set(named) - set(parts))
    if unknown:
        raise ValueError(f"{folder}: this model has no part {unknown[0]!r}; its parts: {', '.join(parts)}")
    changed = {}
    for part in named:
        changes = merge_lora(load_adapter(parts[part], folder / part))
        changed[part] = sum(change > 0 for change in changes.values())
        if not changed[part]:
            raise ValueError(f"{folder / part}: the adapter changes no weight: it was never trained, or it is empty")
    if (folder / TRAINED).is_file():
        changed["trained in full"] = _load_trained(model, folder / TRAINED)
    return changed


def _load_trained(model: nn.Module, file: Path) -> int:
    parameters, changed = dict(model.named_parameters()), 0
    for name, value in _tensors(file).items():
        if name not in parameters or parameters[name].shape != value.shape:
            shape = list(parameters[name].shape) if name in parameters else "no such tensor"
            raise ValueError(f"{file}: {name} is {list(value.shape)}, in this model {shape}: was it trained from it?")
        changed += not torch.equal(parameters[name].detach().cpu(), value)
        with torch.no_grad():
            parameters[name].copy_(value)
    if not changed:
        raise ValueError(f"{file} changes nothing: the model already has these weights")
    return changed


def _tensors(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} is damaged ({' '.join(str(error).split())}): copy it again") from None
