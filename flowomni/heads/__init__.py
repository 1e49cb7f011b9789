"""Heads: how a speech token is read, taught and drawn. `HEADS` maps the `kind` of a head's config to its class."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..strict import strict
from ..tokenizers.base import TokenSpec
from .base import Generators, HeadLoss, SpeechHead
from .codes import CodeSampling, DelayHead, DelayHeadConfig, SingleHead, SingleHeadConfig
from .depth import DepthHead, DepthHeadConfig
from .flow import FlowHead, FlowHeadConfig, FlowSampling
from .regression import RegressionHead, RegressionHeadConfig, RegressionSampling

HEADS: dict[str, type[SpeechHead]] = {
    "flow": FlowHead,
    "regression": RegressionHead,
    "single": SingleHead,
    "delay": DelayHead,
    "depth": DepthHead,
}


def head_config(values: Mapping[str, Any]) -> Any:
    """The head's `Config` dataclass from `{"kind": .., ..}`.

    Raises:
        ValueError: unknown kind, unknown key (with the nearest valid one), or a value out of range.
    """
    kind = values.get("kind")
    if kind not in HEADS:
        raise ValueError(f"head.kind is {kind!r}; it must be one of {', '.join(HEADS)}")
    return strict(HEADS[kind].Config, values, "head")


def build_head(values: Mapping[str, Any], spec: TokenSpec, hidden_size: int) -> SpeechHead:
    """The head that `{"kind": .., ..}` describes, for a tokenizer's tokens and hidden states of `hidden_size`.

    Raises:
        ValueError: as `head_config`, and if the head cannot draw the tokenizer's kind of token.
    """
    config = head_config(values)
    return HEADS[config.kind](config, spec, hidden_size)


def part_delays(values: Mapping[str, Any], spec: TokenSpec) -> Tensor:
    """`SpeechHead.part_delays` of the head that `{"kind": .., ..}` describes."""
    return HEADS[head_config(values).kind].part_delays(spec)


__all__ = [
    "HEADS",
    "CodeSampling",
    "DelayHead",
    "DelayHeadConfig",
    "DepthHead",
    "DepthHeadConfig",
    "FlowHead",
    "FlowHeadConfig",
    "FlowSampling",
    "Generators",
    "HeadLoss",
    "RegressionHead",
    "RegressionHeadConfig",
    "RegressionSampling",
    "SingleHead",
    "SingleHeadConfig",
    "SpeechHead",
    "build_head",
    "head_config",
    "part_delays",
]
