"""Atomic checkpoints of a run: everything needed to go on as if it had never stopped."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from accelerate import Accelerator


class Checkpoints:
    """Checkpoints `step_00001000` under `folder`, written beside and renamed, so that each one is whole.

    A run's data order and noise are functions of the step, so the step is all that is kept of them.

    Args:
        accelerator: with model, optimizer and scheduler prepared and further objects registered.
        fingerprint: what must not change between runs that share a folder; compared on resume.
        keep: number of newest checkpoints that stay.
    """

    def __init__(self, folder: Path, accelerator: Accelerator, fingerprint: dict[str, Any], keep: int = 2):
        self.folder = folder
        self.accelerator = accelerator
        self.fingerprint = json.loads(json.dumps(fingerprint))
        self.keep = keep

    def save(self, step: int) -> None:
        """Write the checkpoint after `step` finished steps.

        Raises:
            OSError: the disk is full or not writable; earlier checkpoints stay as they are.
        """
        final = self.folder / f"step_{step:08d}"
        partial = self.folder / f"{final.name}.partial"
        main = self.accelerator.is_main_process
        if main:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        self.accelerator.wait_for_everyone()
        try:
            self.accelerator.save_state(str(partial))
            if main:
                (partial / "run.json").write_text(json.dumps({"step": step, "fingerprint": self.fingerprint}))
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        self.accelerator.wait_for_everyone()
        if main:
            shutil.rmtree(final, ignore_errors=True)
            partial.rename(final)
            for old in self.complete()[: -self.keep]:
                shutil.rmtree(old)

    def complete(self) -> list[Path]:
        """Whole checkpoints, oldest first."""
        if not self.folder.is_dir():
            return []
        return sorted(p for p in self.folder.glob("step_*[0-9]") if (p / "run.json").is_file())

    def resume(self) -> int:
        """Load the newest whole checkpoint and return its step; 0 when there is none.

        Raises:
            ValueError: it was made with another configuration; the differing keys are listed.
        """
        found = self.complete()
        if not found:
            return 0
        run = json.loads((found[-1] / "run.json").read_text())
        differing = [
            f"{key}: {run['fingerprint'].get(key)!r} then, {self.fingerprint.get(key)!r} now"
            for key in sorted({*run["fingerprint"], *self.fingerprint})
            if run["fingerprint"].get(key) != self.fingerprint.get(key)
        ]
        if differing:
            raise ValueError(
                f"{found[-1]} was made with another configuration ({'; '.join(differing)}): "
                "use its configuration, or another output_dir"
            )
        self.accelerator.load_state(str(found[-1]))
        return int(run["step"])
