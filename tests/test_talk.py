"""`inference.talk` as it is called: what it writes and prints, and one clear line for everything that is wrong.

Shapes: S samples.
"""

from __future__ import annotations

import json
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import soundfile
from safetensors.torch import load_file, save_file

from flowomni import FlowOmni, Question
from flowomni.audio import read_audio
from flowomni.build import load_model, save_model
from flowomni.streams import SpeechState
from inference.demo import DATA, asked
from inference.plot import STATE_COLORS
from inference.talk import JSON_HELP, main
from tests.tiny import tiny_model

ROOT = Path(__file__).resolve().parent.parent
Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    save_model(*tiny_model(), folder)
    return str(folder)


def write_question(path: Path, num_samples: int = 16_000, rate: int = 16_000, channels: int = 1, **how: str) -> str:
    wav_S = 0.1 * np.random.default_rng(len(path.name)).standard_normal((num_samples, channels))
    soundfile.write(path, wav_S, rate, **how)
    return str(path)


def failure(capsys: Capture, args: list[str], status: int = 2) -> str:
    """Run a command that must fail; its one line on stderr."""
    try:
        returned = main(args)
    except SystemExit as stop:  # argparse
        returned = int(str(stop.code))
    assert returned == status
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and "Traceback" not in lines[0], lines
    return lines[0]


# --------------------------------------------------------------------------------------------------------- answering


def test_one_question(model: str, tmp_path: Path, capsys: Capture) -> None:
    """Text on stdout, voice and picture in files, and both are what the library gives for that seed."""
    question, out, plot = write_question(tmp_path / "q.wav"), tmp_path / "a.wav", tmp_path / "a.png"
    args = [question, "--out", str(out), "--plot", str(plot), "--model", model, "--seed", "3", "--num-steps", "2"]
    assert main(args) == 0
    wanted = FlowOmni.from_pretrained(model).answer(question, seed=3, sampling={"num_steps": 2})
    assert capsys.readouterr().out == wanted.text + "\n"
    np.testing.assert_allclose(read_audio(out, 24_000).wav_S, np.clip(wanted.wav_S, -1, 1), atol=1e-4)
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert set(STATE_COLORS) == {state.name.lower() for state in SpeechState}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.png", "a.wav", "q.wav"]


def test_typed_and_say(model: str, tmp_path: Path, capsys: Capture) -> None:
    """Both read the same words, with other instructions; --say is `FlowOmni.say`."""
    words, omni = "one two three", FlowOmni.from_pretrained(model)
    for name, wanted in (("--text", omni.answer(text=words)), ("--say", omni.say(words))):
        out = tmp_path / f"{name[2:]}.wav"
        assert main([name, words, "--out", str(out), "--model", model]) == 0
        assert capsys.readouterr().out == wanted.text + "\n"
        np.testing.assert_allclose(read_audio(out, 24_000).wav_S, np.clip(wanted.wav_S, -1, 1), atol=1e-4)


def test_many_questions_as_json(model: str, tmp_path: Path, capsys: Capture) -> None:
    """One object a line, in order, with just the documented keys; each answer is what it would be alone."""
    formats = {"a.wav": {}, "b.flac": {"rate": 44_100}, "c.ogg": {"channels": 2}, "d.wav": {"subtype": "PCM_U8"}}
    files = [write_question(tmp_path / name, **how) for name, how in formats.items()]
    files.append(write_question(tmp_path / "e.wav", 48_000, 48_000, channels=6))
    out = tmp_path / "new" / "answers"
    assert main([*files, "--out-dir", str(out), "--json", "--model", model]) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    keys = ["file", "heard_sec", "text", "answer_file", "answer_sec", "first_audio_ms", "realtime_factor"]
    assert [list(item) for item in found] == [keys] * len(files)
    assert all(f"  {key} " in JSON_HELP for key in keys)
    assert [item["file"] for item in found] == files
    assert [item["answer_file"] for item in found] == [str(out / f"{name}.wav") for name in "abcde"]
    assert sorted(p.name for p in out.iterdir()) == [f"{name}.wav" for name in "abcde"]
    omni = FlowOmni.from_pretrained(model)
    for file, item in zip(files, found, strict=True):
        alone = omni.answer(file)
        assert item["text"] == alone.text
        assert item["answer_sec"] == pytest.approx(alone.answer_sec, abs=1e-3)
        assert item["first_audio_ms"] > 0 and item["realtime_factor"] > 0
        voice_S = read_audio(item["answer_file"], 24_000).wav_S
        np.testing.assert_allclose(voice_S, np.clip(alone.wav_S, -1, 1), atol=1e-3)


def test_shares_of_a_batch_add_up(model: str) -> None:
    """Compute time is shared in proportion to length: one realtime factor for the batch, and no time counts twice."""
    omni = FlowOmni.from_pretrained(model)
    noise_S = 0.1 * np.random.default_rng(0).standard_normal(16_000).astype(np.float32)
    found = omni.answers([Question(audio=(noise_S, 16_000)), Question(text="one two"), Question(text="say hello")])
    factors = [answer.realtime_factor for answer in found]
    assert factors == pytest.approx([factors[0]] * 3)
    assert all(a.first_audio_ms <= 1000 * sum(b.compute_sec for b in found) for a in found if a.first_audio_ms)


def test_stream_returns_the_answer(model: str) -> None:
    omni = FlowOmni.from_pretrained(model)
    events, text, wavs = omni.stream(Question(text="one two")), "", []
    try:
        while True:
            event = next(events)
            text, wavs = text + event.text, [*wavs, event.wav_S]
    except StopIteration as end:
        answer = end.value
    assert answer.text == text.strip() == omni.answer(text="one two").text
    np.testing.assert_array_equal(answer.wav_S, np.concatenate(wavs))


def test_a_solver_of_its_own_gets_enough_steps(model: str) -> None:
    """A one-step head's default of one step would be a single coarse Euler step when another solver is asked for."""
    from inference.talk import _sampling, parse

    assert _sampling(parse(["--text", "one", "--solver", "euler"])) == {"solver": "euler", "num_steps": 16}
    assert _sampling(parse(["--text", "one", "--solver", "map"])) == {"solver": "map"}


# ----------------------------------------------------------------------------------------------------------- bad input


def bad_files(folder: Path) -> dict[str, str]:
    """Name of a bad file -> a word of its message."""
    good = Path(write_question(folder / "good.wav")).read_bytes()
    (folder / "empty.wav").touch()
    (folder / "truncated.wav").write_bytes(good[: len(good) // 2])
    (folder / "text.wav").write_text("this is not audio")
    (folder / "folder.wav").mkdir()
    soundfile.write(folder / "nan.wav", np.array([0.0, np.nan]), 16_000, subtype="FLOAT")
    return {
        "missing.wav": "does not exist",
        "empty.wav": "empty",
        "truncated.wav": "truncated",
        "text.wav": "not audio",
        "folder.wav": "folder",
        "nan.wav": "NaN",
    }


def test_a_device_that_is_not_there(model: str, capsys: Capture) -> None:
    assert "device 'cuda:99' cannot be used" in failure(
        capsys, ["--text", "one", "--model", model, "--device", "cuda:99"]
    )


def test_bad_files(model: str, tmp_path: Path, capsys: Capture) -> None:
    """Alone: one line, status 2, nothing written. Among others: reported, and the others are answered."""
    words = bad_files(tmp_path)
    for name, word in words.items():
        line = failure(capsys, [str(tmp_path / name), "--out", str(tmp_path / "a.wav"), "--model", model])
        assert name in line and word in line
        assert not (tmp_path / "a.wav").exists()
    out = tmp_path / "out"
    files = [str(tmp_path / name) for name in [*words, "good.wav"]]
    assert main([*files, "--out-dir", str(out), "--model", model]) == 2
    printed = capsys.readouterr()
    assert len(printed.err.splitlines()) == len(words) and "Traceback" not in printed.err
    assert printed.out.startswith(files[-1]) and len(printed.out.splitlines()) == 1
    assert [p.name for p in out.iterdir()] == ["good.wav"]


@pytest.mark.parametrize(
    "num_samples, level, word",
    [(16_000, 0.0, "silent"), (1, 0.3, "short"), (16_000 * 8, 0.1, "last 3.0 s are cut off")],
)
def test_odd_files_are_answered_with_a_warning(
    model: str, tmp_path: Path, capsys: Capture, num_samples: int, level: float, word: str
) -> None:
    """Silence, one sample, and more than the five seconds that the model hears: a warning, and an answer."""
    soundfile.write(tmp_path / "q.wav", np.full(num_samples, level), 16_000)
    assert main([str(tmp_path / "q.wav"), "--out", str(tmp_path / "a.wav"), "--model", model]) == 0
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("warning:")
    assert word in lines[0] or (word == "short" and "ms long" in lines[0])
    assert (tmp_path / "a.wav").stat().st_size > 44


@pytest.mark.parametrize(
    "args, word",
    [
        ([], "--say"),
        (["q.wav", "--text", "one"], "not several"),
        (["q.wav", "q2.wav", "--out", "a.wav"], "--out-dir"),
        (["q.wav", "--out", "a.wav", "--out-dir", "d"], "not both"),
        (["--text", "one", "--out-dir", "d"], "--out"),
        (["--say", "one"], "--out"),
        (["--text", "", "--out", "a.wav"], "empty"),
        (["q.wav", "q2.wav", "--plot", "p.png"], "--plot"),
        (["q.wav", "--plot", "p.txt"], ".png"),
        (["q.wav", "--out", "a.mp3"], ".wav"),
        (["q.wav", "--out", "nowhere/a.wav"], "make the folder nowhere"),
        (["q.wav", "--out", "."], "end its name"),
        (["q.wav", "--out", "q2.wav/a.wav"], "not a folder"),
        (["q.wav", "q2.wav", "--out-dir", "q2.wav"], "not a folder"),
        (["q.wav", "--out", "q.wav"], "replace"),
        (["q.wav", "q2.wav", "--out-dir", "."], "replace"),
        (["q.wav", "d/q.wav", "--out-dir", "o"], "both be answered"),
        (["q.wav", "--seed", "-1"], "--seed"),
        (["q.wav", "--seed", "x"], "--seed"),
        (["q.wav", "--unknown"], "--unknown"),
        (["q.wav", "--out", "a.wav", "--temperature", "-1"], "temperature"),
        (["q.wav", "--out", "a.wav", "--temperature", "nan"], "temperature"),
        (["q.wav", "--out", "a.wav", "--num-steps", "0"], "num_steps"),
        (["q.wav", "--out", "a.wav", "--solver", "eular"], "solver"),
        (["q.wav", "--out", "a.wav", "--solver", "map"], "lsd"),
        (["q.wav", "--model", "nowhere"], "nowhere"),
    ],
)
def test_bad_commands(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture, args: list[str], word: str
) -> None:
    """One line that says what, status 2, and the folder is as it was."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "d").mkdir()
    for name in ("q.wav", "q2.wav", "d/q.wav"):
        write_question(tmp_path / name, 4_000)
    before = sorted(tmp_path.rglob("*"))
    assert word in failure(capsys, [*args] if "--model" in args else [*args, "--model", model])
    assert sorted(tmp_path.rglob("*")) == before


def without(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def weights(change: Callable[[dict], object]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        state = load_file(folder / "model.safetensors")
        change(state)
        save_file(state, folder / "model.safetensors", {"format": "pt"})

    return apply


def config(change: Callable[[dict], object]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        values = json.loads((folder / "config.json").read_text())
        change(values)
        (folder / "config.json").write_text(json.dumps(values))

    return apply


def halve(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:500])


BAD_MODELS: dict[str, tuple[Callable[[Path], None], str]] = {
    "no config": (without("config.json"), "no config.json"),
    "no weights": (without("model.safetensors"), "model.safetensors"),
    "no text tokenizer": (without("tokenizer.json"), "no text tokenizer"),
    "missing tensor": (weights(lambda s: s.pop("state_embedding.weight")), "lacks tensors: state_embedding.weight"),
    "missing statistics": (weights(lambda s: s.pop("speech_tokenizer.front.mean_C")), "front.mean_C"),
    "further tensor": (weights(lambda s: s.update(more=s["state_embedding.weight"].clone())), "unknown tensors: more"),
    "wrong shape": (
        weights(lambda s: s.update({"state_embedding.weight": s["state_embedding.weight"][:, :31].clone()})),
        "tensor state_embedding.weight has shape [4, 31]",
    ),
    "truncated weights": (halve("model.safetensors"), "damaged"),
    "truncated config": (halve("config.json"), "JSON"),
    "another model": (config(lambda c: c.update(model_type="qwen2")), "'qwen2'"),
    "no language model": (config(lambda c: c.pop("llm")), "'llm'"),
    "unknown key": (config(lambda c: c.update(encoder_stak=4)), "did you mean 'encoder_stack'"),
    "unknown key of a section": (config(lambda c: c["head"].update(widht=4)), "did you mean 'width'"),
    "bad value": (config(lambda c: c["llm"].update(hidden_size="wide")), "hidden_size"),
}


@pytest.mark.parametrize("name", BAD_MODELS)
def test_bad_models(model: str, tmp_path: Path, capsys: Capture, name: str) -> None:
    damage, word = BAD_MODELS[name]
    folder = Path(shutil.copytree(model, tmp_path / "model"))
    damage(folder)
    with pytest.raises(ValueError):
        load_model(folder)
    line = failure(capsys, ["--text", "one", "--out", str(tmp_path / "a.wav"), "--model", str(folder)])
    assert word in line and str(folder) in line and len(line) < 800
    assert not (tmp_path / "a.wav").exists()


@contextmanager
def files_at_most(num_bytes: int) -> Iterator[None]:
    """As on a full disk: writing beyond so many bytes fails."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("what", ["--out", "--plot"])
def test_full_disk(model: str, tmp_path: Path, capsys: Capture, what: str) -> None:
    out = tmp_path / ("a.wav" if what == "--out" else "a.png")
    out.write_bytes(b"from before")
    with files_at_most(1000):
        line = failure(capsys, ["--text", "one", what, str(out), "--model", model])
    assert str(out) in line and "space" in line
    assert out.read_bytes() == b"from before"
    assert [p.name for p in tmp_path.iterdir()] == [out.name]


def test_interrupt(model: str, tmp_path: Path) -> None:
    """Ctrl-C in the middle of the work: one line, status 130, no file."""
    files = [write_question(tmp_path / f"{index:02}.wav", 80_000) for index in range(40)]
    command = [sys.executable, "-m", "inference.talk", *files, "--out-dir", str(tmp_path / "out"), "--model", model]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    # where the tests run in the background of a script, Ctrl-C is ignored, and a child inherits that
    heed = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen(command, cwd=ROOT, preexec_fn=heed, **pipes) as process:  # type: ignore[call-overload]
        process.stdout.readline()  # the first answer is there
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate()
    assert process.returncode == 130
    assert errors.split() == ["stopped"]
    names = sorted(p.name for p in (tmp_path / "out").iterdir())
    assert names == [f"{index:02}.wav" for index in range(len(names))], "only whole answers, under their names"
    for name in names:
        assert read_audio(tmp_path / "out" / name, 24_000).duration_sec > 0


# ---------------------------------------------------------------------------------------------------------------- demo


def test_the_demo_has_what_it_asks_and_teaches() -> None:
    """Its recordings are there and small; the new question is heard in a voice that is not in the lessons."""
    lines = [json.loads(line) for line in (DATA / "manifest.jsonl").read_text().splitlines()]
    recordings = {turn["audio"] for line in lines for turn in line["turns"] if turn.get("audio")}
    assert recordings == {str(p.relative_to(DATA)) for p in DATA.rglob("*.flac")}
    assert sum(p.stat().st_size for p in DATA.rglob("*")) < 2_000_000
    known, lessons = asked(), [line for line in lines if line["split"] == "train"]
    assert len(known) == 3
    assert all(read_audio(file, 16_000).duration_sec > 1 for file, _, _ in known)
    teaching = [line for line in lessons if line["turns"][0]["text"] == known[-1][1]]
    assert len(teaching) == 8 and {line["turns"][1]["text"] for line in teaching} == {known[-1][2]}
    assert not {line["voice"] for line in lines if line["split"] == "test"} & {line["voice"] for line in lessons}
    assert {line["voice_group"] for line in lines} == {"trained", "unseen"}, "no recordings of people"
