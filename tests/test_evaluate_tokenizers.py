"""The comparison of tokenizers: aligned versions, paired differences, the ceiling as a floor of zero, honest errors."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from collections.abc import Sequence
from itertools import count, islice
from pathlib import Path

import numpy as np
import pytest
import torch

from flowomni.api import BUNDLED_MODEL
from flowomni.audio import read_audio, write_audio
from flowomni.build import load_model
from flowomni.evaluation import Interval
from flowomni.evaluation.resynthesis import Fidelity, word_information, word_information_interval
from flowomni.evaluation.shifts import SHIFTS
from flowomni.tokenizers import MelTokenizer, MelTokenizerConfig, SpeechTokenizer
from flowomni.tokenizers.autoencoder import MelTokenizerState
from scripts import evaluate_tokenizers
from scripts.tokenizer_conditions import ANSWERS, HUMAN, UNSEEN, conditions, human_digits
from scripts.tokenizer_page import NO_NOISE_DB, png, robustness_figure
from scripts.tokenizer_scores import (
    RATE_HZ,
    Clip,
    Examination,
    Score,
    Version,
    measure,
    measure_speed,
    resynthesise,
    use_of_codes,
)
from tests.tiny import tiny_speech_tokenizer
from training.stages.answers import held_out

needs_flite = pytest.mark.skipif(shutil.which("flite") is None, reason="needs sudo apt-get install flite")
TEXTS = ("monday comes after sunday", "you said three five nine")
VOCODER = {"dim": 16, "intermediate_dim": 16, "num_layers": 2}


def discrete() -> MelTokenizer:
    small = {"latent_dim": 6, "width": 16, "intermediate_dim": 16, "num_encoder_layers": 1, "num_decoder_layers": 1}
    small |= {"frame_width": 8, "num_frame_layers": 1}
    codes = {"bottleneck": "rvq", "num_codebooks": 2, "codebook_size": 16}
    torch.manual_seed(1)
    return MelTokenizer(MelTokenizerConfig(autoencoder=small | codes, vocoder=VOCODER)).eval()


@pytest.fixture(scope="module")
def tokenizers() -> dict[str, SpeechTokenizer]:
    """A continuous and a discrete one with one vocoder."""
    torch.manual_seed(0)
    made = {"vae": tiny_speech_tokenizer().eval(), "rvq": discrete()}
    made["rvq"].vocoder.load_state_dict(made["vae"].vocoder.state_dict())
    return made


def noise(num_samples: int, seed: int = 0) -> np.ndarray:
    return (0.1 * np.random.default_rng(seed).standard_normal(num_samples)).astype(np.float32)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two held-out answers, one that trains, and a question of an unseen voice; flite where it is, else noise."""
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "answers").mkdir()
    names = [*islice((f"{i}.flac" for i in count() if held_out(f"{i}.flac")), 2), "1.flac"]
    assert not held_out("1.flac")
    lines = []
    for index, (name, text) in enumerate(zip(names, (*TEXTS, "two"), strict=True)):
        wav_S = noise(12_000, index)
        if shutil.which("flite"):
            subprocess.run(["flite", "-voice", "slt", "-t", text, "-o", f"{folder}/{index}.wav"], check=True)
            wav_S = read_audio(folder / f"{index}.wav", RATE_HZ).wav_S
        write_audio(folder / "answers" / name, wav_S, RATE_HZ)
        turns = [
            {"role": "user", "text": "what day", "audio": f"answers/{name}"},
            {"role": "assistant", "text": text, "audio": f"answers/{name}"},
        ]
        lines.append({"id": str(index), "voice_group": "unseen" if index == 2 else "trained", "turns": turns})
    (folder / "manifest.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    return folder


@pytest.fixture(scope="module")
def fsdd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fsdd")
    (folder / "recordings").mkdir()
    for digit in range(10):
        for take in (0, 7):
            write_audio(folder / "recordings" / f"{digit}_ann_{take}.wav", np.full(800, 0.05 * take, np.float32), 8000)
    return folder


# --- what is compared -------------------------------------------------------------------------------------------------


def test_conditions_hold_only_speech_that_no_tokenizer_trained_on(corpus: Path, fsdd: Path) -> None:
    found = {each.name: each for each in conditions(corpus, fsdd, 5, seed=0)}
    assert list(found) == [ANSWERS, *(shift.name for shift in SHIFTS[1:]), UNSEEN, HUMAN]
    assert [clip.text for clip in found[ANSWERS].clips] == list(TEXTS)
    assert "two" in found[ANSWERS].words and found[UNSEEN].words == ("day", "what")
    assert [clip.text for clip in found[UNSEEN].clips] == ["what day"]
    clean, slow, noisy = (found[name].clips[0].wav_S for name in (ANSWERS, "speed 0.8", "noise 10 dB"))
    assert len(slow) == pytest.approx(len(clean) / 0.8, abs=1) and len(noisy) == len(clean)
    again = {each.name: each for each in conditions(corpus, fsdd, 5, seed=0)}
    np.testing.assert_array_equal(noisy, again["noise 10 dB"].clips[0].wav_S)


def test_human_digits_are_held_out_takes_in_a_row(fsdd: Path) -> None:
    clips = human_digits(fsdd, 3, seed=0)
    assert len(clips) == 3 and all(len(clip.text.split()) == 4 for clip in clips)
    assert not any(clip.wav_S.any() for clip in clips), "take 7 belongs to the training"
    assert len(clips[0].wav_S) > 4 * 0.1 * RATE_HZ


def test_versions_are_aligned_with_the_original(tokenizers: dict[str, SpeechTokenizer]) -> None:
    clip = Clip("a", "one", noise(10_001))
    found = resynthesise(clip, tokenizers)
    assert [version.name for version in found] == [
        "untouched",
        "vae",
        "vae, its ceiling",
        "rvq",
        "rvq, its ceiling",
    ]
    assert all(len(sound.wav_S) == len(sound.original_S) == 10_001 for sound in found.values())
    ceilings = [found[Version(name, True)].wav_S for name in tokenizers]
    np.testing.assert_array_equal(*ceilings)  # the same vocoder on the same mel
    use = use_of_codes([found], tokenizers)
    assert list(use) == ["rvq"] and len(use["rvq"]) == 2 and use["rvq"][0].num_used >= 1


@needs_flite
def test_resynthesis_owes_no_delay(corpus: Path) -> None:
    """Whatever the look-ahead, sample i comes from sample i: by loudness, with the trained tokenizer in the box."""
    tokenizer = load_model(BUNDLED_MODEL)[0].speech_tokenizer
    spoken = next(iter(conditions(corpus, None, 2, seed=0))).clips
    wav_S = np.concatenate([clip.wav_S for clip in spoken])
    clip = Clip("both", "", wav_S[: len(wav_S) // 120 * 120])
    found = resynthesise(clip, {"box": tokenizer})

    def loudness(wav_S: np.ndarray) -> np.ndarray:
        loud = np.log(wav_S.reshape(-1, 120).std(1) + 1e-3)  # each 5 ms
        return (loud - loud.mean()) / loud.std()

    for version in (Version("box"), Version("box", True)):
        match = np.correlate(loudness(found[version].wav_S), loudness(clip.wav_S), "full")
        delay = int(match.argmax()) - (len(clip.wav_S) // 120 - 1)
        assert abs(delay) <= 2, version  # 10 ms; the look-ahead is 43 ms


# --- scores -----------------------------------------------------------------------------------------------------------


def scored(*heard: Sequence[str]) -> list[dict[Version, Score]]:
    """What was heard of each clip in the untouched audio, the ceiling, and the tokenizer."""
    versions = (Version(), Version("a", True), Version("a"))
    return [
        {
            version: Score(text, dnsmos=3.0 - place, fidelity=Fidelity(1.0 - 0.1 * place, float("nan"), place))
            for place, (version, text) in enumerate(zip(versions, row, strict=True))
        }
        for row in heard
    ]


def test_differences_are_paired_with_the_ceiling_and_the_untouched() -> None:
    clips = [Clip(str(i), "one two", noise(10)) for i in range(3)]
    rows = scored(*[("one two", "one", "x")] * 3)
    found = measure(clips, rows, Version("a"), seed=0)
    assert {name: round(found[name].value, 6) for name in found} == {
        "wer": 1.0,
        "wil": 1.0,
        "stoi": 0.8,
        "mel_distance": 2.0,
        "dnsmos": 1.0,
        "wer_over_untouched": 1.0,
        "wil_over_untouched": 1.0,
        "dnsmos_over_untouched": -2.0,
        "wer_over_ceiling": 0.5,
        "wil_over_ceiling": 0.5,
        "stoi_over_ceiling": -0.1,
        "mel_distance_over_ceiling": 1.0,
        "dnsmos_over_ceiling": -1.0,
    }  # and no PESQ, of which there is none
    assert found["wer_over_ceiling"].low == found["wer_over_ceiling"].high == 0.5
    assert set(measure(clips, rows, Version(), seed=0)) == {"wer", "wil", "dnsmos"}
    assert "wer_over_ceiling" not in measure(clips, rows, Version("a", True), seed=0)


def test_word_information_of_the_same_texts_differs_by_nothing() -> None:
    information = word_information(["a b", "c d e"], ["a x", "c d"])
    same = word_information_interval(information, minus=information)
    assert (same.value, same.low, same.high) == (0, 0, 0)


@needs_flite
def test_workers_change_nothing_and_equal_audio_is_heard_once(
    corpus: Path, tokenizers: dict[str, SpeechTokenizer]
) -> None:
    first = next(iter(conditions(corpus, None, 1, seed=0)))
    sounds = [resynthesise(clip, tokenizers) for clip in first.clips]
    found = []
    for num_workers in (1, 2):
        with Examination(num_workers) as examine:
            found.append(examine(sounds, first.words))
    assert str(found[0]) == str(found[1])  # as text, where NaN equals NaN
    ceilings = [found[0][0][Version(name, True)] for name in tokenizers]
    assert ceilings[0] is ceilings[1]
    assert found[0][0][Version()].heard.split()[:1] == ["monday"]


class Slow(MelTokenizer):
    """Takes 10 ms a step at least, however fast the machine is."""

    def step(self, token_BLX: torch.Tensor, state: MelTokenizerState) -> tuple[torch.Tensor, MelTokenizerState]:
        time.sleep(0.01)
        return super().step(token_BLX, state)


def test_speed_is_by_threads_and_leaves_them_alone() -> None:
    before = torch.get_num_threads()
    slow: dict[str, SpeechTokenizer] = {"slow": Slow(tiny_speech_tokenizer().config).eval()}
    found = measure_speed(slow, noise(24_000), num_threads=(1, 2), num_repeats=1)
    assert torch.get_num_threads() == before
    assert {name: list(speeds) for name, speeds in found.items()} == {"slow": [1, 2]}
    for speed in found["slow"].values():
        assert 0 < speed.stream < 1 / 0.12 and 0 < speed.decode < 1 / 0.01, "a second is 12 tokens"
        assert speed.encode > 0


# --- plots ------------------------------------------------------------------------------------------------------------


def test_curves_stand_side_by_side_and_rise_where_the_words_are_lost(tokenizers: dict[str, SpeechTokenizer]) -> None:
    """Continuous above discrete on one scale; a point a shift, and the unaltered speech at none of it."""
    specs = {name: tokenizer.spec for name, tokenizer in tokenizers.items()}
    shifts = {shift.name: shift for shift in SHIFTS}
    summary = {
        name: {Version(each): {"wer_over_ceiling": Interval(0.1 * place, 0.0, 1.0, 3)} for each in specs}
        for place, name in enumerate(shifts)
    }
    figure = robustness_figure(summary, specs, shifts)
    assert [axes.get_title() for axes in figure.axes] == [
        f"{of}, {kind}" for kind in ("continuous", "discrete") for of in ("pitch", "speed", "noise")
    ]
    pitch, speed, noisy = ((*line.get_xdata(),) for line in (axes.lines[0] for axes in figure.axes[:3]))
    assert (pitch, speed, noisy) == ((-8, -4, 0, 4, 8), (0.8, 1, 1.25), (0, 5, 10, 20, NO_NOISE_DB))
    assert figure.axes[2].lines[0].get_ydata()[0] == pytest.approx(100.0), "0 dB is the last shift"
    assert figure.axes[2].xaxis_inverted() and figure.axes[5].xaxis_inverted()
    assert png(figure).startswith(b"\x89PNG")


# --- command ----------------------------------------------------------------------------------------------------------


@needs_flite
def test_command_compares_tokenizers(
    corpus: Path,
    fsdd: Path,
    tokenizers: dict[str, SpeechTokenizer],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, tokenizer in tokenizers.items():
        tokenizer.save_pretrained(tmp_path / "runs" / "tokenizers" / name / "final")
    arguments = ["--corpus", str(corpus), "--fsdd", str(fsdd), "--num", "1", "--num-workers", "1", "--num-repeats", "0"]
    arguments += ["--no-shifts"]
    assert evaluate_tokenizers.main([*arguments, "--out", "out"]) == 0
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert sorted(found["tokenizers"]) == ["flowomni-tiny", "rvq", "vae"]
    assert found["run"]["tokenizers"]["flowomni-tiny"] == "the model in the box"
    assert found["tokenizers"]["rvq"]["bitrate"] == pytest.approx(2 * 4 * 24_000 / 2048)
    assert found["tokenizers"]["vae"]["speed_by_threads"] == {}
    answers = found["conditions"][ANSWERS]
    assert answers["versions"]["untouched"]["wer"]["value"] <= 0.25
    assert answers["versions"]["vae"]["wer"]["value"] > 0.5, "its weights are random"
    assert set(answers["codebooks"]) == {"rvq"} and len(answers["codebooks"]["rvq"]) == 2
    assert list(found["conditions"]) == [ANSWERS, UNSEEN, HUMAN]

    page = (tmp_path / "out" / "index.html").read_text()
    assert page.count("<img") == 1 and page.count("<audio") == 3 * 6 and "://" not in page
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["bitrate.png", "index.html", "results.json"]
    text = capsys.readouterr().out
    assert "WER over the ceiling's, in points" in text and "look-ahead ms" in text


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["no-name"], "name=path"),
        (["a=no/such/folder"], "no/such/folder: no such folder"),
        (["a=EMPTY"], "no speech tokenizer there"),
        (["a=TINY", "a=TINY"], "two tokenizers are called 'a'"),
        (["a=TINY,codebooks=2"], "num_codebooks=N"),
        (["a=TINY,kind=discrete"], "kind is 'discrete'"),
        (["a=TINY", "--num", "0"], "--num is 0"),
        (["a=TINY", "--corpus", "EMPTY"], "no such manifest"),
        (["a=TINY", "--corpus", "BLANK"], "no conversation"),
        (["a=TINY", "--corpus", "CORPUS", "--fsdd", "EMPTY"], "--fsdd"),
    ],
)
def test_bad_input_is_one_line(
    arguments: list[str], said: str, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = {name: tmp_path / name.lower() for name in ("EMPTY", "TINY", "BLANK")}
    for folder in places.values():
        folder.mkdir()
    tiny_speech_tokenizer().save_pretrained(places["TINY"])
    (places["BLANK"] / "manifest.jsonl").write_text("\n")
    for name, place in (places | {"CORPUS": corpus}).items():
        arguments = [argument.replace(name, str(place)) for argument in arguments]
    assert evaluate_tokenizers.main([*arguments, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and said in error
    assert not (tmp_path / "out").exists()
