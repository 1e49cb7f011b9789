"""The repair of torchaudio, on a real package of that name whose native library cannot be loaded."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
REPAIR = [sys.executable, "scripts/repair_torchaudio.py"]
REQUIRE = [sys.executable, "-c", "from flowomni._torchaudio import require_torchaudio; require_torchaudio()"]


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A folder with a package `torchaudio` that loads every library in its lib/, as the real one does, and fails."""
    library = tmp_path / "torchaudio" / "lib" / "broken.abi3.so"
    library.parent.mkdir(parents=True)
    library.write_bytes(b"not a library")
    (tmp_path / "torchaudio" / "__init__.py").write_text(
        "import ctypes, pathlib\n"
        "for library in (pathlib.Path(__file__).parent / 'lib').glob('*.so'):\n"
        "    ctypes.CDLL(str(library))\n"
    )
    return tmp_path


def run(command: list[str], site: Path) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join((str(site), str(ROOT)))
    return subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True)


def test_repair_deletes_what_cannot_load_and_only_once(site: Path) -> None:
    before = run(REQUIRE, site)
    assert before.returncode != 0
    assert "python scripts/repair_torchaudio.py" in before.stderr.splitlines()[-1], "the last line says what to run"

    first = run(REPAIR, site)
    assert first.returncode == 0, first.stderr
    assert "deleted broken.abi3.so" in first.stdout
    assert not list((site / "torchaudio" / "lib").iterdir())

    second = run(REPAIR, site)
    assert (second.returncode, second.stdout) == (0, "torchaudio loads; nothing to repair\n")
    assert run(REQUIRE, site).returncode == 0


def test_repair_keeps_a_library_that_loads(site: Path) -> None:
    (site / "torchaudio" / "__init__.py").write_text("")
    assert run(REPAIR, site).returncode == 0
    assert (site / "torchaudio" / "lib" / "broken.abi3.so").exists()


def test_repair_says_so_when_it_does_not_help(site: Path) -> None:
    (site / "torchaudio" / "__init__.py").write_text("raise OSError('something else')")
    result = run(REPAIR, site)
    assert result.returncode == 1
    assert "still does not load: OSError: something else" in result.stderr
