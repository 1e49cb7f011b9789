"""The table of distillations: its cells, its intervals, and a tiny one that is trained."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
import yaml

from flowomni.build import save_model
from flowomni.tokenizers import VocoderConfig
from scripts.dm_codec_table import CONFIGS, MINILM, grid_of, main, print_table, resampled, resynthesis, stacked, table
from tests.teachers import save_whisper
from tests.test_tokenizer_stage import VOCODER, options_of, write_manifest
from tests.tiny import tiny_model
from training.config import parse
from training.plan import plan
from training.stages import STAGES
from training.stages.vocoder import VocoderOptions, VocoderStage
from training.train import RunOptions


def parsed(file: Path) -> Any:
    return parse(RunOptions, {name: stage.Options for name, stage in STAGES.items()}, ["--config", str(file)])


# the cells


def test_the_cells_differ_in_the_distillation_alone(tmp_path: Path) -> None:
    grid = grid_of(CONFIGS, tmp_path, [0, 1, 2])
    names = [cell.name for cell in grid.cells]
    assert names == ["none", "both_aligned", "both_padded", "lm_aligned", "lm_padded", "sm"]
    found = {}
    for cell in grid.cells:
        assert all(key.startswith("options.distillation.") for key in cell.changes)
        distillation = cell.content["options"].get("distillation", {})
        found[cell.name] = ("text_teacher" in distillation, "speech_teacher" in distillation)
        if "text_teacher" in distillation:
            assert cell.name.endswith(distillation["placement"])
    assert found == {n: ("lm" in n or "both" in n, "sm" in n or "both" in n) for n in names}


def test_the_projections_are_in_the_plan() -> None:
    """Without MiniLM, of which the sizes are stored."""
    options = parsed(CONFIGS / "distilled_lm_aligned.yaml")
    assert options.options.distillation.text_teacher == MINILM
    (part,) = [p for p in plan(options.run, options.options).parts if p.name == "projections to teachers"]
    assert part.num_parameters == part.num_trainable == (options.options.autoencoder.latent_dim + 1) * 384


def test_bad_cells_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"there is no distilled_none.yaml"):
        grid_of(tmp_path, tmp_path, [0])
    with pytest.raises(ValueError, match="--seeds 1 2 1: each seed is one run"):
        grid_of(CONFIGS, tmp_path, [1, 2, 1])


# the intervals


def run(errors: list[float], pesq: list[float]) -> dict[str, list[float]]:
    words = [10.0] * len(errors)
    hits = [10.0 - error for error in errors]
    return {"errors": errors, "words": words, "hits": hits, "heard_words": words, "stoi": pesq, "pesq": pesq}


def test_scores_are_of_all_runs_and_undefined_ones_count_nothing() -> None:
    nan = float("nan")
    found = resampled(stacked([run([1, 3], [2.0, nan]), run([0, 0], [3.0, 4.0])]))
    first = {name: values_R[0] for name, values_R in found.items()}
    assert first == pytest.approx({"wer": 4 / 40, "wil": 1 - (36 / 40) ** 2, "stoi": 3.0, "pesq": 3.0})


def test_intervals_are_over_answers_and_seeds() -> None:
    same = [2.0] * 50
    found = table({"none": stacked([run(same, same)] * 3)}, {"none": [0, 1, 2]})["none"]
    assert found["wer"]["low"] == found["wer"]["high"] == pytest.approx(0.2)
    by_seed = [run([float(s)] * 50, same) for s in (1, 2, 3)]
    found = table({"none": stacked(by_seed)}, {"none": [0, 1, 2]})["none"]
    assert found["wer"]["low"] <= 0.12 and found["wer"]["high"] >= 0.28, "answers agree, seeds do not"
    errors = np.random.default_rng(0).integers(0, 5, 50).astype(float).tolist()
    found = table({"none": stacked([run(errors, same)] * 3)}, {"none": [0, 1, 2]})["none"]
    spread = np.std(errors) / 10 / np.sqrt(50)
    assert found["wer"]["high"] - found["wer"]["low"] == pytest.approx(2 * 1.96 * spread, rel=0.15)


def test_differences_are_on_the_same_draws(capsys: pytest.CaptureFixture[str]) -> None:
    errors = np.random.default_rng(0).integers(1, 5, 50).astype(float)
    quality = [3.0] * 50
    scores = {name: stacked([run((errors + more).tolist(), quality)] * 2) for name, more in (("none", 0), ("sm", 1))}
    seeds = {"none": [0, 1], "sm": [0, 1]}
    found = table(scores, seeds)
    difference = found["sm"]["difference"]["wer"]
    assert difference["low"] == pytest.approx(0.1) and difference["high"] == pytest.approx(0.1)
    assert "difference" not in table(scores, seeds | {"sm": [0, 2]})["sm"], "other seeds are not compared"
    print_table(found)
    assert "+10.0 [+10.0, +10.0]*" in capsys.readouterr().out


# resynthesis


@torch.inference_mode()
def test_the_vocoder_alone_is_given_the_true_mel(tmp_path: Path) -> None:
    """Also where its folder holds a whole model, whose tokenizer has a bottleneck."""
    model, processor = tiny_model()
    save_model(model, processor, tmp_path)
    tokenizer: Any = model.speech_tokenizer
    wav_S = 0.1 * np.random.default_rng(0).standard_normal(9_000).astype(np.float32)
    num_frames = 8 * -(-len(wav_S) // 2048)
    log_mel_1FC = tokenizer.front.log_mel(torch.from_numpy(wav_S)[None], num_frames)
    wanted_S = tokenizer.vocode(log_mel_1FC)[0, : len(wav_S)].clamp(-1, 1).numpy()
    np.testing.assert_allclose(resynthesis(tmp_path, bottleneck=False)(wav_S), wanted_S, atol=1e-5)
    assert not np.allclose(resynthesis(tmp_path)(wav_S), wanted_S, atol=1e-3)


# all of it


def test_a_table_is_trained_measured_and_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("pesq")
    (tmp_path / "answers").mkdir()
    texts, rng = (
        {"147.flac": "seven", "169.flac": "banana", "a.flac": "green", "b.flac": "seven"},
        np.random.default_rng(0),
    )
    for name in texts:  # the first two are held out
        soundfile.write(tmp_path / "answers" / name, 0.1 * rng.standard_normal(20000), 24000, subtype="PCM_16")
    write_manifest(tmp_path, texts)
    save_whisper(tmp_path / "speech")
    VocoderStage(VocoderOptions(str(tmp_path), vocoder=VocoderConfig(**VOCODER)), seed=0).save(tmp_path / "vocoder")
    options = json.loads(json.dumps(dataclasses.asdict(options_of(str(tmp_path), "rvq", batch_size=2))))
    del options["distillation"]
    run = {"stage": "tokenizer", "output_dir": "unused", "max_steps": 2, "num_threads": 1}
    (tmp_path / "distilled_none.yaml").write_text(yaml.safe_dump(run | {"options": options}))
    teacher = {"cache": str(tmp_path / "targets"), "speech_teacher": str(tmp_path / "speech")}
    delta = {"base": "distilled_none.yaml", "stage": "tokenizer", "options": {"distillation": teacher}}
    (tmp_path / "distilled_sm.yaml").write_text(yaml.safe_dump(delta))

    command = ["--configs", str(tmp_path), "--out", str(tmp_path / "out"), "--seeds", "4", "--calibrate", "0"]
    for again in (False, True):
        with pytest.raises(SystemExit) as stopped:
            main(command)
        shown = capsys.readouterr().out
        assert stopped.value.code == 0, shown
        assert shown.count("finished before") == (2 if again else 0)
    found = json.loads((tmp_path / "out/table.json").read_text())
    assert found["num_answers"] == 2 and list(found["cells"]) == ["original", "vocoder", "none", "sm"]
    assert found["cells"]["original"]["stoi"]["value"] == pytest.approx(1.0, abs=1e-3)
    assert set(found["cells"]["sm"]["difference"]) == {"wer", "wil", "stoi", "pesq"}
    assert (tmp_path / "out/sm/seed_4/final").is_dir() and not found["cells"]["none"].get("difference")
