"""What every speech tokenizer is: wave to speech tokens and back, offline and step by step.

Shapes: B batch, S samples, L speech tokens, D latent dimension, K codebooks, X whichever of D or K a token has.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel


@dataclass(frozen=True)
class TokenSpec:
    """What the rest of the system knows about a tokenizer's speech tokens.

    Attributes:
        kind: "continuous" (latents of `dim` numbers) or "discrete" (`num_codebooks` integers below `codebook_size`).
        dim: D of a continuous token, 0 otherwise.
        num_codebooks: K of a discrete token, 0 otherwise.
        codebook_size: V of a discrete token, 0 otherwise.
        sample_rate_hz: of the audio.
        samples_per_token: span of one token; decoding L tokens gives L times as many samples.
        lookahead_samples: decoding emits the samples of a token's span once this many samples' worth of later tokens
            is there: after l tokens, `l * samples_per_token - lookahead_samples` samples are out.
    """

    kind: str
    dim: int
    num_codebooks: int
    codebook_size: int
    sample_rate_hz: int
    samples_per_token: int
    lookahead_samples: int

    def __post_init__(self) -> None:
        if self.kind not in ("continuous", "discrete"):
            raise ValueError(f"kind is {self.kind!r}; it must be 'continuous' or 'discrete'")
        least = {"sample_rate_hz": 1, "samples_per_token": 1, "lookahead_samples": 0}
        least |= {"dim": 1} if self.kind == "continuous" else {"num_codebooks": 1, "codebook_size": 2}
        for name, value in least.items():
            if getattr(self, name) < value:
                raise ValueError(f"{name} is {getattr(self, name)}; of {self.kind} tokens it must be at least {value}")

    @property
    def tokens_per_sec(self) -> float:
        """Speech tokens in one second of audio."""
        return self.sample_rate_hz / self.samples_per_token

    @property
    def bitrate(self) -> float | None:
        """Bits per second of discrete tokens, K * log2(V) * tokens_per_sec; None of continuous ones."""
        if self.kind == "continuous":
            return None
        return self.num_codebooks * math.log2(self.codebook_size) * self.tokens_per_sec

    def empty_token(self) -> Tensor:
        """What stands where there is no speech token: NaN latents [D] or codes [K] of -1, so that a leak is loud."""
        if self.kind == "continuous":
            return torch.full((self.dim,), float("nan"))
        return torch.full((self.num_codebooks,), -1, dtype=torch.int64)


class SpeechTokenizer(PreTrainedModel):
    """The contract of a tokenizer; a subclass fills in every method below.

    Laws: `decode` is the concatenation of `step` over any chunks and `flush`, sample for sample; a row of a batch
    equals that row alone; no sample of token l depends on tokens beyond `spec.lookahead_samples`; state is a value, so
    that many streams can share one tokenizer and a state can be copied or saved.

    Its config class has a property `token_spec`, so that a head and a tokenizer that do not fit are refused when the
    configuration is read.

    Attributes:
        compilable: names of methods that can be compiled: (token or latents of one step, state) -> (wave, state), of
            tensors alone.
    """

    compilable: ClassVar[tuple[str, ...]] = ()

    @property
    def spec(self) -> TokenSpec:
        """Rates, sizes and look-ahead of this tokenizer's tokens."""
        return self.config.token_spec

    def encode(self, wav_BS: Tensor, lengths_B: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Wave to tokens.

        Args:
            wav_BS: audio at `spec.sample_rate_hz`; what lies beyond a row's length is ignored.
            lengths_B: samples per row; None means that every row is full.

        Returns:
            token_BLD (standardised latents) or code_BLK with L = ceil(S / samples_per_token), and mask_BL, true where a
            row has tokens. Positions outside the mask are zero. Audio shorter than a token is one token.
        """
        raise NotImplementedError

    def decode(self, token_BLX: Tensor) -> Tensor:
        """Tokens, as `encode` gives them, to wave: wav_BS with S = L * samples_per_token.

        Raises:
            ValueError: codes out of range.
        """
        chunk_BS, state = self.step(token_BLX, self.init_state(token_BLX.shape[0]))
        return torch.cat([chunk_BS, self.flush(state)], dim=1)

    def code_vectors(self) -> Tensor | None:
        """What each code adds to what is decoded [K, V, D], of codes whose parts add up; else None.

        Their geometry says which codes sound alike: heads for codes start from it.
        """
        return None

    def init_state(self, batch_size: int) -> Any:
        """State before the first token."""
        raise NotImplementedError

    def step(self, token_BLX: Tensor, state: Any) -> tuple[Tensor, Any]:
        """Decode L >= 1 more tokens: the samples that are final by now, (B, S) with S >= 0, and the next state."""
        raise NotImplementedError

    def flush(self, state: Any) -> Tensor:
        """The samples still owed after the last token."""
        raise NotImplementedError


@torch.no_grad()
def latent_statistics(latents_LD: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and deviation per dimension [D], float64, of latents (L, D) each; at least two in all."""
    stacked = [(len(x_LD), x_LD.double().cpu().sum(0), x_LD.double().cpu().square().sum(0)) for x_LD in latents_LD]
    counts, totals, squares = zip(*stacked, strict=True)
    count = sum(counts)
    assert count > 1
    mean_D = torch.stack(totals).sum(0) / count
    return mean_D, (torch.stack(squares).sum(0) / count - mean_D.square()).clamp(min=1e-8).sqrt()
