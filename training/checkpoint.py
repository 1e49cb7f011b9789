"""Checkpoints that survive a kill at any moment: everything needed to go on as if the run had never stopped."""

from __future__ import annotations

import json
import os
import shutil
import warnings
import zlib
from collections.abc import Mapping
from dataclasses import MISSING, asdict, fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from safetensors import SafetensorError

RUN = "run.json"  # written last: step, fingerprint, metric, and size and CRC-32 of every other file


class Checkpoints:
    """Checkpoints `step_00001000` under `folder`.

    One is written beside its place, flushed to the disk, and renamed; what is found there at the next start is whole or
    it is left out. A run's data order and noise are functions of the step, so the step is all that is kept of them. The
    random state of every process is kept too.

    Args:
        accelerator: with model, optimizer and scheduler prepared and further objects registered.
        fingerprint: what must not change between runs that share a folder; compared on resume.
        keep: number of newest checkpoints that stay.
        best_metric: name of an evaluated value; the checkpoint with the best one stays too. Empty: none.
        best_is: whether the "lower" or the "higher" value is the better one.
        defaults: what an option that a checkpoint does not know yet was in effect.
    """

    def __init__(
        self,
        folder: Path,
        accelerator: Accelerator,
        fingerprint: dict[str, Any],
        keep: int = 2,
        best_metric: str = "",
        best_is: str = "lower",
        defaults: dict[str, Any] | None = None,
    ):
        self.folder = folder
        self.accelerator = accelerator
        self.fingerprint = json.loads(json.dumps(fingerprint))
        self.defaults = json.loads(json.dumps(defaults or {}))
        self.keep = keep
        self.best_metric = best_metric
        self.sign = -1.0 if best_is == "higher" else 1.0
        self.of_each_process: list[Any] = []

    def register(self, state: Any, of_each_process: bool = False) -> None:
        """Keep an object's `state_dict` too: one for all processes, or one of each (its piece of something)."""
        if of_each_process:
            self.of_each_process.append(state)
        else:
            self.accelerator.register_for_checkpointing(state)

    # ------------------------------------------------------------------------------------------------------- saving

    def save(self, step: int, metric: float | None = None) -> None:
        """Write the checkpoint after `step` finished steps; to be called by all processes.

        Args:
            metric: value of `best_metric` with the weights of this step, if it was evaluated.

        Raises:
            OSError: the disk is full or not writable; earlier checkpoints stay as they are.
        """
        final = self.folder / f"step_{step:08d}"
        partial = self.folder / f"{final.name}.partial"
        self._together(lambda: self._make(partial), final)
        self._together(lambda: self._write(partial), final)
        self._together(lambda: self._finish(partial, final, step, metric), final)

    def _together(self, action: Any, final: Path) -> None:
        """Do it on every process; if one fails, all raise, and nothing is left of the checkpoint."""
        failure = ""
        try:
            action()
        # torch and safetensors have errors of their own for a full disk
        except (OSError, RuntimeError, SafetensorError) as error:
            failure = " ".join(str(error).split())[:300] or type(error).__name__
        except BaseException:
            shutil.rmtree(final.with_name(f"{final.name}.partial"), ignore_errors=True)
            raise
        failures = [found for found in gather_object([failure]) if found]
        if failures:
            if self.accelerator.is_main_process:
                shutil.rmtree(final.with_name(f"{final.name}.partial"), ignore_errors=True)
            raise OSError(f"{final} was not written ({failures[0]}): earlier checkpoints are as they were")

    def _make(self, partial: Path) -> None:
        if self.accelerator.is_main_process:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)

    def _write(self, partial: Path) -> None:
        self.accelerator.save_state(str(partial))
        if self.of_each_process:
            torch.save([state.state_dict() for state in self.of_each_process], self._pieces(partial))

    def _pieces(self, path: Path) -> Path:
        return path / f"process_{self.accelerator.process_index}.pt"

    def _finish(self, partial: Path, final: Path, step: int, metric: float | None) -> None:
        if not self.accelerator.is_main_process:
            return
        files = {str(p.relative_to(partial)): _flushed(p) for p in sorted(partial.rglob("*")) if p.is_file()}
        values = {"step": step, "fingerprint": self.fingerprint, "files": files}
        if metric is not None:
            values["metric"] = {"name": self.best_metric, "value": metric}
        (partial / RUN).write_text(json.dumps(values))
        _flushed(partial / RUN)
        for place in sorted({partial, *(p for p in partial.rglob("*") if p.is_dir())}):
            _flush_folder(place)
        if final.exists():  # only a damaged one that was left out
            _remove(final)
        partial.rename(final)
        _flush_folder(self.folder)
        self._rotate()

    def _rotate(self) -> None:
        found = self.complete()
        best = self._best(found)
        for old in found[: -self.keep]:
            if old != best:
                _remove(old)

    # ------------------------------------------------------------------------------------------------------ metrics

    def is_best(self, value: float | None) -> bool:
        """Whether `value` is better than that of every kept checkpoint; of two equal ones the earlier stays.

        Every process has to call it, with the same value; None is no better than any.
        """
        if value is None:
            return False
        best = self._best(self.complete()) if self.accelerator.is_main_process else None
        before = None if best is None else _metric(best, self.best_metric)
        return broadcast_object_list([before is None or self.sign * value < self.sign * before])[0]

    def _best(self, found: list[Path]) -> Path | None:
        measured = [(self.sign * value, p) for p in found if (value := _metric(p, self.best_metric)) is not None]
        return min(measured)[1] if measured else None

    # ------------------------------------------------------------------------------------------------------ loading

    def complete(self) -> list[Path]:
        """Checkpoints that were written to the end, oldest first."""
        if not self.folder.is_dir():
            return []
        return sorted(p for p in self.folder.glob("step_*[0-9]") if (p / RUN).is_file())

    def resume(self) -> int:
        """Load the newest undamaged checkpoint and return its step; 0 when there is none. Damaged ones are named.

        Raises:
            ValueError: it was made with another configuration, and the differing keys are listed; or all are damaged.
        """
        chosen: list[Any] = [None]
        if self.accelerator.is_main_process:
            chosen = [self._newest_undamaged()]
        path, failure = broadcast_object_list(chosen)[0] or (None, "")
        if failure:
            raise ValueError(failure)
        if path is None:
            return 0
        run = json.loads((path / RUN).read_text())
        differing = self._differing(run["fingerprint"])
        if differing:
            raise ValueError(
                f"{path} was made with another configuration ({'; '.join(differing)}): "
                "use its configuration, or another output_dir"
            )
        self.accelerator.load_state(str(path))
        if self.of_each_process:
            for state, kept in zip(self.of_each_process, torch.load(self._pieces(path)), strict=True):
                state.load_state_dict(kept)
        return int(run["step"])

    def _newest_undamaged(self) -> tuple[Path | None, str]:
        """The newest checkpoint that is as it was written, or what to say where there are damaged ones alone."""
        for left in [*self.folder.glob("step_*.partial"), *self.folder.glob("step_*.removed")]:
            shutil.rmtree(left, ignore_errors=True)  # of a run that was killed there
        found = sorted(self.folder.glob("step_*[0-9]"), reverse=True)
        for path in found:
            damage = _damage(path)
            if not damage:
                return path, ""
            warnings.warn(f"checkpoint {path} is damaged ({damage}): it is left out", stacklevel=3)
        if found:
            return None, f"every checkpoint in {self.folder} is damaged: remove that folder to begin again"
        return None, ""

    def _differing(self, then: dict[str, Any]) -> list[str]:
        """Options are compared by name; one that the checkpoint does not know had its default's effect."""
        found = []
        for key, now in sorted(self.fingerprint.items()):
            before = _look_up(then, key, self.defaults.get(key))
            if before != now:
                found.append(f"{key}: {before!r} then, {now!r} now")
        return found


def settings_of(options: Any, prefix: str = "") -> dict[str, Any]:
    """The values of a dataclass and those inside it, by dotted name."""
    found: dict[str, Any] = {}
    for field in fields(options):
        value, name = getattr(options, field.name), f"{prefix}{field.name}"
        found |= settings_of(value, f"{name}.") if is_dataclass(value) else {name: value}
    return found


def defaults_of(options: Any, prefix: str = "") -> dict[str, Any]:
    """The defaults of the same names, of those that have one."""
    found: dict[str, Any] = {}
    for field in fields(options):
        value, name = getattr(options, field.name), f"{prefix}{field.name}"
        if is_dataclass(value):
            found |= defaults_of(value, f"{name}.")
        elif field.default is not MISSING:
            found[name] = asdict(field.default) if is_dataclass(field.default) else field.default  # type: ignore[arg-type]
        elif field.default_factory is not MISSING:
            found[name] = field.default_factory()
    return found


def _look_up(values: Mapping[str, Any], key: str, default: Any) -> Any:
    """`values["a.b.c"]`, or `values["a.b"]["c"]`, as older checkpoints have it."""
    if key in values:
        return values[key]
    section, _, name = key.rpartition(".")
    inner = _look_up(values, section, None) if section else None
    return inner.get(name, default) if isinstance(inner, Mapping) else default


def _damage(path: Path) -> str:
    """What is wrong with a checkpoint; an empty string if nothing is."""
    try:
        run = json.loads((path / RUN).read_text())
        files = run.get("files", {})  # checkpoints had no checksums once
        for name, (size, checksum) in files.items():
            if (path / name).stat().st_size != size:
                return f"{name} has {(path / name).stat().st_size} bytes, not {size}"
            if _crc32(path / name) != checksum:
                return f"{name} is not what was written"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, TypeError, AttributeError) as error:
        return " ".join(f"{RUN}: {error}".split())
    return ""


def _metric(path: Path, name: str) -> float | None:
    try:
        metric = json.loads((path / RUN).read_text()).get("metric") or {}
    except (OSError, ValueError):
        return None
    value = metric.get("value") if metric.get("name") == name else None
    return value if value == value else None


def _flushed(file: Path) -> tuple[int, int]:
    """Wait until the file is on the disk; its size and CRC-32."""
    with file.open("rb") as opened:
        os.fsync(opened.fileno())
    return file.stat().st_size, _crc32(file)


def _flush_folder(folder: Path) -> None:
    """Wait until the folder's names are on the disk (fsync of a file does not promise that; see fsync(2))."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _crc32(file: Path) -> int:
    checksum = 0
    with file.open("rb") as opened:
        while block := opened.read(1 << 22):
            checksum = zlib.crc32(block, checksum)
    return checksum


def _remove(path: Path) -> None:
    """Remove a checkpoint so that a kill halfway leaves none that looks whole."""
    removed = path.with_name(f"{path.name}.removed")
    path.rename(removed)
    shutil.rmtree(removed)
