"""The depth head: a small transformer that draws the levels of one token one after the other, given the hidden state.

An RQ-transformer (arXiv 2203.01941) with own weights per level and weights of levels in the loss, as in Moshi (arXiv
2410.00037). It sees a single step, so nothing is remembered from one step to the next.

Shapes: B rows, N flattened valid positions, K codebooks (levels), V codebook size, H hidden width, W network width,
E width of the code tables, J levels in one pass, A attention heads, C width of one attention head.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..tokenizers.base import TokenSpec
from .base import Generators, HeadLoss, draw_uniform
from .codes import CodeHead, CodeSampling, CodesConfig, LevelLinear, guided_logits, pick

FEEDFORWARD = 4  # width of the feed-forward layer over W
Past = tuple[Tensor, Tensor]  # keys and values [N, A, levels so far, C]


@dataclass(frozen=True)
class DepthHeadConfig(CodesConfig):
    """Config of `DepthHead`; see `CodesConfig`. `num_blocks` are transformer blocks.

    Attributes:
        num_heads: attention heads; must divide `width`.
    """

    kind: str = "depth"
    width: int = 64
    num_blocks: int = 2
    num_heads: int = 4
    own_kind = "depth"

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.num_heads, bool) or not isinstance(self.num_heads, int) or self.num_heads < 1:
            raise ValueError(f"num_heads is {self.num_heads!r}; it must be a whole number of at least 1")
        if self.width % self.num_heads:
            raise ValueError(f"num_heads is {self.num_heads}, but width is {self.width}: it must be a multiple of it")


class DepthBlock(nn.Module):
    """Causal attention over levels and a feed-forward layer, every linear layer with own weights per level."""

    def __init__(self, num_levels: int, width: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.attend_in = LevelLinear(num_levels, width, 3 * width)
        self.attend_out = LevelLinear(num_levels, width, width)
        self.expand = LevelLinear(num_levels, width, FEEDFORWARD * width)
        self.project = LevelLinear(num_levels, FEEDFORWARD * width, width)

    def forward(self, x_NJW: Tensor, past: Past | None) -> tuple[Tensor, Past]:
        """The next J levels after those of `past`; all levels at once without, or one level with a past."""
        first, num_levels, width = 0 if past is None else past[0].shape[2], x_NJW.shape[1], x_NJW.shape[-1]
        joint_NJ3W = self.attend_in(F.layer_norm(x_NJW, (width,)), first, num_levels)
        query_NAJC, key_NAJC, value_NAJC = (
            part_NJW.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part_NJW in joint_NJ3W.chunk(3, dim=-1)
        )
        if past is not None:
            key_NAJC = torch.cat([past[0], key_NAJC], dim=2)
            value_NAJC = torch.cat([past[1], value_NAJC], dim=2)
        mixed_NAJC = F.scaled_dot_product_attention(query_NAJC, key_NAJC, value_NAJC, is_causal=past is None)
        x_NJW = x_NJW + self.attend_out(mixed_NAJC.transpose(1, 2).flatten(2), first, num_levels)
        expanded = F.silu(self.expand(F.layer_norm(x_NJW, (width,)), first, num_levels))
        return x_NJW + self.project(expanded, first, num_levels), (key_NAJC, value_NAJC)


class DepthHead(CodeHead):
    """Codes of one token drawn level by level. See `CodeHead` for arguments.

    Raises:
        ValueError: the tokenizer has a single codebook.
    """

    Config = DepthHeadConfig
    config: DepthHeadConfig

    def __init__(self, config: DepthHeadConfig, spec: TokenSpec, hidden_size: int):
        super().__init__(config, spec, hidden_size)
        num_levels = spec.num_codebooks
        self.condition = LevelLinear(num_levels, hidden_size, config.width)
        self.previous = LevelLinear(num_levels - 1, config.code_dim, config.width)
        self.blocks = nn.ModuleList(
            DepthBlock(num_levels, config.width, config.num_heads) for _ in range(config.num_blocks)
        )
        self.project = LevelLinear(num_levels, config.width, config.code_dim)

    @staticmethod
    def check_spec(head_kind: str, token_kind: str, spec: TokenSpec) -> None:
        """As `SpeechHead.check_spec`; also refuses a single codebook."""
        CodeHead.check_spec(head_kind, token_kind, spec)
        if spec.num_codebooks == 1:
            raise ValueError(
                f"head.kind is {head_kind!r}, which draws level by level, but the tokenizer's spec.num_codebooks is 1: "
                "set head.kind to 'single', or use a tokenizer with several codebooks"
            )

    def _logits(self, x_NJW: Tensor, pasts: list[Past] | None, first: int) -> tuple[Tensor, list[Past]]:
        """Logits `[N, J, V]` of the levels from `first` on."""
        found = []
        for index, block in enumerate(self.blocks):
            x_NJW, past = block(x_NJW, None if pasts is None else pasts[index])
            found.append(past)
        normed_NJW = F.layer_norm(x_NJW, x_NJW.shape[-1:])
        return self.tables.logits(self.project(normed_NJW, first, x_NJW.shape[1]), first), found

    def loss(self, hidden_NH: Tensor, target_N: Tensor, row_N: Tensor, generator: torch.Generator | None) -> HeadLoss:
        """See `CodeHead.score`. All levels at once, each given the true levels before it.

        Random are the rows without a condition.
        """
        with torch.autocast(hidden_NH.device.type, enabled=False):
            previous_NKW = self.previous(self.tables.read(target_N[:, :-1]))
            condition_NH = self._taught(hidden_NH, row_N, generator)
            x_NKW = self.condition(condition_NH.unsqueeze(1)) + F.pad(previous_NKW, (0, 0, 1, 0))
            return self.score(self._logits(x_NKW, None, 0)[0], target_N)

    @torch.no_grad()
    def sample(self, hidden_BH: Tensor, sampling: CodeSampling, generator: Generators) -> Tensor:
        """Draw codes `[B, K]`, int64, each level given those drawn before it."""
        uniform_BK = draw_uniform(len(hidden_BH), self.num_levels, generator, hidden_BH.device)
        codes: list[Tensor] = []
        pasts: list[Past] | None = None
        with torch.autocast(hidden_BH.device.type, enabled=False):
            condition_NKW = self.condition(self._conditions(hidden_BH, sampling).unsqueeze(1))
            for level in range(self.num_levels):
                x_N1W = condition_NKW[:, level : level + 1]
                if level > 0:
                    read_N1E = self.tables.read(codes[-1].repeat(sampling.num_passes).unsqueeze(1), level - 1)
                    x_N1W = x_N1W + self.previous(read_N1E, level - 1, 1)
                logits_N1V, pasts = self._logits(x_N1W, pasts, level)
                codes.append(pick(guided_logits(logits_N1V[:, 0], sampling), uniform_BK[:, level], sampling))
        return torch.stack(codes, dim=1)
