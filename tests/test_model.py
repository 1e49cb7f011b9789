"""Laws of the model: causality, cache, batching, and that the language model inside stays what it was.

Shapes: B batch, L positions, H hidden width, N flattened positions, V vocabulary, D latent dimension.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedConfig

from flowomni.build import assemble, load_model, save_model
from flowomni.configuration import FlowOmniConfig
from flowomni.heads import HeadLoss
from flowomni.layouts import Turn
from flowomni.modeling import FlowOmniModel
from flowomni.processing import FlowOmniProcessor
from flowomni.streams import Streams, collate
from flowomni.tokenizers import MelTokenizerConfig, TokenSpec
from tests.tiny import ENCODER, WORDS, save_tiny_parts, tiny_model
from training.text_tokenizer import build_text_tokenizer

Tiny = tuple[FlowOmniModel, FlowOmniProcessor]
DIM = 6
SMALL: dict[str, Any] = {
    "encoder": ENCODER,
    "head": {"kind": "flow", "width": 32, "num_blocks": 1},
    "output_blocks": {"num_layers": 1, "num_heads": 2},
}


@pytest.fixture(scope="module")
def tiny() -> Tiny:
    return tiny_model()


@pytest.fixture(scope="module")
def tiny64(tiny: Tiny) -> Tiny:
    """The same in float64, where what should be equal is equal to twelve digits."""
    return copy.deepcopy(tiny[0]).double(), tiny[1]


def noise_wav(sec: float, seed: int) -> np.ndarray:
    return 0.1 * np.random.default_rng(seed).standard_normal(int(sec * 16_000)).astype(np.float32)


def tokens(length: int, seed: int) -> Tensor:
    return torch.randn(length, DIM, generator=torch.Generator().manual_seed(seed))


def examples(processor: FlowOmniProcessor) -> list[Streams]:
    """One row of every kind: heard or typed, spoken or text only, with a history of two clips."""
    heard = [processor.turn("user", "what is one", noise_wav(sec, i)) for i, sec in enumerate((0.61, 1.3))]
    typed = processor.turn("user", "what is one plus two")
    answer = Turn("assistant", "the answer is three", speech_LX=tokens(3, 0))
    short = Turn("assistant", "one", speech_LX=tokens(7, 1))
    make = processor.layout.example
    return [
        make([heard[0], answer]),
        make([typed, short]),
        make([heard[1], Turn("assistant", "sorry")]),
        make([heard[0], short, heard[1], answer]),
        make([processor.turn("user", "apple"), Turn("assistant", "apple", speech_LX=tokens(1, 2))], "speak"),
    ]


def watch(model: FlowOmniModel, streams: Streams) -> dict[str, Tensor]:
    """What a forward pass reads and gives: `x_BLH`, `hidden_BLH` of the language model, `speech_BLH` of the blocks."""
    seen: dict[str, Tensor] = {}

    def before(_: Any, __: Any, kwargs: dict[str, Any]) -> None:
        seen["x_BLH"] = kwargs["inputs_embeds"]

    def keep(name: str, pick: Callable[[Any], Tensor]) -> Callable[..., None]:
        return lambda _, __, output: seen.__setitem__(name, pick(output))

    assert model.output_blocks is not None
    hooks = [
        model.llm.base_model.register_forward_pre_hook(before, with_kwargs=True),
        model.llm.base_model.register_forward_hook(keep("hidden_BLH", lambda out: out.last_hidden_state)),
        model.output_blocks.register_forward_hook(keep("speech_BLH", lambda out: out)),
    ]
    model(streams, torch.Generator().manual_seed(0))
    for hook in hooks:
        hook.remove()
    return seen


# --------------------------------------------------------------------------------------------------------- causality


def test_no_output_depends_on_a_later_input(tiny64: Tiny) -> None:
    """By gradient, at every position, for text and speech; and every input reaches its own position's outputs."""
    model, processor = tiny64
    streams = examples(processor)[3]
    seen = watch(model, streams)
    length = streams.text_BL.shape[1]
    weights_H = torch.randn(model.config.hidden_size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for name in ("hidden_BLH", "speech_BLH"):
        for position in range(length):
            value = (seen[name][0, position] * weights_H).sum()
            (grad_BLH,) = torch.autograd.grad(value, seen["x_BLH"], retain_graph=True)
            reach_L = grad_BLH[0].abs().sum(-1)
            assert (reach_L[position + 1 :] == 0).all(), f"{name} at {position} sees the future"
            assert (reach_L[: position + 1] > 0).all(), f"{name} at {position} misses the past"


def test_each_input_stands_at_its_own_position(tiny64: Tiny) -> None:
    """Speech tokens and clips enter where the streams say, and nowhere else."""
    model, processor = tiny64
    streams = examples(processor)[3]
    before = watch(model, streams)["x_BLH"][0]

    def moved(**changes: Tensor) -> list[int]:
        after = watch(model, dataclasses.replace(streams, **changes))["x_BLH"][0]
        return (before != after).any(-1).nonzero()[:, 0].tolist()

    for position in streams.generating_BL[0].nonzero()[:, 0].tolist():
        speech_BLX = streams.speech_BLX.clone()
        speech_BLX[0, position] += 1.0
        assert moved(speech_BLX=speech_BLX) == [position]
    assert streams.features_BCF is not None
    features_BCF = streams.features_BCF.clone()
    features_BCF[1, :, :20] += 1.0
    heard = streams.heard_BL[0].nonzero()[:, 0]
    first_clip = int((heard.diff() > 1).nonzero()[0]) + 1  # the clips are apart: an answer lies between
    assert moved(features_BCF=features_BCF) == heard[first_clip:].tolist()


def test_a_speech_token_is_taught_from_the_position_before(tiny64: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """The head's targets are the answer's tokens, its conditions the blocks' output one position earlier."""
    model, processor = tiny64
    rows = examples(processor)
    batch = collate(rows)
    calls: list[tuple[Tensor, Tensor, Tensor]] = []
    true_loss = model.head.loss

    def record(hidden_NH: Tensor, target_N: Tensor, row_N: Tensor, generator: torch.Generator | None) -> HeadLoss:
        calls.append((hidden_NH, target_N, row_N))
        return true_loss(hidden_NH, target_N, row_N, generator)

    monkeypatch.setattr(model.head, "loss", record)
    seen = watch(model, batch)
    [(hidden_NH, target_ND, row_N)] = calls
    assert torch.equal(target_ND, torch.cat([tokens(3, 0), tokens(7, 1), tokens(3, 0), tokens(1, 2)]))
    assert row_N.tolist() == [0] * 3 + [1] * 7 + [3] * 3 + [4]
    where = batch.speech_loss_BL.nonzero()
    assert torch.equal(hidden_NH, seen["speech_BLH"][where[:, 0], where[:, 1] - 1])


# --------------------------------------------------------------------------------------------------- cache and batch


@pytest.mark.parametrize("chunk", [1, 2, 7, 1000])
@pytest.mark.parametrize("row", [1, 3])
def test_cache_changes_nothing(tiny64: Tiny, chunk: int, row: int) -> None:
    """Reading chunk by chunk gives at each chunk's end what one pass over everything gives there."""
    model, processor = tiny64
    with torch.no_grad():
        seen = watch(model, examples(processor)[row])
        state = model.init_state(1)
        for x_BLH in seen["x_BLH"].split(chunk, dim=1):
            text_BH, speech_BH, state = model.advance(x_BLH, torch.ones(x_BLH.shape[:2], dtype=torch.bool), state)
            last = int(state.num_seen_B) - 1
            torch.testing.assert_close(text_BH, seen["hidden_BLH"][:, last], rtol=0, atol=1e-9)
            torch.testing.assert_close(speech_BH, seen["speech_BLH"][:, last], rtol=0, atol=1e-9)


def test_rows_of_different_lengths_go_on_as_if_alone(tiny64: Tiny) -> None:
    """Padded prompts, then common steps on top of the padding inside the cache."""
    model, processor = tiny64
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randn(1, n, 32, dtype=torch.float64, generator=generator) for n in (3, 9, 6)]
    steps = torch.randn(3, 4, 32, dtype=torch.float64, generator=generator)
    padded = torch.full((3, 9, 32), 1e3, dtype=torch.float64)
    mask_BL = torch.zeros(3, 9, dtype=torch.bool)
    for index, row in enumerate(rows):
        padded[index, : row.shape[1]] = row
        mask_BL[index, : row.shape[1]] = True
    one_BL = torch.ones(3, 1, dtype=torch.bool)
    with torch.no_grad():
        *_, state = batched = model.advance(padded, mask_BL, model.init_state(3))
        alone = [model.advance(row, one_BL[:1].expand(1, row.shape[1]), model.init_state(1)) for row in rows]
        for step in range(5):
            for index, single in enumerate(alone):
                for part in (0, 1):
                    torch.testing.assert_close(batched[part][index], single[part][0], rtol=0, atol=1e-9)
            if step < 4:
                *_, state = batched = model.advance(steps[:, step : step + 1], one_BL, state)
                alone = [
                    model.advance(steps[i : i + 1, step : step + 1], one_BL[:1], single[2])
                    for i, single in enumerate(alone)
                ]
    assert state.num_seen_B.tolist() == [7, 13, 10]


def test_losses_of_a_padded_batch_are_the_sums_of_its_rows(tiny64: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """Text, state and CTC to twelve digits. The head draws noise: for it, what it is given is compared."""
    model, processor = tiny64
    given: list[Tensor] = []

    def distance(hidden_NH: Tensor, target_N: Tensor, row_N: Tensor, generator: torch.Generator | None) -> HeadLoss:
        given.append(hidden_NH)
        loss_N = (hidden_NH[:, :DIM] - target_N).square().mean(-1)
        return HeadLoss(loss_N.sum(), torch.tensor(float(len(loss_N))))

    monkeypatch.setattr(model.head, "loss", distance)
    rows = examples(processor)
    with torch.no_grad():
        alone = [model(row) for row in rows]
        for batch in (collate(rows), collate(rows, length=64)):
            together = model(batch)
            assert set(together) == {"text", "state", "speech", "ctc"}
            for part, loss in together.items():
                wanted = sum(losses[part].sum for losses in alone if part in losses)
                torch.testing.assert_close(loss.sum.double(), wanted.double(), rtol=1e-6, atol=0)
                assert int(loss.count) == sum(int(losses[part].count) for losses in alone if part in losses)


def test_counts_known_beforehand_are_those_of_the_losses(tiny: Tiny) -> None:
    model, processor = tiny
    for streams in [*examples(processor), collate(examples(processor))]:
        losses = model(streams, torch.Generator().manual_seed(0))
        reported = {part: float(loss.count) for part, loss in losses.items() if "/" not in part}
        assert reported == {part: count for part, count in streams.counts().items() if count}


def test_every_trainable_parameter_learns(tiny: Tiny) -> None:
    """A batch of all kinds of rows leaves no parameter without a gradient."""
    model = copy.deepcopy(tiny[0]).train()
    losses = model(collate(examples(tiny[1])), torch.Generator().manual_seed(0))
    sum(loss.sum for part, loss in losses.items() if "/" not in part).backward()
    idle = {name for name, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())}
    assert idle <= {"head.conditioner.null_W", "encoder.whisper.embed_positions.weight"}
    assert not any(p.requires_grad for p in model.speech_tokenizer.parameters())


# ------------------------------------------------------------------------------------------------- state is a value


def test_an_old_state_stays_usable(tiny: Tiny, tmp_path: Path) -> None:
    """Advance twice from one state, from a copy of it, and from a saved one: always the same; nothing is shared."""
    model, _ = tiny
    generator = torch.Generator().manual_seed(0)
    prompt, first, second = (torch.randn(2, n, 32, generator=generator) for n in (5, 1, 3))

    def ones(x_BLH: Tensor) -> Tensor:
        return torch.ones(x_BLH.shape[:2], dtype=torch.bool)

    with torch.no_grad():
        *_, state = model.advance(prompt, ones(prompt), model.init_state(2))
        torch.save(state, tmp_path / "state.pt")
        copied = copy.deepcopy(state)
        wanted = [model.advance(x, ones(x), state)[:2] for x in (first, second)]
        # the order does not matter, nor what came of the state in between
        for other in (state, copied, torch.load(tmp_path / "state.pt", weights_only=False)):
            for x, (text_BH, speech_BH) in reversed(list(zip((first, second), wanted, strict=True))):
                again = model.advance(x, ones(x), other)
                assert torch.equal(again[0], text_BH) and torch.equal(again[1], speech_BH)
    assert state.mask_BL.shape == (2, 5) and state.llm_cache.get_seq_length() == 5
    assert state.num_seen_B.tolist() == [5, 5]


# ------------------------------------------------------------------------------------- the language model inside


@pytest.mark.parametrize("tied", [True, False])
def test_the_language_model_inside_is_the_plain_one(tmp_path: Path, tied: bool) -> None:
    """Text-only streams give exactly its logits and its loss, before and after saving and loading."""
    parts = save_tiny_parts(tmp_path, tied)
    plain = AutoModelForCausalLM.from_pretrained(parts["llm"])
    model, processor = assemble(**parts, **SMALL)
    save_model(model, processor, tmp_path / "model")
    loaded, _ = load_model(tmp_path / "model")
    streams = processor.layout.example([processor.turn("user", "what is one"), Turn("assistant", "the answer")])
    with torch.no_grad():
        logits_BLV = plain(input_ids=streams.text_BL).logits
        labels_BL = streams.text_BL.masked_fill(~streams.text_loss_BL, -100)
        loss = plain(input_ids=streams.text_BL, labels=labels_BL).loss
        for ours in (model.eval(), loaded):
            hidden_BLH = ours.llm.base_model(inputs_embeds=ours.embed(streams)).last_hidden_state
            assert torch.equal(ours.text_logits(hidden_BLH), logits_BLV)
            text = ours(streams)["text"]
            torch.testing.assert_close(text.sum / text.count, loss)
            shared = ours.llm.get_input_embeddings().weight is ours.llm.get_output_embeddings().weight
            assert shared == tied


# ---------------------------------------------------------------------------------------------------- save and load


def test_a_saved_model_is_the_same_model(tiny: Tiny, tmp_path: Path) -> None:
    """Also through AutoConfig and AutoModel; the text tokenizer and the layout come back with it."""
    model, processor = tiny
    save_model(model, processor, tmp_path)
    loaded, again = load_model(tmp_path)
    automatic = AutoModel.from_pretrained(tmp_path, dtype="float32")
    assert isinstance(AutoConfig.from_pretrained(tmp_path), FlowOmniConfig) and isinstance(automatic, FlowOmniModel)
    for other in (loaded, automatic):
        assert not other.training and other.config.to_dict() == model.config.to_dict() | {
            k: other.config.to_dict()[k] for k in ("architectures", "dtype", "transformers_version", "_name_or_path")
            if k in other.config.to_dict()
        }
        state = other.state_dict()
        for name, value in model.state_dict().items():
            assert torch.equal(state[name], value), name
    assert again.layout.config == processor.layout.config and again.text_eos_id == processor.text_eos_id
    streams, resaved = examples(processor), examples(again)
    assert all(torch.equal(a.text_BL, b.text_BL) for a, b in zip(streams, resaved, strict=True))


def test_a_text_tokenizer_stays_what_it_was(tiny: Tiny, tmp_path: Path) -> None:
    """One of our own beside a Qwen2 model once came back with Qwen2's pre-tokenizer: every word spelled, no spaces."""
    made = build_text_tokenizer(WORDS)
    _, processor = tiny
    save_model(*tiny, tmp_path)
    _, again = load_model(tmp_path)
    for sentence in ("what is one plus two", "Hello, strange apple"):
        ids = made.encode(sentence, add_special_tokens=False)
        for other in (processor, again):
            assert other.text_tokenizer.encode(sentence, add_special_tokens=False) == ids
            assert other.decode_text(ids) == made.decode(ids)


@pytest.mark.parametrize("tied", [True, False])
def test_half_precision_halves_the_file(tmp_path: Path, tied: bool) -> None:
    """Every matrix is kept once, as float16; the loaded model is float32 and close."""
    model, processor = assemble(**save_tiny_parts(tmp_path / "parts", tied), **SMALL)
    save_model(model, processor, tmp_path / "full")
    save_model(model, processor, tmp_path / "half", half=True)
    with (
        safe_open(tmp_path / "full" / "model.safetensors", "pt") as full,
        safe_open(tmp_path / "half" / "model.safetensors", "pt") as half,
    ):
        assert set(full.keys()) == set(half.keys())  # noqa: SIM118  a safetensors file is no mapping
        assert ("llm.lm_head.weight" in half.keys()) is not tied  # noqa: SIM118
        matrices = [name for name, p in model.named_parameters() if p.ndim > 1]
        assert all(half.get_tensor(name).dtype == torch.float16 for name in matrices)
    loaded, _ = load_model(tmp_path / "half")
    for name, value in model.state_dict().items():
        assert loaded.state_dict()[name].dtype == value.dtype
        torch.testing.assert_close(loaded.state_dict()[name], value, rtol=1e-3, atol=1e-6)


def test_a_pretrained_model_of_another_precision_becomes_float32(tmp_path: Path) -> None:
    parts = save_tiny_parts(tmp_path)
    AutoModelForCausalLM.from_pretrained(parts["llm"]).bfloat16().save_pretrained(parts["llm"])
    model, _ = assemble(**parts, **SMALL)
    assert {p.dtype for p in model.parameters()} == {torch.float32}


# -------------------------------------------------------------------------------------------------------- bad input


def test_an_incomplete_checkpoint_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    model, processor = tiny
    with pytest.raises(ValueError, match="is not a model folder"):
        load_model(tmp_path / "nothing")
    with pytest.raises(ValueError, match="holds a 'qwen2' model, not 'flowomni'"):
        load_model(save_tiny_parts(tmp_path / "parts")["llm"])
    state = model.state_dict()
    state.pop("head.net.project_in.weight")
    model.save_pretrained(tmp_path / "lacking", state_dict=state)
    with pytest.raises(ValueError, match=r"lacks tensors: head\.net\.project_in\.weight"):
        load_model(tmp_path / "lacking")
    save_model(model, processor, tmp_path / "mute")
    for file in (tmp_path / "mute").glob("tokenizer*"):
        file.unlink()
    with pytest.raises(ValueError, match="no text tokenizer there"):
        load_model(tmp_path / "mute")


def test_parts_that_do_not_exist(tmp_path: Path) -> None:
    parts = save_tiny_parts(tmp_path)
    for part in ("llm", "speech_tokenizer"):
        with pytest.raises(ValueError, match=f"^{part}: cannot load"):
            assemble(**parts | {part: str(tmp_path / "nothing")})


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"head": {"kind": "flow", "widht": 3}}, r"head\.widht: unknown key; did you mean 'width'"),
        ({"head": {"kind": "flaw"}}, r"head\.kind is 'flaw'.*flow"),
        ({"output_blocks": {"num_layer": 2}}, r"output_blocks\.num_layer: .*did you mean 'num_layers'"),
        ({"output_blocks": {"num_heads": 5}}, r"output_blocks\.num_heads is 5 but llm\.hidden_size is 32"),
        ({"layout": {"speech_delay": 2}}, r"layout\.speech_delay: .*did you mean 'speech_delay_tokens'"),
        ({"layout": {"kind": "duplex"}}, r"layout: kind is 'duplex'"),
        ({"loss": {"text_wieght": 2.0}}, r"loss\.text_wieght: .*did you mean 'text_weight'"),
        ({"encoder_stack": 0}, "encoder_stack is 0"),
        ({"encoder_stak": 4}, "encoder_stak: unknown key; did you mean 'encoder_stack'"),
        ({"llm": {"hidden_size": 8}}, "llm: expected a config with a model_type"),
    ],
)
def test_bad_configuration(tiny: Tiny, sections: dict[str, Any], message: str) -> None:
    values = {"llm": tiny[0].config.llm, "speech_tokenizer": tiny[0].config.speech_tokenizer} | sections
    with pytest.raises(ValueError, match=message):
        FlowOmniConfig(**values)


class CodesConfig(PreTrainedConfig):
    """A speech tokenizer of codes, as far as a config is concerned."""

    model_type = "codes_for_a_test"
    token_spec = TokenSpec("discrete", 0, 4, 64, 24_000, 2_048, 0)


def test_a_head_and_a_tokenizer_that_do_not_fit(tiny: Tiny) -> None:
    """Refused when the configuration is read; the message names both lines."""
    with pytest.raises(ValueError, match=r"head\.kind is 'flow', .*spec\.kind is 'discrete'"):
        FlowOmniConfig(llm=tiny[0].config.llm, speech_tokenizer=CodesConfig())
    FlowOmniConfig(llm=tiny[0].config.llm, speech_tokenizer=MelTokenizerConfig())


def test_a_text_tokenizer_without_an_end(tiny: Tiny) -> None:
    model, _ = tiny
    endless = build_text_tokenizer(["one"])
    endless.eos_token = None
    values = {k: v for k, v in model.config.to_dict().items() if k not in ("model_type", "text_eos_id")}
    with pytest.raises(ValueError, match="text_eos_id is not set and the text tokenizer has no eos token"):
        FlowOmniProcessor(FlowOmniConfig(**values), endless, model.speech_tokenizer.spec)
    ended = FlowOmniProcessor(FlowOmniConfig(**values, text_eos_id=7), endless, model.speech_tokenizer.spec)
    assert ended.text_eos_id == 7


def test_a_model_without_ears() -> None:
    model, processor = tiny_model(encoder=None)
    streams = processor.layout.example([processor.turn("user", "one"), Turn("assistant", "two", speech_LX=tokens(2, 0))])
    assert set(model(streams)) >= {"text", "state", "speech"}
    with pytest.raises(ValueError, match="no speech encoder: it takes text only"):
        processor.turn("user", wav_S=noise_wav(0.5, 0))
    with pytest.raises(ValueError, match="it cannot hear audio"):
        model.hear(torch.zeros(1, 80, 10), torch.tensor([10]))


def test_without_output_blocks_the_heads_read_the_language_model(tiny: Tiny) -> None:
    model, processor = tiny_model(output_blocks={"num_layers": 0})
    x_BLH = torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(0))
    text_BH, speech_BH, _ = model.advance(x_BLH, torch.ones(1, 5, dtype=torch.bool), model.init_state(1))
    assert torch.equal(text_BH, speech_BH)
    assert set(model(examples(processor)[0])) >= {"text", "state", "speech"}
