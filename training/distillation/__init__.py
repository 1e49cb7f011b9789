"""Distillation of language and speech models into a speech tokenizer, after DM-Codec (arXiv 2410.15017).

    answers + transcripts -> teachers, word times -> Targets (cached on disk) -> Distillation(features, targets)

A stage prepares `CorpusTargets` once, cuts from them what each crop of a batch needs, and adds the losses to its own.
"""

from __future__ import annotations

from .alignment import Aligner, TimedWord, Unusable, given_times
from .losses import Distillation, cosine_by_dimension, cosine_by_step
from .options import DistillationOptions
from .targets import CorpusTargets, Targets, TimedVectors, prepare_targets
from .teachers import SpeechTeacher, TextTeacher

__all__ = [
    "Aligner",
    "CorpusTargets",
    "Distillation",
    "DistillationOptions",
    "SpeechTeacher",
    "Targets",
    "TextTeacher",
    "TimedVectors",
    "TimedWord",
    "Unusable",
    "cosine_by_dimension",
    "cosine_by_step",
    "given_times",
    "prepare_targets",
]
