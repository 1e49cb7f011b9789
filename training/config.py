"""Strict YAML plus command-line overrides through jsonargparse: an unknown key ends with the nearest valid one."""

from __future__ import annotations

import dataclasses
import difflib
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, NoReturn, get_args, get_type_hints

import yaml
from jsonargparse import ActionConfigFile, ArgumentParser
from transformers import CONFIG_MAPPING, PreTrainedConfig, WhisperConfig

from flowomni.configuration import LayoutConfig, LossConfig, OutputBlocksConfig
from flowomni.heads import HEADS, head_config
from flowomni.strict import nearest, strict

# transformers takes these for a config too, beside the fields that it declares
_OLD_NAMES = ("model_type", "rope_theta", "rope_scaling", "torch_dtype", "attn_implementation")


@dataclass(frozen=True)
class Parsed:
    """A parsed command line: the loop's options, the stage's options, and whether only the plan is wanted."""

    run: Any
    options: Any
    plan: bool


class _Parser(ArgumentParser):
    """Errors are a ValueError of one line."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        text = re.sub(r"<class '([\w.]+)'>", r"\1", " ".join(str(message).split())).replace("typing.", "")
        text = re.sub(r'^Parser key "([\w.]+)": ', r"\1: ", text)
        # an error inside an optional section comes wrapped in what every type of that section says, values and all
        wrapped = re.search(r"^([\w.]+): Does not validate.*?Errors: - ([\w.]+): (Expected .*?Got value: \S+)", text)
        if wrapped:
            text = "{}.{}: {}".format(*wrapped.groups())
        raise ValueError(text.partition(" Given value")[0])


def parse(run_class: type, options_by_stage: dict[str, type], args: list[str] | None = None) -> Parsed:
    """Parse `--config file.yaml [--key value] [--options.key value] [--plan]`.

    The stage named in the file (or by --stage) decides which options exist. A file may name another as its `base`.

    Raises:
        ValueError: one line that names the file or the key: no such file, an unknown key (with the nearest valid one),
            a missing key, a value of the wrong type, or one that the options refuse.
    """
    args = sys.argv[1:] if args is None else args
    files = {path: read_yaml(path) for path in _values(args, "--config")}
    named = [content.get("stage") for content in files.values()] + list(_values(args, "--stage"))
    if not named and not {"-h", "--help"} & set(args):
        raise ValueError("there is nothing to train: give --config configs/tiny/vocoder.yaml, or another stage")
    stage = named[-1] if named else next(iter(options_by_stage))
    if stage not in list(options_by_stage):
        raise ValueError(f"stage is {stage!r}; known stages: {', '.join(options_by_stage)}")
    tree = _tree(run_class) | {"options": _tree(options_by_stage[stage])}
    for path, content in files.items():
        _check_keys(content, tree, path)
    _check_arguments(args, tree)
    parser = _Parser(prog="training.train", description="Train one stage of FlowOmni.", allow_abbrev=False)
    parser.add_argument("--config", action=ActionConfigFile, help="YAML file with the keys below")
    parser.add_argument("--plan", action="store_true", help="print parameters and memory, train nothing")
    parser.add_class_arguments(run_class)
    parser.add_argument("--options", type=options_by_stage[stage])
    parsed = parser.instantiate(parser.parse_args(_with_bases(args, files)))
    _check_sections(parsed.options, "options")
    run = run_class(**{f.name: parsed[f.name] for f in fields(run_class)})
    return Parsed(run, parsed.options, parsed.plan)


def read_yaml(path: str | Path, _following: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The content of a stage's configuration file, upon that of the file that its key `base` names, if it has one.

    `base` is a path relative to the file. A section is merged key by key; any other value replaces the base's.

    Raises:
        ValueError: no such file, not YAML, no stage's configuration, or a file that is its own base.
    """
    file = Path(path).resolve()
    if file in _following:
        raise ValueError(f"--config {path}: is its own base; follow the 'base' keys")
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"--config {path}: {error.strerror or error}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"--config {path}: not YAML ({' '.join(str(error).split())})") from None
    if isinstance(content, dict) and isinstance(content.get("base"), str):
        base = read_yaml(Path(path).parent / content.pop("base"), (*_following, file))
        content = _merged(base, content)
    if not isinstance(content, dict) or "stage" not in content:
        raise ValueError(f"--config {path}: needs a key 'stage'")
    return content


def _merged(base: Mapping[str, Any], delta: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in delta.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = _merged(merged[key], value) if both else value
    return merged


def _with_bases(args: Sequence[str], files: Mapping[str, dict[str, Any]]) -> list[str]:
    """The command line with each configuration's content, bases and all, in the place of its path."""
    whole = {path: yaml.safe_dump(content) for path, content in files.items()}
    found = []
    for before, arg in zip(["", *args], args, strict=False):
        path = arg if before == "--config" else arg.removeprefix("--config=")
        is_path = before == "--config" or arg.startswith("--config=")
        found.append(arg.removesuffix(path) + whole[path] if is_path else arg)
    return found


def _values(args: Sequence[str], name: str) -> list[str]:
    """What follows each `name` on the command line, as `name value` or `name=value`."""
    found = [arg.partition("=")[2] for arg in args if arg.startswith(f"{name}=")]
    return found + [value for arg, value in zip(args, args[1:], strict=False) if arg == name]


# ------------------------------------------------------------------------------------------------------------- keys


def _tree(cls: type) -> dict[str, Any]:
    """Field names of a dataclass, each with the tree of the dataclass that it holds, or None for any other value."""
    return {name: _subtree(hint) for name, hint in get_type_hints(cls).items() if name in _names(cls)}


def _subtree(hint: Any) -> dict[str, Any] | None:
    inner = next((part for part in (hint, *get_args(hint)) if isinstance(part, type) and is_dataclass(part)), None)
    return None if inner is None else _tree(inner)


def _names(cls: Any) -> list[str]:
    return [field.name for field in fields(cls)]


def _paths(tree: Mapping[str, Any], prefix: str = "") -> list[str]:
    """All keys of a tree, dotted."""
    inner = [path for name, part in tree.items() if part for path in _paths(part, f"{prefix}{name}.")]
    return [f"{prefix}{name}" for name in tree] + inner


def _check_keys(content: Mapping[str, Any], tree: dict[str, Any], file: str) -> None:
    def check(values: Mapping[str, Any], part: dict[str, Any], prefix: str) -> None:
        for key, value in values.items():
            if key not in part:
                raise ValueError(f"{file}: {_unknown(f'{prefix}{key}', tree)}")
            if part[key] and isinstance(value, Mapping):
                check(value, part[key], f"{prefix}{key}.")

    check(content, tree, "")


def _check_arguments(args: Sequence[str], tree: dict[str, Any]) -> None:
    for arg in args:
        path = arg[2:].partition("=")[0]
        if not arg.startswith("--") or path.split(".")[0] in ("config", "plan", "help", "print_config", ""):
            continue
        part: dict[str, Any] | None = tree
        for key in path.removesuffix("+").split("."):
            if part is None:  # inside a free section, which is checked with its values
                break
            if key not in part:
                raise ValueError(f"--{path}: {_unknown(path, tree)}")
            part = part[key]


def _unknown(path: str, tree: dict[str, Any]) -> str:
    """Names the nearest key: of the same section if one is near, else of the whole tree."""
    section, _, _ = path.rpartition(".")
    paths = _paths(tree)
    siblings = [p for p in paths if p.rpartition(".")[0] == section]
    near = difflib.get_close_matches(path, siblings, n=1, cutoff=0.7)
    return f"unknown key {path!r}{nearest(path, near or paths)}"


# --------------------------------------------------------------------------------------------------------- sections


def _check_sections(options: Any, where: str) -> None:
    """The free sections of a stage's options, checked now and not after minutes of loading."""
    for field in fields(options):
        value, path = getattr(options, field.name), f"{where}.{field.name}"
        if is_dataclass(value):
            _check_sections(value, path)
        elif field.name in _SECTIONS and isinstance(value, Mapping):
            try:
                _SECTIONS[field.name](value)
            except ValueError as error:
                raise ValueError(f"{where}.{error}") from None


def _head(values: Mapping[str, Any]) -> None:
    if "kind" in values:
        head_config(values)
        return
    # changes to a loaded model's head, whose kind stands in that model
    known = sorted({name for head in HEADS.values() for name in _names(head.Config)})
    for key in values:
        if key not in known:
            raise ValueError(f"head.{key}: unknown key{nearest(key, known)}. Valid keys: {', '.join(known)}")


def _llm(values: Mapping[str, Any]) -> None:
    kind = values.get("model_type")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        raise ValueError(f"llm.model_type: unknown model type {kind!r}{nearest(str(kind), list(CONFIG_MAPPING))}")
    _transformers_config(CONFIG_MAPPING[kind], values, "llm")


def _transformers_config(cls: type[PreTrainedConfig], values: Mapping[str, Any], where: str) -> None:
    """transformers itself keeps an unknown key as an attribute that nothing reads."""
    known = [*(_names(cls) if dataclasses.is_dataclass(cls) else values), *cls.attribute_map, *_OLD_NAMES]
    for key in values:
        if key not in known:
            raise ValueError(f"{where}.{key}: unknown key of {cls.__name__}{nearest(key, known)}")


_SECTIONS = {
    "head": _head,
    "llm": _llm,
    "encoder": lambda values: _transformers_config(WhisperConfig, values, "encoder"),
    "output_blocks": lambda values: strict(OutputBlocksConfig, values, "output_blocks"),
    "layout": lambda values: strict(LayoutConfig, values, "layout"),
    "loss": lambda values: strict(LossConfig, values, "loss"),
}
