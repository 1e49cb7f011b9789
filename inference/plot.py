"""A picture of an answer: its mel, its speech states and its text, one above the other in time."""

from __future__ import annotations

import io
import os
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from flowomni.api import Answer
from flowomni.evaluation.spectrogram import draw_mel

STATE_COLORS = {"pad": "#d0d0d0", "start": "#f0b840", "generating": "#58a066", "stop": "#c8504a"}


def plot_answer(path: str | Path, answer: Answer, step_sec: float) -> None:
    """Draw an answer into a png, pdf or svg file; the file appears whole or not at all.

    Time 0 is the first sample. Step i of the answer stands where its speech token is heard, so that steps before speech
    have negative times; text stands at the step that brought it.

    Args:
        step_sec: seconds per step, which is one speech token.

    Raises:
        ValueError: the file cannot be written.
    """
    states = answer.states
    first = states.index("generating") if "generating" in states else len(states)
    times = [(index - first) * step_sec for index in range(len(states))]
    figure = Figure(figsize=(max(6.0, 3.0 + 2.0 * len(states) * step_sec), 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    mel_axes, state_axes, text_axes = figure.subplots(3, 1, sharex=True, height_ratios=(6, 1, 2))
    draw_mel(mel_axes, answer.wav_S, answer.sample_rate_hz)
    for time, state in zip(times, states, strict=True):
        if state:
            state_axes.axvspan(time, time + step_sec, color=STATE_COLORS[state], linewidth=0)
    for time, text in zip(times, answer.texts, strict=True):
        if text.strip():
            text_axes.plot([time, time], [0.9, 1.0], color="black", linewidth=0.8)
            text_axes.text(time, 0.85, text.strip(), rotation=-40, va="top", fontsize=8, parse_math=False)
    for axes, label in ((mel_axes, "mel"), (state_axes, "state"), (text_axes, "text")):
        axes.set_ylabel(label)
        axes.set_yticks([])
    handles = [Patch(color=color, label=state) for state, color in STATE_COLORS.items()]
    figure.legend(handles=handles, loc="outside upper right", ncols=len(handles), fontsize=8, frameon=False)
    text_axes.set_ylim(0, 1)
    text_axes.set_xlim(min([0.0, *times]), max([answer.answer_sec, *(time + step_sec for time in times)]))
    text_axes.set_xlabel("seconds of the answer")
    _save(figure, Path(path))


def _save(figure: Figure, path: Path) -> None:
    drawn = io.BytesIO()
    figure.savefig(drawn, format=path.suffix[1:].lower(), dpi=120)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        try:
            temporary.write_bytes(drawn.getvalue())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        reason = error.strerror or error
        raise ValueError(f"{path} cannot be written ({reason}): choose another place or free some space") from error
