"""The terminal: a file as the microphone, what is shown, what is kept, and what is said when something is missing."""

from __future__ import annotations

import builtins
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from flowomni.streams import SpeechState
from inference import chat
from inference.chat import Player
from tests.conversing import QUESTIONS, question, quiet
from tests.tiny import INSTRUCTIONS, tiny_model

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder of a tiny model that speaks up to its limit."""
    folder = tmp_path_factory.mktemp("model")
    head = {"kind": "flow", "width": 32, "num_blocks": 1, "objective": "lsd"}  # draws in one step: quick
    made, processor = tiny_model(head=head, layout={"instructions": INSTRUCTIONS, "max_answer_tokens": 30})
    with torch.no_grad():
        made.state_head.classify.bias[SpeechState.STOP] -= 20  # speaks for 2.4 s
    made.save_pretrained(folder)
    processor.text_tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def microphone(tmp_path: Path) -> Path:
    """Two questions with room for an answer between them."""
    path = tmp_path / "microphone.wav"
    soundfile.write(path, np.concatenate([quiet(0.3), question(1), quiet(4.0), question(2)]), 16_000)
    return path


def test_a_file_talks_with_the_model(
    model: str, microphone: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two turns, two answers; the file kept has the questions left and the answers right, after them."""
    out = tmp_path / "conversation.wav"
    args = ["--wav", str(microphone), "--fast", "--model", model, "--out", str(out)]
    assert chat.main(args) == 0
    printed = capsys.readouterr().out
    assert printed.count("(heard)\nanswer: ") == 2 and printed.endswith(f"kept: {out}\n")
    kept, rate = soundfile.read(out)
    assert rate == 24_000 and kept.shape[1] == 2
    spoken_sec = len(question(1)) / 16_000
    first = np.flatnonzero(np.abs(kept[:, 1]) > 0)
    assert 0.3 + spoken_sec < first[0] / rate < 0.3 + spoken_sec + 0.8
    assert np.abs(kept[: int(0.3 * rate), 0]).max() < 1e-3 < np.abs(kept[:, 0]).max()
    assert chat.main(args) == 0
    assert np.array_equal(soundfile.read(out)[0], kept)  # the same seed, the same conversation


def test_speaking_stops_what_is_played(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The second question comes at once: the first answer is played until it begins, and no longer."""
    path, out = tmp_path / "microphone.wav", tmp_path / "conversation.wav"
    soundfile.write(path, np.concatenate([question(1), quiet(0.55), question(2)]), 16_000)
    chat.main(["--wav", str(path), "--fast", "--model", model, "--out", str(out)])
    played = np.abs(soundfile.read(out)[0][:, 1]) > 0
    end = len(question(1)) / 16_000 + 0.3  # of the first turn, at the earliest; its answer is 2.4 s long
    assert played[int(end * 24_000) : int((end + 0.8) * 24_000)].any()
    assert not played[int((end + 0.8) * 24_000) : int((end + 1.6) * 24_000)].any()
    assert capsys.readouterr().out.count("answer: ") == 2


def test_in_real_time_a_second_takes_a_second(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also where nobody speaks, which is told."""
    path = tmp_path / "microphone.wav"
    soundfile.write(path, quiet(1.0), 16_000)
    began = time.monotonic()
    assert chat.main(["--wav", str(path), "--model", model]) == 0
    assert time.monotonic() - began > 1.0 + 0.5 + 0.5
    assert capsys.readouterr().err == f"no speech was found in {path}\n"


def test_ctrl_c_ends_the_conversation(model: str, microphone: Path, tmp_path: Path) -> None:
    """In a process of its own: what was said until then is kept."""
    out = tmp_path / "conversation.wav"
    command = [sys.executable, "-c", "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler);"]
    command[-1] += "from inference.chat import main; sys.exit(main(sys.argv[1:]))"
    command += ["--wav", str(microphone), "--model", model, "--out", str(out)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "(heard)\n"
    process.send_signal(signal.SIGINT)
    printed, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert "Traceback" not in errors and printed.endswith(f"kept: {out}\n")
    assert len(soundfile.read(out)[0]) > 24_000


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        (ImportError("No module named 'sounddevice'"), "sound needs the package sounddevice: pip install"),
        (OSError("PortAudio library not found"), "sound needs PortAudio: apt-get install libportaudio2"),
    ],
)
def test_a_machine_without_sound_says_what_to_do(
    model: str, missing: Exception, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    true_import = builtins.__import__

    def without_sound(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "sounddevice":
            raise missing
        return true_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_sound)
    assert chat.main(["--model", model]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {message}") and "--wav" in line


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--fast"], "--fast needs --wav FILE"),
        (["--out", "x.mp3"], "--out x.mp3 cannot be written"),
        (["--wav", "nobody.wav"], "nobody.wav does not exist"),
        (["--wav", str(QUESTIONS[0]), "--model", "nowhere"], "nowhere"),
        (["--wav", str(QUESTIONS[0]), "--silence", "-1"], "silence_sec is -1"),
    ],
)
def test_bad_arguments_are_one_line(args: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        status = chat.main(args)
    except SystemExit as end:
        status = int(end.code or 0)
    [line] = capsys.readouterr().err.splitlines()
    assert status == 2 and line.startswith("error: ") and message in line


def test_the_player_counts_what_was_played() -> None:
    player = Player()
    assert player.stop() is None and not player.pull(4).any()
    player.add("a", np.arange(1, 6, dtype=np.float32))
    player.add("a", np.arange(6, 9, dtype=np.float32))
    assert player.pull(4).tolist() == [1, 2, 3, 4] and player.pull(3).tolist() == [5, 6, 7] and player.playing
    assert player.stop() == ("a", 7) and not player.playing and player.stop() == ("a", 7)
    player.add("b", np.ones(2, np.float32))
    assert player.pull(5).tolist() == [1, 1, 0, 0, 0] and player.stop() == ("b", 2)
