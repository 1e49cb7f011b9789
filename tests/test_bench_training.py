"""The training benchmark: equal steps are compared, parts add up to the whole, and every section runs at a toy size."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from flowomni.streams import NONE, SpeechState
from scripts.bench_training import PEER_SHAPE, main
from scripts.benchmark import Bar
from scripts.training_memory import Case, measure
from scripts.training_runs import largest_difference, padding_of, toy_options
from scripts.training_steps import (
    SHAPES,
    ByPart,
    Spread,
    Step,
    alternate,
    encoder_step,
    flops_by_part,
    peer_config,
    peer_steps,
    ratio,
    seconds_by_part,
    speech_batch,
    speech_model,
    speech_step,
    text_step,
)
from training.stages.speech import SpeechStage

try:
    from transformers import PocketTTSConfig, PocketTTSForConditionalGeneration
except ImportError:
    pytest.skip("PocketTTS needs transformers 5.21", allow_module_level=True)

TOY = SHAPES["toy"]
TOY_PEER = dataclasses.replace(TOY, num_text=0)


def steps() -> dict[str, Step]:
    torch.manual_seed(0)
    model = speech_model(TOY, "eager")
    peers = peer_steps(TOY_PEER)
    return {
        "speech": speech_step(model, TOY),
        "text": text_step(model, TOY),
        "encoder": encoder_step(TOY, "eager"),
        "peer": peers[False],
        "peer, distilling": peers[True],
    }


# what is compared


def test_rows_are_those_of_the_layout() -> None:
    batch = speech_batch(TOY)
    assert batch.text_BL.shape == (TOY.num_rows, TOY.length) and batch.text_BL.numel() == TOY.num_positions
    wanted = [NONE] * 6 + [SpeechState.PAD, SpeechState.START] + [SpeechState.GENERATING] * 5 + [SpeechState.STOP]
    assert batch.state_BL.tolist() == [wanted] * TOY.num_rows
    assert ((batch.text_BL != NONE) == (torch.arange(TOY.length) < 6 + 3)).all()
    per_row = {"text": 3, "state": 8, "speech": 5, "ctc": 0, "text_ctc": 0}
    assert batch.counts() == {name: TOY.num_rows * count for name, count in per_row.items()}
    assert (batch.speech_BLX.isnan().any(-1) == ~batch.generating_BL).all()


def test_rows_of_the_peer_have_speech_alone_in_the_answer() -> None:
    batch = speech_batch(TOY_PEER)
    assert batch.state_BL[0].tolist() == [NONE] * 5 + [SpeechState.START] + [SpeechState.GENERATING] * 5
    counts = batch.counts()
    assert (counts["text"], counts["state"], counts["speech"]) == (0, 10, 10)


def test_the_peer_has_its_default_shape_and_ours_is_as_large() -> None:
    shape = SHAPES[PEER_SHAPE]
    assert peer_config(shape).to_dict() == PocketTTSConfig().to_dict()
    with torch.device("meta"):
        peer, ours = PocketTTSForConditionalGeneration(peer_config(shape)), speech_model(shape, "eager")

    def size(module: Any) -> int:
        return sum(p.numel() for p in module.parameters())

    assert size(ours.llm) == pytest.approx(size(peer.model), rel=0.005)
    assert size(ours.llm) > size(peer.model)
    assert size(ours.head) > size(peer.flow_head)
    assert ours.output_blocks is None
    assert ours.head.config.num_draws == peer.config.flow_loss_num_samples


def test_a_text_step_trains_the_language_model_alone() -> None:
    model = speech_model(TOY, "eager")
    speech, text = speech_step(model, TOY), text_step(model, TOY)
    assert text.num_parameters == sum(p.numel() for p in model.llm.parameters()) < speech.num_parameters
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    text()
    changed = {name.split(".")[0] for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {"llm"}
    speech()
    changed = {name.split(".")[0] for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {"llm", "output_blocks", "state_embedding", "state_head", "head"}


# parts


@pytest.mark.parametrize("name", ["speech", "text", "encoder", "peer", "peer, distilling"])
def test_parts_add_up_to_the_step(name: str) -> None:
    step = steps()[name]
    with FlopCounterMode(display=False) as counter:
        step()
    parts = flops_by_part(step)
    assert sum(parts.values()) == counter.get_total_flops() > 0
    assert parts["clip and optimizer"] == parts["other"] == 0
    assert seconds_by_part(step, 1).keys() == parts.keys()


def test_each_part_counts_its_own_backward_pass() -> None:
    """Backward costs two products for each of the forward pass, but for what is embedded first."""
    torch.manual_seed(0)
    model = speech_model(TOY, "eager")
    step = speech_step(model, TOY)
    parts = flops_by_part(step)
    with FlopCounterMode(display=False) as counter:
        watched = ByPart(counter.get_total_flops)
        with watched.watching(step.watched):
            step.loss()
            watched.begin("other")
    forward = {part: count for part, count in watched.counts.items() if count}
    assert forward.keys() == {"embeddings", "LLM", "text head", "output blocks", "state head", "speech head"}
    for part in ("LLM", "text head", "output blocks", "state head"):
        assert parts[part] == 3 * forward[part]
    assert 2 * forward["embeddings"] < parts["embeddings"] < 3 * forward["embeddings"]  # latents need no gradient
    assert parts["speech head"] > 2 * forward["speech head"]


@pytest.mark.parametrize("name", ["text", "peer", "peer, distilling"])
def test_what_a_part_hands_on_stays_the_inner_ones(name: str) -> None:
    """PocketTTS returns its backbone's hidden states beside the loss: their backward pass was the head's."""
    step = steps()[name]
    parts = flops_by_part(step)
    with FlopCounterMode(display=False) as counter:
        watched = ByPart(counter.get_total_flops)
        with watched.watching(step.watched):
            step.loss()
            watched.begin("other")
    assert 2.8 * watched.counts["LLM"] < parts["LLM"] <= 3 * watched.counts["LLM"]


def test_watching_leaves_nothing_behind() -> None:
    model = speech_model(TOY, "eager")
    step = speech_step(model, TOY)
    flops_by_part(step)
    for owner, name, _ in step.watched:
        assert name not in vars(owner)


def test_ratios_are_those_of_each_round() -> None:
    assert ratio([2.0, 6.0, 3.0], [1.0, 2.0, 3.0]) == Spread(2.0, 1.0, 3.0)
    order: list[str] = []
    found = alternate({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 2)
    assert order == ["a", "b"] * 3 and [len(times) for times in found.values()] == [2, 2]


def test_a_bar_has_a_side() -> None:
    assert Bar("", 1.2, 1.25).met and not Bar("", 1.3, 1.25).met
    assert Bar("", 1.0, 1.0, at_least=True).met and not Bar("", 0.9, 1.0, at_least=True).met


# memory, processes, padding


@pytest.mark.parametrize("hears", [False, True])
def test_a_plan_counts_what_the_loop_holds(hears: bool) -> None:
    torch.manual_seed(0)
    found = measure(Case(TOY, hears, rows=2, sec=1.0, half=False, attention="eager"))
    # Adam has two moments of each weight that has had a gradient, the plan has none left out
    assert found.states == found.planned_states
    for part in ("encoder", "llm") if hears else ("llm", "output blocks", "head"):
        assert found.kept[part] == pytest.approx(found.planned[part], rel=0.25)
    assert found.planned_peak > found.planned_states + sum(found.planned.values())


def test_batches_of_a_corpus_and_their_padding(tmp_path: Path) -> None:
    options = dataclasses.replace(toy_options(tmp_path), batch_size=2, tasks={"speech_to_speech": 1.0})
    stage = SpeechStage(options, seed=0)
    shares = padding_of(stage, 2)
    assert shares.keys() == {"padding_share", "padding_share_heard"}
    batches = [stage.batch(index, 0, 1) for index in range(2)]
    real, slots = sum(int(b.mask_BL.sum()) for b in batches), sum(b.mask_BL.numel() for b in batches)
    assert shares["padding_share"] == pytest.approx(1 - real / slots)
    assert padding_of(SpeechStage(dataclasses.replace(options, batch_size=1), seed=0), 2)["padding_share"] == 0


def test_losses_are_compared_name_by_name() -> None:
    a = [{"loss/text": 2.0, "loss/state": 1.0}]
    assert largest_difference(a, [{"loss/text": 2.1, "loss/state": 1.0}]) == pytest.approx(0.05)
    with pytest.raises(ValueError, match="not logged the same losses"):
        largest_difference(a, [{"loss/text": 2.0}])


# the command


@pytest.mark.parametrize("section", ["step", "peer", "memory"])
def test_a_section_at_a_toy_size(section: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "bench.json"
    arguments = ["--only", section, "--shape", "toy", "--repeats", "1", "--threads", "1", "--json", str(file)]
    status = main(arguments)
    found = json.loads(file.read_text())
    assert status == (0 if all(bar["met"] for bar in found["bars"]) else 1)
    assert found[section] and set(found) == {"options", "torch", "peak_flops", section, "bars"}
    printed = capsys.readouterr().out
    if section == "step":
        (toy,) = found["step"].values()
        assert {"LLM", "output blocks", "speech head", "clip and optimizer"} <= toy["parts"]["speech"].keys()
        assert toy["flop_ratio"] > 1 and toy["ratio"]["low"] <= toy["ratio"]["median"] <= toy["ratio"]["high"]
        assert "speech step / text-only step, toy" in printed
    if section == "peer":
        assert found["peer"]["ratios"].keys() == {
            "PocketTTS",
            "PocketTTS, distilling",
            "PocketTTS, on average",
        }
        assert found["peer"]["flop"]["PocketTTS"] < found["peer"]["flop"]["PocketTTS, distilling"]
    if section == "memory":
        assert {"toy, spoken, float32", "toy, heard, bf16"} == found["memory"].keys()


def test_no_corpus_no_padding(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--only", "padding", "--shape", "toy", "--data", str(tmp_path / "none")]) == 0
    assert f"not measured, there is no corpus {tmp_path / 'none'}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--threads", "0"], "--threads is 0; it must be at least 1"),
        (["--repeats", "-1"], "--repeats is -1"),
        (["--only", "nothing"], "invalid choice: 'nothing'"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        main(arguments)
    assert exit_info.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and words in line
