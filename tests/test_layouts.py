"""Layouts: what a conversation looks like as streams, and which of its positions are targets."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from flowomni.configuration import LayoutConfig
from flowomni.encoder import num_heard_positions
from flowomni.layouts import Turn, TurnLayout
from flowomni.streams import NONE, SpeechState, Streams, collate
from tests.tiny import INSTRUCTIONS, WORDS
from training.text_tokenizer import build_text_tokenizer

STACK, DIM, MELS = 4, 3, 80
PAD, START, GEN, STOP = SpeechState.PAD, SpeechState.START, SpeechState.GENERATING, SpeechState.STOP


def layout(template: str | None = "keep", fill: torch.Tensor | None = None, **config: Any) -> TurnLayout:
    tokenizer = build_text_tokenizer([*WORDS, "user", "assistant"])
    if template != "keep":
        tokenizer.chat_template = template
    values = {"instructions": INSTRUCTIONS} | config
    fill = torch.full((DIM,), float("nan")) if fill is None else fill
    return TurnLayout(LayoutConfig(**values), tokenizer, tokenizer.eos_token_id, STACK, fill)


def speech(length: int, first: float = 0.0) -> torch.Tensor:
    """Tokens [L, D] whose numbers tell which is which."""
    return first + torch.arange(length * DIM, dtype=torch.float32).reshape(length, DIM)


def features(num_frames: int) -> torch.Tensor:
    return torch.randn(MELS, num_frames, generator=torch.Generator().manual_seed(num_frames))


def words(made: TurnLayout, streams: Streams) -> str:
    """Text stream in words: "." where it is silent, "<heard>" at heard positions."""
    names = made.text_tokenizer.convert_ids_to_tokens(streams.text_BL[0].clamp(min=0).tolist())
    silent = ["<heard>" if heard else "." for heard in streams.heard_BL[0]]
    rows = zip(names, streams.text_BL[0], silent, strict=True)
    return " ".join(name if token != NONE else none for name, token, none in rows)


def answer_part(streams: Streams) -> dict[str, list[Any]]:
    """The positions from the first text target on, field by field."""
    first = int(streams.text_loss_BL[0].nonzero()[0])
    fields = ("text_BL", "state_BL", "speech_BLX", "text_loss_BL", "state_loss_BL", "speech_loss_BL")
    return {name: getattr(streams, name)[0, first:].tolist() for name in fields}


# ------------------------------------------------------------------------------------------------------- the answer


def test_the_table_of_the_docstring() -> None:
    """Text y0 y1 y2 eos; speech x0..x3 after a delay of 2; stop ends it; what is a target."""
    made = layout()
    example = made.example([Turn("user", text="what"), Turn("assistant", text="one two three", speech_LX=speech(4))])
    assert words(made, example) == "<|user|> what <|end|> <|assistant|> one two three <|end|> . . ."
    part = answer_part(example)
    assert part["state_BL"] == [PAD, START, GEN, GEN, GEN, GEN, STOP]
    assert part["text_loss_BL"] == [True] * 4 + [False] * 3
    assert part["state_loss_BL"] == [False] * 2 + [True] * 5
    assert part["speech_loss_BL"] == [False] * 2 + [True] * 4 + [False]
    assert torch.equal(torch.tensor(part["speech_BLX"][2:6]), speech(4))
    assert torch.tensor(part["speech_BLX"])[[0, 1, 6]].isnan().all()
    assert not example.text_loss_BL[0, :4].any() and (example.state_BL[0, :4] == NONE).all()


@pytest.mark.parametrize("delay", [1, 2, 5])
@pytest.mark.parametrize(("num_words", "num_tokens"), [(1, 6), (4, 1), (4, 2), (3, 4)])
def test_text_and_speech_of_any_lengths(delay: int, num_words: int, num_tokens: int) -> None:
    """Every word and every speech token stands there once, in order, whichever stream is longer."""
    made = layout(speech_delay_tokens=delay)
    text = " ".join(["one", "two", "three", "four"][:num_words])
    example = made.example(
        [Turn("user", text="what"), Turn("assistant", text=text, speech_LX=speech(num_tokens))], "answer"
    )
    part = answer_part(example)
    assert len(part["text_BL"]) == max(num_words + 1, delay + num_tokens + 1)
    wanted = made.text_tokenizer.encode(text, add_special_tokens=False) + [made.text_eos_id]
    assert [token for token in part["text_BL"] if token != NONE] == wanted == part["text_BL"][: num_words + 1]
    states = [state for state in part["state_BL"] if state != NONE]
    assert states == [PAD] * (delay - 1) + [START] + [GEN] * num_tokens + [STOP] == part["state_BL"][: len(states)]
    assert torch.equal(example.speech_BLX[example.speech_loss_BL], speech(num_tokens))
    assert example.speech_BLX[~example.generating_BL].isnan().all()


@pytest.mark.parametrize("delay", [1, 2, 5])
def test_generation_forces_what_training_shows(delay: int) -> None:
    """`state_at` walks through the states of an example; it leaves only going on or stopping to the model."""
    made = layout(speech_delay_tokens=delay)
    example = made.example([Turn("user", text="what"), Turn("assistant", text="one", speech_LX=speech(3))])
    states = [SpeechState(state) for state in answer_part(example)["state_BL"]]
    previous = PAD
    for step, state in enumerate(states):
        forced = made.state_at(step, previous)
        assert forced == (state if step <= delay else None)
        previous = state


def test_a_text_answer_has_no_speech_stream() -> None:
    example = layout().example([Turn("user", text="what"), Turn("assistant", text="one two")])
    part = answer_part(example)
    assert part["text_loss_BL"] == [True] * 3
    assert set(part["state_BL"]) == {NONE} and not example.state_loss_BL.any()
    assert example.counts() == {"text": 3.0, "state": 0.0, "speech": 0.0, "ctc": 0.0, "text_ctc": 0.0}


# ------------------------------------------------------------------------------------------------------- the prompt


def test_an_example_begins_with_its_prompt() -> None:
    """What the model reads before it answers is the same in training and at generation, and no target."""
    made = layout()
    asks = Turn("user", text="what is", heard_CF=features(33))
    prompt = made.prompt([asks])
    example = made.example([asks, Turn("assistant", text="one", speech_LX=speech(2))])
    length = prompt.text_BL.shape[1]
    assert not prompt.text_loss_BL.any() and not prompt.state_loss_BL.any()
    for name in ("text_BL", "state_BL", "heard_BL", "mask_BL", "text_loss_BL", "state_loss_BL"):
        assert torch.equal(getattr(prompt, name), getattr(example, name)[:, :length])
    assert torch.equal(prompt.features_BCF, example.features_BCF)


@pytest.mark.parametrize("num_frames", [1, 7, 8, 9, 100])
def test_heard_positions_stand_where_the_words_would(num_frames: int) -> None:
    """One position per `stack` encoder frames; features, lengths and transcript go with them."""
    made = layout()
    prompt = made.prompt([Turn("user", text="what is", heard_CF=features(num_frames))])
    heard = " ".join(["<heard>"] * num_heard_positions(num_frames, STACK))
    assert words(made, prompt) == f"<|user|> {heard} <|end|> <|assistant|>"
    assert prompt.features_BCF.shape == (1, MELS, num_frames) and prompt.feature_lengths_B.tolist() == [num_frames]
    assert prompt.ctc_BT.tolist() == [list(b"what is")]
    assert prompt.heard_text_BU.tolist() == [made.text_tokenizer.encode("what is", add_special_tokens=False)]
    assert prompt.counts()["ctc"] == 1.0


def test_history_holds_several_turns_and_clips() -> None:
    """Earlier answers keep their speech, are no targets, and end with one end-of-turn token; clips stay in order."""
    made = layout()
    turns = [
        Turn("user", text="what", heard_CF=features(16)),
        Turn("assistant", text="one", speech_LX=speech(2)),
        Turn("user", text="plus two"),
        Turn("assistant", text="three"),
        Turn("user", heard_CF=features(9)),
        Turn("assistant", text="four", speech_LX=speech(1, first=100.0)),
    ]
    example = made.example(turns)
    assert words(made, example) == (
        "<|user|> <heard> <heard> <|end|> <|assistant|> one <|end|> . . . "
        "<|user|> plus two <|end|> <|assistant|> three <|end|> "
        "<|user|> <heard> <heard> <|end|> <|assistant|> four <|end|> . ."
    )
    assert example.features_BCF.shape == (2, MELS, 16) and example.feature_lengths_B.tolist() == [16, 9]
    assert torch.equal(example.features_BCF[1, :, :9], features(9))
    assert torch.equal(example.speech_BLX[example.generating_BL], torch.cat([speech(2), speech(1, first=100.0)]))
    assert example.counts() == {"text": 2.0, "state": 2.0, "speech": 1.0, "ctc": 1.0, "text_ctc": 1.0}


def test_without_a_chat_template_the_plain_one_serves() -> None:
    made = layout(template=None)
    turns = [Turn("user", text="what"), Turn("assistant", text="one"), Turn("user", text="two")]
    colon = "<|unknown|>"  # what this vocabulary makes of ":"
    wanted = f"user {colon} what assistant {colon} one <|end|> user {colon} two assistant {colon}"
    assert words(made, made.prompt(turns)) == wanted
    assert words(made, made.example([*turns, Turn("assistant", text="three")])) == f"{wanted} three <|end|>"


def test_the_task_is_a_system_turn() -> None:
    made = layout()
    speak = made.example([Turn("user", text="one"), Turn("assistant", text="one", speech_LX=speech(1))], "speak")
    assert words(made, speak).startswith("<|system|> speak <|end|> <|user|> one <|end|> <|assistant|> one")
    transcribe = made.prompt([Turn("user", heard_CF=features(8))], "transcribe")
    assert words(made, transcribe) == "<|system|> transcribe <|end|> <|user|> <heard> <|end|> <|assistant|>"


def test_silence_has_no_words() -> None:
    """A heard turn that says nothing, and a typed one without text: no transcript, nothing breaks."""
    made = layout()
    silent = made.prompt([Turn("user", text="", heard_CF=features(8))])
    assert silent.ctc_BT.shape == (1, 0) and silent.counts()["ctc"] == 0.0
    assert words(made, made.prompt([Turn("user", text="")])) == "<|user|> <|end|> <|assistant|>"
    both = collate([silent, made.prompt([Turn("user", text="one", heard_CF=features(8))])])
    assert bool((both.ctc_BT[0] == NONE).all()) and both.counts()["ctc"] == 1.0


def test_words_of_the_user_are_not_markup() -> None:
    """A typed turn that looks like a slot of another turn stays what it is."""
    made = layout()
    prompt = made.prompt([Turn("user", text="one"), Turn("assistant", text="two"), Turn("user", text="[[turn 0]]")])
    ids = made.text_tokenizer.encode("[[turn 0]]", add_special_tokens=False)
    assert prompt.text_BL[0, -2 - len(ids) : -2].tolist() == ids


# ---------------------------------------------------------------------------------------------------------- batches


def test_collate_pads_at_the_end_and_keeps_every_row() -> None:
    made = layout()
    rows = [
        made.example([Turn("user", text="what is", heard_CF=features(40)), Turn("assistant", text="one")]),
        made.example([Turn("user", text="two"), Turn("assistant", text="one two", speech_LX=speech(3))]),
        made.example([Turn("user", heard_CF=features(10)), Turn("assistant", text="one", speech_LX=speech(9))]),
    ]
    batch = collate(rows)
    for index, row in enumerate(rows):
        length = row.text_BL.shape[1]
        for name in ("text_BL", "state_BL", "heard_BL", "mask_BL", "text_loss_BL", "state_loss_BL"):
            assert torch.equal(getattr(batch, name)[index, :length], getattr(row, name)[0])
        assert torch.equal(batch.speech_BLX[index, :length].nan_to_num(9e9), row.speech_BLX[0].nan_to_num(9e9))
        assert not batch.mask_BL[index, length:].any() and (batch.text_BL[index, length:] == NONE).all()
        assert (batch.state_BL[index, length:] == NONE).all() and batch.speech_BLX[index, length:].isnan().all()
    assert batch.feature_lengths_B.tolist() == [40, 10]
    assert torch.equal(batch.features_BCF[1, :, :10], features(10))
    summed = {part: sum(row.counts()[part] for row in rows) for part in rows[0].counts()}
    assert batch.counts() == summed
    assert collate(rows, length=64).counts() == summed


def test_speech_tokens_may_be_codes() -> None:
    """Streams do not care what a speech token is: integers are filled with NONE where latents have NaN."""
    made = layout(fill=torch.full((2,), NONE))
    codes = torch.tensor([[1, 2], [3, 4]])
    example = made.example([Turn("user", text="what"), Turn("assistant", text="one", speech_LX=codes)])
    batch = collate([example, made.example([Turn("user", text="what"), Turn("assistant", text="one two three")])], 30)
    assert torch.equal(batch.speech_BLX[batch.generating_BL], codes)
    assert (batch.speech_BLX[~batch.generating_BL] == NONE).all()


def test_streams_move_as_a_whole() -> None:
    prompt = layout().prompt([Turn("user", text="one", heard_CF=features(8))])
    moved = prompt.to("meta")
    for field in dataclasses.fields(Streams):
        assert getattr(moved, field.name).device.type == "meta"


# -------------------------------------------------------------------------------------------------------- bad input


def test_bad_turns_and_conversations() -> None:
    made = layout()
    user, assistant = Turn("user", text="one"), Turn("assistant", text="two")
    with pytest.raises(ValueError, match="role is 'system'"):
        Turn("system", text="one")
    with pytest.raises(ValueError, match="user turn needs text or heard audio"):
        Turn("user")
    with pytest.raises(ValueError, match="assistant turn needs text"):
        Turn("assistant", heard_CF=features(8))
    for turns in ([], [user, assistant]):
        with pytest.raises(ValueError, match="must end with a user turn"):
            made.prompt(turns)
    for turns in ([], [user]):
        with pytest.raises(ValueError, match="must end with an assistant turn"):
            made.example(turns)
    with pytest.raises(ValueError, match="task is 'speek'; did you mean 'speak'.*answer, transcribe, speak"):
        made.prompt([user], "speek")


def test_bad_layout_sections() -> None:
    for values, message in [
        ({"kind": "duplex"}, "kind is 'duplex'"),
        ({"speech_delay_tokens": 0}, "speech_delay_tokens is 0"),
        ({"max_answer_tokens": 0}, "max_answer_tokens is 0"),
        ({"instructions": {"answer": ""}}, "misses speak, transcribe"),
    ]:
        with pytest.raises(ValueError, match=message):
            LayoutConfig(**values)
