"""What `accelerate launch` starts in tests: a training run that is cut off, and goes on, in one pair of processes."""

from __future__ import annotations

import os
import sys
from typing import Any

from accelerate.state import PartialState
from accelerate.utils import DistributedType

from training.config import parse
from training.stages import STAGES
from training.stages.base import Stage
from training.train import RunOptions, train


class PowerCut(Exception):
    pass


def cut_off(stage_class: type[Stage], at: int) -> type[Stage]:
    """The stage, dying when micro-batch `at` is asked for."""

    class Dying(stage_class):  # type: ignore[misc, valid-type]
        def batch(self, index: int, rank: int, world_size: int) -> Any:
            if index >= at:
                raise PowerCut
            return super().batch(index, rank, world_size)

    return Dying


def main(config: str, cut_at: int) -> None:
    """Train what the file says up to micro-batch `cut_at` of this process, then again to its end."""
    parsed = parse(RunOptions, {name: cls.Options for name, cls in STAGES.items()}, ["--config", config])
    stage_class = STAGES[parsed.run.stage]
    try:
        train(parsed.run, parsed.options, cut_off(stage_class, cut_at))
        raise AssertionError("the run was not cut off")
    except PowerCut:
        pass
    train(parsed.run, parsed.options, stage_class)


def take_cpus_for_gpus() -> None:
    """accelerate has FSDP on GPUs alone; torch has it on CPUs too, over gloo."""
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    PartialState._prepare_backend = lambda *args, **kwargs: ("gloo", DistributedType.MULTI_GPU)


if __name__ == "__main__":
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        take_cpus_for_gpus()
    main(sys.argv[1], int(sys.argv[2]))
