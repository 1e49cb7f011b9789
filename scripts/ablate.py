"""Compare what differs in one thing: a grid of named deltas and seeds, trained one after the other.

    python -m scripts.ablate --config configs/ablations/main.yaml --plan     # what it is and what it costs
    python -m scripts.ablate --config configs/ablations/main.yaml            # train, judge, and write the report

Each run is `accelerate launch -m training.train` in a folder of its own, runs/ablations/<grid>/<cell>/seed_<n>. After
an interruption the same command goes on: finished runs are skipped, a begun one continues from its last checkpoint. A
run that fails is reported with its last lines, and the others go on. Cells that differ in their sampling alone are
trained once, and what a grid beside this one has trained with the same configuration and seed is taken from there. The
same command, given again while one works (on another GPU, with another CUDA_VISIBLE_DEVICES), takes runs that nobody
trains yet; the last of them judges. See `scripts.ablation_grid` for the file.

results.json has every run's steps, tokens, training time and measurements, and what was measured last within the
smallest number of steps, of tokens, and of seconds that any run took, so that runs can be compared at equal cost.

Then every finished run is asked the same held-out questions (`scripts.ablation_judge`), and report.json and report.html
say what came of it (`scripts.ablation_report`). What is judged is kept, so that this too goes on after an interruption.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NoReturn

import yaml

from scripts.ablation_files import JUDGED, LOCK_FILE, is_trained_elsewhere, locked
from scripts.ablation_grid import CELL_FILE, Cell, Checked, Grid, check, read_grid, trained_before

OUTPUT_FILE, CALIBRATION_FILE, RESULTS_FILE = "train.out", "calibration.json", "results.json"
REPORT_FILE, REPORT_PAGE = "report.json", "report.html"
CALIBRATION_STEPS = 12
NOT_COPIED = ("checkpoints", JUDGED, LOCK_FILE)  # of a run, for a cell with other sampling
NUM_LAST_LINES = 8
BUDGETS = {"steps": "step", "tokens": "num_tokens", "wall time": "train_sec"}


@dataclass
class Run:
    """What became of a cell's seed.

    Attributes:
        status: "pending", "finished", "failed", "interrupted", or "elsewhere": another process trains it.
        history: per line of its log: step, num_tokens and train_sec so far, and what was logged there.
        error: its last lines, where it failed.
    """

    cell: str
    seed: int
    folder: str
    status: str = "pending"
    history: list[dict[str, Any]] = field(default_factory=list)
    error: str = ""

    def totals(self) -> dict[str, float]:
        """Steps, tokens and seconds in all."""
        return {key: self.history[-1][key] if self.history else 0 for key in BUDGETS.values()}

    def evaluation(self, key: str, limit: float) -> dict[str, Any] | None:
        """The last evaluation within `limit` of steps, tokens or seconds."""
        found = [line for line in self.history if line["eval"] and line[key] <= limit * (1 + 1e-9)]
        return found[-1] if found else None


# ---------------------------------------------------------------------------------------------------------------- cost


def read_history(folder: Path) -> list[dict[str, Any]]:
    """A run's log with running totals. Evaluations, and what other lines are cut off, count no time and no tokens."""
    found: list[dict[str, Any]] = []
    num_tokens = train_sec = 0.0
    file = folder / "log.jsonl"
    for text in file.read_text(encoding="utf-8").splitlines() if file.is_file() else []:
        try:
            line = json.loads(text)
        except json.JSONDecodeError:  # as a killed run leaves its last line
            break
        num_tokens += line.get("train/num_tokens", 0.0)
        train_sec += line.get("train/sec", 0.0)
        measured = {k.removeprefix("eval/"): v for k, v in line.items() if k.startswith("eval/")}
        losses = {k.removeprefix("loss/"): v for k, v in line.items() if k.startswith("loss/")}
        totals = {"step": line["step"], "num_tokens": num_tokens, "train_sec": train_sec}
        found.append(totals | {"eval": measured, "loss": losses})
    return found


def known_cost(grid: Grid) -> dict[str, tuple[float, str]]:
    """Seconds of a step by cell, and how they are known: given, from runs there are, or measured before."""
    known: dict[str, tuple[float, str]] = {}
    file = grid.folder / CALIBRATION_FILE
    measured = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    for cell in grid.cells:
        histories = [read_history(grid.run_folder(cell, seed)) for seed in cell.seeds]
        logged = [history[-1] for history in histories if history and history[-1]["train_sec"]]
        if cell.name in grid.sec_per_step:
            known[cell.name] = grid.sec_per_step[cell.name], "given"
        elif logged:
            known[cell.name] = sum(h["train_sec"] for h in logged) / sum(h["step"] for h in logged), "from its log"
        elif cell.name in measured:
            known[cell.name] = measured[cell.name], "measured"
    return known


def calibrate(grid: Grid, cells: Sequence[Cell], num_steps: int) -> None:
    """Train each cell for `num_steps` steps aside, and write the seconds that a step of it took to the grid's folder.

    Raises:
        RuntimeError: a cell does not train; has its last lines.
    """
    file = grid.folder / CALIBRATION_FILE
    for cell in cells:
        folder = grid.folder / "calibration" / cell.name
        if is_trained_elsewhere(folder):
            continue
        shutil.rmtree(folder, ignore_errors=True)
        content = {**cell.content, "max_steps": num_steps, "log_every": max(1, num_steps // 3)}
        content |= {"eval_every": 0, "save_every": 0, "wandb": "disabled"}
        if content["stage"] == "speech":  # its evaluation takes longer than the steps
            content["options"] = {**content["options"], "num_eval": 0}
        print(f"measuring {num_steps} steps of {cell.name} ...", flush=True)
        error = launch(grid, content, folder, seed=cell.seeds[0])
        if error:
            raise RuntimeError(f"cell {cell.name} does not train:\n{error}")
        lines = read_history(folder)
        # the first steps read the corpus and compile: the last ones are what the others will be like
        steps, seconds = (lines[-2][key] - lines[-3][key] for key in ("step", "train_sec"))
        known = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        _write_json(file, known | {cell.name: seconds / steps})
        shutil.rmtree(folder)


def print_plan(grid: Grid, cells: Sequence[Checked]) -> None:
    """What there is to train, how long it will take, and how large its parts are."""
    cost = known_cost(grid)
    num_runs = sum(len(each.cell.seeds) for each in cells)
    print(f"{grid.file}: {len(cells)} cells, {num_runs} runs in {grid.folder}; compared with {grid.reference}\n")
    width = max(12, *(len(each.cell.name) for each in cells))
    print(f"{'cell':{width}} {'seeds':>12} {'done':>5} {'steps':>8} {'s/step':>8} {'hours':>7}  seconds are")
    total, known = 0.0, True
    for each in cells:
        cell, steps = each.cell, each.parsed.run.max_steps if each.parsed else 0
        seconds, source = cost.get(cell.name, (None, f"unknown: --calibrate {CALIBRATION_STEPS} measures them"))
        own = [seed for seed in cell.seeds if grid.trained_as(cell, seed) is cell]
        left = sum(steps - _steps_done(grid, cell, seed, steps) for seed in own)
        hours = None if seconds is None else left * seconds / 3600
        total, known = total + (hours or 0.0), known and hours is not None
        num_done = sum(is_finished(grid, cell, seed) for seed in cell.seeds)
        row = f"{cell.name:{width}} {','.join(map(str, cell.seeds)):>12} {num_done:>5} {steps:>8,}"
        print(f"{row} {_or_unknown(seconds, '.3g'):>8} {_or_unknown(hours, '.2f'):>7}  {source}")
    print(f"{'in all':{width}} {total:>44.2f}{'' if known else '  and what is unknown'}\n")
    names = list(dict.fromkeys(part.name for each in cells if each.plan for part in each.plan.parts))
    if names:
        print(f"{'parameters':{width}} " + " ".join(f"{name:>{max(11, len(name))}}" for name in names))
    for each in cells if names else ():
        sizes = {part.name: part.num_parameters for part in each.plan.parts} if each.plan else {}
        shown = [f"{_or_unknown(sizes.get(name), ','):>{max(11, len(name))}}" for name in names]
        print(f"{each.cell.name:{width}} " + " ".join(shown))
    print(flush=True)


def _steps_done(grid: Grid, cell: Cell, seed: int, steps: int) -> int:
    if is_finished(grid, cell, seed) or trained_before(grid, cell, seed):
        return steps
    history = read_history(grid.run_folder(cell, seed))
    return history[-1]["step"] if history else 0


def _or_unknown(value: float | None, form: str) -> str:
    return "?" if value is None else format(value, form)


# ------------------------------------------------------------------------------------------------------------- running


def is_finished(grid: Grid, cell: Cell, seed: int) -> bool:
    """Whether a run has its final model."""
    return (grid.run_folder(cell, seed) / "final").is_dir()


def launch(grid: Grid, content: dict[str, Any], folder: Path, seed: int) -> str:
    """Train in `folder`; returns what went wrong: the last lines of its output, or nothing."""
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "accelerate.commands.launch", *grid.launch]
    command += ["-m", "training.train", "--config", str(folder / CELL_FILE)]
    with locked(folder) as lock, (folder / OUTPUT_FILE).open("a") as output:
        if lock is None:
            return f"{folder} is being trained by another process: wait for it, or end it"
        config = {**content, "output_dir": str(folder), "seed": seed}
        (folder / CELL_FILE).write_text(yaml.safe_dump(config, sort_keys=False))
        # the lock is passed on, so that it holds for as long as the training does, whatever becomes of this process
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, pass_fds=[lock.fileno()], start_new_session=True
        )
        try:
            status = process.wait()
        except BaseException:
            _end(process)
            raise
    if status == 0 and (folder / "final").is_dir():
        return ""
    text = (folder / OUTPUT_FILE).read_text(encoding="utf-8", errors="replace").replace("\r", "\n")
    before, traceback, after = text.rpartition("Traceback (most recent call last)")
    said = before if traceback and "CalledProcessError" in after else text  # the launcher's own complaint says nothing
    return "\n".join([f"exit status {status}", *[s for s in said.split("\n") if s.strip()][-NUM_LAST_LINES:]])


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ctrl-C for the launcher and what it launched; what does not heed it within a few seconds is killed."""
    for number, seconds in ((signal.SIGINT, 10), (signal.SIGKILL, None)):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with suppress(subprocess.TimeoutExpired):
            process.wait(seconds)
            return


def run_grid(grid: Grid, cells: Sequence[Checked]) -> list[Run]:
    """Train what is not finished, first every cell's first seed; writes results.json after each run."""
    order = [
        (each.cell, seed)
        for place in range(max(len(each.cell.seeds) for each in cells))
        for each in cells
        for seed in each.cell.seeds[place : place + 1]
    ]
    order.sort(key=lambda run: grid.trained_as(*run) is not run[0])  # what is taken from others comes last
    runs = {(run.cell, run.seed): run for run in all_runs(grid, cells)}
    for number, (cell, seed) in enumerate(order, 1):
        run, label = runs[cell.name, seed], f"[{number}/{len(order)}] {cell.name}, seed {seed}"
        if is_finished(grid, cell, seed):
            print(f"{label}: finished before", flush=True)
            _refresh(run)
            continue
        source = grid.trained_as(cell, seed)
        if is_trained_elsewhere(grid.run_folder(source, seed)):
            print(f"{label}: another process trains it", flush=True)
            run.status = "elsewhere"
            continue
        same = trained_before(grid, source, seed)
        if same is not None:
            print(f"{label}: the same training as {same}'s, taken from there", flush=True)
            _copy_run(same, Path(run.folder))
            _refresh(run, "finished")
            continue
        print(f"{label}: {run.folder}/{OUTPUT_FILE}", flush=True)
        try:
            run.error = launch(grid, cell.content, Path(run.folder), seed)
        except BaseException:
            _refresh(run, "interrupted")
            write_results(grid, cells, list(runs.values()))
            raise
        _refresh(run, "failed" if run.error else "finished")
        if run.error:
            print(f"{label}: FAILED, the others go on\n  " + run.error.replace("\n", "\n  "), flush=True)
        write_results(grid, cells, list(runs.values()))
    for run in runs.values():
        if run.status == "elsewhere" and (Path(run.folder) / "final").is_dir():  # by now
            _refresh(run)
    write_results(grid, cells, list(runs.values()))
    return list(runs.values())


def _copy_run(source: Path, folder: Path) -> None:
    partial = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(source, partial, ignore=shutil.ignore_patterns(*NOT_COPIED))
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def all_runs(grid: Grid, cells: Sequence[Checked]) -> list[Run]:
    """Every run, as it stands in its folder."""
    runs = [Run(c.cell.name, seed, str(grid.run_folder(c.cell, seed))) for c in cells for seed in c.cell.seeds]
    for run in runs:
        _refresh(run)
    return runs


def _refresh(run: Run, status: str | None = None) -> None:
    folder = Path(run.folder)
    run.history = read_history(folder)
    run.status = status or ("finished" if (folder / "final").is_dir() else "pending")


# ------------------------------------------------------------------------------------------------------------- results


def write_results(grid: Grid, cells: Sequence[Checked], runs: Sequence[Run]) -> Path:
    """Write results.json into the grid's folder."""
    by_cell: dict[str, Any] = {}
    for each in cells:
        sizes = {part.name: part.num_parameters for part in each.plan.parts} if each.plan else {}
        by_cell[each.cell.name] = {
            "set": each.cell.changes,
            "varies": list(each.cell.varies),
            "also_differs": {key: list(values) for key, values in each.also_differs.items()},
            "num_parameters": sizes,
            "runs": {str(run.seed): _run_result(run) for run in runs if run.cell == each.cell.name},
        }
    found = {"name": grid.name, "config": str(grid.file), "reference": grid.reference, "cells": by_cell}
    return _write_json(grid.folder / RESULTS_FILE, found | {"at_equal": at_equal_budgets(runs)})


def _run_result(run: Run) -> dict[str, Any]:
    result: dict[str, Any] = {"status": run.status, "folder": run.folder, **run.totals()}
    evaluations = [line for line in run.history if line["eval"]]
    if evaluations:
        result["eval"] = evaluations[-1]["eval"]
    losses = [line["loss"] for line in run.history if line["loss"]]
    if losses:
        result["loss"] = losses[-1]
    return result | ({"error": run.error} if run.error else {})


def at_equal_budgets(runs: Sequence[Run]) -> dict[str, Any]:
    """For steps, tokens and training time: the least that a finished run took, and each run's last measurement by then.

    A run that took more had a learning rate still above its end there; None where it had not been measured yet.
    """
    finished = [run for run in runs if run.status == "finished" and run.history]
    found: dict[str, Any] = {}
    for name, key in BUDGETS.items() if finished else ():
        limit = min(run.totals()[key] for run in finished)
        cells: dict[str, Any] = {}
        for run in finished:
            line = run.evaluation(key, limit)
            shown = None if line is None else {k: v for k, v in line.items() if k != "loss"}
            cells.setdefault(run.cell, {})[str(run.seed)] = shown
        found[name] = {"limit": limit, "cells": cells}
    return found


def _write_json(file: Path, values: Any) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name}.{os.getpid()}.part")
    partial.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, file)
    return file


def print_results(grid: Grid, runs: Sequence[Run]) -> None:
    """One line a run."""
    print(f"\n{'cell':20} {'seed':>5} {'status':12} {'steps':>8} {'tokens':>12} {'minutes':>8}")
    for run in runs:
        totals = run.totals()
        print(
            f"{run.cell:20} {run.seed:>5} {run.status:12} {totals['step']:>8,} {totals['num_tokens']:>12,.0f} "
            f"{totals['train_sec'] / 60:>8.1f}"
        )
    print(f"\n{grid.folder / RESULTS_FILE}")


# -------------------------------------------------------------------------------------------------------- command line


def parse_args(args: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="scripts.ablate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", type=Path, required=True, help="the grid's YAML file")
    add_plan_arguments(parser)
    stages = parser.add_mutually_exclusive_group()
    stages.add_argument("--train-only", action="store_true", help="neither judge nor report")
    stages.add_argument("--judge-only", action="store_true", help="train nothing: judge the runs that are finished")
    stages.add_argument("--report-only", action="store_true", help="write the report of what has been judged")
    parser.add_argument("--num-questions", type=int, help="of each condition (default: the grid's judge.num_questions)")
    parser.add_argument("--num-shifted", type=int, help="of each altered one (default: the grid's judge.num_shifted)")
    parser.add_argument("--num-workers", type=int, default=2, help="processes that listen (default: %(default)s)")
    return parser.parse_args(args)


def add_plan_arguments(parser: argparse.ArgumentParser) -> None:
    """What `train_grid` is told."""
    parser.add_argument("--plan", action="store_true", help="print what would be trained and what it costs, no more")
    parser.add_argument(
        "--calibrate",
        type=int,
        metavar="STEPS",
        help=f"measure the time of a step where it is not known ({CALIBRATION_STEPS} before training; 0: do not)",
    )


def ablate(args: argparse.Namespace) -> int:
    """Run the command; returns its exit status, see `train_grid`."""
    grid = read_grid(args.config)
    counts = {name: getattr(args, name) for name in ("num_questions", "num_shifted")}
    changes = {name: count for name, count in counts.items() if count is not None}
    grid = replace(grid, judge=replace(grid.judge, **changes))
    status = 0
    if not (args.judge_only or args.report_only):
        status, num_elsewhere = train_grid(grid, args.plan, args.calibrate)
        if args.train_only or status == 2:
            return status
        if num_elsewhere:
            print(f"other processes train {num_elsewhere} runs; the last one judges (or --judge-only does, now)")
            return status
    return max(status, judge_grid(grid, args.num_workers, args.plan, args.report_only))


def judge_grid(grid: Grid, num_workers: int, only_plan: bool, only_report: bool) -> int:
    """Judge what is finished and write the report; returns 1 if a run is missing in it."""
    # here, because training needs none of it
    from scripts.ablation_judge import Judge, speaks
    from scripts.ablation_page import beside, report_page
    from scripts.ablation_report import report

    cells, problems, _ = check(grid)
    if problems:
        raise ValueError("; ".join(problems))
    if not speaks(cells):
        print("there is nothing to judge: this grid's stage has no voice")
        return 0
    judge = Judge(grid, cells, num_workers)
    tasks = judge.tasks()
    if not only_report:
        judge.print_plan(tasks)
        if only_plan:
            return 0
        judge.run(tasks)
    judged = judge.collect()
    found = report(grid, cells, all_runs(grid, cells), judged)
    _write_json(grid.folder / REPORT_FILE, found)
    page = grid.folder / REPORT_PAGE
    page.write_text(report_page(found, judged, *beside(grid.folder, grid.base)), encoding="utf-8")
    for key, texts in found["says"].items():
        print(f"\n{key}:" + "".join(f"\n  {text}" for text in texts))
    print(f"\n{page} and {grid.folder / REPORT_FILE}")
    return 1 if judged.missing else 0


def train_grid(grid: Grid, only_plan: bool, calibration_steps: int | None) -> tuple[int, int]:
    """Plan a grid, and train it.

    Returns 1 if a run failed, 2 if nothing may be trained; and how many runs other processes still train.
    """
    if calibration_steps is not None and calibration_steps != 0 and calibration_steps < 3:
        raise ValueError(f"--calibrate is {calibration_steps}; give at least 3 steps, or 0")
    cells, problems, warnings = check(grid)
    for text in warnings:
        print(f"warning: {text}", file=sys.stderr)
    num_steps = calibration_steps if calibration_steps is not None else 0 if only_plan else CALIBRATION_STEPS
    if not problems and num_steps:
        known = known_cost(grid)
        pending = [
            c for c in grid.cells if any(grid.trained_as(c, s) is c and not trained_before(grid, c, s) for s in c.seeds)
        ]
        calibrate(grid, [cell for cell in pending if cell.name not in known], num_steps)
    print_plan(grid, cells)
    for text in problems:
        print(f"error: {text}", file=sys.stderr)
    if problems or only_plan:
        return 2 if problems else 0, 0
    runs = run_grid(grid, cells)
    print_results(grid, runs)
    num_elsewhere = sum(run.status == "elsewhere" for run in runs)
    return int(sum(run.status == "finished" for run in runs) + num_elsewhere < len(runs)), num_elsewhere


def main(args: Sequence[str] | None = None) -> None:
    """Command line."""
    run_command(lambda: ablate(parse_args(args)))


def run_command(command: Callable[[], int]) -> NoReturn:
    """Exit with the status of `command`. Bad input ends with a line for each fault and exit status 2."""

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)
    try:
        status = command()
    except (ValueError, OSError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("\nstopped: the same command goes on from the last checkpoint", file=sys.stderr)
        raise SystemExit(130) from None
    raise SystemExit(status)


if __name__ == "__main__":
    main()
