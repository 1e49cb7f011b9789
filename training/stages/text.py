"""Stage `text`: a small language model of one's own learns the answers as text, before it hears or speaks.

Shapes: B batch, L positions, N targets.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM

from flowomni.configuration import LayoutConfig
from flowomni.layouts import Turn, TurnLayout
from flowomni.losses import Loss
from flowomni.streams import Streams, collate
from flowomni.strict import strict

from ..talk_text import FAMILIES, WORDS, Pair, number_words, sample_family, sample_pair, vocabulary
from ..text_tokenizer import build_text_tokenizer
from .base import Stage, rng_for


@dataclass
class TextOptions:
    """Options of stage `text`.

    Attributes:
        llm: a transformers config of a causal LM as a dict with "model_type"; vocabulary size and special ids are set
            from the text tokenizer.
        instructions: system text per task, see LayoutConfig.
        batch_size: conversations per micro-batch.
        families: relative frequency of the question families; empty takes the corpus's own. Text costs nothing, so what
            is hard to learn (arithmetic) can have most of it.
        speak_share: share of examples that repeat a given text, the text side of reading aloud.
        attention: "eager" is faster on CPUs for short sequences, "sdpa" elsewhere.
        num_eval: held-out questions at each evaluation.
    """

    llm: dict[str, Any]
    instructions: dict[str, str] = field(default_factory=lambda: LayoutConfig().instructions)
    batch_size: int = 256
    families: dict[str, float] = field(default_factory=dict)
    speak_share: float = 0.15
    attention: Literal["sdpa", "eager"] = "sdpa"
    num_eval: int = 1000

    def __post_init__(self) -> None:
        unknown = set(self.families) - set(FAMILIES)
        if unknown:
            raise ValueError(f"options.families has {sorted(unknown)}; known families: {', '.join(FAMILIES)}")


class _TextModel(nn.Module):
    """Cross-entropy of the targets of text-only streams."""

    def __init__(self, llm: nn.Module):
        super().__init__()
        self.llm = llm

    def correct(self, streams: Streams) -> tuple[Tensor, Tensor]:
        """Per target, whether the most likely id is right [N], and the row of each target [N]."""
        logits_NV, targets_N = self._logits(streams)
        return logits_NV.argmax(-1) == targets_N, streams.text_loss_BL[:, 1:].nonzero()[:, 0]

    def forward(self, streams: Streams, generator: torch.Generator | None = None) -> dict[str, Loss]:
        logits_NV, targets_N = self._logits(streams)
        loss = F.cross_entropy(logits_NV.float(), targets_N, reduction="sum")
        return {"text": Loss(loss, torch.tensor(len(targets_N)))}

    def _logits(self, streams: Streams) -> tuple[Tensor, Tensor]:
        # padding stands at the end, so a causal model needs no mask for the positions before it
        logits_BLV = self.llm(input_ids=streams.text_BL.clamp(min=0)).logits
        target_BL = streams.text_loss_BL[:, 1:]
        return logits_BLV[:, :-1][target_BL], streams.text_BL[:, 1:][target_BL]


class TextStage(Stage):
    """Question-and-answer pairs from the talk grammar; evaluation is exact match on the held-out pairs."""

    Options = TextOptions
    weights = {"text": 1.0}

    def __init__(self, options: TextOptions, seed: int):
        self.options, self.seed = options, seed
        layout = strict(LayoutConfig, {"instructions": options.instructions}, "options.instructions")
        words = {*vocabulary(), *" ".join(options.instructions.values()).lower().split()}
        self.text_tokenizer = build_text_tokenizer(words)
        eos = self.text_tokenizer.eos_token_id
        values = {k: v for k, v in options.llm.items() if k != "model_type"}
        config = AutoConfig.for_model(
            options.llm["model_type"],
            **values,
            vocab_size=len(self.text_tokenizer),
            eos_token_id=eos,
            bos_token_id=None,
            pad_token_id=self.text_tokenizer.pad_token_id,
        )
        self.module = _TextModel(AutoModelForCausalLM.from_config(config, attn_implementation=options.attention))
        self.layout = TurnLayout(layout, self.text_tokenizer, eos, 1, torch.zeros(1))

    def prepare_for_engine(self, engine: str) -> None:
        """Every batch calls every layer, and no batch needs the module."""

    def _example(self, rng: random.Random, split: str) -> tuple[str, Streams]:
        if split == "train" and rng.random() < self.options.speak_share:
            text = _reading(rng)
            return "speak", self.layout.example([Turn("user", text=text), Turn("assistant", text=text)], "speak")
        pair = self._pair(rng, split)
        while not pair.question:
            pair = self._pair(rng, split)
        turns = [Turn("user", text=pair.question), Turn("assistant", text=pair.answer)]
        return pair.family, self.layout.example(turns)

    def _pair(self, rng: random.Random, split: str) -> Pair:
        families = self.options.families
        if split != "train" or not families:
            return sample_pair(rng, split)
        return sample_family(rng.choices(list(families), list(families.values()))[0], rng, split)

    def batch(self, index: int, rank: int, world_size: int) -> Streams:
        rng = random.Random(int(rng_for(self.seed, index * world_size + rank).integers(2**62)))
        return collate([self._example(rng, "train")[1] for _ in range(self.options.batch_size)])

    def counts(self, batch: Streams) -> dict[str, float]:
        return {"text": batch.counts()["text"]}

    def num_tokens(self, batch: Streams) -> int:
        return int(batch.mask_BL.sum())

    def filled(self, batch: Streams) -> dict[str, tuple[int, int]]:
        return {"padding_share": (self.num_tokens(batch), batch.mask_BL.numel())}

    def evaluate(self, folder: Path, step: int) -> dict[str, float]:
        rng = random.Random(self.seed)
        rows = [self._example(rng, "test") for _ in range(self.options.num_eval)]
        right: dict[str, list[bool]] = {}
        for start in range(0, len(rows), 256):
            part = rows[start : start + 256]
            batch = collate([streams for _, streams in part]).to(self.module.llm.device)
            correct_N, row_N = self.module.correct(batch)
            for index, (family, _) in enumerate(part):
                # greedy decoding gives the whole answer exactly where every teacher-forced choice is right
                right.setdefault(family, []).append(bool(correct_N[row_N == index].all()))
        overall = [value for values in right.values() for value in values]
        return {"accuracy": sum(overall) / len(overall)} | {
            f"accuracy/{family}": sum(values) / len(values) for family, values in sorted(right.items())
        }

    def save(self, folder: Path) -> None:
        self.module.llm.save_pretrained(folder)
        self.text_tokenizer.save_pretrained(folder)


def _reading(rng: random.Random) -> str:
    """Something to read aloud: an answer, or a few words and numbers."""
    if rng.random() < 0.5:
        return sample_pair(rng, "train").answer
    return " ".join(
        number_words(rng.randrange(200)) if rng.random() < 0.2 else rng.choice(WORDS) for _ in range(rng.randint(1, 8))
    )
