"""Laws of audio files: whatever soundfile reads becomes mono float32; whatever is bad becomes one clear line."""

from __future__ import annotations

import os
import resource
import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import soundfile

from flowomni.audio import Audio, AudioError, read_audio, resample, write_audio


def tone(seconds: float, rate: int, hz: float = 440.0, amplitude: float = 0.5) -> np.ndarray:
    return (amplitude * np.sin(2 * np.pi * hz * np.arange(round(seconds * rate)) / rate)).astype(np.float32)


def bad(path: Path, max_sec: float | None = None) -> str:
    """The message of the AudioError that reading gives, which must be one line naming the file."""
    with pytest.raises(AudioError) as caught:
        read_audio(path, 16000, max_sec)
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    assert ": " in message, "what to do comes after a colon"
    return message


# ------------------------------------------------------------------------------------------------------------ reading


@pytest.mark.parametrize("rate", [8000, 11025, 16000, 22050, 44100, 48000, 96000])
def test_any_rate_becomes_the_same_tone(rate: int, tmp_path: Path) -> None:
    soundfile.write(tmp_path / "tone.wav", tone(0.5, rate), rate, subtype="FLOAT")
    audio = read_audio(tmp_path / "tone.wav", 16000)
    assert isinstance(audio, Audio)
    assert audio.wav_S.dtype == np.float32
    assert audio.sample_rate_hz == 16000
    assert abs(len(audio.wav_S) - 8000) <= 1
    assert audio.source_sec == pytest.approx(0.5, abs=1 / rate)
    assert audio.cut_sec == 0
    middle = slice(1000, 7000)
    np.testing.assert_allclose(audio.wav_S[middle], tone(0.5, 16000)[middle], atol=2e-3)


@pytest.mark.parametrize(
    ("name", "subtype", "tolerance"),
    [
        ("a.wav", "PCM_U8", 2**-7),
        ("a.wav", "PCM_16", 2**-15),
        ("a.wav", "PCM_24", 2**-23),
        ("a.wav", "PCM_32", 2**-23),
        ("a.wav", "FLOAT", 0.0),
        ("a.wav", "DOUBLE", 0.0),
        ("a.wav", "ULAW", 0.02),
        ("a.flac", "PCM_16", 2**-15),
        ("a.flac", "PCM_24", 2**-23),
        ("a.aiff", "PCM_16", 2**-15),
        ("a.au", "PCM_16", 2**-15),
        ("a.caf", "PCM_16", 2**-15),
        ("a.w64", "PCM_16", 2**-15),
        ("a.ogg", "VORBIS", 0.1),
        ("a.mp3", "MPEG_LAYER_III", 0.1),
    ],
)
@pytest.mark.parametrize("max_sec", [None, 0.2])
def test_any_format_and_depth(name: str, subtype: str, tolerance: float, max_sec: float | None, tmp_path: Path) -> None:
    wav = tone(0.5, 16000)
    soundfile.write(tmp_path / name, wav, 16000, subtype=subtype)
    audio = read_audio(tmp_path / name, 16000, max_sec)
    assert audio.source_sec == 0.5
    assert len(audio.wav_S) == (8000 if max_sec is None else 3200)
    np.testing.assert_allclose(audio.wav_S, wav[: len(audio.wav_S)], atol=tolerance, rtol=0)


@pytest.mark.parametrize("num_channels", [1, 2, 6])
def test_channels_are_averaged(num_channels: int, tmp_path: Path) -> None:
    channels = np.random.default_rng(0).uniform(-0.5, 0.5, (1000, num_channels)).astype(np.float32)
    soundfile.write(tmp_path / "many.wav", channels, 16000, format="WAVEX", subtype="FLOAT")
    audio = read_audio(tmp_path / "many.wav", 16000)
    assert audio.wav_S.shape == (1000,)
    np.testing.assert_allclose(audio.wav_S, channels.mean(1), atol=1e-6)


@pytest.mark.parametrize("rate", [8000, 16000, 44100, 48000, 192000])
def test_one_sample_is_heard_as_at_least_one_sample(rate: int, tmp_path: Path) -> None:
    soundfile.write(tmp_path / "one.wav", np.array([0.5], np.float32), rate)
    for max_sec in (None, 30.0):
        audio = read_audio(tmp_path / "one.wav", 16000, max_sec)
        assert 1 <= len(audio.wav_S) <= 3
        assert np.isfinite(audio.wav_S).all()
        assert audio.cut_sec == 0


def test_silence_is_audio(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "silence.wav", np.zeros(44100, np.float32), 44100)
    audio = read_audio(tmp_path / "silence.wav", 16000)
    assert len(audio.wav_S) == 16000
    assert not audio.wav_S.any()


@pytest.mark.parametrize(("name", "rate"), [("a.wav", 16000), ("a.wav", 44100), ("a.flac", 48000), ("a.mp3", 44100)])
def test_a_cut_file_is_the_start_of_the_whole_one(name: str, rate: int, tmp_path: Path) -> None:
    noise = np.random.default_rng(0).normal(size=3 * rate).astype(np.float32) * 0.1
    soundfile.write(tmp_path / name, noise, rate)
    whole = read_audio(tmp_path / name, 16000)
    cut = read_audio(tmp_path / name, 16000, max_sec=1.25)
    assert len(cut.wav_S) == 20000
    np.testing.assert_allclose(cut.wav_S, whole.wav_S[:20000], atol=1e-6)
    assert whole.source_sec == cut.source_sec == 3.0
    assert cut.duration_sec == 1.25
    assert cut.cut_sec == 1.75
    assert cut.wav_S.base is None, "the rest must not stay in memory behind a view"


def test_audio_past_the_cut_is_not_decoded(tmp_path: Path) -> None:
    wav = tone(3.0, 16000)
    wav[2 * 16000] = np.nan
    soundfile.write(tmp_path / "late.wav", wav, 16000, subtype="FLOAT")
    assert read_audio(tmp_path / "late.wav", 16000, max_sec=1.0).cut_sec == 2.0
    assert "NaN" in bad(tmp_path / "late.wav")


def test_an_hour_costs_no_more_memory_than_what_is_heard_of_it(tmp_path: Path) -> None:
    path = tmp_path / "hour.wav"
    soundfile.write(path, np.zeros(16000, np.int16), 16000)
    header = bytearray(path.read_bytes()[:44])
    num_bytes = 3600 * 16000 * 2
    header[4:8] = struct.pack("<I", num_bytes + 36)
    header[40:44] = struct.pack("<I", num_bytes)
    with path.open("wb") as file:
        file.write(header)
        file.truncate(44 + num_bytes)  # a sparse file: no hour of zeros is written
    tracemalloc.start()
    audio = read_audio(path, 16000, max_sec=30.0)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert audio.source_sec == 3600.0
    assert audio.cut_sec == 3570.0
    assert len(audio.wav_S) == 30 * 16000
    assert peak_bytes < 20e6


def test_a_header_that_declares_too_much_costs_no_memory(tmp_path: Path) -> None:
    path = tmp_path / "lie.flac"
    soundfile.write(path, tone(0.5, 16000), 16000)
    content = bytearray(path.read_bytes())
    content[21] |= 0x0F  # the high bits of STREAMINFO's sample count: now sixty thousand million samples
    path.write_bytes(content)
    tracemalloc.start()
    assert "truncated" in bad(path)
    assert tracemalloc.get_traced_memory()[1] < 20e6
    tracemalloc.stop()
    assert "truncated" in bad(path, max_sec=0.1)


@pytest.mark.parametrize("num_bytes", [0x7FFFF000, 0x7FFFFFFF, 0xFFFFFFFF])
def test_a_wav_from_a_pipe_does_not_know_its_length_and_is_whole(num_bytes: int, tmp_path: Path) -> None:
    path = tmp_path / "piped.wav"
    soundfile.write(path, tone(0.5, 16000), 16000)
    content = bytearray(path.read_bytes())
    content[4:8] = content[40:44] = struct.pack("<I", num_bytes)
    path.write_bytes(content)
    assert read_audio(path, 16000).source_sec == 0.5


@pytest.mark.parametrize("max_sec", [None, 0.2])
def test_a_flac_from_a_pipe_does_not_know_its_length_and_is_whole(max_sec: float | None, tmp_path: Path) -> None:
    path = tmp_path / "piped.flac"
    soundfile.write(path, tone(0.5, 16000), 16000)
    content = bytearray(path.read_bytes())
    content[21] &= 0xF0
    content[22:26] = bytes(4)
    path.write_bytes(content)
    audio = read_audio(path, 16000, max_sec)
    assert audio.source_sec == 0.5
    assert audio.cut_sec == pytest.approx(0.0 if max_sec is None else 0.3)


@pytest.mark.parametrize("max_sec", [None, 1.0])
def test_an_mp3_without_a_frame_count_is_whole(max_sec: float | None, tmp_path: Path) -> None:
    # libsndfile guesses such a file's length from its first frame, here far too much.
    path = tmp_path / "bare.mp3"
    loud_end = np.concatenate([np.zeros(88200), np.random.default_rng(0).normal(size=88200) * 0.3]).astype(np.float32)
    soundfile.write(path, loud_end, 44100, bitrate_mode="VARIABLE", compression_level=0.5)
    content = path.read_bytes()
    second_frame = content.index(content[:2], 4)
    path.write_bytes(content[second_frame:])
    audio = read_audio(path, 16000, max_sec)
    assert audio.source_sec == pytest.approx(4.0, abs=0.1)


def test_a_recording_with_a_tag_behind_its_samples_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "tagged.wav"
    with soundfile.SoundFile(path, "w", 16000, 1) as sound:
        sound.write(tone(0.5, 16000))
        sound.title = "a question"
    path.write_bytes(path.read_bytes()[:-3])  # of the tag only
    assert read_audio(path, 16000).source_sec == 0.5


# ----------------------------------------------------------------------------------------------------------- bad files


def test_missing_file_and_folder(tmp_path: Path) -> None:
    assert "does not exist" in bad(tmp_path / "missing.wav")
    assert "does not exist" in bad(tmp_path / "no" / "folder" / "missing.wav")
    assert "is a folder" in bad(tmp_path)
    (tmp_path / "file").write_bytes(b"x")
    assert "cannot be read" in bad(tmp_path / "file" / "missing.wav")


def test_file_without_bytes_or_without_samples(tmp_path: Path) -> None:
    (tmp_path / "empty.wav").touch()
    assert "is empty (0 bytes)" in bad(tmp_path / "empty.wav")
    soundfile.write(tmp_path / "none.wav", np.zeros(0, np.float32), 16000)
    assert "holds no samples" in bad(tmp_path / "none.wav")


@pytest.mark.parametrize("share", [0.99, 0.6, 0.3])
@pytest.mark.parametrize("name", ["a.wav", "a.flac", "a.aiff", "a.au", "a.caf", "a.w64", "a.ogg"])
@pytest.mark.parametrize("max_sec", [None, 0.2])
def test_truncated_file(name: str, share: float, max_sec: float | None, tmp_path: Path) -> None:
    path = tmp_path / name
    noise = np.random.default_rng(0).normal(size=(44100, 2)) * 0.1
    soundfile.write(path, noise, 44100)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    assert "truncated or damaged" in bad(path, max_sec) or name == "a.caf"


@pytest.mark.parametrize("share", [0.9, 0.6, 0.3])
def test_truncated_mp3(share: float, tmp_path: Path) -> None:
    path = tmp_path / "a.mp3"
    soundfile.write(path, np.random.default_rng(0).normal(size=88200) * 0.1, 44100)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    assert "truncated or damaged" in bad(path)


def test_wav_cut_by_a_single_sample_or_within_its_header(tmp_path: Path) -> None:
    path = tmp_path / "a.wav"
    soundfile.write(path, tone(0.1, 16000), 16000)
    content = path.read_bytes()
    path.write_bytes(content[:-2])
    assert "truncated or damaged" in bad(path)
    for num_bytes in (1, 4, 12, 20, 40):
        path.write_bytes(content[:num_bytes])
        assert "not audio that can be read, or it is damaged" in bad(path)


def test_damage_in_the_middle_of_a_flac(tmp_path: Path) -> None:
    path = tmp_path / "a.flac"
    soundfile.write(path, np.random.default_rng(0).normal(size=44100) * 0.1, 44100)
    content = bytearray(path.read_bytes())
    content[len(content) // 2 :] = bytes(len(content) - len(content) // 2)
    path.write_bytes(content)
    assert "truncated or damaged" in bad(path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("text.wav", b"this is not audio\n" * 100),
        ("text.mp3", b"this is not audio\n" * 100),
        ("noise.flac", np.random.default_rng(0).bytes(5000)),
        ("zeros.wav", bytes(5000)),
        ("headerless.raw", bytes(5000)),
        ("picture.png", b"\x89PNG\r\n\x1a\n" + np.random.default_rng(1).bytes(5000)),
        ("noending", b"\x00"),
    ],
)
def test_what_is_not_audio(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    assert "not audio that can be read" in bad(tmp_path / name)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("num_channels", [1, 2])
def test_samples_that_are_no_numbers(value: float, num_channels: int, tmp_path: Path) -> None:
    wav = np.zeros((1000, num_channels), np.float32)
    wav[500, -1] = value
    soundfile.write(tmp_path / "odd.wav", wav, 16000, subtype="FLOAT")
    assert "NaN or infinite" in bad(tmp_path / "odd.wav")


def test_loud_channels_do_not_overflow_when_averaged(tmp_path: Path) -> None:
    loud = np.full((10, 2), 3e38, np.float32)
    soundfile.write(tmp_path / "loud.wav", loud, 16000, subtype="FLOAT")
    assert np.isfinite(read_audio(tmp_path / "loud.wav", 16000).wav_S).all()


def test_arguments_out_of_range_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="sample_rate_hz=0"):
        read_audio(tmp_path / "a.wav", 0)
    with pytest.raises(ValueError, match="max_sec=0"):
        read_audio(tmp_path / "a.wav", 16000, max_sec=0)


# ---------------------------------------------------------------------------------------------------------- resampling


def test_resample_keeps_what_it_can() -> None:
    wav = tone(0.1, 16000)
    assert resample(wav, 16000, 16000) is wav
    assert len(resample(wav, 16000, 24000)) == 2400
    assert len(resample(wav[:1], 48000, 16000)) == 1
    assert len(resample(wav[:0], 48000, 16000)) == 0


# ------------------------------------------------------------------------------------------------------------- writing


@pytest.mark.parametrize("name", ["a.wav", "A.WAV", "a.flac"])
def test_what_a_16_bit_file_holds_is_written_back_exactly(name: str, tmp_path: Path) -> None:
    every_value = np.arange(-32768, 32768, dtype=np.int16)
    soundfile.write(tmp_path / "source.wav", every_value, 24000)
    write_audio(tmp_path / name, read_audio(tmp_path / "source.wav", 24000).wav_S, 24000)
    written, rate = soundfile.read(tmp_path / name, dtype="int16")
    assert rate == 24000
    assert soundfile.info(tmp_path / name).subtype == "PCM_16"
    np.testing.assert_array_equal(written, every_value)


def test_too_loud_is_clipped_and_nothing_is_a_file_too(tmp_path: Path) -> None:
    write_audio(tmp_path / "loud.wav", np.array([2.0, -2.0, 1e30], np.float32), 24000)
    assert soundfile.read(tmp_path / "loud.wav", dtype="int16")[0].tolist() == [32767, -32768, 32767]
    write_audio(tmp_path / "none.wav", np.zeros(0, np.float32), 24000)
    assert soundfile.info(tmp_path / "none.wav").frames == 0


def test_a_new_file_has_the_permissions_of_any_new_file(tmp_path: Path) -> None:
    (tmp_path / "other").touch()
    write_audio(tmp_path / "a.wav", tone(0.1, 24000), 24000)
    assert (tmp_path / "a.wav").stat().st_mode == (tmp_path / "other").stat().st_mode


def bad_write(path: Path, wav: np.ndarray | None = None) -> str:
    """The message of the AudioError that writing gives; the folder must be as it was."""
    before = {file: file.read_bytes() for file in path.parent.glob("*") if file.is_file()}
    with pytest.raises(AudioError) as caught:
        write_audio(path, tone(1.0, 24000) if wav is None else wav, 24000)
    assert {file: file.read_bytes() for file in path.parent.glob("*") if file.is_file()} == before
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    return message


@pytest.mark.parametrize("older", [None, b"an older answer"])
def test_full_disk_leaves_the_older_file_and_nothing_else(older: bytes | None, tmp_path: Path) -> None:
    # A limit on file size stops the write half-way in the kernel, as a full disk does.
    path = tmp_path / "answer.wav"
    if older is not None:
        path.write_bytes(older)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        message = bad_write(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "free some space" in message
    assert path.exists() == (older is not None)


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    assert "make the folder" in bad_write(tmp_path / "missing" / "answer.wav")
    (tmp_path / "file").touch()
    assert "make the folder" in bad_write(tmp_path / "file" / "answer.wav")
    (tmp_path / "folder.wav").mkdir()
    assert "it is a folder" in bad_write(tmp_path / "folder.wav")
    assert os.listdir(tmp_path / "folder.wav") == []


@pytest.mark.parametrize("name", ["answer", "answer.mp3", "answer.wav.txt"])
def test_names_that_say_no_known_format(name: str, tmp_path: Path) -> None:
    assert "end its name in .wav or .flac" in bad_write(tmp_path / name)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_audio_that_is_no_number_is_not_written(value: float, tmp_path: Path) -> None:
    assert "NaN or infinite" in bad_write(tmp_path / "answer.wav", np.array([0.0, value], np.float32))
