"""A run that is killed, runs out of disk or meets a NaN loses nothing that was saved, and goes on exactly.

Shapes: none but those of a toy's one vector of weights.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import random
import resource
import signal
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from flowomni.losses import Loss
from tests.tiny import LLM
from training.checkpoint import Checkpoints
from training.stages.base import Stage
from training.stages.text import TextOptions, TextStage
from training.train import RunOptions, train

TEXT = TextOptions(
    llm=LLM, instructions={"answer": "", "transcribe": "write", "speak": "say"}, batch_size=2, num_eval=4
)


def run_options(folder: Path, **changes: Any) -> RunOptions:
    values = {"stage": "text", "max_steps": 6, "warmup_steps": 2, "log_every": 1, "save_every": 1, "ema_decay": 0.9}
    return RunOptions(output_dir=str(folder), **values | changes)


def read_log(folder: Path) -> list[dict[str, float]]:
    """Without what clocks and the machine say."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.endswith(("sec", "_gib"))} for line in lines]


def steps(folder: Path) -> list[int]:
    return sorted(int(p.name.removeprefix("step_")) for p in (folder / "checkpoints").iterdir())


# ------------------------------------------------------------------------------------------------------------- a toy


class Numbers:
    def __init__(self, value: float):
        self.value = value

    def to(self, device: torch.device) -> Numbers:
        return self


class ToyModule(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight_D = nn.Parameter(torch.ones(64))

    def forward(self, batch: Numbers, generator: torch.Generator) -> dict[str, Loss]:
        noise_D = torch.randn(64, generator=generator)
        loss = (self.weight_D - batch.value + 0.1 * noise_D).square().sum()
        if batch.value == 99.0:  # the root's slope at zero is infinite, its value is not
            loss = loss + (0.0 * self.weight_D).sum().sqrt()
        return {"text": Loss(loss, torch.tensor(64.0))}


@dataclass
class ToyOptions:
    """Scores that the evaluations give, one after the other, and the place of a bad batch."""

    scores: tuple[float, ...] = ()
    bad: int = -1
    value: float = math.inf


class ToyStage(Stage):
    Options = ToyOptions

    def __init__(self, options: ToyOptions, seed: int):
        self.options, self.module, self.weights = options, ToyModule(), {"text": 1.0}
        self.full = False

    def batch(self, index: int, rank: int, world_size: int) -> Numbers:
        return Numbers(self.options.value if index == self.options.bad else 0.1 * index)

    def names(self, index: int, rank: int, world_size: int) -> list[str]:
        return [f"item-{index}"]

    def counts(self, batch: Numbers) -> dict[str, float]:
        return {"text": 64.0}

    def num_tokens(self, batch: Numbers) -> int:
        return 64

    def evaluate(self, folder: Path, step: int) -> dict[str, float]:
        return {"score": self.options.scores[step - 1]} if self.options.scores else {}

    def save(self, folder: Path) -> None:
        folder.mkdir()
        save_file(self.module.state_dict(), folder / "model.safetensors")


# ------------------------------------------------------------------------------------------------------------ killed


def train_text(folder: str) -> None:
    """What the killed processes run."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
        train(run_options(Path(folder), max_steps=24, save_every=1), TEXT, TextStage)


def kill_when(process: Any, folder: Path, rng: random.Random, while_saving: bool) -> bool:
    """SIGKILL at a random moment, or at a random moment of a save; whether it was still running."""
    deadline = time.monotonic() + 60
    seen = {p.name for p in folder.glob("checkpoints/*")}
    while process.is_alive() and time.monotonic() < deadline:
        new = {p.name for p in folder.glob("checkpoints/*")} - seen
        if any(name.endswith(".partial") for name in new) if while_saving else new:
            break
        time.sleep(0.0005)
    time.sleep(rng.random() * (0.02 if while_saving else 0.1))
    alive = process.is_alive()
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    return alive


def test_killed_at_any_moment_it_is_the_run_that_never_stopped(tmp_path: Path) -> None:
    """SIGKILL, also while a checkpoint is written: losses and weights are bit for bit those of one straight run."""
    context = multiprocessing.get_context("forkserver")  # forks processes that have imported torch already
    context.set_forkserver_preload([__name__])
    rng, straight, killed = random.Random(0), tmp_path / "straight", tmp_path / "killed"
    process = context.Process(target=train_text, args=(str(straight),))
    process.start()
    process.join()
    assert process.exitcode == 0
    halves, progress = 0, []
    for attempt in range(6):
        process = context.Process(target=train_text, args=(str(killed),))
        process.start()
        if not kill_when(process, killed, rng, while_saving=attempt % 3 != 2):
            break
        names = [p.name for p in killed.glob("checkpoints/*")]
        halves += any(name.endswith((".partial", ".removed")) for name in names)
        progress.append(max((int(name[5:13]) for name in names if name[5:].isdigit()), default=0))
    assert len(progress) >= 3 and halves >= 1, (progress, halves)  # it did go on in between, and saves were cut short
    process = context.Process(target=train_text, args=(str(killed),))
    process.start()
    process.join()
    assert process.exitcode == 0
    assert read_log(killed) == read_log(straight)
    wanted, found = (load_file(folder / "final" / "model.safetensors") for folder in (straight, killed))
    assert wanted.keys() == found.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert steps(killed) == [23, 24]  # nothing half-written stays


# ----------------------------------------------------------------------------------------------------------- damaged


def cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 100)


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("model.safetensors", cut, r"model.safetensors has \d+ bytes, not \d+"),
        ("optimizer.bin", flip, "optimizer.bin is not what was written"),
        ("custom_checkpoint_1.pkl", Path.unlink, "custom_checkpoint_1.pkl is missing"),
        ("run.json", cut, "run.json: "),
        ("run.json", Path.unlink, "run.json is missing"),
    ],
    ids=["truncated", "flipped", "lost", "no list", "unfinished"],
)
def test_a_damaged_checkpoint_is_left_out(tmp_path: Path, name: str, damage: Any, message: str) -> None:
    """It is named, the older one is used, and the run is the run that was never damaged."""
    options = ToyOptions()
    train(run_options(tmp_path), options, ToyStage)
    wanted = read_log(tmp_path)
    damage(tmp_path / "checkpoints" / "step_00000006" / name)
    (tmp_path / "final").rename(tmp_path / "first")
    with pytest.warns(UserWarning, match=f"step_00000006 is damaged \\({message}.*left out"):
        train(run_options(tmp_path), options, ToyStage)
    assert read_log(tmp_path) == wanted and steps(tmp_path) == [5, 6]
    first, second = (load_file(tmp_path / folder / "model.safetensors") for folder in ("first", "final"))
    assert torch.equal(first["weight_D"], second["weight_D"])
    for step in (5, 6):
        damage(tmp_path / "checkpoints" / f"step_0000000{step}" / name)
    with pytest.warns(UserWarning, match="left out"), pytest.raises(ValueError, match="every checkpoint .* is damaged"):
        train(run_options(tmp_path), options, ToyStage)


# -------------------------------------------------------------------------------------------------------- full disk


@contextmanager
def small_files(num_bytes: int) -> Iterator[None]:
    """No file can grow beyond that: writing fails as it does on a full disk, in the middle of the file."""
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))


def test_a_full_disk_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Checkpoints that cannot be written are given up with a warning; what was there stays, and later ones succeed."""
    train(run_options(tmp_path / "straight"), TEXT, TextStage)
    save = Checkpoints.save

    def save_on_a_full_disk(self: Checkpoints, step: int, metric: float | None = None) -> None:
        with small_files(10_000) if step in (3, 4) else small_files(resource.RLIM_INFINITY):
            save(self, step, metric)
            assert step not in (3, 4), "the limit had no effect"

    monkeypatch.setattr(Checkpoints, "save", save_on_a_full_disk)
    with pytest.warns(
        UserWarning, match="step_00000003 was not written .*earlier checkpoints are as they were. The run"
    ):
        train(run_options(tmp_path / "full", max_steps=6), TEXT, TextStage)
    assert read_log(tmp_path / "full") == read_log(tmp_path / "straight")
    assert steps(tmp_path / "full") == [5, 6]


# --------------------------------------------------------------------------------------------------------------- NaN


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (math.nan, r"the loss is not finite at step 1, micro-batch 1 \(text nan\) of item-3"),
        (99.0, "the gradient is not finite at step 1 of item-2, item-3"),
    ],
    ids=["loss", "gradient"],
)
def test_what_is_not_finite_stops_the_run(tmp_path: Path, value: float, message: str) -> None:
    """Before it reaches the weights or a checkpoint; it says which items."""
    bad = ToyOptions(bad=3, value=value)
    run = run_options(tmp_path / "bad", accumulation=2)
    with pytest.raises(FloatingPointError, match=f"{message}: the last checkpoint is kept"):
        train(run, bad, ToyStage)
    assert steps(tmp_path / "bad") == [1] and not (tmp_path / "bad" / "final").exists()
    state = load_file(tmp_path / "bad" / "checkpoints" / "step_00000001" / "model.safetensors")
    assert all(bool(value.isfinite().all()) for value in state.values())


# ---------------------------------------------------------------------------------------------------- which ones stay


@pytest.mark.parametrize(("best_is", "best"), [("lower", 2), ("higher", 1)])
def test_the_best_stays_besides_the_newest(tmp_path: Path, best_is: Any, best: int) -> None:
    """Also when no checkpoint was due at that step. NaN is no best, and a tie is no better."""
    options = ToyOptions(scores=(3.0, 1.0, 2.0, math.nan, 1.0, 2.5))
    run = run_options(
        tmp_path, save_every=3, eval_every=1, keep_checkpoints=1, best_metric="eval/score", best_is=best_is
    )
    train(run, options, ToyStage)
    assert steps(tmp_path) == [best, 6]


def test_a_best_metric_that_is_not_evaluated_is_named(tmp_path: Path) -> None:
    run = run_options(tmp_path, max_steps=1, best_metric="eval/scroe")
    with pytest.warns(UserWarning, match="best_metric is 'eval/scroe', which is not evaluated; there are eval/score"):
        train(run, ToyOptions(scores=(1.0,)), ToyStage)


# -------------------------------------------------------------------------------------------- another configuration


def test_an_option_that_came_later_had_its_default(tmp_path: Path) -> None:
    """Checkpoints of an older version name fewer options, and had sections in one piece; they go on."""
    run = run_options(tmp_path, accumulation=2)
    train(run, ToyOptions(), ToyStage)
    file = tmp_path / "checkpoints" / "step_00000006" / "run.json"
    kept = json.loads(file.read_text())
    values = {k: v for k, v in asdict(run).items() if k not in ("clip_norm", "best_metric")}
    file.write_text(
        json.dumps({"step": 6, "fingerprint": values | {"options.value": kept["fingerprint"]["options.value"]}})
    )
    train(run, ToyOptions(), ToyStage)
    with pytest.raises(ValueError, match=r"\(clip_norm: 1.0 then, 2.0 now; options.bad: -1 then, 7 now\)"):
        train(run_options(tmp_path, accumulation=2, clip_norm=2.0), ToyOptions(bad=7), ToyStage)


def test_micro_batches_of_all_processes_are_what_counts(tmp_path: Path) -> None:
    train(run_options(tmp_path, accumulation=2), ToyOptions(), ToyStage)
    with pytest.raises(ValueError, match="micro_batches_per_step: 2 then, 3 now"):
        train(run_options(tmp_path, accumulation=3), ToyOptions(), ToyStage)


def test_random_states_come_back(tmp_path: Path) -> None:
    """Those of torch, numpy and Python, of each process."""
    accelerator = Accelerator()
    accelerator.prepare(nn.Linear(2, 2))
    saver = Checkpoints(tmp_path, accelerator, {})
    saver.save(1)
    wanted: list[Tensor | float] = [torch.rand(3), random.random()]
    assert saver.resume() == 1
    found: list[Tensor | float] = [torch.rand(3), random.random()]
    assert torch.equal(torch.as_tensor(found[0]), torch.as_tensor(wanted[0])) and found[1] == wanted[1]
    assert (tmp_path / "step_00000001" / "random_states_0.pkl").is_file()
