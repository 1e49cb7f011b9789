"""Every bad line of a manifest, its totals, and a histogram of its turns' durations: `training.prepare --check`."""

from __future__ import annotations

import difflib
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from flowomni.audio import AudioError
from flowomni.build import load_text_tokenizer

from .manifest import LINE_KEYS, TURN_KEYS, Conversation, file_seconds, manifest_file, parse_line
from .recordings import Clip, Recording, read_recording

BARS = 40
NUM_BINS = 12
SLACK_SEC = 0.05  # durations in a manifest are rounded


@dataclass
class Report:
    """What is in a manifest.

    Attributes:
        path: of the manifest.
        problems: line number and reason, in order.
        conversations, turns, seconds: by split; by split and role; by split and role, of recordings.
        durations: seconds of every recording.
        unread: keys that nothing reads, with the number of lines or turns that have them.
    """

    path: Path
    problems: list[tuple[int, str]] = field(default_factory=list)
    conversations: Counter[str] = field(default_factory=Counter)
    turns: Counter[tuple[str, str]] = field(default_factory=Counter)
    seconds: defaultdict[tuple[str, str], float] = field(default_factory=lambda: defaultdict(float))
    durations: list[float] = field(default_factory=list)
    unread: Counter[str] = field(default_factory=Counter)

    def lines(self) -> Iterator[str]:
        """The report for people: bad lines, totals, histogram, keys that nothing reads."""
        yield from (f"{self.path}:{number}: {reason}" for number, reason in self.problems)
        yield f"{'split':8} {'conversations':>13} {'user turns':>11} {'hours':>8} {'assistant turns':>16} {'hours':>8}"
        for split in sorted(self.conversations):
            user, assistant = (split, "user"), (split, "assistant")
            yield (
                f"{split:8} {self.conversations[split]:>13,} {self.turns[user]:>11,} {self.seconds[user] / 3600:>8.2f}"
                f" {self.turns[assistant]:>16,} {self.seconds[assistant] / 3600:>8.2f}"
            )
        yield from histogram(self.durations)
        for name, count in sorted(self.unread.items()):
            known = LINE_KEYS if name.startswith("line.") else TURN_KEYS
            near = difflib.get_close_matches(name.partition(".")[2], known, n=1, cutoff=0.7)
            yield f"nothing reads {name} ({count:,} times)" + (f": did you mean {near[0]}?" if near else "")
        bad = len({number for number, _ in self.problems})
        good = sum(self.conversations.values())
        yield f"{good:,} conversations are good, {bad:,} lines are bad" if bad else f"{good:,} conversations, all good"


def histogram(durations: Sequence[float]) -> Iterator[str]:
    """Durations in bins of equal width as lines of text; the last bin takes whatever is longer than the 99th part."""
    if not durations:
        return
    ordered = sorted(durations)
    width = max(ordered[(len(ordered) * 99) // 100 - 1 if len(ordered) > 100 else -1] / NUM_BINS, 1e-3)
    counts = Counter(min(int(seconds / width), NUM_BINS - 1) for seconds in ordered)
    yield f"durations of {len(ordered):,} recordings: {ordered[0]:.2f} to {ordered[-1]:.2f} s"
    for index in range(NUM_BINS):
        end = f"{(index + 1) * width:7.2f} s" if index < NUM_BINS - 1 else "  longer "
        bar = "#" * round(BARS * counts[index] / max(counts.values()))
        yield f"{index * width:8.2f} - {end} {counts[index]:>9,} {bar}".rstrip()


def check_manifest(path: str | Path, llm: str | None = None, num_workers: int = 2) -> Report:
    """Read every line, and every recording from start to end.

    Args:
        path: a manifest, or the folder that holds manifest.jsonl.
        llm: folder or Hub id whose text tokenizer must be able to write the text, or None.
        num_workers: threads that decode audio.

    Raises:
        ValueError: there is no such manifest or text tokenizer.
    """
    path = manifest_file(path)
    encodes = text_check(load_text_tokenizer(llm)) if llm else None
    report = Report(path)
    lines = path.read_bytes().split(b"\n")
    ids: dict[str, int] = {}
    audio = _AudioCheck()
    with ThreadPoolExecutor(num_workers) as pool:
        numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
        found = pool.map(lambda line: _conversation(line[1], path.parent, audio, encodes), numbered)
        progress = tqdm(zip(numbered, found, strict=True), total=len(numbered), desc="check", unit="line", disable=None)
        for (number, line), (item, problems) in progress:
            if item is not None and item.id in ids:
                problems.append(f"id {item.id!r} is that of line {ids[item.id]} too")
            report.problems += [(number, problem) for problem in problems]
            if item is not None:
                ids.setdefault(item.id, number)
                _count_unread(json.loads(line), report.unread)
                if not problems:
                    _count(item, report)
    if not numbered:
        report.problems.append((1, "the manifest is empty"))
    return report


def _conversation(
    line: bytes, folder: Path, audio: _AudioCheck, encodes: Callable[[str], str] | None
) -> tuple[Conversation | None, list[str]]:
    try:
        item = parse_line(line.decode("utf-8"), folder)
    except UnicodeDecodeError as error:
        return None, [f"not UTF-8 text (byte {error.start})"]
    except ValueError as error:
        return None, [str(error)]
    problems = []
    for index, turn in enumerate(item.turns):
        where = f"turns[{index}]"
        if turn.audio is not None:
            problems += [f"{where}.{problem}" for problem in audio(turn.audio, turn.duration_sec)]
        lost = encodes(turn.text) if encodes and turn.text else ""
        if lost:
            problems.append(f"{where}.text: the text tokenizer cannot encode {lost}")
    return item, problems


class _AudioCheck:
    """What is wrong with a recording; a file that stands in many lines is decoded once."""

    def __init__(self) -> None:
        self.known: dict[Recording, str | float] = {}

    def __call__(self, recording: Recording, duration_sec: float) -> list[str]:
        if recording not in self.known:
            self.known[recording] = self._seconds(recording)
        found = self.known[recording]
        if isinstance(found, str):
            return [found]
        if abs(found - duration_sec) > SLACK_SEC + 0.01 * found:
            return [f"duration_sec is {duration_sec:g}, and the audio has {found:.3f} s"]
        return []

    def _seconds(self, recording: Recording) -> float | str:
        try:
            audio = read_recording(recording, 16_000)
            if isinstance(recording, Clip) and recording.end_sec is not None:
                whole_sec = file_seconds(recording.path, "audio")
                if recording.end_sec > whole_sec + SLACK_SEC:
                    return f"audio: it ends at {recording.end_sec:g} s, and {recording.path} has {whole_sec:.3f} s"
        except AudioError as error:
            return f"audio: {error}"
        return audio.source_sec


def text_check(tokenizer: Any) -> Callable[[str], str]:
    """A function from a text to what the tokenizer cannot write of it ("" if nothing): unknown or lost characters."""
    unknown = tokenizer.unk_token_id

    def lost(text: str) -> str:
        try:
            ids = tokenizer.encode(text, add_special_tokens=False)
        except (ValueError, TypeError, UnicodeEncodeError) as error:
            return f"{text!r} ({error})"
        if not ids:
            return f"{text!r} (no token is left of it)"
        if unknown is None or unknown not in ids:
            return ""
        # of the text's words those that are unknown on their own, or all of it
        words = [word for word in text.split() if unknown in tokenizer.encode(word, add_special_tokens=False)]
        return ", ".join(map(repr, words[:3])) or repr(text)

    return lost


def _count(item: Conversation, report: Report) -> None:
    report.conversations[item.split] += 1
    for turn in item.turns:
        report.turns[item.split, turn.role] += 1
        if turn.audio is not None:
            report.seconds[item.split, turn.role] += turn.duration_sec
            report.durations.append(turn.duration_sec)


def _count_unread(line: dict[str, Any], unread: Counter[str]) -> None:
    unread.update(f"line.{key}" for key in line if key not in LINE_KEYS)
    unread.update(f"turn.{key}" for turn in line["turns"] for key in turn if key not in TURN_KEYS)
