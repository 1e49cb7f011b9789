"""The page of an evaluation: its tables, and questions with their answers to listen to, all in one HTML file.

`page`, `table` and `player` are what every such page is made of.

Shape legend: S samples.
"""

from __future__ import annotations

import base64
import html
import io
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, zip_longest
from typing import TYPE_CHECKING, Any

import numpy as np
import soundfile

from training.recordings import read_recording

if TYPE_CHECKING:
    from flowomni.evaluation import Heard
    from scripts.evaluate import Scored

Table = tuple[Sequence[str], Sequence[Sequence[str]]]  # headings, rows

QUESTION_RATE_HZ = 16_000
REFERENCE_RATE_HZ = 24_000
MAX_PER_FAMILY = 4
MAX_AUDIO_BYTES = 4_500_000
STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 1200px; padding: 0 1em; color: #222; }
table { border-collapse: collapse; margin: .5em 0 2em; font-variant-numeric: tabular-nums; }
th, td { padding: .25em .8em; border-bottom: 1px solid #ddd; text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
.listen td, .listen th { text-align: left; white-space: normal; vertical-align: top; }
audio { width: 200px; height: 32px; }
small { color: #666; } .wrong { color: #b00020; } .scroll { overflow-x: auto; }
"""


def listening_page(run: dict[str, Any], tables: Mapping[str, Table], rows: Sequence[Scored]) -> str:
    """The page as text, below 5 MB: families take turns to show a question until `MAX_AUDIO_BYTES` are used.

    Audio is lossless (FLAC), so that what is heard is what the model made.
    """
    parts = ["<h1>How well it answers</h1>", f"<p>{html.escape(_describe(run))}</p>"]
    for title, (headings, lines) in tables.items():
        parts.append(table(title, headings, lines))
    parts.append("<p>In brackets: 95 % bootstrap interval over questions.</p>")
    parts.append("<h2>Listen</h2><table class=listen>")
    parts.append(_line("th", ["", "question", "answer", "reference"]))
    used = 0
    for row in in_turns(rows):
        line = _listen(row)
        used += len(line)
        if used > MAX_AUDIO_BYTES:
            break
        parts.append(line)
    parts.append("</table>")
    return page("Evaluation", parts)


def page(title: str, parts: Sequence[str]) -> str:
    """An HTML page of its own from the parts of its body."""
    head = f"<meta charset=utf-8><meta name=viewport content='width=device-width'><style>{STYLE}</style>"
    head = f"<title>{html.escape(title)}</title>{head}"
    return f"<!doctype html><html lang=en><head>{head}</head><body>{''.join(parts)}</body></html>\n"


def table(title: str, headings: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table under its title; all is text."""
    rows = "".join([_line("th", headings), *(_line("td", line) for line in lines)])
    return f"<h2>{html.escape(title)}</h2><div class=scroll><table>{rows}</table></div>"


def in_turns(rows: Sequence[Scored]) -> Iterator[Scored]:
    """Up to `MAX_PER_FAMILY` questions of each family, families in turn, and within one its voice groups."""
    families: defaultdict[str, defaultdict[str, list[Scored]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        families[row.item.family][row.item.voice_group].append(row)
    queues = [_taking_turns(groups.values())[:MAX_PER_FAMILY] for groups in families.values()]
    return iter(_taking_turns(queues))


def _taking_turns(queues: Any) -> list[Scored]:
    return [row for row in chain.from_iterable(zip_longest(*queues)) if row is not None]


def _describe(run: dict[str, Any]) -> str:
    sampling = ", ".join(f"{name} {value}" for name, value in run["sampling"].items()) or "the head's default sampling"
    return (
        f"Model: {run['model']}. Corpus: {run['manifest']}, split {run['split']}, {run['num_questions']} questions, "
        f"{run['batch_size']} at once on {run['device']}, seed {run['seed']}, {sampling}."
    )


def _line(tag: str, texts: Sequence[str]) -> str:
    return "<tr>" + "".join(f"<{tag}>{html.escape(text)}</{tag}>" for text in texts) + "</tr>"


def _listen(row: Scored) -> str:
    item, answer = row.item, row.answer
    question = read_recording(item.question.audio, QUESTION_RATE_HZ).wav_S if item.question.audio else None
    assert item.answer.audio is not None, "checked when it was scored"
    reference_S = read_recording(item.answer.audio, REFERENCE_RATE_HZ).wav_S
    wrong = " class=wrong" if answer.text != item.answer.text else ""
    columns = [
        f"{html.escape(item.family)}<br><small>{html.escape(item.voice_group)}</small>",
        f"{player(question, QUESTION_RATE_HZ)}<br>{html.escape(item.question.text) or '<i>no words</i>'}",
        f"{player(answer.wav_S, answer.sample_rate_hz)}<br><span{wrong}>{html.escape(answer.text)}</span>"
        + _heard(row.heard),
        f"{player(reference_S, REFERENCE_RATE_HZ)}<br>{html.escape(item.answer.text)}" + _heard(row.reference),
    ]
    return "<tr>" + "".join(f"<td>{column}</td>" for column in columns) + "</tr>"


def _heard(heard: Heard | None) -> str:
    if heard is None:
        return ""
    lines = [f"heard ({name}): {html.escape(getattr(heard, name))}" for name in ("loop", "open")]
    return f"<br><small>{'<br>'.join(lines)}<br>DNSMOS {heard.quality.overall:.2f}</small>"


def player(wav_S: np.ndarray | None, sample_rate_hz: int) -> str:
    """Controls that play mono float32 audio [S], which they hold, without loss."""
    if wav_S is None or not len(wav_S):
        return "<i>no audio</i>"
    encoded = io.BytesIO()
    soundfile.write(encoded, np.clip(wav_S, -1.0, 1.0), sample_rate_hz, format="FLAC", subtype="PCM_16")
    source = base64.b64encode(encoded.getvalue()).decode()
    return f"<audio controls preload=none src='data:audio/flac;base64,{source}'></audio>"
