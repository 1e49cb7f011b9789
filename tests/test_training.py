"""Laws of training: a batch overfits; how a run is cut up (micro-batches, processes, restarts) changes nothing."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from flowomni.api import FlowOmni, Question
from flowomni.build import load_model, save_model
from flowomni.layouts import Turn
from flowomni.streams import Streams, collate
from tests.launched import PowerCut, cut_off
from tests.tiny import ENCODER, INSTRUCTIONS, LLM, save_tiny_parts, tiny_model
from training.checkpoint import Checkpoints
from training.ema import Ema
from training.parts import TrainsOptions
from training.stages.base import Stage
from training.stages.speech import PartsOptions, SpeechOptions, SpeechStage
from training.stages.text import TextOptions, TextStage
from training.train import RunOptions, checkpoint_layers, learning_rate_factor, optimize, parameter_groups, train

ANSWERS = ("one", "two", "three", "four", "five", "hello")


def text_options(**changes: Any) -> TextOptions:
    return TextOptions(**{"llm": LLM, "instructions": INSTRUCTIONS, "batch_size": 3, "num_eval": 4} | changes)


def run_options(folder: Path, **changes: Any) -> RunOptions:
    values = {"stage": "text", "max_steps": 6, "warmup_steps": 2, "log_every": 1, "save_every": 3, "ema_decay": 0.9}
    return RunOptions(output_dir=str(folder), **values | changes)


@pytest.fixture(scope="module")
def speech_options(tmp_path_factory: pytest.TempPathFactory) -> SpeechOptions:
    """A corpus of six conversations, tones that answer noise, and the parts of a tiny model."""
    folder = tmp_path_factory.mktemp("speech")
    (folder / "audio").mkdir()
    rng = np.random.default_rng(0)
    lines = []
    for index, word in enumerate(ANSWERS):
        seconds, answer_sec = 0.3 + 0.1 * index, 0.2 + 0.08 * index
        soundfile.write(folder / f"audio/q{index}.flac", 0.1 * rng.standard_normal(int(seconds * 16_000)), 16_000)
        tone = 0.3 * np.sin(2 * np.pi * 110 * (index + 2) * np.arange(int(answer_sec * 24_000)) / 24_000)
        soundfile.write(folder / f"audio/a{index}.flac", tone, 24_000)
        user = {"role": "user", "text": f"what is {word}", "audio": f"audio/q{index}.flac", "duration_sec": seconds}
        says = {"role": "assistant", "text": word, "audio": f"audio/a{index}.flac", "duration_sec": answer_sec}
        lines.append(json.dumps({"id": str(index), "split": "train", "turns": [user, says]}))
    (folder / "manifest.jsonl").write_text("\n".join(lines) + "\n")
    parts = PartsOptions(
        **save_tiny_parts(folder),
        encoder=ENCODER,
        head={"kind": "flow", "width": 32, "num_blocks": 1, "feedback_noise": 0.3},
        output_blocks={"num_layers": 1, "num_heads": 2},
        layout={"instructions": INSTRUCTIONS, "max_answer_tokens": 12},
        loss={"ctc_weight": 0.5, "text_ctc_weight": 0.5},
    )
    tasks = {"speech_to_speech": 0.4, "speech_to_text": 0.2, "text_to_speech": 0.2, "speak": 0.1, "transcribe": 0.1}
    return SpeechOptions(manifest=str(folder), parts=parts, tasks=tasks, batch_size=1, num_eval=0)


def read_log(folder: Path) -> list[dict[str, float]]:
    """The log without what a clock and the machine's memory say."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.endswith(("sec", "_gib"))} for line in lines]


def rows_of(batch: Streams) -> list[Streams]:
    """Single rows of a text-only batch."""
    assert batch.features_BCF is None
    names = [f.name for f in dataclasses.fields(Streams) if isinstance(getattr(batch, f.name), Tensor)]
    return [Streams(**{name: getattr(batch, name)[i : i + 1] for name in names}) for i in range(len(batch.text_BL))]


def same(first: Streams, second: Streams) -> bool:
    for field in dataclasses.fields(Streams):
        a, b = getattr(first, field.name), getattr(second, field.name)
        if (a is None) != (b is None):
            return False
        if a is not None and not torch.equal(a.nan_to_num(99.0), b.nan_to_num(99.0)):
            return False
    return True


# --------------------------------------------------------------------------------------------------------- learning


def test_one_batch_overfits() -> None:
    """Heard and typed questions are learned by heart: words, the moment to stop, and the speech tokens themselves."""
    model, processor = tiny_model(head={"kind": "flow", "width": 64, "num_blocks": 2, "condition_dropout": 0.0})
    rng = np.random.default_rng(0)
    wavs = [0.1 * rng.standard_normal(n).astype(np.float32) for n in (6_000, 9_000)]
    asks = [processor.turn("user", wav_S=wav_S) for wav_S in wavs] + [processor.turn("user", "say hello")]
    spoken = [torch.randn(n, 6, generator=torch.Generator().manual_seed(n)) for n in (2, 5, 3)]
    texts = ["the answer is three", "sorry", "hello"]
    says = [Turn("assistant", text, speech_LX=speech) for text, speech in zip(texts, spoken, strict=True)]
    batch = collate([processor.layout.example([a, s]) for a, s in zip(asks, says, strict=True)])
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.0), lr=6e-3)
    generator = torch.Generator().manual_seed(0)
    first: dict[str, float] = {}
    model.train()
    for _ in range(120):
        parts = model(batch, generator)  # the clips have no transcripts: CTC counts nothing
        losses = {k: v.sum / v.count for k, v in parts.items() if "/" not in k and v.count > 0}
        first = first or {k: float(v.detach()) for k, v in losses.items()}
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
    assert losses["text"] < 0.02 < first["text"] and losses["state"] < 0.05 < first["state"]
    assert losses["speech"] < 0.5 * first["speech"]
    omni = FlowOmni(model.eval(), processor)
    drawn: list[Tensor] = []
    sample = model.head.sample
    model.head.sample = lambda *args: drawn.append(sample(*args)) or drawn[-1]  # type: ignore[assignment, func-returns-value]
    questions = [Question(audio=(wav_S, 16_000)) for wav_S in wavs] + [Question(text="say hello")]
    for question, text, speech in zip(questions, texts, spoken, strict=True):
        drawn.clear()
        [answer] = omni.answers([question])
        assert answer.text == text
        assert answer.states.count("generating") == len(speech) and answer.states[-1] == "stop"
        error = (torch.cat(drawn) - speech).square().mean().sqrt()
        assert error < 0.5  # the tokens' own spread is 1


# ----------------------------------------------------------------------------------------- micro-batches, processes


def test_accumulated_micro_batches_are_one_large_batch(tmp_path: Path) -> None:
    """Of different lengths and numbers of targets: the gradient of the mean over all targets, not of means."""
    run = run_options(tmp_path, clip_norm=1e9)
    results = []
    for whole in (False, True):
        torch.manual_seed(0)
        stage = TextStage(text_options(), 0)
        stage.module.double()
        accelerator = Accelerator()
        optimizer = torch.optim.SGD(stage.module.parameters(), lr=1.0)
        module, optimizer = accelerator.prepare(stage.module, optimizer)
        values = []
        for step in range(3):
            batches = [stage.batch(3 * step + i, 0, 1) for i in range(3)]
            if whole:
                batches = [collate([row for batch in batches for row in rows_of(batch)])]
            else:
                assert len({tuple(stage.counts(batch).items()) for batch in batches}) > 1
            values.append(optimize(stage, module, optimizer, batches, accelerator, run, step))
        results.append((values, stage.module.state_dict()))
    (apart, apart_state), (together, together_state) = results
    for a, b in zip(apart, together, strict=True):
        assert a == pytest.approx(b, rel=1e-6)  # the loss itself is taken in float32
    for name, value in apart_state.items():
        torch.testing.assert_close(value, together_state[name], rtol=0, atol=1e-6)


def test_gradient_checkpointing_changes_no_gradient(speech_options: SpeechOptions) -> None:
    """In the language model, the encoder and the output blocks; layers are computed twice, and only in training."""
    calls: list[str] = []
    gradients = []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        stage = SpeechStage(dataclasses.replace(speech_options, tasks={"speech_to_speech": 1.0}), 0)
        if checkpointed:
            checkpoint_layers(stage.module)
        for part in (stage.model.llm, stage.model.encoder, stage.model.output_blocks):
            layer = next(m for m in part.modules() if isinstance(m, GradientCheckpointingLayer))
            inner = next(iter(layer.children()))
            inner.register_forward_hook(lambda module, _, __: calls.append(type(module).__name__))
        calls.clear()
        losses = stage.module.train()(stage.batch(0, 0, 1), torch.Generator().manual_seed(0))
        sum(loss.sum for name, loss in losses.items() if "/" not in name).backward()
        assert len(calls) == (6 if checkpointed else 3), calls
        gradients.append({name: p.grad for name, p in stage.module.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, value in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], value)
    with pytest.raises(ValueError, match="this stage has no transformer layers: turn it off"):
        checkpoint_layers(nn.Linear(2, 2))


def test_batches_depend_on_their_place_alone(speech_options: SpeechOptions) -> None:
    """Not on what was asked for before, nor on which process asks."""
    makers: list[Callable[[], Stage]] = [
        lambda: TextStage(text_options(), 5),
        lambda: SpeechStage(dataclasses.replace(speech_options, batch_size=2), 5),
    ]
    for make in makers:
        stage = make()
        wanted = [stage.batch(index, 0, 1) for index in range(8)]
        other = make()
        for place in (7, 2, 2, 5, 0):
            assert same(other.batch(place // 2, place % 2, 2), wanted[place])
        assert not same(wanted[0], wanted[1])


def test_an_epoch_holds_every_conversation_once(speech_options: SpeechOptions) -> None:
    stage = SpeechStage(dataclasses.replace(speech_options, tasks={"text_to_text": 1.0}, batch_size=2), 0)
    for epoch in range(2):
        rows = [row for index in range(3) for row in rows_of(stage.batch(3 * epoch + index, 0, 1))]
        tokenizer = stage.processor.text_tokenizer
        said = [tokenizer.decode(row.text_BL[0][row.text_loss_BL[0]], skip_special_tokens=True) for row in rows]
        assert sorted(said) == sorted(ANSWERS)


def in_families(options: SpeechOptions, shares: dict[str, float]) -> SpeechOptions:
    """The first conversation is of family "rare", the others of "common"."""
    manifest = Path(options.manifest) / "manifest.jsonl"
    lines = [json.loads(line) for line in manifest.read_text().splitlines()]
    for index, line in enumerate(lines):
        line["family"] = "common" if index else "rare"
    manifest.write_text("\n".join(json.dumps(line) for line in lines))
    return dataclasses.replace(options, families=shares, tasks={"text_to_text": 1.0}, batch_size=2)


def test_families_take_their_shares(speech_options: SpeechOptions) -> None:
    stage = SpeechStage(in_families(speech_options, {"rare": 1.0, "common": 1.0}), 0)
    for epoch in range(2):
        names = [name for index in range(3) for name in stage.names(3 * epoch + index, 0, 1)]
        assert names.count("0") == 3
        assert len(set(names)) == 4, "the others are drawn without repeating one before all had their turn"


def test_bad_families(speech_options: SpeechOptions) -> None:
    with pytest.raises(ValueError, match=r"options.families has \['rara'\]; .* trains on common, rare"):
        SpeechStage(in_families(speech_options, {"rara": 1.0}), 0)
    with pytest.raises(ValueError, match="shares are not negative"):
        dataclasses.replace(speech_options, families={"rare": 0.0})


def test_a_loaded_model_gets_another_loss_and_keeps_its_weights(speech_options: SpeechOptions, tmp_path: Path) -> None:
    parts = dataclasses.replace(speech_options.parts, loss={"ctc_weight": 0.5})  # type: ignore[type-var]
    first = SpeechStage(dataclasses.replace(speech_options, parts=parts), 0)
    first.save(tmp_path / "model")
    loaded = dataclasses.replace(speech_options, parts=None, model=str(tmp_path / "model"))
    second = SpeechStage(dataclasses.replace(loaded, loss={"ctc_weight": 0.0, "text_ctc_weight": 0.3}), 0)
    old, new = first.model.state_dict(), second.model.state_dict()
    assert {name.split(".")[0] for name in old.keys() ^ new.keys()} == {"ctc", "text_ctc"}
    assert all(torch.equal(old[name], new[name]) for name in old.keys() & new.keys())
    assert second.weights["text_ctc"] == 0.3


# ---------------------------------------------------------------------------------------------------------- resuming


def check_resume(run: Callable[[str], RunOptions], options: Any, stage_class: type[Stage], cut_at: int) -> None:
    """The run that was cut off and went on is the run that never stopped, bit for bit."""
    straight = train(run("straight"), options, stage_class)
    with pytest.raises(PowerCut):
        train(run("cut"), options, cut_off(stage_class, cut_at))
    log = Path(run("cut").output_dir) / "log.jsonl"
    before = log.read_text()
    log.write_text(before + '{"step": 99, "loss')  # as a killed process leaves it
    resumed = train(run("cut"), options, stage_class)
    assert log.read_text().splitlines()[:2] == before.splitlines()[:2]  # it did go on, and not from the beginning
    assert read_log(resumed.parent) == read_log(straight.parent)
    wanted, found = (load_file(folder / "model.safetensors") for folder in (straight, resumed))
    assert wanted.keys() == found.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert train(run("cut"), options, cut_off(stage_class, 0)) == resumed  # finished: nothing more to do


def test_a_resumed_text_run_is_the_run_that_never_stopped(tmp_path: Path) -> None:
    check_resume(lambda name: run_options(tmp_path / name), text_options(), TextStage, cut_at=4)


@pytest.mark.parametrize("llm", ["full", "lora"])
def test_a_resumed_speech_run_is_the_run_that_never_stopped(
    speech_options: SpeechOptions, tmp_path: Path, llm: Any
) -> None:
    options = dataclasses.replace(speech_options, trains=TrainsOptions(llm=llm))

    def run(name: str) -> RunOptions:
        return run_options(tmp_path / name, stage="speech", max_steps=4, save_every=2, accumulation=2)

    check_resume(run, options, SpeechStage, cut_at=6)
    model, _ = load_model(tmp_path / "cut" / "final")  # adapters are merged: it is a plain model again
    assert not any("lora" in name for name in model.state_dict())


def test_a_resumed_distillation_of_guidance_is_the_run_that_never_stopped(
    speech_options: SpeechOptions, tmp_path: Path
) -> None:
    """The teacher is in no checkpoint: it is the model that the run starts from, read again."""
    save_model(*tiny_model(head={"kind": "flow", "width": 32, "num_blocks": 1, "feedback_noise": 0.3}), tmp_path / "m")
    options = dataclasses.replace(speech_options, parts=None, model=str(tmp_path / "m"), distill_guidance=2.0)

    def run(name: str) -> RunOptions:
        return run_options(tmp_path / name, stage="speech", max_steps=4, save_every=2, accumulation=2)

    check_resume(run, options, SpeechStage, cut_at=6)
    (weights,) = (tmp_path / "cut/checkpoints/step_00000004").glob("model*.safetensors")
    assert all(name.startswith("student.") for name in load_file(weights))


def test_another_configuration_does_not_go_on(tmp_path: Path) -> None:
    train(run_options(tmp_path, max_steps=2), text_options(), TextStage)
    changed = run_options(tmp_path, max_steps=2, learning_rate=0.5, log_every=7)
    with pytest.raises(ValueError, match="another configuration") as error:
        train(changed, text_options(batch_size=2), TextStage)
    message = str(error.value)
    assert "learning_rate: 0.001 then, 0.5 now" in message and "options.batch_size: 3 then, 2 now" in message
    assert "log_every" not in message and "use its configuration, or another output_dir" in message


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    """With the step, the micro-batch and the remedy; earlier checkpoints stay."""
    run = run_options(tmp_path, learning_rate=1e30, clip_norm=1e30, save_every=1, warmup_steps=0)
    with pytest.raises(FloatingPointError, match=r"not finite at step \d, micro-batch 0 .*lower learning_rate"):
        train(run, text_options(), TextStage)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()][:1] == ["step_00000001"]
    assert not (tmp_path / "final").exists()


# ------------------------------------------------------------------------------------------- checkpoints and averages


class Fragile:
    """Something to be checkpointed that can fail like a full disk."""

    fails = False

    def state_dict(self) -> dict[str, int]:
        if self.fails:
            raise OSError("No space left on device")
        return {}

    def load_state_dict(self, state: dict[str, int]) -> None:
        pass


def checkpoints(folder: Path, **fingerprint: Any) -> tuple[Checkpoints, nn.Linear, Fragile]:
    accelerator = Accelerator()
    module, fragile = nn.Linear(2, 2), Fragile()
    accelerator.prepare(module)
    accelerator.register_for_checkpointing(fragile)
    return Checkpoints(folder, accelerator, fingerprint, keep=2), module, fragile


def test_a_failed_save_leaves_the_earlier_checkpoints(tmp_path: Path) -> None:
    saver, module, fragile = checkpoints(tmp_path)
    weight = module.weight.detach().clone()
    saver.save(1)
    fragile.fails = True
    with pytest.raises(OSError, match="No space left"):
        saver.save(2)
    assert [p.name for p in tmp_path.iterdir()] == ["step_00000001"]
    again, module, _ = checkpoints(tmp_path)
    assert not torch.equal(module.weight, weight)
    assert again.resume() == 1 and torch.equal(module.weight, weight)


def test_only_whole_checkpoints_count_and_the_newest_stay(tmp_path: Path) -> None:
    saver, _, _ = checkpoints(tmp_path)
    assert saver.resume() == 0
    for step in (1, 2, 30):
        saver.save(step)
    assert [p.name for p in saver.complete()] == ["step_00000002", "step_00000030"]
    (tmp_path / "step_00000030").rename(tmp_path / "step_00000030.partial")  # killed before the last move
    (tmp_path / "step_00000040").mkdir()
    with pytest.warns(UserWarning, match="step_00000040 is damaged"):
        assert saver.resume() == 2


def test_a_checkpoint_of_another_configuration_is_refused(tmp_path: Path) -> None:
    checkpoints(tmp_path, width=3, names=["a"])[0].save(1)
    assert checkpoints(tmp_path, names=("a",), width=3)[0].resume() == 1
    with pytest.raises(ValueError, match="depth: None then, 1 now; width: 3 then, 4 now"):
        checkpoints(tmp_path, width=4, names=["a"], depth=1)[0].resume()


def test_averages_are_applied_and_taken_back(tmp_path: Path) -> None:
    module = nn.Linear(3, 2)
    module.bias.requires_grad_(False)
    ema, start = Ema(module, 0.5), module.weight.detach().clone()
    for _ in range(3):
        with torch.no_grad():
            module.weight += 1.0
        ema.update()
    trained = module.weight.detach().clone()
    average = start
    for update in range(1, 4):
        average = average + (1 - min(0.5, (1 + update) / (10 + update))) * (start + update - average)
    with pytest.raises(PowerCut), ema.applied():
        torch.testing.assert_close(module.weight.detach(), average)
        raise PowerCut
    assert torch.equal(module.weight, trained)
    other = Ema(nn.Linear(3, 2).requires_grad_(True), 0.5)
    torch.save(ema.state_dict() | {"averages": {**ema.averages, "bias": torch.ones(2)}}, tmp_path / "ema.pt")
    other.load_state_dict(torch.load(tmp_path / "ema.pt"))
    assert torch.equal(other.averages["weight"], ema.averages["weight"]) and other.num_updates == 3


def test_no_averaging_is_the_last_weight() -> None:
    module = nn.Linear(3, 2)
    ema = Ema(module, 0.0)
    with torch.no_grad():
        module.weight += torch.randn(2, 3)
    ema.update()
    assert torch.equal(ema.averages["weight"], module.weight)


# ------------------------------------------------------------------------------------------------------- small print


def test_the_learning_rate_warms_up_and_falls(tmp_path: Path) -> None:
    run = run_options(tmp_path, max_steps=20, warmup_steps=4, learning_rate=1e-2, min_learning_rate=1e-3)
    factors = [learning_rate_factor(step, run) for step in range(21)]
    assert factors[:4] == [0.25, 0.5, 0.75, 1.0] and factors[4] == 1.0
    assert factors[4:] == sorted(factors[4:], reverse=True) and factors[20] == pytest.approx(0.1)


def test_what_trains_is_what_was_asked_for(speech_options: SpeechOptions) -> None:
    frozen = TrainsOptions(llm="frozen", encoder="frozen", projector="full", voice="frozen")
    stage = SpeechStage(dataclasses.replace(speech_options, trains=frozen), 0)
    trained = {name.split(".")[0] for name, p in stage.module.named_parameters() if p.requires_grad}
    assert trained == {"projector", "ctc", "text_ctc"}
    nothing = dataclasses.replace(frozen, projector="frozen")
    stage = SpeechStage(dataclasses.replace(speech_options, trains=nothing), 0)
    with pytest.raises(ValueError, match="nothing is trainable"):
        parameter_groups(stage.module, 0.0)


def test_bad_options(speech_options: SpeechOptions, tmp_path: Path) -> None:
    for changes, message in [
        ({"max_steps": 0}, "max_steps is 0"),
        ({"accumulation": 0}, "accumulation is 0"),
        ({"keep_checkpoints": 0}, "keep_checkpoints is 0"),
        ({"ema_decay": 1.0}, "ema_decay is 1.0"),
    ]:
        with pytest.raises(ValueError, match=message):
            run_options(tmp_path, **changes)
    for changes, message in [
        ({"model": "somewhere"}, "exactly one of model .* and parts"),
        ({"tasks": {"sing": 1.0}}, "sing.*known tasks: speech_to_speech"),
        ({"head": {"objective": "lsd"}}, r"set parts\.head"),
    ]:
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(speech_options, **changes)
    with pytest.raises(ValueError, match="max_example_sec 0.1 leaves no conversation"):
        SpeechStage(dataclasses.replace(speech_options, max_example_sec=0.1), 0)
