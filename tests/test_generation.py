"""Laws of generation: stream = offline, batch row = row alone, interleaved = apart, and what the public calls promise.

Shapes: B batch, L positions, S samples, H hidden width, D latent dimension.
"""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from flowomni.api import Event, FlowOmni, Question
from flowomni.generation import GenerationOptions, Step, generate
from flowomni.layouts import Turn
from flowomni.streams import NONE, SpeechState, Streams
from tests.tiny import lively_model

RATE = 16_000
ALWAYS, NEVER = 1e-9, 1 - 1e-9  # stop thresholds


@pytest.fixture(scope="module")
def omni() -> FlowOmni:
    """A model whose random weights say several words and stop now and then, in speech and in text."""
    return FlowOmni(*lively_model())


def wav(sec: float, seed: int) -> tuple[np.ndarray, int]:
    return 0.1 * np.random.default_rng(seed).standard_normal(int(sec * RATE)).astype(np.float32), RATE


@pytest.fixture(scope="module")
def questions() -> list[Question]:
    """Heard and typed prompts of different lengths."""
    return [
        Question(audio=wav(0.5, 0)),
        Question(text="what is one plus two"),
        Question(audio=wav(1.7, 1)),
        Question(text="apple banana", task="speak"),
        Question(audio=wav(0.2, 2), task="transcribe"),
        Question(text="say hello"),
    ]


def prompts(omni: FlowOmni, questions: list[Question]) -> list[Streams]:
    turns = [
        omni.processor.turn("user", text=q.text) if q.audio is None else omni.processor.turn("user", wav_S=q.audio[0])
        for q in questions
    ]
    return [omni.processor.prompt([turn], q.task) for turn, q in zip(turns, questions, strict=True)]


def run(omni: FlowOmni, rows: list[Streams], seeds: list[int], **options: Any) -> list[Step]:
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return list(generate(omni.model, omni.processor, rows, GenerationOptions(**options), generators))


def joined(steps: list[Step], row: int) -> tuple[str, list[SpeechState], Tensor]:
    """A row's whole text, states and sound."""
    states = [step.states[row] for step in steps]
    return (
        "".join(step.texts[row] for step in steps),
        [state for state in states if state is not None],
        torch.cat([step.wavs[row] for step in steps]),
    )


# ------------------------------------------------------------------------------------------------ stream = offline


@pytest.mark.parametrize("index", range(6))
@pytest.mark.parametrize("speak", [True, False])
def test_the_stream_is_the_answer(omni: FlowOmni, questions: list[Question], index: int, speak: bool) -> None:
    """Concatenated events are the answer, sample for sample."""
    events = list(omni.stream(questions[index], speak=speak, seed=3))
    [answer] = omni.answers([questions[index]], speak=speak, seed=3)
    assert "".join(event.text for event in events).strip() == answer.text
    assert np.array_equal(np.concatenate([event.wav_S for event in events]), answer.wav_S)
    assert answer.wav_S.dtype == np.float32 and answer.answer_sec == len(answer.wav_S) / 24_000
    if speak:
        assert [event.state for event in events if event.state] == [state for state in answer.states if state]
        assert answer.states.count("generating") * 2048 == len(answer.wav_S) > 0
    else:
        assert not len(answer.wav_S) and answer.first_audio_ms is None and answer.realtime_factor is None


def test_the_sound_is_what_the_tokenizer_makes_of_the_drawn_tokens(
    omni: FlowOmni, questions: list[Question], monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Tensor] = []
    true_sample = omni.model.head.sample

    def record(*args: Any) -> Tensor:
        drawn.append(true_sample(*args))
        return drawn[-1]

    monkeypatch.setattr(omni.model.head, "sample", record)
    answer = omni.answers(questions[:1], seed=5)[0]
    with torch.no_grad():
        wav_1S = omni.model.speech_tokenizer.decode(torch.stack(drawn, dim=1))
    np.testing.assert_allclose(answer.wav_S, wav_1S[0].numpy(), rtol=0, atol=1e-5)


def test_sound_comes_while_the_answer_grows(omni: FlowOmni, questions: list[Question]) -> None:
    """A step brings one token's samples as soon as the look-ahead allows; the last brings what was held back."""
    events = list(omni.stream(questions[0], stop_threshold=NEVER))
    spec = omni.model.speech_tokenizer.spec
    sizes = [len(event.wav_S) for event in events if event.state == "generating"]
    assert sizes[0] == spec.samples_per_token - spec.lookahead_samples and len(sizes) == 14
    assert set(sizes[1:-1]) == {spec.samples_per_token}
    assert sizes[-1] == spec.samples_per_token + spec.lookahead_samples


def test_states_follow_the_layout(omni: FlowOmni, questions: list[Question]) -> None:
    """pad, start, generating ..., and stop unless the limit cuts the answer off."""
    for question in questions:
        states = [event.state for event in omni.stream(question) if event.state]
        number = states.count("generating")
        limit = omni.processor.layout.config.max_answer_tokens
        end = ["stop"] if 2 + number < limit else []
        assert states == ["pad", "start", *["generating"] * number, *end] and number >= 1


@pytest.mark.parametrize("max_steps", [1, 2, 3, 5])
def test_the_limit_cuts_off_but_plays_what_was_drawn(omni: FlowOmni, questions: list[Question], max_steps: int) -> None:
    steps = run(omni, prompts(omni, questions[:2]), [0, 0], max_steps=max_steps, stop_threshold=NEVER)
    assert len(steps) == max_steps
    for row in range(2):
        _, states, wav_S = joined(steps, row)
        assert len(wav_S) == states.count(SpeechState.GENERATING) * 2048 == max(0, max_steps - 2) * 2048


def test_the_stop_threshold_decides(omni: FlowOmni, questions: list[Question]) -> None:
    eager = omni.answer(text="say hello", stop_threshold=ALWAYS)
    assert eager.states[:4] == ["pad", "start", "generating", "stop"]
    patient = omni.answer(text="say hello", stop_threshold=NEVER)
    assert patient.states.count("generating") == omni.processor.layout.config.max_answer_tokens - 2


# ---------------------------------------------------------------------------------------------- batch row = row alone


@pytest.mark.parametrize("options", [{}, {"text_temperature": 1.0}, {"speak": False, "text_temperature": 1.0}])
def test_a_batch_row_is_that_row_alone(omni: FlowOmni, questions: list[Question], options: dict[str, Any]) -> None:
    """Heard and typed prompts, other lengths, other ends; each row with its own generator."""
    rows = prompts(omni, questions)
    seeds = [7, 8, 9, 10, 11, 12]
    together = run(omni, rows, seeds, **options)
    ends = set()
    for index, row in enumerate(rows):
        alone = run(omni, [row], seeds[index : index + 1], **options)
        text, states, wav_S = joined(alone, 0)
        batch_text, batch_states, batch_wav_S = joined(together, index)
        assert (batch_text, batch_states) == (text, states)
        torch.testing.assert_close(batch_wav_S, wav_S, rtol=0, atol=1e-4)
        ends.add((len(alone), len(states)))
        if together[-1].done[index]:
            assert [step.done[index] for step in together].index(True) == len(alone) - 1
    assert len(ends) > 1  # or the test would not see what it is for


def test_answers_do_not_depend_on_the_batch_size(omni: FlowOmni, questions: list[Question]) -> None:
    alone = omni.answers(questions, batch_size=1)
    for batch_size in (4, 8):
        for single, batched in zip(alone, omni.answers(questions, batch_size=batch_size), strict=True):
            assert (batched.text, batched.states, batched.heard_sec) == (single.text, single.states, single.heard_sec)
            np.testing.assert_allclose(batched.wav_S, single.wav_S, rtol=0, atol=1e-4)
    assert omni.answers([]) == []


def test_the_seed_decides(omni: FlowOmni) -> None:
    first, again, other = (omni.answer(text="say hello", seed=seed).wav_S for seed in (1, 1, 2))
    assert np.array_equal(first, again) and not np.array_equal(first[: len(other)], other[: len(first)])
    quiet = [omni.answer(text="say hello", seed=seed, sampling={"temperature": 0.0}).wav_S for seed in (1, 2)]
    assert np.array_equal(*quiet)


# --------------------------------------------------------------------------------------------------- state is a value


def test_two_generations_at_once_are_the_two_apart(omni: FlowOmni, questions: list[Question]) -> None:
    """One model, two streams, step by step in turn."""
    first, second = (list(omni.stream(question, seed=i)) for i, question in enumerate(questions[:2]))
    streams = [omni.stream(question, seed=i) for i, question in enumerate(questions[:2])]
    found: list[list[Event]] = [[], []]
    for index in [0, 1, 1, 0, 0, 0, 1, 0, 1, 1] * 8:
        event = next(streams[index], None)
        if event is not None:
            found[index].append(event)
    for events, wanted in zip(found, (first, second), strict=True):
        assert [(e.text, e.state) for e in events] == [(e.text, e.state) for e in wanted]
        assert all(np.array_equal(a.wav_S, b.wav_S) for a, b in zip(events, wanted, strict=True))


def test_model_and_voice_go_on_from_a_saved_state(omni: FlowOmni, tmp_path: Path) -> None:
    """Five steps of speech in one go, or with the states copied or written to disk and read back after two."""
    model = omni.model
    generator = torch.Generator().manual_seed(0)
    steps = torch.randn(5, 1, 1, 32, generator=generator)
    one_BL = torch.ones(1, 1, dtype=torch.bool)
    sampling = model.head.default_sampling()

    def go_on(states: tuple[Any, Any], numbers: range) -> tuple[Tensor, tuple[Any, Any]]:
        model_state, voice = states
        wavs = []
        for number in numbers:
            _, speech_BH, model_state = model.advance(steps[number], one_BL, model_state)
            token_BX = model.head.sample(speech_BH, sampling, torch.Generator().manual_seed(number))
            wav_BS, voice = model.speech_tokenizer.step(token_BX.unsqueeze(1), voice)
            wavs.append(wav_BS)
        return torch.cat([*wavs, model.speech_tokenizer.flush(voice)], dim=1), (model_state, voice)

    with torch.no_grad():
        start = model.init_state(1), model.speech_tokenizer.init_state(1)
        wanted, _ = go_on(start, range(5))
        _, half = go_on(start, range(2))
        torch.save(half, tmp_path / "states.pt")
        for states in (half, copy.deepcopy(half), torch.load(tmp_path / "states.pt", weights_only=False), half):
            rest, _ = go_on(states, range(2, 5))
            assert torch.equal(rest, wanted[:, -rest.shape[1] :]) and rest.shape[1] > 3 * 2048


# ----------------------------------------------------------------------------------------- equal to what is wrapped


def test_a_text_answer_is_that_of_the_plain_language_model(omni: FlowOmni) -> None:
    """Greedy generation of transformers on the same prompt gives the same words."""
    llm, processor = omni.model.llm, omni.processor
    limit = processor.layout.config.max_answer_tokens
    answers = []
    for text in ("what is one", "apple", "one two three plus", "say hello"):
        prompt = processor.prompt([processor.turn("user", text=text)])
        with torch.no_grad():
            ids_BL = llm.generate(
                input_ids=prompt.text_BL, do_sample=False, max_new_tokens=limit, eos_token_id=processor.text_eos_id
            )
        wanted = processor.text_tokenizer.decode(ids_BL[0, prompt.text_BL.shape[1] :], skip_special_tokens=True)
        answers.append(omni.answer(text=text, speak=False).text)
        assert answers[-1] == wanted.strip()
    assert len(set(answers)) > 1


def test_generation_reads_what_training_shows(omni: FlowOmni, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is fed back step by step is, stream by stream, the training example of that answer."""
    read: list[Streams] = []
    embed = omni.model.embed

    def record(streams: Streams, heard_NH: Tensor | None = None) -> Tensor:
        read.append(streams)
        return embed(streams, heard_NH)

    monkeypatch.setattr(omni.model, "embed", record)
    asks = omni.processor.turn("user", wav_S=wav(0.5, 0)[0])
    for seed in range(50):  # until one ends by itself, after some words
        read.clear()
        steps = run(omni, [omni.processor.prompt([asks])], [seed], text_temperature=1.0, stop_threshold=0.1)
        if steps[-1].done[0] and len(steps) > 3:
            break
    assert steps[-1].done[0]
    text_BL, state_BL, speech_BLX = (
        torch.cat([getattr(s, name) for s in read], dim=1) for name in ("text_BL", "state_BL", "speech_BLX")
    )
    generating_BL = state_BL == SpeechState.GENERATING
    eos, answer_BL = omni.processor.text_eos_id, text_BL[:, read[0].text_BL.shape[1] :]
    num_words = int(((answer_BL != NONE) & (answer_BL != eos)).sum())
    says = Turn("assistant", " one" * num_words, speech_LX=speech_BLX[generating_BL])
    example = omni.processor.layout.example([asks, says])
    length = text_BL.shape[1]
    assert length == example.text_BL.shape[1] - 1  # nothing comes after the last step, so it is not read
    for found, wanted in ((text_BL != NONE, example.text_BL != NONE), (state_BL, example.state_BL)):
        assert torch.equal(found, wanted[:, :length])
    assert torch.equal(text_BL == eos, (example.text_BL == eos)[:, :length])
    assert torch.equal(speech_BLX[generating_BL], example.speech_BLX[example.generating_BL])


# -------------------------------------------------------------------------------------------------------- the calls


def test_calls_are_tasks(omni: FlowOmni) -> None:
    said, asked = omni.say("hello", seed=4), omni.answers([Question(text="hello", task="speak")], seed=4)[0]
    assert said.text == asked.text and np.array_equal(said.wav_S, asked.wav_S)
    clip = wav(0.4, 0)
    assert omni.transcribe(clip) == omni.answers([Question(clip, task="transcribe")], speak=False)[0].text
    assert omni.answer(clip).heard_sec == pytest.approx(0.4)
    assert omni.answer(clip).text == omni.answers([Question(clip)])[0].text


def test_generation_leaves_no_trace(omni: FlowOmni) -> None:
    """No gradient, no change of weights, of the global random state or of the training mode."""
    before = {name: value.clone() for name, value in omni.model.state_dict().items()}
    state = torch.get_rng_state()
    omni.answer(text="say hello")
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(value, before[name]) for name, value in omni.model.state_dict().items())
    assert all(p.grad is None for p in omni.model.parameters()) and not omni.model.training


def test_bad_questions_and_options(omni: FlowOmni) -> None:
    for bad in ({}, {"audio": wav(0.2, 0), "text": "hello"}):
        with pytest.raises(ValueError, match="exactly one"):
            Question(**bad)
    with pytest.raises(ValueError, match="the text is empty"):
        omni.answer(text="  ")
    with pytest.raises(ValueError, match="task is 'anwser'; did you mean 'answer'"):
        omni.answers([Question(text="hello", task="anwser")])
    with pytest.raises(ValueError, match="temprature.*did you mean 'temperature'"):
        omni.answer(text="hello", sampling={"temprature": 1.0})
    with pytest.raises(ValueError, match="num_steps is 0"):
        omni.answer(text="hello", sampling={"num_steps": 0})
    for options, message in [
        ({"text_temperature": -1.0}, "text_temperature is -1.0"),
        ({"stop_threshold": 1.0}, "stop_threshold is 1.0"),
        ({"max_steps": 0}, "max_steps is 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            GenerationOptions(**options)


def test_audio_longer_than_the_window_is_cut_with_a_warning(omni: FlowOmni) -> None:
    with pytest.warns(UserWarning, match="last 1.0 s are cut off"):
        answer = omni.answer(wav(6.0, 0))
    assert answer.heard_sec == pytest.approx(5.0)


def test_options_are_values() -> None:
    assert dataclasses.replace(GenerationOptions(), speak=False) == GenerationOptions(speak=False)
