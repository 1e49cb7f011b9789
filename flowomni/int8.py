"""Int8 weights for the linear layers of a language model: a quarter of the memory, and of what a step has to read.

Weights only, symmetric, one scale per output; activations stay as they are, but for a prompt's (`_product_dtype`). The
numbers are torchao's. Its tensors are taken apart, because a compiled step would take them apart again at every call.

Shapes: N outputs, K inputs, `..` any leading dimensions.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .fast import MAX_FEW_ROWS
from .modeling import FlowOmniModel


class Int8Linear(nn.Module):
    """A linear layer with int8 weights."""

    weight_NK: Tensor
    scale_N: Tensor
    bias_N: Tensor | None

    def __init__(self, weight_NK: Tensor, scale_N: Tensor, bias_N: Tensor | None):
        super().__init__()
        self.register_buffer("weight_NK", weight_NK)
        self.register_buffer("scale_N", scale_N)
        self.register_buffer("bias_N", bias_N)

    @classmethod
    def of(cls, linear: nn.Linear) -> Int8Linear:
        """The same layer, rounded; the given one stays as it is."""
        from torchao.quantization import Int8WeightOnlyConfig, quantize_

        weight = linear.weight.detach()
        copied = nn.Linear(linear.in_features, linear.out_features, bias=False, device="meta")
        copied.weight = nn.Parameter(weight.clone())
        holder = nn.Sequential(copied)
        quantize_(holder, Int8WeightOnlyConfig())
        rounded: Any = holder[0].weight
        bias_N = None if linear.bias is None else linear.bias.detach()
        return cls(rounded.qdata, rounded.scale.flatten().to(weight.dtype), bias_N)

    def forward(self, input: Tensor) -> Tensor:
        """[.., K] -> [.., N]."""
        dtype = _product_dtype(input)
        output = F.linear(input.to(dtype), self.weight_NK.to(dtype)).to(input.dtype) * self.scale_N
        return output if self.bias_N is None else output + self.bias_N


def _product_dtype(input: Tensor) -> torch.dtype:
    """The input's own; bfloat16, which int8 values are exact in, for a prompt on a CPU that has units for it (AMX).

    27 rows through 76 MB of weights, two threads: 23 ms, and 43 in float32.
    """
    is_prompt = input.dtype == torch.float32 and math.prod(input.shape[:-1]) > MAX_FEW_ROWS
    if is_prompt and input.device.type == "cpu" and torch.cpu._is_amx_tile_supported():
        return torch.bfloat16
    return input.dtype


def check_torchao() -> None:
    """Raise ValueError where torchao is missing."""
    try:
        import torchao  # noqa: F401
    except ImportError as error:
        raise ValueError("int8 weights need torchao: pip install 'flowomni[int8]', or leave int8 out") from error


@torch.no_grad()
def quantise(model: FlowOmniModel) -> int:
    """Replace the linear layers of the language model, its output layer and the output blocks; how many.

    The table of embeddings stays as it is: where it is the output layer too, that gets int8 weights of its own. The
    model can no longer be trained or saved.
    """
    check_torchao()
    parts = [model.llm] if model.output_blocks is None else [model.llm, model.output_blocks]
    count = 0
    for part in parts:
        for module in list(part.modules()):
            for name, child in list(module.named_children()):
                if type(child) is nn.Linear:
                    setattr(module, name, Int8Linear.of(child))
                    count += 1
    return count
