"""Prepared data is the raw data, computed once: the same numbers, whoever computes them and however often it stops."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from flowomni.build import assemble, save_model
from flowomni.streams import Streams
from tests.tiny import ENCODER, INSTRUCTIONS, save_tiny_parts
from training.check import check_manifest
from training.manifest import read_manifest
from training.prepare import main, prepare
from training.recordings import INDEX, Clip
from training.stages.speech import SpeechOptions, SpeechStage

ROOT = Path(__file__).resolve().parent.parent
RATE_HZ = 24_000


def tone(seconds: float, pitch_hz: float) -> np.ndarray:
    return 0.3 * np.sin(2 * np.pi * pitch_hz * np.arange(round(seconds * RATE_HZ)) / RATE_HZ)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight conversations: files, parts of a stereo file, several turns, a typed question, a recording alone."""
    folder = tmp_path_factory.mktemp("corpus")
    stereo = np.stack([tone(4.0, 200), tone(4.0, 500)], 1)
    soundfile.write(folder / "stereo.wav", stereo, RATE_HZ)
    lines = []
    for index in range(6):
        soundfile.write(folder / f"q{index}.flac", tone(0.3 + 0.1 * index, 300 + index), RATE_HZ)
        soundfile.write(folder / f"a{index}.flac", tone(0.2 + 0.1 * index, 150 + index), RATE_HZ)
        user = {"role": "user", "text": "what is one", "audio": f"q{index}.flac"}
        says = {"role": "assistant", "text": "two", "audio": f"a{index}.flac"}
        lines.append({"id": str(index), "turns": [user, says]})
    lines[0]["turns"][0] = {"role": "user", "text": "say hello"}  # typed
    times = [(0.0, 0.5), (0.6, 1.4), (1.5, 2.1), (2.2, 3.6)]
    turns = []
    for index, (start, end) in enumerate(times):
        audio = {"path": "stereo.wav", "channel": 1 - index % 2, "start_sec": start, "end_sec": end}
        turns.append({"role": ("user", "assistant")[index % 2], "text": "apple", "audio": audio})
    lines.append({"id": "call", "turns": turns})
    lines.append({"id": "alone", "turns": [{"role": "assistant", "text": "banana", "audio": "a3.flac"}]})
    (folder / "manifest.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    parts: dict[str, Any] = dict(save_tiny_parts(folder / "parts"))
    head = {"kind": "flow", "width": 16, "num_blocks": 1}
    blocks, layout = {"num_layers": 1, "num_heads": 2}, {"instructions": INSTRUCTIONS}
    save_model(*assemble(**parts, encoder=ENCODER, head=head, output_blocks=blocks, layout=layout), folder / "model")
    return folder / "model"


def run(*args: Any) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([str(arg) for arg in args])
    assert stopped.value.code == 0


@pytest.fixture(scope="module")
def prepared(corpus: Path, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("prepared") / "data"
    run("--manifest", corpus, "--model", model, "--out", out, "--workers", 1, "--clips-per-shard", 4)
    return out


def options(manifest: Path, model: Path, **changes: Any) -> SpeechOptions:
    tasks = {"speech_to_speech": 0.4, "text_to_speech": 0.2, "speak": 0.2, "transcribe": 0.2}
    values = {"model": str(model), "tasks": tasks, "batch_size": 3, "num_eval": 0}
    return SpeechOptions(manifest=str(manifest), **values | changes)


def equal(first: Streams, second: Streams) -> bool:
    for field in dataclasses.fields(Streams):
        a, b = getattr(first, field.name), getattr(second, field.name)
        if (a is None) != (b is None) or (a is not None and not torch.equal(a.nan_to_num(9.0), b.nan_to_num(9.0))):
            return False
    return True


def content(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


# ------------------------------------------------------------------------------------------------------------ training


def test_prepared_batches_and_losses_are_the_raw_ones(
    corpus: Path, model: Path, prepared: Path, tmp_path: Path
) -> None:
    """Also where the recordings are gone and the prepared folder has moved."""
    moved = shutil.copytree(prepared, tmp_path / "elsewhere" / "data")
    losses = []
    stages = [SpeechStage(options(place, model), 3) for place in (corpus, prepared, moved)]
    assert len(stages[0].train) == 9  # the call has two answers
    for index in range(6):
        raw, *others = [stage.batch(index, 0, 1) for stage in stages]
        assert all(equal(raw, other) for other in others)
        assert raw.features_BCF is None or raw.features_BCF.abs().max() > 0
        found = [stage.model(raw, torch.Generator().manual_seed(0)) for stage in stages[:2]]
        losses.append([{name: float(loss.sum) for name, loss in parts.items()} for parts in found])
    assert all(raw == other for raw, other in losses)


def test_token_budget_in_training(corpus: Path, model: Path) -> None:
    """Batches keep to it, depend on nothing but their place, and every epoch holds every example once."""
    with_budget = options(corpus, model, max_tokens_per_batch=64, tasks={"speak": 1.0})
    stage = SpeechStage(with_budget, 3)
    per_epoch = [len(stage._plan(epoch)) for epoch in range(3)]
    batches = [stage.batch(index, 0, 1) for index in range(sum(per_epoch))]
    assert max(batch.mask_BL.numel() for batch in batches) <= 64 and max(len(b.mask_BL) for b in batches) > 1
    for epoch in range(3):
        first = sum(per_epoch[:epoch])
        assert sum(len(batch.mask_BL) for batch in batches[first : first + per_epoch[epoch]]) == len(stage.train)
    again = SpeechStage(with_budget, 3)
    for place in (len(batches) - 1, 0, 2):
        assert equal(again.batch(place // 2, place % 2, 2), batches[place])
    with pytest.raises(ValueError, match="max_tokens_per_batch is 0"):
        options(corpus, model, max_tokens_per_batch=0)


def test_lengths_are_those_of_the_streams(corpus: Path, model: Path) -> None:
    """What batches are planned by: template, words, heard positions and speech, for every task and context."""
    stage = SpeechStage(options(corpus, model), 3)
    for item in stage.train:
        for task in ("speech_to_speech", "speech_to_text", "text_to_speech", "text_to_text", "speak", "transcribe"):
            possible = stage._possible(item, task)
            rows = stage._example(item, possible, None)
            assert abs(stage._length(stage._sides(item, possible), possible) - rows.mask_BL.shape[1]) <= 1


def test_another_model_is_refused(corpus: Path, model: Path, prepared: Path, tmp_path: Path) -> None:
    """By the keys that differ; a tokenizer with the same settings and other weights is another one too."""
    stage = SpeechStage(options(corpus, model), 0)
    tokenizer, features = stage.model.speech_tokenizer, stage.processor.heard_features
    assert features is not None
    wider = dataclasses.replace(features, num_mels=128)
    with pytest.raises(ValueError, match="encoder.num_mels: 80 then, 128 now.*delete that folder"):
        prepare(corpus, prepared, tokenizer, wider, clips_per_shard=4)
    with torch.no_grad():
        next(tokenizer.encoder.parameters()).mul_(1.5)
    with pytest.raises(ValueError, match="speech_tokenizer.weights: tokens of other weights"):
        prepare(corpus, prepared, tokenizer, features, clips_per_shard=4)
    save_model(stage.model, stage.processor, tmp_path / "other")
    with pytest.raises(ValueError, match="prepared for another model.*weights.*prepare it anew"):
        SpeechStage(options(prepared, tmp_path / "other"), 0)


# ----------------------------------------------------------------------------------------------------------- preparing


def test_a_killed_run_goes_on(corpus: Path, model: Path, prepared: Path, tmp_path: Path) -> None:
    """What was finished stays, nothing half-written counts, and the result is what it would have been."""
    args = ["--manifest", corpus, "--model", model, "--out", tmp_path / "out", "--workers", 1, "--clips-per-shard", 4]
    run(*args)
    wanted = content(tmp_path / "out")
    (tmp_path / "out" / INDEX).unlink()
    (tmp_path / "out" / "shard-00001.safetensors").unlink()
    (tmp_path / "out" / ".shard-00001.safetensors.99.part").write_bytes(b"half")
    kept = (tmp_path / "out" / "shard-00000.safetensors").stat().st_mtime_ns
    with pytest.raises(ValueError, match="another shard size"):
        prepare_with(model, corpus, tmp_path / "out", clips_per_shard=3)
    run(*args)
    assert (tmp_path / "out" / "shard-00000.safetensors").stat().st_mtime_ns == kept
    found = content(tmp_path / "out")
    found.pop(".shard-00001.safetensors.99.part", None)
    assert found == wanted
    assert [name for name in wanted if name.startswith("shard")] == [
        name for name in content(prepared) if "shard" in name
    ]


def prepare_with(model: Path, manifest: Path, out: Path, **changes: Any) -> Path:
    stage = SpeechStage(options(manifest, model), 0)
    return prepare(manifest, out, stage.model.speech_tokenizer, stage.processor.heard_features, **changes)


def test_processes_make_the_same_shards(
    corpus: Path, model: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Two launched processes, the second with two workers of its own; one thread each, so that sums have one order."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    request.addfinalizer(lambda: torch.set_num_threads(num_threads))
    outs = [tmp_path / "one", tmp_path / "two"]
    args = ["--manifest", str(corpus), "--model", str(model), "--clips-per-shard", "2"]
    run(*args, "--out", outs[0], "--workers", 1)
    env = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--cpu",
        "--num_processes",
        "2",
        "--num_machines",
        "1",
    ]
    command += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    command += ["-m", "training.prepare", *args, "--out", str(outs[1]), "--workers", "2"]
    launched = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert launched.returncode == 0, launched.stderr[-3000:]
    one, two = map(content, outs)
    assert one.keys() == two.keys() and len(one) > 6
    assert json.loads(one[INDEX])["shards"] == json.loads(two[INDEX])["shards"]
    first, second = (SpeechStage(options(out, model), 3) for out in outs)
    assert equal(first.batch(0, 0, 1), second.batch(0, 0, 1))


def test_what_cannot_be_prepared(corpus: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.jsonl").write_text('{"id": "a", "turns": [{"role": "user", "text": "hello"}, ' +
                                         '{"role": "assistant", "text": "hello"}]}\n')  # fmt: skip
    for args, reason in [
        (["--manifest", corpus], "--out is missing"),
        (["--manifest", corpus, "--out", tmp_path / "out"], "--model is missing"),
        (["--manifest", corpus, "--out", corpus, "--model", model], "is the folder of the manifest"),
        (["--manifest", tmp_path / "text.jsonl", "--out", tmp_path / "out", "--model", model], "no recording in it"),
    ]:
        with pytest.raises(SystemExit) as stopped:
            main([str(arg) for arg in args])
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert stopped.value.code == 2 and error.startswith("error: ") and reason in error


# ------------------------------------------------------------------------------------------------------ other formats


def test_an_audio_folder_becomes_a_manifest(tmp_path: Path) -> None:
    recordings = tmp_path / "recordings"
    (recordings / "deep").mkdir(parents=True)
    for name in ("a.wav", "deep/b.flac", "c.wav"):
        soundfile.write(recordings / name, tone(0.3, 200), RATE_HZ)
    (recordings / "a.txt").write_text("hello\n  you\n")
    (recordings / "deep/b.txt").write_text("apple")
    run("--folder", recordings, "--out", tmp_path / "by_text")
    [hello, apple] = read_manifest(tmp_path / "by_text")
    assert (hello.answer.text, apple.answer.text, apple.split) == ("hello you", "apple", "valid")
    assert apple.answer.duration_sec == pytest.approx(0.3)
    (recordings / "metadata.csv").write_text("file_name,sentence,reply,words\na.wav,what is one,c.wav,two\n")
    run("--folder", recordings, "--out", tmp_path / "by_table")
    [alone] = read_manifest(tmp_path / "by_table", "train")
    assert alone.answer.text == "what is one" and len(alone.turns) == 1
    columns = ["user.audio=file_name", "user.text=sentence", "assistant.audio=reply", "assistant.text=words"]
    run("--folder", recordings, "--out", tmp_path / "pairs", "--columns", *columns)
    [pair] = read_manifest(tmp_path / "pairs")
    assert (pair.question.text, pair.answer.text) == ("what is one", "two")
    assert not check_manifest(tmp_path / "pairs").problems
    for args, reason in [
        (["--columns", "assistant.audio=sound"], "no column 'sound'; there are file_name"),
        (["--columns", "agent.audio=reply"], "SIDE is one of user.audio"),
    ]:
        with pytest.raises(SystemExit) as stopped:
            main(["--folder", str(recordings), "--out", str(tmp_path / "bad"), *args])
        assert stopped.value.code == 2, reason


@pytest.mark.parametrize("streaming", [[], ["--streaming"]])
def test_a_data_set_becomes_a_manifest(tmp_path: Path, streaming: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Parquet as the Hub holds it: the bytes of the audio are kept as they are, and nothing else decodes them."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    datasets = pytest.importorskip("datasets")
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    soundfile.write(tmp_path / "a.flac", tone(0.4, 200), RATE_HZ)
    content = (tmp_path / "a.flac").read_bytes()
    table = pa.table({"audio": [{"bytes": content, "path": "a.flac"}] * 3, "text": ["one", "two", "three"]})
    features = datasets.Features({"audio": datasets.Audio(), "text": datasets.Value("string")})
    described = json.dumps({"info": {"features": features.to_dict()}})
    (tmp_path / "data").mkdir()
    parquet.write_table(table.replace_schema_metadata({"huggingface": described}), tmp_path / "data/train.parquet")
    run("--dataset", tmp_path / "data", "--out", tmp_path / "out", "--limit", 2, *streaming)
    found = read_manifest(tmp_path / "out")
    assert [c.answer.text for c in found] == ["one", "two"] and found[0].answer.duration_sec == pytest.approx(0.4)
    assert found[1].answer.audio is not None and not isinstance(found[1].answer.audio, Clip)
    assert found[1].answer.audio.read_bytes() == content and found[1].answer.audio.suffix == ".flac"


def moshi_data(folder: Path, alignments: list[Any]) -> Path:
    """Ten seconds: the user (right) speaks in 0-1 and 4-5 s, the assistant (left) in 1.5-3 and 5.5-9 s."""
    rng = np.random.default_rng(0)
    time_S = np.arange(10 * 16_000) / 16_000
    user_S = ((time_S < 1) | ((time_S >= 4) & (time_S < 5))) * 0.2 * rng.standard_normal(len(time_S))
    main_S = (((time_S >= 1.5) & (time_S < 3)) | ((time_S >= 5.5) & (time_S < 9))) * 0.2
    (folder / "data_stereo").mkdir(parents=True)
    soundfile.write(folder / "data_stereo/a.wav", np.stack([main_S, user_S], 1), 16_000)
    (folder / "data_stereo/a.json").write_text(json.dumps({"alignments": alignments}))
    (folder / "data.jsonl").write_text(json.dumps({"path": "data_stereo/a.wav", "duration": 10.0}) + "\n")
    return folder / "data.jsonl"


MAIN_WORDS = [
    ["hello", [1.5, 2.0], "SPEAKER_MAIN"],
    ["you", [2.5, 3.0], "SPEAKER_MAIN"],
    ["fine", [5.5, 6.0], "SPEAKER_MAIN"],
    ["thanks", [8.5, 9.0], "SPEAKER_MAIN"],
]


def test_moshis_stereo_becomes_turns(tmp_path: Path) -> None:
    """A new turn where the speaker changes; the left channel is the assistant's."""
    users = [["hi", [0.2, 0.8], "SPEAKER_00"], ["how", [4.0, 4.4], "SPEAKER_00"], ["now", [4.5, 5.0], "SPEAKER_00"]]
    run("--moshi", moshi_data(tmp_path, MAIN_WORDS + users), "--out", tmp_path / "out")
    [call] = read_manifest(tmp_path / "out")
    assert [(t.role, t.text) for t in call.turns] == [
        ("user", "hi"),
        ("assistant", "hello you"),
        ("user", "how now"),
        ("assistant", "fine thanks"),
    ]
    audio = call.turns[2].audio
    assert isinstance(audio, Clip) and (audio.channel, audio.start_sec, audio.end_sec) == (1, 3.9, 5.1)
    assert [tuple(word) for word in call.turns[2].words] == [("how", 0.1, 0.5), ("now", 0.6, 1.1)]
    assert isinstance(call.turns[1].audio, Clip) and call.turns[1].audio.channel == 0
    assert not check_manifest(tmp_path / "out").problems


def test_moshis_annotation_has_the_assistants_words_alone(tmp_path: Path) -> None:
    """Then its pauses in which the user's channel is not silent are the user's turns, and other pauses are its own."""
    run("--moshi", moshi_data(tmp_path, MAIN_WORDS), "--out", tmp_path / "out")
    [call] = read_manifest(tmp_path / "out")
    spans = [(t.role, t.text, t.audio.start_sec, t.audio.end_sec) for t in call.turns if isinstance(t.audio, Clip)]
    assert spans == [
        ("user", "", 0.0, 1.5),
        ("assistant", "hello you", 1.4, 3.1),
        ("user", "", 3.0, 5.5),
        ("assistant", "fine thanks", 5.4, 9.1),
    ]
    assert [tuple(word) for word in call.answer.words] == [("fine", 0.1, 0.6), ("thanks", 3.1, 3.6)]
    assert not check_manifest(tmp_path / "out").problems


@pytest.mark.parametrize(
    "alignments, reason",
    [([["hello", [2.0, 1.0], "SPEAKER_MAIN"]], "lasts from 2.0 to 1.0"), ([["hello", 2.0]], "is not [word, [start,")],
)
def test_bad_word_times_of_moshi(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], alignments: list[Any], reason: str
) -> None:
    with pytest.raises(SystemExit):
        main(["--moshi", str(moshi_data(tmp_path, alignments)), "--out", str(tmp_path / "out")])
    error = capsys.readouterr().err
    assert "data.jsonl:1" in error and reason in error
