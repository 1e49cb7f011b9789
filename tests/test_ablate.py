"""Ablations: what a grid's file must say, what is refused before anything trains, and a grid that is trained."""

from __future__ import annotations

import fcntl
import json
from pathlib import Path
from typing import Any

import pytest

from flowomni.heads.sizes import num_head_parameters
from flowomni.tokenizers.base import TokenSpec
from scripts.ablate import Run, at_equal_budgets, launch, main, print_plan, read_history
from scripts.ablation_grid import Checked, Grid, check, read_grid
from tests.grids import DELAY, tiny_stage, write
from tests.tiny import INSTRUCTIONS

GRIDS = sorted(Path(__file__).resolve().parent.parent.glob("configs/ablations/*.yaml"))


@pytest.fixture(scope="module")
def speech(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A stage `speech` of a tiny model and a corpus of two conversations; `codes` holds a tokenizer of three codes."""
    return tiny_stage(tmp_path_factory.mktemp("speech"))


@pytest.fixture
def grid_of(tmp_path: Path, speech: dict[str, Any]) -> Any:
    """Grid with these cells upon the tiny stage."""

    def build(cells: dict[str, Any], **values: Any) -> Grid:
        write(tmp_path / "base.yaml", speech)
        content = {"base": "base.yaml", "seeds": [0], "folder": str(tmp_path / "runs"), "cells": cells} | values
        return read_grid(write(tmp_path / "grid.yaml", content))

    return build


# -------------------------------------------------------------------------------------------------------- the grid file


def test_a_cell_is_the_base_with_its_changes(grid_of: Any, speech: dict[str, Any]) -> None:
    grid = grid_of(
        {
            "flow": {},
            "regression": {
                "set": {"learning_rate": 0.1, "options.parts.head": {"kind": "regression"}},
                "seeds": [3, 4],
            },
        },
        sec_per_step=2,
    )
    flow, regression = grid.cells
    assert (grid.reference, flow.seeds, regression.seeds) == ("flow", (0,), (3, 4))
    assert grid.sec_per_step == {"flow": 2.0, "regression": 2.0}
    assert flow.content["options"] == speech["options"] and "output_dir" not in flow.content
    assert regression.content["options"]["parts"]["head"] == {"kind": "regression"}, "replaced, not merged"
    assert regression.content["learning_rate"] == 0.1 and regression.content["max_steps"] == 4
    assert grid.run_folder(regression, 4) == grid.folder / "regression" / "seed_4"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"cells": {"a": {}}, "seeds": [0]}, "needs a key 'base'"),
        ({"base": "base.yaml", "seeds": [0]}, "needs a key 'cells'"),
        ({"base": "none.yaml", "cells": {"a": {}}, "seeds": [0]}, "none.yaml: No such file"),
        ({"base": "base.yaml", "cells": {"a": {}}, "sedes": [0]}, "sedes: unknown key; did you mean 'seeds'"),
        ({"base": "base.yaml", "cells": {"a": {"sett": {}}}, "seeds": [0]}, "cells.a.sett: unknown key.*'set'"),
        ({"base": "base.yaml", "cells": {"a": {}}}, "cells.a.seeds is None"),
        ({"base": "base.yaml", "cells": {"a": {}}, "seeds": []}, r"cells.a.seeds is \[\]"),
        ({"base": "base.yaml", "cells": {"a": {"seeds": [1, 2, 1]}}}, "cells.a.seeds has 1 twice"),
        ({"base": "base.yaml", "cells": {"a": {"set": {"seed": 1}}}, "seeds": [0]}, "cells.a.set.seed: .*leave it out"),
        ({"base": "base.yaml", "cells": {"a": {"set": {"stage.x": 1}}}, "seeds": [0]}, "set.stage.x: 'stage' holds"),
        ({"base": "base.yaml", "cells": {"a/b": {}}, "seeds": [0]}, "cells.a/b: .*folder"),
        (
            {"base": "base.yaml", "cells": {"a": {}}, "seeds": [0], "reference": "b"},
            "reference is 'b', which is no cell",
        ),
        ("base: base.yaml\nseeds: [0]\ncells:\n  a: {}\n  a: {}\n", r"'a' is given twice \(line 4"),
        ("base: [", "not YAML"),
        ("hello", "a grid is a mapping"),
    ],
)
def test_a_bad_grid_file_is_named(tmp_path: Path, content: Any, message: str) -> None:
    write(tmp_path / "base.yaml", {"stage": "text"})
    with pytest.raises(ValueError, match=f"grid.yaml: .*{message}"):
        read_grid(write(tmp_path / "grid.yaml", content))


@pytest.mark.parametrize("file", [file for file in GRIDS if "base" not in file.stem], ids=lambda file: file.stem)
def test_the_grids_of_the_project_can_be_read(file: Path) -> None:
    assert len(read_grid(file).cells) > 1


def test_the_heads_of_the_main_grid_are_of_one_size() -> None:
    codebooks = {"vq": (1, 1024), "fsq": (1, 1000), "rvq4": (4, 1024), "rvq8": (8, 1024)}
    sizes = {}
    for cell in read_grid(GRIDS[0].with_name("main.yaml")).cells:
        parts = cell.content["options"]["parts"]
        name = parts["speech_tokenizer"].split("/")[2]
        kind = "discrete" if name in codebooks else "continuous"
        dim = 0 if name in codebooks else 32
        spec = TokenSpec(kind, dim, *codebooks.get(name, (0, 0)), 24_000, 2_048, 0)
        sizes[cell.name] = num_head_parameters(parts["head"], spec, 256)
    assert len(sizes) == 8
    assert all(abs(size / sizes["flow"] - 1) < 0.05 for size in sizes.values()), sizes


# ------------------------------------------------------------------------------------------------------------- checking


def test_a_sound_grid_has_no_problems(grid_of: Any, speech: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    """Flow and codes: what the other tokenizer brings with it is listed, so nothing is left to warn of."""
    codes = str(Path(speech["options"]["manifest"]) / "codes")
    changes = {"options.parts.speech_tokenizer": codes, "options.parts.head": DELAY}
    varies = [f"model.speech_tokenizer.autoencoder.{key}" for key in ("bottleneck", "num_codebooks", "codebook_size")]
    grid = grid_of(
        {"flow": {}, "delay": {"set": changes, "varies": varies}}, max_head_mismatch=None, sec_per_step={"flow": 900}
    )
    cells, problems, warnings = check(grid)
    assert not problems and not warnings and not any(each.also_differs for each in cells)
    print_plan(grid, cells)
    shown = capsys.readouterr().out
    assert "1.00  given" in shown and "unknown: --calibrate" in shown and "and what is unknown" in shown
    assert all(f"{each.num_head_parameters:,}" in shown for each in cells)


def problems_of(grid: Grid) -> str:
    return "\n".join(check(grid)[1])


def test_what_the_delta_brings_along_is_warned_of(grid_of: Any, speech: dict[str, Any]) -> None:
    codes = str(Path(speech["options"]["manifest"]) / "codes")
    changes = {"options.parts.speech_tokenizer": codes, "options.parts.head": DELAY}
    grid = grid_of({"flow": {}, "delay": {"set": changes}}, max_head_mismatch=None)
    cells, problems, [warning] = check(grid)
    assert not problems and warning.startswith("cell delay changes more than it names")
    assert "model.speech_tokenizer.autoencoder.bottleneck: 'sigma_vae' -> 'rvq'" in warning
    assert set(cells[1].also_differs) == {
        f"model.speech_tokenizer.autoencoder.{key}" for key in ("bottleneck", "num_codebooks", "codebook_size")
    }


def test_heads_of_other_sizes_are_refused_with_a_width_that_fits(grid_of: Any) -> None:
    wide = {"options.parts.head": {"kind": "regression", "width": 400}}
    [problem] = check(grid_of({"flow": {}, "wide": {"set": wide}}))[1]
    assert "cell wide: its head has" in problem and "allowed 10%" in problem
    width = int(problem.partition("head.width ")[2].split()[0])
    fitting = {"options.parts.head": {"kind": "regression", "width": width}}
    assert not check(grid_of({"flow": {}, "fitting": {"set": fitting}}))[1]
    assert not check(grid_of({"flow": {}, "wide": {"set": wide}}, max_head_mismatch=None))[1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"options.parts.speech_tokenizer": "runs/x/vq/final"}, "parts.speech_tokenizer is 'runs/x/vq/final', where"),
        ({"options.parts.projector": "runs/x/final"}, "parts.projector is 'runs/x/final', where"),
        ({"options.num_eval": 0}, "num_eval is 0: it would have no samples"),
        ({"options.tasks": {"transcribe": 1.0}}, "none of these speaks"),
        ({"options.manifest": "nowhere"}, "options.manifest: nowhere: no such manifest"),
        ({"options.parts.head": {"kind": "delay"}}, "head.kind is 'delay'.*spec.kind is 'continuous'"),
        ({"options.parts.head.widht": 8}, "head.widht: unknown key; did you mean 'width'"),
        ({"learning_rat": 8}, "unknown key 'learning_rat'; did you mean 'learning_rate'"),
        ({}, "cells good and bad are the same run"),
    ],
)
def test_bad_cells_are_refused(grid_of: Any, changes: dict[str, Any], message: str) -> None:
    grid = grid_of({"good": {}, "bad": {"set": changes}})
    found = problems_of(grid)
    assert "bad" in found and "cell good" not in found
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(found)


def test_a_folder_of_another_configuration_is_refused(grid_of: Any) -> None:
    grid = grid_of({"flow": {}, "fast": {"set": {"learning_rate": 0.01}}})
    folder = grid.run_folder(grid.cells[1], 0)
    folder.mkdir(parents=True)
    write(folder / "cell.yaml", {**grid.cells[1].content, "output_dir": str(folder), "seed": 0, "log_every": 77})
    assert not check(grid)[1], "how often is logged is no other run"
    write(folder / "cell.yaml", {**grid.cells[1].content, "learning_rate": 0.02, "warmup_steps": 7})
    assert "fast/seed_0 was begun with another configuration (learning_rate, warmup_steps)" in problems_of(grid)


def test_nothing_trains_where_a_cell_is_bad(grid_of: Any, capsys: pytest.CaptureFixture[str]) -> None:
    grid = grid_of({"good": {}, "bad": {"set": {"options.num_eval": 0}}})
    with pytest.raises(SystemExit) as stopped:
        main(["--config", str(grid.file)])
    assert stopped.value.code == 2 and not grid.folder.exists()
    errors = capsys.readouterr().err
    assert errors.startswith("error: cell bad: options.num_eval is 0") and "Traceback" not in errors


# -------------------------------------------------------------------------------------------------------------- running


def text_grid(folder: Path, cells: dict[str, Any], runs: str = "runs") -> Path:
    """A grid of stage `text`, which needs no corpus."""
    llm = {"model_type": "qwen2", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    llm |= {"num_attention_heads": 2, "num_key_value_heads": 2}
    options = {"llm": llm, "instructions": INSTRUCTIONS, "batch_size": 2, "num_eval": 2}
    run = {"max_steps": 4, "log_every": 1, "save_every": 2, "eval_every": 2, "num_threads": 1}
    write(folder / "base.yaml", {"stage": "text", "output_dir": "unused", **run, "options": options})
    content = {"base": "base.yaml", "seeds": [5], "folder": str(folder / runs), "cells": cells, "sec_per_step": 0.1}
    return write(folder / "grid.yaml", content)


def status_of(*args: str) -> int:
    with pytest.raises(SystemExit) as stopped:
        main(args)
    assert isinstance(stopped.value.code, int)
    return stopped.value.code


def test_a_failed_cell_is_reported_and_the_others_go_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cells = {"broken": {"set": {"learning_rate": 1e30, "warmup_steps": 0}}, "good": {}}
    file = text_grid(tmp_path, cells)
    assert status_of("--config", str(file)) == 1
    shown = capsys.readouterr().out
    assert "broken, seed 5: FAILED, the others go on" in shown and "is not finite at step" in shown
    results = json.loads((tmp_path / "runs/results.json").read_text())
    broken, good = (results["cells"][name]["runs"]["5"] for name in ("broken", "good"))
    assert broken["status"] == "failed" and "not finite" in broken["error"] and "Traceback" not in shown
    assert good["status"] == "finished" and good["step"] == 4 and good["num_tokens"] > 0 and good["train_sec"] > 0
    assert "accuracy" in good["eval"] and results["cells"]["broken"]["set"]["learning_rate"] == 1e30
    assert set(results["at_equal"]) == {"steps", "tokens", "wall time"}
    assert (tmp_path / "runs/good/seed_5/final").is_dir()

    before = (tmp_path / "runs/good/seed_5/train.out").stat().st_mtime_ns
    cells = {"good": {}, "cooler": {"sampling": {"temperature": 0.5}}}
    assert status_of("--config", str(text_grid(tmp_path, cells))) == 0
    shown = capsys.readouterr().out
    assert "good, seed 5: finished before" in shown
    assert f"cooler, seed 5: the same training as {tmp_path / 'runs/good/seed_5'}'s" in shown
    runs = json.loads((tmp_path / "runs/results.json").read_text())["cells"]
    assert runs["cooler"]["runs"]["5"]["eval"] == runs["good"]["runs"]["5"]["eval"]
    assert (tmp_path / "runs/cooler/seed_5/final").is_dir()
    assert (tmp_path / "runs/good/seed_5/train.out").stat().st_mtime_ns == before

    file = text_grid(tmp_path, {"again": {}, "slower": {"set": {"learning_rate": 1e-4}}}, runs="others")
    assert status_of("--config", str(file)) == 0
    shown = capsys.readouterr().out
    assert f"again, seed 5: the same training as {tmp_path / 'runs/cooler/seed_5'}'s" in shown
    assert "slower, seed 5: the same" not in shown and (tmp_path / "others/slower/seed_5/final").is_dir()


def test_a_run_is_not_trained_twice_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A second process leaves what a first one trains, and what is copied from that; it trains the rest."""
    cells = {"taken": {}, "cooler": {"sampling": {"temperature": 0.5}}, "free": {"set": {"max_steps": 2}}}
    file = text_grid(tmp_path, cells)
    grid = read_grid(file)
    folder = grid.run_folder(grid.cells[0], 5)
    folder.mkdir(parents=True)
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "is being trained by another process" in launch(grid, grid.cells[0].content, folder, 5)
        assert status_of("--config", str(file)) == 0
    shown = capsys.readouterr().out
    assert "taken, seed 5: another process trains it" in shown and "cooler, seed 5: another process trains it" in shown
    assert "other processes train 2 runs; the last one judges" in shown
    assert (tmp_path / "runs/free/seed_5/final").is_dir()
    assert not (folder / "cell.yaml").exists() and not (tmp_path / "runs/cooler").exists()


# -------------------------------------------------------------------------------------------------------------- results


def log_of(folder: Path, seconds: float, tokens: int) -> list[dict[str, Any]]:
    """A log of three lines of training with an evaluation after each, and a line that is cut off."""
    lines: list[dict[str, Any]] = []
    for step in (10, 20, 30):
        lines.append({"step": step, "loss/text": 1 / step, "train/num_tokens": tokens, "train/sec": seconds})
        lines.append({"step": step, "eval/wer": 100 - step})
    folder.mkdir()
    (folder / "log.jsonl").write_text("\n".join(map(json.dumps, lines)) + '\n{"step": 4')
    return read_history(folder)


def test_runs_are_compared_at_equal_cost(tmp_path: Path) -> None:
    slow = Run("slow", 0, "", "finished", log_of(tmp_path / "slow", seconds=9.0, tokens=100))
    long = Run("long", 0, "", "finished", log_of(tmp_path / "long", seconds=4.0, tokens=150))
    failed = Run("failed", 0, "", "failed", slow.history[:1])
    assert slow.totals() == {"step": 30, "num_tokens": 300.0, "train_sec": 27.0}
    found = at_equal_budgets([slow, long, failed])
    limits = {name: each["limit"] for name, each in found.items()}
    assert limits == {"steps": 30, "tokens": 300.0, "wall time": 12.0}
    wer = {
        name: {c: s["0"] and s["0"]["eval"]["wer"] for c, s in each["cells"].items()} for name, each in found.items()
    }
    assert wer["steps"] == {"slow": 70, "long": 70}
    assert wer["tokens"] == {"slow": 70, "long": 80}
    assert wer["wall time"] == {"slow": 90, "long": 70}
    assert at_equal_budgets([failed]) == {}
    assert Checked(read_grid(text_grid(tmp_path, {"good": {}})).cells[0]).num_head_parameters is None
