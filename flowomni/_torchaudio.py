"""A clear message where torchaudio cannot be imported; the error of its native library says nothing one can act on."""

from __future__ import annotations

import importlib.util
from pathlib import Path


def require_torchaudio() -> None:
    """Import torchaudio, or raise one line that says what to run. Call it right before importing vocos.

    Raises ImportError when torchaudio is missing or its native library does not fit the installed torch.
    """
    try:
        import torchaudio  # noqa: F401
    except (ImportError, OSError) as error:
        spec = importlib.util.find_spec("torchaudio")
        if spec is None or spec.origin is None:
            raise ImportError("torchaudio is not installed; run: pip install 'torchaudio==2.11.*'") from error
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        libraries = Path(spec.origin).parent / "lib" / "*.so"
        raise ImportError(
            f"torchaudio's native library does not fit the installed torch ({reason}); run "
            f"`python scripts/repair_torchaudio.py` in FlowOmni's checkout, or without one: rm {libraries}"
        ) from error
