"""Memory of a training step, measured, beside what `training.plan` says of the same options.

Shapes: B rows, L positions, D latent dimension, C Whisper mel bins, F Whisper mel frames.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import resource
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig

from flowomni.modeling import FlowOmniModel
from flowomni.streams import Streams
from scripts.training_steps import (
    ENCODER_STACK,
    FRAMES_PER_HEARD,
    ByPart,
    Shape,
    Step,
    speech_batch,
    tokenizer_config,
    total_loss,
    watched_parts,
    with_attention,
)
from training.ema import Ema
from training.parts import TrainsOptions, parts_of, set_trainable
from training.plan import TEMPLATE_TOKENS, TEXT_TOKENS_PER_SEC, Plan, plan
from training.stages.speech import PartsOptions, SpeechOptions
from training.train import RunOptions

NUM_STEPS = 2
PARTS_OF_PLAN = {  # as `watched_parts` and `parts_of` name them -> as the plan does
    "llm": "llm",
    "LLM": "llm",
    "text head": "llm",
    "output_blocks": "output blocks",
    "speech head": "head",
    "heads": "head",
    "state head": "state head",
    "encoder": "encoder",
    "projector": "projector",
}
# Tensors come from the system and go back to it one by one, so that the process is as large as what it holds.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


@dataclass(frozen=True)
class Case:
    """What is measured.

    Attributes:
        hears: the prompt is heard and the answer is text; else the prompt is text and the answer is spoken.
        rows: conversations of a micro-batch.
        sec: the longest audio of a conversation, which every row has.
    """

    shape: Shape
    hears: bool
    rows: int
    sec: float
    half: bool
    attention: str

    def options(self, folder: Path) -> tuple[RunOptions, SpeechOptions]:
        """Options of such a run; `folder` gets the configs of the parts."""
        llm = {k: v for k, v in self.shape.llm.items() if k != "model_type"}
        AutoConfig.for_model(self.shape.llm["model_type"], **llm).save_pretrained(folder / "llm")
        tokenizer_config().save_pretrained(folder / "tokenizer")
        parts = PartsOptions(
            llm=str(folder / "llm"),
            speech_tokenizer=str(folder / "tokenizer"),
            encoder=self.shape.encoder,
            encoder_stack=ENCODER_STACK,
            head=self.shape.head | {"objective": "cfm"},  # what self-distillation adds is not in the plan
            output_blocks=self.shape.output_blocks,
        )
        # what such a task gives no gradient has no optimizer state either
        unused = {"voice": "frozen"} if self.hears else {"encoder": "frozen", "projector": "frozen"}
        options = SpeechOptions(
            manifest="",
            parts=parts,
            trains=TrainsOptions(**unused),  # type: ignore[arg-type]
            tasks={"speech_to_text" if self.hears else "text_to_speech": 1.0},
            batch_size=self.rows,
            max_example_sec=self.sec,
            attention=self.attention,  # type: ignore[arg-type]
        )
        precision: Any = "bf16" if self.half else "no"
        run = RunOptions(stage="speech", output_dir="", max_steps=1, accumulation=2, mixed_precision=precision)
        return run, options

    def batch(self, model: FlowOmniModel) -> Streams:
        """The longest micro-batch that the options allow, of as many positions and targets as the plan takes."""
        num_text = round(self.sec * TEXT_TOKENS_PER_SEC)
        per_sec = 12.5 if self.hears else model.speech_tokenizer.spec.tokens_per_sec
        num_audio = round(self.sec * per_sec)
        prompt, spoken = TEMPLATE_TOKENS + num_text - 3, num_audio
        rows = dataclasses.replace(
            self.shape, num_rows=self.rows, num_prompt=prompt, num_spoken=spoken, num_text=num_text
        )
        batch = speech_batch(rows)
        return heard_batch(batch, num_audio, num_text, self.shape.encoder["num_mel_bins"]) if self.hears else batch


@dataclass(frozen=True)
class Memory:
    """Bytes.

    Attributes:
        planned: by part, of what the backward pass keeps (and half-precision copies), as the plan has it.
        kept: the same, measured.
        states: weights, gradients, Adam's moments and averages, measured.
        planned_states: the same of the plan.
        peak: by how much the process grew.
        planned_peak: the plan's sum.
        of_parts: what the parts' weights, gradients, moments and averages come to.
    """

    planned: dict[str, int]
    kept: dict[str, int]
    states: int
    planned_states: int
    peak: int
    planned_peak: int
    of_parts: dict[str, int]

    @property
    def deviation(self) -> float:
        """Of the plan from the measured peak, as a share of that."""
        return self.planned_peak / self.peak - 1


def heard_batch(batch: Streams, num_heard: int, num_text: int, num_bins: int) -> Streams:
    """The rows with `num_heard` heard positions first, nothing spoken, and text targets at the end."""
    place_L = torch.arange(batch.text_BL.shape[1])
    heard_BL = (place_L < num_heard).expand_as(batch.text_BL)
    num_rows, length = batch.text_BL.shape
    text_BL = torch.where(heard_BL, -1, batch.text_BL.clamp(min=0))
    features_BCF = torch.randn(num_rows, num_bins, FRAMES_PER_HEARD * num_heard)
    return dataclasses.replace(
        batch,
        text_BL=text_BL,
        state_BL=torch.full_like(batch.state_BL, -1),
        speech_BLX=torch.full_like(batch.speech_BLX, float("nan")),
        heard_BL=heard_BL,
        text_loss_BL=(place_L >= length - num_text).expand_as(text_BL),
        state_loss_BL=torch.zeros_like(batch.state_loss_BL),
        features_BCF=features_BCF,
        feature_lengths_B=torch.full((num_rows,), features_BCF.shape[-1]),
    )


class Loop:
    """The loop of `training.train` in small: two micro-batches a step, AdamW, averages."""

    def __init__(self, model: FlowOmniModel, batch: Streams, half: bool):
        self.model, self.batch, self.half = model, batch, half
        self.step = Step(model, self.loss, _watched(model), batch.mask_BL.numel(), half)
        self.ema = Ema(model, 0.99)

    def loss(self) -> Tensor:
        return total_loss({k: v for k, v in self.model(self.batch).items() if float(v.count)})

    def __call__(self) -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.half):
            total = self.loss()
        total.backward()
        del total
        self.step()
        self.ema.update()


def _watched(model: FlowOmniModel) -> list[tuple[Any, str, str]]:
    ears = [(model, "_encode", "encoder"), (model.projector, "forward", "projector")]
    return [*ears, *watched_parts(model)]


def measure(case: Case, resident: Callable[[], int] | None = None) -> Memory:
    """Plan the case and run it.

    Args:
        resident: the largest size of this process so far; None leaves `peak` 0.
    """
    with TemporaryDirectory() as folder:
        run, options = case.options(Path(folder))
        found = plan(run, options)
    before = _resident_now()
    outlined: Any = found.module
    model = FlowOmniModel(outlined.config)
    set_trainable(model, options.trains, options.lora)
    with_attention(model, case.attention).train()
    loop = Loop(model, case.batch(model), case.half)
    for _ in range(NUM_STEPS):
        loop()
    peak = resident() - before if resident else 0
    states = state_bytes(loop)
    planned = dict(found.memory)
    passing = ("activations (estimate)", "in flight (estimate)", "half-precision copies")
    in_passing = sum(planned.pop(name) for name in passing)
    return Memory(
        planned=_planned(found, case),
        kept=kept_bytes(loop),
        states=states,
        planned_states=sum(planned.values()),
        peak=peak,
        planned_peak=sum(planned.values()) + in_passing,
        of_parts=_states_by_part(model),
    )


def _planned(found: Plan, case: Case) -> dict[str, int]:
    result = {}
    for part in found.parts:
        copied = case.half and "tokenizer" not in part.name and (case.hears or part.name != "encoder")
        result[part.name] = part.activation_bytes + (2 * part.num_parameters if copied else 0)
    return {name: size for name, size in result.items() if size}


def state_bytes(loop: Loop) -> int:
    """Weights, gradients (as large as what trains), Adam's moments and averages."""
    of_adam = [v for state in loop.step.optimizer.state.values() for v in state.values() if v.numel() > 1]
    weights = list({id(p): p for p in loop.model.parameters()}.values())
    gradients = [p for p in weights if p.requires_grad]
    return sum(t.nbytes for t in [*weights, *gradients, *of_adam, *loop.ema.averages.values()])


def _states_by_part(model: FlowOmniModel) -> dict[str, int]:
    """4 bytes each for a weight, its gradient, two moments and its average."""
    found: dict[str, int] = defaultdict(int)
    for part, modules in parts_of(model).items():
        for parameter in {id(p): p for m in modules for p in m.parameters()}.values():
            found[PARTS_OF_PLAN.get(part, part)] += parameter.nbytes * (5 if parameter.requires_grad else 1)
    return dict(found)


def kept_bytes(loop: Loop) -> dict[str, int]:
    """What autograd keeps for the backward pass, by part; a tensor counts where it is kept first, parameters never."""
    weights = {p.untyped_storage().data_ptr() for p in loop.model.parameters()}
    alive: list[Tensor] = []  # so that no address is used twice
    seen: set[int] = set()
    total = 0

    def note(tensor: Tensor) -> Tensor:
        nonlocal total
        address = tensor.untyped_storage().data_ptr()
        if address not in seen and address not in weights:
            seen.add(address)
            alive.append(tensor.detach())
            total += tensor.untyped_storage().nbytes()
        return tensor

    meter = ByPart(lambda: float(total))
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        counts = meter(loop.step)
    found: dict[str, int] = defaultdict(int)
    for part, size in counts.items():
        found[PARTS_OF_PLAN.get(part, part)] += int(size)
    return {name: size for name, size in found.items() if size}


# ----------------------------------------------------------------------------------------------- a process of its own


def measure_apart(case: Case, threads: int) -> Memory:
    """`measure` in a new process, whose size is that of what it trains."""
    context = multiprocessing.get_context("spawn")
    with _environment(MALLOC), ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(_measure_here, case, threads).result()


def _measure_here(case: Case, threads: int) -> Memory:
    torch.set_num_threads(threads)
    _warm_up()
    return measure(case, _resident_peak)


def _warm_up() -> None:
    """What libraries allocate once, for themselves."""
    layer = nn.Linear(64, 64)
    with torch.autocast("cpu", torch.bfloat16):
        layer(torch.randn(64, 64)).sum().backward()


def _resident_now() -> int:
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return _resident_peak()
    return pages * os.sysconf("SC_PAGE_SIZE")


def _resident_peak() -> int:
    """In bytes. On Linux `getrusage` of a new process begins at its parent's peak; VmHWM is its own."""
    status = Path("/proc/self/status")
    if status.is_file():
        return next(1024 * int(row.split()[1]) for row in status.read_text().splitlines() if row.startswith("VmHWM"))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # macOS


@contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
