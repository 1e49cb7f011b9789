"""The shape of the code: which way imports point, where the two seams are, and that importing does nothing."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FORBIDDEN = {  # package -> top-level packages it never imports
    "flowomni": {"training", "inference", "scripts", "tests"},
    "inference": {"training", "scripts", "tests"},
    "training": {"inference", "tests"},
    "scripts": {"tests"},
}
SEAM_FREE = ("flowomni/modeling.py", "flowomni/generation.py", "training", "inference")  # blind to the token's kind
KIND = re.compile(r"discrete|continuous|\bspec\.kind\b", re.IGNORECASE)


def sources(*places: str) -> list[Path]:
    """Python files of the checkout under the given files and folders."""
    paths = [ROOT / place for place in places]
    return sorted(file for path in paths for file in (path.rglob("*.py") if path.is_dir() else [path]))


def imported_packages(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, top-level package) of every absolute import in a file, inside functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name.split(".")[0]) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.lineno, node.module.split(".")[0]


def kind_branches(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, condition) of every decision a file takes on whether speech tokens are continuous or discrete."""
    for node in ast.walk(tree):
        if isinstance(node, ast.If | ast.IfExp | ast.While | ast.Assert):
            conditions: list[ast.expr] = [node.test]
        elif isinstance(node, ast.comprehension):
            conditions = node.ifs
        elif isinstance(node, ast.Match):
            conditions = [node.subject]
        elif isinstance(node, ast.Compare):
            conditions = [node]
        else:
            continue
        yield from ((each.lineno, ast.unparse(each)) for each in conditions if KIND.search(ast.unparse(each)))


@pytest.mark.parametrize("package", FORBIDDEN)
def test_imports_point_one_way(package: str) -> None:
    files = sources(package)
    assert files, f"no Python file under {package}/"
    wrong = [
        f"{file.relative_to(ROOT)}:{line} imports {name}"
        for file in files
        for line, name in imported_packages(ast.parse(file.read_text()))
        if name in FORBIDDEN[package]
    ]
    assert not wrong, "\n".join(wrong)


def canonical(name: str) -> str:
    """A distribution's name as packaging compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def test_every_imported_package_is_declared() -> None:
    """What the code imports is the standard library, ours, or declared in pyproject.toml, not only by a dependency."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"].values()
    requirements = [*project["dependencies"], *(requirement for extra in extras for requirement in extra)]
    declared = {canonical(re.split(r"[\[=<>]", requirement)[0]) for requirement in requirements}
    known = set(sys.stdlib_module_names) | set(FORBIDDEN)
    distributions = packages_distributions()
    wrong = [
        f"{file.relative_to(ROOT)}:{line} imports {name}"
        for file in sources(*FORBIDDEN)
        for line, name in imported_packages(ast.parse(file.read_text()))
        if name not in known and not declared & set(map(canonical, distributions.get(name, [name])))
    ]
    assert not wrong, "\n".join(wrong)


def test_no_branch_on_the_kind_of_token_outside_the_seams() -> None:
    wrong = [
        f"{file.relative_to(ROOT)}:{line}: {condition}"
        for file in sources(*SEAM_FREE)
        for line, condition in kind_branches(ast.parse(file.read_text()))
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    "source",
    [
        'if spec.kind == "discrete": pass',
        "x = 1 if is_continuous else 2",
        "match tokenizer.spec.kind:\n    case _: pass",
        "y = [i for i in z if i.discrete]",
        'flags = kind == "continuous"',
    ],
)
def test_the_search_for_branches_finds_each_form(source: str) -> None:
    assert list(kind_branches(ast.parse(source)))


def test_the_search_for_imports_sees_inside_functions() -> None:
    assert list(imported_packages(ast.parse("def f():\n    from training.loop import g"))) == [(2, "training")]
    assert not list(imported_packages(ast.parse("from .training import g")))


IMPORT_EVERYTHING = """
import importlib, logging, os, pkgutil, random, signal, sys
import numpy, torch, torchaudio, transformers  # what these do on import is theirs

def state():
    return {
        "threads": (torch.get_num_threads(), torch.get_num_interop_threads()),
        "default dtype": torch.get_default_dtype(),
        "gradients": torch.is_grad_enabled(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "random numbers": (torch.get_rng_state().tolist(), random.getstate(), str(numpy.random.get_state())),
        "logging": (logging.root.level, list(logging.root.handlers), logging.getLogger("transformers").level),
        "folder": os.getcwd(),
        "arguments": list(sys.argv),
        "interrupt": signal.getsignal(signal.SIGINT),
    }

def no_network(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo"):
        raise RuntimeError(f"network used on import: {event} {arguments}")

before = state()
sys.addaudithook(no_network)
import flowomni
for module in pkgutil.walk_packages(flowomni.__path__, "flowomni."):
    importlib.import_module(module.name)
after = state()
changed = [name for name in before if before[name] != after[name]]
assert not changed, f"importing flowomni changed: {changed}"
"""


def test_importing_flowomni_has_no_side_effect() -> None:
    """In a fresh interpreter with arguments it must not parse; every module is imported."""
    command = [sys.executable, "-c", IMPORT_EVERYTHING, "--not-ours"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout == "", "importing flowomni printed"
