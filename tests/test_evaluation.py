"""Evaluation: scores with known values, intervals that cover, a recogniser that hears, a report of a known model."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flowomni.api import Answer, Question
from flowomni.audio import read_audio, resample, write_audio
from flowomni.build import save_model
from flowomni.evaluation import (
    Clip,
    Dnsmos,
    Heard,
    Listener,
    Quality,
    Recogniser,
    bootstrap_interval,
    hear,
    listen,
    right_share,
    word_error_rate,
)
from scripts import evaluate
from scripts.evaluation_page import MAX_PER_FAMILY, in_turns, listening_page
from tests.tiny import tiny_model
from training.manifest import Conversation, read_manifest
from training.talk_text import DIGITS, SORRY, answer_vocabulary

needs_flite = pytest.mark.skipif(shutil.which("flite") is None, reason="needs sudo apt-get install flite")
RATE_HZ = 24_000
WORDS = {"loop": answer_vocabulary(), "open": None}
TEXTS = {  # family, question -> answer
    ("day", "what day comes after sunday"): "monday comes after sunday",
    ("digits", "three five nine"): "you said three five nine",
    ("other", "where is the old table"): SORRY,
}


@pytest.fixture(scope="module")
def spoken(tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    """Text -> its recording by flite slt, as the corpus has it: 24 kHz."""
    folder = tmp_path_factory.mktemp("spoken")
    for index, text in enumerate(TEXTS.values()):
        subprocess.run(["flite", "-voice", "slt", "-t", text, "-o", f"{folder}/{index}.wav"], check=True)
    found = {}
    for index, text in enumerate(TEXTS.values()):
        path = folder / f"{index}.wav"
        write_audio(path, read_audio(path, RATE_HZ).wav_S, RATE_HZ)
        found[text] = read_audio(path, RATE_HZ).wav_S
    return found


@pytest.fixture(scope="module")
def listener() -> Listener:
    return Listener(answer_vocabulary())


# --- scores ---------------------------------------------------------------------------------------------------------


def test_word_errors_are_the_known_ones_by_question() -> None:
    found = word_error_rate(["a b c", "a b", "", "a"], ["a x c d", "", "b b", "a"])
    assert found.errors_N.tolist() == [2, 2, 2, 0]  # substitution + insertion; two deletions; two insertions; none
    assert found.words_N.tolist() == [3, 2, 0, 1]
    assert found.rate == 1.0
    assert word_error_rate([], []).rate == 0.0
    with pytest.raises(ValueError, match="1 references, but 2 hypotheses"):
        word_error_rate(["a"], ["a", "b"])


def test_share_of_right_digits_ignores_other_words_and_pays_for_digits_too_many() -> None:
    right = ["you said one two three"] * 5
    texts = [
        "one two three",
        "you said one nine three",
        "one two",
        "one two three four",
        "so sorry four four four four",
    ]
    right_N, words_N = right_share(right, texts, DIGITS)
    assert right_N.tolist() == [3, 2, 2, 2, 0]
    assert words_N.tolist() == [3] * 5


def test_interval_of_a_mean_is_the_normal_one() -> None:
    values_N = np.random.default_rng(1).normal(5.0, 2.0, 400)
    found = bootstrap_interval(values_N)
    half = 1.96 * values_N.std() / 20
    assert found.value == pytest.approx(values_N.mean())
    assert found.low == pytest.approx(found.value - half, abs=0.15 * half)
    assert found.high == pytest.approx(found.value + half, abs=0.15 * half)
    assert found == bootstrap_interval(values_N)
    assert found != bootstrap_interval(values_N, seed=1)


def test_interval_covers_the_truth_as_often_as_it_says() -> None:
    """Ratio of sums with unequal counts, as in a word error rate: 95 % of 100 experiments, within chance."""
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(100):
        words_N = rng.integers(2, 8, 60)
        errors_N = rng.binomial(words_N, 0.2)
        found = bootstrap_interval(errors_N, words_N)
        assert found.value == pytest.approx(errors_N.sum() / words_N.sum())
        covered += found.low <= 0.2 <= found.high
    assert 87 <= covered <= 99


def test_difference_is_paired() -> None:
    errors_N, words_N = np.arange(20.0), np.full(20, 30.0)
    same = bootstrap_interval(errors_N, words_N, minus=(errors_N, words_N))
    assert (same.value, same.low, same.high) == (0, 0, 0)
    shifted = bootstrap_interval(errors_N + 3, words_N, minus=(errors_N, words_N))
    assert (shifted.value, shifted.low, shifted.high) == pytest.approx((0.1, 0.1, 0.1))


def test_interval_of_nothing_says_so() -> None:
    assert bootstrap_interval(np.zeros(0)).num == 0
    assert bootstrap_interval(np.ones(3), np.zeros(3)).num == 0
    one = bootstrap_interval(np.ones(1))
    assert (one.value, one.low, one.high, one.num) == (1, 1, 1, 1)


# --- recogniser -----------------------------------------------------------------------------------------------------


@needs_flite
def test_hears_clean_speech(listener: Listener, spoken: dict[str, np.ndarray]) -> None:
    heard = [listener((wav_S, RATE_HZ)) for wav_S in spoken.values()]
    assert word_error_rate(list(spoken), [each.loop for each in heard]).rate <= 0.15, heard
    assert word_error_rate(list(spoken), [each.open for each in heard]).rate <= 0.25, heard


@needs_flite
def test_word_loop_says_only_its_words(spoken: dict[str, np.ndarray]) -> None:
    heard = hear(list(spoken.values()), RATE_HZ, ["monday", "five", "apple"])
    assert {word for text in heard for word in text.split()} <= {"monday", "five", "apple"}
    assert any(heard)


@needs_flite
@pytest.mark.parametrize("name", ["loop", "open"])
def test_a_clip_is_heard_as_if_alone(listener: Listener, spoken: dict[str, np.ndarray], name: str) -> None:
    """A running mean of the features would make a result depend on the clips before it."""
    monday, digits, _ = spoken.values()
    recogniser: Recogniser = getattr(listener, name)
    first = recogniser.recognise(monday, RATE_HZ)
    recogniser.recognise(0.02 * digits, RATE_HZ)
    assert recogniser.recognise(monday, RATE_HZ) == first == hear([monday], RATE_HZ, WORDS[name])[0]


@needs_flite
def test_the_rate_of_a_clip_does_not_matter(listener: Listener, spoken: dict[str, np.ndarray]) -> None:
    wav_S = spoken["monday comes after sunday"]
    at_16_khz = listener.loop.recognise(resample(wav_S, RATE_HZ, 16_000), 16_000)
    assert listener.loop.recognise(wav_S, RATE_HZ) == at_16_khz != ""


def test_nothing_is_heard_in_nothing() -> None:
    recogniser = Recogniser(["zero", "one"])
    for wav_S in (np.zeros(0, np.float32), np.ones(1, np.float32), np.zeros(16_000, np.float32)):
        assert recogniser.recognise(wav_S, 16_000) == ""
    with pytest.raises(ValueError, match="NaN"):
        recogniser.recognise(np.full(16_000, np.nan, np.float32), 16_000)


def test_words_without_pronunciation_are_named() -> None:
    with pytest.warns(UserWarning, match="qwxz"):
        assert Recogniser(["one", "qwxz"]).unknown_words == ("qwxz",)
    with pytest.raises(ValueError, match="qwxz"):
        Recogniser(["qwxz"])
    with pytest.raises(ValueError, match="words"):
        Recogniser([])


# --- quality --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seconds", [0.6, 2.3, 9.5, 11.0])
def test_scores_are_those_of_speechmos(seconds: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """speechmos computes its P.808 input with librosa, which is not installed; the P.835 scores do not depend on it."""
    feature = types.SimpleNamespace(melspectrogram=lambda y, **_: np.zeros((120, 900), np.float32))
    librosa = types.ModuleType("librosa")
    librosa.feature, librosa.power_to_db = feature, lambda mel, ref: mel  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "librosa", librosa)
    from speechmos import dnsmos

    rng = np.random.default_rng(0)
    wav_S = (0.1 * rng.standard_normal(int(seconds * 16_000)) * np.hanning(int(seconds * 16_000))).astype(np.float32)
    theirs = dnsmos.run(wav_S, 16_000)
    ours = Dnsmos().score(wav_S, 16_000)
    expected = [theirs["ovrl_mos"], theirs["sig_mos"], theirs["bak_mos"]]
    assert [ours.overall, ours.signal, ours.background] == pytest.approx(expected, abs=1e-4)


@needs_flite
def test_noise_costs_quality(listener: Listener, spoken: dict[str, np.ndarray]) -> None:
    dnsmos, wav_S = listener.dnsmos, spoken["you said three five nine"]
    clean = dnsmos.score(wav_S, RATE_HZ)
    noise_S = np.random.default_rng(0).standard_normal(len(wav_S)).astype(np.float32)
    noisy = dnsmos.score(wav_S + 0.05 * noise_S, RATE_HZ)
    assert clean.overall > 2
    assert noisy.overall < clean.overall - 0.5
    assert noisy.background < clean.background - 0.5


def test_no_sound_gets_the_lowest_score_and_nan_none() -> None:
    dnsmos = Dnsmos()
    assert dnsmos.score(np.zeros(0, np.float32), 16_000) == Quality(1.0, 1.0, 1.0)
    loud_S = 3 * np.sin(np.arange(9_600, dtype=np.float32) / 10)
    assert dnsmos.score(loud_S, 16_000) == dnsmos.score(np.clip(loud_S, -1, 1), 16_000)
    with pytest.raises(ValueError, match="NaN"):
        dnsmos.score(np.full(16_000, np.nan, np.float32), 16_000)


@needs_flite
def test_the_number_of_workers_changes_nothing(listener: Listener, spoken: dict[str, np.ndarray]) -> None:
    clips = [(wav_S, RATE_HZ) for wav_S in spoken.values()][:2]
    assert list(listen(clips, answer_vocabulary(), 2)) == list(map(listener, clips))
    with pytest.raises(ValueError, match="num_workers is 0"):
        list(listen(clips, answer_vocabulary(), 0))


# --- report ---------------------------------------------------------------------------------------------------------


class Parrot:
    """Answers each typed or recorded question with what it was given to say."""

    def __init__(self, says: dict[Any, tuple[str, np.ndarray]]) -> None:
        self.says = says

    def answers(
        self, questions: Sequence[Question], *, speak: bool, batch_size: int, seed: int, sampling: dict[str, Any]
    ) -> list[Answer]:
        assert speak
        said = [self.says[question.audio or question.text] for question in questions]
        return [Answer(text, wav_S, RATE_HZ, 0.0, [], [], 100.0, 1.0) for text, wav_S in said]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory, spoken: dict[str, np.ndarray]) -> list[Conversation]:
    folder = tmp_path_factory.mktemp("corpus")
    lines = []
    for index, ((family, question), answer) in enumerate(TEXTS.items()):
        write_audio(folder / f"{index}.wav", spoken[answer], RATE_HZ)
        turns = [
            {"role": "user", "text": question, "audio": f"{index}.wav"},
            {"role": "assistant", "text": answer, "audio": f"{index}.wav"},
        ]
        group = "unseen" if family == "other" else "trained"
        lines.append({"id": str(index), "split": "test", "family": family, "voice_group": group, "turns": turns})
    (folder / "manifest.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    return read_manifest(folder)


Score = Callable[[dict[Any, tuple[str, np.ndarray]]], list[evaluate.Scored]]


@pytest.fixture(scope="module")
def score(corpus: list[Conversation], listener: Listener) -> Score:
    """What a parrot with given answers scores; no clip is listened to twice."""
    known: dict[bytes, Heard] = {}

    def hear_once(clip: Clip) -> Heard:
        key = clip[0].tobytes()
        if key not in known:
            known[key] = listener(clip)
        return known[key]

    def score(says: dict[Any, tuple[str, np.ndarray]]) -> list[evaluate.Scored]:
        answers, seconds = evaluate.answer_all(Parrot(says), corpus, 2, 0, {})  # type: ignore[arg-type]
        return evaluate.score(corpus, answers, seconds, lambda clips: map(hear_once, clips))

    return score


@needs_flite
def test_a_model_that_plays_the_reference_is_at_the_floor(
    score: Score, corpus: list[Conversation], spoken: dict[str, np.ndarray]
) -> None:
    rows = score({c.question.audio: (c.answer.text, spoken[c.answer.text]) for c in corpus})
    summary = evaluate.summarise(rows)
    assert list(summary) == [
        "all",
        "voice trained",
        "voice unseen",
        "voice trained, held-out families",
        "voice unseen, held-out families",
        "family day",
        "family digits",
        "family other",
    ]
    everything = summary["all"]
    for metric, value in {
        "text_accuracy": 1,
        "digit_accuracy": 1,
        "wer_excess_loop": 0,
        "wer_excess_open": 0,
        "dnsmos_difference": 0,
    }.items():
        each = everything[metric]
        assert (each.value, each.low, each.high) == (value, value, value), metric
    assert everything["wer_own_loop"] == everything["wer_right_loop"] == everything["wer_floor_loop"]
    assert everything["text_accuracy"].num == 3
    assert summary["family day"]["digit_accuracy"].num == 0
    assert summary["voice trained, held-out families"]["text_accuracy"].num == 1


@needs_flite
def test_wrong_and_mute_answers_are_told_apart(
    score: Score, corpus: list[Conversation], spoken: dict[str, np.ndarray]
) -> None:
    """A clear but wrong answer is heard as its own text, not as the right one; a text without a voice is not heard."""
    day, digits, other = corpus
    mute = np.zeros(0, np.float32)
    summary = evaluate.summarise(
        score(
            {
                day.question.audio: (day.answer.text, mute),
                digits.question.audio: ("you said three nine nine", spoken[digits.answer.text]),
                other.question.audio: (day.answer.text, spoken[day.answer.text]),
            },
        )
    )
    assert summary["all"]["text_accuracy"].value == pytest.approx(1 / 3)
    assert summary["family day"]["wer_own_loop"].value == 1
    assert summary["family day"]["dnsmos_answer"].value == 1
    assert summary["all"]["digit_accuracy"].value == pytest.approx(2 / 3)
    assert summary["family other"]["wer_own_loop"].value < 0.5 < summary["family other"]["wer_right_loop"].value


@needs_flite
def test_page_and_results_are_self_contained(
    score: Score, corpus: list[Conversation], spoken: dict[str, np.ndarray], capsys: pytest.CaptureFixture[str]
) -> None:
    rows = score({c.question.audio: ("<b>", spoken[c.answer.text]) for c in corpus}) * 20
    summary = evaluate.summarise(rows)
    run = {"model": "m<i>", "manifest": "c", "split": "test", "num_questions": 60, "batch_size": 2}
    run |= {"device": "cpu", "seed": 0, "sampling": {"num_steps": 4}}
    page = listening_page(run, {"Numbers": (["", "n"], [["all", "3"]])}, rows)
    assert len(page) < 5_000_000
    assert page.count("<audio") == 3 * 3 * MAX_PER_FAMILY
    assert "http" not in page and "<b>" not in page and "m<i>" not in page
    assert [row.item.family for row in in_turns(rows)][:4] == ["day", "digits", "other", "day"]
    found = json.loads(json.dumps(evaluate.results(summary, rows, run), allow_nan=False))
    assert found["groups"]["all"]["text_accuracy"] == {"value": 0.0, "low": 0.0, "high": 0.0, "num": 60}
    assert "digit_accuracy" not in found["groups"]["family day"]
    evaluate.print_tables(summary)
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("family digits") for line in lines) == len(evaluate.TABLES)


def test_chosen_questions_are_spread_over_their_group(tmp_path: Path) -> None:
    turns = [{"role": "user", "text": "q"}, {"role": "assistant", "text": "a"}]
    lines = [
        {"id": str(i), "family": "day", "voice_group": "trained" if i % 4 else "unseen", "turns": turns}
        for i in range(40)
    ]
    (tmp_path / "manifest.jsonl").write_text("\n".join(map(json.dumps, lines)))
    items = read_manifest(tmp_path)
    chosen = evaluate.choose(items, 5)
    assert [c.voice_group for c in chosen].count("unseen") == 5
    assert [int(c.id) for c in chosen if c.voice_group == "unseen"] == [0, 8, 16, 24, 32]
    assert evaluate.choose(items, None) == evaluate.choose(items, 1000) == items
    with pytest.raises(ValueError, match="num_per_group is 0"):
        evaluate.choose(items, 0)


@needs_flite
def test_command_evaluates_a_model(
    corpus: list[Conversation], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_model(*tiny_model(), tmp_path / "model")
    audio = corpus[1].answer.audio
    assert audio is not None
    manifest = audio.parent / "digits.jsonl"
    manifest.write_text((audio.parent / "manifest.jsonl").read_text().splitlines()[1])
    arguments = ["--model", str(tmp_path / "model"), "--manifest", str(manifest), "--num-workers", "1"]
    assert evaluate.main([*arguments, "--out", str(tmp_path / "out"), "--num-steps", "2", "--temperature", "0.5"]) == 0
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert found["run"]["sampling"] == {"num_steps": 2, "temperature": 0.5}
    assert [each["right_answer"] for each in found["questions"]] == ["you said three five nine"]
    assert found["groups"]["all"]["speech_per_sec"]["value"] > 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["index.html", "results.json"]
    assert "family digits" in capsys.readouterr().out

    assert evaluate.main([*arguments, "--out", str(tmp_path / "text"), "--text-only"]) == 0
    written = json.loads((tmp_path / "text" / "results.json").read_text())
    assert set(written["groups"]["all"]) == {"text_accuracy", "digit_accuracy"}
    assert [each["answer_sec"] for each in written["questions"]] == [0.0]
    assert "DNSMOS" not in capsys.readouterr().out

    for extra, said in ((["--split", "valid"], "--split is valid"), (["--solver", "eulr"], "eulr")):
        assert evaluate.main([*arguments, "--out", str(tmp_path / "bad"), *extra]) == 2
        error = capsys.readouterr().err.splitlines()
        assert error[-1].startswith("error: ") and said in error[-1], error


def test_a_missing_model_or_corpus_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path, arguments in (
        (tmp_path / "manifest.jsonl", ["--manifest", str(tmp_path / "manifest.jsonl")]),
        (tmp_path / "broken.jsonl", ["--manifest", str(tmp_path / "broken.jsonl")]),
    ):
        if path.name == "broken.jsonl":
            path.write_text('{"id": 1}\n')
        assert evaluate.main([*arguments, "--out", str(tmp_path / "out")]) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"error: {path}") and error.count("\n") == 1
    assert not (tmp_path / "out").exists()
