"""Pack a trained model for shipping: matrices as float16, the head's best sampling in the config.

With `--average-with` its weights become the mean of its own and those of the model that it was fine-tuned from: often
more stays of what that brought than of what it cost (arXiv 2109.01903).

python -m scripts.pack_model runs/tiny/speech/final flowomni/models/flowomni-tiny --sampling '{"temperature": 0.6}'
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from flowomni.build import load_model, save_model


def pack(
    source: Path, target: Path, sampling: dict[str, float | int | str] | None, average_with: Path | None = None
) -> float:
    """Write the packed model into `target` (a README.md there stays) and return its size in MB."""
    model, processor = load_model(source)
    if average_with is not None:
        other, mean = load_model(average_with)[0].state_dict(), {}
        for name, tensor in model.state_dict().items():
            if name not in other or other[name].shape != tensor.shape:
                raise ValueError(f"--average-with {average_with} has no tensor {name} of shape {list(tensor.shape)}")
            # a new tensor: two names may share one, and it must not be averaged twice
            mean[name] = tensor.lerp(other[name], 0.5) if tensor.is_floating_point() else tensor
        model.load_state_dict(mean)
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
    parser.add_argument("--average-with", type=Path, help="folder of a model whose weights are averaged with these")
    args = parser.parse_args()
    try:
        print(f"{args.target}: {pack(args.source, args.target, args.sampling, args.average_with):.1f} MB")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
