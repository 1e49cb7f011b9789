"""The manifest: what is read, what is refused and why, how conversations become examples and batches."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from training.batching import budget_batches, length_batches
from training.check import check_manifest, histogram, text_check
from training.manifest import Conversation, Word, examples, parse_line, read_manifest
from training.prepare import main
from training.recordings import Clip, read_recording
from training.text_tokenizer import build_text_tokenizer

USER = {"role": "user", "text": "hello"}
SAYS = {"role": "assistant", "text": "hello to you"}


def conversation(*turns: dict[str, Any], **values: Any) -> dict[str, Any]:
    return {"id": "a", "turns": list(turns or (USER, SAYS)), **values}


def parsed(*turns: dict[str, Any]) -> Conversation:
    return parse_line(json.dumps(conversation(*turns)), Path("corpus"))


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two seconds of stereo (a tone on the left, noise on the right) and a text file called audio."""
    folder = tmp_path_factory.mktemp("sound")
    rng = np.random.default_rng(0)
    left_S = 0.5 * np.sin(2 * np.pi * 440 * np.arange(32_000) / 16_000)
    soundfile.write(folder / "stereo.wav", np.stack([left_S, 0.1 * rng.standard_normal(32_000)], 1), 16_000)
    (folder / "notes.wav").write_text("no audio at all")
    return folder


# ------------------------------------------------------------------------------------------------------------ reading


def test_turns_hold_what_the_line_says() -> None:
    clip = {"path": "a.wav", "channel": 1, "start_sec": 2.0, "end_sec": 3.5}
    words = [["hello", 0.1, 0.4], ["you", 0.4, 0.9]]
    item = parsed(
        {**USER, "audio": clip, "speaker": "anna", "words": words}, {**SAYS, "audio": "b.wav", "duration_sec": 2}
    )
    user, says = item.turns
    assert user.audio == Clip(Path("corpus/a.wav"), 1, 2.0, 3.5) and user.duration_sec == 1.5
    assert user.speaker == "anna" and user.words == (Word("hello", 0.1, 0.4), Word("you", 0.4, 0.9))
    assert says.audio == Path("corpus/b.wav") and says.duration_sec == 2.0
    assert (item.question, item.answer, item.context) == (user, says, ())


def test_a_missing_duration_is_read_from_the_file(sound: Path) -> None:
    line = conversation(USER, {**SAYS, "audio": {"path": "stereo.wav", "start_sec": 0.5}})
    assert parse_line(json.dumps(line), sound).answer.duration_sec == 1.5


@pytest.mark.parametrize(
    "line, reason",
    [
        ('{"id": "a", "turns": [', "not JSON"),
        ("[1, 2]", "one JSON object"),
        ({"turns": [USER, SAYS]}, "id is missing"),
        (conversation(split="training"), "split is 'training'"),
        ({"id": "a", "turns": []}, "at least one turn"),
        (conversation({"role": "system", "text": "be nice"}, SAYS), r"turns\[0\].role is 'system'"),
        (conversation(USER, USER, SAYS), r"turns\[1\] is the user's again"),
        (conversation(USER), "one turn only"),
        (conversation({"role": "user", "text": " "}, SAYS), r"turns\[0\] has neither text nor audio"),
        (conversation({**USER, "text": 3}, SAYS), "must be a string"),
        (conversation({**USER, "audio": "a.wav", "duration_sec": 0}, SAYS), "duration_sec is 0"),
        (conversation({**USER, "audio": "a.wav", "duration_sec": -1.5}, SAYS), "duration_sec is -1.5"),
        (conversation({**USER, "audio": "a.wav", "duration_sec": "long"}, SAYS), "duration_sec is 'long'"),
        (conversation({**USER, "audio": {"path": "a.wav", "chanel": 1}}, SAYS), "'chanel'.*channel"),
        (conversation({**USER, "audio": {"path": "a.wav", "channel": -1}}, SAYS), "channel is -1"),
        (conversation({**USER, "audio": {"path": "a.wav", "start_sec": 2, "end_sec": 2}}, SAYS), "nothing is left"),
        (conversation({**USER, "words": [["a", 0.5, 0.2]]}, SAYS), r"words\[0\] \('a'\) is out of order"),
        (conversation({**USER, "words": [["a", 0.5, 0.6], ["b", 0.1, 0.2]]}, SAYS), r"words\[1\] \('b'\) is out of"),
        (conversation({**USER, "words": [["a", 0.5]]}, SAYS), r"words\[0\] is \['a', 0.5\]"),
        (
            conversation({**USER, "audio": "a.wav", "duration_sec": 1, "words": [["a", 2.0, 2.1]]}, SAYS),
            "starts after the audio's 1 s",
        ),
    ],
)
def test_bad_lines_say_what_is_wrong(line: Any, reason: str, tmp_path: Path) -> None:
    text = line if isinstance(line, str) else json.dumps(line)
    (tmp_path / "manifest.jsonl").write_text(json.dumps(conversation()) + "\n\n" + text + "\n")
    with pytest.raises(ValueError, match=rf"manifest.jsonl:3: .*{reason}"):
        read_manifest(tmp_path)


def test_every_answer_is_an_example_with_its_context() -> None:
    def turn(role: str, seconds: float) -> dict[str, Any]:
        return {"role": role, "text": f"{role} {seconds}", "audio": "a.wav", "duration_sec": seconds}

    lengths = [3.0, 1.0, 2.0, 2.5, 4.0, 9.0]
    item = parsed(*(turn(("user", "assistant")[i % 2], seconds) for i, seconds in enumerate(lengths)))
    found = [[t.duration_sec for t in example.turns] for example in examples(item, max_sec=10.0)]
    assert found == [[3.0, 1.0], [3.0, 1.0, 2.0, 2.5], [4.0, 9.0]]  # the last one is too long as it is
    second = list(examples(item, max_sec=7.0))[1]
    assert second.context == () and second.question.duration_sec == 2.0  # an answer without its question is no context
    greeting = parsed(turn("assistant", 1.0), turn("user", 1.0), turn("assistant", 1.0), turn("user", 2.0))
    first, last = examples(greeting, max_sec=10.0)
    assert first.question.audio is None and first.answer.duration_sec == 1.0 and first.context == ()
    assert [t.role for t in last.turns] == ["user", "assistant"]
    [alone] = examples(parsed({**USER, "audio": "a.wav", "duration_sec": 1}), max_sec=10.0)
    assert alone.question.text == "hello" and alone.answer.text == ""


def test_a_clip_is_that_part_of_the_file(sound: Path) -> None:
    whole, rate = soundfile.read(sound / "stereo.wav", dtype="float32")
    clip = read_recording(Clip(sound / "stereo.wav", 1, 0.5, 1.25), 16_000)
    np.testing.assert_array_equal(clip.wav_S, whole[8_000:20_000, 1])
    mixed = read_recording(Clip(sound / "stereo.wav", None, 0.5), 16_000, max_sec=0.25)
    np.testing.assert_allclose(mixed.wav_S, whole[8_000:12_000].mean(1), atol=1e-7)
    assert mixed.source_sec == 1.5
    assert len(read_recording(Clip(sound / "stereo.wav", 0), 8_000).wav_S) == 16_000
    for bad, reason in [
        (Clip(sound / "stereo.wav", 2), "no channel 2"),
        (Clip(sound / "stereo.wav", 0, 2.5), "no sample from 2.5 s on"),
        (Clip(sound / "notes.wav", 0), "cannot be read as audio"),
        (Clip(sound / "nothing.wav", 0), "does not exist"),
    ]:
        with pytest.raises(ValueError, match=reason):
            read_recording(bad, 16_000)


# ----------------------------------------------------------------------------------------------------------- checking


def test_check_finds_every_bad_line(sound: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    build_text_tokenizer(["hello", "to", "you"]).save_pretrained(tmp_path / "llm")
    part = {"path": "stereo.wav", "channel": 0, "start_sec": 1.0, "end_sec": 2.0}
    good = conversation({**USER, "audio": "stereo.wav"}, {**SAYS, "audio": part}, id="good", splitt="train")
    lines = [
        json.dumps(good),
        "{not json",
        json.dumps(conversation({**USER, "audio": "gone.wav", "duration_sec": 1.0}, SAYS, id="gone")),
        json.dumps(conversation({**USER, "audio": "notes.wav", "duration_sec": 1.0}, SAYS, id="notes")),
        json.dumps(conversation({**USER, "audio": "stereo.wav", "duration_sec": 1.0}, SAYS, id="length")),
        json.dumps(conversation({**USER, "audio": part | {"end_sec": 9.0}}, SAYS, id="end")),
        json.dumps(conversation({**USER, "text": "hello привет"}, SAYS, id="text")),
        json.dumps(conversation(id="good")),
        json.dumps(conversation({**USER, "duration_sec": -1.0}, SAYS, id="negative")),
    ]
    (sound / "manifest.jsonl").write_bytes("\n".join(lines).encode() + b"\n\xff\xfe\n")
    with pytest.raises(SystemExit) as stopped:
        main(["--check", str(sound), "--llm", str(tmp_path / "llm")])
    assert stopped.value.code == 2
    printed = capsys.readouterr().out
    expected = {
        2: "not JSON",
        3: r"turns[0].audio: " + str(sound / "gone.wav") + " does not exist",
        4: "notes.wav is not audio that can be read",
        5: "turns[0].duration_sec is 1, and the audio has 2.000 s",
        6: "it ends at 9 s",
        7: "turns[0].text: the text tokenizer cannot encode 'привет'",
        8: "id 'good' is that of line 1 too",
        9: "turns[0].duration_sec is -1.0",
        10: "not UTF-8",
    }
    for number, reason in expected.items():
        [line] = [each for each in printed.splitlines() if each.startswith(f"{sound}/manifest.jsonl:{number}:")]
        assert reason in line
    assert "nothing reads line.splitt (1 times): did you mean split?" in printed
    assert "1 conversations are good, 9 lines are bad" in printed
    (sound / "manifest.jsonl").write_text(json.dumps(good) + "\n")
    with pytest.raises(SystemExit) as stopped:
        main(["--check", str(sound)])
    assert stopped.value.code == 0
    assert "durations of 2 recordings: 1.00 to 2.00 s" in capsys.readouterr().out


def test_check_of_nothing(tmp_path: Path) -> None:
    (tmp_path / "manifest.jsonl").write_text("\n")
    assert check_manifest(tmp_path).problems == [(1, "the manifest is empty")]
    with pytest.raises(ValueError, match="no such manifest"):
        check_manifest(tmp_path / "other")


def test_the_histogram_counts_every_recording() -> None:
    rng = np.random.default_rng(0)
    lines = list(histogram([*rng.uniform(1, 3, 500), 60.0]))
    assert "501 recordings: 1.0" in lines[0] and "60.00 s" in lines[0]
    counts = [int(line.split("#")[0].split()[-1].replace(",", "")) for line in lines[1:]]
    assert sum(counts) == 501 and counts[0] == 0


def test_a_tokenizer_of_bytes_writes_everything() -> None:
    class Bytes:
        unk_token_id = None
        encode: Callable[..., list[int]] = staticmethod(lambda text, add_special_tokens: list(text.encode()))

    lost = text_check(Bytes())
    assert lost("привет") == "" and "surrogates not allowed" in lost("\ud800")


# ------------------------------------------------------------------------------------------------------------ batches


def test_batches_keep_to_their_budget() -> None:
    lengths = np.random.default_rng(0).integers(10, 60, 2_000).tolist()
    batches = budget_batches(lengths, 640, np.random.default_rng(1))
    assert sorted(index for batch in batches for index in batch) == list(range(2_000))
    assert max(len(batch) * max(lengths[i] for i in batch) for batch in batches) <= 640
    real = sum(lengths)
    slots = sum(len(batch) * max(lengths[i] for i in batch) for batch in batches)
    assert 1 - real / slots < 0.05  # of padding
    assert slots / len(batches) > 0.9 * 640  # the budget is used
    assert batches == budget_batches(lengths, 640, np.random.default_rng(1))
    assert batches != budget_batches(lengths, 640, np.random.default_rng(2))
    with pytest.raises(ValueError, match="max_tokens_per_batch is 50, and the longest example has 59"):
        budget_batches(lengths, 50, np.random.default_rng(1))
    with pytest.raises(ValueError, match="nothing to make batches of"):
        budget_batches([], 50, np.random.default_rng(1))


@pytest.mark.parametrize("by_budget", [False, True])
def test_two_lengths_are_both_kept_alike(by_budget: bool) -> None:
    """What is heard is padded apart from the positions of the language model."""
    rng = np.random.default_rng(0)
    heard = rng.uniform(0.5, 4.0, 8_000).tolist()
    lengths = [int(12 * (seconds + extra)) for seconds, extra in zip(heard, rng.uniform(0.5, 4.0, 8_000), strict=True)]

    def padding(batches: list[list[int]], values: list[Any]) -> float:
        slots = sum(len(batch) * max(values[i] for i in batch) for batch in batches)
        return 1 - sum(values[i] for batch in batches for i in batch) / slots

    def make(seconds: list[float] | None) -> list[list[int]]:
        if by_budget:
            return budget_batches(lengths, 1_600, np.random.default_rng(1), seconds)
        return length_batches(lengths, 32, np.random.default_rng(1), seconds)

    assert padding(make(None), heard) > 0.2
    typed = [seconds if index % 2 else 0.0 for index, seconds in enumerate(heard)]
    shares = [float(np.mean([typed[i] > 0 for i in batch])) for batch in make(typed)]
    assert np.mean([0.0 < share < 1.0 for share in shares]) > 0.7  # what is typed stays mixed with what is heard
    both = make(heard)
    assert padding(both, heard) < 0.12 and padding(both, lengths) < 0.06
    assert sorted(index for batch in both for index in batch) == list(range(8_000))
