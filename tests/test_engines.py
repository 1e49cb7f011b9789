"""Engines: what accelerate starts from `configs/accelerate` gives the losses and the weights of one process."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from safetensors.torch import load_file

from flowomni.build import load_model
from tests.tiny import ENCODER, INSTRUCTIONS, save_tiny_parts
from training.stages.speech import PartsOptions, SpeechOptions, SpeechStage
from training.train import RunOptions, train

ROOT = Path(__file__).resolve().parent.parent
ENGINES = ROOT / "configs" / "accelerate"
HAS_DEEPSPEED = importlib.util.find_spec("deepspeed") is not None


def run_options(folder: Path, **changes: Any) -> RunOptions:
    values = {"stage": "speech", "max_steps": 4, "warmup_steps": 2, "log_every": 1, "save_every": 1, "ema_decay": 0.9}
    return RunOptions(output_dir=str(folder), **values | changes)


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> SpeechOptions:
    """Six conversations, one a batch, which is either heard or spoken."""
    folder = tmp_path_factory.mktemp("corpus")
    rng = np.random.default_rng(0)
    lines = []
    for index, word in enumerate(("one", "two", "three", "four", "five", "hello")):
        soundfile.write(folder / f"q{index}.flac", 0.1 * rng.standard_normal(6_000 + 1_000 * index), 16_000)
        soundfile.write(folder / f"a{index}.flac", 0.1 * rng.standard_normal(5_000 + 2_000 * index), 24_000)
        user = {
            "role": "user",
            "text": f"what is {word}",
            "audio": f"q{index}.flac",
            "duration_sec": 0.375 + index / 16,
        }
        says = {"role": "assistant", "text": word, "audio": f"a{index}.flac", "duration_sec": (5 + 2 * index) / 24}
        lines.append(json.dumps({"id": str(index), "split": "train", "turns": [user, says]}))
    (folder / "manifest.jsonl").write_text("\n".join(lines) + "\n")
    parts = PartsOptions(
        **save_tiny_parts(folder),
        encoder=ENCODER,
        head={"kind": "flow", "width": 32, "num_blocks": 1, "feedback_noise": 0.3},
        output_blocks={"num_layers": 1, "num_heads": 2},
        layout={"instructions": INSTRUCTIONS, "max_answer_tokens": 12},
        loss={"ctc_weight": 0.5, "text_ctc_weight": 0.5},
    )
    tasks = {"speech_to_text": 0.5, "text_to_speech": 0.5}
    return SpeechOptions(manifest=str(folder), parts=parts, tasks=tasks, batch_size=1, num_eval=0)


@pytest.fixture(scope="module")
def seed(options: SpeechOptions) -> int:
    """One with which every step hears and speaks, and at least once only one of two processes hears.

    Where nobody speaks in a step, the speech head's weights have no gradient, and AdamW leaves them alone; ZeRO gives
    it a gradient of zero, and it goes on with its momentum.
    """
    stage = SpeechStage(options, 0)
    for seed in range(200):
        stage.seed, stage._plans = seed, {}
        hears = [stage.batch(place, 0, 1).features_BCF is not None for place in range(16)]
        every = all(0 < sum(hears[place : place + 4]) < 4 for place in range(0, 16, 4))
        if every and any(hears[place] != hears[place + 1] for place in range(0, 16, 2)):
            return seed
    raise AssertionError("no such seed")


@pytest.fixture(scope="module")
def one_process(options: SpeechOptions, seed: int, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run in one process that never stopped, four micro-batches a step."""
    folder = tmp_path_factory.mktemp("one") / "run"
    train(run_options(folder, seed=seed, accumulation=4), options, SpeechStage)
    return folder


def losses(folder: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [
        {k: v for k, v in line.items() if (k.startswith("loss/") and v) or k in ("step", "grad_norm")} for line in lines
    ]


def launch(engine: str, options: SpeechOptions, seed: int, folder: Path) -> RunOptions:
    """Two processes, cut off after two of the four steps and started again; what they were to do."""
    run = run_options(folder / "run", seed=seed, accumulation=2)
    config = dataclasses.asdict(run) | {"options": dataclasses.asdict(options)}
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    with socket.socket() as free:
        free.bind(("", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(ENGINES / f"{engine}.yaml")]
    command += ["--num_processes", "2", "--main_process_port", str(port), "-m", "tests.launched"]
    env = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    launched = subprocess.run(
        [*command, str(folder / "run.yaml"), "4"], cwd=ROOT, env=env, capture_output=True, text=True, check=False
    )
    assert launched.returncode == 0, launched.stderr[-4000:]
    return run


def check_same(folder: Path, one_process: Path) -> None:
    """Losses, gradient norms and averaged weights, which come out as a plain model."""
    wanted, found = losses(one_process), losses(folder)
    assert [line["step"] for line in wanted] == [line["step"] for line in found]
    for a, b in zip(wanted, found, strict=True):
        assert b == pytest.approx(a, rel=2e-3)
    plain, gathered = (load_file(place / "final" / "model.safetensors") for place in (one_process, folder))
    assert plain.keys() == gathered.keys()
    for name, value in plain.items():
        torch.testing.assert_close(gathered[name], value, rtol=0, atol=2e-4)
    load_model(folder / "final")


@pytest.mark.parametrize("engine", ["zero2", "zero3", "fsdp2"])
def test_cut_up_over_two_processes_it_is_one_process(
    engine: str, options: SpeechOptions, seed: int, one_process: Path, tmp_path: Path
) -> None:
    """Cut off and gone on in between, with weights, gradients and optimizer state in two places."""
    if engine != "fsdp2" and not HAS_DEEPSPEED:
        pytest.skip("deepspeed is not installed: pip install 'flowomni[deepspeed]'")
    run = launch(engine, options, seed, tmp_path)
    check_same(tmp_path / "run", one_process)
    with pytest.raises(ValueError, match=r"engine: '(DeepSpeed ZeRO-\d|FSDP) with 2 processes' then, 'plain' now"):
        train(dataclasses.replace(run, accumulation=4), options, SpeechStage)


def test_two_processes_go_on_as_one(options: SpeechOptions, seed: int, one_process: Path, tmp_path: Path) -> None:
    """Of a plain engine, checkpoints go on with fewer processes, as long as a step has as many micro-batches."""
    run = launch("two_cpu", options, seed, tmp_path)
    check_same(tmp_path / "run", one_process)
    newest = tmp_path / "run" / "checkpoints" / "step_00000004"
    (newest / "run.json").unlink()
    with pytest.warns(UserWarning, match="step_00000004 is damaged"):
        train(dataclasses.replace(run, accumulation=4), options, SpeechStage)
    check_same(tmp_path / "run", one_process)


@pytest.mark.parametrize("file", sorted(ENGINES.glob("*.yaml")), ids=lambda file: file.stem)
def test_every_file_is_what_accelerate_takes(file: Path) -> None:
    """No key that it does not know, and no processes left to be asked for."""
    config = load_config_from_file(str(file))
    assert config.num_processes >= 1
    arguments = launch_command_parser().parse_args(["--config_file", str(file), "-m", "training.train"])
    arguments, _, _ = _validate_launch_command(arguments)
    assert arguments.use_deepspeed == file.stem.startswith("zero")
    if arguments.use_deepspeed:
        assert str(arguments.zero_stage) == file.stem.removeprefix("zero")[0]
    assert arguments.use_fsdp == (file.stem == "fsdp2")


def test_other_stages_say_that_they_need_a_plain_engine() -> None:
    from training.stages import STAGES

    with pytest.raises(ValueError, match="VocoderStage does not train with FSDP with 2 processes: use one_cpu"):
        STAGES["vocoder"].prepare_for_engine(object.__new__(STAGES["vocoder"]), "FSDP with 2 processes")
