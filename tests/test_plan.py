"""`--plan`: the outlined module is the trained one without its memory, and needs neither data nor network."""

from __future__ import annotations

import json
import re
import socket
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import yaml
from torch import nn
from transformers import Qwen2Config, Qwen2Model

from flowomni.build import save_model
from tests.tiny import ENCODER, save_tiny_parts, tiny_model
from training.config import parse
from training.outline import CONFIGS, Sizes, outline
from training.plan import Plan, activations, plan
from training.stages import STAGES
from training.stages.hearing import HearingOptions, HearingStage
from training.stages.speech import PartsOptions, SpeechOptions, SpeechStage, TrainsOptions
from training.stages.text import TextOptions, TextStage
from training.train import RunOptions, main

STAGE_FILES = [f for f in sorted(CONFIGS.rglob("*.yaml")) if re.search("^stage:", f.read_text(), re.MULTILINE)]
OPTIONS = {name: stage.Options for name, stage in STAGES.items()}
RUN = RunOptions(stage="speech", output_dir="runs/x", max_steps=1)


def plan_of(file: Path, *arguments: str) -> Plan:
    parsed = parse(RunOptions, OPTIONS, ["--config", str(file), *arguments])
    return plan(parsed.run, parsed.options)


def numbers(found: Plan) -> dict[str, tuple[int, int]]:
    return {part.name: (part.num_parameters, part.num_trainable) for part in found.parts}


def skeleton(module: nn.Module) -> dict[str, Any]:
    """Name, shape and whether it trains, of each parameter."""
    return {name: (tuple(p.shape), p.requires_grad) for name, p in module.named_parameters()}


def counts(*modules: nn.Module) -> tuple[int, int]:
    parameters = [p for module in modules for p in module.parameters()]
    return sum(p.numel() for p in parameters), sum(p.numel() for p in parameters if p.requires_grad)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A manifest of one conversation a split; no recording is read before the first batch."""
    folder = tmp_path_factory.mktemp("corpus")
    turns = [{"role": "user", "text": "hello"}, {"role": "assistant", "text": "hello"}]
    lines = [json.dumps({"id": split, "split": split, "turns": turns}) for split in ("train", "valid")]
    (folder / "manifest.jsonl").write_text("\n".join(lines))
    return str(folder)


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> PartsOptions:
    folders = save_tiny_parts(tmp_path_factory.mktemp("parts"))
    return PartsOptions(
        **folders,
        encoder=ENCODER,
        head={"kind": "flow", "width": 32, "num_blocks": 1},
        output_blocks={"num_layers": 1, "num_heads": 2},
        loss={"ctc_weight": 0.5, "text_ctc_weight": 0.5},
    )


@pytest.mark.parametrize(
    ("trains", "attention"),
    [
        (TrainsOptions(), "eager"),
        (TrainsOptions(llm="frozen", encoder="frozen"), "sdpa"),
        (TrainsOptions(llm="lora", voice="frozen"), "eager"),
    ],
    ids=["all", "alignment", "lora"],
)
def test_plan_is_the_stage_that_trains(
    parts: PartsOptions, corpus: str, trains: TrainsOptions, attention: Literal["sdpa", "eager"]
) -> None:
    options = SpeechOptions(manifest=corpus, parts=parts, trains=trains, attention=attention)
    stage, found = SpeechStage(options, seed=0), plan(RUN, options)
    assert skeleton(found.module) == skeleton(stage.module)
    model = stage.model
    assert numbers(found) == {
        "encoder": counts(model.encoder),
        "projector": counts(model.projector),
        "ctc": counts(model.ctc),
        "text ctc": counts(model.text_ctc),
        "llm": counts(model.llm),
        "output blocks": counts(model.output_blocks),
        "state embedding": counts(model.state_embedding),
        "state head": counts(model.state_head),
        "head": counts(model.head),
        "speech tokenizer: autoencoder": counts(model.speech_tokenizer.encoder, model.speech_tokenizer.decoder),
        "speech tokenizer: vocoder": counts(model.speech_tokenizer.vocoder),
    }
    assert (found.num_parameters, found.num_trainable) == counts(model)


def test_plan_of_a_saved_model_with_another_objective(corpus: str, tmp_path: Path) -> None:
    save_model(*tiny_model(), tmp_path)
    options = SpeechOptions(manifest=corpus, model=str(tmp_path), head={"objective": "lsd"}, attention="eager")
    found = plan(RUN, options)
    assert skeleton(found.module) == skeleton(SpeechStage(options, seed=0).module)
    assert found.module.config.head["objective"] == "lsd"


def test_plan_of_a_text_stage() -> None:
    llm = {"model_type": "qwen2", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    options = TextOptions(llm=llm | {"num_attention_heads": 2, "num_key_value_heads": 2})
    assert skeleton(outline(options, Sizes())) == skeleton(TextStage(options, seed=0).module)


def test_plan_of_a_hearing_stage(corpus: str) -> None:
    options = HearingOptions(manifest=corpus, encoder=ENCODER)
    stage, found = HearingStage(options, seed=0), plan(RUN, options)
    assert skeleton(found.module) == skeleton(stage.module)
    assert numbers(found) == {"encoder": counts(stage.module.encoder), "ctc": counts(stage.module.ctc)}


def test_an_encoder_not_made_yet_has_the_sizes_of_its_stage(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    made, used = plan_of(CONFIGS / "tiny/hearing.yaml"), plan_of(CONFIGS / "tiny/align.yaml")
    assert numbers(used)["encoder"] == (numbers(made)["encoder"][0], 0)  # alignment keeps it frozen
    assert used.sources["runs/tiny/hearing/final"].endswith("configs/tiny/hearing.yaml")


@pytest.mark.parametrize("file", STAGE_FILES, ids=lambda file: str(file.relative_to(CONFIGS)))
def test_every_configuration_plans_without_earlier_runs(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From a folder with nothing but what ships, with nothing allocated and no connection opened."""

    def refuse(*arguments: Any) -> None:
        raise AssertionError(f"a plan opened a connection to {arguments}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "flowomni").symlink_to(CONFIGS.parent / "flowomni")
    found = plan_of(file)
    tensors = [*found.module.parameters(), *found.module.buffers()]
    assert tensors and all(tensor.is_meta for tensor in tensors)
    assert 0 < found.num_trainable <= found.num_parameters
    assert found.memory["Adam states"] == 2 * found.memory["gradients"] == 8 * found.num_trainable
    assert found.memory["activations (estimate)"] > 0


def test_faithful_stages_have_the_published_sizes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    first, second = plan_of(CONFIGS / "flow_omni/stage1.yaml"), plan_of(CONFIGS / "flow_omni/stage2.yaml")
    assert numbers(first)["llm"] == (494_032_768, 0)  # Qwen2-0.5B, embeddings tied
    assert numbers(first)["encoder"] == (88_154_112, 0)  # Whisper small, encoder
    assert {name for name, (_, trained) in numbers(first).items() if trained} == {
        *("projector", "output blocks", "state embedding", "state head", "head")
    }
    assert first.num_parameters == second.num_parameters
    positions = 1500 * 768  # of the encoder: sines, which never train
    vocoder = numbers(second)["speech tokenizer: vocoder"][0]
    assert second.num_trainable == second.num_parameters - vocoder - positions
    # gradients pass through a frozen language model, so it keeps activations, but fewer
    kept = [next(p for p in found.parts if p.name == "llm").activation_bytes for found in (first, second)]
    assert 0 < kept[0] < kept[1]
    assert next(p for p in first.parts if p.name == "encoder").activation_bytes == 0


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("trains", [True, False])
def test_activations_are_near_what_autograd_keeps(trains: bool, attention: str) -> None:
    """Slope over the batch, so that what does not grow with it (half-precision weights, masks) drops out."""
    config = Qwen2Config(
        vocab_size=8,
        hidden_size=112,  # the proportions of Qwen2-0.5B
        intermediate_size=608,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        bos_token_id=None,
        eos_token_id=None,
    )
    model, length = Qwen2Model(config).train().requires_grad_(trains), 64
    model.set_attn_implementation(attention)

    def kept(batch_size: int) -> int:
        storages: dict[int, int] = {}

        def note(tensor: torch.Tensor) -> torch.Tensor:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        x_BLH = torch.randn(batch_size, length, 112, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor), torch.autocast("cpu"):
            hidden_BLH = model(inputs_embeds=x_BLH, use_cache=False).last_hidden_state
        assert hidden_BLH.requires_grad
        return sum(storages.values())

    measured = (kept(8) - kept(4)) / (4 * length)
    assert activations(model, 1, 2, length if attention == "eager" else 0) == pytest.approx(measured, rel=0.1)


def stage_file(folder: Path, name: str, output_dir: str, **options: Any) -> Path:
    folder.mkdir(exist_ok=True)
    file = folder / f"{name}.yaml"
    content = {"stage": "speech", "output_dir": output_dir, "max_steps": 1, "options": {"manifest": "m", **options}}
    file.write_text(yaml.safe_dump(content))
    return file


def test_a_finished_run_counts_more_than_its_configuration(tmp_path: Path, corpus: str) -> None:
    save_model(*tiny_model(), tmp_path / "run/final")
    stage_file(tmp_path / "configs", "a", str(tmp_path / "run"), model="runs/nowhere/final")
    found = plan(RUN, SpeechOptions(manifest=corpus, model=str(tmp_path / "run/final")), Sizes(tmp_path / "configs"))
    assert not found.sources


def test_a_run_that_starts_from_itself_ends_in_one_line(tmp_path: Path) -> None:
    file = stage_file(tmp_path / "configs", "a", str(tmp_path / "run"), model=str(tmp_path / "run/final"))
    parsed = parse(RunOptions, OPTIONS, ["--config", str(file)])
    with pytest.raises(ValueError, match="options.model: there is no folder '.*run/final'"):
        plan(parsed.run, parsed.options, Sizes(tmp_path / "configs"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--options.model", "runs/nowhere/final"], ["options.model", "runs/nowhere/final"]),
        (["--options.head.width", "0"], ["width is 0"]),
    ],
)
def test_a_plan_that_cannot_be_ends_in_one_line(
    arguments: list[str], words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_info:
        main(["--config", str(CONFIGS / "tiny/speech.yaml"), "--plan", *arguments])
    assert exit_info.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and all(word in line for word in words)


def test_printed_plan_has_every_part(capsys: pytest.CaptureFixture[str]) -> None:
    file = CONFIGS / "flow_omni/vocoder.yaml"
    main(["--config", str(file), "--plan"])
    printed = capsys.readouterr().out
    found = plan_of(file)
    assert f"{found.num_trainable:,}" in printed
    for name in [*numbers(found), *found.memory]:
        assert name in printed
