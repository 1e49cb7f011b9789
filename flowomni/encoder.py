"""Ears: Whisper's features and encoder for the audio there is, and the projector into the language model's width.

Whisper always hears a padded window of 30 s. This file gives the same encoder the frames of the audio alone, so that
two seconds of speech cost two seconds of compute; a batch row equals that row alone.

Shape legend: B batch, S samples, C mel bins, F mel frames (10 ms), T encoder frames (20 ms), E encoder width,
P heard positions (groups of `stack` encoder frames), H width of the language model.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import huggingface_hub
import numpy as np
import torch
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, StrictDataclassError
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import WhisperConfig, WhisperFeatureExtractor
from transformers.masking_utils import create_bidirectional_mask
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from flowomni.strict import strict

from .losses import Loss

HEARD_SAMPLE_RATE_HZ = 16000
HOP_SAMPLES = 160
MEL_FRAMES_PER_ENCODER_FRAME = 2
MAX_NUM_MELS = 128

_INDEX_NAME = "model.safetensors.index.json"
_WEIGHTS_NAME = "model.safetensors"


# ----------------------------------------------------------------------------------------------------------- counting


def num_mel_frames(num_samples: int) -> int:
    """Mel frames of `num_samples` samples at 16 kHz: ceil(S / 160)."""
    return math.ceil(num_samples / HOP_SAMPLES)


def num_encoder_frames(num_frames: int) -> int:
    """Encoder frames of `num_frames` mel frames: ceil(F / 2)."""
    return math.ceil(num_frames / MEL_FRAMES_PER_ENCODER_FRAME)


def num_heard_positions(num_frames: int, stack: int) -> int:
    """Positions which `num_frames` mel frames take in the language model: ceil(ceil(F / 2) / stack)."""
    return math.ceil(num_encoder_frames(num_frames) / stack)


# ----------------------------------------------------------------------------------------------------------- features


@dataclasses.dataclass(frozen=True)
class HeardFeatures:
    """Whisper's log-mel features of 16 kHz audio, for the audio there is.

    Law: `features(wav_S)` equals the first ceil(S / 160) frames of transformers' WhisperFeatureExtractor on the same
    audio padded to the window, its normalisation by the loudest bin of the clip included: a few frames of silence after
    the audio hear its tail as the whole window does, and silence after those changes nothing.

    Args:
        num_mels: mel bins C, 80 for most Whisper checkpoints and 128 for large-v3.
        max_frames: mel frames F of the window, twice Whisper's `max_source_positions`; 3000 is 30 s.
    """

    num_mels: int = 80
    max_frames: int = 3000

    def __post_init__(self) -> None:
        if not 1 <= self.num_mels <= MAX_NUM_MELS:
            raise ValueError(
                f"num_mels={self.num_mels} is out of range: Whisper uses 80 or {MAX_NUM_MELS}, "
                "take the num_mel_bins of the encoder's config"
            )
        if self.max_frames < 1:
            raise ValueError(
                f"max_frames={self.max_frames} must be positive: "
                "take twice the max_source_positions of the encoder's config"
            )

    @classmethod
    def from_whisper_config(cls, config: WhisperConfig) -> HeardFeatures:
        """The features which an encoder with this config was built for."""
        return cls(config.num_mel_bins, config.max_source_positions * MEL_FRAMES_PER_ENCODER_FRAME)

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> HeardFeatures:
        """The inverse of `to_dict`; an unknown key is a ValueError."""
        return strict(cls, settings, "features")

    def to_dict(self) -> dict[str, int]:
        """The settings, ready for JSON."""
        return dataclasses.asdict(self)

    @property
    def max_samples(self) -> int:
        """Samples at 16 kHz which the window holds; the caller cuts what is longer."""
        return self.max_frames * HOP_SAMPLES

    @property
    def max_heard_sec(self) -> float:
        """Seconds of audio which the window holds."""
        return self.max_samples / HEARD_SAMPLE_RATE_HZ

    def features(self, wav_S: np.ndarray | Tensor) -> Tensor:
        """Float32 log-mel features [C, F] of mono 16 kHz audio, F = ceil(S / 160).

        Raises:
            ValueError: the audio is not one-dimensional, has no sample, or is longer than the window.
        """
        wav = np.asarray(wav_S, dtype=np.float32)
        if wav.ndim != 1 or wav.size == 0:
            raise ValueError(f"heard audio has shape {list(wav.shape)}: give mono audio [S] with at least one sample")
        if wav.size > self.max_samples:
            raise ValueError(
                f"heard audio of {wav.size / HEARD_SAMPLE_RATE_HZ:.2f} s is past the window: "
                f"cut it to max_heard_sec={self.max_heard_sec:g} s"
            )
        num_frames = num_mel_frames(wav.size)
        # The audio's last samples reach into the two frames after the last, and those take part in the normalisation;
        # the third keeps the STFT's mirrored edge clear of the audio. At the window's end the mirror is Whisper's own.
        padded_frames = min(num_frames + 3, self.max_frames)
        batch = _feature_extractor(self.num_mels)(
            wav,
            sampling_rate=HEARD_SAMPLE_RATE_HZ,
            padding="max_length",
            max_length=padded_frames * HOP_SAMPLES,
            return_tensors="pt",
        )
        # A clone, so that the frames cut away do not live on behind a view.
        return cast(Tensor, batch["input_features"])[0, :, :num_frames].clone()


@functools.cache
def _feature_extractor(num_mels: int) -> WhisperFeatureExtractor:
    """Transformers' extractor; its mel filters take longer to make than a clip's features."""
    return WhisperFeatureExtractor(feature_size=num_mels, sampling_rate=HEARD_SAMPLE_RATE_HZ, hop_length=HOP_SAMPLES)


# ------------------------------------------------------------------------------------------------------------ encoder


class SpeechEncoder(nn.Module):
    """A Whisper encoder run on the audio there is instead of a padded window.

    Laws: on a full window it equals transformers' WhisperEncoder; a batch row equals that row alone, whatever stands in
    its padding (NaN included). The weights stay under `.whisper`, with transformers' names.
    """

    def __init__(self, config: WhisperConfig) -> None:
        super().__init__()
        self.whisper = WhisperEncoder(config)
        self._initialise()

    def _initialise(self) -> None:
        """A start from which a new encoder learns: transformers' weights of std 0.02 make features of std 0.01, under
        positions of std 0.6, and CTC training then stays at its all-blank plateau (measured, see LOG.md)."""
        for conv in (self.whisper.conv1, self.whisper.conv2):
            nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
        with torch.no_grad():
            self.whisper.embed_positions.weight.mul_(0.2)

    @classmethod
    def from_pretrained(cls, path: str | Path) -> SpeechEncoder:
        """Load the encoder of a Whisper checkpoint, in float32: a folder, or a name on the Hugging Face Hub.

        Takes what `save_pretrained` of WhisperModel or WhisperForConditionalGeneration writes (safetensors, one file or
        shards); the decoder is never read.

        Raises:
            ValueError: no such folder or name, no Whisper checkpoint, or tensors that are missing or of a wrong shape.
        """
        folder = _checkpoint_folder(path)
        config = _read_whisper_config(folder)
        # On the meta device: no time spent on random weights, and no draw from the global random generator.
        with torch.device("meta"):
            encoder = cls(config)
        encoder.to_empty(device="cpu")
        encoder.whisper.load_state_dict(_read_encoder_weights(folder, encoder.whisper.state_dict()))
        return encoder

    @property
    def config(self) -> WhisperConfig:
        """Whisper's configuration."""
        return self.whisper.config

    @property
    def output_dim(self) -> int:
        """Width E of the encoder's output."""
        return self.config.d_model

    @property
    def max_frames(self) -> int:
        """Mel frames of the window."""
        return self.config.max_source_positions * MEL_FRAMES_PER_ENCODER_FRAME

    @property
    def max_heard_sec(self) -> float:
        """Seconds of audio which the window holds; the caller cuts what is longer."""
        return self.max_frames * HOP_SAMPLES / HEARD_SAMPLE_RATE_HZ

    def forward(self, features_BCF: Tensor, lengths_B: Tensor) -> tuple[Tensor, Tensor]:
        """Encode padded rows of log-mel features.

        Args:
            features_BCF: features of `HeardFeatures`, right-padded with anything.
            lengths_B: mel frames of each row, integers from 1 to F.

        Returns:
            hidden_BTE with T = ceil(F / 2) and zeros past a row's end, and the rows' lengths in encoder frames.

        Raises:
            ValueError: the features are longer than the window or have another number of mel bins.
        """
        num_mels, num_frames = features_BCF.shape[1:]
        if num_mels != self.config.num_mel_bins:
            raise ValueError(
                f"features have {num_mels} mel bins but the encoder's num_mel_bins is {self.config.num_mel_bins}: "
                "make them with HeardFeatures.from_whisper_config of this encoder's config"
            )
        if num_frames > self.max_frames:
            raise ValueError(
                f"features of {num_frames} frames are past the encoder's window: "
                f"cut the audio to max_heard_sec={self.max_heard_sec:g} s"
            )
        lengths = lengths_B.tolist()
        assert all(1 <= length <= num_frames for length in lengths), f"lengths {lengths} of rows of {num_frames} frames"
        padded = min(lengths) < num_frames
        lengths_B = lengths_B.to(features_BCF.device)
        hidden_lengths_B = (lengths_B + 1) // MEL_FRAMES_PER_ENCODER_FRAME

        hidden_BTE = self._embed(features_BCF, lengths_B if padded else None)
        valid_BT = _valid(hidden_lengths_B, hidden_BTE.shape[1]) if padded else None
        mask = create_bidirectional_mask(self.config, hidden_BTE, valid_BT) if padded else None
        for layer in self.whisper.layers:
            if self.training and self.whisper.layerdrop > 0 and torch.rand([]) < self.whisper.layerdrop:
                continue
            hidden_BTE = layer(hidden_BTE, mask)
        hidden_BTE = self.whisper.layer_norm(hidden_BTE)
        if valid_BT is not None:
            hidden_BTE = hidden_BTE.masked_fill(~valid_BT[:, :, None], 0.0)
        return hidden_BTE, hidden_lengths_B

    def _embed(self, features_BCF: Tensor, lengths_B: Tensor | None) -> Tensor:
        """Two convolutions and positions; with lengths, both see zeros past a row's end, as the row alone does."""
        whisper = self.whisper
        hidden_BEF = features_BCF.to(whisper.conv1.weight.dtype)
        invalid_B1F = None if lengths_B is None else ~_valid(lengths_B, features_BCF.shape[2])[:, None, :]
        if invalid_B1F is not None:
            hidden_BEF = hidden_BEF.masked_fill(invalid_B1F, 0.0)
        hidden_BEF = F.gelu(whisper.conv1(hidden_BEF))
        if invalid_B1F is not None:
            hidden_BEF = hidden_BEF.masked_fill(invalid_B1F, 0.0)
        hidden_BTE = F.gelu(whisper.conv2(hidden_BEF)).transpose(1, 2)
        hidden_BTE = hidden_BTE + whisper.embed_positions.weight[: hidden_BTE.shape[1]]
        return F.dropout(hidden_BTE, p=whisper.dropout, training=self.training)


class CtcAuxiliary(nn.Module):
    """CTC over the letters (UTF-8 bytes) of what is said, on the encoder's own frames: makes a new encoder listen.

    Words at the language model's rate were tried first and stayed at the all-blank plateau (see LOG.md).
    """

    num_classes = 257  # the blank, then the bytes

    def __init__(self, encoder_dim: int) -> None:
        super().__init__()
        self.classify = nn.Linear(encoder_dim, self.num_classes)

    def forward(self, hidden_BTE: Tensor, lengths_B: Tensor, bytes_BU: Tensor) -> Loss:
        """Summed over the clips that say something, each divided by its number of bytes.

        Args:
            hidden_BTE: encoder frames; lengths_B: how many of them are real.
            bytes_BU: the transcripts' bytes, -1 past a row's end; rows that say nothing are all -1.
        """
        return _ctc_loss(self.classify, hidden_BTE, lengths_B, bytes_BU)

    def read(self, hidden_TE: Tensor) -> str:
        """What one clip says, by CTC's best path: repeats joined, blanks dropped, bytes to text."""
        joined = torch.unique_consecutive(self.classify(hidden_TE).argmax(-1))
        return bytes(int(c) - 1 for c in joined if c > 0).decode(errors="replace")


class TextCtcAuxiliary(nn.Module):
    """CTC over the language model's own text tokens on the heard positions, scored by its input embeddings.

    What is heard of a token comes to lie near that token's embedding, so that a language model which can copy text can
    copy what it hears. For an encoder that listens already: alone it stays at the all-blank plateau (see LOG.md).
    Costs heard positions times the vocabulary.
    """

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.blank = nn.Linear(hidden_size, 1)
        self.log_scale = nn.Parameter(torch.zeros(1))  # FSDP takes no scalars

    def forward(self, heard_BPH: Tensor, lengths_B: Tensor, table_VH: Tensor, text_BU: Tensor) -> Loss:
        """Summed over the clips that say something, each divided by its number of tokens.

        Args:
            heard_BPH: projected positions; lengths_B: how many of them are real.
            table_VH: the language model's input embeddings; nothing is learned into them here.
            text_BU: text ids of the transcripts, -1 past a row's end; rows that say nothing are all -1.
        """
        return _ctc_loss(lambda heard: self.scores(heard, table_VH), heard_BPH, lengths_B, text_BU)

    def scores(self, heard: Tensor, table_VH: Tensor) -> Tensor:
        """Of the blank, then of each text id: [.., H] -> [.., 1 + V]."""
        tokens = self.log_scale.exp() * (heard @ F.normalize(table_VH.detach(), dim=-1).T)
        return torch.cat([self.blank(heard), tokens], dim=-1)


def _ctc_loss(scores: Callable[[Tensor], Tensor], x_BTH: Tensor, lengths_B: Tensor, target_BU: Tensor) -> Loss:
    """CTC of the rows that say something (a target that is not -1), each divided by its number of targets; class 0 is
    the blank. With no such row a zero that every parameter takes part in."""
    num_targets_B = (target_BU >= 0).sum(1)
    says_B = num_targets_B > 0
    if not bool(says_B.any()):
        return Loss(scores(x_BTH).sum() * 0.0, says_B.sum())
    num_targets_B = num_targets_B[says_B]
    losses_B = F.ctc_loss(
        scores(x_BTH[says_B]).float().log_softmax(-1).transpose(0, 1),
        target_BU[says_B].clamp(min=0) + 1,
        lengths_B[says_B],
        num_targets_B,
        reduction="none",
        zero_infinity=True,
    )
    return Loss((losses_B / num_targets_B).sum(), says_B.sum())


class Projector(nn.Module):
    """Encoder frames to positions of the language model: `stack` frames side by side, then a two-layer MLP (GELU).

    Law: a batch row equals that row alone; the last group of a row is filled with zeros.
    """

    def __init__(self, input_dim: int, hidden_size: int, stack: int) -> None:
        super().__init__()
        for name, value in (("input_dim", input_dim), ("hidden_size", hidden_size), ("stack", stack)):
            if value < 1:
                raise ValueError(f"projector {name}={value} must be at least 1")
        self.stack = stack
        self.expand = nn.Linear(stack * input_dim, hidden_size)
        self.project = nn.Linear(hidden_size, hidden_size)

    def forward(self, hidden_BTE: Tensor, lengths_B: Tensor) -> tuple[Tensor, Tensor]:
        """Stack and project.

        Args:
            hidden_BTE: encoder frames, right-padded with anything.
            lengths_B: encoder frames of each row.

        Returns:
            heard_BPH with P = ceil(T / stack) and zeros past a row's end, and the rows' lengths in positions.
        """
        num_rows, num_frames = hidden_BTE.shape[:2]
        lengths_B = lengths_B.to(hidden_BTE.device)
        hidden_BTE = hidden_BTE.masked_fill(~_valid(lengths_B, num_frames)[:, :, None], 0.0)
        hidden_BTE = F.pad(hidden_BTE, (0, 0, 0, -num_frames % self.stack))
        heard_BPH = self.project(F.gelu(self.expand(hidden_BTE.reshape(num_rows, -1, self.expand.in_features))))
        heard_lengths_B = (lengths_B + self.stack - 1) // self.stack
        invalid_BP = ~_valid(heard_lengths_B, heard_BPH.shape[1])
        return heard_BPH.masked_fill(invalid_BP[:, :, None], 0.0), heard_lengths_B


def _valid(lengths_B: Tensor, size: int) -> Tensor:
    """True at the positions before each row's length: [B, size]."""
    return torch.arange(size, device=lengths_B.device) < lengths_B[:, None]


# ------------------------------------------------------------------------------------------------------- checkpoints


def _checkpoint_folder(path: str | Path) -> Path:
    """The folder itself, or the local copy of a name on the Hub."""
    if Path(path).is_dir():
        return Path(path)
    name = str(path)
    if Path(path).is_file():
        raise ValueError(f"encoder {name!r} is a file: give the folder of a Whisper checkpoint, with its config.json")
    try:
        # The exact names leave out other precisions of the same weights, which some repositories also hold.
        patterns = ["config.json", _WEIGHTS_NAME, _INDEX_NAME, "model-0*.safetensors"]
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=patterns))
    except HFValidationError:
        raise ValueError(f"encoder {name!r} does not exist: give the folder of a Whisper checkpoint") from None
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ValueError(
            f"encoder {name!r} is neither a folder here nor a checkpoint that the Hugging Face Hub gives "
            f"({type(error).__name__}): correct the name, or give the folder of a Whisper checkpoint"
        ) from error


def _read_whisper_config(folder: Path) -> WhisperConfig:
    file = folder / "config.json"
    if not file.is_file():
        raise ValueError(f"encoder {str(folder)!r} has no config.json: give the folder of a Whisper checkpoint")
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
        kind = settings.get("model_type")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"encoder config {str(file)!r} is not a JSON object: copy the checkpoint again") from error
    if kind != "whisper":
        raise ValueError(
            f"encoder {str(folder)!r} has model_type {kind!r} in its config.json, not 'whisper': "
            "give the folder of a Whisper checkpoint"
        )
    try:
        return WhisperConfig.from_dict(settings)
    except StrictDataclassError as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"encoder config {str(file)!r} is not valid ({reason}): copy the checkpoint again") from error


def _read_encoder_weights(folder: Path, expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The encoder's tensors by their names in WhisperEncoder, float32, checked against `expected`."""
    weights = {}
    for file in _weight_files(folder):
        try:
            with safe_open(file, framework="pt") as tensors:
                names = tensors.keys()
                for name in names:
                    prefix, found, rest = name.removeprefix("model.").partition("encoder.")
                    if found and not prefix:
                        weights[rest] = tensors.get_tensor(name).float()
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"encoder weights {str(file)!r} cannot be read ({error}): copy the checkpoint again"
            ) from error

    missing = [name for name in expected if name not in weights]
    if missing:
        raise ValueError(
            f"encoder {str(folder)!r} lacks {len(missing)} of {len(expected)} encoder tensors, "
            f"the first 'encoder.{missing[0]}': give the folder of a whole Whisper checkpoint"
        )
    for name, tensor in expected.items():
        if weights[name].shape != tensor.shape:
            raise ValueError(
                f"encoder {str(folder)!r} holds 'encoder.{name}' of shape {list(weights[name].shape)} "
                f"where its config.json asks for {list(tensor.shape)}: config and weights are not of one checkpoint"
            )
    unknown = sorted(set(weights) - set(expected))
    if unknown:
        raise ValueError(
            f"encoder {str(folder)!r} holds 'encoder.{unknown[0]}', which its config.json has no place for: "
            "config and weights are not of one checkpoint"
        )
    return weights


def _weight_files(folder: Path) -> list[Path]:
    """The checkpoint's safetensors files: the single one, or the shards which its index names."""
    index = folder / _INDEX_NAME
    if (folder / _WEIGHTS_NAME).is_file():
        files = [folder / _WEIGHTS_NAME]
    elif index.is_file():
        try:
            names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"encoder index {str(index)!r} has no weight_map: copy the checkpoint again") from error
        files = [folder / name for name in sorted(names)]
    else:
        raise ValueError(
            f"encoder {str(folder)!r} has no {_WEIGHTS_NAME}: "
            "give a checkpoint in safetensors, or save this one again with save_pretrained"
        )
    absent = [file for file in files if not file.is_file()]
    if absent:
        raise ValueError(f"encoder weights {str(absent[0])!r} are missing: copy the checkpoint again")
    return files
