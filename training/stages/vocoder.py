"""The vocoder stage: mel to wave, by spectral distances at several resolutions (Vocos without its discriminators).

Shapes: B batch, S samples, F frames, C mel bins, N frequency bins, D latent dimension.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import soundfile
import torch
from torch import Tensor, nn
from torch.nn import functional

from flowomni.build import load_part_tokenizer
from flowomni.tokenizers import AutoencoderConfig, MelConfig, MelTokenizer, MelTokenizerConfig, VocoderConfig

from .answers import Answers
from .base import Loss, Stage, rng_for

STFT_SIZES = (512, 1024, 2048)
LOG_FLOOR = 1e-3  # magnitudes below are the rounding noise of 16-bit files


@dataclass(frozen=True)
class VocoderOptions:
    """Options of the vocoder stage.

    Attributes:
        corpus: folder of a corpus manifest with `answers/*.flac`.
        mel, vocoder: sizes; not used with `tokenizer`, which has its own.
        frames_per_token: patch of the plain-patch tokenizer that this stage saves.
        tokenizer: checkpoint of a trained MelTokenizer, or of a FlowOmni model with one, whose vocoder is to be
            fine-tuned on what its decoder gives.
        decoded_share: share of rows that are decoded from latents then; the others are true mels.
        latent_noise: largest deviation of the noise on those (standardised) latents, uniform per row.
        batch_size, crop_frames: rows of one micro-batch and their length.
        max_answers: at most so many files are loaded; 0 for all.
        mel_weight, magnitude_weight, phase_weight: of the log-mel L1, the STFT magnitudes, the complex STFT.
        num_eval_answers: held-out answers in an evaluation.
    """

    corpus: str
    mel: MelConfig = MelConfig()
    vocoder: VocoderConfig = VocoderConfig()
    frames_per_token: int = 8
    tokenizer: str | None = None
    decoded_share: float = 0.7
    latent_noise: float = 0.2
    batch_size: int = 16
    crop_frames: int = 64
    max_answers: int = 6000
    mel_weight: float = 1.0
    magnitude_weight: float = 1.0
    phase_weight: float = 0.1
    num_eval_answers: int = 16

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.crop_frames < 1:
            raise ValueError(
                f"batch_size is {self.batch_size}, crop_frames {self.crop_frames}; both must be at least 1"
            )
        if not 0 <= self.decoded_share <= 1:
            raise ValueError(f"decoded_share is {self.decoded_share}; it must be between 0 and 1")


@dataclass(frozen=True)
class VocoderBatch:
    """Crops of answers.

    Attributes:
        wav_BS: with a margin of `margin_frames` hops on both sides of the crop.
        decoded_B: which rows go through the tokenizer's latents.
    """

    wav_BS: Tensor
    decoded_B: Tensor

    def to(self, device: torch.device) -> VocoderBatch:
        """The same batch on `device`."""
        return VocoderBatch(self.wav_BS.to(device), self.decoded_B.to(device))


def complex_stft(wav_BS: Tensor, size: int) -> Tensor:
    """Complex STFT, (B, N, F), hop a quarter of `size`, Hann window."""
    window = torch.hann_window(size, device=wav_BS.device)
    return torch.stft(wav_BS, size, size // 4, window=window, return_complex=True)


def spectral_losses(wav_BS: Tensor, target_BS: Tensor) -> tuple[Tensor, Tensor]:
    """Per row: distance of STFT magnitudes and of the complex STFT, mean over `STFT_SIZES`.

    Magnitudes: relative Frobenius distance (spectral convergence) plus the L1 of the logarithms (Parallel WaveGAN,
    arXiv 1910.11480). Complex: L1 of the differences over the L1 of the target, which sees phase too.
    """
    magnitude_B, complex_B = torch.zeros_like(wav_BS[:, 0]), torch.zeros_like(wav_BS[:, 0])
    for size in STFT_SIZES:
        spectrum_BNF, target_BNF = complex_stft(wav_BS, size), complex_stft(target_BS, size)
        # an eps inside the root: the gradient of abs at zero is NaN
        found_BNF = (spectrum_BNF.real.square() + spectrum_BNF.imag.square() + 1e-9).sqrt()
        wanted_BNF = (target_BNF.real.square() + target_BNF.imag.square() + 1e-9).sqrt()
        difference_BNF = torch.view_as_real(spectrum_BNF - target_BNF)
        norm_B = wanted_BNF.square().sum((1, 2)).sqrt() + 1e-1
        magnitude_B = magnitude_B + (found_BNF - wanted_BNF).square().sum((1, 2)).sqrt() / norm_B
        log_ratio_BNF = found_BNF.clamp(min=LOG_FLOOR).log() - wanted_BNF.clamp(min=LOG_FLOOR).log()
        magnitude_B = magnitude_B + log_ratio_BNF.abs().mean((1, 2))
        complex_B = complex_B + difference_BNF.abs().sum((1, 2, 3)) / (wanted_BNF.sum((1, 2)) + 1e-1)
    return magnitude_B / len(STFT_SIZES), complex_B / len(STFT_SIZES)


class VocoderTraining(nn.Module):
    """A tokenizer whose vocoder trains; everything else in it is fixed."""

    def __init__(self, tokenizer: MelTokenizer, options: VocoderOptions):
        super().__init__()
        self.tokenizer = tokenizer.requires_grad_(False)
        self.tokenizer.vocoder.requires_grad_(True)
        self.options = options

    @property
    def margin_frames(self) -> int:
        """Frames on each side of a crop which its mel frames see."""
        mel = self.tokenizer.front.config
        return math.ceil(mel.n_fft / 2 / mel.hop_length)

    def forward(self, batch: VocoderBatch, generator: torch.Generator) -> dict[str, Loss]:
        """Losses "mel", "magnitude" and "phase", summed over rows."""
        front, margin, num_frames = self.tokenizer.front, self.margin_frames, self.options.crop_frames
        hop = front.config.hop_length
        with torch.no_grad():
            mel_BFC = front(batch.wav_BS, num_frames + margin)[:, margin:]
            mel_BFC = self._decoded(mel_BFC, batch.decoded_B, generator)
        target_BS = batch.wav_BS[:, margin * hop : (margin + num_frames) * hop]
        wav_BS = self.tokenizer.vocoder(mel_BFC)
        with torch.autocast(wav_BS.device.type, enabled=False):
            floor = math.log(1e-4)
            found_BFC = front.log_mel(wav_BS, num_frames).clamp(min=floor)
            wanted_BFC = front.log_mel(target_BS, num_frames).clamp(min=floor)
            mel_B = (found_BFC - wanted_BFC).abs().mean((1, 2))
            magnitude_B, phase_B = spectral_losses(wav_BS, target_BS)
        count = torch.tensor(float(len(mel_B)), device=mel_B.device)
        parts = {"mel": mel_B, "magnitude": magnitude_B, "phase": phase_B}
        return {name: Loss(value_B.sum(), count) for name, value_B in parts.items()}

    def _decoded(self, mel_BFC: Tensor, decoded_B: Tensor, generator: torch.Generator) -> Tensor:
        """Put what the tokenizer's decoder gives in place of the rows in `decoded_B`, from noisy latents."""
        tokenizer = self.tokenizer
        if tokenizer.decoder is None or not bool(decoded_B.any()):
            return mel_BFC
        whole = mel_BFC.shape[1] // tokenizer.frames_per_token * tokenizer.frames_per_token
        latent_BLD = tokenizer.encode_mel(mel_BFC[decoded_B, :whole]).float()
        scale_B = torch.rand(len(latent_BLD), generator=generator, device=latent_BLD.device) * self.options.latent_noise
        noisy_BLD = tokenizer.perturb(latent_BLD, scale_B, generator)
        found_BFC = mel_BFC.clone()
        found_BFC[decoded_B, :whole] = tokenizer.decode_mel(noisy_BLD).to(mel_BFC.dtype)
        return found_BFC


class VocoderStage(Stage):
    """Trains a vocoder; what it saves is a `MelTokenizer`: the plain-patch one around it, or the tuned `tokenizer`."""

    Options = VocoderOptions

    def __init__(self, options: VocoderOptions, seed: int):
        self.options, self.seed = options, seed
        if options.tokenizer is None:
            plain = AutoencoderConfig.plain_patch(options.frames_per_token, options.mel.num_mels)
            tokenizer = MelTokenizer(MelTokenizerConfig(options.mel, plain, options.vocoder))
        else:
            tokenizer = mel_tokenizer(options.tokenizer, "tokenizer")
            if options.crop_frames % tokenizer.frames_per_token:
                raise ValueError(
                    f"crop_frames is {options.crop_frames}, but tokenizer {options.tokenizer} has "
                    f"{tokenizer.frames_per_token} frames per token: use a multiple of that"
                )
        self.answers = Answers(options.corpus, tokenizer.spec.sample_rate_hz, options.max_answers)
        if options.tokenizer is None:
            fit_mel_statistics(tokenizer, self.answers)
        self.module = VocoderTraining(tokenizer, options)
        self.weights = {"mel": options.mel_weight, "magnitude": options.magnitude_weight, "phase": options.phase_weight}

    def batch(self, index: int, rank: int, world_size: int) -> VocoderBatch:
        """Random crops; a pure function of the seed, `index` and `rank`."""
        options, hop = self.options, self.module.tokenizer.front.config.hop_length
        keys = (self.seed, index * world_size + rank)
        margin = self.module.margin_frames * hop
        wav_BS = self.answers.crops(options.batch_size, options.crop_frames * hop, margin, *keys)
        decoded_B = rng_for(*keys, 1).random(options.batch_size) < options.decoded_share
        return VocoderBatch(wav_BS, torch.from_numpy(decoded_B))

    def counts(self, batch: VocoderBatch) -> dict[str, float]:
        """Rows."""
        return dict.fromkeys(self.weights, float(len(batch.wav_BS)))

    def num_tokens(self, batch: VocoderBatch) -> int:
        """Mel frames."""
        return len(batch.wav_BS) * self.options.crop_frames

    def evaluate(self, folder: Path, step: int) -> dict[str, float]:
        """Mean losses over whole held-out answers; the first three are written as wav files with their originals."""
        return evaluate_resynthesis(self.module.tokenizer, self.answers, self.options.num_eval_answers, folder)

    def save(self, folder: Path) -> None:
        """A `MelTokenizer` checkpoint."""
        self.module.tokenizer.save_pretrained(folder)


def mel_tokenizer(path: str, what: str) -> MelTokenizer:
    """The mel tokenizer in a folder, on its own or as a part of a FlowOmni model.

    Raises:
        ValueError: naming option `what`; there is none, or one of another kind.
    """
    try:
        found = load_part_tokenizer(path)
    except ValueError as error:
        raise ValueError(f"options.{what}: {error}") from None
    if not isinstance(found, MelTokenizer):
        raise ValueError(f"options.{what}: {path!r} holds a {found.config.model_type!r} model, not a mel tokenizer")
    return found


def fit_mel_statistics(tokenizer: MelTokenizer, answers: Answers, num_answers: int = 400) -> None:
    """Set the tokenizer's mel statistics from training answers."""
    hop = tokenizer.front.config.hop_length
    wavs = answers.some_training(num_answers)
    tokenizer.front.fit_statistics(tokenizer.front.log_mel(wav_1S, -(-wav_1S.shape[1] // hop))[0] for wav_1S in wavs)


@torch.no_grad()
def evaluate_resynthesis(tokenizer: MelTokenizer, answers: Answers, num_answers: int, folder: Path) -> dict[str, float]:
    """Held-out answers through encode and decode: log-mel L1 and the spectral distances; three examples as files."""
    front = tokenizer.front
    device = front.mean_C.device
    sums = dict.fromkeys(("mel_l1", "magnitude", "phase"), 0.0)
    rows = list(answers.some_evaluation(num_answers))
    for index, wav_1S in enumerate(rows):
        wav_1S = wav_1S.to(device)
        found_1S = tokenizer.decode(tokenizer.encode(wav_1S)[0])[:, : wav_1S.shape[1]]
        num_frames = -(-wav_1S.shape[1] // front.config.hop_length)
        floor = math.log(1e-4)
        difference = front.log_mel(found_1S, num_frames).clamp(min=floor) - front.log_mel(wav_1S, num_frames).clamp(
            min=floor
        )
        missing = max(0, max(STFT_SIZES) - wav_1S.shape[1])  # an STFT reflects half its size at the ends
        magnitude_B, phase_B = spectral_losses(*(functional.pad(wav, (0, missing)) for wav in (found_1S, wav_1S)))
        sums["mel_l1"] += float(difference.abs().mean())
        sums["magnitude"] += float(magnitude_B)
        sums["phase"] += float(phase_B)
        if index < 3:
            rate = tokenizer.spec.sample_rate_hz
            soundfile.write(folder / f"{index}_decoded.wav", found_1S[0].clamp(-1, 1).cpu().numpy(), rate)
            soundfile.write(folder / f"{index}_original.wav", wav_1S[0].cpu().numpy(), rate)
    return {name: value / len(rows) for name, value in sums.items()}
