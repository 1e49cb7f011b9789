"""Stage `hearing`: a small Whisper-class encoder of one's own learns to hear, by CTC over the letters of what is said.

Whoever starts from a pretrained Whisper needs no such stage.

Shapes: B batch, C mel bins, F mel frames, T encoder frames, E encoder width, U bytes of a transcript.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import WhisperConfig, WhisperModel

from flowomni.encoder import CtcAuxiliary, HeardFeatures, SpeechEncoder
from flowomni.evaluation import word_error_rate
from flowomni.losses import Loss

from ..batching import length_batches, spec_augment
from ..manifest import Conversation, read_manifest
from ..recordings import Recording, heard_features
from .base import Stage, rng_for


@dataclass
class HearingOptions:
    """Options of stage `hearing`.

    Attributes:
        manifest: JSONL of conversations, or the folder that holds manifest.jsonl; its spoken questions are heard.
        encoder: WhisperConfig values of the encoder.
        batch_size: clips per micro-batch.
        mask_time_frames, mask_mel_bins: largest masked spans of the features (SpecAugment).
        attention: "eager" is faster on CPUs for short clips, "sdpa" elsewhere.
        num_eval: held-out clips at each evaluation.
    """

    manifest: str
    encoder: dict[str, Any]
    batch_size: int = 32
    mask_time_frames: int = 20
    mask_mel_bins: int = 12
    attention: str = "sdpa"
    num_eval: int = 200


@dataclass(frozen=True)
class HearingBatch:
    """Features [B, C, F] with their lengths, transcripts as bytes [B, U], -1 past their ends."""

    features_BCF: Tensor
    lengths_B: Tensor
    bytes_BU: Tensor

    def to(self, device: torch.device) -> HearingBatch:
        """The same batch on `device`."""
        return HearingBatch(*[v.to(device) for v in self.__dict__.values()])


class HearingTraining(nn.Module):
    """The encoder and its classifier of letters."""

    def __init__(self, encoder: SpeechEncoder):
        super().__init__()
        self.encoder = encoder
        self.ctc = CtcAuxiliary(encoder.output_dim)
        encoder.whisper.embed_positions.requires_grad_(False)

    def forward(self, batch: HearingBatch, generator: torch.Generator | None = None) -> dict[str, Loss]:
        """CTC, summed over clips, each divided by its number of letters."""
        hidden_BTE, lengths_B = self.encoder(batch.features_BCF, batch.lengths_B)
        return {"ctc": self.ctc(hidden_BTE, lengths_B, batch.bytes_BU)}


class HearingStage(Stage):
    """CTC training of an encoder; evaluation is the word error rate of greedy decoding on held-out clips."""

    Options = HearingOptions
    weights = {"ctc": 1.0}

    def __init__(self, options: HearingOptions, seed: int):
        self.options, self.seed = options, seed
        self.config = WhisperConfig(**options.encoder)
        self.features = HeardFeatures.from_whisper_config(self.config)
        self.module = HearingTraining(SpeechEncoder(self.config))
        self.module.encoder.whisper.set_attn_implementation(options.attention)
        self.train = [c for c in read_manifest(options.manifest, "train") if c.question.audio]
        self.valid = [c for c in read_manifest(options.manifest, "valid") if c.question.audio][: options.num_eval]
        self._cache: dict[Recording, np.ndarray] = {}
        self._plan: tuple[int, list[list[int]]] = (-1, [])

    def batch(self, index: int, rank: int, world_size: int) -> HearingBatch:
        place = index * world_size + rank
        epoch, position = divmod(place, max(1, len(self.train) // self.options.batch_size))
        if self._plan[0] != epoch:
            lengths = [c.question.duration_sec for c in self.train]
            self._plan = epoch, length_batches(lengths, self.options.batch_size, rng_for(self.seed, epoch, 4))
        batches, rng = self._plan[1], rng_for(self.seed, place, 3)
        return self._collate([self.train[i] for i in batches[position % len(batches)]], rng)

    def _collate(self, items: list[Conversation], rng: np.random.Generator | None) -> HearingBatch:
        clips = [self._features(c) for c in items]
        if rng is not None:
            options = self.options
            clips = [spec_augment(c, rng, options.mask_time_frames, options.mask_mel_bins) for c in clips]
        texts = [torch.tensor(list(c.question.text.encode()), dtype=torch.int64) for c in items]
        return HearingBatch(
            pad_sequence([torch.from_numpy(c.T) for c in clips], batch_first=True).transpose(1, 2),
            torch.tensor([c.shape[1] for c in clips]),
            pad_sequence(texts, batch_first=True, padding_value=-1),
        )

    def _features(self, item: Conversation) -> np.ndarray:
        recording = item.question.audio
        assert recording is not None
        if recording not in self._cache:
            self._cache[recording] = heard_features(recording, self.features)
        return self._cache[recording].astype(np.float32)

    def counts(self, batch: HearingBatch) -> dict[str, float]:
        return {"ctc": float((batch.bytes_BU[:, :1] >= 0).sum())}

    def filled(self, batch: HearingBatch) -> dict[str, tuple[int, int]]:
        slots = batch.features_BCF.shape[0] * batch.features_BCF.shape[2]
        return {"padding_share_heard": (int(batch.lengths_B.sum()), slots)}

    def num_tokens(self, batch: HearingBatch) -> int:
        """Mel frames."""
        return int(batch.lengths_B.sum())

    def evaluate(self, folder: Path, step: int) -> dict[str, float]:
        said, heard = [], []
        device = self.module.ctc.classify.weight.device
        for start in range(0, len(self.valid), 32):
            items = self.valid[start : start + 32]
            batch = self._collate(items, None).to(device)
            hidden_BTE, lengths_B = self.module.encoder(batch.features_BCF, batch.lengths_B)
            said += [item.question.text for item in items]
            heard += [self.module.ctc.read(row[:n]) for row, n in zip(hidden_BTE, lengths_B, strict=True)]
        (folder / "heard.txt").write_text("".join(f"{a:50} | {b}\n" for a, b in zip(said, heard, strict=True)))
        return {"wer": word_error_rate(said, heard).rate}

    def save(self, folder: Path) -> None:
        """A WhisperModel checkpoint; its decoder is the smallest there is and untrained."""
        values = {"decoder_layers": 1, "decoder_attention_heads": 1, "decoder_ffn_dim": 1, "vocab_size": 4}
        ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 3}
        model = WhisperModel(WhisperConfig(**{**self.options.encoder, **values, **ids}))
        model.encoder.load_state_dict(self.module.encoder.whisper.state_dict())
        model.save_pretrained(folder)
