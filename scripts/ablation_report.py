"""The report of a judged grid, as JSON values: what differs, what is equal, every score with its interval, and what the
data say, in sentences made of the intervals alone.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from flowomni.evaluation import Interval
from flowomni.modeling import FlowOmniModel
from scripts.ablation_grid import Checked, Grid, flat
from scripts.ablation_judge import Judged
from scripts.ablation_questions import HEARD, SPEAK, TYPED, UNSEEN
from scripts.ablation_scores import (
    SCORES,
    VOICE_SCORES,
    Row,
    Score,
    compare,
    difference,
    excludes_zero,
    interval_of,
    sums_of,
)

BUDGETS = {"step": "steps", "num_tokens": "tokens", "train_sec": "seconds"}
PAIR_SCORES = {"wer_own": "its own text", "wer_right": "the right answer"}
HARD = "noise 5 dB"
UNEQUAL = 0.05  # share by which budgets may differ without a word about it
PUBLISHED_COST_RATIO = 12.3
RELATIVE = Score("relative %", 100, 0, lambda row: None, "lower")  # for how it is shown alone
Runs = Sequence[Any]  # of `scripts.ablate.Run`


def report(grid: Grid, cells: Sequence[Checked], runs: Runs, judged: Judged) -> dict[str, Any]:
    """Everything, ready for JSON; see the keys."""
    found: dict[str, Any] = {
        "name": grid.name,
        "config": str(grid.file),
        "base": grid.base,
        "reference": grid.reference,
        "judge": dataclasses.asdict(grid.judge),
        "cells": {each.cell.name: _cell(each, runs, judged) for each in cells},
        "equal": _equal(cells),
        "conditions": {},
        "voice": {},
        "missing": judged.missing,
    }
    for name in _names(judged.rows):
        found["conditions"][name] = _condition(grid, judged.rows, name, SCORES, judged.references.get(name))
    for name in _names(judged.voice):
        of = f"voice {name.rpartition('/')[0]}"
        found["voice"][name] = _condition(grid, judged.voice, name, VOICE_SCORES, judged.references.get(of))
    found["pair"] = _pair(grid, found, judged)
    found["cost_ratio"] = _cost_ratio(found)
    found["says"] = says(found)
    return found


def _names(rows: Mapping[str, Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(name for conditions in rows.values() for name in conditions))


# ---------------------------------------------------------------------------------------------------------------- cells


def _cell(each: Checked, runs: Runs, judged: Judged) -> dict[str, Any]:
    cell = each.cell
    sizes = {part.name: part.num_parameters for part in each.plan.parts} if each.plan else {}
    found: dict[str, Any] = {
        "set": cell.changes,
        "varies": list(cell.varies),
        "also_differs": {key: list(values) for key, values in each.also_differs.items()},
        "sampling": cell.sampling,
        "seeds": list(cell.seeds),
        "num_parameters": sizes,
        "runs": {str(run.seed): _run(run) for run in runs if run.cell == cell.name},
        "cost": judged.costs.get(cell.name),
    }
    if each.plan is not None and isinstance(each.plan.module, FlowOmniModel):
        model = each.plan.module
        spec = model.speech_tokenizer.spec
        found["head"] = dict(model.config.head)
        chosen = dataclasses.replace(model.head.default_sampling(), **cell.sampling)
        found["sampling_in_full"] = dataclasses.asdict(chosen)
        found["token"] = {**dataclasses.asdict(spec), "tokens_per_sec": spec.tokens_per_sec, "bitrate": spec.bitrate}
    return found


def _run(run: Any) -> dict[str, Any]:
    totals = run.totals()
    seconds = totals["train_sec"]
    found = {"status": run.status, "folder": run.folder, **totals}
    found["tokens_per_sec"] = totals["num_tokens"] / seconds if seconds else None
    found["steps_per_sec"] = totals["step"] / seconds if seconds else None
    curves: dict[str, list[tuple[float, float]]] = {}
    for line in run.history:
        for kind in ("loss", "eval"):
            for name, value in line[kind].items():
                if isinstance(value, int | float) and math.isfinite(value):
                    curves.setdefault(f"{kind}/{name}", []).append((line["step"], value))
    return found | {"curves": curves} | ({"error": run.error} if run.error else {})


def _equal(cells: Sequence[Checked]) -> dict[str, Any]:
    """Settings that every cell has alike."""
    every = [each.resolved for each in cells if each.resolved]
    if not every:
        return {}
    shared = set.intersection(*(set(resolved) for resolved in every))
    return {key: every[0][key] for key in sorted(shared) if all(other[key] == every[0][key] for other in every)}


def named_settings(cells: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The dotted keys in which cells differ by name, parts of a section apart."""
    keys = {key for cell in cells.values() for key in flat(cell["set"])}
    return sorted(keys)


# --------------------------------------------------------------------------------------------------------------- scores


def _condition(
    grid: Grid,
    rows: Mapping[str, Mapping[str, Mapping[int, Sequence[Row]]]],
    name: str,
    scores: Mapping[str, Score],
    references: Sequence[Row] | None,
) -> dict[str, Any]:
    seed = grid.judge.seed
    by_cell = {cell: conditions[name] for cell, conditions in rows.items() if conditions.get(name)}
    reference = by_cell.get(grid.reference)
    asked = next(iter(next(iter(by_cell.values())).values()))
    found: dict[str, Any] = {
        "num_questions": len({row["id"] for row in asked}),
        "num_samples": max((row.get("sample", 0) for row in asked), default=0) + 1,
        "recordings": _of_recordings(references, scores, seed),
        "cells": {},
    }
    for cell, own in by_cell.items():
        of_cell = {}
        for score_name, score in scores.items():
            other = None if cell == grid.reference else reference
            each = compare(score, own, other, seed)
            if each.value.num:
                of_cell[score_name] = {
                    "value": dataclasses.asdict(each.value),
                    "difference": dataclasses.asdict(each.difference)
                    if each.difference and each.difference.num
                    else None,
                    "seeds": list(each.seeds),
                    "paired_seeds": list(each.paired_seeds),
                }
        found["cells"][cell] = of_cell
    return found


def _of_recordings(rows: Sequence[Row] | None, scores: Mapping[str, Score], seed: int) -> dict[str, Any]:
    """What the recordings of the right answers score: the recogniser's floor, and the voice itself."""
    found = {}
    for name, score in scores.items():
        if not rows or name in ("accuracy", "wer_own", "early", "never", "duration", "diversity", "mel_distance"):
            continue
        ids = list(dict.fromkeys(row["id"] for row in rows))
        each = interval_of(score, sums_of(score, {0: rows}, [0], ids), seed=seed)
        if each.num:
            found[name] = dataclasses.asdict(each)
    return found


def main_condition(conditions: Mapping[str, Any]) -> str | None:
    """The condition that decides: heard questions, else typed ones, else what is read aloud."""
    return next((name for name in (HEARD, TYPED, SPEAK) if name in conditions), None)


# ----------------------------------------------------------------------------------------------------------------- pair


def _pair(grid: Grid, found: Mapping[str, Any], judged: Judged) -> dict[str, Any] | None:
    """The central pair, continuous first, and by how much the one's word errors are more or less than the other's."""
    main = main_condition(found["conditions"])
    names, how = _chosen(grid, found, main)
    if names is None or main is None:
        return None
    first, second = names
    of: dict[str, Any] = {}
    for name in (SPEAK, TYPED, HEARD, HARD, *UNSEEN):
        own, other = (judged.rows[cell].get(name) for cell in names)
        if not own or not other:
            continue
        of[name] = {}
        for score in PAIR_SCORES:
            both = {
                kind: difference(SCORES[score], own, other, relative=kind == "relative", seed=grid.judge.seed)
                for kind in ("difference", "relative")
            }
            if both["difference"].num:
                of[name][score] = {kind: dataclasses.asdict(each) if each.num else None for kind, each in both.items()}
    seeds = sorted(set(judged.rows[first].get(main, {})) & set(judged.rows[second].get(main, {})))
    return {"cells": [first, second], "how": how, "seeds": seeds, "conditions": of}


def _chosen(grid: Grid, found: Mapping[str, Any], main: str | None) -> tuple[tuple[str, str] | None, str]:
    if grid.pair is not None:
        return grid.pair, "named in the grid's file"
    kinds = {name: cell.get("token", {}).get("kind") for name, cell in found["cells"].items()}
    if main is None or kinds.get(grid.reference) is None:
        return None, ""
    judged = found["conditions"][main]["cells"]
    rivals = [
        name
        for name, kind in kinds.items()
        if kind not in (None, kinds[grid.reference]) and "wer_own" in judged.get(name, {})
    ]
    if not rivals or "wer_own" not in judged.get(grid.reference, {}):
        return None, ""
    best = min(rivals, key=lambda name: judged[name]["wer_own"]["value"]["value"])
    names = (grid.reference, best) if kinds[grid.reference] == "continuous" else (best, grid.reference)
    how = "the reference, and the only cell with tokens of the other kind"
    if len(rivals) > 1:
        how = f"{best} has the lowest WER in {main!r} of the cells with {kinds[best]} tokens"
        how += "; being chosen on the questions that it is then compared on flatters it a little"
    return names, how


def _cost_ratio(found: Mapping[str, Any]) -> dict[str, Any] | None:
    """Head time of a depth head over that of a one-step continuous head, where there are both."""
    costs = {name: cell["cost"] for name, cell in found["cells"].items() if cell["cost"] and "head" in cell}
    depth = [n for n in costs if found["cells"][n]["head"]["kind"] == "depth"]
    one_step = [
        n
        for n in costs
        if found["cells"][n]["head"]["kind"] == "flow" and found["cells"][n]["sampling_in_full"].get("num_steps") == 1
    ]
    if not depth or not one_step:
        return None
    first, second = depth[0], one_step[0]
    ratios = {kind: costs[first][kind] / costs[second][kind] for kind in ("head", "whole")}
    turns = [a / b for a, b in zip(costs[first]["head_turns"], costs[second]["head_turns"], strict=True)]
    return {"cells": [first, second], **ratios, "head_lowest": min(turns), "head_highest": max(turns)}


# -------------------------------------------------------------------------------------------------------- in sentences


def shown(each: Mapping[str, Any], score: Score, signed: bool = False) -> str:
    """`value [low, high]`, scaled as the score is shown."""
    sign = "+" if signed else ""
    low, value, high = (f"{score.factor * each[key]:{sign}.{score.digits}f}" for key in ("low", "value", "high"))
    return f"{value} [{low}, {high}]"


def says(found: Mapping[str, Any]) -> dict[str, list[str]]:
    """What the data support, what they do not, and what limits them; from intervals and budgets alone."""
    supported, unsupported = _about_pair(found)
    for name in found["cells"]:
        if name != found["reference"] and (found["pair"] is None or name not in found["pair"]["cells"]):
            for text, is_supported in _about_cell(found, name):
                (supported if is_supported else unsupported).append(text)
    ratio = found["cost_ratio"]
    if ratio:
        depth, one_step = ratio["cells"]
        supported.append(
            f"Drawing the tokens of a second of speech takes {depth} {ratio['head']:.1f} times as long as {one_step} "
            f"({ratio['head_lowest']:.1f} to {ratio['head_highest']:.1f} over the turns; published: "
            f"{PUBLISHED_COST_RATIO}), speech as a whole {ratio['whole']:.1f} times."
        )
    supported = supported or ["Nothing: none of the differences named here has an interval that excludes zero."]
    return {"supported": supported, "unsupported": unsupported, "limits": _limits(found)}


def _about_pair(found: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    pair = found["pair"]
    texts: tuple[list[str], list[str]] = [], []
    if pair is None:
        return [], ["There is no pair of a continuous and a discrete cell to compare."]
    first, second = pair["cells"]
    for score, which in PAIR_SCORES.items():
        shown_at: dict[str, list[str]] = {}
        for name, scores in pair["conditions"].items():
            if score not in scores:
                continue
            relative, absolute = scores[score]["relative"], scores[score]["difference"]
            text = f"{name} {shown(absolute, SCORES[score], True)}"
            text += "" if relative is None else f" ({shown(relative, RELATIVE, True)} % relative)"
            better = first if absolute["value"] < 0 else second
            shown_at.setdefault(better if excludes_zero(Interval(**absolute)) else "", []).append(text)
        what = f"WER against {which} of {first} less that of {second}, in points"
        for better, some in shown_at.items():
            if better:
                texts[0].append(f"{what}, excludes zero in favour of {better}: {'; '.join(some)}.")
            else:
                texts[1].append(f"{what}, holds zero, so neither is shown to be better: {'; '.join(some)}.")
    return texts


def _about_cell(found: Mapping[str, Any], name: str) -> list[tuple[str, bool]]:
    """One sentence for what is shown against the reference, and one for what is not."""
    score = SCORES["wer_own"]
    shown_at: list[str] = []
    open_at: list[str] = []
    for condition in (SPEAK, TYPED, HEARD, HARD):
        each = found["conditions"].get(condition, {"cells": {}})["cells"].get(name, {}).get("wer_own")
        if each is None or each["difference"] is None:
            continue
        text = f"{condition} {shown(each['difference'], score, True)}"
        (shown_at if excludes_zero(Interval(**each["difference"])) else open_at).append(text)
    what = f"WER against its own text of {name} less that of {found['reference']}, in points"
    texts = []
    if shown_at:
        texts.append((f"{what}, excludes zero: {'; '.join(shown_at)}.", True))
    if open_at:
        texts.append((f"{what}, holds zero: {'; '.join(open_at)}.", False))
    return texts


def _limits(found: Mapping[str, Any]) -> list[str]:
    cells = found["cells"]
    done = {name: [s for s, run in cell["runs"].items() if run["status"] == "finished"] for name, cell in cells.items()}
    single = [name for name, seeds in done.items() if len(seeds) == 1]
    few = [f"{name} ({len(seeds)})" for name, seeds in done.items() if len(seeds) in (2, 3, 4)]
    texts = []
    if single:
        texts.append(
            f"Of one training seed: {', '.join(single)}. The intervals of these are over questions alone and do not "
            "say what another seed would give: a first look, no proof."
        )
    if few:
        texts.append(
            f"Of few training seeds: {', '.join(few)}. They are drawn anew too, but so few say little of the spread "
            "over seeds: the intervals are rather too narrow."
        )
    num = sum(
        each["difference"] is not None
        for part in ("conditions", "voice")
        for condition in found[part].values()
        for scores in condition["cells"].values()
        for each in scores.values()
    )
    if num:
        texts.append(
            f"The tables hold {num} differences, none corrected for their number: of intervals at 95 %, about "
            f"{num / 20:.0f} would exclude zero by chance."
        )
    for key, what in BUDGETS.items():
        totals = {n: r[key] for n, cell in cells.items() for r in cell["runs"].values() if r["status"] == "finished"}
        if totals and min(totals.values()) and max(totals.values()) / min(totals.values()) - 1 > UNEQUAL:
            least, most = min(totals, key=totals.__getitem__), max(totals, key=totals.__getitem__)
            texts.append(
                f"Budgets are not equal in {what}: {least} took {totals[least]:,.0f}, {most} {totals[most]:,.0f}. "
                "results.json has what each had reached at the least of each budget."
            )
    differing = [name for name, cell in cells.items() if cell["also_differs"]]
    if differing:
        texts.append(f"These differ from {found['reference']} in more than they name: {', '.join(differing)}.")
    texts += [f"Left out: {text}." for text in found["missing"]]
    texts.append(
        "All words are those that a small recogniser heard; its own errors are in the row of the recordings. Nothing "
        "here speaks of another size, corpus, language or voice than those of this grid."
    )
    return texts
