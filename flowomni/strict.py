"""Strict construction of dataclasses from plain dicts: an unknown key is an error that names the nearest valid one."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any, TypeVar

T = TypeVar("T")


def strict(cls: type[T], values: Mapping[str, Any] | T | None, where: str) -> T:
    """`cls(**values)` for a dataclass `cls`, refusing keys that it does not have.

    Args:
        cls: a dataclass type; its `__post_init__` checks the values.
        values: a mapping, an instance of `cls` (returned as it is) or None (all defaults).
        where: the config path, for the error message ("head", "layout", ...).

    Raises:
        ValueError: unknown key (with the nearest valid key), or a value the dataclass refuses.
    """
    if values is None:
        return cls()
    if isinstance(values, cls):
        return values
    assert dataclasses.is_dataclass(cls) and isinstance(values, Mapping)
    valid = [field.name for field in dataclasses.fields(cls)]
    for key in values:
        if key not in valid:
            raise ValueError(f"{where}.{key}: unknown key{nearest(key, valid)}. Valid keys: {', '.join(valid)}")
    try:
        return cls(**values)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    except TypeError as error:
        raise ValueError(f"{where}: {error}") from None


def nearest(key: str, valid: list[str]) -> str:
    """`"; did you mean 'x'?"` for the nearest of `valid`, or an empty string."""
    match = difflib.get_close_matches(str(key), valid, n=1, cutoff=0.5)
    return f"; did you mean {match[0]!r}?" if match else ""
