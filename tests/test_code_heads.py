"""Heads for codes beyond the contract: how they draw and learn, delays in layout and generation, and equal sizes.

Shapes: B batch, L positions, N positions, K codebooks, V codebook size, H hidden width, S samples.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer

from flowomni.build import assemble
from flowomni.configuration import LayoutConfig
from flowomni.generation import GenerationOptions, Step, generate
from flowomni.heads import CodeSampling, DepthHead, build_head, head_config, part_delays
from flowomni.heads.codes import CodeHead, pick
from flowomni.heads.sizes import matching_width, num_head_parameters
from flowomni.layouts import Turn, TurnLayout
from flowomni.modeling import FlowOmniModel
from flowomni.processing import FlowOmniProcessor
from flowomni.streams import NONE, SpeechState, Streams, collate
from flowomni.tokenizers import MelTokenizer, MelTokenizerConfig
from flowomni.tokenizers.base import TokenSpec
from tests.tiny import INSTRUCTIONS, save_tiny_parts

HIDDEN, NUM_LEVELS, NUM_CODES = 12, 3, 16
START, GEN, STOP = SpeechState.START, SpeechState.GENERATING, SpeechState.STOP
SMALL = {"width": 16, "num_blocks": 1, "code_dim": 8}


def spec(num_codebooks: int = NUM_LEVELS, codebook_size: int = NUM_CODES) -> TokenSpec:
    return TokenSpec("discrete", 0, num_codebooks, codebook_size, 24_000, 2_048, 0)


def code_head(kind: str, num_codebooks: int = NUM_LEVELS, codebook_size: int = NUM_CODES, **values: Any) -> CodeHead:
    torch.manual_seed(0)
    sizes = SMALL | ({"num_heads": 2} if kind == "depth" else {})
    head = build_head({"kind": kind, **sizes, **values}, spec(num_codebooks, codebook_size), HIDDEN)
    assert isinstance(head, CodeHead)
    return head


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def codes(*shape: int, num_codes: int = NUM_CODES) -> Tensor:
    return torch.randint(num_codes, shape, generator=seeded(1))


# ------------------------------------------------------------------------------------------------------------ picking


def picked(logits_V: Tensor, sampling: CodeSampling, num: int = 20_000) -> Tensor:
    """Share of each code among many picks."""
    uniform_N = torch.rand(num, generator=seeded())
    code_N = pick(logits_V.expand(num, -1), uniform_N, sampling)
    return torch.bincount(code_N, minlength=len(logits_V)) / num


def test_codes_are_picked_with_their_probability() -> None:
    logits_V = torch.tensor([0.3, -1.0, 2.0, 0.0, -9.0])
    for temperature in (1.0, 0.5, 3.0):
        torch.testing.assert_close(
            picked(logits_V, CodeSampling(temperature)), (logits_V / temperature).softmax(-1), atol=0.015, rtol=0
        )
    assert picked(logits_V, CodeSampling(temperature=0.0)).tolist() == [0, 0, 1, 0, 0]


def test_top_k_and_top_p_leave_the_rest_in_proportion() -> None:
    chance_V = torch.tensor([0.05, 0.4, 0.25, 0.3])
    expected = {
        CodeSampling(top_k=1): [0.0, 1.0, 0.0, 0.0],
        CodeSampling(top_k=2): [0.0, 4 / 7, 0.0, 3 / 7],
        CodeSampling(top_k=9): chance_V.tolist(),
        CodeSampling(top_p=0.39): [0.0, 1.0, 0.0, 0.0],
        CodeSampling(top_p=0.6): [0.0, 4 / 7, 0.0, 3 / 7],
        CodeSampling(top_k=3, top_p=0.9): [0.0, 8 / 19, 5 / 19, 6 / 19],
    }
    for sampling, shares in expected.items():
        torch.testing.assert_close(picked(chance_V.log(), sampling), torch.tensor(shares), atol=0.015, rtol=0)


@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-24])
def test_the_ends_of_the_unit_interval_pick_codes_that_may_be_picked(uniform: float) -> None:
    logits_V = torch.tensor([1.0, 3.0, -float("inf"), 2.0])
    for sampling in (CodeSampling(), CodeSampling(top_p=0.7), CodeSampling(top_k=2)):
        assert int(pick(logits_V, torch.tensor(uniform), sampling)) in (0, 1, 3)


# ----------------------------------------------------------------------------------------------------------- learning


def test_levels_are_weighted_and_missing_codes_cost_nothing() -> None:
    code_NK = codes(5, NUM_LEVELS)
    code_NK[1:3, 2] = NONE
    hidden_NH, row_N = torch.randn(5, HIDDEN, generator=seeded()), torch.arange(5)
    loss = code_head("delay", level_weights=[8, 1]).loss(hidden_NH, code_NK, row_N, None)
    levels = [loss.parts[f"level_{k}"] for k in range(NUM_LEVELS)]
    assert [int(count) for _, count in levels] == [5, 5, 3] and loss.count == 5
    torch.testing.assert_close(loss.sum.detach(), 0.8 * levels[0][0] + 0.1 * levels[1][0] + 0.1 * levels[2][0])
    assert all(0 <= loss.parts[f"accuracy_{k}"][0] <= loss.parts[f"accuracy_{k}"][1] for k in range(NUM_LEVELS))


@pytest.mark.parametrize("kind", ["delay", "depth"])
def test_a_missing_code_is_not_read(kind: str) -> None:
    head, code_NK = code_head(kind), codes(4, NUM_LEVELS)
    part_NK = code_NK.clone()
    part_NK[:, 1] = NONE
    others = [
        head.embedding(head.tables.read(code_NK[:, k : k + 1], k), k, 1).sum(1) for k in range(NUM_LEVELS) if k != 1
    ]
    torch.testing.assert_close(head.embed(part_NK), sum(others))
    assert not head.embed(torch.full((4, NUM_LEVELS), NONE)).any()


@pytest.mark.parametrize("kind", ["single", "delay", "depth"])
def test_a_head_learns_how_often_codes_come(kind: str) -> None:
    """Level 0 depends on the hidden state; where a head draws level by level, level 1 is level 0 plus one."""
    num_codebooks, num_codes = (1 if kind == "single" else 2), 6
    head, generator = code_head(kind, num_codebooks, num_codes, width=32, condition_dropout=0.3), seeded()
    optimizer = torch.optim.Adam(head.parameters(), 1e-2)
    chance_2V = torch.tensor([[0.5, 0.3, 0.2, 0, 0, 0], [0, 0, 0, 0.1, 0.2, 0.7]])

    def draw(side_N: Tensor) -> Tensor:
        first_N = torch.multinomial(chance_2V[side_N], 1, generator=generator)
        return torch.cat([first_N, (first_N + 1) % num_codes], dim=1)[:, :num_codebooks]

    embedded_2H = torch.randn(2, HIDDEN, generator=generator)
    for _ in range(150):
        side_N = torch.randint(2, (1024,), generator=generator)
        loss = head.loss(embedded_2H[side_N], draw(side_N), torch.arange(1024), generator)
        optimizer.zero_grad()
        (loss.sum / loss.count).backward()
        optimizer.step()
    for side in range(2):
        code_NK = head.sample(embedded_2H[[side] * 4_000], CodeSampling(), generator)
        share_V = torch.bincount(code_NK[:, 0], minlength=num_codes) / 4_000
        torch.testing.assert_close(share_V, chance_2V[side], atol=0.08, rtol=0)
        if kind == "depth":
            assert (code_NK[:, 1] == (code_NK[:, 0] + 1) % num_codes).float().mean() > 0.95
    common_V = chance_2V.mean(0)  # what is learned without a condition
    for guidance, wanted_V in ((0.0, common_V), (2.0, chance_2V[1] ** 2 / common_V)):
        code_NK = head.sample(embedded_2H[[1] * 4_000], CodeSampling(guidance=guidance), generator)
        share_V = torch.bincount(code_NK[:, 0], minlength=num_codes) / 4_000
        torch.testing.assert_close(share_V, wanted_V / wanted_V.sum(), atol=0.1, rtol=0)


@pytest.mark.parametrize("kind", ["single", "delay", "depth"])
def test_guidance_needs_a_head_that_learned_to_go_without(kind: str) -> None:
    head = code_head(kind, 1 if kind == "single" else 2, condition_dropout=0.0)
    with pytest.raises(ValueError, match="guidance is 2.0 but head.condition_dropout is 0"):
        head.sample(torch.zeros(1, HIDDEN), CodeSampling(guidance=2.0), seeded())


def test_depth_draws_by_the_logits_that_it_was_taught_with() -> None:
    """Level by level with cached keys and values = all levels at once."""
    head, hidden_NH = code_head("depth", num_blocks=2).eval(), torch.randn(6, HIDDEN, generator=seeded())
    code_NK = head.sample(hidden_NH, CodeSampling(temperature=0.0), seeded())
    loss = head.loss(hidden_NH, code_NK, torch.arange(6), None)
    assert [int(loss.parts[f"accuracy_{k}"][0]) for k in range(NUM_LEVELS)] == [6] * NUM_LEVELS


def test_a_level_depends_on_those_before_it_alone() -> None:
    head = code_head("depth", num_blocks=2).eval()
    assert isinstance(head, DepthHead)
    hidden_NH, code_NK = torch.randn(4, HIDDEN, generator=seeded()), codes(4, NUM_LEVELS)

    def nats(code_NK: Tensor, level: int) -> Tensor:
        return head.loss(hidden_NH, code_NK, torch.arange(4), None).parts[f"level_{level}"][0]

    for changed in range(NUM_LEVELS):
        other_NK = code_NK.clone()
        other_NK[:, changed] = (other_NK[:, changed] + 1) % NUM_CODES
        for level in range(NUM_LEVELS):
            assert torch.equal(nats(code_NK, level), nats(other_NK, level)) == (level < changed)


def test_perturb_replaces_and_drops_up_to_its_shares() -> None:
    code_BLK = codes(200, 50, NUM_LEVELS, num_codes=64)
    code_BLK[:, :5] = NONE
    head = code_head("delay", codebook_size=64, feedback_replace=0.6, feedback_drop=0.4)
    fed_back_BLK, target_BLK = head.perturb(code_BLK, seeded())
    assert target_BLK is code_BLK and (fed_back_BLK[:, :5] == NONE).all()
    dropped_BL = (fed_back_BLK[:, 5:] == NONE).all(-1)
    assert torch.equal(dropped_BL, (fed_back_BLK[:, 5:] == NONE).any(-1)), "whole tokens"
    share_B = dropped_BL.float().mean(1)
    assert share_B.mean().item() == pytest.approx(0.2, abs=0.03) and share_B.std() > 0.08, "each row has its own share"
    changed_BLK = (fed_back_BLK[:, 5:] != code_BLK[:, 5:]) & ~dropped_BL.unsqueeze(-1)
    assert changed_BLK.float().mean().item() == pytest.approx(0.3 * 0.8 * 63 / 64, abs=0.03)
    assert code_head("delay").perturb(code_BLK, None)[0] is code_BLK


@pytest.mark.parametrize(
    ("kind", "num_codebooks", "values", "message"),
    [
        ("single", 4, {}, "head.kind is 'single'.*num_codebooks is 4: set head.kind to 'delay' or 'depth'"),
        ("depth", 1, {}, "head.kind is 'depth'.*num_codebooks is 1: set head.kind to 'single'"),
        ("delay", 2, {"level_weights": [1, 1, 1]}, "level_weights has 3 weights.* 2 levels"),
        ("delay", 2, {"level_weights": [1, 0]}, r"level_weights is \[1, 0\]"),
        ("delay", 2, {"feedback_replace": 1.0}, r"feedback_replace is 1.0; it must be in \[0, 1\)"),
        ("delay", 2, {"feedback_drop": -0.1}, "feedback_drop is -0.1"),
        ("delay", 2, {"code_dim": 0}, "code_dim is 0"),
        ("delay", 2, {"tables_from": "codebook"}, "tables_from is 'codebook'; it must be 'codebooks' or 'random'"),
        ("delay", 2, {"sampling": {"top_q": 1}}, "sampling.top_q: unknown key; did you mean 'top_p'"),
        ("depth", 2, {"num_heads": 3, "width": 16}, "num_heads is 3, but width is 16"),
    ],
)
def test_what_does_not_fit_is_named(kind: str, num_codebooks: int, values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        code_head(kind, num_codebooks, **values)


# ------------------------------------------------------------------------------------------------------ delays, layout


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A tiny language model, and a tiny tokenizer with three residual codebooks of 16."""
    folder = tmp_path_factory.mktemp("parts")
    found = save_tiny_parts(folder)
    sizes = {"latent_dim": 6, "width": 16, "intermediate_dim": 16, "frame_width": 8}
    layers = {"num_encoder_layers": 1, "num_decoder_layers": 1, "num_frame_layers": 1}
    bottleneck = {"bottleneck": "rvq", "num_codebooks": NUM_LEVELS, "codebook_size": NUM_CODES}
    vocoder = {"dim": 16, "intermediate_dim": 16, "num_layers": 2}
    torch.manual_seed(0)
    MelTokenizer(MelTokenizerConfig(autoencoder=sizes | layers | bottleneck, vocoder=vocoder)).save_pretrained(
        folder / "codes"
    )
    return found | {"speech_tokenizer": str(folder / "codes")}


def layout_of(parts: dict[str, str], kind: str) -> TurnLayout:
    tokenizer = AutoTokenizer.from_pretrained(parts["llm"])
    config = LayoutConfig(speech_delay_tokens=1, instructions=INSTRUCTIONS)
    delay_K = part_delays({"kind": kind}, spec())
    return TurnLayout(config, tokenizer, tokenizer.eos_token_id, 1, torch.full((NUM_LEVELS,), NONE), delay_K)


def test_tables_start_from_the_codebooks(parts: dict[str, str]) -> None:
    """Codes that are near each other in the tokenizer are so in the head; finer levels are read as less."""

    def made(**head: Any) -> FlowOmniModel:
        layout = {"speech_delay_tokens": 1, "instructions": INSTRUCTIONS}
        return assemble(**parts, head={"kind": "delay", **SMALL, **head}, output_blocks={}, layout=layout)[0]

    model = made()
    vector_KVD, tables = model.speech_tokenizer.code_vectors(), model.head.tables
    code_BLK = codes(1, 5, NUM_LEVELS)
    summed_LD = sum(vector_KVD[level, code_BLK[0, :, level]] for level in range(NUM_LEVELS))
    rest_LD = model.speech_tokenizer.raw_latent(code_BLK)[0] - summed_LD
    torch.testing.assert_close(rest_LD, rest_LD[:1].expand_as(rest_LD), rtol=0, atol=1e-5)

    apart_KVV = torch.cdist(vector_KVD, vector_KVD).double()
    read_KVV, write_KVV = (torch.cdist(t, t).double() for t in (tables.read_KVE, tables.write_KVE))
    factor = read_KVV.sum() / apart_KVV.sum()
    torch.testing.assert_close(read_KVV, factor * apart_KVV, rtol=1e-4, atol=1e-4)
    factor_K11 = write_KVV.sum(dim=(1, 2), keepdim=True) / apart_KVV.sum(dim=(1, 2), keepdim=True)
    torch.testing.assert_close(write_KVV, factor_K11 * apart_KVV, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(tables.write_KVE.square().sum(-1).mean(1), torch.ones(NUM_LEVELS))

    narrow_NE = made(code_dim=4).head.tables.read_KVE.flatten(0, 1)  # the directions in which codes differ most
    expected_E, found_E = torch.linalg.svdvals(vector_KVD.flatten(0, 1))[:4], torch.linalg.svdvals(narrow_NE)
    torch.testing.assert_close(found_E / found_E[0], expected_E / expected_E[0], rtol=1e-4, atol=1e-4)
    assert not torch.equal(made(tables_from="random").head.tables.read_KVE, tables.read_KVE)


def test_delayed_levels_stand_at_later_steps(parts: dict[str, str]) -> None:
    """The picture in `flowomni.layouts`, and what is a target in it."""
    code_LK = torch.tensor([[1, 2, 3], [4, 5, 6]])
    layout = layout_of(parts, "delay")
    example = layout.example([Turn("user", "one"), Turn("assistant", "two", speech_LX=code_LK)])
    answer = slice(-6, None)
    assert example.state_BL[0, answer].tolist() == [START, GEN, GEN, STOP, STOP, STOP]
    assert example.speech_BLX[0, answer].T.tolist() == [
        [NONE, 1, 4, NONE, NONE, NONE],
        [NONE, NONE, 2, 5, NONE, NONE],
        [NONE, NONE, NONE, 3, 6, NONE],
    ]
    assert example.speech_loss_BL[0, answer].tolist() == [False, True, True, True, True, False]
    assert example.state_target_BL[0, answer].tolist() == [False, True, True, True, False, False]
    assert example.counts()["speech"] == 4 and example.counts()["state"] == 3
    assert layout.num_speech_steps(2) == 6
    padded = collate([example], length=example.text_BL.shape[1] + 3)
    assert int(padded.generating_BL.sum()) == 4 and padded.tail_BL is not None and not padded.tail_BL[0, -3:].any()


def test_spread_and_join_are_inverse_and_leave_what_is_not_there_out(parts: dict[str, str]) -> None:
    layout = layout_of(parts, "delay")
    code_LK = codes(5, NUM_LEVELS)
    step_TK = layout.spread(code_LK)
    joined = [layout.join(list(step_TK[i : i + 3])) for i in range(5)]
    assert torch.equal(torch.stack(joined), code_LK)
    full_TK = torch.where(step_TK == NONE, 7, step_TK)  # as a head draws that knows nothing of delays
    tails = [0] * 5 + [2, 1]
    kept = [layout.only_there(full_TK[i], i, tail) for i, tail in enumerate(tails)]
    assert torch.equal(torch.stack(kept), step_TK)
    undelayed = layout_of(parts, "depth")
    assert undelayed.num_delay_steps == 0 and undelayed.spread(code_LK) is code_LK


# ---------------------------------------------------------------------------------------------------------- generation


def model_with(parts: dict[str, str], kind: str) -> tuple[FlowOmniModel, FlowOmniProcessor]:
    torch.manual_seed(3)
    model, processor = assemble(
        **parts,
        head={"kind": kind, **SMALL, **({"num_heads": 2} if kind == "depth" else {})},
        output_blocks={"num_layers": 1, "num_heads": 2},
        layout={"instructions": INSTRUCTIONS, "max_answer_tokens": 14},
    )
    with torch.no_grad():
        for parameter in model.head.parameters():
            parameter *= 3
        model.state_head.classify.weight *= 40  # stops now and then
    return model.eval(), processor


def run(model: FlowOmniModel, processor: FlowOmniProcessor, prompts: list[Streams], seeds: list[int]) -> list[Step]:
    options = GenerationOptions(text_temperature=1.0)
    return list(generate(model, processor, prompts, options, [seeded(seed) for seed in seeds]))


QUESTIONS = ["what is one plus two", "say hello", "apple", "the answer is four"]


@pytest.mark.parametrize("kind", ["delay", "depth"])
def test_what_is_fed_back_is_what_training_reads(
    parts: dict[str, str], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The steps of a generated answer are the layout's steps of the tokens that were played."""
    model, processor = model_with(parts, kind)
    lengths = set()
    true_embed, true_step = FlowOmniModel.embed, MelTokenizer.step
    for seed, text in enumerate(QUESTIONS):
        fed: list[Streams] = []
        played: list[Tensor] = []

        def embed(self: FlowOmniModel, streams: Streams, *rest: Any, into: list[Streams] = fed) -> Tensor:
            into.append(streams)
            return true_embed(self, streams, *rest)

        def step(self: MelTokenizer, token_BLX: Tensor, state: Any, into: list[Tensor] = played) -> Any:
            into.append(token_BLX[0])
            return true_step(self, token_BLX, state)

        with monkeypatch.context() as patch:
            patch.setattr(FlowOmniModel, "embed", embed)
            patch.setattr(MelTokenizer, "step", step)
            steps = run(model, processor, [processor.prompt([processor.turn("user", text=text)])], [seed])
        code_LK = torch.cat(played)
        wav_S = torch.cat([each.wavs[0] for each in steps])
        states = [each.states[0] for each in steps if each.states[0] is not None]
        if STOP not in states:  # cut off by the limit
            continue
        assert states.count(GEN) == len(code_LK) and len(wav_S) == len(code_LK) * 2_048
        lengths.add(len(code_LK))
        example = processor.layout.example([Turn("user", text), Turn("assistant", "one", speech_LX=code_LK)])
        answer_BL = example.state_BL != NONE
        spoken = [each for each in fed[1:] if int(each.state_BL) != NONE]
        # the last step of all may end the answer and is then not read
        read_TK = torch.cat([each.speech_BLX[0] for each in spoken])
        assert torch.equal(read_TK, example.speech_BLX[answer_BL][: len(read_TK)])
        holds = [bool(each.generating_BL) for each in spoken]
        assert holds == example.generating_BL[answer_BL][: len(holds)].tolist()
        assert len(spoken) >= int(answer_BL.sum()) - 1
    assert len(lengths) > 1, "or the test would not see what it is for"


@pytest.mark.parametrize("kind", ["delay", "depth"])
def test_a_batch_row_is_that_row_alone(parts: dict[str, str], kind: str) -> None:
    """Rows stop at different steps, and the others' late levels still come."""
    model, processor = model_with(parts, kind)
    prompts = [processor.prompt([processor.turn("user", text=text)]) for text in QUESTIONS]
    together = run(model, processor, prompts, [5, 6, 7, 8])
    for row, prompt in enumerate(prompts):
        alone = run(model, processor, [prompt], [5 + row])
        wav_S = torch.cat([step.wavs[0] for step in alone])
        torch.testing.assert_close(torch.cat([step.wavs[row] for step in together]), wav_S, rtol=0, atol=1e-4)


def test_a_model_learns_to_say_codes(parts: dict[str, str]) -> None:
    """One batch overfits through the whole model, delays included."""
    model, processor = model_with(parts, "delay")
    model.train()
    turns = [Turn("assistant", "one two", speech_LX=codes(n, NUM_LEVELS)) for n in (4, 2)]
    batch = collate([processor.layout.example([Turn("user", "apple"), turn]) for turn in turns])
    trained = [p for name, p in model.named_parameters() if not name.startswith("speech_tokenizer")]
    optimizer = torch.optim.Adam(trained, 1e-2)
    means = []
    for _ in range(60):
        losses = model(batch, seeded())
        assert int(losses["speech"].count) == (4 + 2) + (2 + 2) and int(losses["state"].count) == 5 + 3
        means.append({name: float(loss.sum.detach()) / float(loss.count) for name, loss in losses.items()})
        optimizer.zero_grad()
        torch.stack([loss.sum / loss.count for name, loss in losses.items() if "/" not in name]).sum().backward()
        optimizer.step()
    assert means[-1]["speech"] < 0.1 * means[0]["speech"] and means[-1]["state"] < 0.3
    assert means[-1]["speech/accuracy_2"] == 1.0


# --------------------------------------------------------------------------------------------------------------- sizes

REAL_HIDDEN = 256
LATENTS = TokenSpec("continuous", 32, 0, 0, 24_000, 2_048, 0)
FLOW = {"kind": "flow", "width": 256, "num_blocks": 4}


@pytest.mark.parametrize(
    ("values", "tokens"),
    [
        ({"kind": "regression"}, LATENTS),
        ({"kind": "single"}, spec(1, 1024)),
        ({"kind": "single", "num_blocks": 2}, spec(1, 1000)),
        ({"kind": "delay", "code_dim": 48, "num_blocks": 3}, spec(8, 1024)),
        ({"kind": "delay"}, spec(4, 1024)),
        ({"kind": "depth", "code_dim": 32, "num_blocks": 1}, spec(8, 1024)),
    ],
)
def test_every_head_can_be_as_large_as_the_flow_head(values: dict[str, Any], tokens: TokenSpec) -> None:
    wanted = num_head_parameters(FLOW, LATENTS, REAL_HIDDEN)
    width = matching_width(values, tokens, REAL_HIDDEN, wanted)
    head = build_head({**values, "width": width}, tokens, REAL_HIDDEN)
    found = sum(parameter.numel() for parameter in head.parameters())
    assert found == num_head_parameters({**values, "width": width}, tokens, REAL_HIDDEN)
    assert abs(found / wanted - 1) < 0.1
    head_config({**values, "width": width})


def test_a_head_whose_tables_alone_are_too_large_says_so() -> None:
    wanted = num_head_parameters(FLOW, LATENTS, REAL_HIDDEN)
    with pytest.raises(ValueError, match="'delay' head within 10% of .* change code_dim or num_blocks"):
        matching_width({"kind": "delay", "code_dim": 256}, spec(8, 1024), REAL_HIDDEN, wanted)
