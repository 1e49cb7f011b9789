"""Merge the adapters of a run into the model it was trained from, as one checkpoint.

python -m training.export_adapter --model BASE --adapters runs/mine/final/adapters --out FOLDER
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

from flowomni.build import load_model, save_model

from .lora import apply_adapters
from .parts import parts_of


def export(model: str | Path, adapters: str | Path, out: str | Path) -> dict[str, int]:
    """Write `model` with `adapters` merged into it to `out`; returns the number of changed matrices by part.

    Raises:
        ValueError: something is missing, does not fit or would change nothing; `out` exists.
    """
    out = Path(out)
    if out.exists():
        raise ValueError(f"--out {out} is there already: give a new folder")
    loaded, processor = load_model(model)
    changed = apply_adapters(loaded, {part: modules[0] for part, modules in parts_of(loaded).items()}, adapters)
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    save_model(loaded, processor, partial)
    partial.rename(out)
    return changed


def main(args: list[str] | None = None) -> None:
    """Command line. Bad input ends with one line and exit status 2."""
    parser = argparse.ArgumentParser(prog="training.export_adapter", description="Merge adapters into their model.")
    parser.add_argument("--model", required=True, help="folder of the model that was trained")
    parser.add_argument("--adapters", required=True, help="folder `adapters` of the run's final model")
    parser.add_argument("--out", required=True, help="folder of the merged model, which must not exist")
    values = parser.parse_args(args)
    try:
        changed = export(values.model, values.adapters, values.out)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    print(f"{values.out}: changed matrices: " + ", ".join(f"{part} {number}" for part, number in changed.items()))


if __name__ == "__main__":
    main()
