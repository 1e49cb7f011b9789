"""What the benchmarks share: bars, and sections that are run, printed and written."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch


@dataclasses.dataclass(frozen=True)
class Bar:
    """A promise: `value` on the right side of `limit`."""

    what: str
    value: float
    limit: float
    at_least: bool = False

    @property
    def met(self) -> bool:
        return self.value >= self.limit if self.at_least else self.value <= self.limit

    def __str__(self) -> str:
        words = "at least" if self.at_least else "at most"
        return f"{'met   ' if self.met else 'MISSED'} {self.what}: {self.value:.4g}, {words} {self.limit:g}"


Section = Callable[[argparse.Namespace], tuple[Any, list[Bar]]]


def bench(options: argparse.Namespace, sections: Mapping[str, Section], start: Callable[[], dict[str, Any]]) -> int:
    """Run sections on a number of threads, print their bars, write everything; 1 if a bar was missed.

    Args:
        options: `threads`, `only` (names of sections) and `json` (a file, or None).
        start: called first, with the threads set; what it gives is written too.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(options.threads)
    try:
        results: dict[str, Any] = {"options": vars(options), "torch": torch.__version__, **start()}
        bars: list[Bar] = []
        for name in options.only:
            results[name], some = sections[name](options)
            bars += some
    finally:
        torch.set_num_threads(before)
    print()
    for bar in bars:
        print(bar)
    results["bars"] = [dataclasses.asdict(bar) | {"met": bar.met} for bar in bars]
    if options.json:
        Path(options.json).write_text(json.dumps(results, indent=1, default=dataclasses.asdict) + "\n")
        print(f"wrote {options.json}")
    return 0 if all(bar.met for bar in bars) else 1
