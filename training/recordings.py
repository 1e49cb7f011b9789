"""Recordings as the model takes them: features of what is heard, speech tokens of what is spoken; raw or prepared.

Shapes: S samples, C Whisper mel bins, F Whisper mel frames, L speech tokens, X one speech token (D latents or K codes).
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import soundfile
import torch
from safetensors import safe_open
from torch import Tensor

from flowomni.audio import Audio, AudioError, read_audio, resample
from flowomni.encoder import HEARD_SAMPLE_RATE_HZ, HeardFeatures
from flowomni.tokenizers import SpeechTokenizer

INDEX = "index.json"
FORMAT = 1
Kind = Literal["heard", "spoken"]


@dataclass(frozen=True)
class Clip:
    """A part of an audio file.

    Attributes:
        path: the file.
        channel: counts from 0; None averages the channels.
        start_sec, end_sec: the stretch; None reads to the end of the file.
    """

    path: Path
    channel: int | None = None
    start_sec: float = 0.0
    end_sec: float | None = None


Recording = Path | Clip


def read_recording(recording: Recording, sample_rate_hz: int, max_sec: float | None = None) -> Audio:
    """Mono float32 audio of a file or of a part of one; with `max_sec`, at most so much from its start.

    Raises:
        AudioError: the file is missing or unreadable, or has no such channel or stretch.
    """
    if not isinstance(recording, Clip):
        return read_audio(recording, sample_rate_hz, max_sec=max_sec)
    path, channel = recording.path, recording.channel
    try:
        with soundfile.SoundFile(path) as sound:
            first = round(recording.start_sec * sound.samplerate)
            end = sound.frames if recording.end_sec is None else round(recording.end_sec * sound.samplerate)
            if channel is not None and channel >= sound.channels:
                raise AudioError(f"{path} has {sound.channels} channels and no channel {channel} (they count from 0)")
            if first >= min(end, sound.frames):
                raise AudioError(f"{path} has no sample from {recording.start_sec:g} s on: check start_sec and end_sec")
            source_sec = (min(end, sound.frames) - first) / sound.samplerate
            if max_sec is not None:
                end = min(end, first + round(max_sec * sound.samplerate))
            sound.seek(first)
            frame_SC = sound.read(end - first, dtype="float32", always_2d=True)
            rate = sound.samplerate
    except (soundfile.LibsndfileError, OSError) as error:
        what = "cannot be read as audio" if path.is_file() else "does not exist"
        raise AudioError(f"{path} {what}: check the path, or copy it again") from error
    wav_S = frame_SC.mean(1) if channel is None else frame_SC[:, channel]
    if not np.isfinite(wav_S).all():
        raise AudioError(f"{path} holds NaN or infinite samples: export it again from its source")
    return Audio(resample(wav_S, rate, sample_rate_hz), sample_rate_hz, source_sec)


def playable(recording: Recording) -> Path | Audio:
    """What `flowomni.api.Question` takes for it."""
    return read_recording(recording, HEARD_SAMPLE_RATE_HZ) if isinstance(recording, Clip) else recording


# -------------------------------------------------------------------------------------------------- from the raw audio


def heard_features(recording: Recording, features: HeardFeatures) -> np.ndarray:
    """Log-mel features [C, F] in float16, of as much as the encoder's window holds."""
    clip = read_recording(recording, HEARD_SAMPLE_RATE_HZ, max_sec=features.max_heard_sec)
    return features.features(clip.wav_S[: features.max_samples]).numpy().astype(np.float16)


@torch.no_grad()
def spoken_tokens(recording: Recording, tokenizer: SpeechTokenizer) -> Tensor:
    """Speech tokens [L, X] on the CPU."""
    wav_S = read_recording(recording, tokenizer.spec.sample_rate_hz).wav_S
    with torch.autocast("cpu", enabled=False):
        token_BLX, mask_BL = tokenizer.encode(torch.from_numpy(wav_S)[None].to(tokenizer.device))
    return token_BLX[0, mask_BL[0]].cpu()


# ------------------------------------------------------------------------------------------------------ what fits what

# keys of a tokenizer's config that say nothing about its tokens
_INCIDENTAL = ("transformers_version", "_name_or_path", "architectures", "dtype", "torch_dtype")


def fingerprint(tokenizer: SpeechTokenizer, features: HeardFeatures | None) -> dict[str, Any]:
    """Whatever prepared data depends on: settings by dotted key, and the tokens of a fixed second of noise.

    The tokens stand for the tokenizer's weights, so that one whose vocoder alone was trained further still fits.
    """
    found: dict[str, Any] = {"format": FORMAT}
    found |= {f"encoder.{k}": v for k, v in (features.to_dict() if features else {}).items()}
    values = {k: v for k, v in tokenizer.config.to_diff_dict().items() if k not in _INCIDENTAL}
    found |= _flat({"speech_tokenizer": values})
    rate = tokenizer.spec.sample_rate_hz
    noise_S = 0.1 * torch.randn(rate, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        token_BLX, _ = tokenizer.encode(noise_S[None].to(tokenizer.device))
    found["speech_tokenizer.weights"] = [round(v, 3) for v in token_BLX[0].double().flatten().tolist()[:64]]
    return json.loads(json.dumps(found))


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return found


def check_fingerprint(then: Mapping[str, Any], now: Mapping[str, Any], where: str | Path, remedy: str) -> None:
    """ValueError that lists the keys in which two fingerprints differ."""
    differing = []
    for key in sorted({*then, *now}):
        old, new = then.get(key), now.get(key)
        if key.endswith(".weights") and old is not None and new is not None:
            # what other threads or another device round differently is no other tokenizer
            if len(old) != len(new) or not np.allclose(old, new, atol=0.01):
                differing.append(f"{key}: tokens of other weights")
        elif old != new:
            differing.append(f"{key}: {old!r} then, {new!r} now")
    if differing:
        raise ValueError(f"{where} was prepared for another model ({'; '.join(differing)}): {remedy}")


def recording_key(kind: Kind, recording: Recording, folder: Path) -> str:
    """The name of a recording in a prepared folder, from its path relative to that folder."""
    clip = recording if isinstance(recording, Clip) else Clip(recording)
    name = os.path.relpath(clip.path, folder)
    values = [kind, name, clip.channel, clip.start_sec, clip.end_sec]
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:24]


# ------------------------------------------------------------------------------------------------------------- reading


class Prepared:
    """A folder that `python -m training.prepare` wrote: nothing is decoded, nothing stays in memory.

    Raises:
        ValueError: it is not finished, or was made for another speech tokenizer or encoder (lists the keys).
    """

    def __init__(self, folder: str | Path, tokenizer: SpeechTokenizer, features: HeardFeatures | None):
        self.folder = Path(folder)
        index = json.loads((self.folder / INDEX).read_text())
        remedy = "prepare it anew for this model, or train on the manifest itself"
        check_fingerprint(index["fingerprint"], fingerprint(tokenizer, features), self.folder, remedy)
        self._shard_of: dict[str, str] = {key: name for name, keys in index["shards"].items() for key in keys}
        self._open: Callable[[str], Any] = functools.cache(
            lambda name: safe_open(self.folder / name, framework="pt")  # memory-mapped
        )

    def __call__(self, kind: Kind, recording: Recording) -> Tensor:
        """Features [C, F] float16 or tokens [L, X]."""
        key = recording_key(kind, recording, self.folder)
        if key not in self._shard_of:
            raise ValueError(f"{self.folder} has no {kind} data of {recording}: prepare it again")
        return self._open(self._shard_of[key]).get_tensor(key)


class Recordings:
    """What a training stage hears and speaks: from a prepared folder, or from raw audio, kept in memory once read.

    Args:
        source: the manifest that trains: a JSONL file, a corpus folder, or a prepared folder.
        tokenizer: of the model.
        features: of the model's speech encoder; None for a model without ears.
    """

    def __init__(self, source: str | Path, tokenizer: SpeechTokenizer, features: HeardFeatures | None):
        self.tokenizer, self.features = tokenizer, features
        is_prepared = (Path(source) / INDEX).is_file()
        self.prepared = Prepared(source, tokenizer, features) if is_prepared else None
        self._heard: dict[Recording, np.ndarray] = {}
        self._spoken: dict[Recording, Tensor] = {}

    def heard(self, recording: Recording) -> np.ndarray:
        """Log-mel features [C, F], float32 with the precision of float16."""
        if self.prepared is not None:
            return self.prepared("heard", recording).numpy().astype(np.float32)
        if recording not in self._heard:
            assert self.features is not None, "a model without ears is given text"
            self._heard[recording] = heard_features(recording, self.features)
        return self._heard[recording].astype(np.float32)

    def spoken(self, recording: Recording) -> Tensor:
        """Speech tokens [L, X]."""
        if self.prepared is not None:
            return self.prepared("spoken", recording)
        if recording not in self._spoken:
            self._spoken[recording] = spoken_tokens(recording, self.tokenizer)
        return self._spoken[recording]
