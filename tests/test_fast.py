"""Laws of the fast path: compiled = plain, batch row = that row alone, a state is a value, in place or not."""

from __future__ import annotations

import copy
import importlib.util
import io
import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from flowomni import batching, fast
from flowomni.cache import GrowingLayer, growing_cache
from flowomni.fast import CompiledSteps, accelerate, not_compilable_because
from flowomni.generation import GenerationOptions, generate
from flowomni.heads.flow import FlowSampling
from flowomni.int8 import Int8Linear, quantise
from flowomni.modeling import FlowOmniModel, ModelState
from flowomni.streams import SpeechState, Streams

from .tiny import lively_model, tiny_model

CPU = torch.device("cpu")
TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}


def steps_of(model: FlowOmniModel, num_rows: int, num_steps: int, seed: int = 0) -> list[Streams]:
    """Steps as generation has them: text or none, any state, a speech token where there is one."""
    generator = torch.Generator().manual_seed(seed)
    empty_X = model.speech_tokenizer.spec.empty_token()
    steps = []
    for _ in range(num_steps):
        state_BL = torch.randint(-1, 4, (num_rows, 1), generator=generator)
        speech_BLX = torch.randn(num_rows, 1, len(empty_X), generator=generator)
        nothing_BL = torch.zeros(num_rows, 1, dtype=torch.bool)
        steps.append(
            Streams(
                text_BL=torch.randint(-1, 20, (num_rows, 1), generator=generator),
                state_BL=state_BL,
                speech_BLX=torch.where((state_BL == SpeechState.GENERATING).unsqueeze(-1), speech_BLX, empty_X),
                heard_BL=nothing_BL,
                mask_BL=~nothing_BL,
                text_loss_BL=nothing_BL,
                state_loss_BL=nothing_BL,
            )
        )
    return steps


def prompted(model: FlowOmniModel, lengths: list[int], seed: int = 1) -> ModelState:
    """A state after random prompts of these lengths."""
    generator = torch.Generator().manual_seed(seed)
    x_BLH = torch.randn(len(lengths), max(lengths), model.config.hidden_size, generator=generator)
    mask_BL = torch.arange(max(lengths)) < torch.tensor(lengths).unsqueeze(1)
    return model.advance(x_BLH.to(model.device), mask_BL.to(model.device), model.init_state(len(lengths)))[2]


@pytest.fixture(scope="module")
def models() -> Iterator[tuple[FlowOmniModel, FlowOmniModel]]:
    """The same model, plain and as graphs: all but the compiler's last part, which takes minutes."""
    plain, _ = lively_model()
    compiled = copy.deepcopy(plain)
    accelerate(compiled, backend="aot_eager")
    assert compiled.fast is not None
    yield plain, compiled


# -------------------------------------------------------------------------------------------------------- caches


@torch.no_grad()
def test_a_cache_in_place_is_what_concatenation_gives() -> None:
    generator = torch.Generator().manual_seed(0)
    cache, parts = growing_cache(), []
    for length in (3, 1, 1, 70, 1):  # beyond its first room
        keys = torch.randn(2, 2, length, 4, generator=generator)
        parts.append(keys)
        found, values = cache.update(keys, -keys, 0)
        assert torch.equal(found, torch.cat(parts, 2)) and torch.equal(values, -found)


@torch.no_grad()
def test_an_old_state_goes_on_without_a_trace_of_what_went_on_from_it_before() -> None:
    model, _ = tiny_model()
    first, second = steps_of(model, 2, 1, seed=2), steps_of(model, 2, 1, seed=3)
    after = steps_of(model, 2, 2, seed=4)

    def run(state: ModelState, steps: list[Streams]) -> list[torch.Tensor]:
        found = []
        for step in steps:
            _, speech_BH, state = model.read(step, state)
            found.append(speech_BH)
        return found

    wanted = [run(prompted(model, [5, 3]), [*each, *after]) for each in (first, second)]
    state = prompted(model, [5, 3])
    *_, one = model.read(first[0], state)
    *_, two = model.read(second[0], state)
    saved = io.BytesIO()
    torch.save(one, saved)
    saved.seek(0)
    for want, branch in ((wanted[0], one), (wanted[1], two), (wanted[0], torch.load(saved, weights_only=False))):
        torch.testing.assert_close(run(branch, after), want[1:], **TOLERANCE)


def test_gradients_flow_through_a_cache() -> None:
    model, _ = tiny_model()
    x_BLH = torch.randn(1, 3, model.config.hidden_size, requires_grad=True)
    one_BL = torch.ones(1, 3, dtype=torch.bool)
    *_, state = model.advance(x_BLH, one_BL, model.init_state(1))
    _, speech_BH, _ = model.advance(torch.zeros_like(x_BLH[:, :1]), one_BL[:, :1], state)
    (gradient,) = torch.autograd.grad(speech_BH.sum(), x_BLH)
    assert (gradient.abs().sum(-1) > 0).all()


@torch.inference_mode()
def test_a_room_of_joined_rows_is_their_own() -> None:
    model, _ = tiny_model()
    states = [prompted(model, [length], seed=length) for length in (4, 6)]
    joined = batching.join(states)
    step = steps_of(model, 2, 1)[0]
    model.read(step, joined)
    for state in states:
        layer = state.llm_cache.layers[0]
        assert isinstance(layer, GrowingLayer) and layer.room is not None
        assert layer.room.num_filled == layer.get_seq_length()


# ------------------------------------------------------------------------------------------------------ compiled


@torch.inference_mode()
def test_fixed_shapes_change_nothing() -> None:
    """Without the compiler: what is compiled is the plain step, rows of other lengths beside it or not."""
    model, _ = lively_model()
    steps = CompiledSteps(model)
    state = wanted_state = prompted(model, [5, 2, 7])
    alone = prompted(model, [5, 2, 7])
    for step in steps_of(model, 3, 4):
        assert steps.takes(step, state)
        *found, state = steps._read(step, state, steps._step)
        *wanted, wanted_state = model.advance(model.embed(step), step.mask_BL, wanted_state)
        torch.testing.assert_close(found, wanted, **TOLERANCE)
        assert torch.equal(state.mask_BL, wanted_state.mask_BL)
    rows = batching.take(alone, [1])
    for step in steps_of(model, 3, 4):
        one = Streams(**{k: v[1:2] if isinstance(v, torch.Tensor) else v for k, v in step.__dict__.items()})
        *single, rows = steps._read(one, rows, steps._step)
    torch.testing.assert_close([each[1:2] for each in found], single, **TOLERANCE)


def test_compiled_answers_are_the_plain_ones(models: tuple[FlowOmniModel, FlowOmniModel]) -> None:
    _, processor = lively_model()
    prompts = [processor.prompt([processor.turn("user", text=text)]) for text in ("what is one plus two", "hello")]
    options = GenerationOptions()

    def answer(model: FlowOmniModel, numbers: list[int]) -> Any:
        generators = [torch.Generator().manual_seed(number) for number in numbers]
        steps = list(generate(model, processor, [prompts[n] for n in numbers], options, generators))
        texts = ["".join(step.texts[row] for step in steps) for row in range(len(numbers))]
        return texts, [torch.cat([step.wavs[row] for step in steps]) for row in range(len(numbers))]

    plain, compiled = models
    texts, wavs = answer(compiled, [0])
    wanted_texts, wanted_wavs = answer(plain, [0])
    assert texts == wanted_texts and len(wavs[0]) > 0
    torch.testing.assert_close(wavs, wanted_wavs, rtol=1e-3, atol=1e-4)
    both_texts, both_wavs = answer(compiled, [0, 1])  # two rows: another graph
    assert both_texts[0] == texts[0]
    torch.testing.assert_close(both_wavs[0][: len(wavs[0])], wavs[0], rtol=1e-3, atol=1e-4)


@torch.inference_mode()
def test_a_longer_cache_needs_no_other_graph(models: tuple[FlowOmniModel, FlowOmniModel]) -> None:
    plain, compiled = models
    for length in (60, 70):  # rooms of 64 and 128
        step = steps_of(plain, 1, 1)[0]
        found = compiled.read(step, prompted(compiled, [length]))[:2]
        torch.testing.assert_close(found, plain.read(step, prompted(plain, [length]))[:2], **TOLERANCE)


@torch.no_grad()
@pytest.mark.parametrize("sampling", [FlowSampling(num_steps=3, guidance=2.0), FlowSampling(solver="map", num_steps=1)])
def test_a_compiled_head_draws_the_same(
    models: tuple[FlowOmniModel, FlowOmniModel], sampling: FlowSampling, caplog: pytest.LogCaptureFixture
) -> None:
    hidden_BH = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    plain, compiled = (
        model.head.sample(hidden_BH, sampling, [torch.Generator().manual_seed(n) for n in range(3)]) for model in models
    )
    torch.testing.assert_close(compiled, plain, **TOLERANCE)
    assert "not compiled" not in caplog.text  # three rows, in the graph of four


@torch.no_grad()
def test_the_compiler_itself_gives_the_same() -> None:
    """One small graph, with loops over few rows of float and of int8 weights."""
    torch.manual_seed(0)
    layers = torch.nn.Sequential(torch.nn.Linear(24, 16), torch.nn.SiLU(), torch.nn.Linear(16, 8))
    if importlib.util.find_spec("torchao"):
        layers[2] = Int8Linear.of(layers[2])
    x_BK = torch.randn(3, 24)
    torch.testing.assert_close(fast._compile(layers.forward, "inductor")(x_BK), layers(x_BK), **TOLERANCE)


def test_a_prompt_is_multiplied_the_other_way_round(models: tuple[FlowOmniModel, FlowOmniModel]) -> None:
    plain, compiled = models
    generator = torch.Generator().manual_seed(0)
    for length in (8, 9, 63, 64):
        x_BLH = torch.randn(1, length, plain.config.hidden_size, generator=generator)
        mask_BL = torch.ones(1, length, dtype=torch.bool)
        found, wanted = (model.advance(x_BLH, mask_BL, model.init_state(1))[:2] for model in (compiled, plain))
        torch.testing.assert_close(found, wanted, **TOLERANCE)
    layer = torch.nn.Linear(5, 3)
    x_BLK = torch.randn(2, 6, 5, generator=generator)
    torch.testing.assert_close(fast._some_rows_linear(layer, x_BLK), layer(x_BLK), **TOLERANCE)


# ----------------------------------------------------------------------------------------------------- fallback


def test_layers_that_do_not_share_a_mask_are_left_alone(caplog: pytest.LogCaptureFixture) -> None:
    from transformers import Gemma2Config, MistralConfig, Qwen2Config

    assert "sliding_attention" in not_compilable_because(Gemma2Config())
    assert "sliding window of 4096" in not_compilable_because(MistralConfig(sliding_window=4096))
    assert not not_compilable_because(Qwen2Config())

    model, _ = tiny_model()
    model.config.llm.layer_types = ["full_attention", "sliding_attention"]
    with caplog.at_level(logging.WARNING):
        accelerate(model)
    assert model.fast is None and "sliding_attention" in caplog.text


def test_what_does_not_compile_stays_plain(caplog: pytest.LogCaptureFixture) -> None:
    class Part:
        def double(self, x_B: torch.Tensor) -> torch.Tensor:
            print(end="")  # a graph cannot hold that
            return torch.tensor([2 * each for each in x_B.tolist()])

    part = Part()
    fast._Replaced(part, "double", "aot_eager", CPU)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert part.double(torch.tensor([1.5])).tolist() == [3.0]
    assert caplog.text.count("Part.double is not compiled") == 1


# --------------------------------------------------------------------------------------------------------- int8


def test_int8_rounds_weights_to_127ths_of_the_largest() -> None:
    pytest.importorskip("torchao")
    torch.manual_seed(0)
    linear = torch.nn.Linear(64, 8)
    rounded = Int8Linear.of(linear)
    assert rounded.weight_NK.dtype == torch.int8
    weight_NK = rounded.weight_NK * rounded.scale_N.unsqueeze(1)
    step_N = linear.weight.detach().abs().amax(1) / 127
    assert ((weight_NK - linear.weight).abs() <= 0.51 * step_N.unsqueeze(1)).all()
    x_BK = torch.randn(3, 64)
    torch.testing.assert_close(rounded(x_BK), torch.nn.functional.linear(x_BK, weight_NK, linear.bias))


@pytest.mark.parametrize("has_tiles", [False, True])
@torch.inference_mode()
def test_int8_takes_a_prompt_in_bfloat16_where_that_is_fast(has_tiles: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torchao")
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: has_tiles)
    torch.manual_seed(0)
    layer = Int8Linear.of(torch.nn.Linear(64, 32))
    x_BLK = torch.randn(1, 9, 64)
    exact = torch.cat([layer(x_BLK[:, :8]), layer(x_BLK[:, 8:])], dim=1)  # a step's few rows stay as they are
    error = float((layer(x_BLK) - exact).norm() / exact.norm())
    assert layer(x_BLK).dtype == torch.float32 and (1e-4 < error < 5e-3 if has_tiles else error < 1e-6)


@torch.inference_mode()
def test_a_tied_output_layer_gets_weights_of_its_own() -> None:
    pytest.importorskip("torchao")
    model, _ = tiny_model()
    table_VH = model.get_input_embeddings().weight.clone()
    hidden_BH = torch.randn(2, 32)
    wanted = model.text_logits(hidden_BH)
    assert quantise(model) == 2 * 7 + 7 + 1
    assert torch.equal(model.get_input_embeddings().weight, table_VH)
    assert not any(type(module) is torch.nn.Linear for module in model.llm.modules())
    torch.testing.assert_close(model.text_logits(hidden_BH), wanted, rtol=0, atol=0.02 * float(wanted.abs().max()))
    assert CompiledSteps(model).check() == ""


@torch.inference_mode()
def test_steps_go_on_plainly_where_the_compiler_gives_up(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it does after too many kinds of steps; a position whose step broke off is read once."""
    model, _ = tiny_model()
    compiled = copy.deepcopy(model)
    accelerate(compiled, backend="aot_eager")
    assert compiled.fast is not None
    (step,) = steps_of(model, 2, 1, seed=2)
    wanted = model.read(step, prompted(model, [5, 3]))
    state = prompted(compiled, [5, 3])
    monkeypatch.setattr(torch._dynamo.config, "recompile_limit", 0)
    found = compiled.read(step, state)
    assert compiled.fast is None and "no longer compiled" in caplog.text
    for want, got in zip(wanted[:2], found[:2], strict=True):
        torch.testing.assert_close(got, want, **TOLERANCE)
    assert torch.equal(found[2].mask_BL, wanted[2].mask_BL)
    compiled.read(step, found[2])
    assert caplog.text.count("no longer compiled") == 1
