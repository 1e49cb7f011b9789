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
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from flowomni.build import assemble, load_model, save_model
from flowomni.configuration import FlowOmniConfig
from flowomni.heads import HeadLoss
from flowomni.layouts import Turn
from flowomni.modeling import FlowOmniModel
from flowomni.processing import FlowOmniProcessor
from flowomni.streams import NONE, Streams, collate
from tests.tiny import ENCODER, save_tiny_parts, tiny_model

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


def text_only(text_BL: Tensor) -> Streams:
    """Streams that hold nothing but text."""
    no_BL = torch.zeros(text_BL.shape, dtype=torch.bool)
    return Streams(
        text_BL=text_BL,
        state_BL=torch.full_like(text_BL, NONE),
        speech_BLX=torch.full((*text_BL.shape, DIM), float("nan")),
        heard_BL=no_BL,
        mask_BL=~no_BL,
        text_loss_BL=no_BL,
        state_loss_BL=no_BL,
    )


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
            assert set(together) == {"text", "state", "speech", "ctc", "text_ctc"}
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


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("llama", {}),
        ("gpt2", {}),
        ("qwen3", {"head_dim": 16}),
        ("mistral", {"sliding_window": 4, "head_dim": 16}),
        ("gemma2", {"sliding_window": 4, "head_dim": 16, "final_logit_softcapping": 3.0}),
        ("gemma3_text", {"sliding_window": 4, "head_dim": 16}),
        ("granite", {"logits_scaling": 7.0, "embedding_multiplier": 3.0}),
        ("cohere", {"logit_scale": 0.3}),
    ],
)
def test_any_family_gives_its_own_logits_step_by_step(tiny: Tiny, family: str, settings: dict[str, Any]) -> None:
    """Padded prompt and cached steps, against the language model's own forward pass over the whole text."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 50}
    kinds = {"num_key_value_heads": 2, "intermediate_size": 48, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    torch.manual_seed(0)
    llm = AutoConfig.for_model(family, **sizes, **(kinds if family != "gpt2" else {}), **settings)
    config = FlowOmniConfig(
        llm=llm, speech_tokenizer=tiny[0].config.speech_tokenizer, head=SMALL["head"], output_blocks={"num_layers": 0}
    )
    model = FlowOmniModel(config).eval()
    for parameter in model.llm.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    text_BL = torch.randint(3, 50, (2, 12), generator=torch.Generator().manual_seed(0))
    x_BLH = model.embed(text_only(text_BL))
    with torch.no_grad():
        wanted = model.llm(input_ids=text_BL).logits
        mask_BL = torch.ones(2, 7, dtype=torch.bool)
        mask_BL[1, 5:] = False  # the second row's prompt is shorter
        text_BH, _, state = model.advance(x_BLH[:, :7], mask_BL, model.init_state(2))
        for step in range(5):
            logits_BV = model.text_logits(text_BH)
            torch.testing.assert_close(logits_BV[0], wanted[0, 6 + step], rtol=1e-4, atol=1e-4)
            if "sliding_window" not in settings:  # or padding takes up places of the window
                torch.testing.assert_close(logits_BV[1], wanted[1, 4 + step], rtol=1e-4, atol=1e-4)
            new_BLH = torch.stack([x_BLH[0, 7 + step], x_BLH[1, 5 + step]])[:, None]
            text_BH, _, state = model.advance(new_BLH, torch.ones(2, 1, dtype=torch.bool), state)


# ------------------------------------------------------------------------------------------------------ fewer parts


def test_a_model_without_ears() -> None:
    model, processor = tiny_model(encoder=None)
    streams = processor.layout.example(
        [processor.turn("user", "one"), Turn("assistant", "two", speech_LX=tokens(2, 0))]
    )
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
