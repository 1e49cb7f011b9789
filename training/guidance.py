"""Guidance distilled into a model: a student gives in one pass what its teacher gives in two.

Shapes: H hidden width, D latent dimension, N flattened target positions.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from flowomni.heads import FlowHead, HeadLoss
from flowomni.losses import Loss
from flowomni.modeling import FlowOmniModel
from flowomni.streams import Streams


class GuidedStudent(nn.Module):
    """Trains `student` to give, with its condition alone, the velocity that `teacher` gives with guidance.

    Both read the same perturbed streams, and are compared at the same points between noise and real latents; words and
    speech states are learned from data as ever. The idea is CALM's (arXiv 2509.06926), which guides what the backbone
    gives and distils that; here the velocity is guided and taught, and the loss reaches whatever trains.

    The teacher is no part of this module: it is not saved, trained, averaged or exchanged between processes.

    Args:
        student: a model whose head has guidance built in (`SpeechHead.with_guidance`).
        teacher: the model it comes from.
        scale: of the guidance.
    """

    def __init__(self, student: FlowOmniModel, teacher: FlowOmniModel, scale: float):
        super().__init__()
        self.student, self.scale = student, scale
        self._beside = (teacher.requires_grad_(False).eval(),)  # in a tuple, where no module looks for its parts

    @property
    def teacher(self) -> FlowOmniModel:
        return self._beside[0]

    def forward(self, streams: Streams, generator: torch.Generator | None = None) -> dict[str, Loss]:
        """As the model's, with the head's loss against the guided teacher; "speech/guidance" is that error alone."""
        return self.student(streams, generator, self._head_loss)

    def _head_loss(
        self,
        streams: Streams,
        hidden_NH: Tensor,
        target_ND: Tensor,
        row_N: Tensor,
        generator: torch.Generator | None,
    ) -> HeadLoss:
        head, teacher_head = self.student.head, self.teacher.head
        assert isinstance(head, FlowHead) and isinstance(teacher_head, FlowHead)
        if self.teacher.device != hidden_NH.device:
            nn.Module.to(self.teacher, hidden_NH.device)
        with torch.no_grad():
            guided = teacher_head.guided(self.teacher.conditions(streams), self.scale)
        return head.loss(hidden_NH, target_ND, row_N, generator, guided)
