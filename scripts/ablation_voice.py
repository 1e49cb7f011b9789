"""A cell's own voice: what becomes of speech of another pitch or rate in it, and what a second of it costs.

The target voice, shifted. The model is given recordings of the right answers, altered in pitch or rate, as its own
speech so far, through its tokenizer. Two things are listened to:

    tokenizer   the tokens decoded: what the tokenizer alone keeps of such speech
    head        at each step the token that the head draws, given the words and the true tokens of the altered recording
                before it, then all drawn tokens decoded. No error is fed back, so this is no generation: it says
                whether language model and head understand speech that they were not trained on, and can draw its like

Shapes: S samples, L speech tokens, T steps, N steps of all parts of the tokens, X one speech token, H hidden width.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flowomni.api import FlowOmni
from flowomni.evaluation.shifts import Shift
from flowomni.generation import GenerationOptions, generate
from flowomni.layouts import Turn
from flowomni.streams import SpeechState
from scripts.ablation_questions import VOICE_SHIFTS
from training.manifest import Conversation
from training.recordings import read_recording

TOKENIZER, HEAD = "tokenizer", "head"
NUM_TIMED_STEPS = 24
NEVER_STOPS = 1.0 - 1e-9


def altered(item: Conversation, shift: Shift, sample_rate_hz: int) -> np.ndarray:
    """The recording of the right answer, altered: float32 [S]."""
    assert item.answer.audio is not None, "chosen for it"
    wav_S = read_recording(item.answer.audio, sample_rate_hz).wav_S
    return shift(wav_S, sample_rate_hz, np.random.default_rng(VOICE_SHIFTS.index(shift)))


@torch.inference_mode()
def through_the_voice(
    omni: FlowOmni, item: Conversation, shift: Shift, sampling: Mapping[str, Any], task: str
) -> dict[str, np.ndarray]:
    """What is left of the altered recording after the tokenizer, and after the head: float32 [S] each.

    Args:
        task: "speak" or "answer", whichever the model was trained for.
    """
    tokenizer, layout, head = omni.model.speech_tokenizer, omni.processor.layout, omni.model.head
    wav_S = altered(item, shift, tokenizer.spec.sample_rate_hz)
    token_1LX, _ = tokenizer.encode(torch.from_numpy(wav_S)[None].to(omni.model.device))
    asked = item.answer.text if task == "speak" else item.question.text
    turns = [Turn("user", text=asked), Turn("assistant", text=item.answer.text, speech_LX=token_1LX[0].cpu())]
    hidden_NH = omni.model.conditions(layout.example(turns, task).to(omni.model.device))
    chosen = omni.generation_options(True, dict(sampling), 0.5).sampling
    drawn_NX = head.sample(hidden_NH, chosen, torch.Generator().manual_seed(0))
    num_spanned = layout.num_delay_steps + 1
    steps = list(drawn_NX)
    joined_LX = torch.stack([layout.join(steps[i : i + num_spanned]) for i in range(token_1LX.shape[1])])
    tokens = {TOKENIZER: token_1LX, HEAD: joined_LX[None]}
    return {name: tokenizer.decode(each)[0, : len(wav_S)].float().cpu().numpy() for name, each in tokens.items()}


# ---------------------------------------------------------------------------------------------------------------- cost


@dataclass(frozen=True)
class Cost:
    """Seconds of computing for one second of speech, one stream, median over the turns.

    Attributes:
        head: reading a token back and drawing the next one.
        whole: language model, output blocks, head and tokenizer, step by step.
        head_turns, whole_turns: of each turn.
    """

    head: float
    whole: float
    head_turns: tuple[float, ...]
    whole_turns: tuple[float, ...]


def measure_cost(
    models: Mapping[str, tuple[FlowOmni, Mapping[str, Any]]], text: str, num_turns: int
) -> dict[str, dict[str, Any]]:
    """The cost of each cell's speech, as JSON values. Cells take turns, so that a load that comes and goes hits all.

    Every cell speaks for the same number of steps, whatever it would have said, so that a cell that stops early is not
    cheaper. The first turn warms up and does not count.

    Args:
        models: each with its sampling.
        text: what is read aloud.
    """
    taken: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in models}
    for turn in range(num_turns + 1):
        for name, (omni, sampling) in models.items():
            found = _head_sec(omni, sampling), _whole_sec(omni, text, sampling)
            if turn:
                for times, sec in zip(taken[name], found, strict=True):
                    times.append(sec)
    return {
        name: asdict(Cost(statistics.median(head), statistics.median(whole), tuple(head), tuple(whole)))
        for name, (head, whole) in taken.items()
    }


@torch.inference_mode()
def _head_sec(omni: FlowOmni, sampling: Mapping[str, Any]) -> float:
    """Of one second of speech: each token drawn from a random hidden state, and read."""
    model, options = omni.model, omni.generation_options(True, dict(sampling), 0.5)
    generator = torch.Generator().manual_seed(0)
    hidden_TH = torch.randn(NUM_TIMED_STEPS, model.config.hidden_size, generator=generator).to(model.device)
    began = time.perf_counter()
    for hidden_H in hidden_TH:
        drawn_1X: Tensor = model.head.sample(hidden_H[None], options.sampling, [generator])
        model.head.embed(drawn_1X[:, None])
    _wait(model.device)
    return (time.perf_counter() - began) / NUM_TIMED_STEPS * model.speech_tokenizer.spec.tokens_per_sec


def _whole_sec(omni: FlowOmni, text: str, sampling: Mapping[str, Any]) -> float:
    """Of one second of speech, from the first step that speaks to the last, the prompt left out."""
    options = omni.generation_options(True, dict(sampling), NEVER_STOPS)
    first = omni.processor.layout.config.speech_delay_tokens
    limited = GenerationOptions(
        sampling=options.sampling, stop_threshold=NEVER_STOPS, max_steps=first + NUM_TIMED_STEPS
    )
    prompt = omni.processor.prompt([omni.processor.turn("user", text=text)], "speak")
    began, num_steps = 0.0, 0
    for step in generate(omni.model, omni.processor, [prompt], limited, [torch.Generator().manual_seed(0)]):
        if step.states[0] == SpeechState.START:
            began = time.perf_counter()
        num_steps += step.states[0] == SpeechState.GENERATING
    _wait(omni.model.device)
    return (time.perf_counter() - began) / max(1, num_steps) * omni.model.speech_tokenizer.spec.tokens_per_sec


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
