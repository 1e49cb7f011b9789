"""Plots of a judged grid, from the values of its report.

Word error rates and accuracies are in percent. Bars and bands are 95 % bootstrap intervals.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from flowomni.evaluation import Interval
from scripts.ablation_questions import HEARD, HEARD_SHIFTS, SPEAK, TYPED, VOICE_SHIFTS
from scripts.ablation_scores import SCORES, VOICE_SCORES, excludes_zero
from scripts.ablation_voice import HEAD, TOKENIZER
from scripts.tokenizer_page import AXES, MARKERS, NO_NOISE_DB

UNALTERED = {"pitch": 0.0, "speed": 1.0, "noise": NO_NOISE_DB}
Report = Mapping[str, Any]


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def forest_figure(found: Report, condition: str) -> Figure | None:
    """Each cell's difference from the reference in one condition, with its interval; filled where it excludes zero."""
    names = ("wer_own", "wer_right", "dnsmos", "early")
    cells = found["conditions"][condition]["cells"]
    others = [name for name in cells if name != found["reference"]]
    panels_of = [n for n in names if any((cells[cell].get(n) or {}).get("difference") for cell in others)]
    if not panels_of:
        return None
    figure = _figure(11, 1.1 + 0.32 * len(others))
    panels = figure.subplots(1, len(panels_of), sharey=True, squeeze=False)[0]
    for axes, name in zip(panels, panels_of, strict=True):
        score = SCORES[name]
        for place, cell in enumerate(others):
            each = (cells[cell].get(name) or {}).get("difference")
            if each:
                low, value, high = (score.factor * each[key] for key in ("low", "value", "high"))
                filled = excludes_zero(Interval(**each))
                axes.plot([low, high], [place, place], color="C0", linewidth=1.6)
                axes.plot(value, place, "o", color="C0", markerfacecolor="C0" if filled else "white", markersize=6)
        axes.axvline(0, color="#888", linewidth=0.8)
        axes.set_title(f"{score.heading}, {score.better} is better", fontsize=9)
        axes.tick_params(labelsize=8)
    panels[0].set_yticks(range(len(others)), others)
    panels[0].set_ylim(-0.6, len(others) - 0.4)
    panels[0].invert_yaxis()
    return figure


def shift_figure(found: Report) -> Figure | None:
    """Answers to altered questions: share of texts that are right, and word error rate against the right answer."""
    if HEARD not in found["conditions"] or not any(shift.name in found["conditions"] for shift in HEARD_SHIFTS):
        return None
    names = ("accuracy", "wer_right")
    figure = _figure(11, 6.4)
    panels = figure.subplots(2, len(AXES), sharex="col", sharey="row")
    for row, name in zip(panels, names, strict=True):
        for axes, kind in zip(row, AXES, strict=True):
            conditions = {shift.name: shift.amount for shift in HEARD_SHIFTS if shift.kind == kind}
            conditions[HEARD] = UNALTERED[kind]
            for index, cell in enumerate(found["cells"]):
                _curve(axes, found["conditions"], conditions, cell, name, 100, index)
            axes.set_title(f"heard {kind}", fontsize=10)
        row[0].set_ylabel(SCORES[name].heading)
    for axes, label in zip(panels[-1], AXES.values(), strict=True):
        axes.set_xlabel(label)
    _noise_axis(panels[0, list(AXES).index("noise")], [s.amount for s in HEARD_SHIFTS if s.kind == "noise"])
    panels[0, -1].legend(fontsize=7, frameon=False)
    return figure


def voice_figure(found: Report) -> Figure | None:
    """The target voice, altered: word error rate after the tokenizer (above) and after the head (below)."""
    if not found["voice"]:
        return None
    kinds = [kind for kind in AXES if kind != "noise"]
    figure = _figure(11, 6.4)
    panels = figure.subplots(2, len(kinds), sharex="col", sharey=True)
    for row, version in zip(panels, (TOKENIZER, HEAD), strict=True):
        for axes, kind in zip(row, kinds, strict=True):
            conditions = {f"{s.name}/{version}": s.amount for s in VOICE_SHIFTS if s.kind == kind}
            conditions[f"none/{version}"] = UNALTERED[kind]
            for index, cell in enumerate(found["cells"]):
                _curve(axes, found["voice"], conditions, cell, "wer_right", 100, index)
            _recordings(axes, found["voice"], conditions)
            axes.set_title(f"the voice's {kind}, after the {version}", fontsize=10)
        row[0].set_ylabel(VOICE_SCORES["wer_right"].heading)
    for axes, kind in zip(panels[-1], kinds, strict=True):
        axes.set_xlabel(AXES[kind])
    panels[0, -1].legend(fontsize=7, frameon=False)
    return figure


def _curve(
    axes: Axes,
    conditions: Mapping[str, Any],
    amounts: Mapping[str, float],
    cell: str,
    score: str,
    factor: float,
    index: int,
) -> None:
    points = []
    for name, amount in amounts.items():
        each = conditions.get(name, {"cells": {}})["cells"].get(cell, {}).get(score)
        if each:
            points.append((amount, *(factor * each["value"][key] for key in ("value", "low", "high"))))
    if points:
        amount_P, value_P, low_P, high_P = np.array(sorted(points)).T
        look: dict[str, Any] = {
            "marker": MARKERS[index % len(MARKERS)],
            "markersize": 4,
            "linewidth": 1.4,
            "color": f"C{index}",
        }
        axes.plot(amount_P, value_P, label=cell, **look)
        axes.fill_between(amount_P, low_P, high_P, alpha=0.08, linewidth=0, color=f"C{index}")
        axes.tick_params(labelsize=8)


def _recordings(axes: Axes, conditions: Mapping[str, Any], amounts: Mapping[str, float]) -> None:
    """What the recogniser gets wrong in the altered recordings themselves."""
    points = []
    for name, amount in amounts.items():
        each = conditions.get(name, {}).get("recordings", {}).get("wer_right")
        if each:
            points.append((amount, 100 * each["value"]))
    if points:
        amount_P, value_P = np.array(sorted(points)).T
        axes.plot(amount_P, value_P, color="#444", linestyle=":", linewidth=1.2, label="the recordings")


def _noise_axis(axes: Axes, amounts: Sequence[float]) -> None:
    axes.set_xticks([*sorted(amounts), NO_NOISE_DB], [*(f"{amount:g}" for amount in sorted(amounts)), "none"])
    axes.invert_xaxis()  # harder to the right


def size_figure(found: Report, condition: str, axis: str) -> Figure | None:
    """Word error rate over token rate ("tokens/s") or over parameters of the head ("head parameters"), by cell.

    None where the cells do not differ in it.
    """
    places: dict[str, float] = {}
    for name, cell in found["cells"].items():
        value = (
            cell.get("token", {}).get("tokens_per_sec") if axis == "tokens/s" else cell["num_parameters"].get("head")
        )
        if value:
            places[name] = value
    sizes = sorted(places.values())
    apart = 0.01 if axis == "tokens/s" else 0.15  # heads that were made of one size differ a little all the same
    if len(sizes) < 2 or sizes[-1] / sizes[0] - 1 < apart:
        return None
    figure = _figure(7, 3.8)
    axes = figure.subplots()
    for index, score in enumerate(("wer_own", "wer_right")):
        points = []
        for name, place in places.items():
            each = found["conditions"][condition]["cells"].get(name, {}).get(score)
            if each:
                points.append((place, *(100 * each["value"][key] for key in ("value", "low", "high"))))
        if points:
            place_P, value_P, low_P, high_P = np.array(sorted(points)).T
            bars = [np.maximum(0, value_P - low_P), np.maximum(0, high_P - value_P)]
            heading = SCORES[score].heading
            axes.errorbar(place_P, value_P, yerr=bars, marker=MARKERS[index], capsize=3, linewidth=1.3, label=heading)
    axes.set_xscale("log")
    axes.set_xticks(sorted(set(places.values())), [f"{size:,.4g}" for size in sorted(set(places.values()))])
    axes.minorticks_off()
    axes.set_xlabel(axis)
    axes.set_ylabel(f"{condition}, %")
    axes.legend(fontsize=8, frameon=False)
    return figure


def training_figure(found: Report) -> Figure | None:
    """Held-out word errors and losses over the steps, a line for each run. Heads' losses are not comparable."""
    wanted = {
        "eval/wer_own_text": "held-out WER, own text",
        "eval/accuracy": "held-out answers right",
        "loss/text": "text loss",
        "loss/state": "speech-state loss",
        "loss/speech": "head loss (each its own)",
    }
    runs = [(name, run["curves"]) for name, cell in found["cells"].items() for run in cell["runs"].values()]
    there = [key for key in wanted if any(key in curves for _, curves in runs)]
    if not there:
        return None
    figure = _figure(11, 3.0 * -(-len(there) // 3))
    panels = np.atleast_1d(figure.subplots(-(-len(there) // 3), min(3, len(there)))).ravel()
    colors = {name: f"C{index}" for index, name in enumerate(found["cells"])}
    for axes, key in zip(panels, there, strict=False):
        for name, curves in runs:
            if key in curves:
                step_P, value_P = np.array(curves[key]).T
                marker = "o" if len(step_P) < 12 else None
                axes.plot(step_P, value_P, color=colors[name], linewidth=1.1, marker=marker, markersize=3)
        axes.set_title(wanted[key], fontsize=9)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.3)
    for axes in panels[len(there) :]:
        axes.set_axis_off()
    handles = [panels[0].plot([], [], color=color, label=name)[0] for name, color in colors.items()]
    (panels[len(there)] if len(panels) > len(there) else panels[0]).legend(
        handles=handles, fontsize=8, frameon=False, loc="center" if len(panels) > len(there) else "best"
    )
    return figure


def figures(found: Report, main: str | None) -> dict[str, Figure]:
    """Title -> plot, those that there is something for."""
    made: dict[str, Figure | None] = {}
    if main is not None:
        for condition in (SPEAK, TYPED, HEARD):
            if condition in found["conditions"]:
                made[f"Difference from {found['reference']}: {condition}"] = forest_figure(found, condition)
        made["Over token rate"] = size_figure(found, main, "tokens/s")
        made["Over the head's size"] = size_figure(found, main, "head parameters")
    made["Questions altered"] = shift_figure(found)
    made["The target voice altered"] = voice_figure(found)
    made["Training"] = training_figure(found)
    return {title: figure for title, figure in made.items() if figure is not None}
