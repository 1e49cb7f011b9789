"""Cheaper sampling by fine-tuning: guidance in one pass instead of two, one jump instead of many steps.

Shapes: N rows, B batch, L positions, H hidden width.
"""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from torch import Tensor

from flowomni import flow
from flowomni.api import FlowOmni
from flowomni.build import load_model, save_model
from flowomni.heads import FlowHead, FlowHeadConfig, FlowSampling
from flowomni.layouts import Turn
from flowomni.streams import Streams, collate
from flowomni.tokenizers.base import TokenSpec
from tests.tiny import tiny_model
from training.guidance import GuidedStudent
from training.lora import LoraOptions
from training.parts import TrainsOptions
from training.plan import plan
from training.stages.speech import PartsOptions, SpeechOptions, SpeechStage
from training.train import RunOptions, train

HEAD = {"kind": "flow", "width": 32, "num_blocks": 1, "feedback_noise": 0.5}
SCALE = 2.5


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# ----------------------------------------------------------------------------------------------------- a head alone


def toy_head(**config: Any) -> FlowHead:
    torch.manual_seed(0)
    return FlowHead(
        FlowHeadConfig(width=32, num_blocks=2, **config), TokenSpec("continuous", 1, 0, 0, 24_000, 2_048, 0), 1
    ).train()


def draw_sides(num_rows: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A condition of 1 or -1, and data N(condition, 0.4^2)."""
    side_N1 = 1 - 2 * torch.randint(2, (num_rows, 1), generator=generator).float()
    return side_N1, side_N1 + 0.4 * torch.randn(num_rows, 1, generator=generator)


def fit(head: FlowHead, num_updates: int, teacher: FlowHead | None = None) -> FlowHead:
    generator, optimizer = seeded(num_updates), torch.optim.Adam(head.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 8e-3, total_steps=num_updates, pct_start=0.1)
    for _ in range(num_updates):
        side_N1, data_N1 = draw_sides(128, generator)
        taught = None if teacher is None else teacher.guided(side_N1, SCALE)
        loss = head.loss(side_N1, data_N1, torch.arange(128), generator, taught)
        optimizer.zero_grad()
        (loss.sum / loss.count).backward()
        optimizer.step()
        schedule.step()
    return head


@pytest.fixture(scope="module")
def multi_step() -> FlowHead:
    """A head trained by flow matching, with its null condition."""
    return fit(toy_head(condition_dropout=0.2), 80)


def jump(head: FlowHead, side_N1: Tensor) -> Tensor:
    """One jump of the flow map, whatever the head was trained for."""
    with torch.no_grad():
        noise_N1 = torch.randn(side_N1.shape, generator=seeded(1))
        return flow.solve_map(head.velocity(head.conditioner(side_N1)), noise_N1, 1)


def test_one_pass_learns_to_be_guided(multi_step: FlowHead) -> None:
    student = toy_head(condition_dropout=0.0, built_in_guidance=SCALE)
    student.load_state_dict(multi_step.state_dict())
    side_N1, data_N1 = draw_sides(2_000, seeded(9))

    @torch.no_grad()
    def error() -> float:
        loss = student.loss(side_N1, data_N1, torch.arange(2_000), seeded(3), multi_step.guided(side_N1, SCALE))
        return float(loss.sum / loss.count)

    unguided = error()
    fit(student, 40, multi_step)
    assert error() < 0.15 * unguided
    wanted, plain = (
        multi_step.sample(side_N1, FlowSampling(num_steps=32, guidance=guidance), seeded(4))
        for guidance in (SCALE, 1.0)
    )
    found = student.sample(side_N1, FlowSampling(num_steps=32), seeded(4))
    assert (found - wanted).abs().mean() < 0.3 * (plain - wanted).abs().mean()


def test_one_jump_is_guided_where_the_head_also_distils_itself(multi_step: FlowHead) -> None:
    student = toy_head(condition_dropout=0.0, built_in_guidance=SCALE, objective="lsd", distill_fraction=0.5)
    student.load_state_dict(multi_step.state_dict())
    side_N1, _ = draw_sides(2_000, seeded(9))
    wanted, plain = (
        multi_step.sample(side_N1, FlowSampling(num_steps=32, guidance=guidance), seeded(1))
        for guidance in (SCALE, 1.0)
    )
    fit(student, 60, multi_step)
    assert (jump(student, side_N1) - wanted).abs().mean() < 0.5 * (plain - wanted).abs().mean()


def test_a_multi_step_head_learns_to_jump(multi_step: FlowHead) -> None:
    """Fine-tuned with its own weights as the start: far better than before, and nearly what its many steps give."""
    one_step = toy_head(objective="lsd", distill_fraction=0.5)
    one_step.load_state_dict(multi_step.state_dict())
    side_N1, _ = draw_sides(2_000, seeded(9))
    wanted = multi_step.sample(side_N1, FlowSampling(num_steps=32), seeded(1))
    before = (jump(one_step, side_N1) - wanted).abs().mean()
    fit(one_step, 60)
    found = one_step.sample(side_N1, one_step.default_sampling(), seeded(1))
    torch.testing.assert_close(found, jump(one_step, side_N1))
    assert (found - wanted).abs().mean() < 0.35 * before


# --------------------------------------------------------------------------------------------------------- whole models


def batch() -> Streams:
    """A heard question answered aloud, a typed one in words."""
    _, processor = tiny_model(head=HEAD)
    heard = processor.turn("user", "what is one", 0.1 * torch.randn(6_000, generator=seeded(0)).numpy())
    says = Turn("assistant", "the answer is three", speech_LX=torch.randn(9, 6, generator=seeded(1)))
    typed = [processor.turn("user", "say hello"), Turn("assistant", "hello")]
    return collate([processor.layout.example([heard, says]), processor.layout.example(typed)])


def test_the_teacher_reads_what_the_student_reads() -> None:
    """Perturbed feedback and all: without guidance a copy of the teacher has nothing to learn."""
    (student, _), (teacher, _) = tiny_model(head=HEAD | {"condition_dropout": 0.0}), tiny_model(head=HEAD)
    module, streams = GuidedStudent(student, teacher, 1.0), batch()
    for mode in (True, False):
        losses = module.train(mode)(streams, seeded(0))
        assert losses["speech"].sum < 1e-9 and losses["speech"].count == 9
    with torch.no_grad():
        clean_NH = teacher.conditions(streams)
        noisy_NH = teacher.conditions(student._perturb(streams, seeded(0))[0])
    assert (clean_NH - noisy_NH).abs().max() > 0.01, "the noise on what is fed back is seen"


def test_conditions_are_those_of_the_loss() -> None:
    model, _ = tiny_model(head=HEAD)
    streams, seen = batch(), []

    def note(streams: Streams, hidden_NH: Tensor, *rest: Any) -> Any:
        seen.append(hidden_NH)
        return model.head.loss(hidden_NH, *rest)

    assert model(streams, seeded(0), note)["speech"].sum == model(streams, seeded(0))["speech"].sum
    torch.testing.assert_close(model.conditions(streams), seen[0])


def test_the_teacher_is_no_part_of_what_trains() -> None:
    (student, _), (teacher, _) = tiny_model(head=HEAD | {"condition_dropout": 0.0}), tiny_model(head=HEAD)
    module = GuidedStudent(student, teacher, SCALE).train()
    assert not teacher.training and not any(p.requires_grad for p in teacher.parameters())
    assert [f"student.{name}" for name in student.state_dict()] == list(module.state_dict())
    assert {id(p) for p in module.parameters()} == {id(p) for p in student.parameters()}
    losses = module(batch(), seeded(0))
    assert losses["speech/guidance"].sum > 0.01
    sum(loss.sum for name, loss in losses.items() if "/" not in name).backward()  # type: ignore[union-attr]
    assert all(p.grad is None for p in teacher.parameters())
    for part in (student.llm, student.output_blocks, student.projector, student.head.net):
        assert any(p.grad is not None and bool(p.grad.any()) for p in part.parameters())  # type: ignore[union-attr]


# ----------------------------------------------------------------------------------------------------------------- runs


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> SpeechOptions:
    """Two typed questions answered by noise, and a saved multi-step model that is sampled with guidance."""
    folder = tmp_path_factory.mktemp("guidance")
    lines = []
    for index, word in enumerate(("one", "two")):
        noise_S = 0.1 * np.random.default_rng(index).standard_normal(16_000)
        soundfile.write(folder / f"{index}.flac", noise_S, 24_000)
        says = {"role": "assistant", "text": word, "audio": f"{index}.flac"}
        lines.append(json.dumps({"id": str(index), "turns": [{"role": "user", "text": "say"}, says]}))
    (folder / "manifest.jsonl").write_text("\n".join(lines))
    model = folder / "model"
    save_model(*tiny_model(head=HEAD | {"sampling": {"guidance": SCALE, "num_steps": 4}}), model)
    tasks = {"text_to_speech": 1.0}
    return SpeechOptions(
        manifest=str(folder), model=str(model), tasks=tasks, batch_size=2, num_eval=0, distill_guidance=SCALE
    )


def run_options(folder: Path, **changes: Any) -> RunOptions:
    return RunOptions(stage="speech", output_dir=str(folder), **{"max_steps": 2, "warmup_steps": 1} | changes)


def test_the_saved_model_is_guided_by_itself_and_says_so(options: SpeechOptions, tmp_path: Path) -> None:
    final = train(run_options(tmp_path, ema_decay=0.5), options, SpeechStage)
    model, processor = load_model(final)
    loaded, _ = load_model(options.model or "")
    assert list(model.state_dict()) == list(loaded.state_dict())  # one model, as before
    assert model.head.config.built_in_guidance == SCALE and model.head.config.condition_dropout == 0
    sampling = model.head.default_sampling()
    assert sampling.guidance == 1.0 and sampling.num_steps == 4, "the rest stays as it was"
    omni = FlowOmni(model, processor)
    assert omni.say("one").states
    with pytest.raises(ValueError, match=rf"guidance is 2.0 but head.built_in_guidance is {SCALE}.*use guidance 1"):
        omni.say("one", sampling={"guidance": 2.0})
    again = dataclasses.replace(options, model=str(final))
    with pytest.raises(ValueError, match=r"options.distill_guidance is 2.5, but head.built_in_guidance is 2.5"):
        SpeechStage(again, 0)
    # and back: the null condition is learned again, without guidance built in
    back = {"built_in_guidance": 1.0, "condition_dropout": 0.1}
    assert SpeechStage(dataclasses.replace(again, distill_guidance=None, head=back), 0).module.config.head["kind"]


@torch.no_grad()
def test_evaluation_is_against_the_teacher(options: SpeechOptions) -> None:
    stage = SpeechStage(options, 0)
    stage.module.eval()
    values = stage._held_out_losses(stage.train)
    streams = collate([stage._example(c, "text_to_speech", None) for c in stage.train])
    losses = stage.module(streams, seeded(0))
    assert values["loss/speech"] == pytest.approx(float(losses["speech"].sum / losses["speech"].count))
    assert values["loss/speech"] != pytest.approx(float(stage.model(streams, seeded(0))["speech"].sum) / 18)


@pytest.mark.parametrize("llm", ["full", "lora"])
def test_what_trains_is_as_ever(options: SpeechOptions, llm: Any) -> None:
    trains = TrainsOptions(llm=llm, encoder="frozen", projector="frozen")
    stage = SpeechStage(dataclasses.replace(options, trains=trains, head={"objective": "lsd"}), 0)
    losses = stage.module.train()(stage.batch(0, 0, 1), seeded(0))
    assert {"speech/guidance", "speech/distillation"} <= set(losses)
    losses["speech"].sum.backward()
    trained = {name for name, p in stage.model.named_parameters() if p.grad is not None and bool(p.grad.any())}
    assert {name.split(".")[0] for name in trained} == {"llm", "output_blocks", "head", "state_embedding"}
    assert all("lora_" in name for name in trained if name.startswith("llm")) == (llm == "lora")


def test_plan_counts_the_teacher(options: SpeechOptions, tmp_path: Path) -> None:
    with_teacher = plan(run_options(tmp_path), options)
    without = plan(run_options(tmp_path), dataclasses.replace(options, distill_guidance=None))
    assert with_teacher.memory.pop("weights of the teacher") == 4 * without.num_parameters
    assert with_teacher.memory.items() >= without.memory.items()
    assert with_teacher.module.config.head["built_in_guidance"] == SCALE


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"distill_guidance": 1.0}, "distill_guidance is 1.0; it must be above 1"),
        ({"distill_guidance": math.inf}, "distill_guidance is inf; it must be above 1"),
        ({"model": None, "parts": PartsOptions("a", "b")}, "needs a trained model to learn from: set options.model"),
        ({"lora": LoraOptions(save="adapters")}, "set options.lora.save to 'merged'"),
    ],
)
def test_bad_options_are_named(options: SpeechOptions, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(options, **changes)


def test_what_cannot_be_distilled_is_refused(options: SpeechOptions, tmp_path: Path) -> None:
    for head, message in (
        (HEAD | {"condition_dropout": 0.0}, "but head.condition_dropout is 0, so the head never learned"),
        (
            {"kind": "regression", "width": 16, "num_blocks": 1},
            "but head.kind is 'regression', and no guidance can be distilled",
        ),
    ):
        save_model(*tiny_model(head=head), tmp_path)
        with pytest.raises(ValueError, match=f"options.distill_guidance is 2.5, {message}"):
            SpeechStage(dataclasses.replace(options, model=str(tmp_path)), 0)
    for head, message in (
        ({"condition_dropout": 0.1}, "condition_dropout is 0.1 but built_in_guidance is 2.5"),
        ({"sampling": {"guidance": 2.0}}, "sampling.guidance is 2.0 but built_in_guidance is 2.5"),
    ):
        with pytest.raises(ValueError, match=message):
            SpeechStage(dataclasses.replace(options, head=head), 0)
    with pytest.raises(ValueError, match="distill_guidance does not go with FSDP with 2 processes.*ddp"):
        SpeechStage(options, 0).prepare_for_engine("FSDP with 2 processes")


def test_one_step_fine_tuning_trains_the_heads_alone(options: SpeechOptions, tmp_path: Path) -> None:
    """From a multi-step model; what it is saved as draws in one jump, and the rest is as it was."""
    frozen = TrainsOptions("frozen", "frozen", "frozen", output_blocks="frozen", heads="full")
    head = {"objective": "lsd", "sampling": {"solver": "map", "num_steps": 1}}
    changed = dataclasses.replace(options, distill_guidance=None, trains=frozen, head=head)
    model, processor = load_model(train(run_options(tmp_path, learning_rate=1e-2), changed, SpeechStage))
    before = load_model(options.model or "")[0].state_dict()
    moved = {name.split(".")[0] for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {"head", "state_head", "state_embedding"}
    assert model.head.default_sampling() == FlowSampling(solver="map", num_steps=1)
    assert FlowOmni(model, processor).say("one").states


def test_a_batch_in_which_nothing_trains_is_passed_over(options: SpeechOptions, tmp_path: Path) -> None:
    """Words alone, where only the voice trains: the run used to end in an error of torch's."""
    frozen = TrainsOptions("frozen", "frozen", "frozen")
    mixed = {"text_to_text": 0.5, "text_to_speech": 0.5}
    changed = dataclasses.replace(options, distill_guidance=None, trains=frozen, tasks=mixed, batch_size=1)
    final = train(run_options(tmp_path, max_steps=4, log_every=1), changed, SpeechStage)
    lines = [json.loads(line) for line in (final.parent / "log.jsonl").read_text().splitlines()]
    spoken = ["loss/speech" in line for line in lines if "grad_norm" in line]
    assert set(spoken) == {False, True}
    assert [line["grad_norm"] > 0 for line in lines if "grad_norm" in line] == spoken
