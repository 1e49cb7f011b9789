"""Distillation: the losses, and the module that holds a tokenizer to its teachers."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from training.distillation import (
    Distillation,
    DistillationOptions,
    Targets,
    cosine_by_dimension,
    cosine_by_step,
)

# --- losses ---------------------------------------------------------------------------------------------------------


def random_batch(num_rows: int = 3, num_tokens: int = 7, dim: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    student_BLT, target_BLT = torch.randn(2, num_rows, num_tokens, dim, generator=generator)
    mask_BL = torch.rand(num_rows, num_tokens, generator=generator) < 0.7
    mask_BL[-1] = False
    return student_BLT, target_BLT, mask_BL


def test_cosine_by_dimension_is_over_the_time_of_each_row() -> None:
    student_BLT, target_BLT, mask_BL = random_batch()
    loss = cosine_by_dimension(student_BLT, target_BLT, mask_BL)
    wanted = 0.0
    for student_LT, target_LT, mask_L in list(zip(student_BLT, target_BLT, mask_BL, strict=True))[:-1]:
        for x_L, y_L in zip(student_LT[mask_L].T, target_LT[mask_L].T, strict=True):
            cosine = float(x_L @ y_L / (x_L.norm() * y_L.norm()))
            wanted += -math.log(1 / (1 + math.exp(-cosine))) / student_BLT.shape[2]
    assert float(loss.sum) == pytest.approx(wanted, rel=1e-5)
    assert int(loss.count) == 2  # the last row has no target


def test_cosine_by_step_is_over_the_dimensions_of_each_token() -> None:
    student_BLT, target_BLT, mask_BL = random_batch()
    loss = cosine_by_step(student_BLT, target_BLT, mask_BL)
    cosines = torch.cosine_similarity(student_BLT[mask_BL], target_BLT[mask_BL], dim=-1)
    torch.testing.assert_close(loss.sum, (1 - cosines).sum())
    assert int(loss.count) == int(mask_BL.sum())


def test_the_best_student_has_the_least_loss() -> None:
    _, target_BLT, mask_BL = random_batch()
    best = cosine_by_dimension(3.0 * target_BLT, target_BLT, mask_BL)
    assert float(best.sum / best.count) == pytest.approx(math.log(1 + math.exp(-1)))
    assert float(cosine_by_step(3.0 * target_BLT, target_BLT, mask_BL).sum) == pytest.approx(0.0, abs=1e-5)


@pytest.mark.parametrize("objective", [cosine_by_dimension, cosine_by_step])
def test_targets_with_a_dimension_too_many_are_refused(objective: object) -> None:
    """The code released with DM-Codec loads targets as (batch, 1, time, dim): its cosine then runs over the batch."""
    student_BLT, target_BLT, mask_BL = random_batch()
    for wrong in (target_BLT[:, None], target_BLT[:, :1], target_BLT.transpose(1, 2)):
        with pytest.raises(AssertionError, match=r"\[batch, time, dim\]"):
            objective(student_BLT, wrong, mask_BL)  # type: ignore[operator]


# --- the module -----------------------------------------------------------------------------------------------------


def options(**values: object) -> DistillationOptions:
    settings: dict[str, object] = {"cache": "cache", "text_teacher": "text", "speech_teacher": "speech"}
    return DistillationOptions(**(settings | values))  # type: ignore[arg-type]


def random_targets(dims: dict[str, int], num_rows: int = 3, num_tokens: int = 7) -> dict[str, Targets]:
    found = {}
    for kind, dim in dims.items():
        _, target_BLT, mask_BL = random_batch(num_rows, num_tokens, dim)
        found[kind] = Targets(target_BLT.masked_fill(~mask_BL[:, :, None], 0.0), mask_BL)
    return found


DIMS = {"text": 6, "speech": 4}


@pytest.mark.parametrize("objective", ["dimension", "step"])
def test_what_stands_outside_the_mask_reaches_nothing(objective: str) -> None:
    torch.manual_seed(0)
    module, targets = Distillation(options(objective=objective), 5, DIMS), random_targets(DIMS)
    features_BLD = torch.randn(3, 7, 5, requires_grad=True)
    outside = ~(targets["text"].mask_BL | targets["speech"].mask_BL)
    results = []
    for fill in (0.0, float("nan")):
        module.zero_grad()
        features_BLD.grad = None
        losses = module(features_BLD.masked_fill(outside[:, :, None], fill), targets)
        sum(loss.sum for loss in losses.values()).backward()
        results.append([*(loss.sum.detach() for loss in losses.values()), *(p.grad for p in module.parameters())])
        assert features_BLD.grad is not None and not features_BLD.grad[outside].any()
        assert features_BLD.grad.isfinite().all() and features_BLD.grad.any()
    torch.testing.assert_close(results[0], results[1])


@pytest.mark.parametrize("objective", ["dimension", "step"])
def test_a_row_is_compared_with_itself_alone_and_counts_are_known_before(objective: str) -> None:
    torch.manual_seed(0)
    module, targets = Distillation(options(objective=objective), 5, DIMS), random_targets(DIMS)
    features_BLD = torch.randn(3, 7, 5)
    together = module(features_BLD, targets)
    rows = [
        module(features_BLD[b : b + 1], {k: Targets(t.target_BLT[b : b + 1], t.mask_BL[b : b + 1]) for k, t in items})
        for items in [list(targets.items())]
        for b in range(3)
    ]
    for name, loss in together.items():
        torch.testing.assert_close(loss.sum, sum(row[name].sum for row in rows))
        assert float(loss.count) == module.counts(targets)[name]


def test_levels_of_a_residual_quantiser() -> None:
    torch.manual_seed(0)
    targets, level_KBLD = random_targets(DIMS), torch.randn(3, 3, 7, 5)
    module = Distillation(options(text_levels="first", speech_levels="all"), 5, DIMS)
    found = module(level_KBLD, targets)
    torch.testing.assert_close(found["distill_text"].sum, module(level_KBLD[0], targets)["distill_text"].sum)
    torch.testing.assert_close(found["distill_speech"].sum, module(level_KBLD[2], targets)["distill_speech"].sum)
    assert not torch.equal(found["distill_speech"].sum, module(level_KBLD[0], targets)["distill_speech"].sum)


def test_two_teachers_share_the_weight() -> None:
    both = Distillation(options(weight=12.0, text_weight=2.0), 5, DIMS)
    assert both.weights == {"distill_text": 8.0, "distill_speech": 4.0}
    alone = Distillation(options(weight=12.0, text_weight=2.0, speech_teacher=""), 5, DIMS)
    assert alone.weights == {"distill_text": 12.0} and list(alone.project) == ["text"]


@pytest.mark.parametrize("objective", ["dimension", "step"])
def test_features_learn_what_the_teachers_say(objective: str) -> None:
    torch.manual_seed(0)
    module, targets = Distillation(options(objective=objective), 8, DIMS), random_targets(DIMS)
    features_BLD = torch.nn.Parameter(0.1 * torch.randn(3, 7, 8))
    optimizer = torch.optim.Adam([features_BLD, *module.parameters()], lr=0.05)
    best = math.log(1 + math.exp(-1)) if objective == "dimension" else 0.0
    for _ in range(150):
        losses = [loss.sum / loss.count for loss in module(features_BLD, targets).values()]
        optimizer.zero_grad()
        sum(losses).backward()
        optimizer.step()
    assert all(loss.item() < best + 0.03 for loss in losses)


def test_a_teacher_of_the_wrong_width_is_named() -> None:
    module = Distillation(options(), 5, DIMS)
    with pytest.raises(ValueError, match=r"distillation\.speech_teacher: targets have width 9, .* built for 4"):
        module(torch.randn(3, 7, 5), random_targets(DIMS | {"speech": 9}))
    with pytest.raises(ValueError, match="features have width 6, but distillation was built for 5"):
        module(torch.randn(3, 7, 6), random_targets(DIMS))
    with pytest.raises(ValueError, match=r"distillation\.speech_teacher is set, but there are targets of text only"):
        Distillation(options(), 5, {"text": 6})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"placement": "shifted"}, "distillation.placement is 'shifted'; it must be 'aligned' or 'padded'"),
        ({"text_teacher": "", "speech_teacher": ""}, "neither text_teacher nor speech_teacher"),
        ({"cache": ""}, "distillation.cache is empty"),
        ({"weight": -1.0}, "distillation.weight is -1.0"),
        ({"speech_weight": 0.0}, "distillation.speech_weight is 0.0"),
        ({"silence": "zero", "objective": "step"}, "distillation.silence is 'zero', which has no meaning"),
    ],
)
def test_bad_options_are_named(values: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        options(**values)
