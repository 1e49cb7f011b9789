"""Make torchaudio importable beside a torch build that its native library does not fit.

torchaudio 2.11 is pure Python for all that vocos asks of it (spectrograms), but importing it loads a native library
that was built for CUDA: beside the CPU build of torch that fails, and every import of vocos with it. torchaudio itself
accepts a missing library, so this script deletes `torchaudio/lib/*.so` of the active environment, and only where
loading them fails. Run it again at any time: it then finds nothing to do.

    python scripts/repair_torchaudio.py

It can go once torchaudio's wheel loads beside CPU torch.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path


def loading_error() -> str | None:
    """The last line of what `import torchaudio` says when it fails in a fresh interpreter; None when it works."""
    result = subprocess.run([sys.executable, "-c", "import torchaudio"], capture_output=True, text=True)
    if result.returncode == 0:
        return None
    lines = result.stderr.strip().splitlines()
    return lines[-1] if lines else f"exit status {result.returncode}"


def main() -> int:
    """Repair if needed; exit status 0 when torchaudio can be imported afterwards, else 1."""
    spec = importlib.util.find_spec("torchaudio")  # finds it without importing it
    if spec is None or spec.origin is None:
        print(f"{sys.executable} has no torchaudio; run: pip install 'torchaudio==2.11.*'", file=sys.stderr)
        return 1
    error = loading_error()
    if error is None:
        print("torchaudio loads; nothing to repair")
        return 0
    libraries = sorted((Path(spec.origin).parent / "lib").glob("*.so"))
    for library in libraries:
        library.unlink()
    remaining = loading_error()
    if remaining is not None:
        print(f"torchaudio still does not load: {remaining}", file=sys.stderr)
        return 1
    print(f"torchaudio did not load ({error}); deleted {', '.join(library.name for library in libraries)}: now it does")
    return 0


if __name__ == "__main__":
    sys.exit(main())
