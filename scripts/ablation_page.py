"""The page of a judged grid: one HTML file with what the data say, tables, plots, and samples to listen to."""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import soundfile

from flowomni.evaluation import Interval
from scripts.ablation_figures import figures
from scripts.ablation_files import JUDGED
from scripts.ablation_judge import Judged
from scripts.ablation_questions import HEARD, SPEAK, TYPED
from scripts.ablation_report import RELATIVE, main_condition, named_settings, shown
from scripts.ablation_scores import SCORES, VOICE_SCORES, Score, excludes_zero
from scripts.evaluation_page import page, player, table
from scripts.tokenizer_page import png

MAX_AUDIO_BYTES = 1_500_000
NUM_ROWS = 12  # questions to listen to
PARTS = (("supported", "What the data support"), ("unsupported", "What they do not"), ("limits", "What limits them"))
NOTES = {
    "Questions altered": "The spoken questions, altered; the same for every cell.",
    "The target voice altered": "Recordings of the right answers, altered and given to the model as its own speech. "
    "After the tokenizer: their tokens decoded. After the head: at each step the token that the head draws, given the "
    "words and the true tokens of the altered recording before it; no error is fed back, and the head, which knows the "
    "words, may make them clearer than they were.",
    "Training": "Held-out answers of the evaluations during training: few.",
}
STYLE = """<style>body { max-width: 1600px; font-size: 14px; } th, td { padding: .25em .5em; }
.good { color: #06752a; font-weight: 600; } .bad { color: #b00020; font-weight: 600; }
td small { display: block; } details { margin: 1em 0; } summary { cursor: pointer; }
img { max-width: 100%; } li { margin: .3em 0; max-width: 62em; } p { max-width: 62em; }
.listen audio { width: 150px; }</style>"""
Report = Mapping[str, Any]


def report_page(found: Report, judged: Judged, others: Sequence[Report], tried: Sequence[Report]) -> str:
    """The whole page.

    Args:
        others: reports of other grids upon the same base.
        tried: reports of tuning grids.
    """
    main = main_condition(found["conditions"])
    parts = [STYLE, f"<h1>Ablation: {html.escape(found['name'])}</h1>", _about(found)]
    for key, title in PARTS:
        if found["says"][key]:
            lines = "".join(f"<li>{html.escape(text)}</li>" for text in found["says"][key])
            parts.append(f"<h2>{title}</h2><ul>{lines}</ul>")
    parts += [_pair(found), _differs(found), _budgets(found), _cost(found)]
    drawn = {title: _picture(png(figure)) for title, figure in figures(found, main).items()}
    for name in (SPEAK, TYPED, HEARD):
        if name in found["conditions"]:
            parts.append(_scores(found, "conditions", name, SCORES))
            parts.append(drawn.pop(f"Difference from {found['reference']}: {name}", ""))
    parts += [
        f"<h2>{html.escape(title)}</h2><p>{html.escape(NOTES.get(title, ''))}</p>{picture}"
        for title, picture in drawn.items()
    ]
    rest = [name for name in found["conditions"] if name not in (SPEAK, TYPED, HEARD)]
    tables = "".join(_scores(found, "conditions", name, SCORES) for name in rest)
    parts.append(f"<details><summary>Altered questions and other voices, in numbers</summary>{tables}</details>")
    tables = "".join(_scores(found, "voice", name, VOICE_SCORES) for name in found["voice"])
    parts.append(f"<details><summary>The target voice altered, in numbers</summary>{tables}</details>")
    parts += [_other(other) for other in others]
    parts.append(_tried(tried))
    parts.append(_equal(found))
    parts += _samples(found, judged)
    return page(f"Ablation: {found['name']}", parts)


def _about(found: Report) -> str:
    judge = found["judge"]
    lines = [
        f"{len(found['cells'])} cells of {found['config']}, compared with {found['reference']}. In brackets: 95 % "
        "bootstrap interval, over questions and training seeds drawn anew; differences (second line of a cell, with "
        "colour where the interval excludes zero) are paired by question and by seed.",
        f"Up to {judge['num_questions']} held-out questions of split {judge['split']} a condition, "
        f"{judge['num_shifted']} of those that are altered or of other voices.",
        "WER own: recognised speech against the model's own text. WER right, WIL: against the right answer. Speaker: "
        "cosine of the voice's embedding with the mean of the recordings'. Early stop: speech shorter than half of the "
        "recording, or than three quarters of it without its last word. No stop: speech went on to the step limit. "
        "Duration off: mean distance from the recording's duration. Diversity: log-mel distance of two samples of one "
        "answer. Early stop and duration count answers whose words are right.",
    ]
    return "".join(f"<p>{html.escape(line)}</p>" for line in lines)


# --------------------------------------------------------------------------------------------------------------- tables


def _pair(found: Report) -> str:
    """The central pair: word errors of both, their difference, and the difference as a share."""
    pair = found["pair"]
    if pair is None:
        return ""
    first, second = pair["cells"]
    rows = []
    for name, scores in pair["conditions"].items():
        for key, each in scores.items():
            score, cells = SCORES[key], found["conditions"][name]["cells"]
            values = [shown(cells[cell][key]["value"], score) for cell in (first, second)]
            share = "-" if each["relative"] is None else shown(each["relative"], RELATIVE, signed=True)
            rows.append([name, score.heading, *values, shown(each["difference"], score, signed=True), share])
    headings = ["", "", first, second, f"{first} less {second}", "relative %"]
    text = f"The pair: {pair['how']}. Differences on training seeds {', '.join(map(str, pair['seeds']))}."
    return table(f"{first} against {second}", headings, rows) + f"<p>{html.escape(text)}</p>"


def _differs(found: Report) -> str:
    cells = found["cells"]
    keys = named_settings(cells)
    headings = ["", "seeds", "tokens", "tokens/s", "bits/s", "head parameters", "sampling", *keys]
    rows = []
    for name, cell in cells.items():
        token = cell.get("token")
        what = "-"
        if token:
            codes = f"{token['num_codebooks']} x {token['codebook_size']}"
            what = codes if token["kind"] == "discrete" else f"{token['dim']} numbers"
        bits = "-" if not token or token["bitrate"] is None else f"{token['bitrate']:.0f}"
        size = cell["num_parameters"].get("head")
        rows.append(
            [
                name,
                ", ".join(map(str, cell["seeds"])),
                what,
                f"{token['tokens_per_sec']:.2f}" if token else "-",
                bits,
                f"{size:,}" if size else "-",
                _plain(cell.get("sampling_in_full", {})) + ("" if cell["sampling"] else " (its own)"),
                *(_plain(cell["set"].get(key, "as the base")) for key in keys),
            ]
        )
    also = [f"{name}: {', '.join(cell['also_differs'])}" for name, cell in cells.items() if cell["also_differs"]]
    brings = [f"{name}: {', '.join(cell['varies'])}" for name, cell in cells.items() if cell["varies"]]
    text = "".join(
        f"<p>{html.escape(title)} {html.escape('; '.join(lines))}.</p>"
        for title, lines in (("Meant to come along:", brings), ("More than is named:", also))
        if lines
    )
    return table("What differs", headings, rows) + text


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {inner}" for key, inner in value.items()) or "-"
    return str(value)


def _equal(found: Report) -> str:
    lines = "".join(f"{html.escape(key)}: {html.escape(str(value))}\n" for key, value in found["equal"].items())
    return f"<details><summary>What is equal: {len(found['equal'])} settings</summary><pre>{lines}</pre></details>"


def _budgets(found: Report) -> str:
    rows = []
    for name, cell in found["cells"].items():
        for seed, run in cell["runs"].items():
            speed = "-" if run["tokens_per_sec"] is None else f"{run['tokens_per_sec']:,.0f}"
            steps = "-" if run["steps_per_sec"] is None else f"{run['steps_per_sec']:.2f}"
            tokens, minutes = f"{run['num_tokens']:,.0f}", f"{run['train_sec'] / 60:.1f}"
            rows.append([name, seed, run["status"], f"{run['step']:,}", tokens, minutes, speed, steps])
    headings = ["", "seed", "status", "steps", "positions", "minutes", "positions/s", "steps/s"]
    return table("Training: budgets and throughput", headings, rows)


def _cost(found: Report) -> str:
    rows = []
    for name, cell in found["cells"].items():
        cost = cell["cost"]
        if cost:
            spans = [
                f"{1000 * min(cost[key]):.1f} to {1000 * max(cost[key]):.1f}" for key in ("head_turns", "whole_turns")
            ]
            head, whole = (f"{1000 * cost[key]:.1f}" for key in ("head", "whole"))
            share = f"{100 * cost['head'] / cost['whole']:.0f}"
            rows.append([name, head, spans[0], whole, spans[1], share, f"{1 / cost['whole']:.1f}"])
    if not rows:
        return ""
    headings = ["", "head", "of all turns", "whole", "of all turns", "head's share %", "times real time"]
    title = "Milliseconds of computing for one second of speech, one stream (median over alternating turns)"
    load = next(cell["cost"]["load_average"] for cell in found["cells"].values() if cell["cost"])
    return table(title, headings, rows) + f"<p>Load average of the machine before: {load}.</p>"


def _scores(found: Report, part: str, name: str, scores: Mapping[str, Score]) -> str:
    """A condition's scores: value, and under it the difference from the reference."""
    condition = found[part][name]
    there = [key for key in scores if any(key in cell for cell in condition["cells"].values())]
    head = "".join(f"<th>{html.escape(text)}</th>" for text in ["", *(scores[key].heading for key in there)])
    rows = []
    for cell, found_of in condition["cells"].items():
        inner = "".join(_two_lines(found_of.get(key), scores[key]) for key in there)
        rows.append(f"<tr><td>{html.escape(cell)}</td>{inner}</tr>")
    floor = condition["recordings"]
    if floor:
        inner = "".join(f"<td>{shown(floor[key], scores[key])}</td>" if key in floor else "<td>-</td>" for key in there)
        rows.append(f"<tr><td><i>the recordings</i></td>{inner}</tr>")
    times = f", {condition['num_samples']} times each" if condition["num_samples"] > 1 else ""
    what = {"speak": "read aloud", "typed": "typed questions", "heard": "spoken questions"}.get(name, name)
    title = f"{what}: {condition['num_questions']} questions{times}"
    return f"<h2>{html.escape(title)}</h2><div class=scroll><table><tr>{head}</tr>{''.join(rows)}</table></div>"


def _two_lines(each: Mapping[str, Any] | None, score: Score) -> str:
    if each is None:
        return "<td>-</td>"
    text = shown(each["value"], score)
    if each["difference"]:
        kind = ""
        if excludes_zero(Interval(**each["difference"])) and score.better:
            less = each["difference"]["value"] < 0
            kind = " class=good" if less == (score.better == "lower") else " class=bad"
        text += f"<small{kind}>{shown(each['difference'], score, signed=True)}</small>"
    return f"<td>{text}</td>"


def _other(found: Report) -> str:
    """Another grid upon the same base, in short: its word errors, and its curves."""
    main = main_condition(found["conditions"])
    if main is None:
        return ""
    keys = {key: SCORES[key] for key in ("wer_own", "wer_right", "dnsmos", "early")}
    some = {
        cell: {k: v for k, v in scores.items() if k in keys}
        for cell, scores in found["conditions"][main]["cells"].items()
    }
    short = {**found, "conditions": {main: {**found["conditions"][main], "cells": some}}}
    drawn = [figure for title, figure in figures(found, main).items() if title.startswith("Over ")]
    pictures = "".join(_picture(png(figure)) for figure in drawn)
    runs = sum(len(cell["seeds"]) for cell in found["cells"].values())
    seeds = " One seed each: a first look, no proof." if runs == len(found["cells"]) else ""
    title = f"Grid {found['name']}, compared with {found['reference']}"
    return f"<h2>{html.escape(title)}</h2><p>{seeds}</p>{_scores(short, 'conditions', main, keys)}{pictures}"


def _tried(tried: Sequence[Report]) -> str:
    """What tuning tried: trainings, and ways to draw from one, with the word errors that they were judged by."""
    rows = []
    for found in tried:
        main = main_condition(found["conditions"])
        scores = found["conditions"][main]["cells"] if main else {}
        for name, cell in found["cells"].items():
            score = scores.get(name, {}).get("wer_own")
            changed = {key.removeprefix("options.parts."): value for key, value in cell["set"].items()}
            changed.pop("speech_tokenizer", None)
            steps = max((run["step"] for run in cell["runs"].values()), default=0)
            errors = shown(score["value"], SCORES["wer_own"]) if score else "-"
            tuned = [found["name"].removeprefix("tune_"), name, f"{steps:,}", errors]
            rows.append([*tuned, _plain(changed), _plain(cell["sampling"])])
    if not rows:
        return "<h2>What was tried</h2><p>No tuning grids were judged beside this one.</p>"
    headings = ["", "cell", "steps", "WER own %", "settings", "sampling"]
    split = tried[0]["judge"]["split"]
    return table(f"What was tried, judged on held-out questions ({split})", headings, rows)


def _picture(drawn: bytes) -> str:
    return f"<img alt='' src='data:image/png;base64,{base64.b64encode(drawn).decode()}'>"


# -------------------------------------------------------------------------------------------------------------- samples


def _samples(found: Report, judged: Judged) -> list[str]:
    """A row for each question that was kept, a column for each cell (its first seed)."""
    cells = list(found["cells"])
    rows: list[tuple[str, str, dict[str, tuple[Path, Mapping[str, Any]]]]] = []
    for condition in found["conditions"]:
        for_id: dict[str, dict[str, tuple[Path, Mapping[str, Any]]]] = {}
        for cell in cells:
            by_seed = judged.rows[cell].get(condition, {})
            seed = min(by_seed, default=None)
            for row in by_seed[seed] if seed is not None else ():
                if "kept" in row:
                    folder = Path(found["cells"][cell]["runs"][str(seed)]["folder"])
                    for_id.setdefault(row["id"], {})[cell] = folder / JUDGED / row["kept"], row
        rows += [(condition, name, each) for name, each in for_id.items()]
    if not rows:
        return []
    rows.sort(key=lambda row: row[0] not in (SPEAK, TYPED, HEARD))
    head = "".join(f"<th>{html.escape(text)}</th>" for text in ["", *cells])
    parts = [f"<h2>Listen</h2><div class=scroll><table class=listen><tr>{head}</tr>"]
    used = 0
    for condition, _, each in rows[:NUM_ROWS]:
        right = next(iter(each.values()))[1]["right"]
        line = f"<tr><td>{html.escape(condition)}<small>{html.escape(right)}</small></td>"
        line += "".join(_heard(each.get(cell)) for cell in cells) + "</tr>"
        used += len(line)
        if used > MAX_AUDIO_BYTES:
            break
        parts.append(line)
    return [*parts, "</table></div>"]


def _heard(kept: tuple[Path, Mapping[str, Any]] | None) -> str:
    if kept is None or not kept[0].is_file():
        return "<td>-</td>"
    wav_S, rate = soundfile.read(kept[0], dtype="float32")
    row = kept[1]
    wrong = " class=wrong" if row["text"] != row["right"] else ""
    words = f"<small{wrong}>{html.escape(row['text'] or 'no words')}</small>"
    words += f"<small>heard: {html.escape(row['heard'])}</small>"
    return f"<td>{player(wav_S, rate)}{words}</td>"


# --------------------------------------------------------------------------------------------------------- other grids


def beside(folder: Path, base: str) -> tuple[list[Report], list[Report]]:
    """Reports of other grids upon the same base in the same place, and those of tuning."""
    others: list[Report] = []
    tried: list[Report] = []
    for file in sorted(folder.parent.glob("*/report.json")):
        if file.parent.resolve() == folder.resolve():
            continue
        values = json.loads(file.read_text(encoding="utf-8"))
        if file.parent.name.startswith("tune_"):
            tried.append(values)
        elif values.get("base") == base:
            others.append(values)
    return others, tried
