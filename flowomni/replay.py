"""CUDA graphs: the kernels of a step are recorded once and then started together.

A step of few rows is hundreds of kernels, and each runs for less time than Python and the driver need to launch it.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_log = logging.getLogger(__name__)
MAX_RECORDS = 32  # each remembers its kernels, and holds its inputs; the memory of all else is shared


@dataclass
class _Record:
    """Inputs of its own, and what was recorded of the function's work on them; None before that."""

    inputs: tuple[Any, ...]
    graph: Any = None
    outputs: Any = None


class Replayed:
    """A function whose kernels are recorded when shapes and places in memory are met a second time, then replayed.

    Where recording fails the function itself is called from then on, after one warning that says why.

    Args:
        function: of tensors on a CUDA device, and of values that can be hashed. It must decide nothing by what the
            tensors hold and draw no random numbers. A list of tensors is read and written where it stands; any other
            tensor is copied to the record's own first.
    """

    def __init__(self, function: Callable[..., Any]):
        self._function = function
        self._records: OrderedDict[Any, _Record] = OrderedDict()
        self._pool: Any = None
        self._records_fail = False

    def __call__(self, *arguments: Any) -> Any:
        if self._records_fail:
            return self._function(*arguments)
        # a tensor of inference mode is of another kind, to the compiler too
        key = torch.is_inference_mode_enabled(), *map(_key, arguments)
        known = key in self._records
        record = self._records[key] if known else _Record(tuple(_own(argument) for argument in arguments))
        self._records[key] = record
        self._records.move_to_end(key)
        while len(self._records) > MAX_RECORDS:
            self._records.popitem(last=False)
        for own, given in zip(record.inputs, arguments, strict=True):
            if isinstance(own, Tensor):
                own.copy_(given)
        if not known:  # compiles, chooses algorithms, takes memory: not to be recorded
            return self._function(*record.inputs)
        if record.graph is None:
            try:
                self._record(record)
            except RuntimeError as error:
                _log.warning("kernels are not recorded: %s", str(error).split("\n")[0])
                self._records_fail = True
                self._records.clear()
                return self._function(*arguments)
        record.graph.replay()
        return _copied(record.outputs)

    def _record(self, record: _Record) -> None:
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            record.outputs = self._function(*record.inputs)
        record.graph = graph


def _key(argument: Any) -> Any:
    if isinstance(argument, Tensor):
        return argument.shape, argument.stride(), argument.dtype
    if isinstance(argument, list):
        return tuple((each.data_ptr(), each.shape, each.dtype) for each in argument)
    return argument


def _own(argument: Any) -> Any:
    return torch.empty_like(argument) if isinstance(argument, Tensor) else argument


def _copied(outputs: Any) -> Any:
    if isinstance(outputs, Tensor):
        return outputs.clone()
    return tuple(each.clone() for each in outputs)
