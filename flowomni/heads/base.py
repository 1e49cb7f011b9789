"""The head seam: a speech token from a hidden state. Nothing outside heads knows what kind of token that is.

Shapes: B rows, L steps, H hidden width, N flattened valid positions; `..` is D for a continuous token (latent), K for a
discrete one (codes).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..tokenizers.base import TokenSpec

Generators = torch.Generator | Sequence[torch.Generator]


@dataclass(frozen=True)
class HeadLoss:
    """A loss to be divided once, by the global count."""

    sum: Tensor  # [] float32, the sum over positions, with gradient
    count: Tensor  # [] float32, the number of positions
    parts: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)  # name -> (sum [], count []), detached


class SpeechHead(nn.Module, ABC):
    """`embed` reads speech tokens, `loss` teaches and `sample` draws them, given the language model's hidden state.

    Built as `Head(config, spec, hidden_size)`. A spec of another kind raises ValueError naming both lines.
    """

    Config: ClassVar[type[Any]]  # the head's part of the model's configuration, a frozen dataclass with a `kind`
    Sampling: ClassVar[type[Any]]  # the knobs of `sample`, a frozen dataclass that shared code only passes through
    token_kind: ClassVar[str]  # "continuous" | "discrete"
    # names of methods that can be compiled: tensors of B rows (and constants) to a tensor of B rows, without generators
    compilable: ClassVar[tuple[str, ...]] = ()

    @staticmethod
    def check_spec(head_kind: str, token_kind: str, spec: TokenSpec) -> None:
        """Raise ValueError, naming both lines, if a head of `token_kind` tokens is put on another tokenizer."""
        if spec.kind != token_kind:
            raise ValueError(
                f"head.kind is {head_kind!r}, which draws {token_kind} speech tokens, but the tokenizer's spec.kind is "
                f"{spec.kind!r}; choose a head for {spec.kind} tokens or a tokenizer with {token_kind} ones"
            )

    @classmethod
    def part_delays(cls, spec: TokenSpec) -> Tensor:
        """By how many steps each part of a speech token comes after the step that the token belongs to: int64 `[..]`.

        The layout spreads tokens over steps accordingly and joins them again, so a head sees and draws what stands at
        one step. Parts that no token has there (before the first token's, after the last one's) are the empty token's.
        """
        return torch.zeros(spec.empty_token().shape, dtype=torch.int64)

    @classmethod
    def with_guidance(cls, config: Any, scale: float) -> dict[str, Any]:
        """What changes in the `config` of a trained head when guidance of that scale is distilled into it.

        Raises:
            ValueError: there is none for heads of this kind, or none in this one.
        """
        raise ValueError(f"head.kind is {config.kind!r}, and no guidance can be distilled into such heads")

    @abstractmethod
    def embed(self, token_BL: Tensor) -> Tensor:
        """Speech tokens `[B, L, ..]` -> `[B, L, H]`, to be summed into the language model's input."""

    @abstractmethod
    def perturb(self, token_BL: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        """Training noise on tokens `[B, L, ..]`: (what is fed back, what is the target)."""

    @abstractmethod
    def loss(self, hidden_NH: Tensor, target_N: Tensor, row_N: Tensor, generator: torch.Generator | None) -> HeadLoss:
        """The loss of `target_N` `[N, ..]` given `hidden_NH`; `row_N` (int64) says which batch row each position is of.

        Computed in float32 whatever the autocast or the weights' dtype. Every random draw comes from `generator`
        (None: torch's global one).
        """

    @abstractmethod
    def sample(self, hidden_BH: Tensor, sampling: Any, generator: Generators) -> Tensor:
        """Draw one speech token `[B, ..]` a row. With one generator a row, a row is what it would be alone."""

    @abstractmethod
    def default_sampling(self) -> Any:
        """The `Sampling` that suits what the head was trained for."""


def draw_noise(num_rows: int, dim: int, generator: Generators, device: torch.device) -> Tensor:
    """Standard normal float32 `[num_rows, dim]`, from one generator for all rows or from one a row.

    Drawn on the generator's device, so that one seed gives the same noise everywhere.
    """
    return _draw(torch.randn, num_rows, dim, generator, device)


def draw_uniform(num_rows: int, dim: int, generator: Generators, device: torch.device) -> Tensor:
    """Uniform float32 `[num_rows, dim]` in [0, 1); otherwise as `draw_noise`."""
    return _draw(torch.rand, num_rows, dim, generator, device)


def _draw(draw: Callable[..., Tensor], num_rows: int, dim: int, generator: Generators, device: torch.device) -> Tensor:
    check_generators(num_rows, generator)
    if isinstance(generator, torch.Generator):
        return draw(num_rows, dim, generator=generator, device=generator.device).to(device)
    return torch.cat([_draw(draw, 1, dim, row_generator, device) for row_generator in generator])


def dropped_rows(row_N: Tensor, share: float, generator: torch.Generator | None) -> Tensor:
    """bool `[N]`: positions of batch rows that are trained without their hidden state, for classifier-free guidance."""
    generator = generator or torch.default_generator
    num_rows = int(row_N.max()) + 1 if len(row_N) else 0
    uniform = torch.rand(num_rows, generator=generator, device=generator.device).to(row_N.device)
    return (uniform < share)[row_N]


def check_generators(num_rows: int, generator: Generators) -> None:
    """Raise ValueError unless there is one generator for all rows, or one a row."""
    if not isinstance(generator, torch.Generator) and len(generator) != num_rows:
        raise ValueError(f"{len(generator)} generators for {num_rows} rows; pass one for all rows or one a row")
