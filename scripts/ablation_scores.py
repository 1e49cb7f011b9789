"""What a judged run scored, cell against cell: every number with its interval, differences paired.

Shapes: R resamples, T training seeds, N questions, P the sums that a score is made of. Samples of one question (several
seeds of the sampling) are summed: they belong to their question.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from flowomni.evaluation import Interval
from flowomni.evaluation.metrics import draws

EARLY_SHARE, EARLY_SHARE_SURELY = 0.75, 0.5  # of the reference's duration
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Score:
    """One score of an answer.

    Attributes:
        heading, factor, digits: how it is shown.
        parts: of one answer, what is summed over answers; None where the answer has no such score.
        value: of the sums [P, ..]; by default their ratio.
        better: "lower", "higher", or "" where neither is.
    """

    heading: str
    factor: float
    digits: int
    parts: Callable[[Row], tuple[float, ...] | None]
    better: str
    value: Callable[[np.ndarray], np.ndarray] = lambda sums_P: sums_P[0] / sums_P[1]


def _mean(key: str) -> Callable[[Row], tuple[float, ...] | None]:
    return lambda row: None if row.get(key) is None else (float(row[key]), 1.0)


def _ratio(over: str, under: str) -> Callable[[Row], tuple[float, ...] | None]:
    return lambda row: (float(row[over]), float(row[under]))


def _lost(sums_P: np.ndarray) -> np.ndarray:
    """Word information lost, from hits, words of the references, words that were heard."""
    return 1.0 - sums_P[0] ** 2 / np.maximum(1.0, sums_P[1] * sums_P[2])


def ended_early(row: Row) -> float | None:
    """Whether speech stopped before its end; None where the answer's words are not the reference's.

    Early is what is shorter than half of the reference, or than three quarters of it and without its last word.
    """
    if not row["text"] or row["text"] != row["right"] or not row["reference_sec"]:
        return None
    share = row["answer_sec"] / row["reference_sec"]
    lacks = row["text"].split()[-1] not in row["heard"].split()
    return float(row["stopped"] and (share < EARLY_SHARE_SURELY or (share < EARLY_SHARE and lacks)))


def duration_error_sec(row: Row) -> float | None:
    """How far its duration is from the reference's; None where its words are not the reference's."""
    same = row["text"] == row["right"] and row["reference_sec"]
    return abs(row["answer_sec"] - row["reference_sec"]) if same else None


def _maybe(function: Callable[[Row], float | None]) -> Callable[[Row], tuple[float, ...] | None]:
    def parts(row: Row) -> tuple[float, ...] | None:
        value = function(row)
        return None if value is None else (value, 1.0)

    return parts


SCORES: dict[str, Score] = {
    "accuracy": Score("text right %", 100, 1, lambda row: (float(row["text"] == row["right"]), 1.0), "higher"),
    "wer_own": Score("WER own %", 100, 1, _ratio("own_errors", "own_words"), "lower"),
    "wer_right": Score("WER right %", 100, 1, _ratio("right_errors", "right_words"), "lower"),
    "wil": Score("WIL %", 100, 1, lambda row: (row["hits"], row["right_words"], row["heard_words"]), "lower", _lost),
    "dnsmos": Score("DNSMOS", 1, 2, _mean("dnsmos"), "higher"),
    "speaker": Score("speaker", 1, 3, _mean("speaker"), "higher"),
    "early": Score("early stop %", 100, 1, _maybe(ended_early), "lower"),
    "never": Score("no stop %", 100, 1, lambda row: (float(not row["stopped"]), 1.0), "lower"),
    "duration": Score("duration off s", 1, 2, _maybe(duration_error_sec), "lower"),
    "diversity": Score("diversity", 1, 3, _mean("distance"), ""),
}
VOICE_SCORES: dict[str, Score] = {
    "wer_right": SCORES["wer_right"],
    "mel_distance": Score("mel distance", 1, 3, _mean("mel_distance"), "lower"),
}


# ------------------------------------------------------------------------------------------------------------ intervals


def sums_of(score: Score, by_seed: Mapping[int, Sequence[Row]], seeds: Sequence[int], ids: Sequence[str]) -> np.ndarray:
    """The score's sums [P, T, N] by training seed and question; zeros where an answer has no such score."""
    places = {name: index for index, name in enumerate(ids)}
    found: np.ndarray | None = None
    for place, seed in enumerate(seeds):
        for row in by_seed[seed]:
            parts = score.parts(row)
            if parts is None:
                continue
            if found is None:
                found = np.zeros((len(parts), len(seeds), len(ids)))
            found[:, place, places[row["id"]]] += parts
    return np.zeros((2, len(seeds), len(ids))) if found is None else found


def interval_of(
    score: Score, sums_PTN: np.ndarray, minus_PTN: np.ndarray | None = None, relative: bool = False, seed: int = 0
) -> Interval:
    """The score with its 95 % percentile bootstrap interval over questions and training seeds, both drawn anew.

    Law: a pure function of its arguments.

    Args:
        minus_PTN: of the cell to compare with, on the same seeds and questions: the same draws count for both, so that
            what is hard about a question, or about an order of the data, cancels.
        relative: the difference as a share of the other cell's score.
    """
    _, num_seeds, num_questions = sums_PTN.shape
    nothing = Interval(float("nan"), float("nan"), float("nan"), 0)
    both = [sums_PTN] if minus_PTN is None else [sums_PTN, minus_PTN]
    if not num_seeds or not num_questions or any(not part[1:].sum() for part in both):
        return nothing
    question_RN, seed_RT = draws(num_questions, seed), draws(num_seeds, seed + 1)
    with np.errstate(invalid="ignore", divide="ignore"):
        values = [score.value(np.einsum("rt,ptn,rn->pr", seed_RT, part, question_RN, optimize=True)) for part in both]
        value_R = values[0] if minus_PTN is None else values[0] - values[1]
        if relative:
            value_R = value_R / values[1]
    value_R = np.where(np.isfinite(value_R), value_R, np.nan)
    if np.isnan(value_R[0]) or np.isnan(value_R[1:]).mean() > 0.05:
        return nothing  # a rate over next to nothing: no interval, so no number
    low, high = np.nanquantile(value_R[1:], [0.025, 0.975])
    return Interval(float(value_R[0]), float(low), float(high), num_questions)


@dataclass(frozen=True)
class Compared:
    """A cell's score in a condition: itself, and less the reference cell's; `num` 0 where there is none.

    Attributes:
        seeds: training seeds of the value; those of the difference are the ones that both cells have.
    """

    value: Interval
    difference: Interval | None
    seeds: tuple[int, ...]
    paired_seeds: tuple[int, ...]


def compare(
    score: Score, own: Mapping[int, Sequence[Row]], reference: Mapping[int, Sequence[Row]] | None, seed: int = 0
) -> Compared:
    """A cell's score and its paired difference from the reference cell (None: it is the reference)."""
    ids = list(dict.fromkeys(row["id"] for rows in own.values() for row in rows))
    seeds = tuple(sorted(own))
    value = interval_of(score, sums_of(score, own, seeds, ids), seed=seed)
    if reference is None:
        return Compared(value, None, seeds, ())
    shared = tuple(sorted(set(own) & set(reference)))
    return Compared(value, difference(score, own, reference, seed=seed), seeds, shared)


def difference(
    score: Score,
    own: Mapping[int, Sequence[Row]],
    other: Mapping[int, Sequence[Row]],
    relative: bool = False,
    seed: int = 0,
) -> Interval:
    """Own less other, on the training seeds and the questions that both have."""
    shared = sorted(set(own) & set(other))
    asked = [dict.fromkeys(row["id"] for seed in shared for row in rows[seed]) for rows in (own, other)]
    ids = [name for name in asked[0] if name in asked[1]]
    parts = [
        sums_of(score, {s: [row for row in rows[s] if row["id"] in ids] for s in shared}, shared, ids)
        for rows in (own, other)
    ]
    return interval_of(score, parts[0], parts[1], relative, seed)


def excludes_zero(found: Interval) -> bool:
    """Whether there is an interval, and zero lies outside it."""
    return bool(found.num) and (found.low > 0 or found.high < 0)
