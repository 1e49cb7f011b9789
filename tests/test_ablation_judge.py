"""The judge of ablations: paired intervals, the same questions for all, what is kept, what is asked again, a report."""

from __future__ import annotations

import dataclasses
import json
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from flowomni.api import FlowOmni
from flowomni.audio import read_audio
from flowomni.build import save_model
from flowomni.evaluation import bootstrap_interval
from flowomni.evaluation.shifts import Shift
from flowomni.evaluation.speaker import SpeakerEncoder
from scripts.ablate import main
from scripts.ablation_grid import Grid, check, read_grid
from scripts.ablation_judge import Judge, distance
from scripts.ablation_questions import JudgeOptions, questions_of
from scripts.ablation_scores import SCORES, compare, difference, ended_early, excludes_zero, interval_of
from scripts.ablation_voice import HEAD, TOKENIZER, measure_cost, through_the_voice
from tests.grids import DELAY, tiny_stage, write
from tests.tiny import tiny_model
from training.manifest import read_manifest

WER = SCORES["wer_own"]
Rows = dict[int, list[dict[str, Any]]]


# --------------------------------------------------------------------------------------------------------------- scores


def answers(errors: dict[int, list[float]]) -> Rows:
    """Of each training seed, answers of ten words with so many errors."""
    return {
        seed: [{"id": str(i), "own_errors": each, "own_words": 10.0} for i, each in enumerate(some)]
        for seed, some in errors.items()
    }


def test_with_one_seed_it_is_the_bootstrap_over_questions() -> None:
    errors_N = np.array([3.0, 0.0, 7.0, 1.0])
    found = compare(WER, answers({4: errors_N.tolist()}), None)
    assert found.value == bootstrap_interval(errors_N, np.full(4, 10.0)) and found.difference is None


def test_differences_are_paired() -> None:
    """What is hard for both cancels: a cell with one error a question more has exactly that difference, always."""
    rng = np.random.default_rng(0)
    hard = rng.integers(0, 9, (2, 12)).astype(float)
    own, other = (answers({seed: (hard[seed] + more).tolist() for seed in (0, 1)}) for more in (1.0, 0.0))
    found = compare(WER, own, other).difference
    assert found is not None and found.low == pytest.approx(0.1) and found.high == pytest.approx(0.1)
    assert excludes_zero(found) and not excludes_zero(difference(WER, own, own))
    doubled = answers({seed: (2 * hard[seed]).tolist() for seed in (0, 1)})
    relative = difference(WER, doubled, other, relative=True)
    assert (relative.value, relative.low, relative.high) == pytest.approx((1.0, 1.0, 1.0))


def test_seeds_are_drawn_too() -> None:
    """Questions that are all alike leave the seeds as the only doubt: the interval reaches from one to the other."""
    found = compare(WER, answers({0: [1.0] * 8, 1: [5.0] * 8}), None).value
    assert (found.value, found.low, found.high) == pytest.approx((0.3, 0.1, 0.5))


def test_pairs_are_made_of_what_both_have() -> None:
    found = compare(WER, answers({0: [1, 2, 3], 1: [1, 1, 1]}), answers({1: [2, 2], 2: [9, 9]}))
    assert found.seeds == (0, 1) and found.paired_seeds == (1,)
    assert found.difference is not None and found.difference.num == 2
    assert (found.difference.low, found.difference.high) == pytest.approx((-0.1, -0.1))
    apart = compare(WER, answers({0: [1]}), answers({1: [1]})).difference
    assert apart is not None and apart.num == 0, "no seed that both have"


def test_samples_of_a_question_belong_together() -> None:
    rows = [{"id": "a", "own_errors": each, "own_words": 10.0} for each in (0.0, 10.0)]
    found = compare(WER, {0: rows}, None).value
    assert (found.value, found.low, found.high, found.num) == (0.5, 0.5, 0.5, 1)


def test_a_rate_over_nothing_is_none() -> None:
    assert interval_of(WER, np.zeros((2, 1, 3))).num == 0
    relative = difference(WER, answers({0: [1, 1]}), answers({0: [0, 0]}), relative=True)
    assert relative.num == 0, "no share of no errors"


@pytest.mark.parametrize(
    ("changes", "early"),
    [
        ({}, 0.0),
        ({"answer_sec": 0.9}, 1.0),  # below half, whatever was heard
        ({"answer_sec": 1.4, "heard": "three plus"}, 1.0),
        ({"answer_sec": 1.4}, 0.0),  # quick, but the last word is there
        ({"answer_sec": 1.4, "heard": "three plus", "stopped": False}, 0.0),
        ({"text": "three plus two"}, None),
        ({"text": ""}, None),
    ],
)
def test_what_stops_early(changes: dict[str, Any], early: float | None) -> None:
    row = {"text": "three plus one", "right": "three plus one", "heard": "three plus one", "stopped": True}
    assert ended_early({**row, "answer_sec": 2.0, "reference_sec": 2.0, **changes}) == early


def test_distance_of_samples() -> None:
    rng = np.random.default_rng(0)
    wav_S = (0.1 * np.sin(np.arange(24_000) / 10)).astype(np.float32)
    noise_S = (0.1 * rng.standard_normal(20_000)).astype(np.float32)
    assert distance(wav_S, wav_S, 24_000) == 0.0
    near, far = distance(wav_S, wav_S[:20_000], 24_000), distance(wav_S, noise_S, 24_000)
    assert near is not None and far is not None and 0 < near < far / 4
    assert distance(wav_S, wav_S[:0], 24_000) is None


# ------------------------------------------------------------------------------------------------------------ questions


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The tiny stage, with test questions that are heard in trained and in unseen voices."""
    folder = tmp_path_factory.mktemp("judge")
    found = tiny_stage(folder)
    rng = np.random.default_rng(0)
    soundfile.write(folder / "q.wav", 0.1 * rng.standard_normal(8_000), 16_000)
    lines = (folder / "manifest.jsonl").read_text().splitlines()
    for index, word in enumerate(("one", "two", "three", "two")):
        asks = {"role": "user", "text": f"say {word}", "audio": "q.wav", "duration_sec": 0.5}
        says = {"role": "assistant", "text": word, "audio": "a.wav", "duration_sec": 0.2}
        line = {"id": f"test-{index}", "split": "test", "family": "say", "turns": [asks, says]}
        line["voice_group"] = "unseen" if index == 3 else "trained"
        lines.append(json.dumps(line))
    (folder / "manifest.jsonl").write_text("\n".join(lines))
    found["options"]["tasks"] = {"speak": 0.5, "speech_to_speech": 0.5}
    return found


def test_all_are_asked_the_same(stage: dict[str, Any]) -> None:
    manifest = stage["options"]["manifest"]
    options = JudgeOptions(num_questions=3, num_shifted=2, num_samples=3)
    kinds = ("speak", "typed", "heard", "shifts", "unseen voices", "unseen humans")
    found, again = (questions_of(options, manifest, kinds) for _ in range(2))
    by_name = {condition.name: condition for condition in found}
    assert "unseen humans" not in by_name, "there are no recordings of them"
    assert [item.answer.text for item in by_name["speak"].items].count("two") == 1, "each text once"
    assert [c.num_samples for c in found] == [3, *[1] * (len(found) - 1)]
    assert by_name["unseen voices"].ids == ["test-3"] and "test-3" not in by_name["heard"].ids
    for one, other in zip(found, again, strict=True):
        assert one.ids == other.ids
        for question, same in zip(one.questions, other.questions, strict=True):
            if one.shift is not None:
                assert np.array_equal(question.audio[0], same.audio[0])  # type: ignore[index]
    noisy, clean = by_name["noise 0 dB"].questions, by_name["noise 20 dB"].questions
    assert noisy[0].audio[0].std() > 1.2 * clean[0].audio[0].std()  # type: ignore[index, union-attr]
    assert not any(item.family != "say" for c in questions_of(options, manifest, kinds, ["say"]) for item in c.items)
    assert any(item.family != "say" for c in found for item in c.items)
    with pytest.raises(ValueError, match="no answer of split 'valid2'|no conversation of split"):
        questions_of(JudgeOptions(split="valid2"), manifest, kinds)


# ---------------------------------------------------------------------------------------------------------------- grids


def grid_file(folder: Path, stage: dict[str, Any], cells: dict[str, Any], **values: Any) -> Path:
    write(folder / "base.yaml", stage)
    judge = {"num_questions": 2, "num_shifted": 1, "num_quality": 1, "num_turns": 1, "conditions": ["speak", "heard"]}
    content = {"base": "base.yaml", "seeds": [0], "folder": str(folder / "runs"), "cells": cells, "judge": judge}
    return write(folder / "grid.yaml", content | values)


JUMP = {"options.parts.head": {"kind": "flow", "width": 64, "num_blocks": 1, "objective": "lsd"}}


def finish(grid: Grid, *runs: tuple[str, int]) -> None:
    """Runs that are trained, all to the same model."""
    model, processor = tiny_model()
    for name, seed in runs:
        save_model(model, processor, grid.run_folder(grid.cell(name), seed) / "final")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"judge": {"num_question": 2}}, "judge.num_question: unknown key; did you mean 'num_questions'"),
        ({"judge": {"conditions": ["herd"]}}, "judge.conditions has 'herd'"),
        ({"judge": {"num_samples": 0}}, "judge.num_samples is 0"),
        ({"pair": ["flow"]}, "pair is .*two different cells of flow, jump"),
        ({"cells": {"flow": {"sampling": 3}}}, "cells.flow.sampling is 3"),
    ],
)
def test_a_bad_judge_is_named(tmp_path: Path, stage: dict[str, Any], values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"grid.yaml: .*{message}"):
        read_grid(grid_file(tmp_path, stage, **({"cells": {"flow": {}, "jump": {"set": JUMP}}} | values)))


def test_sampling_that_the_head_does_not_know_is_refused(tmp_path: Path, stage: dict[str, Any]) -> None:
    cells = {"flow": {"sampling": {"num_step": 4}}, "jump": {"set": JUMP, "sampling": {"solver": "map"}}}
    [problem] = check(read_grid(grid_file(tmp_path, stage, cells)))[1]
    assert "cell flow: sampling.num_step: unknown key; did you mean 'num_steps'" in problem


def test_cells_may_differ_in_their_sampling_alone(tmp_path: Path, stage: dict[str, Any]) -> None:
    cells = {"flow": {}, "cold": {"sampling": {"temperature": 0.5}}}
    assert not check(read_grid(grid_file(tmp_path, stage, cells)))[1]


def test_a_grid_is_judged_and_reported(
    tmp_path: Path, stage: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """Two cells with one model and one sampling differ by nothing; what is judged is not judged again; what is not
    finished is named."""
    once = {"num_steps": 1}
    cells = {"flow": {"seeds": [0, 1], "sampling": once}, "jump": {"set": JUMP, "sampling": once}}
    judge = {"num_questions": 2, "num_shifted": 1, "num_quality": 1, "num_turns": 1, "batch_size": 4}
    judge["conditions"] = ["speak", "heard", "shifts", "unseen voices", "voice"]
    file = grid_file(tmp_path, stage, cells, judge=judge, pair=["flow", "jump"])
    grid = read_grid(file)
    finish(grid, ("flow", 0), ("jump", 0))
    with pytest.raises(SystemExit) as stopped:
        main(["--config", str(file), "--judge-only", "--num-workers", "1"])
    assert stopped.value.code == 1, "a run is missing"
    shown = capsys.readouterr().out
    assert (
        "to judge: 3 runs (1 not trained yet)" in shown
        and "Left out: flow, seed 1: its training is not finished." in shown
    )

    found = json.loads((grid.folder / "report.json").read_text())
    heard = found["conditions"]["heard"]
    assert heard["num_questions"] == 2 and heard["recordings"]["wer_right"]["num"] == 2
    for condition in (*found["conditions"].values(), *found["voice"].values()):
        for each in condition["cells"]["jump"].values():
            if each["difference"] is not None:
                assert (each["difference"]["low"], each["difference"]["high"]) == (0, 0)
                assert each["value"]["low"] <= each["value"]["value"] <= each["value"]["high"]
    assert {"speak", "noise 5 dB", "pitch -8", "unseen voices"} <= set(found["conditions"])
    assert {f"none/{TOKENIZER}", f"pitch +4/{HEAD}"} <= set(found["voice"])
    assert found["pair"]["cells"] == ["flow", "jump"] and "heard" in found["pair"]["conditions"]
    assert all(cell["cost"]["head"] > 0 for cell in found["cells"].values())
    assert found["says"]["supported"] == [
        "Nothing: none of the differences named here has an interval that excludes zero."
    ]
    assert any(text.startswith("Of one training seed: flow, jump") for text in found["says"]["limits"])
    page = (grid.folder / "report.html").read_text()
    assert "<h2>flow against jump</h2>" in page and "data:audio/flac" in page and "http" not in page

    cells_, _, _ = check(grid)
    assert not Judge(grid, cells_, 1).tasks()
    one = grid.run_folder(grid.cell("jump"), 0) / "judged/heard.json"
    one.unlink()
    [task] = Judge(grid, cells_, 1).tasks()
    assert [c.name for c in task.conditions] == ["heard"] and not task.with_voice, "an interrupted judgement goes on"
    cooler = [dataclasses.replace(cell, sampling={"temperature": 0.1}) for cell in grid.cells]
    tasks = Judge(dataclasses.replace(grid, cells=tuple(cooler)), cells_, 1).tasks()
    assert [len(t.conditions) for t in tasks] == [len(found["conditions"])] * 2, "another sampling, another answer"
    fewer = dataclasses.replace(grid.judge, conditions=["heard", "noise 5 dB"])
    asked = Judge(dataclasses.replace(grid, judge=fewer), cells_, 1).conditions
    assert [c.name for c in asked] == ["heard", "noise 5 dB"]


# ---------------------------------------------------------------------------------------------------------------- voice


@pytest.mark.parametrize("kind", ["continuous", "discrete"])
def test_an_altered_voice_comes_back_as_long_as_it_was(stage: dict[str, Any], kind: str) -> None:
    item = read_manifest(stage["options"]["manifest"], "test")[0]
    codes = str(Path(stage["options"]["manifest"]) / "codes")
    parts: dict[str, Any] = {"speech_tokenizer": codes, "head": DELAY} if kind == "discrete" else {}
    omni = FlowOmni(*tiny_model(**parts))
    for shift in (Shift("none"), Shift("speed", 0.8)):
        found = through_the_voice(omni, item, shift, {}, "speak")
        lengths = {name: len(wav_S) for name, wav_S in found.items()}
        assert lengths == dict.fromkeys((TOKENIZER, HEAD), round(4_800 / (shift.amount or 1)))
        assert all(np.isfinite(wav_S).all() for wav_S in found.values())


def test_every_turn_of_the_timing_is_kept() -> None:
    omni = FlowOmni(*tiny_model())
    found = measure_cost({"two": (omni, {"num_steps": 2}), "one": (omni, {"num_steps": 1})}, "one", 2)
    for cost in found.values():
        for kind in ("head", "whole"):
            assert len(cost[f"{kind}_turns"]) == 2 and cost[kind] == np.mean(cost[f"{kind}_turns"]) > 0


@pytest.mark.skipif(find_spec("resemblyzer") is None, reason="needs pip install --no-deps resemblyzer")
@pytest.mark.skipif(shutil.which("flite") is None, reason="needs sudo apt-get install flite")
def test_a_speaker_is_more_like_himself(tmp_path: Path) -> None:
    import subprocess

    encoder, found = SpeakerEncoder(), {}
    for voice in ("slt", "rms"):
        for text in ("monday comes after sunday", "the answer to your question is seven"):
            file = tmp_path / "a.wav"
            subprocess.run(["flite", "-voice", voice, "-t", text, "-o", str(file)], check=True)
            found[voice, text] = encoder.embed(read_audio(file, 16_000).wav_S, 16_000)
    (a, b), (c, d) = [[found[voice, text] for text in dict.fromkeys(t for _, t in found)] for voice in ("slt", "rms")]
    assert a is not None and b is not None and c is not None and d is not None
    assert min(a @ b, c @ d) > max(a @ c, a @ d, b @ c, b @ d) + 0.1
    assert encoder.embed(np.zeros(16_000, np.float32), 16_000) is None
