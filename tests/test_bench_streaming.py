"""The benchmark of streaming runs on a toy, and says what it measured."""

from __future__ import annotations

import pytest
import torch

from scripts.bench_streaming import parse, print_parts
from scripts.streaming_models import SHAPES, num_bytes, our_model, our_speech, spoken


def test_it_speaks_for_as_long_as_it_is_told() -> None:
    omni = our_model(SHAPES["toy"], int8=False, compile=False)
    chunks = list(our_speech(omni, 1.0))
    spec = omni.model.speech_tokenizer.spec
    num_tokens = round(spec.tokens_per_sec)
    assert sum(map(len, chunks)) == num_tokens * spec.samples_per_token  # the last tokens are flushed at the limit
    assert len(chunks) >= num_tokens
    speed, first_sec, gaps = spoken(iter(chunks), omni.sample_rate_hz)
    assert speed > 0 and first_sec >= 0 and len(gaps) == len(chunks) - 1


def test_parts_know_the_weights_that_they_read(capsys: pytest.CaptureFixture[str]) -> None:
    omni = our_model(SHAPES["toy"], int8=False, compile=False)
    parts = print_parts(omni, 1e9, repeats=1)
    model = omni.model
    table = model.get_input_embeddings().weight.nbytes
    weights = sum(p.nbytes for p in model.llm.parameters()) - table
    assert weights <= parts["language model"]["bytes"] < weights + 1000  # the angles of the positions besides
    assert parts["text logits"]["bytes"] == table  # tied
    assert parts["language model"]["floor_sec"] == parts["language model"]["bytes"] / 1e9
    assert parts["step"]["bytes"] == sum(part["bytes"] for name, part in parts.items() if name != "step")
    assert "decoder, vocoder" in capsys.readouterr().out


def test_int8_reads_a_quarter() -> None:
    pytest.importorskip("torchao")
    plain, rounded = (
        our_model(SHAPES["toy"], int8=int8, compile=False).model.llm.model.layers for int8 in (False, True)
    )
    assert num_bytes(rounded) < 0.35 * num_bytes(plain)  # scales and norms stay


def test_bad_options_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--threads", "0"], ["--sec", "60"], ["--only", "everything"]):
        with pytest.raises(SystemExit):
            parse(arguments)
    assert capsys.readouterr().err.count("error:") == 3
    assert parse([]).threads == torch.get_num_threads()
