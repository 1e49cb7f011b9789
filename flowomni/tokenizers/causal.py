"""Causal convolutions with an explicit past: offline and streaming are the same code.

A convolution's past holds the inputs that its next output still needs. It starts as zeros of length `kernel - 1`, or
shorter by the look-ahead: then the first outputs simply come that many inputs later.

Shapes: B batch, C channels, T time steps, P past time steps.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional
from vocos.modules import ConvNeXtBlock

FEW_STEPS = 16  # outputs of a convolution up to which it is not worth a library's preparations


def init_past(conv: nn.Conv1d, batch_size: int, lookahead: int = 0) -> Tensor:
    """Zeros of shape (B, C, kernel - 1 - lookahead) on the convolution's device."""
    length = conv.kernel_size[0] - 1 - lookahead
    assert length >= 0
    return conv.weight.new_zeros(batch_size, conv.in_channels, length)


def causal_conv(conv: nn.Conv1d, x_BCT: Tensor, past_BCP: Tensor) -> tuple[Tensor, Tensor]:
    """Convolve the past and `x` without padding (the module's own padding is not used).

    Returns the outputs that are complete, (B, C, T) with T possibly 0, and the next past.
    """
    joined_BCT = torch.cat([past_BCP, x_BCT], dim=2)
    kernel, length = conv.kernel_size[0], joined_BCT.shape[2]
    next_BCP = joined_BCT[:, :, max(0, length - kernel + 1) :]
    if length < kernel:
        return x_BCT.new_zeros(x_BCT.shape[0], conv.out_channels, 0), next_BCP
    if conv.groups == conv.in_channels == conv.out_channels and length - kernel < FEW_STEPS:
        return _few_depthwise(conv, joined_BCT), next_BCP
    return functional.conv1d(joined_BCT, conv.weight, conv.bias, groups=conv.groups), next_BCP


def _few_depthwise(conv: nn.Conv1d, x_BCT: Tensor) -> Tensor:
    """A depthwise convolution as a small product per channel: for 8 outputs of 256 channels in 18 us, not in 49."""
    window_BCTK = x_BCT.unfold(2, conv.kernel_size[0], 1)
    y_BCT = (window_BCTK @ conv.weight.transpose(1, 2)).squeeze(-1)
    return y_BCT if conv.bias is None else y_BCT + conv.bias[:, None]


def causal_block(block: ConvNeXtBlock, x_BCT: Tensor, past_BCP: Tensor) -> tuple[Tensor, Tensor]:
    """`ConvNeXtBlock.forward` of vocos with its depthwise convolution made causal."""
    y_BCT, next_BCP = causal_conv(block.dwconv, x_BCT, past_BCP)
    y_BTC = block.norm(y_BCT.transpose(1, 2))
    y_BTC = block.pwconv2(block.act(block.pwconv1(y_BTC)))
    if block.gamma is not None:
        y_BTC = block.gamma * y_BTC
    return x_BCT + y_BTC.transpose(1, 2), next_BCP


def causal_stack(blocks: nn.ModuleList, x_BCT: Tensor, pasts: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
    """`causal_block` for each of `blocks` in turn, with one past each."""
    assert len(blocks) == len(pasts)
    next_pasts = []
    for block, past_BCP in zip(blocks, pasts, strict=True):
        x_BCT, past_BCP = causal_block(block, x_BCT, past_BCP)
        next_pasts.append(past_BCP)
    return x_BCT, tuple(next_pasts)


def init_pasts(blocks: nn.ModuleList, batch_size: int) -> tuple[Tensor, ...]:
    """The starting past of each of `blocks`."""
    return tuple(_init_block(block, batch_size) for block in blocks)


def _init_block(block: ConvNeXtBlock, batch_size: int) -> Tensor:
    return init_past(block.dwconv, batch_size)
