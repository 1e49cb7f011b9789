"""What a run learned, on one page: `python -m training.summary RUN_DIR` writes summary.html into the run's folder.

The page is one file: curves of every logged value (SVG), what was spoken at the evaluations with pictures and
recognised text, and the configuration. It is made of config.yaml, log.jsonl and samples/, so an unfinished run has
one too.
"""

from __future__ import annotations

import argparse
import base64
import html
import io
import json
import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import soundfile
import yaml
from matplotlib import rc_context
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

ANSWERS = "answers.jsonl"  # of an evaluation: prompt, wanted, text, recognised and wav of each spoken prompt
MAX_POINTS = 400
MAX_EVALUATIONS = 5  # columns of the samples' table
MAX_MEDIA_BYTES = 8_000_000
STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 1250px; padding: 0 1em; color: #222; }
table { border-collapse: collapse; margin: .5em 0 2em; font-variant-numeric: tabular-nums; }
th, td { padding: .3em .8em; border-bottom: 1px solid #ddd; text-align: left; vertical-align: top; }
audio { width: 190px; height: 32px; display: block; } img { max-width: 260px; display: block; }
small { color: #666; } .scroll { overflow-x: auto; } pre { background: #f6f6f6; padding: 1em; overflow-x: auto; }
.charts { display: flex; flex-wrap: wrap; } .charts svg { width: 400px; height: auto; }
"""

Series = tuple[list[float], list[float]]  # steps, values


def write_summary(folder: str | Path) -> Path:
    """Write the page of a run and return its place.

    Raises:
        ValueError: the folder is no run's: config.yaml or log.jsonl is missing.
    """
    folder = Path(folder)
    for name in ("config.yaml", "log.jsonl"):
        if not (folder / name).is_file():
            raise ValueError(f"{folder} has no {name}: give the output_dir of a run")
    config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    log = _read_lines(folder / "log.jsonl")
    series = series_of(log)
    title = f"{config.get('stage', 'run')}: {html.escape(str(folder))}"
    parts = [f"<h1>{title}</h1>", _overview(log, config), _finals(series)]
    parts += ["<h2>Curves</h2><div class=charts>", *charts(series), "</div>"]
    parts += _samples(folder)
    parts.append(f"<h2>Configuration</h2><pre>{html.escape(yaml.safe_dump(config, sort_keys=False))}</pre>")
    head = f"<meta charset=utf-8><meta name=viewport content='width=device-width'><title>{title}</title>"
    page = (
        f"<!doctype html><html lang=en><head>{head}<style>{STYLE}</style></head><body>{''.join(parts)}</body></html>\n"
    )
    partial = folder / f".summary.{os.getpid()}.part"
    partial.write_text(page, encoding="utf-8")
    os.replace(partial, folder / "summary.html")
    return folder / "summary.html"


def read_answers(folder: Path) -> list[dict[str, str]]:
    """What was asked and answered at an evaluation; empty for stages that answer nothing."""
    file = folder / ANSWERS
    return _read_lines(file) if file.is_file() else []


def _read_lines(path: Path) -> list[dict]:
    """The lines of a JSONL file up to one that is cut off, as a killed run leaves it."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return found


# ------------------------------------------------------------------------------------------------------------- values


def series_of(log: Sequence[Mapping[str, float]]) -> dict[str, Series]:
    """Every logged value by name, with the steps that it was logged at."""
    found: dict[str, Series] = {}
    for line in log:
        for name, value in line.items():
            if name not in ("step", "elapsed_sec") and isinstance(value, int | float) and math.isfinite(value):
                steps, values = found.setdefault(name, ([], []))
                steps.append(line["step"])
                values.append(value)
    return found


def _overview(log: Sequence[Mapping[str, float]], config: Mapping) -> str:
    if not log:
        return "<p>Nothing is logged yet.</p>"
    minutes = max(line.get("elapsed_sec", 0.0) for line in log) / 60
    last = max(line["step"] for line in log)
    return f"<p>{last:,.0f} of {config.get('max_steps', last):,} steps, {minutes:.1f} minutes since its last start.</p>"


def _finals(series: Mapping[str, Series]) -> str:
    """First, best and last of each value."""
    rows = []
    for name, (_, values) in sorted(series.items()):
        cells = [values[0], min(values), max(values), values[-1]]
        rows.append(f"<tr><td>{html.escape(name)}</td>" + "".join(f"<td>{v:.4g}</td>" for v in cells) + "</tr>")
    head = "<tr><th></th><th>first</th><th>lowest</th><th>highest</th><th>last</th></tr>"
    return f"<details><summary>Values</summary><table>{head}{''.join(rows)}</table></details>"


def chart_groups(names: Sequence[str]) -> dict[str, list[str]]:
    """Title of each chart -> the values in it: a loss with its held-out one, all flow-time bins, the rest alone."""
    groups: dict[str, list[str]] = {}
    for name in sorted(names, key=lambda n: ("loss/" not in n, n != "loss/total", n.removeprefix("eval/"), n)):
        plain = name.removeprefix("eval/")
        is_loss = plain.startswith("loss/")
        title = plain.rpartition("flow_t")[0] + "flow-time bins" if "/flow_t" in plain else plain
        groups.setdefault(title if is_loss else name, []).append(name)
    return groups


def charts(series: Mapping[str, Series]) -> Iterator[str]:
    """One inline SVG for each group of values."""
    for index, (title, names) in enumerate(chart_groups(list(series)).items()):
        yield _chart(title, {name: _thinned(series[name]) for name in names}, index)


def _thinned(series: Series) -> Series:
    """At most `MAX_POINTS` points: means of neighbours."""
    size = math.ceil(len(series[0]) / MAX_POINTS)
    steps, values = ([float(np.mean(part[i : i + size])) for i in range(0, len(part), size)] for part in series)
    return steps, values


def _chart(title: str, lines: Mapping[str, Series], index: int) -> str:
    figure = Figure(figsize=(4.4, 2.6), layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.subplots()
    for name, (steps, values) in lines.items():
        label = "held out" if name.startswith("eval/loss") else name.rpartition("/")[2]
        axes.plot(steps, values, label=label, linewidth=1.2, marker="o" if len(steps) < 20 else None, markersize=3)
    if title.startswith("loss/") and min(min(values) for _, values in lines.values()) > 0:
        axes.set_yscale("log")
    axes.set_title(title, fontsize=9, parse_math=False)
    axes.tick_params(labelsize=7, which="both")
    axes.grid(alpha=0.3)
    if len(lines) > 1:
        axes.legend(fontsize=6)
    drawn = io.StringIO()
    # names inside the page's pictures must differ, and be the same when the page is made again
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": str(index)}):
        figure.savefig(drawn, format="svg", metadata={"Date": None})
    text = drawn.getvalue()
    return text[text.index("<svg") :]


# ------------------------------------------------------------------------------------------------------------ samples


def _samples(folder: Path) -> Iterator[str]:
    """A row for each prompt or file, a column for each of some evaluations: the first, the last, some between."""
    evaluations = [path for path in sorted((folder / "samples").glob("step_*")) if any(path.iterdir())]
    if not evaluations:
        return
    count = min(MAX_EVALUATIONS, len(evaluations))
    chosen = [evaluations[round(i * (len(evaluations) - 1) / max(1, count - 1))] for i in range(count)]
    cells = {path: _cells(path) for path in chosen}
    names = list(dict.fromkeys(name for found in cells.values() for name in found))
    budget = MAX_MEDIA_BYTES
    yield "<h2>Samples</h2><div class=scroll><table><tr><th></th>"
    yield from (f"<th>step {int(path.name.rpartition('_')[2]):,}</th>" for path in chosen)
    yield "</tr>"
    for name in names:
        row = f"<tr><th>{html.escape(name)}</th>"
        row += "".join(f"<td>{cells[path].get(name, '')}</td>" for path in chosen) + "</tr>"
        budget -= len(row)
        if budget < 0:
            yield f"<tr><td colspan={count + 1}>more in {html.escape(str(folder / 'samples'))}</td></tr>"
            break
        yield row
    yield "</table></div>"


def _cells(folder: Path) -> dict[str, str]:
    """What an evaluation has to show, by prompt or by name of the file."""
    found: dict[str, str] = {}
    answers = read_answers(folder)
    shown = set()
    for answer in answers:
        lines = [f"{html.escape(answer['text'])}<br><small>wanted: {html.escape(answer['wanted'])}"]
        if "recognised" in answer:
            lines.append(f"<br>heard: {html.escape(answer['recognised'])}")
        wav = folder / answer["wav"] if answer.get("wav") else None
        found[answer["prompt"]] = _player(wav) + "".join(lines) + "</small>"
        shown.add(answer.get("wav"))
    for wav in sorted(folder.glob("*.wav")):
        if wav.name not in shown:
            found[wav.stem] = _player(wav)
    return found


def _player(wav: Path | None) -> str:
    """A player, and the picture beside it if there is one; sound as FLAC, which is lossless and half the size."""
    if wav is None or not wav.is_file():
        return ""
    wav_S, rate = soundfile.read(wav, dtype="int16")
    encoded = io.BytesIO()
    soundfile.write(encoded, wav_S, rate, format="FLAC", subtype="PCM_16")
    source = base64.b64encode(encoded.getvalue()).decode()
    player = f"<audio controls preload=none src='data:audio/flac;base64,{source}'></audio>"
    picture = wav.with_suffix(".png")
    if picture.is_file():
        data = base64.b64encode(picture.read_bytes()).decode()
        player = f"<img alt=spectrogram src='data:image/png;base64,{data}'>" + player
    return player


def main(args: list[str] | None = None) -> None:
    """Command line. A folder that is no run's ends with status 2."""
    parser = argparse.ArgumentParser(prog="training.summary", description="Write the page of a training run.")
    parser.add_argument("run", help="output_dir of the run")
    try:
        print(write_summary(parser.parse_args(args).run))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
