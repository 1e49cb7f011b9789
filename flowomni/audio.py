"""Audio files in and out: any file that soundfile reads to mono float32 at the rate asked for, and 16-bit files back.

Every way in which a file can be bad is an `AudioError`: one line that names the file and says what to do.

Shape legend: S samples.
"""

from __future__ import annotations

import dataclasses
import errno
import io
import math
import os
import re
import uuid
from pathlib import Path
from typing import BinaryIO

import numpy as np
import soundfile
import soxr

WRITABLE_FORMATS = {".wav": "WAV", ".flac": "FLAC"}

_BLOCK_FRAMES = 1 << 18
# The resampler looks this far past the cut, so that a cut file equals the start of the whole one.
_CUT_MARGIN_SEC = 0.1
# Programs that write to a pipe do not know how long the audio will be, and declare about as much as the field holds.
_STREAMED_BYTES = range(0x7FFF0000, 0x100000000)
# libsndfile gives this count for a stream that does not declare its own (SF_COUNT_MAX, less what its blocks round off).
_UNKNOWN_FRAMES = 1 << 62
_MAX_OGG_PAGE_BYTES = 65307
_OGG_HEADER_BYTES = 27
# Encoders of mp3 disagree on whether their own header and delay count; the end of an ogg is known by its last page.
_COUNT_SLACK_FRAMES = {"MP3": 2 * 1152, "OGG": _UNKNOWN_FRAMES}
_DECLARED_BYTES = re.compile(
    r"^\s*(?:data|SSND|Data Size|riff|Riff size)\s*:\s*(\d+) \(should be (\d+)\)", re.MULTILINE
)


class AudioError(ValueError):
    """An audio file that cannot be read or written; the message is one line for the user."""


@dataclasses.dataclass(frozen=True, eq=False)
class Audio:
    """Mono audio, and how long its source is.

    Attributes:
        wav_S: float32 samples, full scale 1.
        sample_rate_hz: rate of `wav_S`.
        source_sec: length of the whole source, of which `wav_S` may be the start.
    """

    wav_S: np.ndarray
    sample_rate_hz: int
    source_sec: float

    @property
    def duration_sec(self) -> float:
        """Length of `wav_S`."""
        return len(self.wav_S) / self.sample_rate_hz

    @property
    def cut_sec(self) -> float:
        """Length of the source that is not in `wav_S`; 0 where all of it is."""
        cut_sec = self.source_sec - self.duration_sec
        # Resampling rounds the length to a whole sample, which is no cut.
        return cut_sec if cut_sec * self.sample_rate_hz > 1.0 else 0.0


def read_audio(path: str | Path, sample_rate_hz: int, max_sec: float | None = None) -> Audio:
    """Read a file as mono float32 audio at `sample_rate_hz`: channels averaged, resampled by soxr.

    Law: with `max_sec` the samples are the first ones of the whole file's, and only about as much of it is decoded.

    Args:
        path: a file in any format, rate, depth and number of channels that soundfile reads.
        sample_rate_hz: the rate of the result.
        max_sec: read this much from the start; everything by default.

    Raises:
        AudioError: the file is missing, a folder, empty, truncated, not audio, without samples, or holds NaN or inf.
    """
    if sample_rate_hz < 1:
        raise ValueError(f"sample_rate_hz={sample_rate_hz} must be at least 1")
    if max_sec is not None and not max_sec > 0:
        raise ValueError(f"max_sec={max_sec} must be positive, or None for the whole file")
    name = str(path)
    try:
        # Opened here, because of a file that it opens itself libsndfile hides the reason why it could not.
        with open(path, "rb") as file:
            if os.fstat(file.fileno()).st_size == 0:
                raise AudioError(f"{name} is empty (0 bytes): record it or copy it again")
            return _read(file, name, sample_rate_hz, max_sec)
    except FileNotFoundError as error:
        raise AudioError(f"{name} does not exist: check the path") from error
    except IsADirectoryError as error:
        raise AudioError(f"{name} is a folder: give an audio file") from error
    except OSError as error:
        raise AudioError(f"{name} cannot be read ({error.strerror or error}): check its permissions") from error


def resample(wav_S: np.ndarray, source_rate_hz: int, target_rate_hz: int) -> np.ndarray:
    """Mono float32 audio at another rate; a wave with any sample keeps at least one."""
    wav_S = np.ascontiguousarray(wav_S, dtype=np.float32)
    if source_rate_hz == target_rate_hz or wav_S.size == 0:
        return wav_S
    resampled_S = soxr.resample(wav_S, source_rate_hz, target_rate_hz)
    # Of a few samples at a far higher rate soxr leaves nothing.
    return resampled_S if resampled_S.size > 0 else np.zeros(1, np.float32)


def write_audio(path: str | Path, wav_S: np.ndarray, sample_rate_hz: int) -> None:
    """Write mono audio [S], or [S, channels], as 16-bit WAV or FLAC, by the name's ending; what is beyond full scale is
    clipped.

    Law: the file appears whole or not at all, and an older file of that name stays until then. Samples that were read
    from a 16-bit file are written back exactly.

    Raises:
        AudioError: the name has another ending, a sample is NaN or infinite, or the file cannot be written.
    """
    path = Path(path)
    file_format = WRITABLE_FORMATS.get(path.suffix.lower())
    if file_format is None:
        raise AudioError(f"{path} cannot be written: end its name in {' or '.join(WRITABLE_FORMATS)}")
    wav_S = np.asarray(wav_S, dtype=np.float32)
    assert wav_S.ndim in (1, 2), f"audio is [S] or [S, channels], not of shape {wav_S.shape}"
    if not np.isfinite(wav_S).all():
        raise AudioError(f"{path} was not written: the audio for it holds NaN or infinite samples")
    pcm_S = np.clip(np.rint(wav_S * 32768.0), -32768, 32767).astype(np.int16)
    encoded = io.BytesIO()
    soundfile.write(encoded, pcm_S, sample_rate_hz, format=file_format, subtype="PCM_16")
    _replace_file(path, encoded.getvalue())


# ------------------------------------------------------------------------------------------------------------ reading


def _read(file: BinaryIO, name: str, sample_rate_hz: int, max_sec: float | None) -> Audio:
    try:
        sound = _ForwardFile(file)
    except (soundfile.LibsndfileError, TypeError) as error:  # TypeError: the name of a headerless format, such as .raw
        raise AudioError(
            f"{name} is not audio that can be read, or it is damaged: give a whole wav, flac, ogg, mp3 or aiff file"
        ) from error
    with sound:
        if _is_cut_short(sound, file):
            raise _truncated(name)
        if sound.frames == 0:
            raise AudioError(f"{name} holds no samples: record it or copy it again")
        # Without a frame count in its header, the length of an mp3 is libsndfile's guess from its first frames.
        known = sound.frames < _UNKNOWN_FRAMES and (sound.format != "MP3" or _mp3_counts_frames(file))
        wav_S, num_frames = _decode(sound, name, max_sec, known)
        wav_S = resample(wav_S, sound.samplerate, sample_rate_hz)
        source_sec = num_frames / sound.samplerate
    if max_sec is not None:
        wav_S = wav_S[: max(1, math.floor(max_sec * sample_rate_hz))].copy()
    return Audio(wav_S, sample_rate_hz, source_sec)


class _ForwardFile(soundfile.SoundFile):
    """A sound file that is read from start to end.

    soundfile seeks after every block of a seekable file, and cannot do so at the end of a flac of undeclared length.
    """

    def seekable(self) -> bool:
        return False


def _decode(sound: soundfile.SoundFile, name: str, max_sec: float | None, known: bool) -> tuple[np.ndarray, int]:
    """Mono samples at the file's own rate, to a little past `max_sec`, and the number of frames in the whole file.

    In blocks, so that a header which declares too much costs no memory. A file of unknown length is decoded to its end.
    """
    limit = math.inf if max_sec is None else math.ceil((max_sec + _CUT_MARGIN_SEC) * sound.samplerate)
    blocks: list[np.ndarray] = []
    num_read, ended = 0, False
    try:
        while not ended and (num_read < limit or not known):
            keep = num_read < limit
            wanted = int(min(_BLOCK_FRAMES, limit - num_read)) if keep else _BLOCK_FRAMES
            block = sound.read(wanted, dtype="float32", always_2d=True)
            if keep and not np.isfinite(block).all():
                raise AudioError(f"{name} holds NaN or infinite samples: export it again from its source")
            if keep:
                # In float64 the sum of channels cannot overflow.
                blocks.append(block.mean(1, dtype=np.float64).astype(np.float32))
            num_read += len(block)
            ended = len(block) < wanted
        if known and not _is_whole(sound, num_read, ended):
            raise _truncated(name)
    except soundfile.LibsndfileError as error:
        raise _truncated(name) from error
    if num_read == 0:
        raise _truncated(name)
    return np.concatenate(blocks), num_read if ended else sound.frames


def _is_whole(sound: soundfile.SoundFile, num_read: int, ended: bool) -> bool:
    """Whether a file holds as many frames as it declares; where reading stopped early, flac is asked for its last.

    The other formats need no such question: their size was checked before, or, with mp3, each frame stands for itself.
    """
    if ended:
        return num_read + _COUNT_SLACK_FRAMES.get(sound.format, 0) >= sound.frames
    if sound.format == "FLAC":
        sound.seek(sound.frames - 1)
        return len(sound.read(1)) == 1
    return True


def _truncated(name: str) -> AudioError:
    return AudioError(f"{name} is truncated or damaged, it holds less audio than it declares: copy or record it again")


def _is_cut_short(sound: soundfile.SoundFile, file: BinaryIO) -> bool:
    """Whether the file ends before its header says so, and libsndfile takes the shorter length for the true one."""
    if sound.format == "OGG":
        return not _ogg_ends(file)
    # libsndfile's log of the header is the one place where it tells.
    sizes = [(int(declared), int(held)) for declared, held in _DECLARED_BYTES.findall(sound.extra_info)]
    return any(held < declared and declared not in _STREAMED_BYTES for declared, held in sizes)


def _ogg_ends(file: BinaryIO) -> bool:
    """Whether the last page of an ogg file is whole and has the end-of-stream flag (RFC 3533, section 6)."""
    position = file.tell()
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - 2 * _MAX_OGG_PAGE_BYTES))
    tail = file.read()
    file.seek(position)
    page = tail[max(0, tail.rfind(b"OggS")) :]
    if len(page) < _OGG_HEADER_BYTES:
        return False
    segments = page[_OGG_HEADER_BYTES : _OGG_HEADER_BYTES + page[26]]
    is_whole = len(page) >= _OGG_HEADER_BYTES + page[26] + sum(segments)
    return is_whole and bool(page[5] & 4)


def _mp3_counts_frames(file: BinaryIO) -> bool:
    """Whether an mp3 declares its length: a Xing or Info header in the first frame, which may come after an ID3 tag."""
    position = file.tell()
    file.seek(0)
    head = file.read(10)
    tag_bytes = 0
    if head[:3] == b"ID3":
        tag_bytes = 10 + sum(byte << shift for byte, shift in zip(head[6:10], (21, 14, 7, 0), strict=True))
    file.seek(tag_bytes)
    frame = file.read(256)
    file.seek(position)
    return b"Xing" in frame or b"Info" in frame


# ------------------------------------------------------------------------------------------------------------ writing


def _replace_file(path: Path, content: bytes) -> None:
    """Write a file beside `path`, then move it there in one step."""
    # Not by tempfile, whose files are the user's alone: an answer gets the permissions of any new file.
    temporary = path.parent / f".{uuid.uuid4().hex}.part"
    try:
        try:
            with open(temporary, "xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise AudioError(f"{path} cannot be written ({error.strerror or error}): {_remedy(error, path)}") from error


def _remedy(error: OSError, path: Path) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        remedy = "free some space or write to another disk"
    elif error.errno in (errno.ENOENT, errno.ENOTDIR):
        remedy = f"make the folder {path.parent} first"
    elif error.errno in (errno.EISDIR, errno.ENOTEMPTY, errno.EEXIST):
        remedy = "it is a folder, give the name of a file"
    else:
        remedy = "choose a folder that you may write to"
    return remedy
