"""What can be chosen about distillation."""

from __future__ import annotations

from dataclasses import dataclass

_CHOICES = {
    "placement": ("aligned", "padded"),
    "silence": ("masked", "zero"),
    "layers": ("mean", "last"),
    "objective": ("dimension", "step"),
    "text_levels": ("first", "all"),
    "speech_levels": ("first", "all"),
}


@dataclass(frozen=True)
class DistillationOptions:
    """Options of distillation. One teacher alone is DM-Codec's LM-guided or SM-guided way, both its combined way.

    Attributes:
        cache: folder for word times and targets, which are computed once; several runs may share it.
        text_teacher: folder or Hub name of any Hugging Face text model, run on the transcripts; "" for none.
        speech_teacher: folder or Hub name of a Whisper, or of a model on waves such as HuBERT; "" for none.
        placement: of the text targets: "aligned" (each word where it is spoken, as the manifest or the aligner says) or
            "padded", as in DM-Codec's code (one text token per speech token from the start, then what the model gives
            for padding).
        center: subtract from the targets their mean over time and all answers. As they are (DM-Codec's way), a student
            that is the same for every token comes to a "dimension" loss of 0.49 where 0.69 is no likeness, 0.31 all.
        silence: where no word is spoken, aligned text targets are "masked" (no loss) or "zero" (a target of zero).
        layers: "mean" of all hidden states (the best in DM-Codec's table 6), or the "last" one.
        objective: "dimension" (-log sigmoid of the cosine over time, per dimension: DM-Codec) or "step" (1 - cosine
            over dimensions, per speech token).
        text_levels, speech_levels: which levels of a residual quantiser learn: the "first", or "all" together. The
            defaults are the best of DM-Codec's table 4.
        weight: of distillation beside the stage's other losses (DM-Codec: 120 beside its own).
        text_weight, speech_weight: shares within it, divided by their sum; equal shares are DM-Codec's mean.
        least_score: a transcript that fits its audio worse than this is taken for a wrong one; see `Aligner`.
    """

    cache: str
    text_teacher: str = ""
    speech_teacher: str = ""
    placement: str = "aligned"
    center: bool = False
    silence: str = "masked"
    layers: str = "mean"
    objective: str = "dimension"
    text_levels: str = "first"
    speech_levels: str = "all"
    weight: float = 1.0
    text_weight: float = 1.0
    speech_weight: float = 1.0
    least_score: float = -2.2

    def __post_init__(self) -> None:
        for name, values in _CHOICES.items():
            if getattr(self, name) not in values:
                raise ValueError(
                    f"distillation.{name} is {getattr(self, name)!r}; it must be {' or '.join(map(repr, values))}"
                )
        if not self.cache:
            raise ValueError("distillation.cache is empty: name a folder for the targets")
        if not self.teachers:
            raise ValueError(
                "distillation has neither text_teacher nor speech_teacher: give the path of one, or leave it out"
            )
        if self.weight < 0:
            raise ValueError(f"distillation.weight is {self.weight}; it must not be negative")
        for kind in self.teachers:
            if getattr(self, f"{kind}_weight") <= 0:
                raise ValueError(
                    f"distillation.{kind}_weight is {getattr(self, f'{kind}_weight')}, but there is a {kind}_teacher: "
                    f"give it a weight above 0, or leave {kind}_teacher empty"
                )
        if self.silence == "zero" and (self.objective == "step" or self.placement == "padded"):
            raise ValueError(
                f"distillation.silence is 'zero', which has no meaning with objective {self.objective!r} and placement "
                f"{self.placement!r}: a zero target has no direction, and padded targets have no silence; use 'masked'"
            )

    @property
    def teachers(self) -> tuple[str, ...]:
        """The kinds of teacher there are: "text", "speech" or both."""
        return tuple(kind for kind in ("text", "speech") if getattr(self, f"{kind}_teacher"))
