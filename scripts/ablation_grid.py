"""A grid of ablations: read from YAML, resolved cell by cell, and checked before anything is trained.

base: base.yaml                 # a stage's configuration, relative to this file
reference: flow                 # the cell that others are compared with; the first one if not given
seeds: [0, 1]
cells:
  flow: {}
  depth:
    set:                        # dotted key of the stage's configuration: its whole new value
      options.parts.speech_tokenizer: runs/tokenizers/rvq8/final
      options.parts.head: {kind: depth, width: 72}
    varies: [model.speech_tokenizer.autoencoder.bottleneck]   # what these bring with them, and is meant to
    seeds: [0, 1, 2]            # instead of the grid's
    sampling: {temperature: 0.8}    # with which its head draws when it is judged, instead of the grid's
sampling: {guidance: 1.5}       # of all other cells; by default each head's own
pair: [flow, depth]             # the two that the report puts in its first line; see `scripts.ablation_report`
judge: {num_questions: 32}      # see `scripts.ablation_questions.JudgeOptions`
"""

from __future__ import annotations

import copy
import functools
import re
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml

from flowomni.heads.sizes import matching_width
from flowomni.modeling import FlowOmniModel
from flowomni.strict import nearest, strict
from scripts.ablation_questions import JudgeOptions
from training.config import Parsed, parse, read_yaml
from training.manifest import read_manifest
from training.plan import Plan, plan
from training.stages import STAGES
from training.stages.speech import TASKS, SpeechOptions
from training.train import RunOptions

CELL_FILE = "cell.yaml"
PER_RUN = ("seed", "output_dir")  # set by the runner for each run
HARMLESS = ("log_every", "eval_every", "save_every", "keep_checkpoints", "num_threads", "wandb", "compile")
CHECKPOINTS = (  # settings that name a folder
    *("options.model", "options.parts.llm", "options.parts.encoder", "options.parts.speech_tokenizer"),
    *("options.parts.projector", "options.tokenizer", "options.vocoder"),
)
INCIDENTAL = re.compile(r"(^|\.)(_name_or_path|name_or_path|transformers_version|architectures|dtype|torch_dtype)$")


@dataclass(frozen=True)
class Cell:
    """One named delta.

    Attributes:
        changes: dotted key -> value, upon the base.
        varies: resolved keys (or their sections) that the changes bring with them, knowingly.
        seeds: one run each.
        content: the stage's configuration with the changes; without `PER_RUN`.
        sampling: overrides of the head's own sampling, for the judge.
    """

    name: str
    changes: dict[str, Any]
    varies: tuple[str, ...]
    seeds: tuple[int, ...]
    content: dict[str, Any]
    sampling: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Grid:
    """What a grid's file says.

    Attributes:
        folder: of all its runs; a run's is `folder/<cell>/seed_<n>`.
        reference: name of the cell that others are compared with.
        max_head_mismatch: largest share by which a head's parameters may differ from the reference's; None: any.
        sec_per_step: known seconds of a step, by cell.
        launch: arguments of `accelerate launch`.
        base: the file that the cells are deltas of.
        judge: what the cells are asked.
        pair: the two cells that matter most, continuous first; None: chosen by the report.
    """

    file: Path
    name: str
    folder: Path
    reference: str
    cells: tuple[Cell, ...]
    max_head_mismatch: float | None
    sec_per_step: dict[str, float]
    launch: tuple[str, ...]
    base: str = ""
    judge: JudgeOptions = JudgeOptions()
    pair: tuple[str, str] | None = None

    def cell(self, name: str) -> Cell:
        """The cell of that name."""
        return next(cell for cell in self.cells if cell.name == name)

    def trained_as(self, cell: Cell, seed: int) -> Cell:
        """The first cell with the same training; it differs from `cell` in the sampling alone, and may be it."""
        return next(other for other in self.cells if other.content == cell.content and seed in other.seeds)

    def run_folder(self, cell: Cell, seed: int) -> Path:
        """Where a run is trained."""
        return self.folder / cell.name / f"seed_{seed}"


def trained_before(grid: Grid, cell: Cell, seed: int) -> Path | None:
    """Folder of a finished run with that cell's configuration and seed: its own, or one of a grid beside this one."""
    own = grid.run_folder(cell, seed)
    for file in [own / CELL_FILE, *sorted(grid.folder.parent.glob(f"*/*/{own.name}/{CELL_FILE}"))]:
        if (file.parent / "final").is_dir():
            content = yaml.safe_load(file.read_text(encoding="utf-8"))
            if {key: value for key, value in content.items() if key not in PER_RUN} == cell.content:
                return file.parent
    return None


@dataclass
class Checked:
    """A cell after the check.

    Attributes:
        parsed: its stage's options; None where they are bad.
        plan: parameters and memory; None where a size is unknown.
        resolved: every setting by dotted key, those of the model's config under `model.`.
        also_differs: settings that differ from the reference's beside those that the cell names.
    """

    cell: Cell
    parsed: Parsed | None = None
    plan: Plan | None = None
    resolved: dict[str, Any] = field(default_factory=dict)
    also_differs: dict[str, tuple[Any, Any]] = field(default_factory=dict)

    @property
    def num_head_parameters(self) -> int | None:
        """Of the speech head; None where there is none or its size is unknown."""
        found = [part.num_parameters for part in self.plan.parts if part.name == "head"] if self.plan else []
        return found[0] if found else None


# ------------------------------------------------------------------------------------------------------------- reading


class _Loader(yaml.SafeLoader):
    """YAML in which a key given twice is an error: the second one would silently win."""


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    keys = [loader.construct_object(key) for key, _ in node.value]
    for key in keys:
        if keys.count(key) > 1:
            raise ValueError(f"{key!r} is given twice (line {node.start_mark.line + 1} and after)")
    loader.flatten_mapping(node)
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)

GRID_KEYS = (
    *("base", "name", "folder", "reference", "seeds", "cells", "max_head_mismatch", "sec_per_step", "launch"),
    *("judge", "pair", "sampling"),
)
CELL_KEYS = ("set", "varies", "seeds", "sampling")
LAUNCH = ("--num_processes", "1", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no")


def read_grid(path: str | Path) -> Grid:
    """Read a grid's file.

    Raises:
        ValueError: the file or its base is missing or bad, an unknown key, no cells, no seeds, a seed used twice.
    """
    file = Path(path)
    try:
        values = yaml.load(file.read_text(encoding="utf-8"), _Loader)
        if not isinstance(values, dict):
            raise ValueError("a grid is a mapping with 'base' and 'cells'")
        _known(values, GRID_KEYS, "")
        for key in ("base", "cells"):
            if not values.get(key):
                raise ValueError(f"needs a key {key!r}")
        base = read_yaml(file.parent / str(values["base"]))
        names = list(values["cells"])
        shared = {key: values[key] for key in ("seeds", "sampling") if key in values}
        cells = tuple(_cell(name, values["cells"][name] or {}, shared, base) for name in names)
        reference = values.get("reference", names[0])
        if reference not in names:
            raise ValueError(f"reference is {reference!r}, which is no cell{nearest(str(reference), names)}")
        judge = strict(JudgeOptions, values.get("judge"), "judge")
        pair = _pair(values.get("pair"), names)
    except OSError as error:
        raise ValueError(f"{file}: {error.strerror or error}") from None
    except yaml.YAMLError as error:
        raise ValueError(f"{file}: not YAML ({' '.join(str(error).split())})") from None
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    name = str(values.get("name", file.stem))
    known = values.get("sec_per_step") or {}
    return Grid(
        file=file,
        name=name,
        folder=Path(values.get("folder", f"runs/ablations/{name}")),
        reference=reference,
        cells=cells,
        max_head_mismatch=values.get("max_head_mismatch", 0.1),
        sec_per_step={n: float(known) for n in names} if isinstance(known, int | float) else dict(known),
        launch=tuple(map(str, values.get("launch", LAUNCH))),
        base=str(file.parent / str(values["base"])),
        judge=judge,
        pair=pair,
    )


def _pair(values: Any, names: list[str]) -> tuple[str, str] | None:
    if values is None:
        return None
    if not isinstance(values, list) or len(values) != 2 or len(set(values)) != 2 or not set(values) <= set(names):
        raise ValueError(f"pair is {values!r}; give two different cells of {', '.join(names)}")
    return values[0], values[1]


def _known(values: Mapping[str, Any], valid: tuple[str, ...], where: str) -> None:
    for key in values:
        if key not in valid:
            raise ValueError(f"{where}{key}: unknown key{nearest(key, list(valid))}. Valid keys: {', '.join(valid)}")


def _cell(name: Any, values: Mapping[str, Any], shared: Mapping[str, Any], base: dict[str, Any]) -> Cell:
    where = f"cells.{name}."
    if not re.fullmatch(r"[\w.+-]+", str(name)):
        raise ValueError(f"cells.{name}: a cell's name becomes a folder; use letters, digits and . _ + -")
    if not isinstance(values, Mapping):
        raise ValueError(f"cells.{name} is {values!r}; give a mapping with 'set'")
    _known(values, CELL_KEYS, where)
    values = {**shared, **values}
    chosen = values.get("seeds")
    if not isinstance(chosen, list) or not chosen or not all(type(seed) is int for seed in chosen):
        raise ValueError(f"{where}seeds is {chosen!r}; give a list of whole numbers, for it or for the whole grid")
    twice = sorted({seed for seed in chosen if chosen.count(seed) > 1})
    if twice:
        raise ValueError(f"{where}seeds has {twice[0]} twice; each seed is one run")
    changes = dict(values.get("set") or {})
    for key in PER_RUN:
        if key in changes:
            raise ValueError(f"{where}set.{key}: every run gets its own {key} from the runner; leave it out")
    content = copy.deepcopy(base)
    for key in PER_RUN:
        content.pop(key, None)
    for key, value in changes.items():
        _assign(content, key, value, f"{where}set")
    sampling = values.get("sampling") or {}
    if not isinstance(sampling, dict):
        raise ValueError(f"{where}sampling is {sampling!r}; give a mapping such as {{temperature: 0.8}}")
    return Cell(str(name), changes, tuple(values.get("varies") or ()), tuple(chosen), content, sampling)


def _assign(content: dict[str, Any], key: str, value: Any, where: str) -> None:
    *sections, last = key.split(".")
    for section in sections:
        content = content.setdefault(section, {})
        if not isinstance(content, dict):
            raise ValueError(f"{where}.{key}: {section!r} holds a value in the base, not a section")
    content[last] = copy.deepcopy(value)


# ------------------------------------------------------------------------------------------------------------ checking


def check(grid: Grid) -> tuple[list[Checked], list[str], list[str]]:
    """Resolve all cells: what they are, what is wrong with them (nothing may train then), what is worth a warning."""
    problems: list[str] = []
    warnings: list[str] = []
    cells = [_resolve(grid, cell, problems) for cell in grid.cells]
    reference = next(each for each in cells if each.cell.name == grid.reference)
    _check_heads(grid, cells, reference, problems)
    for each in cells:
        _check_delta(each, reference, warnings)
    for first, second in _pairs(cells):
        if first.resolved and first.resolved == second.resolved and first.cell.sampling == second.cell.sampling:
            problems.append(f"cells {first.cell.name} and {second.cell.name} are the same run: leave one out")
    return cells, problems, warnings


def _resolve(grid: Grid, cell: Cell, problems: list[str]) -> Checked:
    checked, where = Checked(cell), f"cell {cell.name}"
    try:
        checked.parsed = parse_content({**cell.content, "output_dir": "-", "seed": 0})
    except ValueError as error:
        problems.append(f"{where}: {str(error).partition('.yaml: ')[2] or error}")
        return checked
    run, options = checked.parsed.run, checked.parsed.options
    checked.resolved = flat(asdict(run)) | flat(asdict(options), "options.")
    for key in PER_RUN:
        del checked.resolved[key]
    missing = [key for key in CHECKPOINTS if _is_missing(checked.resolved.get(key))]
    for key in missing:
        path = checked.resolved[key]
        problems.append(f"{where}: {key} is {path!r}, where there is no checkpoint: train it first, or name another")
    try:
        checked.plan = plan(run, options)
    except ValueError as error:
        if not missing:
            problems.append(f"{where}: {error}")
    if checked.plan is not None and isinstance(checked.plan.module, FlowOmniModel):
        model = flat(checked.plan.module.config.to_dict(), "model.")
        checked.resolved |= {key: value for key, value in model.items() if not INCIDENTAL.search(key)}
        try:
            strict(checked.plan.module.head.Sampling, cell.sampling, "sampling")
        except ValueError as error:
            problems.append(f"{where}: {error}")
    problems += [f"{where}: {reason}" for reason in _no_samples(options)]
    for seed in cell.seeds:
        problems += [f"{where}: {reason}" for reason in _other_run(grid.run_folder(cell, seed), cell)]
    return checked


def parse_content(content: dict[str, Any]) -> Parsed:
    """The options of a stage's configuration; ValueError as `training.config.parse`."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / CELL_FILE
        file.write_text(yaml.safe_dump(content, sort_keys=False))
        return parse(RunOptions, {name: stage.Options for name, stage in STAGES.items()}, ["--config", str(file)])


def _is_missing(path: Any) -> bool:
    """Whether it names a checkpoint that is not there. What can only be a name on the Hub is left to the training."""
    if not isinstance(path, str) or (Path(path) / "config.json").is_file():
        return False
    owner, _, name = path.partition("/")
    return not name or "/" in name or Path(owner).exists()


def _no_samples(options: Any) -> Iterator[str]:
    """Why the stage would train on nothing, or write nothing to listen to."""
    if not isinstance(options, SpeechOptions):
        return
    if options.num_eval < 1:
        yield f"options.num_eval is {options.num_eval}: it would have no samples; set it to at least 1"
    if not any(TASKS[name][1] == "speech" for name, share in options.tasks.items() if share > 0):
        yield f"options.tasks is {options.tasks}: none of these speaks, so it would have no samples"
    for split in ("train", "valid"):
        try:
            num_items = _num_conversations(options.manifest, split)
        except ValueError as error:
            yield f"options.manifest: {error}"
            return
        if not num_items:
            yield f"options.manifest {options.manifest!r} has no conversation of split {split!r}"


@functools.cache
def _num_conversations(manifest: str, split: str) -> int:
    return len(read_manifest(manifest, split))


def _other_run(folder: Path, cell: Cell) -> Iterator[str]:
    """What a run that was begun in `folder` was configured with otherwise."""
    if not (folder / CELL_FILE).is_file():
        return
    then = flat(yaml.safe_load((folder / CELL_FILE).read_text(encoding="utf-8")))
    now = flat(cell.content)
    keys = [key for key in sorted({*then, *now} - {*PER_RUN, *HARMLESS}) if then.get(key) != now.get(key)]
    if keys:
        yield f"{folder} was begun with another configuration ({', '.join(keys)}): remove it, or give the grid a name"


def _check_heads(grid: Grid, cells: list[Checked], reference: Checked, problems: list[str]) -> None:
    wanted = reference.num_head_parameters
    if grid.max_head_mismatch is None or not wanted:
        return
    for each in cells:
        size = each.num_head_parameters
        if size is None or abs(size / wanted - 1) <= grid.max_head_mismatch:
            continue
        assert each.plan is not None and isinstance(each.plan.module, FlowOmniModel)
        model = each.plan.module
        try:
            width = matching_width(model.config.head, model.speech_tokenizer.spec, model.config.hidden_size, wanted)
            remedy = f"head.width {width} would fit"
        except ValueError as error:
            remedy = str(error).rpartition(": ")[2]
        problems.append(
            f"cell {each.cell.name}: its head has {size:,} parameters, that of {grid.reference} {wanted:,} "
            f"({size / wanted - 1:+.0%}, allowed {grid.max_head_mismatch:.0%}): {remedy}; or set max_head_mismatch"
        )


def _check_delta(each: Checked, reference: Checked, warnings: list[str]) -> None:
    """Fill in `also_differs`, and warn of it."""
    named = [*_resolved_names(each.cell), *_resolved_names(reference.cell)]
    if each.plan is None or reference.plan is None:
        return  # what a missing checkpoint brings with it is not known
    for key in sorted({*each.resolved, *reference.resolved}):
        values = reference.resolved.get(key), each.resolved.get(key)
        if values[0] != values[1] and not any(key == name or key.startswith(f"{name}.") for name in named):
            each.also_differs[key] = values
    if each.also_differs:
        shown = ", ".join(f"{key}: {then!r} -> {now!r}" for key, (then, now) in each.also_differs.items())
        warnings.append(f"cell {each.cell.name} changes more than it names: {shown}")


def _resolved_names(cell: Cell) -> Iterator[str]:
    """The resolved keys that a cell names: those it sets, the same in the model's config, and those it lists.

    What a checkpoint holds is not named by its path.
    """
    yield from cell.varies
    for key in cell.changes:
        yield key
        if key.startswith("options.") and key not in CHECKPOINTS:
            yield f"model.{key.removeprefix('options.').removeprefix('parts.')}"


def _pairs(cells: list[Checked]) -> Iterator[tuple[Checked, Checked]]:
    for index, first in enumerate(cells):
        for second in cells[index + 1 :]:
            yield first, second


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, by dotted key."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) and value else {f"{prefix}{key}": value}
    return found
