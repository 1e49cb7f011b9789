"""The losses of distillation, and the projections from a tokenizer's features to its teachers' widths.

Shape legend: B batch, L speech tokens, D width of the tokenizer's features, T width of a teacher, K codebooks
of a residual quantiser.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

from flowomni.losses import Loss

from .options import DistillationOptions
from .targets import Targets


def cosine_by_dimension(student_BLT: Tensor, target_BLT: Tensor, mask_BL: Tensor) -> Loss:
    """DM-Codec's and SpeechTokenizer's: the mean over dimensions of -log sigmoid(cosine over time).

    Each row is compared with itself alone. Rows without a target do not count; the others count one each.
    Source: arXiv 2410.15017, equation 1; arXiv 2308.16692.
    """
    _check_shapes(student_BLT, target_BLT, mask_BL)
    outside_BL1 = ~mask_BL[:, :, None]
    student_BLT = student_BLT.float().masked_fill(outside_BL1, 0.0)
    target_BLT = target_BLT.float().masked_fill(outside_BL1, 0.0)
    cosine_BT = functional.cosine_similarity(student_BLT, target_BLT, dim=1)
    counts_B = mask_BL.any(1)
    return Loss(-functional.logsigmoid(cosine_BT).mean(1).masked_fill(~counts_B, 0.0).sum(), counts_B.sum())


def cosine_by_step(student_BLT: Tensor, target_BLT: Tensor, mask_BL: Tensor) -> Loss:
    """1 - cosine over the dimensions of each speech token that has a target; each counts one."""
    _check_shapes(student_BLT, target_BLT, mask_BL)
    cosine_BL = functional.cosine_similarity(student_BLT.float(), target_BLT.float(), dim=2)
    return Loss((1.0 - cosine_BL).masked_fill(~mask_BL, 0.0).sum(), mask_BL.sum())


def _check_shapes(student_BLT: Tensor, target_BLT: Tensor, mask_BL: Tensor) -> None:
    # Broadcasting would hide a wrong one: with targets of shape (B, 1, L, T), which the code released with DM-Codec
    # loads, "over time" is over the batch.
    assert student_BLT.ndim == 3 and target_BLT.shape == student_BLT.shape and mask_BL.shape == student_BLT.shape[:2], (
        f"student {tuple(student_BLT.shape)}, target {tuple(target_BLT.shape)}, mask {tuple(mask_BL.shape)}: "
        "they must be [batch, time, dim], the same, and [batch, time]"
    )
    assert mask_BL.dtype == torch.bool


class Distillation(nn.Module):
    """Pulls a tokenizer's features towards its teachers', each through a linear projection of its own.

    Laws: a row's loss does not depend on the other rows, nor on what stands where the mask is false (NaN included);
    with both teachers, the weighted losses are those of each alone in their shares.

    Args:
        options: which levels, objective and weights.
        feature_dim: D.
        teacher_dims: T of each kind of teacher; `CorpusTargets.dims`.

    Attributes:
        weights: of each loss part in the sum that a stage trains on.

    Raises:
        ValueError: a teacher of the options has no targets.
    """

    def __init__(self, options: DistillationOptions, feature_dim: int, teacher_dims: Mapping[str, int]) -> None:
        super().__init__()
        missing = [kind for kind in options.teachers if kind not in teacher_dims]
        if missing:
            raise ValueError(
                f"distillation.{missing[0]}_teacher is set, but there are targets of {', '.join(teacher_dims)} only: "
                "prepare the targets with the same options"
            )
        self.options = options
        self.feature_dim = feature_dim
        self.project = nn.ModuleDict(
            {kind: nn.Linear(feature_dim, teacher_dims[kind]) for kind in options.teachers}  # as DM-Codec's `transform`
        )
        shares = {kind: float(getattr(options, f"{kind}_weight")) for kind in options.teachers}
        self.weights = {
            f"distill_{kind}": options.weight * share / sum(shares.values()) for kind, share in shares.items()
        }

    def forward(self, features: Tensor, targets: Mapping[str, Targets]) -> dict[str, Loss]:
        """Losses "distill_text" and "distill_speech", of the teachers that there are.

        Args:
            features: features_BLD (continuous latents, or the output of a quantiser), or level_KBLD, what the first 1,
                2, ... K codebooks of a residual quantiser say together.
            targets: by kind of teacher, as `CorpusTargets.batch` gives them.

        Raises:
            ValueError: features or targets of another width than this module was built for.
        """
        if features.shape[-1] != self.feature_dim:
            raise ValueError(
                f"features have width {features.shape[-1]}, but distillation was built for {self.feature_dim}: "
                "give it the tokenizer's latent_dim"
            )
        objective = cosine_by_dimension if self.options.objective == "dimension" else cosine_by_step
        losses = {}
        for kind, project in self.project.items():
            target_BLT, mask_BL = targets[kind].target_BLT, targets[kind].mask_BL
            if target_BLT.shape[-1] != project.out_features:
                raise ValueError(
                    f"distillation.{kind}_teacher: targets have width {target_BLT.shape[-1]}, but the projection was "
                    f"built for {project.out_features}: both must come from the same teacher"
                )
            student_BLD = self._student(features, kind)
            assert student_BLD.ndim == 3 and mask_BL.shape == student_BLD.shape[:2], (
                f"features {tuple(features.shape)} but targets {tuple(target_BLT.shape)}"
            )
            # Before the projection: its weight's gradient would multiply a NaN there by zero, and keep it.
            student_BLD = student_BLD.masked_fill(~mask_BL[:, :, None], 0.0)
            losses[f"distill_{kind}"] = objective(project(student_BLD), target_BLT, mask_BL)
        return losses

    def counts(self, targets: Mapping[str, Targets]) -> dict[str, float]:
        """What each loss will count, known before the forward pass."""
        by_row = self.options.objective == "dimension"
        masks = {kind: targets[kind].mask_BL for kind in self.options.teachers}
        return {
            f"distill_{kind}": float(mask_BL.any(1).sum() if by_row else mask_BL.sum())
            for kind, mask_BL in masks.items()
        }

    def _student(self, features: Tensor, kind: str) -> Tensor:
        if features.ndim == 3:
            return features
        return features[0] if getattr(self.options, f"{kind}_levels") == "first" else features[-1]
