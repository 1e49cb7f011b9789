"""Plots and page of the comparison of speech tokenizers.

Word error rates are in percent, their differences in points, on the plots and in the tables.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence
from itertools import zip_longest

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from flowomni.evaluation.shifts import Shift
from flowomni.tokenizers import TokenSpec
from scripts.evaluation_page import page, player, table
from scripts.tokenizer_scores import UNTOUCHED, Metrics, Version

MAX_AUDIO_BYTES = 12_000_000
KINDS = ("continuous", "discrete")
AXES = {"pitch": "semitones", "speed": "factor", "noise": "signal-to-noise ratio in dB"}
NO_NOISE_DB = 30.0  # where speech without noise stands on the axis
MARKERS = "osD^vP*X"
Summary = Mapping[str, Mapping[Version, Metrics]]  # condition -> version -> metrics


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def png(figure: Figure) -> bytes:
    """The figure as a png file."""
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=110)
    return drawn.getvalue()


def over(metrics: Metrics) -> str:
    """The difference to show: over the ceiling, or over the untouched audio of a tokenizer that has no ceiling."""
    return "wer_over_ceiling" if "wer_over_ceiling" in metrics else "wer_over_untouched"


def robustness_figure(summary: Summary, specs: Mapping[str, TokenSpec], shifts: Mapping[str, Shift]) -> Figure:
    """What each shift adds to the word error rate: continuous tokenizers in the upper row, discrete in the lower.

    Args:
        shifts: the condition -> how it was altered; "none" stands in every panel, at no shift.
    """
    kinds = [kind for kind in KINDS if any(spec.kind == kind for spec in specs.values())]
    figure = _figure(11, 0.6 + 3.1 * len(kinds))
    panels = figure.subplots(len(kinds), len(AXES), sharex="col", sharey=True, squeeze=False)
    for row, kind in zip(panels, kinds, strict=True):
        names = [name for name, spec in specs.items() if spec.kind == kind]
        for axes, (of, label) in zip(row, AXES.items(), strict=True):
            for index, name in enumerate(names):
                _draw_curve(axes, summary, shifts, of, name, MARKERS[index % len(MARKERS)])
            axes.axhline(0, color="#888", linewidth=0.8)
            axes.set_xlabel(label)
            axes.set_title(f"{of}, {kind}", fontsize=10)
        row[0].set_ylabel("WER less the ceiling's, points")
        row[-1].legend(fontsize=7, frameon=False)
    noise = panels[0, list(AXES).index("noise")]  # the rows share their axes
    amounts = sorted(shift.amount for shift in shifts.values() if shift.kind == "noise")
    noise.set_xticks([*amounts, NO_NOISE_DB], [*(f"{amount:g}" for amount in amounts), "none"])
    noise.invert_xaxis()  # harder to the right
    return figure


def _draw_curve(axes: Axes, summary: Summary, shifts: Mapping[str, Shift], of: str, name: str, marker: str) -> None:
    unshifted = {"pitch": 0.0, "speed": 1.0, "noise": NO_NOISE_DB}[of]
    points = []
    has_ceiling = True
    for condition, shift in shifts.items():
        metrics = summary[condition][Version(name)]
        if shift.kind in (of, "none") and over(metrics) in metrics:
            each = metrics[over(metrics)]
            has_ceiling = "wer_over_ceiling" in metrics
            amount = unshifted if shift.kind == "none" else shift.amount
            points.append((amount, 100 * each.value, 100 * each.low, 100 * each.high))
    if points:
        amount_P, value_P, low_P, high_P = np.array(sorted(points)).T
        axes.plot(
            amount_P,
            value_P,
            marker=marker,
            markersize=4,
            linewidth=1.4,
            label=name + ("" if has_ceiling else " (less the untouched)"),
        )
        axes.fill_between(amount_P, low_P, high_P, alpha=0.15, linewidth=0)


def bitrate_figure(summary: Summary, specs: Mapping[str, TokenSpec], condition: str) -> Figure:
    """Word error rate of a condition over the bitrate; continuous tokenizers, which have none, as lines across."""
    figure = _figure(8, 4.5)
    axes = figure.subplots()
    for index, (name, spec) in enumerate(specs.items()):
        each = summary[condition][Version(name)]["wer"]
        value, low, high = 100 * each.value, 100 * each.low, 100 * each.high
        if spec.bitrate is None:
            axes.axhline(value, color=f"C{index}", linewidth=1.2, linestyle="--", label=f"{name} (continuous)")
        else:
            bars = [[max(0.0, value - low)], [max(0.0, high - value)]]
            axes.errorbar([spec.bitrate], [value], yerr=bars, fmt="o", capsize=3, color=f"C{index}", label=name)
    untouched = summary[condition][Version()]["wer"]
    axes.axhline(100 * untouched.value, color="#444", linewidth=1, linestyle=":", label=UNTOUCHED)
    if any(spec.bitrate is not None for spec in specs.values()):
        axes.set_xscale("log")
    axes.set_xlabel("bits per second")
    axes.set_ylabel(f"WER %, {condition}")
    axes.legend(fontsize=8, frameon=False)
    return figure


def comparison_page(
    about: Sequence[str],
    tables: Mapping[str, tuple[Sequence[str], Sequence[Sequence[str]]]],
    plots: Mapping[str, bytes],
    samples: Mapping[str, Sequence[Sequence[tuple[str, str, np.ndarray, int]]]],
) -> str:
    """Everything on one page, in one file.

    Args:
        about: paragraphs at the top.
        plots: title -> png.
        samples: condition -> clips -> (heading, words, wav_S, rate in Hz), to listen to. Conditions take turns to show
            a clip until `MAX_AUDIO_BYTES` are used.
    """
    parts = ["<h1>Speech tokenizers</h1>", *(f"<p>{html.escape(text)}</p>" for text in about)]
    titles = list(tables)
    parts += [table(title, *tables[title]) for title in titles[:2]]
    for title, drawn in plots.items():
        source = base64.b64encode(drawn).decode()
        parts.append(f"<h2>{html.escape(title)}</h2><img style='max-width:100%' src='data:image/png;base64,{source}'>")
    parts += [table(title, *tables[title]) for title in titles[2:]]
    parts.append("<h2>Listen</h2><div class=scroll><table class=listen>")
    used = left_out = 0
    rounds = zip_longest(*([(condition, clip) for clip in clips] for condition, clips in samples.items()))
    for condition, clip in (each for turn in rounds for each in turn if each is not None):
        cells = "".join(
            f"<td>{html.escape(heading)}<br>{player(wav_S, rate)}<br><small>{html.escape(words)}</small></td>"
            for heading, words, wav_S, rate in clip
        )
        used += len(cells)
        if used > MAX_AUDIO_BYTES:
            left_out += 1
            continue
        parts.append(f"<tr><td>{html.escape(condition)}</td>{cells}</tr>")
    parts.append("</table></div>")
    if left_out:
        parts.append(f"<p>{left_out} clips more would make the page too large.</p>")
    return page("Speech tokenizers", parts)
