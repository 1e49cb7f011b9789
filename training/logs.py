"""A run's log: one JSON object per line beside the run, and wandb when asked for."""

from __future__ import annotations

import hashlib
import json
import resource
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate.utils import gather_object

from .batching import padding_share
from .stages.base import Stage
from .summary import read_answers


class Logs:
    """Writes `config.yaml` and `log.jsonl` into the run's folder and mirrors values and samples to wandb.

    A resumed run drops the lines after the step it goes on from, so that the log has one line per step. Each line has
    the time since the start (elapsed_sec) and the peak of memory so far (memory_gib). A wandb that fails is given up
    with a warning: the run and its own log go on.

    Args:
        folder: the run's folder, made if missing.
        run, options: dataclasses, saved as the run's configuration.
        first_step: step the run goes on from.
        enabled: False on all processes but the main one.
    """

    def __init__(self, folder: Path, run: Any, options: Any, first_step: int, enabled: bool):
        self.enabled = enabled
        self.wandb: Any = None
        if not enabled:
            return
        folder.mkdir(parents=True, exist_ok=True)
        config = asdict(run) | {"options": asdict(options)}
        (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
        self.path = folder / "log.jsonl"
        kept = _lines_up_to(first_step, self.path) if first_step and self.path.is_file() else []
        _replace(self.path, "".join(line + "\n" for line in kept))
        self.started = time.time()
        if run.wandb != "disabled":
            self._mirror(lambda: self._start_wandb(folder, run.wandb, config))

    def write(self, step: int, values: dict[str, float], show: Callable[[str], None] | None = None) -> None:
        """Append one line; `show` also prints the values for people."""
        if not self.enabled:
            return
        values = values | {"memory_gib": round(peak_memory_bytes() / 2**30, 3)}
        line = {"step": step, "elapsed_sec": round(time.time() - self.started, 2), **values}
        try:
            with self.path.open("a") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            warnings.warn(f"{self.path}: step {step} is not in it ({error}): the run goes on", stacklevel=2)
        if self.wandb is not None:
            self._mirror(lambda: self.wandb.log(values, step=step))
        if show is not None:
            show(f"step {step}: " + "  ".join(f"{k} {v:.4g}" for k, v in values.items()))

    def write_samples(self, step: int, folder: Path) -> None:
        """Mirror what an evaluation wrote into `folder` (sound, pictures, recognised text) to wandb."""
        if self.wandb is not None:
            self._mirror(lambda: self.wandb.log(_samples(folder), step=step))

    def close(self) -> None:
        if self.wandb is not None:
            self._mirror(self.wandb.finish)

    def _start_wandb(self, folder: Path, mode: str, config: dict[str, Any]) -> None:
        import wandb

        self.wandb = wandb.init(
            project="flowomni",
            name=folder.name,
            id=hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16],  # the same when the run goes on
            dir=str(folder),
            mode=mode,  # type: ignore[arg-type]
            config=config,
            resume="allow",
        )

    def _mirror(self, call: Callable[[], Any]) -> None:
        try:
            call()
        except Exception as error:  # whatever it is: a broken mirror must not break a run
            self.wandb = None
            reason = " ".join(str(error).split())[:200]
            warnings.warn(f"wandb is lost ({reason}): the run goes on, log.jsonl has every value", stacklevel=3)


def peak_memory_bytes() -> int:
    """Most memory held so far: of the GPU where there is one, else of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak  # bytes there, KiB elsewhere


def _samples(folder: Path) -> dict[str, Any]:
    import wandb

    captions = {
        a.get("wav"): f"{a['prompt']} | {a['text']} | heard: {a.get('recognised')}" for a in read_answers(folder)
    }
    found: dict[str, Any] = {}
    for file in sorted(folder.iterdir()):
        caption = captions.get(f"{file.stem}.wav", file.stem)
        if file.suffix == ".wav":
            found[f"samples/{file.stem}"] = wandb.Audio(str(file), caption=caption)
        elif file.suffix == ".png":
            found[f"spectrograms/{file.stem}"] = wandb.Image(str(file), caption=caption)
    return found


def _lines_up_to(step: int, path: Path) -> list[str]:
    """The lines of steps up to `step`, without one that is cut off, as a killed run or a full disk leaves it."""
    kept = []
    for line in path.read_text().splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except json.JSONDecodeError:
            continue
    return kept


def _replace(path: Path, text: str) -> None:
    """Write a file so that a kill leaves the old or the new content."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(text)
    partial.replace(path)


class Throughput:
    """Tokens per second and shares of padding, of all processes, since the last `read`."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Forget what was counted: after what is no training, such as an evaluation."""
        self.num_tokens = 0
        self.filled: dict[str, tuple[int, int]] = {}
        self.since = time.perf_counter()

    def add(self, stage: Stage, batches: Sequence[Any]) -> None:
        """Count a step's micro-batches of this process."""
        for batch in batches:
            self.num_tokens += stage.num_tokens(batch)
            for name, (real, slots) in stage.filled(batch).items():
                before = self.filled.get(name, (0, 0))
                self.filled[name] = (before[0] + real, before[1] + slots)

    def read(self) -> dict[str, float]:
        """The values for the log. Every process has to call it."""
        elapsed = time.perf_counter() - self.since
        counted = gather_object([(self.num_tokens, self.filled)])
        names = sorted({name for _, filled in counted for name in filled})
        num_tokens = sum(num for num, _ in counted)
        values = {"tokens_per_sec": num_tokens / elapsed, "train/num_tokens": float(num_tokens), "train/sec": elapsed}
        for name in names:
            pairs = [filled.get(name, (0, 0)) for _, filled in counted]
            values[name] = padding_share(sum(real for real, _ in pairs), sum(slots for _, slots in pairs))
        self.restart()
        return values
