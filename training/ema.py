"""Exponential moving average of trainable parameters, or of a process's pieces of them (`training.engines`)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


def local(parameter: Tensor) -> Tensor:
    """The piece of a parameter that this process holds, which is all of it but for FSDP2 and ZeRO-3; a view."""
    if isinstance(parameter, DTensor):
        return parameter.to_local()
    return getattr(parameter, "ds_tensor", parameter)  # ZeRO-3


class Ema:
    """Float32 averages of the trainable parameters of `module`: average += (1 - decay) * (parameter - average).

    Args:
        decay: 0 turns averaging off (the average is the parameter). Early on, min(decay, (1 + n) / (10 + n)) is used.
    """

    def __init__(self, module: nn.Module, decay: float):
        self.decay = decay
        self.num_updates = 0
        self.parameters = {n: p for n, p in module.named_parameters() if p.requires_grad}
        self.averages = {n: local(p).detach().float().clone() for n, p in self.parameters.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Move the averages towards the parameters; call once after every optimizer step."""
        self.num_updates += 1
        decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        averages = list(self.averages.values())
        current = [local(p).detach().float() for p in self.parameters.values()]
        torch._foreach_lerp_(averages, current, 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within the context the module holds the averages; afterwards the trained weights again."""
        kept = {n: local(p).detach().clone() for n, p in self.parameters.items()}
        self._copy(self.averages)
        try:
            yield
        finally:
            self._copy(kept)

    @torch.no_grad()
    def _copy(self, values: dict[str, Tensor]) -> None:
        for name, parameter in self.parameters.items():
            local(parameter).copy_(values[name])

    def state_dict(self) -> dict[str, object]:
        return {"num_updates": self.num_updates, "averages": self.averages}

    def load_state_dict(self, state: dict) -> None:
        self.num_updates = state["num_updates"]
        for name, value in state["averages"].items():
            self.averages[name].copy_(value)
