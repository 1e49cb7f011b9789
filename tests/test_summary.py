"""What a run tells: shares of padding, memory, a mirror that may break, and one page with curves and sound."""

from __future__ import annotations

import base64
import dataclasses
import json
import math
import re
import warnings
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
import yaml
from accelerate import PartialState

from flowomni.evaluation.spectrogram import write_spectrogram
from flowomni.layouts import Turn
from flowomni.streams import collate
from tests.tiny import INSTRUCTIONS, save_tiny_parts, tiny_model
from training.logs import Logs, Throughput
from training.manifest import read_manifest
from training.stages.speech import PartsOptions, SpeechOptions, SpeechStage
from training.stages.text import TextStage
from training.summary import ANSWERS, chart_groups, main, read_answers, series_of, write_summary


@dataclasses.dataclass
class Run:
    stage: str = "speech"
    max_steps: int = 40
    wandb: str = "disabled"


def samples(folder: Path, text: str) -> None:
    """Two spoken prompts, one of them with sound and its picture."""
    folder.mkdir(parents=True)
    wav_S = (0.3 * np.sin(np.arange(12_000) / 7)).astype(np.float32)
    soundfile.write(folder / "0.wav", wav_S, 24_000, subtype="PCM_16")
    write_spectrogram(folder / "0.png", wav_S, 24_000)
    lines = [
        {"prompt": "answer: <one>", "wanted": "one", "text": text, "recognised": "won", "wav": "0.wav"},
        {"prompt": "answer: two", "wanted": "two", "text": "three & four"},
    ]
    (folder / ANSWERS).write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    logs = Logs(folder, Run(), Run(), 0, enabled=True)
    for step in range(1, 41):
        bins = {f"loss/speech/flow_t{t:.2f}": 1.0 + t for t in (0.0, 0.25)}
        logs.write(step, {"loss/total": 1 / step, "loss/speech": 0.5, "grad_norm": math.nan, **bins})
        if step % 20 == 0:
            logs.write(step, {"eval/loss/speech": 0.7, "eval/accuracy": step / 40})
            samples(folder / "samples" / f"step_{step:08d}", f"text of step {step}")
            logs.write_samples(step, folder / "samples" / f"step_{step:08d}")
    logs.close()
    return folder


def test_the_page_is_whole(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Curves are drawn, sound plays, pictures show, text is escaped, and nothing is fetched from anywhere."""
    with (run / "log.jsonl").open("a") as log:
        log.write('{"step": 41, "loss')  # as a killed process leaves it
    main([str(run)])
    page = Path(capsys.readouterr().out.strip()).read_text()
    assert page == write_summary(run).read_text()  # the same again
    for svg in re.findall(r"<svg.*?</svg>", page, re.DOTALL):
        assert len(ElementTree.fromstring(svg).findall(".//{*}path")) > 2
    sounds = re.findall(r"data:audio/flac;base64,([^']+)'", page)
    assert len(sounds) == 2
    (run / "back.flac").write_bytes(base64.b64decode(sounds[0]))
    np.testing.assert_array_equal(
        soundfile.read(run / "back.flac")[0], soundfile.read(run / "samples/step_00000020/0.wav")[0]
    )
    assert page.count("data:image/png;base64,") == 2
    for text in ("answer: &lt;one&gt;", "text of step 20", "text of step 40", "three &amp; four", "heard: won"):
        assert text in page
    assert "40 of 40 steps" in page and "max_steps: 40" in page
    assert not re.search(r"(src|href)=['\"]?https?:", page)


def test_values_come_in_charts() -> None:
    names = ["loss/total", "eval/loss/text", "loss/text", "loss/speech/flow_t0.00", "loss/speech/flow_t0.25"]
    assert chart_groups([*names, "grad_norm", "eval/accuracy"]) == {
        "loss/total": ["loss/total"],
        "loss/speech/flow-time bins": ["loss/speech/flow_t0.00", "loss/speech/flow_t0.25"],
        "loss/text": ["eval/loss/text", "loss/text"],
        "eval/accuracy": ["eval/accuracy"],
        "grad_norm": ["grad_norm"],
    }
    series = series_of([{"step": 1, "elapsed_sec": 3.0, "a": 1.0}, {"step": 2, "a": math.inf, "b": 2.0}])
    assert series == {"a": ([1], [1.0]), "b": ([2], [2.0])}


def test_a_folder_that_is_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([str(tmp_path)])
    assert stopped.value.code == 2 and "has no config.yaml" in capsys.readouterr().err


def test_memory_and_padding_are_logged(run: Path) -> None:
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert all(0.05 < line["memory_gib"] < 100 for line in lines)
    PartialState(cpu=True)
    _, processor = tiny_model()
    stage = TextStage.__new__(TextStage)  # counting needs no weights
    rows = [[Turn("user", text="say"), Turn("assistant", text=text)] for text in ("one", "one two three four")]
    batch = collate([processor.layout.example(turns) for turns in rows])
    throughput = Throughput()
    throughput.add(stage, [batch, batch])
    values = throughput.read()
    assert values["padding_share"] == pytest.approx(3 / batch.mask_BL.numel()) and values["tokens_per_sec"] > 0
    assert "padding_share" not in throughput.read()  # it starts again


def test_a_broken_mirror_does_not_stop_a_run(tmp_path: Path) -> None:
    """Whatever goes wrong with wandb, the run's own log goes on."""
    logs = Logs(tmp_path / "run", Run(), Run(), 0, enabled=True)

    class Lost:
        def log(self, values: dict[str, float], step: int) -> None:
            raise ConnectionError("no route to host")

    logs.wandb = Lost()
    with pytest.warns(UserWarning, match=r"wandb is lost \(no route to host\): the run goes on"):
        logs.write(1, {"loss/total": 1.0})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        logs.write(2, {"loss/total": 0.5})
        logs.close()
    assert [json.loads(line)["step"] for line in (tmp_path / "run/log.jsonl").read_text().splitlines()] == [1, 2]


def test_an_evaluation_speaks_the_same_prompts(tmp_path: Path) -> None:
    """Text, sound, picture and recognised text of each; flow-time bins are among the losses."""
    rng = np.random.default_rng(0)
    lines = []
    for index, split in enumerate(["train", "valid", "valid"]):
        soundfile.write(tmp_path / f"{index}.wav", 0.1 * rng.standard_normal(12_000), 24_000)
        says = {"role": "assistant", "text": "one", "audio": f"{index}.wav", "duration_sec": 0.5}
        lines.append({"id": str(index), "split": split, "turns": [{"role": "user", "text": "say one"}, says]})
    (tmp_path / "manifest.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    assert len(read_manifest(tmp_path, "valid")) == 2
    torch.manual_seed(0)
    layout = {"instructions": INSTRUCTIONS, "max_answer_tokens": 12}
    parts = PartsOptions(**save_tiny_parts(tmp_path / "parts"), head={"kind": "flow", "width": 16}, layout=layout)
    values: dict[str, Any] = {"manifest": str(tmp_path), "parts": parts, "num_eval": 2, "batch_size": 1}
    stage = SpeechStage(SpeechOptions(**values, tasks={"text_to_speech": 1.0}), 0)
    stage.module.eval()
    answers = []
    for step in (1, 2):
        folder = tmp_path / f"samples/step_{step:08d}"
        folder.mkdir(parents=True)
        with torch.no_grad():
            found = stage.evaluate(folder, step)
        assert {"accuracy", "loss/speech", "wer_own_text"} <= set(found)
        answers.append(read_answers(folder))
        assert all("recognised" in answer for answer in answers[-1])
        for answer in answers[-1]:
            if "wav" in answer:
                assert soundfile.info(folder / answer["wav"]).duration > 0
                assert (folder / answer["wav"]).with_suffix(".png").read_bytes()[:4] == b"\x89PNG"
    assert answers[0] == answers[1] and [a["prompt"] for a in answers[0]] == ["answer: say one"] * 2
    bins = [name for name in stage.module(stage.batch(0, 0, 1)) if name.startswith("speech/flow_t")]
    assert len(bins) == 4
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"stage": "speech"}))
    (tmp_path / "log.jsonl").write_text("")
    assert "Nothing is logged yet" in write_summary(tmp_path).read_text()
