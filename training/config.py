"""Strict YAML plus command-line overrides through jsonargparse: an unknown key ends with the nearest valid one."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NoReturn

import yaml
from jsonargparse import ActionConfigFile, ArgumentParser

from flowomni.strict import nearest


@dataclass(frozen=True)
class Parsed:
    """A parsed command line: the loop's options, the stage's options, and whether only the plan is wanted."""

    run: Any
    options: Any
    plan: bool


class _Parser(ArgumentParser):
    """Errors are one line and exit status 2."""

    valid_keys: list[str]

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        text = re.sub(r"\s+", " ", str(message)).strip()
        unknown = re.search(r"(?:Key|Option) '?-*([\w.]+)'? is not (?:expected|accepted)|[Uu]nrecognized arguments: -*([\w.]+)", text)
        if unknown:
            key = next(g for g in unknown.groups() if g)
            text = f"unknown key {key!r}{nearest(key, self.valid_keys)} ({text})"
        print(f"error: {text}", file=sys.stderr)
        raise SystemExit(2)


def parse(run_class: type, options_by_stage: dict[str, type], args: list[str] | None) -> Parsed:
    """Parse `--config file.yaml [--key value] [--options.key value] [--plan]`.

    The stage named in the file (or by --stage) decides which options exist.
    """
    args = sys.argv[1:] if args is None else args
    stage = _stage_of(args)
    if stage not in options_by_stage:
        raise ValueError(f"stage is {stage!r}; known stages: {', '.join(options_by_stage)}")
    parser = _Parser(prog="training.train", description="Train one stage of FlowOmni.")
    parser.valid_keys = [f.name for f in fields(run_class)] + [f"options.{f.name}" for f in fields(options_by_stage[stage])]
    parser.add_argument("--config", action=ActionConfigFile, help="YAML file with the keys below")
    parser.add_argument("--plan", action="store_true", help="print parameters and memory, train nothing")
    parser.add_class_arguments(run_class)
    parser.add_argument("--options", type=options_by_stage[stage])
    parsed = parser.instantiate_classes(parser.parse_args(args))
    run = run_class(**{f.name: parsed[f.name] for f in fields(run_class)})
    return Parsed(run, parsed.options, parsed.plan)


def _stage_of(args: list[str]) -> str | None:
    stage = None
    for index, arg in enumerate(args):
        name, _, value = arg.partition("=")
        value = value or (args[index + 1] if index + 1 < len(args) else "")
        if name == "--stage":
            return value
        if name == "--config":
            path = Path(value)
            if not path.is_file():
                raise ValueError(f"--config {value}: no such file")
            try:
                content = yaml.safe_load(path.read_text())
            except yaml.YAMLError as error:
                raise ValueError(f"--config {value}: not YAML ({str(error).splitlines()[0]})") from None
            if not isinstance(content, dict) or "stage" not in content:
                raise ValueError(f"--config {value}: needs a key 'stage'")
            stage = content["stage"]
    return stage
