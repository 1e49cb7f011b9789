"""How natural speech sounds, by DNSMOS P.835: mean opinion scores from 1 (bad) to 5 that a network predicts.

The network is the one that the `speechmos` package carries. That package's own code needs librosa for a second network
(P.808), which is not used here. Source: Reddy et al., DNSMOS P.835 (arXiv 2110.01763).

Shape legend: S samples, W windows.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from ..audio import resample

DNSMOS_RATE_HZ = 16_000
LOWEST_SCORE = 1.0
_WINDOW_SAMPLES = int(9.01 * DNSMOS_RATE_HZ)
# From the network's raw scores to the scale of the listening test, as `speechmos` has it (highest power first).
_CALIBRATION = {
    "signal": (-0.08397278, 1.22083953, 0.0052439),
    "background": (-0.13166888, 1.60915514, -0.39604546),
    "overall": (-0.06766283, 1.11546468, 0.04602535),
}


@dataclass(frozen=True)
class Quality:
    """Predicted mean opinion scores.

    Attributes:
        overall: of everything heard (OVRL).
        signal: of the speech itself (SIG).
        background: freedom from noise (BAK).
    """

    overall: float
    signal: float
    background: float


class Dnsmos:
    """Scores clips one after the other; a clip's score depends on that clip alone.

    Args:
        num_threads: CPU threads of the network.
    """

    def __init__(self, num_threads: int = 1) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = num_threads
        self._session = onnxruntime.InferenceSession(str(_network_path()), options, providers=["CPUExecutionProvider"])

    def score(self, wav_S: np.ndarray, sample_rate_hz: int) -> Quality:
        """Score a mono clip of any rate; equal to `speechmos.dnsmos` on the same samples at 16 kHz.

        A clip shorter than 9.01 s is repeated, a longer one is scored in windows with a hop of one second. A clip
        without samples gets the lowest score. Samples beyond full scale are clipped.

        Raises:
            ValueError: a sample is NaN or infinite.
        """
        wav_S = np.asarray(wav_S, dtype=np.float32)
        assert wav_S.ndim == 1, f"mono audio has one dimension, not shape {wav_S.shape}"
        if not np.isfinite(wav_S).all():
            raise ValueError("the audio to score holds NaN or infinite samples")
        if not len(wav_S):
            return Quality(LOWEST_SCORE, LOWEST_SCORE, LOWEST_SCORE)
        raw_W = self._session.run(None, {"input_1": _windows(wav_S, sample_rate_hz)})[0].astype(np.float64)
        scores = {
            name: float(np.polyval(powers, raw_W[:, column]).mean())
            for column, (name, powers) in enumerate(_CALIBRATION.items())
        }
        return Quality(**scores)


def _network_path() -> Path:
    # Looked up, not imported: `speechmos.dnsmos` imports librosa.
    spec = find_spec("speechmos")
    folders = (spec.submodule_search_locations if spec else None) or []
    for folder in folders:
        path = Path(folder, "dnsmos_models", "sig_bak_ovr.onnx")
        if path.is_file():
            return path
    raise ValueError("the DNSMOS network is not installed: pip install speechmos")


def _windows(wav_S: np.ndarray, sample_rate_hz: int) -> np.ndarray:
    """Float32 `[W, 9.01 s]` at 16 kHz."""
    wav_S = np.clip(resample(wav_S, sample_rate_hz, DNSMOS_RATE_HZ), -1.0, 1.0)
    while len(wav_S) < _WINDOW_SAMPLES:
        wav_S = np.concatenate([wav_S, wav_S])
    # Whole seconds first: this is how `speechmos` counts, and the end of a clip can stay out of every window.
    num_windows = int(len(wav_S) // DNSMOS_RATE_HZ - _WINDOW_SAMPLES / DNSMOS_RATE_HZ) + 1
    starts = range(0, max(1, num_windows) * DNSMOS_RATE_HZ, DNSMOS_RATE_HZ)
    return np.stack([wav_S[start : start + _WINDOW_SAMPLES] for start in starts])
