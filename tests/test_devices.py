"""Where a model computes and in which type: what there is not is refused in one line; bf16 says the same words."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from flowomni import FlowOmni
from flowomni.devices import as_dtype, check_device, default_device
from scripts import bench_gpu

from .tiny import tiny_model


@pytest.mark.parametrize("device", ["cuda:99", "gpu", "cpu:x"])
def test_a_device_that_is_not_there(device: str) -> None:
    with pytest.raises(ValueError, match=f"device '{device}' cannot be used: .*use 'cpu'"):
        FlowOmni.from_pretrained(device=device)
    check_device(default_device())


def test_a_type_that_a_model_does_not_compute_in() -> None:
    assert as_dtype("bfloat16") == as_dtype(torch.bfloat16) == torch.bfloat16
    with pytest.raises(ValueError, match="dtype is 'int8'; it must be one of float32, bfloat16, float16"):
        FlowOmni.from_pretrained(dtype="int8")


def test_a_language_model_in_bf16_says_the_same() -> None:
    plain, half = (FlowOmni.from_pretrained(dtype=dtype) for dtype in ("float32", "bfloat16"))
    assert {p.dtype for p in half.model.llm.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in half.model.head.parameters()} == {torch.float32}
    question = "what is two plus three"
    answer = half.answer(text=question, sampling={"solver": "map", "num_steps": 1, "guidance": 1.0})
    assert answer.text == plain.answer(text=question, speak=False).text
    assert answer.answer_sec > 0.3 and np.isfinite(answer.wav_S).all()


def test_the_benchmark_of_gpus_runs_on_a_toy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench_gpu, "accelerate", lambda model: None)  # compiling takes minutes
    monkeypatch.setattr(bench_gpu, "REPEATS", 1)
    bench_gpu.models.cache_clear()
    arguments = ["--device", "cpu", "--shape", "toy", "--sec", "0.5", "--repeats", "1", "--json"]
    assert bench_gpu.main([*arguments, str(tmp_path / "b.json")]) == 0
    bench_gpu.models.cache_clear()
    found = json.loads((tmp_path / "b.json").read_text())
    assert found["speech"]["compiled"]["speed"]["median"] > 0
    assert found["training"]["speech"]["flop"] > 0 and found["training"]["ratio"]["median"] > 0
    assert set(found["steps"]) == {"plain, 1 rows", "plain, 8 rows", "compiled, 1 rows", "compiled, 8 rows"}
    assert "x real time" in capsys.readouterr().out
    assert bench_gpu.main(["--device", "cuda:99"]) == 2


def test_state_head_takes_any_type() -> None:
    model, _ = tiny_model()
    hidden_BH = torch.randn(2, model.config.hidden_size)
    want = model.state_head.stop_probability(hidden_BH)
    torch.testing.assert_close(model.state_head.stop_probability(hidden_BH.bfloat16()), want, atol=1e-2, rtol=1e-2)
