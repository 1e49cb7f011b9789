"""The tokenizer stage: the mel autoencoder around an already trained vocoder.

Shapes: B batch, S samples, F frames, C mel bins, L speech tokens, D latent dimension, E encoder output, K codebooks,
N tokens of any rows.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from flowomni.tokenizers import AutoencoderConfig, CodebookUse, MelTokenizer, MelTokenizerConfig, codebook_use
from flowomni.tokenizers.bottlenecks import BottleneckOutput

from ..adversarial import AdversarialOptions, Adversary
from ..distillation import CorpusTargets, Distillation, DistillationOptions, Targets, prepare_targets
from .answers import Answers
from .base import Loss, Stage
from .vocoder import evaluate_resynthesis, mel_tokenizer, spectral_losses

DEAD_SHARE = 0.1  # a codebook of which less is used carries little more than one of a tenth of its size


@dataclass(frozen=True)
class TokenizerOptions:
    """Options of the tokenizer stage.

    Attributes:
        corpus: folder of a corpus manifest with `answers/*.flac`.
        vocoder: checkpoint of the vocoder stage, or a FlowOmni model; its mel front, statistics and vocoder become part
            of this one.
        autoencoder: sizes and bottleneck.
        batch_size, crop_tokens: rows of one micro-batch and their length.
        max_answers: at most so many files are loaded; 0 for all.
        l1_weight, l2_weight: of the reconstruction of standardised mel.
        penalty_weight: of the bottleneck's penalty: for "sigma_vae" and "kl_vae" around 0.002, for "vq" and "rvq",
            where it is also what their codebooks learn from, around 1.
        magnitude_weight, phase_weight: of the spectral distances, at several resolutions, of the vocoder's wave to the
            true one; the vocoder runs in training only if one of these or of `adversarial` is not 0.
        train_vocoder: whether the vocoder learns from those too.
        adversarial: discriminators of the vocoder's wave.
        distillation: what language and speech models teach; none by default. Where its targets are not cached yet, they
            are computed before the first step, by each process for itself.
        num_eval_answers: held-out answers in an evaluation.
        num_codebook_answers: training answers on which an evaluation measures the use of codebooks.
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
    magnitude_weight: float = 0.0
    phase_weight: float = 0.0
    train_vocoder: bool = False
    adversarial: AdversarialOptions = AdversarialOptions()
    distillation: DistillationOptions | None = None
    num_eval_answers: int = 16
    num_codebook_answers: int = 400
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
        if not self.penalty_weight and self.autoencoder.bottleneck in ("vq", "rvq"):
            raise ValueError(
                f"penalty_weight is 0, but autoencoder.bottleneck is {self.autoencoder.bottleneck!r}, whose codebooks "
                "learn from the penalty alone: set it to about 1"
            )
        if self.train_vocoder and not self.wave:
            raise ValueError(
                "train_vocoder is true, but the vocoder has no loss to learn from: set magnitude_weight, phase_weight "
                "or adversarial.weight"
            )

    @property
    def wave(self) -> bool:
        """Whether a loss is taken of the wave, so that the vocoder must run in training."""
        return bool(self.magnitude_weight or self.phase_weight or self.adversarial.weight)

    @property
    def weights(self) -> dict[str, float]:
        """Weight of each loss part there is; those of distillation are `Distillation.weights`."""
        weights = {"l1": self.l1_weight, "l2": self.l2_weight, "penalty": self.penalty_weight}
        if self.wave:
            weights |= {"magnitude": self.magnitude_weight, "phase": self.phase_weight}
        if self.adversarial.weight:
            weights |= {"adversarial": self.adversarial.weight, "feature": self.adversarial.feature_weight}
            weights["discriminator"] = 1.0  # reaches nothing but the discriminators
        return weights


@dataclass(frozen=True)
class TokenizerBatch:
    """Crops of answers.

    Attributes:
        wav_BS: with a margin on both sides.
        targets: of the crops' speech tokens, by kind of teacher; none without distillation.
    """

    wav_BS: Tensor
    targets: Mapping[str, Targets] = field(default_factory=dict)

    def to(self, device: torch.device) -> TokenizerBatch:
        """The same batch on `device`."""
        return TokenizerBatch(
            self.wav_BS.to(device), {kind: targets.to(device) for kind, targets in self.targets.items()}
        )


@dataclass(frozen=True)
class Reconstruction:
    """A batch's way through the autoencoder: all that a loss can be taken of.

    Attributes:
        mel_BFC: the standardised mel that went in.
        found_BFC: what came out.
        before_BLD: latents before the bottleneck (the mean, where that makes a distribution of them).
        bottleneck: what it made of them: the latents that the decoder read, and the codebooks' levels if it has any.
    """

    mel_BFC: Tensor
    found_BFC: Tensor
    before_BLD: Tensor
    bottleneck: BottleneckOutput

    @property
    def features(self) -> Tensor:
        """What a distillation is taken of: what a model over the tokens will read, without noise or dropout.

        before_BLD of a continuous bottleneck; level_KBLD of "vq" and "rvq"; of "fsq", whose codebooks stand side by
        side, the latents of all codes together.
        """
        if self.bottleneck.level_KBLD is not None:
            return self.bottleneck.level_KBLD
        return self.before_BLD if self.bottleneck.code_BLK is None else self.bottleneck.latent_BLD


class TokenizerTraining(nn.Module):
    """A tokenizer whose encoder, bottleneck and decoder train, and what it learns from: discriminators, projections.

    Args:
        teacher_dims: width of each kind of teacher, with `options.distillation`; `CorpusTargets.dims`.
    """

    def __init__(
        self, tokenizer: MelTokenizer, options: TokenizerOptions, teacher_dims: Mapping[str, int] | None = None
    ):
        super().__init__()
        self.tokenizer = tokenizer
        self.tokenizer.vocoder.requires_grad_(options.train_vocoder)
        self.adversary = Adversary(options.adversarial) if options.adversarial.weight else None
        # last, so that the rest starts from the weights that it has without
        self.distillation: Distillation | None = None
        if options.distillation is not None:
            latent_dim = options.autoencoder.latent_dim
            self.distillation = Distillation(options.distillation, latent_dim, teacher_dims or {})
        self.options = options

    @property
    def margin_frames(self) -> int:
        """Frames on each side of a crop which its mel frames see."""
        mel = self.tokenizer.front.config
        return math.ceil(mel.n_fft / 2 / mel.hop_length)

    @property
    def num_frames(self) -> int:
        """Mel frames of a crop."""
        return self.options.crop_tokens * self.tokenizer.frames_per_token

    def forward(self, batch: TokenizerBatch, generator: torch.Generator) -> dict[str, Loss]:
        """The losses of `TokenizerOptions.weights`, summed over rows, and those of distillation."""
        found = self.reconstruct(batch, generator)
        difference_BFC = found.found_BFC - found.mel_BFC
        parts = {
            "l1": difference_BFC.abs().mean((1, 2)).sum(),
            "l2": difference_BFC.square().mean((1, 2)).sum(),
            "penalty": found.bottleneck.penalty_BL.mean(1).sum(),
        }
        if self.options.wave:
            parts |= self._wave_losses(found.found_BFC, batch.wav_BS)
        count = torch.tensor(float(len(difference_BFC)), device=difference_BFC.device)
        losses = {name: Loss(value, count) for name, value in parts.items()}
        return losses | (self.distillation(found.features, batch.targets) if self.distillation is not None else {})

    def reconstruct(self, batch: TokenizerBatch, generator: torch.Generator) -> Reconstruction:
        """Mel through encoder, bottleneck (with its noise or dropout) and decoder."""
        tokenizer, margin = self.tokenizer, self.margin_frames
        assert tokenizer.encoder is not None
        with torch.no_grad():
            mel_BFC = tokenizer.front(batch.wav_BS, self.num_frames + margin)[:, margin:]
        encoded_BLE = tokenizer.encoder(mel_BFC).float()
        output = tokenizer.bottleneck(encoded_BLE, generator)
        found_BFC = tokenizer.decode_mel(output.latent_BLD).float()
        return Reconstruction(mel_BFC, found_BFC, encoded_BLE[..., : tokenizer.autoencoder_config.latent_dim], output)

    def _wave_losses(self, found_BFC: Tensor, wav_BS: Tensor) -> dict[str, Tensor]:
        """Of the vocoder's wave: "magnitude", "phase" and what the discriminators say, summed over rows."""
        hop = self.tokenizer.front.config.hop_length
        found_BS = self.tokenizer.vocoder(found_BFC)
        target_BS = wav_BS[:, self.margin_frames * hop : (self.margin_frames + self.num_frames) * hop]
        with torch.autocast(wav_BS.device.type, enabled=False):
            magnitude_B, phase_B = spectral_losses(found_BS, target_BS)
        parts = {"magnitude": magnitude_B.sum(), "phase": phase_B.sum()}
        if self.adversary is not None:
            means = self.adversary(found_BS, target_BS)
            parts |= {name: mean * float(len(found_BS)) for name, mean in means.items()}
        return parts


class TokenizerStage(Stage):
    """Trains encoder, bottleneck and decoder; saves the complete `MelTokenizer` with latent statistics and vocoder."""

    Options = TokenizerOptions

    def __init__(self, options: TokenizerOptions, seed: int):
        self.options, self.seed = options, seed
        vocoder = mel_tokenizer(options.vocoder, "vocoder")
        config = MelTokenizerConfig(vocoder.config.mel, options.autoencoder, vocoder.config.vocoder)
        tokenizer = MelTokenizer(config)
        tokenizer.front.load_state_dict(vocoder.front.state_dict())
        tokenizer.vocoder.load_state_dict(vocoder.vocoder.state_dict())
        self.answers = Answers(options.corpus, tokenizer.spec.sample_rate_hz, options.max_answers)
        self.targets: CorpusTargets | None = None
        if options.distillation is not None:
            spec, names = tokenizer.spec, self.answers.training_names
            with torch.random.fork_rng([]):  # loading a teacher may draw, and ours must start as they do without
                self.targets = prepare_targets(
                    options.distillation, options.corpus, spec.samples_per_token / spec.sample_rate_hz, names
                )
        self.module = TokenizerTraining(tokenizer, options, self.targets.dims if self.targets is not None else None)
        self.weights = options.weights
        if self.module.distillation is not None:
            self.weights |= self.module.distillation.weights

    def batch(self, index: int, rank: int, world_size: int) -> TokenizerBatch:
        """Random crops; a pure function of the seed, `index` and `rank`."""
        tokenizer, num_rows, num_tokens = self.module.tokenizer, self.options.batch_size, self.options.crop_tokens
        margin = self.module.margin_frames * tokenizer.front.config.hop_length
        num_samples = num_tokens * tokenizer.spec.samples_per_token
        keys = (self.seed, index * world_size + rank)
        wav_BS = self.answers.crops(num_rows, num_samples, margin, *keys)
        if self.targets is None:
            return TokenizerBatch(wav_BS)
        places = self.answers.places(num_rows, num_samples, *keys)
        names = [self.answers.training_names[place.index] for place in places]
        starts_sec = [place.start / tokenizer.spec.sample_rate_hz for place in places]
        return TokenizerBatch(wav_BS, self.targets.batch(names, starts_sec, num_tokens))

    def counts(self, batch: TokenizerBatch) -> dict[str, float]:
        """Rows; for distillation, those with a target or the tokens that have one."""
        counts = dict.fromkeys(self.options.weights, float(len(batch.wav_BS)))
        distillation = self.module.distillation
        return counts | (distillation.counts(batch.targets) if distillation is not None else {})

    def num_tokens(self, batch: TokenizerBatch) -> int:
        """Mel frames."""
        return len(batch.wav_BS) * self.module.num_frames

    def evaluate(self, folder: Path, step: int) -> dict[str, float]:
        """What `evaluate_resynthesis` measures, how far latents spread, and how the codebooks are used.

        latent_std_min and latent_std_max are over dimensions: one far below a sigma-VAE's `sigma` carries nothing. Of
        each codebook: share of codes used and perplexity, over `num_codebook_answers` answers; and the bitrate.
        """
        tokenizer = self.module.tokenizer
        values = evaluate_resynthesis(tokenizer, self.answers, self.options.num_eval_answers, folder)
        latent_LD = torch.cat(list(self._latents(self.options.num_eval_answers, held_out=True)))
        std_D = latent_LD.std(0, correction=0)
        values |= {"latent_std_min": float(std_D.min()), "latent_std_max": float(std_D.max())}
        if tokenizer.spec.bitrate is not None:
            values["bitrate"] = tokenizer.spec.bitrate
            uses = self._codebook_use()
            for index, use in enumerate(uses):
                values |= {f"codebook_use_{index}": use.share, f"perplexity_{index}": use.perplexity}
            warn_of_dead_codebooks(uses, tokenizer.spec.codebook_size)
        return values

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

    @torch.no_grad()
    def _codebook_use(self) -> list[CodebookUse]:
        tokenizer = self.module.tokenizer
        wavs = self.answers.some_training(self.options.num_codebook_answers)
        code_NK = torch.cat([tokenizer.encode(wav_1S.to(tokenizer.device))[0][0] for wav_1S in wavs])
        return codebook_use(code_NK, tokenizer.spec.codebook_size)


def warn_of_dead_codebooks(uses: list[CodebookUse], codebook_size: int) -> None:
    """A warning that names each codebook of which less than `DEAD_SHARE` is used, and what helps."""
    dead = [
        f"{index} ({use.num_used} of {codebook_size} codes, perplexity {use.perplexity:.1f})"
        for index, use in enumerate(uses)
        if use.share < DEAD_SHARE
    ]
    if dead:
        warnings.warn(
            f"dead codebooks: {', '.join(dead)}. They carry next to nothing: raise options.penalty_weight, lower "
            "options.autoencoder.codebook_size or num_codebooks, or use options.autoencoder.bottleneck fsq",
            stacklevel=2,
        )
