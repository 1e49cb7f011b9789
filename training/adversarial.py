"""Vocos' discriminators and losses (arXiv 2306.00814), in a form that one optimizer step serves.

Generator and discriminators stand in one module and their losses are summed, each reaching its own side alone: the
discriminators' loss sees a detached wave, and the generator's losses go through discriminators whose parameters are
held fixed. Both sides so take a step from the same point (simultaneous, where Vocos alternates), with the loop's one
optimizer, schedule and clipping; the discriminators' state is part of every checkpoint, so resuming is exact. Adam
undoes the common scale that clipping by the joint norm brings.

Shapes: B batch, S samples.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torchaudio.transforms import Spectrogram
from vocos.discriminators import MultiPeriodDiscriminator, MultiResolutionDiscriminator
from vocos.loss import DiscriminatorLoss, FeatureMatchingLoss, GeneratorLoss

RESOLUTION_WEIGHT = 0.1  # of the spectral discriminators, against those of periods: vocos' configs/vocos.yaml


@dataclass(frozen=True)
class AdversarialOptions:
    """Options of the adversarial losses; off by default.

    Attributes:
        weight: of the loss of fooling the discriminators, and whether there are any. Vocos: 1 against a log-mel of 45.
        feature_weight: of matching the features that the discriminators find in the true wave. Vocos: 1.
        periods: of the period discriminators (8 million parameters each); empty for none.
        fft_sizes: of the spectral discriminators (0.6 million each); empty for none.
    """

    weight: float = 0.0
    feature_weight: float = 0.0
    periods: tuple[int, ...] = (2, 3, 5, 7, 11)
    fft_sizes: tuple[int, ...] = (2048, 1024, 512)

    def __post_init__(self) -> None:
        if self.feature_weight and not self.weight:
            raise ValueError(
                f"adversarial.feature_weight is {self.feature_weight}, but adversarial.weight is 0, so there are no "
                "discriminators to have features: set adversarial.weight"
            )
        if self.weight and not self.periods and not self.fft_sizes:
            raise ValueError("adversarial.periods and adversarial.fft_sizes are both empty: give one of them sizes")


class Adversary(nn.Module):
    """The discriminators, and both sides' losses."""

    def __init__(self, options: AdversarialOptions):
        super().__init__()
        families: list[nn.Module] = []
        self.weights: list[float] = []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # vocos uses the older of torch's two weight norms
            if options.periods:
                families.append(MultiPeriodDiscriminator(options.periods))
                self.weights.append(1.0)
            if options.fft_sizes:
                families.append(MultiResolutionDiscriminator(options.fft_sizes))
                self.weights.append(RESOLUTION_WEIGHT)
        self.families = nn.ModuleList(families)
        for part in self.families.modules():
            if isinstance(part, Spectrogram):
                # torch makes a periodic window as a view of a longer one, which safetensors refuses to load in place
                part.window = part.window.clone()
        self.fool, self.tell, self.match = GeneratorLoss(), DiscriminatorLoss(), FeatureMatchingLoss()

    def forward(self, wav_BS: Tensor, target_BS: Tensor) -> dict[str, Tensor]:
        """Means over rows: "discriminator" moves the discriminators, "adversarial" and "feature" only the wave."""
        zero = torch.zeros((), device=wav_BS.device)
        parts = {"discriminator": zero, "adversarial": zero, "feature": zero}
        for family, weight in zip(self.families, self.weights, strict=True):
            true_scores, false_scores, _, _ = family(target_BS, wav_BS.detach())
            found, _, _ = self.tell(_float(true_scores), _float(false_scores))
            parts["discriminator"] = parts["discriminator"] + weight * found[0] / len(true_scores)
            family.requires_grad_(False)
            _, scores, true_features, features = family(target_BS, wav_BS)
            family.requires_grad_(True)
            found, _ = self.fool(_float(scores))
            parts["adversarial"] = parts["adversarial"] + weight * found[0] / len(scores)
            matched = self.match([_float(f) for f in true_features], [_float(f) for f in features])
            parts["feature"] = parts["feature"] + weight * matched[0] / len(features)
        return parts


def _float(values: list[Tensor]) -> list[Tensor]:
    """Sums of many terms are not for half precision."""
    return [value.float() for value in values]
