"""What command-line programs share: an error is one line, and exit status 2."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from .api import FlowOmni


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        print(f"error: {message} (see --help)", file=sys.stderr)
        raise SystemExit(2)


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """What `FlowOmni.from_pretrained` takes."""
    parser.add_argument("--model", help="model folder (default: the model in the box)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, .. (default: a GPU if there is one)")
    parser.add_argument("--dtype", default="float32", help="of the language model, as bfloat16 (default: float32)")
    parser.add_argument("--compile", action="store_true", help="compile the steps: a slow start, then faster answers")
    parser.add_argument(
        "--int8", action="store_true", help="int8 weights: pip install 'flowomni[int8]'; with --compile"
    )


def load(options: argparse.Namespace) -> FlowOmni:
    """The model that `add_model_options` describe."""
    from .api import FlowOmni
    from .devices import default_device

    device = options.device or default_device()
    return FlowOmni.from_pretrained(
        options.model, device, dtype=options.dtype, compile=options.compile, int8=options.int8
    )


def exit_status(command: Callable[[], int | None], stopped: str = "stopped") -> int:
    """Run `command`: its exit status (None is 0), 2 after a ValueError or OSError, 130 after Ctrl-C.

    Args:
        stopped: what to say after Ctrl-C.
    """
    try:
        return command() or 0
    except KeyboardInterrupt:
        print(f"\n{stopped}", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of the output has left, as `| head` does: nobody is there to be told
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
