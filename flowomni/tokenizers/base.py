"""What every speech tokenizer is: wave to speech tokens and back, offline and step by step.

Shapes: B batch, S samples, L speech tokens, D latent dimension.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

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

    @property
    def tokens_per_sec(self) -> float:
        """Speech tokens in one second of audio."""
        return self.sample_rate_hz / self.samples_per_token

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
    """

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
            row has tokens. Positions outside the mask are zero.
        """
        raise NotImplementedError

    def decode(self, latent_BLD: Tensor) -> Tensor:
        """Tokens to wave: wav_BS with S = L * samples_per_token."""
        chunk_BS, state = self.step(latent_BLD, self.init_state(latent_BLD.shape[0]))
        return torch.cat([chunk_BS, self.flush(state)], dim=1)

    def init_state(self, batch_size: int) -> Any:
        """State before the first token."""
        raise NotImplementedError

    def step(self, latent_BLD: Tensor, state: Any) -> tuple[Tensor, Any]:
        """Decode L >= 1 more tokens: the samples that are final by now, (B, S) with S >= 0, and the next state."""
        raise NotImplementedError

    def flush(self, state: Any) -> Tensor:
        """The samples still owed after the last token."""
        raise NotImplementedError
