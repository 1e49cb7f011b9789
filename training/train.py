"""Train one stage: `accelerate launch -m training.train --config configs/tiny/speech.yaml [--key value]`.

The whole story is `train`: batches -> losses (sums) -> divided once by the global counts -> backward -> clip -> step ->
average -> log -> evaluate -> checkpoint. What is trained stands in `training/stages/`, one file per stage.
"""

from __future__ import annotations

import math
import shutil
import sys
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from .checkpoint import Checkpoints, defaults_of, settings_of
from .config import parse
from .ema import Ema
from .engines import Whole, engine_name, innermost, is_sharded, make_accelerator, prepare
from .logs import Logs, Throughput
from .stages.base import Stage, rng_for
from .summary import write_summary


@dataclass
class RunOptions:
    """Options of the loop, equal for every stage.

    Attributes:
        stage: what to train; a name from `training.stages.STAGES`.
        output_dir: the run's folder: config.yaml, log.jsonl, samples/, checkpoints/, final/, summary.html.
        max_steps: optimizer steps in all; the learning rate reaches its end there.
        learning_rate, min_learning_rate: peak and end of the cosine schedule.
        warmup_steps: linear warm-up.
        weight_decay: AdamW, on matrices only.
        clip_norm: gradient clipping by global norm.
        accumulation: micro-batches per optimizer step.
        ema_decay: 0 keeps the last weights, else evaluation and the final model use the average.
        mixed_precision: "no" or "bf16" (on CPUs with AVX512-BF16 or AMX, and on GPUs) or "fp16" (GPUs).
        log_every, eval_every, save_every: in steps; 0 turns the last two off except at the end.
        keep_checkpoints: newest checkpoints that stay.
        best_metric: an evaluated value, "eval/wer_own_text" say: whenever it improves, a checkpoint is written, and the
            best one stays besides the newest. Empty: none.
        best_is: whether a "lower" or a "higher" value is better.
        compile: torch.compile of every transformer layer: a minute of waiting, then faster steps (1.65 times on a CPU).
        gradient_checkpointing: keep only the inputs of transformer layers and compute the rest again in the backward
            pass: a third more time, a fraction of the memory, the same gradients.
        num_threads: CPU threads of each process; 0 leaves torch's default.
        wandb: "disabled", "offline" or "online"; the local log.jsonl is always written.
        seed: data order, initial weights and noise.
    """

    stage: str
    output_dir: str
    max_steps: int
    learning_rate: float = 1e-3
    min_learning_rate: float = 1e-5
    warmup_steps: int = 100
    weight_decay: float = 0.01
    clip_norm: float = 1.0
    accumulation: int = 1
    ema_decay: float = 0.0
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    log_every: int = 10
    eval_every: int = 0
    save_every: int = 0
    keep_checkpoints: int = 2
    best_metric: str = ""
    best_is: Literal["lower", "higher"] = "lower"
    compile: bool = False
    gradient_checkpointing: bool = False
    num_threads: int = 0
    wandb: Literal["disabled", "offline", "online"] = "disabled"
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("max_steps", "accumulation", "log_every", "keep_checkpoints"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay is {self.ema_decay}; it must be in [0, 1)")


# a run that goes on may change these without becoming another run
_NOT_IN_FINGERPRINT = (
    "options.attention",
    "output_dir",
    "log_every",
    "eval_every",
    "save_every",
    "keep_checkpoints",
    "best_metric",
    "best_is",
    "accumulation",  # with the number of processes, see `fingerprint_of`
    "compile",
    "gradient_checkpointing",
    "num_threads",
    "wandb",
)


def train(run: RunOptions, options: Any, stage_class: Callable[..., Stage]) -> Path:
    """Run (or go on with) a training run; returns the folder of the final model.

    Raises:
        ValueError: bad configuration, or a checkpoint of another one.
        FloatingPointError: a loss or gradient that is not finite; the last good checkpoint stays.
    """
    if run.num_threads:
        torch.set_num_threads(run.num_threads)
    accelerator = make_accelerator(run.mixed_precision, run.clip_norm)
    torch.manual_seed(run.seed)
    stage = stage_class(options, run.seed)
    engine = engine_name(accelerator)
    if engine != "plain":
        stage.prepare_for_engine(engine)
    folder = Path(run.output_dir)
    groups = parameter_groups(stage.module, run.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=run.learning_rate, betas=(0.9, 0.99))
    if run.gradient_checkpointing:
        checkpoint_layers(stage.module)
    if run.compile:
        compile_layers(stage.module)
    module, optimizer = prepare(accelerator, stage.module, optimizer)
    scheduler = torch.optim.lr_scheduler.LambdaLR(innermost(optimizer), lambda step: learning_rate_factor(step, run))
    ema = Ema(stage.module, run.ema_decay)  # after `prepare`, which moves the parameters to their device
    whole = Whole(stage, module, ema, accelerator, lambda: stage_class(options, run.seed))
    checkpoints = checkpoints_of(run, options, accelerator)
    checkpoints.register(scheduler)
    checkpoints.register(ema, of_each_process=is_sharded(accelerator))
    first = checkpoints.resume()
    if first >= run.max_steps and (folder / "final").is_dir():
        accelerator.print(f"{folder} is finished ({first} steps): {folder / 'final'}")
        return folder / "final"
    logs = Logs(folder, run, options, first, enabled=accelerator.is_main_process)
    progress = tqdm(
        total=run.max_steps, initial=first, desc=run.stage, unit="step", disable=not accelerator.is_main_process
    )
    feed = Feed(stage, run, accelerator, first)
    throughput = Throughput()
    for step in range(first, run.max_steps):
        batches = feed.next()
        values = optimize(stage, module, optimizer, batches, accelerator, run, step)
        scheduler.step()
        ema.update()
        throughput.add(stage, batches)
        done = step + 1
        if done % run.log_every == 0 or done == run.max_steps:
            values |= {"learning_rate": float(scheduler.get_last_lr()[0]), **throughput.read()}
            logs.write(done, values)
            progress.set_postfix({k: f"{v:.3g}" for k, v in values.items() if "/" not in k or k == "loss/total"})
        progress.update()
        last = done == run.max_steps
        metric = None
        if last or (run.eval_every and done % run.eval_every == 0):
            samples = folder / "samples" / f"step_{done:08d}"
            values = evaluate(whole, samples, done)
            logs.write(done, values, show=progress.write)
            logs.write_samples(done, samples)
            metric = metric_of(values, run)
            throughput.restart()
        if last or checkpoints.is_best(metric) or (run.save_every and done % run.save_every == 0):
            try_to_save(checkpoints, done, metric)
    feed.close()
    save_final(whole, folder / "final")
    accelerator.wait_for_everyone()
    progress.close()
    logs.close()
    if accelerator.is_main_process:
        write_summary(folder)
    accelerator.end_training()
    return folder / "final"


def optimize(
    stage: Stage,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: list[Any],
    accelerator: Accelerator,
    run: RunOptions,
    step: int,
) -> dict[str, float]:
    """One optimizer step over the micro-batches of all processes; returns the mean loss of each part over all of them.

    Data and randomness of a micro-batch depend on its place among all micro-batches of the step, not on which process
    it falls to: two processes with one each are one process with two.
    """
    module.train()
    counts = global_counts(stage, batches, accelerator)
    sums: dict[str, list[float]] = {}
    for index, batch in enumerate(batches):
        place = index * accelerator.num_processes + accelerator.process_index
        for_head, for_dropout = rng_for(run.seed, step, place, 2).integers(2**62, size=2).tolist()
        generator = torch.Generator(accelerator.device).manual_seed(for_head)
        torch.manual_seed(for_dropout)
        accelerator.gradient_state._set_sync_gradients(index == len(batches) - 1)
        with accelerator.autocast():
            losses = module(batch, generator)
        total = torch.zeros((), device=accelerator.device)
        for part, loss in losses.items():
            entry = sums.setdefault(part, [0.0, 0.0])
            entry[0] += float(loss.sum.detach())
            entry[1] += float(loss.count)
            if stage.weights.get(part, 0.0) and counts.get(part):
                # DDP averages gradients over processes; the counts are global, so the sum is wanted
                total = total + stage.weights[part] * loss.sum / counts[part] * accelerator.num_processes
        if not math.isfinite(float(total.detach())):
            parts = ", ".join(f"{k} {v[0] / max(v[1], 1):.4g}" for k, v in sums.items())
            what = f"the loss is not finite at step {step}, micro-batch {index} ({parts})"
            raise FloatingPointError(f"{what}{_ending(stage, accelerator, run, step, [index])}")
        if total.requires_grad:
            accelerator.backward(total)
        elif accelerator.num_processes > 1 or accelerator.scaler is not None:  # these wait for gradients
            raise ValueError(
                f"nothing that trains takes part in micro-batch {index} of step {step}, as where the voice trains "
                "alone and nobody speaks: leave such tasks out, train more parts, or use one process without fp16"
            )
    norm = accelerator.clip_grad_norm_(module.parameters(), run.clip_norm)
    # fp16's scaler leaves such steps out by itself, and lowers its scale
    if norm is not None and not math.isfinite(float(norm)) and accelerator.scaler is None:
        what = f"the gradient is not finite at step {step}"
        raise FloatingPointError(f"{what}{_ending(stage, accelerator, run, step, list(range(len(batches))))}")
    optimizer.step()
    optimizer.zero_grad()
    values = mean_losses(sums, stage.weights)
    values["grad_norm"] = float(norm) if norm is not None else float("nan")
    return values


def _ending(stage: Stage, accelerator: Accelerator, run: RunOptions, step: int, indices: list[int]) -> str:
    """What to say of micro-batches that end a run."""
    rank, world = accelerator.process_index, accelerator.num_processes
    names = [name for i in indices for name in stage.names(step * run.accumulation + i, rank, world)]
    items = f" of {', '.join(names)}" if names else ""
    return f"{items}: the last checkpoint is kept; lower learning_rate or look at that batch"


def mean_losses(sums: dict[str, list[float]], weights: dict[str, float]) -> dict[str, float]:
    """Mean of each part over all processes, from this one's (sum, count) by part, and their weighted total."""
    totals: dict[str, list[float]] = {}
    for local in gather_object([sums]):  # objects, because the parts of a batch depend on its tasks
        for part, (value, count) in local.items():
            entry = totals.setdefault(part, [0.0, 0.0])
            entry[0] += value
            entry[1] += count
    means = {part: value / max(count, 1.0) for part, (value, count) in totals.items()}
    values = {f"loss/{part}": mean for part, mean in means.items()}
    return values | {"loss/total": sum(weights.get(part, 0.0) * mean for part, mean in means.items())}


def global_counts(stage: Stage, batches: list[Any], accelerator: Accelerator) -> dict[str, float]:
    """Targets of each part over all micro-batches and all processes."""
    local: dict[str, float] = {}
    for batch in batches:
        for part, count in stage.counts(batch).items():
            local[part] = local.get(part, 0.0) + count
    names = sorted(local)
    totals = accelerator.reduce(torch.tensor([local[n] for n in names], device=accelerator.device), "sum")
    return dict(zip(names, totals.tolist(), strict=True))


class Feed:
    """The micro-batches of each step, made one step ahead in a thread."""

    def __init__(self, stage: Stage, run: RunOptions, accelerator: Accelerator, first_step: int):
        self.stage, self.run, self.accelerator, self.step = stage, run, accelerator, first_step
        # Nested for good: leaving its outermost autocast, a thread empties the cache of all threads and waits there for
        # the interpreter lock, which the main thread, in autocast's cached_cast, may hold while it waits for the cache.
        self.pool = ThreadPoolExecutor(1, initializer=torch.autocast_increment_nesting)
        self.ahead = self.pool.submit(self._make, first_step)

    def _make(self, step: int) -> list[Any]:
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        return [self.stage.batch(step * self.run.accumulation + i, rank, world) for i in range(self.run.accumulation)]

    def next(self) -> list[Any]:
        """The micro-batches of the next step, on the accelerator's device."""
        batches = self.ahead.result()
        self.step += 1
        if self.step < self.run.max_steps:
            self.ahead = self.pool.submit(self._make, self.step)
        return [b.to(self.accelerator.device) for b in batches]

    def close(self) -> None:
        self.pool.shutdown(cancel_futures=True)


def checkpoints_of(run: RunOptions, options: Any, accelerator: Accelerator) -> Checkpoints:
    """The checkpoints in the run's folder."""
    fingerprint, defaults = fingerprint_of(run, options, accelerator)
    folder = Path(run.output_dir) / "checkpoints"
    best = run.best_metric, run.best_is
    return Checkpoints(folder, accelerator, fingerprint, run.keep_checkpoints, *best, defaults)


def fingerprint_of(run: RunOptions, options: Any, accelerator: Accelerator) -> tuple[dict[str, Any], dict[str, Any]]:
    """What makes a run the run it is, by name, and the defaults of these names.

    Two processes with one micro-batch each are one process with two: the product of both counts. An engine that cuts
    up its state goes on with as many processes as it had; any other with what gives the same product.
    """
    settings = settings_of(run) | settings_of(options, "options.")
    left_out: tuple[str, ...] = _NOT_IN_FINGERPRINT
    if "lora" not in {value for name, value in settings.items() if name.startswith("options.trains.")}:
        left_out += ("options.lora",)
    kept = {name: v for name, v in settings.items() if not any(f"{name}.".startswith(f"{key}.") for key in left_out)}
    of_engine = {"micro_batches_per_step": run.accumulation * accelerator.num_processes, "engine": "plain"}
    defaults = defaults_of(run) | defaults_of(options, "options.") | of_engine
    return kept | of_engine | {"engine": engine_name(accelerator)}, defaults


def checkpoint_layers(module: nn.Module) -> None:
    """Switch gradient checkpointing on in every transformer of `module`.

    Raises:
        ValueError: it has none.
    """
    found = [part for part in module.modules() if isinstance(part, GradientCheckpointingLayer)]
    if not found:
        raise ValueError("gradient_checkpointing is on, but this stage has no transformer layers: turn it off")
    models = [part for part in module.modules() if isinstance(part, PreTrainedModel)]
    for model in models:
        if model.supports_gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})


def compile_layers(module: nn.Module) -> None:
    """Compile the transformer layers, one by one and for any length; what is compiled stays one graph per kind."""
    for part in module.modules():
        if isinstance(part, GradientCheckpointingLayer):
            part.compile(dynamic=True)


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Trainable parameters: matrices with weight decay, vectors without."""
    trainable = [p for p in module.parameters() if p.requires_grad]
    if not trainable:
        raise ValueError("nothing is trainable: check the stage's `train` options")
    return [
        {"params": [p for p in trainable if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in trainable if p.ndim <= 1], "weight_decay": 0.0},
    ]


def learning_rate_factor(step: int, run: RunOptions) -> float:
    """Linear warm-up, then cosine from learning_rate to min_learning_rate at max_steps."""
    if step < run.warmup_steps:
        return (step + 1) / run.warmup_steps
    share = (step - run.warmup_steps) / max(1, run.max_steps - run.warmup_steps)
    floor = run.min_learning_rate / run.learning_rate
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, share)))


def evaluate(whole: Whole, folder: Path, step: int) -> dict[str, float]:
    """The stage's evaluation with the averaged weights, on the main process; every process gets the values.

    Random state and mode are as before afterwards. What fails for want of disk space is left out.
    """
    values: dict[str, float] = {}
    with torch.compiler.set_stance("force_eager"), torch.random.fork_rng(), whole.stage_with_averages() as stage:
        if stage is not None:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                values = {f"eval/{k}": v for k, v in stage.evaluate(folder, step).items()}
            except OSError as error:
                warnings.warn(f"the evaluation of step {step} failed ({error}): the run goes on", stacklevel=2)
    return broadcast_object_list([values])[0]


def metric_of(values: dict[str, float], run: RunOptions) -> float | None:
    """The value that decides which checkpoint is the best; None where there is none to compare."""
    if run.best_metric and values and run.best_metric not in values:
        names = ", ".join(sorted(values))
        warnings.warn(f"best_metric is {run.best_metric!r}, which is not evaluated; there are {names}", stacklevel=2)
    value = values.get(run.best_metric, math.nan)
    return value if math.isfinite(value) else None


def try_to_save(checkpoints: Checkpoints, step: int, metric: float | None) -> None:
    """Save; where that fails (a full disk), say so and go on, since the next one may succeed."""
    try:
        checkpoints.save(step, metric)
    except OSError as error:
        warnings.warn(f"{error}. The run goes on and tries again at its next checkpoint", stacklevel=2)


def save_final(whole: Whole, folder: Path) -> None:
    """Write the stage's artefact beside its place and move it there."""
    partial = folder.with_name(folder.name + ".partial")
    with whole.stage_with_averages() as stage:
        if stage is not None:
            shutil.rmtree(partial, ignore_errors=True)
            stage.save(partial)
            shutil.rmtree(folder, ignore_errors=True)
            partial.rename(folder)


def main(args: list[str] | None = None) -> None:
    """Command line. Bad input ends with one line and exit status 2."""
    from .stages import STAGES

    try:
        parsed = parse(RunOptions, {name: cls.Options for name, cls in STAGES.items()}, args)
        if parsed.plan:
            from .plan import print_plan

            print_plan(parsed.run, parsed.options)
            return
        train(parsed.run, parsed.options, STAGES[parsed.run.stage])
    except (ValueError, FloatingPointError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("\nstopped: the same command goes on from the last checkpoint", file=sys.stderr)
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
