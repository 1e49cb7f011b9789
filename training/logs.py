"""A run's log: one JSON object per line beside the run, and wandb when asked for."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml


class Logs:
    """Writes `config.yaml` and `log.jsonl` into the run's folder and mirrors the values to wandb.

    A resumed run drops the lines after the step it goes on from, so that the log has one line per step.

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
        self.path.write_text("".join(line + "\n" for line in kept))
        self.started = time.time()
        if run.wandb != "disabled":
            import wandb

            self.wandb = wandb.init(
                project="flowomni", name=folder.name, dir=str(folder), mode=run.wandb, config=config, resume="allow"
            )

    def write(self, step: int, values: dict[str, float], show: Callable[[str], None] | None = None) -> None:
        """Append one line; `show` also prints the values for people."""
        if not self.enabled:
            return
        line = {"step": step, "elapsed_sec": round(time.time() - self.started, 2), **values}
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        if self.wandb is not None:
            self.wandb.log(values, step=step)
        if show is not None:
            show(f"step {step}: " + "  ".join(f"{k} {v:.4g}" for k, v in values.items()))

    def close(self) -> None:
        if self.wandb is not None:
            self.wandb.finish()


def _lines_up_to(step: int, path: Path) -> list[str]:
    """The lines of steps up to `step`. A line that is cut off, as a killed run leaves it, is of a later step."""
    kept = []
    for line in path.read_text().splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except json.JSONDecodeError:
            break
    return kept
