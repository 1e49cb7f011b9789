"""What a training stage is: a module with losses, batches that are a pure function of their index, an evaluation."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from flowomni.losses import Loss

__all__ = ["Loss", "Stage", "rng_for"]


def rng_for(*keys: int) -> np.random.Generator:
    """A generator that depends on nothing but `keys` (seed, step, place of a batch, ...)."""
    return np.random.default_rng(np.random.SeedSequence([k & 0xFFFFFFFF for k in keys]))


class Stage(ABC):
    """One stage of training. The loop in `training.train` knows nothing else about what it trains.

    Built as `cls(options, seed)`. A batch is anything with `.to(device)`.

    Attributes:
        Options: the dataclass of this stage's options.
        module: what trains; `module(batch, generator)` returns a dict of `Loss` by part.
        weights: weight of each loss part that is trained on; other parts are only logged.
    """

    Options: ClassVar[type]
    module: Any  # an nn.Module; each stage knows its own class
    weights: dict[str, float]

    @abstractmethod
    def batch(self, index: int, rank: int, world_size: int) -> Any:
        """Micro-batch `index` of process `rank`: a pure function of the seed and of index * world_size + rank.

        That makes resuming exact, and several processes see what one sees in turn.
        """

    def names(self, index: int, rank: int, world_size: int) -> list[str]:
        """Ids of the items in that micro-batch, for messages; none where items have no names."""
        return []

    def prepare_for_engine(self, engine: str) -> None:
        """Called before DeepSpeed or FSDP takes the module.

        They cut up its parameters, which only its forward pass puts together (whatever else batches need of the module
        is to be copied), and they need every process to call the same layers in every batch.

        Raises:
            ValueError: this stage does not see to that.
        """
        raise ValueError(
            f"{type(self).__name__} does not train with {engine}: use one_cpu, two_cpu, ddp or multi_node of "
            "configs/accelerate"
        )

    @abstractmethod
    def counts(self, batch: Any) -> dict[str, float]:
        """Number of targets of each loss part in `batch`, known before the forward pass."""

    @abstractmethod
    def num_tokens(self, batch: Any) -> int:
        """Size of `batch` for the throughput display: sequence positions, or mel frames."""

    def filled(self, batch: Any) -> dict[str, tuple[int, int]]:
        """Name of each share of padding that is logged -> positions that hold something, and all positions."""
        return {}

    @abstractmethod
    def evaluate(self, folder: Path, step: int) -> dict[str, float]:
        """Metrics on held-out data. Writes what can be listened to or looked at into `folder`.

        The module is in evaluation mode and holds the averaged (EMA) weights.
        """

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Write the artefact of this stage, loadable with `from_pretrained`."""
