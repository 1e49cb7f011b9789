"""The talk corpus: right answers, an honest held-out split, and audio that depends on (seed, id) alone."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile

from scripts import make_talk_corpus as corpus
from training import talk_text
from training.manifest import read_manifest
from training.talk_text import FAMILIES, HELD_OUT_FAMILIES, Pair, corpus_pairs, number_words, sample_pair

NUMBERS = {number_words(n): n for n in range(-999, 1000)}
MISSING = [packages for program, packages in corpus.PACKAGES.items() if shutil.which(program) is None]
needs_synthesisers = pytest.mark.skipif(bool(MISSING), reason=f"needs sudo apt-get install {' '.join(MISSING)}")


def samples(split: str, count: int, seed: int = 0) -> list[Pair]:
    rng = random.Random(seed)
    return [sample_pair(rng, split) for _ in range(count)]


# --- text -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n", "words"),
    [
        (0, "zero"),
        (13, "thirteen"),
        (40, "forty"),
        (99, "ninety nine"),
        (100, "one hundred"),
        (105, "one hundred five"),
        (144, "one hundred forty four"),
        (-4, "minus four"),
    ],
)
def test_number_words(n: int, words: str) -> None:
    assert number_words(n) == words


def test_numbers_have_distinct_words_and_a_range() -> None:
    assert len(NUMBERS) == 1999
    with pytest.raises(ValueError, match="1000"):
        number_words(1000)


def test_arithmetic_is_right() -> None:
    seen: Counter[str] = Counter()
    for pair in samples("train", 3000):
        if pair.family not in ("plus", "minus", "times"):
            continue
        left, right = pair.question.removeprefix("what is ").split(f" {pair.family} ")
        expression, value = pair.answer.split(" is ")
        assert expression == f"{left} {pair.family} {right}"
        a, b = NUMBERS[left], NUMBERS[right]
        assert NUMBERS[value] == {"plus": a + b, "minus": a - b, "times": a * b}[pair.family]
        assert min(a, b) >= 0 and max(a, b) <= (12 if pair.family == "times" else 99)
        seen[pair.family] += 1
    assert min(seen.values()) > 150


def test_digit_lists_are_heard_and_added() -> None:
    lengths = defaultdict(set)
    for pair in samples("test", 3000):
        if pair.family == "digits":
            assert pair.answer == f"you said {pair.question}"
            lengths["digits"].add(len(pair.question.split()))
        if pair.family == "add":
            values = [talk_text.DIGITS.index(word) for word in pair.question.split()[1:]]
            assert pair.answer == f"they add up to {number_words(sum(values))}"
            lengths["add"].add(len(values))
        if pair.family == "say":
            assert pair.question == f"say {pair.answer}"
            assert 2 <= len(pair.answer.split()) <= 6
    assert lengths == {"digits": {3, 4, 5, 6}, "add": {2, 3, 4, 5, 6}}


def test_calendar_goes_round() -> None:
    answers = {pair.question: pair.answer for pair in samples("train", 5000)}
    assert answers["what day comes after sunday"] == "monday comes after sunday"
    assert answers["what month comes before january"] == "december comes before january"
    assert sum(question.startswith("what day comes") for question in answers) == 14
    assert sum(question.startswith("what month comes") for question in answers) == 24


def test_word_lists_have_their_sizes_and_every_question_one_answer() -> None:
    assert len(talk_text.WORDS) == len(set(talk_text.WORDS)) == 300
    for facts in (talk_text.OPPOSITES, talk_text.CAPITALS, talk_text.COLORS):
        assert len(facts) == len({name for name, _ in facts}) == 40
    answers = defaultdict(set)
    for pair in samples("train", 20_000):
        answers[pair.question].add(pair.answer)
    assert all(len(known) == 1 for known in answers.values())


def test_vocabulary_covers_every_text() -> None:
    asked, answered = set(talk_text.vocabulary()), set(talk_text.answer_vocabulary())
    for pair in samples("train", 5000) + samples("test", 2000):
        assert set(pair.question.split()) <= asked
        assert set(pair.answer.split()) <= answered <= asked
        assert pair.question == pair.question.lower()


def test_a_tenth_of_arithmetic_is_held_out_from_unlimited_training_text() -> None:
    for family, size in (("plus", 100), ("minus", 100), ("times", 13)):
        questions = [f"what is {number_words(a)} {family} {number_words(b)}" for a in range(size) for b in range(size)]
        share = sum(talk_text.is_held_out(family, question) for question in questions) / len(questions)
        assert 0.08 < share < 0.15, family
        assert {talk_text.split_of(family, question) for question in questions} == set(talk_text.SPLITS)
    assert not any(talk_text.is_held_out(pair.family, pair.question) for pair in samples("train", 20_000))
    held_out = [pair for pair in samples("test", 3000) if pair.family in HELD_OUT_FAMILIES and pair.question]
    assert all(talk_text.is_held_out(pair.family, pair.question) for pair in held_out)


def test_no_tested_question_or_digit_sequence_is_in_training() -> None:
    pairs = corpus_pairs(6000, seed=3)
    content = defaultdict(set)
    for pair in pairs:
        if pair.family in HELD_OUT_FAMILIES and pair.question:
            kind = "digits" if pair.family in ("digits", "add") else pair.family
            content[pair.split].add((kind, pair.question.removeprefix("add ") if kind == "digits" else pair.question))
    assert min(len(known) for known in content.values()) > 30
    assert not content["train"] & (content["test"] | content["valid"])
    assert not content["valid"] & content["test"]


def test_the_held_out_set_never_changes() -> None:
    """A different hash would make every trained model's test questions known to it."""
    known = {
        "what is zero plus zero": "train",
        "what is three times eight": "valid",
        "what is one plus two": "test",
        "what is two times two": "test",
        "what is zero minus four": "test",
    }
    assert {question: talk_text.split_of(question.split()[3], question) for question in known} == known


def test_corpus_pairs_are_a_function_of_the_seed_and_balanced() -> None:
    pairs = corpus_pairs(2400, seed=0)
    assert pairs == corpus_pairs(2400, seed=0)
    assert pairs != corpus_pairs(2400, seed=1)
    assert Counter(pair.split for pair in pairs) == {"train": 2270, "valid": 30, "test": 100}
    cells = Counter((pair.family, pair.voice_group) for pair in pairs if pair.split == "test")
    assert len(cells) == 2 * len(FAMILIES) + 2
    assert max(cells.values()) <= 2 * min(cells.values()) + 2
    assert {pair.voice_group for pair in pairs if pair.split == "train"} == {"trained", "human"}
    assert not any(pair.voice_group.endswith("human") for pair in corpus_pairs(2400, seed=0, with_human=False))
    more = corpus_pairs(2400, seed=0, num_lists=200)
    assert more[:2400] == pairs and {pair.family for pair in more[2400:]} == {"say", "digits", "add"}
    assert not any(talk_text.is_held_out(pair.family, pair.question) for pair in more[2400:])


@pytest.mark.parametrize("call", [lambda: sample_pair(random.Random(0), "dev"), lambda: corpus_pairs(10, seed=0)])
def test_wrong_arguments_are_named(call: Callable[[], object]) -> None:
    with pytest.raises(ValueError, match="split is 'dev'|num_pairs is 10"):
        call()


# --- voices and variation ---------------------------------------------------------------------------------------------


def test_held_out_voices_never_train() -> None:
    voices = defaultdict(set)
    for question in corpus.plan_questions(6000, seed=0, with_human=True):
        voices[question.pair.split].add(question.voice)
    unseen = set(corpus.UNSEEN_VOICES) | set(corpus.UNSEEN_HUMAN_SPEAKERS)
    assert len(corpus.TRAINED_VOICES) >= 10
    assert set(corpus.TRAINED_VOICES) | set(corpus.HUMAN_SPEAKERS) <= voices["train"]
    assert not unseen & (voices["train"] | voices["valid"])
    assert unseen <= voices["test"]


def recordings(folder: Path) -> Path:
    """Ten takes of each digit by each speaker: a low tone for the held-out takes, a high one for the others."""
    folder.mkdir()
    time_S = np.arange(1600) / 8000
    for speaker in corpus.HUMAN_SPEAKERS + corpus.UNSEEN_HUMAN_SPEAKERS:
        for take in range(10):
            wav_S = 0.3 * np.sin(2 * np.pi * (500 if take < corpus.NUM_HELD_OUT_TAKES else 1500) * time_S)
            for digit in range(10):
                soundfile.write(folder / f"{digit}_{speaker}_{take}.wav", wav_S, 8000)
    return folder


def test_held_out_takes_never_train(tmp_path: Path) -> None:
    folder = recordings(tmp_path / "takes")
    for split, lowest_hz, highest_hz in (("train", 1400, 1600), ("test", 400, 600)):
        pair = Pair("digits", "one two three nine", "you said one two three nine", split, "human")
        question = corpus.Question(f"{split}-000000", pair, "jackson", seed=0)
        for seed in range(5):
            wav_S, rate = corpus._speak_human(question, folder, np.random.default_rng(seed))
            power = np.abs(np.fft.rfft(wav_S)) ** 2
            hz = np.fft.rfftfreq(len(wav_S), 1 / rate)
            assert power[(hz > lowest_hz) & (hz < highest_hz)].sum() > 0.9 * power.sum()


def test_recordings_are_found_or_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert corpus.find_fsdd(recordings(tmp_path / "takes")) == tmp_path / "takes"
    (tmp_path / "takes" / "9_theo_9.wav").unlink()
    for path in (tmp_path / "takes").glob("3_nicolas_*.wav"):
        path.unlink()
    with pytest.raises(corpus.CorpusError, match="--fsdd"):
        corpus.find_fsdd(tmp_path / "takes")
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    assert corpus.find_fsdd(None) is None
    assert "no digits read by people" in capsys.readouterr().out


def test_variation_is_audible_bounded_and_a_function_of_the_generator() -> None:
    plain_S = np.sin(2 * np.pi * 220 * np.arange(22_050) / 22_050).astype(np.float32)
    varied = [corpus.vary(plain_S, 22_050, np.random.default_rng(seed)) for seed in range(40)]
    assert np.array_equal(varied[7], corpus.vary(plain_S, 22_050, np.random.default_rng(7)))
    for wav_S in varied:
        assert np.isfinite(wav_S).all() and np.abs(wav_S).max() <= 1.0
        assert 16_000 * (1 / 1.15 + 0.03) < len(wav_S) < 16_000 * (1 / 0.9 + 0.81)
    levels = [20 * np.log10(np.sqrt(np.mean(wav_S**2))) for wav_S in varied]
    assert max(levels) - min(levels) > 10


@pytest.mark.parametrize("kind", ["white", "pink", "babble"])
def test_noise_has_unit_power_and_its_color(kind: str) -> None:
    noise_S = corpus.make_noise(kind, 32_000, np.random.default_rng(0))
    assert np.mean(noise_S**2) == pytest.approx(1.0, rel=1e-3)
    power = np.abs(np.fft.rfft(noise_S)) ** 2  # 0.5 Hz a bin
    low, high = power[200:4000].mean(), power[10_000:16_000].mean()
    assert (low / high < 1.5) if kind == "white" else (low / high > 3)


# --- the whole corpus -------------------------------------------------------------------------------------------------

NUM_PAIRS, NUM_LISTS, NUM_TYPED = 80, 6, 5


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A small corpus, and the recordings it was made with."""
    folder = tmp_path_factory.mktemp("talk")
    fsdd = recordings(folder / "takes")
    corpus.make_corpus(folder / "corpus", NUM_PAIRS, seed=0, fsdd=fsdd, num_lists=NUM_LISTS, num_typed=NUM_TYPED)
    return folder / "corpus", fsdd


def manifest(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]


@needs_synthesisers
def test_manifest_tells_the_truth(made: tuple[Path, Path]) -> None:
    read_manifest(made[0], "train")  # takes every line
    lines = manifest(made[0])
    typed = [line for line in lines if line["family"] == "typed"]
    assert len(typed) == NUM_TYPED and not any("audio" in turn for line in typed for turn in line["turns"])
    lines = [line for line in lines if line not in typed]
    assert len(lines) == NUM_PAIRS + NUM_LISTS
    assert len({line["turns"][0]["audio"] for line in lines}) == len(lines)
    for line in lines:
        assert list(line) == ["id", "split", "family", "voice", "voice_group", "turns"]
        assert line["family"] in FAMILIES
        for turn, rate in zip(line["turns"], (16_000, 24_000), strict=True):
            found = soundfile.info(made[0] / turn["audio"])
            assert (found.samplerate, found.channels, found.subtype) == (rate, 1, "PCM_16")
            assert found.duration == pytest.approx(turn["duration_sec"], abs=1e-3)
            assert 0.3 < found.duration < 12
    files = {turn["audio"]: turn["text"] for line in lines for turn in line["turns"] if turn["role"] == "assistant"}
    assert len(files) == len(set(files.values())) == len(list((made[0] / "answers").iterdir()))
    stats = json.loads((made[0] / "stats.json").read_text())
    assert stats["splits"]["train"]["family"] == Counter(line["family"] for line in lines if line["split"] == "train")


@needs_synthesisers
def test_a_stopped_run_goes_on_to_the_same_bytes(made: tuple[Path, Path]) -> None:
    """And only what is missing is spoken: with two processes, where the first run had one."""
    folder, fsdd = made
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    removed = [folder / turn["audio"] for line in manifest(folder)[:NUM_PAIRS:8] for turn in line["turns"]]
    kept = {path: path.stat().st_mtime_ns for path in before if path.suffix == ".flac" and path not in removed}
    for path in {*removed, folder / "manifest.jsonl"}:
        path.unlink()
    corpus.make_corpus(folder, NUM_PAIRS, seed=0, fsdd=fsdd, num_workers=2, num_lists=NUM_LISTS, num_typed=NUM_TYPED)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    assert {path: path.stat().st_mtime_ns for path in kept} == kept


@needs_synthesisers
def test_a_folder_holds_one_corpus(made: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    command = ["--out", str(made[0]), "--num-pairs", str(NUM_PAIRS), "--fsdd", str(made[1]), "--num-workers", "1"]
    assert corpus.main([*command, "--seed", "1"]) == 2
    assert "choose another --out" in capsys.readouterr().err


@needs_synthesisers
@pytest.mark.parametrize("voice", [*corpus.TRAINED_VOICES, *corpus.UNSEEN_VOICES])
def test_every_voice_speaks(voice: str, tmp_path: Path) -> None:
    (tmp_path / "questions/train").mkdir(parents=True)
    pair = Pair("digits", "one two three", "you said one two three")
    question = corpus.Question("train-000000", pair, voice, seed=0)
    corpus.speak_questions([question], tmp_path, None)
    wav_S, _ = soundfile.read(tmp_path / question.path)
    assert 0.6 < len(wav_S) / 16_000 < 4
    assert np.sqrt(np.mean(wav_S**2)) > 0.005


def test_a_missing_synthesiser_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", os.fspath(tmp_path))
    assert corpus.main(["--out", str(tmp_path / "talk"), "--num-pairs", "80"]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert "flite is missing" in message and "sudo apt-get install flite" in message
    assert not (tmp_path / "talk").exists()
