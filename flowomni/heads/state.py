"""The speech-state head: which state (pad, start, generating, stop) the speech stream takes at the next step.

Shapes: N target positions, B rows, H hidden width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..losses import Loss
from ..streams import SpeechState


class SpeechStateHead(nn.Module):
    """A linear classifier over the four speech states.

    Args:
        hidden_size: H.
        stop_weight: weight of the stop class in the loss; stop is one step per answer and easily missed.
    """

    def __init__(self, hidden_size: int, stop_weight: float = 1.0):
        super().__init__()
        self.classify = nn.Linear(hidden_size, len(SpeechState))
        self.stop_weight = stop_weight

    def loss(self, hidden_NH: Tensor, state_N: Tensor) -> Loss:
        """Summed weighted cross-entropy; the count is the number of targets."""
        losses_N = F.cross_entropy(self.classify(hidden_NH).float(), state_N, reduction="none")
        weight_N = torch.where(state_N == SpeechState.STOP, self.stop_weight, 1.0)
        return Loss((losses_N * weight_N).sum(), torch.tensor(len(state_N), device=state_N.device))

    def stop_probability(self, hidden_BH: Tensor) -> Tensor:
        """Probability [B] that speech stops now, given that it either goes on or stops."""
        logits = self.classify(hidden_BH.to(self.classify.weight.dtype)).float()
        pair = torch.stack([logits[:, SpeechState.GENERATING], logits[:, SpeechState.STOP]], dim=-1)
        return pair.softmax(-1)[:, 1]
