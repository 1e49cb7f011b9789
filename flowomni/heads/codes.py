"""Heads that draw codes with parallel softmaxes: `single` (one codebook) and `delay` (several, each one step later).

`delay` draws all levels of a step at once from the same hidden state. Level k of a token stands k steps after level 0,
so that it can depend on the levels before it, which the model has read by then (MusicGen, arXiv 2306.05284; Mini-Omni,
arXiv 2408.16725). A step's levels are thus of K different tokens, and one that no token has there is NONE.

Shapes: B rows, L steps, N flattened valid positions, K codebooks (levels), V codebook size, H hidden width,
W network width, E width of the code tables.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..streams import NONE
from ..strict import strict
from ..tokenizers.base import TokenSpec
from .base import Generators, HeadLoss, SpeechHead, draw_uniform, dropped_rows
from .layers import ResidualMlp


@dataclass(frozen=True)
class CodeSampling:
    """How to draw a code.

    Attributes:
        temperature: of the softmax; 0 takes the most likely code.
        top_k: draw among so many of the most likely codes; 0 means all.
        top_p: draw among the fewest most likely codes that together have this probability; 1 means all.
        guidance: scale of classifier-free guidance of the logits, before everything else; 1 is none, and saves the
            second pass.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    guidance: float = 1.0

    def __post_init__(self) -> None:
        if not (self.temperature >= 0 and math.isfinite(self.temperature)):
            raise ValueError(f"temperature is {self.temperature}; it must be a number of at least 0")
        if isinstance(self.top_k, bool) or not isinstance(self.top_k, int) or self.top_k < 0:
            raise ValueError(f"top_k is {self.top_k!r}; it must be a whole number of at least 0 (0 means all codes)")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; it must be above 0 and at most 1 (1 means all codes)")
        if not (self.guidance >= 0 and math.isfinite(self.guidance)):
            raise ValueError(f"guidance is {self.guidance}; it must be a number of at least 0 (1 means none)")

    @property
    def num_passes(self) -> int:
        """P: the conditional one and, with guidance, the unconditional one."""
        return 1 if self.guidance == 1.0 else 2


@dataclass(frozen=True)
class CodesConfig:
    """What every head for codes has.

    Attributes:
        width, num_blocks: of the network between hidden state and softmaxes.
        code_dim: E, width of the two tables per level that codes are read from and written with.
        level_weights: weight of each level in the loss, the last one given also for all further levels; they are
            divided by their sum. (100, 1) is Moshi's; () means equal.
        feedback_replace, feedback_drop: in training, the largest share of fed-back codes that are replaced by random
            ones, and of fed-back tokens that are left out; each row's shares are uniform up to these.
        condition_dropout: share of batch rows trained without their hidden state, for guidance.
        tables_from: what a new head's tables start from: "codebooks", the tokenizer's own where it tells them, so that
            codes that sound alike are alike from the first step, or "random".
        sampling: a trained head's best `CodeSampling`, kept with it; None takes the default.
    """

    kind: str
    width: int = 256
    num_blocks: int = 4
    code_dim: int = 64
    level_weights: tuple[float, ...] = ()
    feedback_replace: float = 0.0
    feedback_drop: float = 0.0
    condition_dropout: float = 0.1
    tables_from: str = "codebooks"
    sampling: dict[str, Any] | None = None

    own_kind: ClassVar[str]

    def __post_init__(self) -> None:
        object.__setattr__(self, "level_weights", tuple(self.level_weights))  # a list, from YAML or JSON
        if self.kind != self.own_kind:
            raise ValueError(f"kind is {self.kind!r}; the kind of this head is {self.own_kind!r}")
        for name in ("width", "num_blocks", "code_dim"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} is {value!r}; it must be a whole number of at least 1")
        if any(not (weight > 0 and math.isfinite(weight)) for weight in self.level_weights):
            raise ValueError(f"level_weights is {list(self.level_weights)}; each must be a number above 0")
        for name in ("feedback_replace", "feedback_drop", "condition_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be in [0, 1)")
        if self.tables_from not in ("codebooks", "random"):
            raise ValueError(f"tables_from is {self.tables_from!r}; it must be 'codebooks' or 'random'")
        strict(CodeSampling, self.sampling, "sampling")


@dataclass(frozen=True)
class SingleHeadConfig(CodesConfig):
    """Config of `SingleHead`; see `CodesConfig`."""

    kind: str = "single"
    own_kind = "single"


@dataclass(frozen=True)
class DelayHeadConfig(CodesConfig):
    """Config of `DelayHead`; see `CodesConfig`."""

    kind: str = "delay"
    own_kind = "delay"


class LevelLinear(nn.Module):
    """A linear layer of its own for each level: `[N, K, I]` (or `[N, 1, I]`, the same for all) -> `[N, K, O]`."""

    def __init__(self, num_levels: int, in_features: int, out_features: int):
        super().__init__()
        bound = 1 / math.sqrt(in_features)  # as nn.Linear
        self.weight_KOI = nn.Parameter(torch.empty(num_levels, out_features, in_features).uniform_(-bound, bound))
        self.bias_KO = nn.Parameter(torch.empty(num_levels, out_features).uniform_(-bound, bound))

    def forward(self, x_NKI: Tensor, first: int = 0, num_levels: int | None = None) -> Tensor:
        """The layers of `num_levels` levels from `first` on (None: of all), in the input's dtype."""
        levels = slice(first, None if num_levels is None else first + num_levels)
        weight_KOI, bias_KO = self.weight_KOI[levels].to(x_NKI.dtype), self.bias_KO[levels].to(x_NKI.dtype)
        x_KNI = x_NKI.transpose(0, 1).expand(len(weight_KOI), -1, -1)
        return torch.baddbmm(bias_KO[:, None], x_KNI, weight_KOI.transpose(1, 2)).transpose(0, 1)


class CodeTables(nn.Module):
    """For each level a table that codes are read from, and one that they are written with."""

    def __init__(self, num_levels: int, codebook_size: int, width: int):
        super().__init__()
        self.read_KVE = nn.Parameter(torch.randn(num_levels, codebook_size, width))
        self.write_KVE = nn.Parameter(torch.randn(num_levels, codebook_size, width) / math.sqrt(width))

    @torch.no_grad()
    def start_from(self, vector_KVD: Tensor) -> None:
        """Take over the geometry of codebooks: their main E directions, or all, with zeros beyond D.

        Codes are read at the codebooks' own scale, in units of the first level's deviation, so that a level that
        refines little says little; they are written with each level at the scale of a random table.
        """
        vector_KVD = vector_KVD.double()
        num_kept = min(self.read_KVE.shape[-1], vector_KVD.shape[-1])
        direction_DD = torch.linalg.svd(vector_KVD.flatten(0, 1), full_matrices=False).Vh
        kept_KVE = vector_KVD @ direction_DD[:num_kept].T
        scale_K11 = kept_KVE.square().mean(dim=(1, 2), keepdim=True).sqrt().clamp(min=1e-6)
        width = self.read_KVE.shape[-1]
        for table_KVE, value_KVE in (
            (self.read_KVE, kept_KVE / scale_K11[:1]),
            (self.write_KVE, kept_KVE / scale_K11 / math.sqrt(num_kept)),
        ):
            table_KVE.copy_(F.pad(value_KVE, (0, width - num_kept)))

    def read(self, code_K: Tensor, first: int = 0) -> Tensor:
        """Codes `[.., K]` of the levels from `first` on -> `[.., K, E]`, float32; zeros where a code is NONE."""
        level_K = torch.arange(first, first + code_K.shape[-1], device=code_K.device)
        return self.read_KVE[level_K, code_K.clamp(min=0)].float() * (code_K != NONE).unsqueeze(-1)

    def logits(self, x_NKE: Tensor, first: int = 0) -> Tensor:
        """Features `[N, K, E]` of the levels from `first` on -> `[N, K, V]`."""
        write_KVE = self.write_KVE[first : first + x_NKE.shape[1]].to(x_NKE.dtype)
        return torch.bmm(x_NKE.transpose(0, 1), write_KVE.transpose(1, 2)).transpose(0, 1)


class CodeHead(SpeechHead):
    """What every head for codes shares: how codes are read, spoilt, scored and picked.

    Args:
        config: size, loss weights, training noise.
        spec: of the tokenizer; its kind must be "discrete".
        hidden_size: width H of the hidden states.

    Raises:
        ValueError: naming both kinds, if the tokenizer's tokens are continuous; or more level weights than levels.
    """

    Sampling = CodeSampling
    token_kind = "discrete"

    def __init__(self, config: CodesConfig, spec: TokenSpec, hidden_size: int):
        super().__init__()
        self.check_spec(config.kind, self.token_kind, spec)
        given = list(config.level_weights) or [1.0]
        if len(given) > spec.num_codebooks:
            raise ValueError(
                f"head.level_weights has {len(given)} weights, but a token of this tokenizer has {spec.num_codebooks} "
                "levels: leave the others out"
            )
        given += given[-1:] * (spec.num_codebooks - len(given))
        self.level_weights = [weight / sum(given) for weight in given]
        self.config = config
        self.num_levels, self.codebook_size = spec.num_codebooks, spec.codebook_size
        self.tables = CodeTables(spec.num_codebooks, spec.codebook_size, config.code_dim)
        self.embedding = LevelLinear(spec.num_codebooks, config.code_dim, hidden_size)
        self.null_H = nn.Parameter(0.02 * torch.randn(hidden_size))  # stands for "no hidden state"

    def embed(self, token_BL: Tensor) -> Tensor:
        """Codes `[.., K]` -> `[.., H]`, the sum over levels; a code that is NONE adds nothing."""
        code_NK = token_BL.reshape(-1, self.num_levels)
        embedded_NKH = self.embedding(self.tables.read(code_NK)) * (code_NK != NONE).unsqueeze(-1)
        return embedded_NKH.sum(dim=1).reshape(*token_BL.shape[:-1], embedded_NKH.shape[-1])

    def perturb(self, token_BL: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        """Training noise on codes `[B, L, K]`: of what is fed back, some codes are random and some tokens left out.

        The shares are drawn per row, up to `feedback_replace` and `feedback_drop`. The targets stay.
        """
        config, fed_back_BL = self.config, token_BL
        generator = generator or torch.default_generator

        def hit(largest: float, *shape: int) -> Tensor:
            """True for a share of the places of each row."""
            share_B11 = largest * torch.rand(len(token_BL), 1, 1, generator=generator, device=generator.device)
            uniform = torch.rand(shape, generator=generator, device=generator.device)
            return (uniform < share_B11).to(token_BL.device)

        if config.feedback_replace > 0:
            random = torch.randint(
                self.codebook_size, token_BL.shape, generator=generator, device=generator.device, dtype=token_BL.dtype
            )
            replaced = hit(config.feedback_replace, *token_BL.shape) & (token_BL != NONE)
            fed_back_BL = torch.where(replaced, random.to(token_BL.device), fed_back_BL)
        if config.feedback_drop > 0:
            fed_back_BL = fed_back_BL.masked_fill(hit(config.feedback_drop, *token_BL.shape[:2], 1), NONE)
        return fed_back_BL, token_BL

    def default_sampling(self) -> CodeSampling:
        """The config's `sampling`, or `CodeSampling()`."""
        return strict(CodeSampling, self.config.sampling, "head.sampling")

    def _taught(self, hidden_NH: Tensor, row_N: Tensor, generator: torch.Generator | None) -> Tensor:
        """The hidden states in float32; in training, some rows' are the null state."""
        if not self.training:
            return hidden_NH.float()
        dropped_N = dropped_rows(row_N, self.config.condition_dropout, generator)
        return torch.where(dropped_N[:, None], self.null_H.float(), hidden_NH.float())

    def _conditions(self, hidden_BH: Tensor, sampling: CodeSampling) -> Tensor:
        """float32 `[P * B, H]`: the hidden states and, with guidance (P = 2), as many null states."""
        if sampling.num_passes == 1:
            return hidden_BH.float()
        if self.config.condition_dropout == 0:
            raise ValueError(
                f"guidance is {sampling.guidance} but head.condition_dropout is 0, so the head never learned to go "
                "without its condition; use guidance 1"
            )
        return torch.cat([hidden_BH.float(), self.null_H.float().expand_as(hidden_BH)])

    def score(self, logits_NKV: Tensor, code_NK: Tensor) -> HeadLoss:
        """Cross-entropy: weighted mean over levels, summed over positions; count = N. A NONE costs nothing.

        Returns:
            HeadLoss with parts `level_<k>` (cross-entropy) and `accuracy_<k>`, summed over the codes that there are.
        """
        there_NK = code_NK != NONE
        nats_NK = F.cross_entropy(
            logits_NKV.flatten(0, 1), code_NK.flatten(), ignore_index=NONE, reduction="none"
        ).view_as(code_NK)
        right_NK = (logits_NKV.detach().argmax(-1) == code_NK) & there_NK
        parts = {}
        for level in range(self.num_levels):
            count = there_NK[:, level].sum().float()
            parts[f"level_{level}"] = nats_NK[:, level].detach().sum(), count
            parts[f"accuracy_{level}"] = right_NK[:, level].sum().float(), count
        total = (nats_NK * nats_NK.new_tensor(self.level_weights)).sum()
        return HeadLoss(total, total.new_tensor(float(len(code_NK))), parts)


class ParallelHead(CodeHead):
    """One softmax per level, all from the same features of the hidden state."""

    config: CodesConfig

    def __init__(self, config: CodesConfig, spec: TokenSpec, hidden_size: int):
        super().__init__(config, spec, hidden_size)
        self.net = ResidualMlp(hidden_size, config.width, config.num_blocks)
        self.project = LevelLinear(spec.num_codebooks, config.width, config.code_dim)

    def _logits(self, hidden_NH: Tensor) -> Tensor:
        return self.tables.logits(self.project(self.net(hidden_NH).unsqueeze(1)))

    def loss(self, hidden_NH: Tensor, target_N: Tensor, row_N: Tensor, generator: torch.Generator | None) -> HeadLoss:
        """See `CodeHead.score`. Random are the rows without a condition."""
        with torch.autocast(hidden_NH.device.type, enabled=False):
            return self.score(self._logits(self._taught(hidden_NH, row_N, generator)), target_N)

    @torch.no_grad()
    def sample(self, hidden_BH: Tensor, sampling: CodeSampling, generator: Generators) -> Tensor:
        """Draw codes `[B, K]`, int64."""
        uniform_BK = draw_uniform(len(hidden_BH), self.num_levels, generator, hidden_BH.device)
        with torch.autocast(hidden_BH.device.type, enabled=False):
            logits_BKV = self._logits(self._conditions(hidden_BH, sampling))
            return pick(guided_logits(logits_BKV, sampling), uniform_BK, sampling)


class SingleHead(ParallelHead):
    """One softmax over one codebook (VQ, FSQ). See `CodeHead` for arguments.

    Raises:
        ValueError: the tokenizer has several codebooks.
    """

    Config = SingleHeadConfig

    @staticmethod
    def check_spec(head_kind: str, token_kind: str, spec: TokenSpec) -> None:
        """As `SpeechHead.check_spec`; also refuses several codebooks."""
        SpeechHead.check_spec(head_kind, token_kind, spec)
        if spec.num_codebooks > 1:
            raise ValueError(
                f"head.kind is {head_kind!r}, which draws one code a step, but the tokenizer's spec.num_codebooks is "
                f"{spec.num_codebooks}: set head.kind to 'delay' or 'depth', or use a tokenizer with one codebook"
            )


class DelayHead(ParallelHead):
    """K softmaxes, with one step of delay per level. See `CodeHead` for arguments."""

    Config = DelayHeadConfig

    @classmethod
    def part_delays(cls, spec: TokenSpec) -> Tensor:
        """0, 1, .. K - 1."""
        return torch.arange(spec.num_codebooks)


def guided_logits(logits_NV: Tensor, sampling: CodeSampling) -> Tensor:
    """Logits `[P * B, ..]` of the conditions of `CodeHead._conditions` -> those to draw from `[B, ..]`.

    Log-probabilities `u + guidance (c - u)` of the conditional c and the unconditional u.
    """
    if sampling.num_passes == 1:
        return logits_NV
    conditional_BV, unconditional_BV = logits_NV.log_softmax(-1).chunk(2)
    return unconditional_BV + sampling.guidance * (conditional_BV - unconditional_BV)


def pick(logits_V: Tensor, uniform: Tensor, sampling: CodeSampling) -> Tensor:
    """Codes `[..]` from logits `[.., V]` and uniform numbers `[..]`: temperature, then top-k, then top-p.

    By inversion of the distribution function over codes sorted by probability, so that one number makes one code.
    """
    if sampling.temperature == 0:
        return logits_V.argmax(-1)
    sorted_V, order_V = (logits_V.float() / sampling.temperature).sort(dim=-1, descending=True)
    if sampling.top_k:
        sorted_V, order_V = sorted_V[..., : sampling.top_k], order_V[..., : sampling.top_k]
    chance_V = sorted_V.softmax(-1)
    before_V = chance_V.cumsum(-1) - chance_V
    chance_V = torch.where(before_V < sampling.top_p, chance_V, 0.0)
    reached_V = chance_V.cumsum(-1)
    place = (reached_V <= uniform.unsqueeze(-1) * reached_V[..., -1:]).sum(-1, keepdim=True)
    last = (chance_V > 0).sum(-1, keepdim=True) - 1
    return order_V.gather(-1, place.minimum(last)).squeeze(-1)
