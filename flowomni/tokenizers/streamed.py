"""Layers that stream, causal or not: each takes more inputs, gives the outputs that no later input changes, and carries
its past as a value.

    layer.step(x_BCT, state, last) -> y_BCT, state

`last` says that no input follows (x may be empty then): a layer adds its padding on the right and gives what it still
owes. Over any chunks the outputs are those of the module run at once, so that a decoder made of such layers streams
exactly, whatever padding its convolutions have, with a look-ahead that is the sum of theirs.

Shapes: B batch, C channels, T time steps, P past time steps.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import DynamicCache


class Layer(Protocol):
    """What each class below does."""

    def init_state(self, batch_size: int) -> Any:
        """State before the first input."""

    def step(self, x_BCT: Tensor, state: Any, last: bool) -> tuple[Tensor, Any]:
        """T >= 0 more inputs to the outputs that are final now, and the next state."""


@dataclass(frozen=True)
class Chain:
    """Layers one after the other."""

    layers: Sequence[Layer]

    def init_state(self, batch_size: int) -> tuple[Any, ...]:
        return tuple(layer.init_state(batch_size) for layer in self.layers)

    def step(self, x_BCT: Tensor, state: tuple[Any, ...], last: bool) -> tuple[Tensor, tuple[Any, ...]]:
        next_states = []
        for layer, layer_state in zip(self.layers, state, strict=True):
            x_BCT, layer_state = layer.step(x_BCT, layer_state, last)
            next_states.append(layer_state)
        return x_BCT, tuple(next_states)


@dataclass(frozen=True)
class Pointwise:
    """A function of each time step alone that keeps the number of channels."""

    function: Callable[[Tensor], Tensor]

    def init_state(self, batch_size: int) -> None:
        return None

    def step(self, x_BCT: Tensor, state: None, last: bool) -> tuple[Tensor, None]:
        return (self.function(x_BCT) if x_BCT.shape[2] > 0 else x_BCT), None


@dataclass(frozen=True)
class ConvState:
    """Inputs that a convolution still needs, and whether its padding on the left is among them."""

    past_BCP: Tensor
    padded: bool


@dataclass(frozen=True)
class Conv:
    """A convolution of stride 1.

    Attributes:
        conv: its weights; its own padding is not used.
        left, right: padding. Outputs come `right` inputs late.
        mode: of the padding on the left. "reflect" mirrors the first inputs, so that nothing comes out before
            `left + 1` of them are there; "replicate" and "constant" (zeros) wait for none. On the right are zeros.
    """

    conv: nn.Conv1d
    left: int
    right: int = 0
    mode: str = "constant"

    def init_state(self, batch_size: int) -> ConvState:
        zeros = self.mode == "constant"
        past_BCP = self.conv.weight.new_zeros(batch_size, self.conv.in_channels, self.left if zeros else 0)
        return ConvState(past_BCP, padded=zeros)

    def step(self, x_BCT: Tensor, state: ConvState, last: bool) -> tuple[Tensor, ConvState]:
        conv = self.conv
        joined_BCT = torch.cat([state.past_BCP, x_BCT], dim=2)
        nothing_BCT = x_BCT.new_zeros(x_BCT.shape[0], conv.out_channels, 0)
        if not state.padded:
            wanted = self.left + 1 if self.mode == "reflect" and not last else 1
            if joined_BCT.shape[2] < wanted:
                return nothing_BCT, ConvState(joined_BCT, padded=False)
            joined_BCT = _pad_left(joined_BCT, self.left, self.mode)
        if last:
            joined_BCT = functional.pad(joined_BCT, (0, self.right))
        num_outputs = joined_BCT.shape[2] - conv.dilation[0] * (conv.kernel_size[0] - 1)
        next_state = ConvState(joined_BCT[:, :, max(0, num_outputs) :], padded=True)
        if num_outputs <= 0:
            return nothing_BCT, next_state
        y_BCT = functional.conv1d(joined_BCT, conv.weight, conv.bias, dilation=conv.dilation, groups=conv.groups)
        return y_BCT, next_state


def _pad_left(x_BCT: Tensor, left: int, mode: str) -> Tensor:
    """As the codecs' `_pad1d`: an input too short to be mirrored is continued by zeros for that."""
    missing = max(0, left + 1 - x_BCT.shape[2]) if mode == "reflect" else 0
    padded_BCT = functional.pad(functional.pad(x_BCT, (0, missing)), (left, 0), mode=mode)
    return padded_BCT[:, :, : left + x_BCT.shape[2]]


@dataclass(frozen=True)
class TransposeState:
    """Outputs that later inputs still add to (None before the first input), and how many are yet to be trimmed."""

    tail_BCP: Tensor | None
    trim: int


@dataclass(frozen=True)
class ConvTranspose:
    """A transposed convolution; `left` and `right` are trimmed from the ends of its full output."""

    conv: nn.ConvTranspose1d
    left: int
    right: int

    def init_state(self, batch_size: int) -> TransposeState:
        return TransposeState(None, self.left)

    def step(self, x_BCT: Tensor, state: TransposeState, last: bool) -> tuple[Tensor, TransposeState]:
        conv, tail_BCP = self.conv, state.tail_BCP
        stride, num_inputs = conv.stride[0], x_BCT.shape[2]
        overlap = conv.kernel_size[0] - stride
        if num_inputs > 0:
            y_BCT = _conv_transpose(conv, x_BCT)
            if tail_BCP is not None:
                y_BCT = y_BCT + functional.pad(tail_BCP, (0, num_inputs * stride))
        elif tail_BCP is not None:
            y_BCT = tail_BCP
        else:
            return x_BCT.new_zeros(x_BCT.shape[0], conv.out_channels, 0), state
        num_final = num_inputs * stride + (overlap - self.right if last else 0)
        trim = min(state.trim, num_final)
        final_BCT = y_BCT[:, :, trim:num_final]
        if conv.bias is not None:
            final_BCT = final_BCT + conv.bias[:, None]
        return final_BCT, TransposeState(y_BCT[:, :, num_final:], state.trim - trim)


def _conv_transpose(conv: nn.ConvTranspose1d, x_BCT: Tensor) -> Tensor:
    """The full output, without bias and trimming."""
    stride, kernel, num_inputs = conv.stride[0], conv.kernel_size[0], x_BCT.shape[2]
    if conv.groups > 1 or num_inputs >= 16:
        return functional.conv_transpose1d(x_BCT, conv.weight, None, stride=stride, groups=conv.groups)
    # torch 2.13 on a CPU takes up to 70 times longer for fewer than 16 inputs than the same product written out
    columns_BTC = x_BCT.transpose(1, 2) @ conv.weight.flatten(1)
    length = (num_inputs - 1) * stride + kernel
    return functional.fold(columns_BTC.transpose(1, 2), (1, length), (1, kernel), stride=(1, stride))[:, :, 0]


@dataclass(frozen=True)
class ResidualState:
    """States of both ways, and what the shortcut gave that waits for the other."""

    inner: Any
    shortcut: Any
    waiting_BCP: Tensor | None


@dataclass(frozen=True)
class Residual:
    """`inner(x) + shortcut(x)`, where the shortcut (identity without layers) looks no further ahead than `inner`."""

    inner: Chain
    shortcut: Chain = Chain(())

    def init_state(self, batch_size: int) -> ResidualState:
        return ResidualState(self.inner.init_state(batch_size), self.shortcut.init_state(batch_size), None)

    def step(self, x_BCT: Tensor, state: ResidualState, last: bool) -> tuple[Tensor, ResidualState]:
        y_BCT, inner = self.inner.step(x_BCT, state.inner, last)
        waiting_BCP, shortcut = self.shortcut.step(x_BCT, state.shortcut, last)
        if state.waiting_BCP is not None:
            waiting_BCP = torch.cat([state.waiting_BCP, waiting_BCP], dim=2)
        num_final = y_BCT.shape[2]
        return y_BCT + waiting_BCP[:, :, :num_final], ResidualState(inner, shortcut, waiting_BCP[:, :, num_final:])


@dataclass(frozen=True)
class Lstm:
    """`lstm(x) + x`; the state is hidden and cell, (layers, B, C) each."""

    lstm: nn.LSTM

    def init_state(self, batch_size: int) -> tuple[Tensor, Tensor]:
        zeros = self.lstm.all_weights[0][0].new_zeros(self.lstm.num_layers, batch_size, self.lstm.hidden_size)
        return zeros, zeros

    def step(self, x_BCT: Tensor, state: tuple[Tensor, Tensor], last: bool) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        if x_BCT.shape[2] == 0:
            return x_BCT, state
        x_TBC = x_BCT.permute(2, 0, 1)
        y_TBC, next_state = self.lstm(x_TBC, state)
        return (y_TBC + x_TBC).permute(1, 2, 0), next_state


@dataclass(frozen=True)
class Transformer:
    """A causal transformer of transformers (hidden states in and out) with its key-value cache as the state."""

    model: Any

    def init_state(self, batch_size: int) -> DynamicCache:
        return DynamicCache(config=self.model.config)

    def step(self, x_BCT: Tensor, state: DynamicCache, last: bool) -> tuple[Tensor, DynamicCache]:
        if x_BCT.shape[2] == 0:
            return x_BCT, state
        cache = copy.copy(state)  # layers are copied, tensors are shared: appending makes new ones
        cache.layers = [copy.copy(layer) for layer in state.layers]
        y_BTC = self.model(x_BCT.transpose(1, 2), past_key_values=cache, use_cache=True).last_hidden_state
        return y_BTC.transpose(1, 2), cache
