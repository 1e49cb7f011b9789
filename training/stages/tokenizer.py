"""The tokenizer stage: the mel autoencoder around a fixed, already trained vocoder.

Shapes: B batch, S samples, F frames, C mel bins, L speech tokens, D latent dimension.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from flowomni.tokenizers import AutoencoderConfig, MelTokenizer, MelTokenizerConfig

from .answers import Answers
from .base import Loss, Stage
from .vocoder import evaluate_resynthesis


@dataclass(frozen=True)
class TokenizerOptions:
    """Options of the tokenizer stage.

    Attributes:
        corpus: folder of a corpus manifest with `answers/*.flac`.
        vocoder: checkpoint of the vocoder stage; its mel front, statistics and vocoder become part of this one.
        autoencoder: sizes and bottleneck.
        batch_size, crop_tokens: rows of one micro-batch and their length.
        max_answers: at most so many files are loaded; 0 for all.
        l1_weight, l2_weight: of the reconstruction of standardised mel.
        penalty_weight: of the bottleneck's penalty.
        num_eval_answers: held-out answers in an evaluation.
        num_statistics_answers: training answers from which the latent statistics are taken when saving.
    """

    corpus: str
    vocoder: str
    autoencoder: AutoencoderConfig = AutoencoderConfig()
    batch_size: int = 32
    crop_tokens: int = 12
    max_answers: int = 6000
    l1_weight: float = 1.0
    l2_weight: float = 0.5
    penalty_weight: float = 0.002
    num_eval_answers: int = 16
    num_statistics_answers: int = 2000

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.crop_tokens < 1:
            raise ValueError(
                f"batch_size is {self.batch_size}, crop_tokens {self.crop_tokens}; both must be at least 1"
            )
        if self.autoencoder.plain:
            raise ValueError(
                "autoencoder has no layers and no bottleneck: the vocoder's own checkpoint is that tokenizer"
            )


@dataclass(frozen=True)
class TokenizerBatch:
    """Crops of answers, wav_BS with a margin on both sides."""

    wav_BS: Tensor

    def to(self, device: torch.device) -> TokenizerBatch:
        """The same batch on `device`."""
        return TokenizerBatch(self.wav_BS.to(device))


class TokenizerTraining(nn.Module):
    """A tokenizer whose encoder and decoder train."""

    def __init__(self, tokenizer: MelTokenizer, options: TokenizerOptions):
        super().__init__()
        self.tokenizer = tokenizer
        self.tokenizer.vocoder.requires_grad_(False)
        self.options = options

    @property
    def margin_frames(self) -> int:
        """Frames on each side of a crop which its mel frames see."""
        mel = self.tokenizer.front.config
        return math.ceil(mel.n_fft / 2 / mel.hop_length)

    def forward(self, batch: TokenizerBatch, generator: torch.Generator) -> dict[str, Loss]:
        """Losses "l1", "l2" (of standardised mel) and "penalty", summed over rows."""
        tokenizer, margin = self.tokenizer, self.margin_frames
        num_frames = self.options.crop_tokens * tokenizer.frames_per_token
        with torch.no_grad():
            mel_BFC = tokenizer.front(batch.wav_BS, num_frames + margin)[:, margin:]
        latent_BLD = tokenizer.encode_mel(mel_BFC).float()
        noisy_BLD, penalty_BL = tokenizer.bottleneck(latent_BLD, generator)
        difference_BFC = tokenizer.decode_mel(noisy_BLD).float() - mel_BFC
        parts = {
            "l1": difference_BFC.abs().mean((1, 2)),
            "l2": difference_BFC.square().mean((1, 2)),
            "penalty": penalty_BL.mean(1),
        }
        count = torch.tensor(float(len(mel_BFC)), device=mel_BFC.device)
        return {name: Loss(value_B.sum(), count) for name, value_B in parts.items()}


class TokenizerStage(Stage):
    """Trains encoder and decoder; saves the complete `MelTokenizer` with latent statistics and vocoder."""

    Options = TokenizerOptions

    def __init__(self, options: TokenizerOptions, seed: int):
        self.options, self.seed = options, seed
        vocoder = MelTokenizer.from_pretrained(options.vocoder)
        config = MelTokenizerConfig(vocoder.config.mel, options.autoencoder, vocoder.config.vocoder)
        tokenizer = MelTokenizer(config)
        tokenizer.front.load_state_dict(vocoder.front.state_dict())
        tokenizer.vocoder.load_state_dict(vocoder.vocoder.state_dict())
        self.answers = Answers(options.corpus, tokenizer.spec.sample_rate_hz, options.max_answers)
        self.module = TokenizerTraining(tokenizer, options)
        self.weights = {"l1": options.l1_weight, "l2": options.l2_weight, "penalty": options.penalty_weight}

    def batch(self, index: int, rank: int, world_size: int) -> TokenizerBatch:
        """Random crops; a pure function of the seed, `index` and `rank`."""
        tokenizer = self.module.tokenizer
        margin = self.module.margin_frames * tokenizer.front.config.hop_length
        num_samples = self.options.crop_tokens * tokenizer.spec.samples_per_token
        keys = (self.seed, index * world_size + rank)
        return TokenizerBatch(self.answers.crops(self.options.batch_size, num_samples, margin, *keys))

    def counts(self, batch: TokenizerBatch) -> dict[str, float]:
        """Rows."""
        return dict.fromkeys(self.weights, float(len(batch.wav_BS)))

    def num_tokens(self, batch: TokenizerBatch) -> int:
        """Mel frames."""
        return len(batch.wav_BS) * self.options.crop_tokens * self.module.tokenizer.frames_per_token

    def evaluate(self, folder: Path, step: int) -> dict[str, float]:
        """What `evaluate_resynthesis` measures, and how far latents spread compared with the training noise.

        latent_std_min and latent_std_max are over dimensions: a dimension far below `sigma` carries nothing.
        """
        tokenizer = self.module.tokenizer
        values = evaluate_resynthesis(tokenizer, self.answers, self.options.num_eval_answers, folder)
        latent_LD = torch.cat(list(self._latents(self.options.num_eval_answers, held_out=True)))
        std_D = latent_LD.std(0)
        return values | {"latent_std_min": float(std_D.min()), "latent_std_max": float(std_D.max())}

    def save(self, folder: Path) -> None:
        """The complete `MelTokenizer`."""
        self.module.tokenizer.fit_latent_statistics(self._latents(self.options.num_statistics_answers, held_out=False))
        self.module.tokenizer.save_pretrained(folder)

    @torch.no_grad()
    def _latents(self, num_answers: int, held_out: bool) -> Iterator[Tensor]:
        tokenizer = self.module.tokenizer
        some = self.answers.some_evaluation if held_out else self.answers.some_training
        for wav_1S in some(num_answers):
            mel_1FC, _ = tokenizer.mel(wav_1S.to(tokenizer.device))
            yield tokenizer.encode_mel(mel_1FC)[0].float()
