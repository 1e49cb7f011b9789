"""What differs between the engines that accelerate starts: one process, DDP, FSDP2, DeepSpeed ZeRO-1, 2 and 3.

ZeRO-3 and FSDP2 cut every parameter into one piece per process ("sharded"). What reads whole parameters outside of a
forward pass (evaluation, saving) then gets a copy of the stage on the main process, with gathered weights.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, DistributedType, InitProcessGroupKwargs
from torch import nn
from transformers.integrations import unset_hf_deepspeed_config
from transformers.modeling_layers import GradientCheckpointingLayer

from .ema import Ema
from .stages.base import Stage


def make_accelerator(mixed_precision: str, clip_norm: float) -> Accelerator:
    """The accelerator for the engine that `accelerate launch` chose.

    Raises:
        ValueError: DeepSpeed with fp16, whose loss scale the loop does not share; FSDP without GPUs.
    """
    # a batch of one task leaves parts of the model unused (nothing heard, nothing spoken), other ones on each process
    handlers: list[Any] = [DistributedDataParallelKwargs(find_unused_parameters=True)]
    with_deepspeed = os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"
    if not with_deepspeed:
        # without a GPU, accelerate sees one process where several were started, unless it is told of CPUs
        num_started = int(os.environ.get("WORLD_SIZE", "1"))
        fsdp = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
        cpu = num_started > 1 and not torch.cuda.is_available() and not fsdp
        accelerator = Accelerator(cpu=cpu, mixed_precision=mixed_precision, kwargs_handlers=handlers)
        if accelerator.num_processes != num_started:
            raise ValueError("FSDP needs GPUs, and there are none: use two_cpu of configs/accelerate")
        return accelerator
    if mixed_precision == "fp16":
        raise ValueError("mixed_precision is 'fp16', which does not go with DeepSpeed here: use 'bf16'")
    if not torch.cuda.is_available():
        import deepspeed.ops

        handlers.append(InitProcessGroupKwargs(backend="gloo"))  # accelerate would see one process without it
        # an all-reduce of its own between CPUs, which would be compiled for a minute at the first start; gloo has one
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # DeepSpeed's own autocast keeps float32 weights, as the other engines do; its bf16 mode would also cast buffers
    accelerator = Accelerator(mixed_precision="no", kwargs_handlers=handlers)
    unset_hf_deepspeed_config()  # stages build whole models; the engine takes them apart
    config = accelerator.state.deepspeed_plugin.deepspeed_config
    config["train_micro_batch_size_per_gpu"] = 1  # stages make their batches; here it is only a number to show
    config["gradient_clipping"] = clip_norm
    # parameters that stay whole would not see the averages that `Ema.applied` puts into the pieces
    config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    config["torch_autocast"] = {"enabled": mixed_precision == "bf16", "dtype": "bfloat16"}
    return accelerator


def prepare(accelerator: Accelerator, module: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[Any, Any]:
    """The module and its optimizer as the engine wraps them.

    FSDP2 cuts up one transformer layer after the other, whatever family it is of, and the rest in one piece: accelerate
    would take the embeddings out of that, which torch refuses where the output embeddings share their weight.
    """
    if accelerator.distributed_type != DistributedType.FSDP:
        return accelerator.prepare(module, optimizer)
    layers = {type(part).__name__ for part in module.modules() if isinstance(part, GradientCheckpointingLayer)}
    accelerator.state.fsdp_plugin.transformer_cls_names_to_wrap = sorted(layers)
    object.__setattr__(module, "get_input_embeddings", lambda: None)
    try:
        return accelerator.prepare(module, optimizer)
    finally:
        object.__delattr__(module, "get_input_embeddings")


def engine_name(accelerator: Accelerator) -> str:
    """What a checkpoint's files depend on: "plain" ones are one kind with any number of processes."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        stage = accelerator.state.deepspeed_plugin.zero_stage
        return f"DeepSpeed ZeRO-{stage} with {accelerator.num_processes} processes"
    if accelerator.distributed_type == DistributedType.FSDP:
        return f"FSDP with {accelerator.num_processes} processes"
    return "plain"


def is_sharded(accelerator: Accelerator) -> bool:
    """Whether a parameter is a piece of itself on each process."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return accelerator.state.deepspeed_plugin.zero_stage == 3
    return accelerator.distributed_type == DistributedType.FSDP


def innermost(optimizer: Any) -> torch.optim.Optimizer:
    """The torch optimizer, whose learning rate counts, inside the wrappers of accelerate and DeepSpeed."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


class Whole:
    """Gives the main process a stage whose module has whole, averaged weights.

    Args:
        stage, module: the stage, and its module as the engine wrapped it.
        make: builds the stage anew; called at most once, on the main process, for sharded engines.
    """

    def __init__(self, stage: Stage, module: nn.Module, ema: Ema, accelerator: Accelerator, make: Callable[[], Stage]):
        self.stage, self.module, self.ema, self.accelerator, self.make = stage, module, ema, accelerator, make
        self._copy: Stage | None = None

    @contextmanager
    def stage_with_averages(self) -> Iterator[Stage | None]:
        """The stage in evaluation mode on the main process, None on others; to be entered by all processes."""
        main = self.accelerator.is_main_process
        if is_sharded(self.accelerator):
            with self.ema.applied():
                state = self.accelerator.get_state_dict(self.module)
            if main:
                self._copy = self._copy or self.make()
                self._copy.module.load_state_dict(state)
                self._copy.module.to(self.accelerator.device).eval()
            with torch.no_grad():
                yield self._copy
        elif main:
            self.stage.module.eval()
            with self.ema.applied(), torch.no_grad():
                yield self.stage
            self.stage.module.train()
        else:
            yield None
