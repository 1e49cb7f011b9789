"""Where a model computes, and in which type."""

from __future__ import annotations

import torch

DTYPES = ("float32", "bfloat16", "float16")


def default_device() -> str:
    """A GPU where there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def check_device(device: str) -> None:
    """Raise ValueError where there is no such device."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).split("\n")[0]
        raise ValueError(f"device {device!r} cannot be used: {reason}; use 'cpu', or 'cuda' with a GPU") from error


def as_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """The type of that name.

    Raises:
        ValueError: a language model does not compute in it.
    """
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise ValueError(f"dtype is {name!r}; it must be one of {', '.join(DTYPES)}")
    return getattr(torch, name)
