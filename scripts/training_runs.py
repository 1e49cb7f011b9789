"""Short training runs to be compared (one process, two processes), and how full the batches of a corpus are."""

from __future__ import annotations

import dataclasses
import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
import yaml
from transformers import Qwen2Config, Qwen2ForCausalLM

from flowomni.tokenizers import MelTokenizer
from scripts.training_steps import SHAPES, tokenizer_config
from training.batching import padding_share
from training.config import parse
from training.outline import CONFIGS
from training.stages import STAGES
from training.stages.speech import PartsOptions, SpeechOptions, SpeechStage
from training.text_tokenizer import build_text_tokenizer
from training.train import RunOptions

WORDS = ("what", "is", "one", "two", "three", "four", "five", "six")
NUM_STEPS = 4
MICRO_BATCHES = 4  # of a step, over all processes


# ------------------------------------------------------------------------------------------------------ two processes


def save_corpus(folder: Path) -> None:
    """Six conversations of noise, of different lengths."""
    rng = np.random.default_rng(0)
    lines = []
    for index, word in enumerate(WORDS[2:]):
        asked, said = 6_000 + 1_000 * index, 6_000 + 3_000 * index
        soundfile.write(folder / f"q{index}.flac", 0.1 * rng.standard_normal(asked), 16_000)
        soundfile.write(folder / f"a{index}.flac", 0.1 * rng.standard_normal(said), 24_000)
        user = {"text": f"what is {word}", "audio": f"q{index}.flac", "duration_sec": asked / 16_000}
        says = {"text": word, "audio": f"a{index}.flac", "duration_sec": said / 24_000}
        turns = [{"role": "user"} | user, {"role": "assistant"} | says]
        lines.append(json.dumps({"id": str(index), "split": "train", "turns": turns}))
    (folder / "manifest.jsonl").write_text("\n".join(lines) + "\n")


def toy_options(folder: Path) -> SpeechOptions:
    """Stage `speech` on `save_corpus`, with a toy model whose parts are saved in the folder."""
    save_corpus(folder)
    torch.manual_seed(0)
    text_tokenizer = build_text_tokenizer(WORDS)
    shape = SHAPES["toy"]
    ids = {"eos_token_id": text_tokenizer.eos_token_id, "pad_token_id": text_tokenizer.pad_token_id}
    sizes = {k: v for k, v in shape.llm.items() if k != "model_type"}
    llm = Qwen2ForCausalLM(Qwen2Config(**(sizes | ids | {"vocab_size": len(text_tokenizer)})))
    llm.save_pretrained(folder / "llm")
    text_tokenizer.save_pretrained(folder / "llm")
    MelTokenizer(tokenizer_config()).save_pretrained(folder / "tokenizer")
    parts = PartsOptions(
        llm=str(folder / "llm"),
        speech_tokenizer=str(folder / "tokenizer"),
        encoder=shape.encoder,
        head=shape.head,
        output_blocks=shape.output_blocks,
    )
    tasks = {"speech_to_speech": 0.5, "speech_to_text": 0.25, "text_to_speech": 0.25}
    return SpeechOptions(manifest=str(folder), parts=parts, tasks=tasks, batch_size=1, num_eval=0)


def launch(options: SpeechOptions, engine: str, num_processes: int, folder: Path) -> None:
    """`accelerate launch -m training.train` with a file of `configs/accelerate`, one thread a process.

    Raises:
        ValueError: it failed; its last lines.
    """
    run = RunOptions(
        stage="speech",
        output_dir=str(folder),
        max_steps=NUM_STEPS,
        warmup_steps=2,
        log_every=1,
        accumulation=MICRO_BATCHES // num_processes,
    )
    file = folder.with_suffix(".yaml")
    file.write_text(yaml.safe_dump(dataclasses.asdict(run) | {"options": dataclasses.asdict(options)}))
    with socket.socket() as free:
        free.bind(("", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "accelerate.commands.launch"]
    command += ["--config_file", str(CONFIGS / "accelerate" / f"{engine}.yaml"), "--main_process_port", str(port)]
    env = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    command += ["-m", "training.train", "--config", str(file)]
    done = subprocess.run(command, cwd=CONFIGS.parent, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        raise ValueError(f"a run with {engine} failed: {' / '.join(lines[-3:])}")


def logged_losses(folder: Path) -> list[dict[str, float]]:
    """The losses of each step."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    return [{k: v for k, v in line.items() if k.startswith("loss/")} for line in lines]


def largest_difference(a: Sequence[dict[str, float]], b: Sequence[dict[str, float]]) -> float:
    """Of two runs' losses, as a share of the first one's.

    Raises:
        ValueError: they have other steps, or losses of other names.
    """
    if [line.keys() for line in a] != [line.keys() for line in b]:
        raise ValueError("the runs have not logged the same losses at the same steps")
    return max(abs(x[name] - y[name]) / max(abs(x[name]), 1e-6) for x, y in zip(a, b, strict=True) for name in x)


def two_processes(folder: Path) -> dict[str, Any]:
    """One process with four micro-batches a step, and two with two each."""
    options = toy_options(folder)
    found = {}
    for engine, num_processes in (("one_cpu", 1), ("two_cpu", 2)):
        launch(options, engine, num_processes, folder / engine)
        found[engine] = logged_losses(folder / engine)
    difference = largest_difference(found["one_cpu"], found["two_cpu"])
    return {"num_steps": NUM_STEPS, "largest_difference": difference, "losses": found}


# ------------------------------------------------------------------------------------------------------------ padding


def corpus_stage(manifest: str, model: str) -> SpeechStage:
    """Stage `speech` of configs/tiny on a corpus, for a saved model."""
    arguments = ["--config", str(CONFIGS / "tiny/speech.yaml"), "--options.manifest", manifest]
    arguments += ["--options.model", model, "--options.num_eval", "0"]
    parsed = parse(RunOptions, {name: stage.Options for name, stage in STAGES.items()}, arguments)
    return SpeechStage(parsed.options, seed=parsed.run.seed)


def padding_of(stage: SpeechStage, num_batches: int) -> dict[str, float]:
    """Share of padding in the first batches: of the positions, and of the mel frames of what is heard."""
    real: dict[str, int] = {}
    slots: dict[str, int] = {}
    for index in range(num_batches):
        for name, (num_real, num_slots) in stage.filled(stage.batch(index, 0, 1)).items():
            real[name] = real.get(name, 0) + num_real
            slots[name] = slots.get(name, 0) + num_slots
    return {name: padding_share(real[name], slots[name]) for name in real}
