"""Commands in the README run: its Python as it stands, its programs and options by their own `--help`."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def fenced(language: str) -> list[str]:
    """The contents of the README's code blocks in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


COMMANDS = [shlex.split(line, comments=True) for block in fenced("sh") for line in block.splitlines() if line.strip()]


def options_by_program() -> dict[str, set[str]]:
    """Module of each `-m` program -> the --options the README gives it."""
    options: dict[str, set[str]] = defaultdict(set)
    for command in COMMANDS:
        if "-m" in command:
            start = command.index("-m") + 1
            options[command[start]] |= {word.split("=")[0] for word in command[start:] if word.startswith("--")}
    return options


@pytest.mark.parametrize("program, options", options_by_program().items())
def test_programs_know_the_options(program: str, options: set[str]) -> None:
    command = [sys.executable, "-m", program, "--help"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    known = set(re.findall(r"--[\w.-]+", result.stdout))
    assert options <= known, f"{program} --help does not mention {sorted(options - known)}"


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {command[1] for command in COMMANDS if command[0] == "make"} | set(re.findall(r"`make (\w+)`", README))
    assert {"demo", "tiny", "test", "lint"} <= named
    assert named <= targets, f"the Makefile has no target {sorted(named - targets)}"


def test_files_exist() -> None:
    """Those of the commands (configurations, models) and those of the file map."""
    named = {word for command in COMMANDS for word in command if word.startswith(("configs/", "flowomni/", "scripts/"))}
    for cell in re.findall(r"^\| (`.*?) \|", README, re.MULTILINE):
        first, *others = re.findall(r"`(.+?)`", cell)
        named |= {first} | {f"{Path(first).parent}/{other}" for other in others}
    missing = sorted(name for name in named if not (ROOT / name).exists())
    assert len(named) > 15
    assert not missing, f"the README names what is not there: {missing}"


@pytest.mark.parametrize("source", fenced("python"))
def test_python_runs(source: str, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", source]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout.strip(), "the answer's text is printed"
    assert (tmp_path / "answer.wav").stat().st_size > 1000
