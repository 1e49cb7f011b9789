"""Scores from pairs of texts, and how sure they are.

Every score here is a ratio of two sums over questions (errors over words, right answers over answers), kept by question
so that the questions can be drawn anew: the bootstrap.

Shape legend: N questions, R resamples.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

NUM_RESAMPLES = 2000


@dataclass(frozen=True, eq=False)
class WordErrors:
    """Word errors by question.

    Attributes:
        errors_N: substitutions + deletions + insertions, float64.
        words_N: words of the reference, float64.
    """

    errors_N: np.ndarray
    words_N: np.ndarray

    @property
    def rate(self) -> float:
        """Word error rate: all errors over all words of the references; 1 can be exceeded, by insertions."""
        return float(self.errors_N.sum() / max(1.0, self.words_N.sum()))


@dataclass(frozen=True)
class Interval:
    """A score with its 95 % interval; NaN where `num` is 0.

    Attributes:
        value: the score of the questions at hand.
        low, high: 2.5 % and 97.5 % quantiles over resampled questions.
        num: number of questions.
    """

    value: float
    low: float
    high: float
    num: int


def word_error_rate(references: Sequence[str], hypotheses: Sequence[str]) -> WordErrors:
    """Edit distance in words of each hypothesis from its reference (jiwer); texts are compared as they are.

    An empty reference is allowed: each word of its hypothesis is an insertion.

    Raises:
        ValueError: the two differ in length.
    """
    import jiwer

    if len(references) != len(hypotheses):
        raise ValueError(f"{len(references)} references, but {len(hypotheses)} hypotheses: give one for each")
    errors_N, words_N = np.zeros(len(references)), np.zeros(len(references))
    for index, (reference, hypothesis) in enumerate(zip(references, hypotheses, strict=True)):
        words_N[index] = len(reference.split())
        if words_N[index]:
            counts = jiwer.process_words(reference, hypothesis)
            errors_N[index] = counts.substitutions + counts.deletions + counts.insertions
        else:
            errors_N[index] = len(hypothesis.split())
    return WordErrors(errors_N, words_N)


def right_share(
    references: Sequence[str], texts: Sequence[str], words: Collection[str]
) -> tuple[np.ndarray, np.ndarray]:
    """How many of certain words, such as digits, each text has right: (right_N, words of the references_N).

    All other words are passed over. Right are the reference's words less the edits to reach them, at least 0: a digit
    too many costs as much as a wrong one.
    """
    kept = [[" ".join(word for word in text.split() if word in words) for text in each] for each in (references, texts)]
    found = word_error_rate(*kept)
    return np.maximum(0.0, found.words_N - found.errors_N), found.words_N


def bootstrap_interval(
    sums_N: np.ndarray,
    counts_N: np.ndarray | None = None,
    *,
    minus: tuple[np.ndarray, np.ndarray] | None = None,
    seed: int = 0,
) -> Interval:
    """`sums_N.sum() / counts_N.sum()` with its 95 % percentile bootstrap interval over questions.

    Law: a pure function of its arguments.

    Args:
        sums_N, counts_N: the ratio by question; counts of 1 by default, which makes it a mean.
        minus: (sums_N, counts_N) of a second ratio on the same questions, to be subtracted. Both are resampled
            together, so that what is hard about a question for both cancels.
    """
    ratios = [(sums_N, np.ones(len(sums_N)) if counts_N is None else counts_N)] + ([minus] if minus else [])
    num = len(sums_N)
    assert all(len(part) == num for ratio in ratios for part in ratio), "one value a question"
    if num == 0 or any(counts.sum() == 0 for _, counts in ratios):
        return Interval(float("nan"), float("nan"), float("nan"), 0)
    draws_RN = draws(num, seed)
    with np.errstate(invalid="ignore"):
        scores_R = [(draws_RN @ sums) / (draws_RN @ counts) for sums, counts in ratios]
    difference_R = scores_R[0] - scores_R[1] if minus else scores_R[0]
    low, high = np.nanquantile(difference_R[1:], [0.025, 0.975])
    return Interval(float(difference_R[0]), float(low), float(high), num)


@lru_cache(maxsize=8)  # all scores of a group of questions share it
def draws(num: int, seed: int) -> np.ndarray:
    """How often each resample draws each question; the first row is the questions as they are."""
    draws_RN = np.random.default_rng(seed).multinomial(num, np.full(num, 1 / num), NUM_RESAMPLES)
    return np.concatenate([np.ones((1, num)), draws_RN])
