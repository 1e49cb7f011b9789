"""Adapters: what trains, what is saved, and that loading them changes the model as training did.

Shapes: B batch, L positions, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from flowomni.build import load_model, save_model
from flowomni.layouts import Turn
from flowomni.modeling import FlowOmniModel
from flowomni.streams import Streams, collate
from tests.tiny import tiny_model
from training.export_adapter import export, main
from training.lora import LoraOptions, apply_adapters, merge_lora, save_adapters
from training.parts import TrainsOptions, parts_of, set_trainable

PARTS = ("llm", "encoder", "projector", "output_blocks", "heads")


def batch() -> Streams:
    _, processor = tiny_model()
    generator = torch.Generator().manual_seed(0)
    heard = processor.turn("user", "what is one", 0.1 * torch.randn(6_000, generator=generator).numpy())
    says = Turn("assistant", "the answer is three", speech_LX=torch.randn(4, 6, generator=generator))
    typed = [processor.turn("user", "say hello"), Turn("assistant", "hello")]
    return collate([processor.layout.example([heard, says]), processor.layout.example(typed)])


def losses_of(model: FlowOmniModel, streams: Streams) -> dict[str, Tensor]:
    losses = model(streams, torch.Generator().manual_seed(1))
    return {name: loss.sum for name, loss in losses.items() if "/" not in name}


def train_a_little(model: FlowOmniModel, streams: Streams) -> dict[str, Tensor]:
    """Two large steps; the losses of the model afterwards."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trainable, lr=0.02)
    for _ in range(2):
        optimizer.zero_grad()
        sum(losses_of(model, streams).values()).backward()  # type: ignore[union-attr]
        optimizer.step()
    with torch.no_grad():
        return losses_of(model, streams)


def firsts(model: FlowOmniModel) -> dict[str, Any]:
    return {part: modules[0] for part, modules in parts_of(model).items()}


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor]]:
    """A base model and adapters of its language model; the losses of the trained model."""
    folder = tmp_path_factory.mktemp("adapted")
    model, processor = tiny_model()
    save_model(model, processor, folder / "base")
    trains = TrainsOptions(llm="lora", encoder="frozen", projector="full", voice="frozen")
    tuners = set_trainable(model, trains, LoraOptions(rank=4, targets=["q_proj", "down_proj"]))
    losses = train_a_little(model, batch())
    save_adapters(model, tuners, folder / "adapters", base=str(folder / "base"))
    return folder, losses


@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
def test_every_part_takes_adapters_and_gives_them_back(use_dora: bool, tmp_path: Path) -> None:
    """Saved alone and merged into a fresh copy of the model, they are the trained model; so is merging in place."""
    model, _ = tiny_model()
    names = {name for name, _ in model.named_parameters()}
    fresh = copy.deepcopy(model)
    everything = TrainsOptions(llm="lora", encoder="lora", projector="lora", voice="lora")
    options = LoraOptions(rank=3, ranks={"heads": 2}, use_dora=use_dora)
    tuners = set_trainable(model, everything, options)
    assert tuple(tuners) == PARTS
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable and all("lora_" in name for name in trainable)
    assert any("lora_magnitude" in name for name in trainable) == use_dora
    for part, module in firsts(model).items():
        ranks = {p.shape[0] for name, p in module.named_parameters() if "lora_A" in name}
        assert ranks == {2 if part == "heads" else 3}
    with torch.no_grad():
        before = losses_of(fresh, batch())
    trained = train_a_little(model, batch())
    save_adapters(model, tuners, tmp_path, base=None)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(PARTS)  # nothing trained in full
    changed = apply_adapters(fresh, firsts(fresh), tmp_path)
    assert set(changed) == set(PARTS) and all(changed.values())
    for tuner in tuners.values():
        merge_lora(tuner)
    with torch.no_grad():
        for merged in (fresh, model):
            assert {name for name, _ in merged.named_parameters()} == names
            for name, loss in losses_of(merged, batch()).items():
                torch.testing.assert_close(loss, trained[name], rtol=1e-4, atol=1e-4)
                assert abs(loss - before[name]) > 10 * abs(loss - trained[name])


def test_one_part_may_differ_from_another() -> None:
    """Frozen, full and LoRA side by side; `voice` stands for output blocks and heads unless they are named."""
    model, _ = tiny_model()
    trains = TrainsOptions(llm="lora", encoder="frozen", projector="full", voice="full", output_blocks="frozen")
    set_trainable(model, trains, LoraOptions())
    kinds: dict[str, set[str]] = {}
    for name, parameter in model.named_parameters():
        part = name.split(".")[0]
        kinds.setdefault(part, set()).add(
            ("lora" if "lora_" in name else "full") if parameter.requires_grad else "frozen"
        )
    assert kinds.pop("llm") == {"lora", "frozen"}
    for part in ("encoder", "output_blocks", "speech_tokenizer"):
        assert kinds.pop(part) == {"frozen"}
    assert set(kinds) == {"projector", "ctc", "text_ctc", "head", "state_head", "state_embedding"}
    assert all(kind == {"full"} for kind in kinds.values())


def test_peft_itself_loads_the_adapter(adapted: tuple[Path, dict[str, Tensor]]) -> None:
    folder, _ = adapted
    base, _ = load_model(folder / "base")
    merged, _ = load_model(folder / "base")
    apply_adapters(merged, firsts(merged), folder / "adapters")
    text_BL = torch.arange(3, 12)[None]
    with torch.no_grad():
        plain_BLV = base.llm(input_ids=text_BL).logits
        theirs = PeftModel.from_pretrained(base.llm, folder / "adapters" / "llm")
        wanted_BLV = theirs(input_ids=text_BL).logits
        torch.testing.assert_close(merged.llm(input_ids=text_BL).logits, wanted_BLV)
        assert (wanted_BLV - plain_BLV).abs().max() > 1e-3


def test_export_is_the_trained_model(adapted: tuple[Path, dict[str, Tensor]], tmp_path: Path, capsys: Any) -> None:
    """By the command: one plain checkpoint with the adapters and what trained in full; it overwrites nothing."""
    folder, trained = adapted
    command = ["--model", str(folder / "base"), "--adapters", str(folder / "adapters"), "--out", str(tmp_path / "out")]
    main(command)
    assert "llm 4" in capsys.readouterr().out  # two layers, two targets
    model, _ = load_model(tmp_path / "out")
    assert not any("lora" in name for name in model.state_dict())
    with torch.no_grad():
        for name, loss in losses_of(model, batch()).items():
            torch.testing.assert_close(loss, trained[name], rtol=1e-4, atol=1e-4)
    with pytest.raises(SystemExit) as stopped:
        main(command)
    assert stopped.value.code == 2 and "is there already" in capsys.readouterr().err


def without(name: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda tensors: {n: v for n, v in tensors.items() if name not in n}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("layers.1.self_attn.q_proj.lora_B"), r"missing tensors: model\.model\.layers\.1\.self_attn\.q_proj"),
        (lambda t: {n.replace("q_proj", "o_proj"): v for n, v in t.items()}, r"unknown tensors: .*o_proj\.lora_A"),
        (lambda t: {n: v[:2] if "lora_A" in n else v for n, v in t.items()}, r"is \[2, \d+\], but this model's is \[4"),
        (lambda t: {n: v * ("lora_A" in n) for n, v in t.items()}, "changes no weight: it was never trained"),
    ],
    ids=["missing", "unknown", "shape", "no effect"],
)
def test_an_adapter_without_effect_is_an_error(
    adapted: tuple[Path, dict[str, Tensor]], tmp_path: Path, change: Any, message: str
) -> None:
    """Most speech LLMs load such a file in silence, and speak as before."""
    folder, _ = adapted
    part = tmp_path / "adapters" / "llm"
    part.mkdir(parents=True)
    source = folder / "adapters" / "llm"
    (part / "adapter_config.json").write_text((source / "adapter_config.json").read_text())
    tensors = change(load_file(source / "adapter_model.safetensors"))
    save_file({name: value.contiguous() for name, value in tensors.items()}, part / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=message):
        export(folder / "base", tmp_path / "adapters", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_other_files_are_refused(adapted: tuple[Path, dict[str, Tensor]], tmp_path: Path) -> None:
    folder, _ = adapted
    with pytest.raises(ValueError, match="holds no adapters"):
        export(folder / "base", tmp_path, tmp_path / "out")
    whole = (folder / "adapters" / "llm" / "adapter_model.safetensors").read_bytes()
    for name, damage in (("llm", whole[:-50]), ("ears", whole)):
        part = tmp_path / f"with_{name}" / name
        part.mkdir(parents=True)
        (part / "adapter_config.json").write_text((folder / "adapters/llm/adapter_config.json").read_text())
        (part / "adapter_model.safetensors").write_bytes(damage)
    with pytest.raises(ValueError, match="is damaged"):
        export(folder / "base", tmp_path / "with_llm", tmp_path / "out")
    with pytest.raises(ValueError, match="has no part 'ears'; its parts: llm, encoder"):
        export(folder / "base", tmp_path / "with_ears", tmp_path / "out")
    trained = tmp_path / "trained"
    trained.mkdir()
    save_file({"projector.expand.weight": torch.zeros(3)}, trained / "trained.safetensors")
    with pytest.raises(ValueError, match=r"projector\.expand\.weight is \[3\], in this model \[32, 128\]"):
        export(folder / "base", trained, tmp_path / "out")
    base, _ = load_model(folder / "base")
    save_file({"projector.expand.weight": base.projector.expand.weight.data}, trained / "trained.safetensors")
    with pytest.raises(ValueError, match="changes nothing"):
        export(folder / "base", trained, tmp_path / "out")


@pytest.mark.parametrize(
    ("trains", "options", "message"),
    [
        ({"llm": "lora"}, {"targets": ["q_porj"]}, r"'q_porj', which is no linear layer; did you mean 'q_proj'"),
        (
            {"llm": "lora", "encoder": "lora"},
            {"targets": ["o_proj"]},
            r"names no layer of encoder: there are .*out_proj",
        ),
        ({"llm": "lora"}, {"targets": ["lm_head"]}, "'lm_head', whose weight is the embedding's too"),
        ({"llm": "lora"}, {"ranks": {"lllm": 3}}, r"lora\.ranks has \['lllm'\]; the parts that are 'lora': llm"),
    ],
)
def test_bad_options(trains: Any, options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        set_trainable(tiny_model()[0], TrainsOptions(**trains), LoraOptions(**options))
