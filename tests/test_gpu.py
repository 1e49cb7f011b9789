"""What holds on a GPU: a model says there what it says on a CPU, trains, resumes, and steps that are replayed are the
plain ones. Without a GPU, nothing of this runs."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState

from flowomni import FlowOmni
from flowomni.api import Question
from flowomni.fast import accelerate
from flowomni.replay import MAX_RECORDS, Replayed
from inference.engine import Engine
from inference.session import AudioDelta, ResponseDone, SessionOptions, TextDelta

from .test_fast import prompted, steps_of
from .test_heads import CASES, HIDDEN, Case, seeded
from .test_training import check_resume, run_options, speech_options  # noqa: F401  # a fixture
from .tiny import lively_model

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
TOLERANCE: dict[str, Any] = {"rtol": 1e-3, "atol": 1e-4}
HEARD = np.random.default_rng(0).standard_normal(16_000).astype(np.float32) * 0.1, 16_000
QUESTIONS = [Question(HEARD), Question(text="what is one plus two"), Question(text="say hello", task="speak")]


@pytest.fixture(autouse=True)
def exact_products() -> Iterator[None]:
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def on_gpu(omni: FlowOmni) -> FlowOmni:
    return FlowOmni(copy.deepcopy(omni.model).cuda(), omni.processor)


def test_the_same_answers_as_on_a_cpu(omni: FlowOmni) -> None:
    for here, there in zip(omni.answers(QUESTIONS), on_gpu(omni).answers(QUESTIONS), strict=True):
        assert here.text == there.text and here.states == there.states
        np.testing.assert_allclose(here.wav_S, there.wav_S, atol=1e-3)


def test_the_box_says_the_same() -> None:
    here, there = (FlowOmni.from_pretrained(device=d).answer(text="what is two plus three") for d in ("cpu", "cuda"))
    assert here.text == there.text and here.states == there.states


def test_a_language_model_in_bf16() -> None:
    omni = FlowOmni.from_pretrained(device="cuda", dtype="bfloat16")
    answer = omni.answer(text="what is two plus three")
    assert answer.text == FlowOmni.from_pretrained().answer(text="what is two plus three").text
    assert answer.answer_sec > 0.3 and np.isfinite(answer.wav_S).all()


@pytest.mark.parametrize("case", [pytest.param(case, id=name) for name, case in CASES.items()])
def test_heads_learn_and_draw_the_same(case: Case) -> None:
    head, hidden_NH, target_NX = case.head(), torch.randn(6, HIDDEN, generator=seeded(2)), case.tokens(6)
    there = copy.deepcopy(head).cuda()
    rows = torch.tensor([0, 0, 0, 1, 1, 2])
    want = head.loss(hidden_NH, target_NX, rows, seeded(3))
    found = there.loss(hidden_NH.cuda(), target_NX.cuda(), rows.cuda(), seeded(3))
    torch.testing.assert_close(found.sum.cpu(), want.sum, **TOLERANCE)
    for sampling in case.samplings:
        drawn_BX = there.sample(hidden_NH.cuda(), sampling, seeded(4))
        torch.testing.assert_close(drawn_BX.cpu(), head.sample(hidden_NH, sampling, seeded(4)), **TOLERANCE)


def test_the_speech_tokenizer_encodes_and_decodes_the_same() -> None:
    here = FlowOmni.from_pretrained().model.speech_tokenizer
    there = copy.deepcopy(here).cuda()
    wav_1S = 0.1 * torch.randn(1, 24_000, generator=seeded(0))
    (want_BLX, _), (token_BLX, _) = here.encode(wav_1S), there.encode(wav_1S.cuda())
    torch.testing.assert_close(token_BLX.cpu(), want_BLX, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(there.decode(want_BLX.cuda()).cpu(), here.decode(want_BLX), rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@torch.inference_mode()
def test_replayed_steps_are_the_plain_steps(backend: str) -> None:
    plain = lively_model()[0].cuda()
    fast = copy.deepcopy(plain)
    accelerate(fast, backend=backend)
    for lengths in ([5], [3, 7, 2]):
        wanted, found = prompted(plain, lengths), prompted(fast, lengths)
        for step in steps_of(plain, len(lengths), 90, seed=4):  # beyond the first room
            on_device = step.to(plain.device)
            want_text_BH, want_BH, wanted = plain.read(on_device, wanted)
            text_BH, speech_BH, found = fast.read(on_device, found)
            torch.testing.assert_close(text_BH, want_text_BH, **TOLERANCE)
            torch.testing.assert_close(speech_BH, want_BH, **TOLERANCE)
    assert fast.fast is not None


def test_records_are_reused_and_few() -> None:
    calls = []

    def double(x: torch.Tensor, room: list[torch.Tensor]) -> torch.Tensor:
        calls.append(len(x))
        room[0].add_(1)
        return 2 * x

    replayed, room = Replayed(double), [torch.zeros(1, device="cuda")]
    for number in range(5):
        x = torch.full((3,), float(number), device="cuda")
        assert torch.equal(replayed(x, room), 2 * x)
    assert len(calls) == 2 and room[0].item() == 5  # plain, recorded; then replayed four times
    for size in range(1, MAX_RECORDS + 9):
        replayed(torch.zeros(size, device="cuda"), room)
    assert len(replayed._records) == MAX_RECORDS


def test_sessions_talk(omni: FlowOmni) -> None:
    wanted = omni.answer(text="what is one plus two")
    with Engine(on_gpu(omni), max_sessions=3) as engine:
        sessions = [engine.open(SessionOptions(vad=None)) for _ in range(3)]
        for session in sessions:
            session.say_text("what is one plus two")
            session.respond()
        for session in sessions:
            text, num_samples = "", 0
            while not isinstance(event := session.poll(30.0), ResponseDone):
                text += event.text if isinstance(event, TextDelta) else ""
                num_samples += len(event.wav_S) if isinstance(event, AudioDelta) else 0
            assert text.strip() == wanted.text and num_samples == len(wanted.wav_S)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_speech_run_resumes(precision: str, speech_options: Any, tmp_path: Path) -> None:  # noqa: F811
    from training.stages.speech import SpeechStage

    AcceleratorState._reset_state()  # it keeps the precision of the process's first run
    check_resume(lambda name: run_options(tmp_path / name, mixed_precision=precision), speech_options, SpeechStage, 4)
