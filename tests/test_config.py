"""Configuration is strict: every file under configs/ parses, and a wrong key ends with the nearest right one."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from flowomni.tokenizers import AutoencoderConfig, MelConfig, MelTokenizer, MelTokenizerConfig, VocoderConfig
from training.config import parse, read_yaml
from training.stages import STAGES
from training.train import RunOptions, learning_rate_factor, main

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
STAGE_FILES = [f for f in sorted(CONFIGS.rglob("*.yaml")) if re.search("^stage:", f.read_text(), re.MULTILINE)]
OPTIONS = {name: stage.Options for name, stage in STAGES.items()}


def parsed(file: Path, *arguments: str) -> Any:
    return parse(RunOptions, OPTIONS, ["--config", str(file), *arguments])


@pytest.mark.parametrize("file", STAGE_FILES, ids=lambda file: str(file.relative_to(CONFIGS)))
def test_every_configuration_parses(file: Path) -> None:
    content = read_yaml(file)
    found = parsed(file)
    assert isinstance(found.options, OPTIONS[content["stage"]])
    assert found.run.max_steps == content["max_steps"] and not found.plan


def test_both_folders_of_configurations_are_searched() -> None:
    assert {file.parent.name for file in STAGE_FILES} >= {"tiny", "flow_omni"}


def test_a_delta_is_its_base_with_what_it_changes(tmp_path: Path) -> None:
    (tmp_path / "delta.yaml").write_text(
        f"base: {CONFIGS / 'tokenizers' / 'rvq8.yaml'}\nmax_steps: 7\noptions: {{autoencoder: {{codebook_size: 16}}}}"
    )
    base, middle = parsed(CONFIGS / "tiny" / "tokenizer.yaml"), parsed(CONFIGS / "tokenizers" / "rvq8.yaml")
    delta = parsed(tmp_path / "delta.yaml", "--seed", "3")
    assert delta.run == replace(base.run, output_dir=middle.run.output_dir, max_steps=7, seed=3)
    assert delta.options.autoencoder == replace(middle.options.autoencoder, codebook_size=16)
    changed = {"vocoder": middle.options.vocoder, "penalty_weight": 1.0, "autoencoder": delta.options.autoencoder}
    assert delta.options == replace(base.options, **changed)
    (tmp_path / "delta.yaml").write_text("base: other.yaml")
    with pytest.raises(ValueError, match=r"--config .*other.yaml: No such file"):
        parsed(tmp_path / "delta.yaml")
    (tmp_path / "other.yaml").write_text("base: delta.yaml")
    with pytest.raises(ValueError, match=r"delta.yaml: is its own base"):
        parsed(tmp_path / "delta.yaml")
    (tmp_path / "other.yaml").write_text(f"base: {CONFIGS / 'tiny' / 'tokenizer.yaml'}\noptions: {{corpsu: x}}")
    with pytest.raises(ValueError, match=r"other.yaml: unknown key 'options.corpsu'; did you mean 'options.corpus'"):
        parsed(tmp_path / "other.yaml")


def change(section: str, **values: Any) -> Callable[[dict[str, Any]], None]:
    def apply(content: dict[str, Any]) -> None:
        for key in filter(None, section.split(".")):
            content = content.setdefault(key, {})
        content.update(values)

    return apply


WRONG = {
    "loop": (change("", max_step=3), "unknown key 'max_step'; did you mean 'max_steps'?"),
    "options": (change("options", batch_sise=3), "'options.batch_sise'; did you mean 'options.batch_size'?"),
    "misplaced": (change("", batch_size=3), "'batch_size'; did you mean 'options.batch_size'?"),
    "nested": (change("options.parts", encoder_stak=3), "did you mean 'options.parts.encoder_stack'?"),
    "trains": (change("options.trains", lllm="full"), "did you mean 'options.trains.llm'?"),
    "head": (change("options.parts.head", widht=3), "options.parts.head.widht: unknown key; did you mean 'width'?"),
    "blocks": (change("options.parts.output_blocks", layers=3), "did you mean 'num_layers'?"),
    "layout": (change("options.parts.layout", speech_delay=3), "did you mean 'speech_delay_tokens'?"),
    "encoder": (
        change("options.parts", encoder={"d_modle": 3}),
        "options.parts.encoder.d_modle: unknown key of WhisperConfig; did you mean 'd_model'?",
    ),
    "number": (change("", max_steps="many"), "max_steps: Expected a int. Got value: many"),
    "inner number": (change("options.parts", encoder_stack="x"), "options.parts.encoder_stack: Expected a int."),
    "choice": (
        change("options.trains", llm="frzen"),
        "options.trains.llm: Expected a Literal['frozen', 'full', 'lora']",
    ),
    "range": (change("options.parts.head", width=0), "options.parts.head: width is 0"),
    "task": (change("options.tasks", speek=1.0), "options.tasks has ['speek']"),
    "stage": (change("", stage="speach"), "stage is 'speach'; known stages: vocoder"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_file_ends_in_one_line_and_status_2(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    apply, wanted = WRONG[name]
    content = yaml.safe_load((CONFIGS / "tiny/align.yaml").read_text())
    apply(content)
    (tmp_path / "x.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(SystemExit) as exit_info:
        main(["--config", str(tmp_path / "x.yaml")])
    assert exit_info.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and wanted in line and len(line) < 400


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (["--max_step", "3"], "unknown key 'max_step'; did you mean 'max_steps'?"),
        (["--options.batch_sise=3"], "did you mean 'options.batch_size'?"),
        (["--options.parts.head.widht", "3"], "options.parts.head.widht: unknown key; did you mean 'width'?"),
        (["--max_steps", "many"], "max_steps: Expected a int. Got value: many"),
        (["stray"], "stray"),
        (["--config", "nowhere.yaml"], "nowhere.yaml: No such file"),
    ],
)
def test_a_wrong_argument_ends_in_one_line(arguments: list[str], wanted: str) -> None:
    with pytest.raises(ValueError, match=re.escape(wanted)) as error:
        parsed(CONFIGS / "tiny/align.yaml", *arguments)
    assert "\n" not in str(error.value)


def test_changes_to_a_loaded_head_are_checked_too() -> None:
    with pytest.raises(ValueError, match=r"options\.head\.objectiv: unknown key; did you mean 'objective'"):
        parsed(CONFIGS / "tiny/speech.yaml", "--options.head", '{"objectiv": "lsd"}')


def test_a_language_model_of_ones_own_is_checked() -> None:
    with pytest.raises(
        ValueError, match="options.llm.hiden_size: unknown key of Qwen2Config; did you mean 'hidden_size'"
    ):
        parsed(CONFIGS / "tiny/text.yaml", "--options.llm.hiden_size", "3")


def test_an_encoder_of_ones_own_is_checked() -> None:
    with pytest.raises(
        ValueError, match="options.encoder.d_modle: unknown key of WhisperConfig; did you mean 'd_model'"
    ):
        parsed(CONFIGS / "tiny/hearing.yaml", "--options.encoder.d_modle", "3")


def test_arguments_override_the_file() -> None:
    found = parsed(CONFIGS / "tiny/align.yaml", "--max_steps", "7", "--options.parts.head.width=96", "--plan")
    assert (found.run.max_steps, found.options.parts.head["width"], found.plan) == (7, 96, True)
    assert found.options.parts.head["kind"] == "flow"  # the rest of the section stays


@pytest.mark.parametrize("content", ["", "- 1", "max_steps: 3", "a: [", "stage: [text]"])
def test_a_file_of_something_else_ends_in_one_line(content: str, tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text(content)
    with pytest.raises(ValueError, match="stage|YAML") as error:
        parsed(tmp_path / "x.yaml")
    assert "\n" not in str(error.value)


# --------------------------------------------------------------------------------------------- the paper's system


@pytest.mark.parametrize("name", ["stage1", "stage2"])
def test_faithful_stages_train_as_published(name: str) -> None:
    run, options = parsed(CONFIGS / f"flow_omni/{name}.yaml").run, parsed(CONFIGS / f"flow_omni/{name}.yaml").options
    assert learning_rate_factor(run.warmup_steps, run) * run.learning_rate == pytest.approx(1e-4)
    assert learning_rate_factor(run.max_steps, run) * run.learning_rate == pytest.approx(5e-6)
    assert run.weight_decay == 0  # AdamW without it is Adam
    assert run.accumulation * options.batch_size >= 64
    answers = {"speech_to_speech", "speech_to_text", "text_to_speech", "text_to_text"}
    assert set(options.tasks) == ({"transcribe", "speak"} if name == "stage1" else answers)


def test_faithful_tokenizer_steps_40_times_a_second() -> None:
    """Hop 300 and two frames per token at 24 kHz, no learned bottleneck: the token is the mel patch itself."""
    options = parsed(CONFIGS / "flow_omni/vocoder.yaml").options
    assert (options.mel.sample_rate_hz, options.mel.hop_length, options.frames_per_token) == (24000, 300, 2)
    plain = AutoencoderConfig.plain_patch(options.frames_per_token, options.mel.num_mels)
    small = VocoderConfig(dim=16, intermediate_dim=16, num_layers=2, lookahead_frames=options.vocoder.lookahead_frames)
    torch.manual_seed(0)
    tokenizer = MelTokenizer(MelTokenizerConfig(options.mel, plain, small)).eval()
    spec = tokenizer.spec
    assert (spec.tokens_per_sec, spec.samples_per_token) == (40.0, 600)
    assert spec.dim == 2 * options.mel.num_mels

    wav_BS = 0.1 * torch.randn(2, 24000 + 1)
    with torch.no_grad():
        latent_BLD, mask_BL = tokenizer.encode(wav_BS, torch.tensor([24001, 12000]))
        assert latent_BLD.shape == (2, 41, spec.dim)
        assert mask_BL.sum(1).tolist() == [41, 20]
        mel_BFC = tokenizer.front(wav_BS[:1], 82)
        torch.testing.assert_close(latent_BLD[:1].reshape(1, 82, -1), mel_BFC)
        whole_BS = tokenizer.decode(latent_BLD)
        assert whole_BS.shape == (2, 41 * 600) and bool(whole_BS.isfinite().all())
        state, chunks = tokenizer.init_state(2), []
        for index, token_BLD in enumerate(latent_BLD.split(1, dim=1), 1):
            chunk_BS, state = tokenizer.step(token_BLD, state)
            chunks.append(chunk_BS)
            assert sum(c.shape[1] for c in chunks) == max(0, index * 600 - spec.lookahead_samples)
        torch.testing.assert_close(torch.cat([*chunks, tokenizer.flush(state)], dim=1), whole_BS)


def test_hop_300_needs_a_window_that_overlaps() -> None:
    with pytest.raises(ValueError, match="hop_length is 300 but n_fft is 512"):
        MelConfig(n_fft=512, hop_length=300)
