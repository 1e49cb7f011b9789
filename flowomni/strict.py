"""Strict construction of dataclasses from plain dicts: an unknown key is an error that names the nearest valid one."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

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


def check_keys(cls: type[PreTrainedConfig], extra: Mapping[str, Any], where: str = "") -> None:
    """Refuse keywords that neither a transformers config class nor its base knows.

    The base class would take any keyword for an attribute, so that a misspelt one would go unnoticed.

    Args:
        cls: the config class; the parameters of its `__init__` are its own keys.
        extra: what its `__init__` is about to hand to the base class.
        where: prefix for the error message ("speech_tokenizer.").

    Raises:
        ValueError: unknown key, with the nearest valid one.
    """
    from transformers import PreTrainedConfig

    valid = [name for name in inspect.signature(cls.__init__).parameters if name not in ("self", "kwargs")]
    known = {field.name for field in dataclasses.fields(PreTrainedConfig)} | _BASE_KEYS
    for key in extra:
        if not key.startswith("_") and not hasattr(PreTrainedConfig, key) and key not in known:
            raise ValueError(f"{where}{key}: unknown key{nearest(key, valid)}. Valid keys: {', '.join(valid)}")


# accepted by the base class without being fields of it
_BASE_KEYS = {"torch_dtype", "name_or_path", "attn_implementation", "model_type"}


def nearest(key: str, valid: list[str]) -> str:
    """`"; did you mean 'x'?"` for the nearest of `valid`, or an empty string."""
    match = difflib.get_close_matches(str(key), valid, n=1, cutoff=0.5)
    return f"; did you mean {match[0]!r}?" if match else ""
