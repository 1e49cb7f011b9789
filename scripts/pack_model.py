"""Pack a trained model for shipping: matrices as float16, the head's best sampling in the config.

python -m scripts.pack_model runs/tiny/speech/final flowomni/models/flowomni-tiny --sampling '{"temperature": 0.6}'
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from flowomni.build import load_model, save_model


def pack(source: Path, target: Path, sampling: dict[str, float | int | str] | None) -> float:
    """Write the packed model into `target` (a README.md there stays) and return its size in MB."""
    model, processor = load_model(source)
    if sampling:
        model.config.head = {**model.config.head, "sampling": sampling}
    save_model(model, processor, target, half=True)
    load_model(target)  # what is shipped loads, and its sampling is valid
    return sum(f.stat().st_size for f in target.iterdir() if f.is_file()) / 1e6


def main() -> None:
    """Command line; bad input is one line and exit status 2."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("source", type=Path, help="folder of a trained FlowOmni model")
    parser.add_argument("target", type=Path, help="folder to write")
    parser.add_argument("--sampling", type=json.loads, help="JSON overrides of the head's default sampling")
    args = parser.parse_args()
    try:
        print(f"{args.target}: {pack(args.source, args.target, args.sampling):.1f} MB")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
