"""Public neural codecs as speech tokenizers: the codes of Mimi, EnCodec and DAC, through transformers' own classes.

What is encoded and decoded is what the wrapped class gives on the same weights; here are only the masking of rows, the
streaming (`codec_layers`) and the spec. The latents of codecs that have some are in `continuous_codecs`.

Sources: Mimi arXiv 2410.00037, EnCodec arXiv 2210.13438, DAC arXiv 2306.06546.

Shapes: B batch, S samples, L speech tokens, K codebooks, X one speech token (D latents or K codes), C channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoConfig, AutoModel, PreTrainedConfig

from ..strict import check_keys
from .base import SpeechTokenizer, TokenSpec
from .codec_layers import DISCRETE, CodecSizes, codec_sizes, decoder_layers


class WrappedCodecConfig(PreTrainedConfig):
    """What the configs of `CodecTokenizer` and `LatentCodecTokenizer` share.

    Args:
        codec: the transformers config of the codec, or its dict with "model_type".
        sample_rate_hz, samples_per_token: the codec's own where None; another value is an error, so that a config can
            say what the rest of the system counts on.

    Raises:
        ValueError: an unknown key, a codec of another class or in a variant that is not known, a rate that is not the
            codec's.
    """

    codec_types: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self, codec: Any = None, sample_rate_hz: int | None = None, samples_per_token: int | None = None, **kwargs: Any
    ):
        check_keys(type(self), kwargs, "speech_tokenizer.")
        if isinstance(codec, dict):
            values = {key: value for key, value in codec.items() if key != "transformers_version"}
            codec = AutoConfig.for_model(values.pop("model_type", ""), **values)
        self.codec = codec
        self.sample_rate_hz = sample_rate_hz
        self.samples_per_token = samples_per_token
        if codec is not None:
            if codec.model_type not in self.codec_types:
                raise ValueError(
                    f"codec.model_type is {codec.model_type!r}; this tokenizer is for {', '.join(self.codec_types)}"
                )
            for name in ("sample_rate_hz", "samples_per_token"):
                found = getattr(self.sizes, name)
                if getattr(self, name) not in (None, found):
                    raise ValueError(
                        f"{name} is {getattr(self, name)}, but the codec ({codec.model_type}) has {found}: "
                        f"use another codec, or set {name} to {found}"
                    )
                setattr(self, name, found)
        super().__init__(**kwargs)

    @property
    def sizes(self) -> CodecSizes:
        """Sizes of the wrapped codec."""
        if self.codec is None:
            raise ValueError("codec is missing: give the config of a codec, with its model_type")
        return codec_sizes(self.codec)

    def to_dict(self) -> dict[str, Any]:
        output = super().to_dict()
        output["codec"] = None if self.codec is None else self.codec.to_dict()
        return output


@dataclass(frozen=True)
class CodecState:
    """Pasts of the decoder's layers, the number of rows, and how many samples of the tokens so far are yet to come."""

    layers: tuple[Any, ...]
    batch_size: int
    owed_samples: int


class WrappedCodec(SpeechTokenizer):
    """What `CodecTokenizer` and `LatentCodecTokenizer` share. The codec stays in evaluation mode: nothing trains it."""

    config_class: Any = WrappedCodecConfig
    base_model_prefix = "speech_tokenizer"
    main_input_name = "wav_BS"
    codec: Any

    def __init__(self, config: Any):
        super().__init__(config)
        self.codec = AutoModel.from_config(config.codec)
        self.codec.requires_grad_(False)

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing: the codec initialises itself."""

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        self.codec.eval()  # DAC's quantiser would drop codebooks
        return self

    @classmethod
    def from_codec(cls, path: str, **sections: Any) -> Self:
        """Wrap the codec of a local folder or Hub id.

        Args:
            path: of the codec's own checkpoint, as transformers saves it (`from_pretrained` loads a wrapped one).
            sections: further keys of the config class: `num_codebooks`, and rates to insist on.

        Raises:
            ValueError: nothing there, weights that lack tensors, or what the config class refuses; names the path.
        """
        try:
            codec_config = AutoConfig.from_pretrained(path)
            config = cls.config_class(codec=codec_config, **sections)
            codec, report = AutoModel.from_pretrained(path, dtype="float32", output_loading_info=True)
        except (OSError, ValueError, RuntimeError) as error:
            raise ValueError(f"{path}: {' '.join(str(error).split())[:300]}") from None
        missing = sorted(report["missing_keys"])
        if missing:
            raise ValueError(f"{path}: the checkpoint lacks tensors: {', '.join(missing[:3])}: copy it again")
        tokenizer = cls(config)
        tokenizer.codec.load_state_dict(codec.state_dict())
        return tokenizer.eval()

    # what a subclass fills in

    def encode_whole(self, wav_BS: Tensor) -> Tensor:
        """Wave of whole tokens to token_BLX, as the codec gives it."""
        raise NotImplementedError

    def to_hidden(self, token_BLX: Tensor) -> Tensor:
        """Tokens to the decoder's input, (B, C, L)."""
        raise NotImplementedError

    # the contract

    def encode(self, wav_BS: Tensor, lengths_B: Tensor | None = None) -> tuple[Tensor, Tensor]:
        num_samples, per_token = wav_BS.shape[1], self.spec.samples_per_token
        if lengths_B is None:
            lengths_B = torch.full((wav_BS.shape[0],), num_samples, device=wav_BS.device)
        inside_BS = torch.arange(num_samples, device=wav_BS.device) < lengths_B[:, None]
        num_tokens = -(-num_samples // per_token)
        wav_BS = functional.pad(torch.where(inside_BS, wav_BS, 0.0), (0, num_tokens * per_token - num_samples))
        num_tokens_B = -(-lengths_B // per_token)
        mask_BL = torch.arange(num_tokens, device=wav_BS.device) < num_tokens_B[:, None]
        token_BLX = torch.zeros(*mask_BL.shape, *self.spec.empty_token().shape, device=wav_BS.device)
        if self.spec.kind == "discrete":
            token_BLX = token_BLX.long()
        # Where an end is padded or mirrored, a row's tokens would depend on how far it is padded with zeros: then rows
        # of one length go together. A causal codec takes all rows at once.
        causal = self.spec.lookahead_samples == 0
        counts = [num_tokens] if causal else num_tokens_B.unique().tolist()
        for count in counts:
            rows_B = torch.ones_like(mask_BL[:, 0]) if causal else num_tokens_B == count
            if count > 0:
                token_BLX[rows_B, :count] = self.encode_whole(wav_BS[rows_B, : count * per_token])
        return token_BLX.masked_fill(~mask_BL[..., None], 0), mask_BL

    def init_state(self, batch_size: int) -> CodecState:
        return CodecState(decoder_layers(self.codec).init_state(batch_size), batch_size, 0)

    def step(self, token_BLX: Tensor, state: CodecState) -> tuple[Tensor, CodecState]:
        hidden_BCL = self.to_hidden(token_BLX)
        wav_B1S, layers = decoder_layers(self.codec).step(hidden_BCL, state.layers, last=False)
        owed = state.owed_samples + token_BLX.shape[1] * self.spec.samples_per_token - wav_B1S.shape[2]
        return wav_B1S[:, 0], CodecState(layers, state.batch_size, owed)

    def flush(self, state: CodecState) -> Tensor:
        """The samples still owed. A codec with an odd stride (DAC at 24 kHz) gives a few too few: zeros follow."""
        hidden_BCL = torch.zeros(state.batch_size, self.config.codec.hidden_size, 0, device=self.device)
        wav_B1S, _ = decoder_layers(self.codec).step(hidden_BCL, state.layers, last=True)
        return functional.pad(wav_B1S[:, 0], (0, state.owed_samples - wav_B1S.shape[2]))


class CodecConfig(WrappedCodecConfig):
    """Configuration of `CodecTokenizer`.

    Args:
        num_codebooks: K, how many codebooks are used, the first ones; None means all.
        codec, sample_rate_hz, samples_per_token: see `WrappedCodecConfig`.
    """

    model_type = "flowomni_codec"
    codec_types = DISCRETE

    def __init__(
        self,
        codec: Any = None,
        num_codebooks: int | None = None,
        sample_rate_hz: int | None = None,
        samples_per_token: int | None = None,
        **kwargs: Any,
    ):
        self.num_codebooks = num_codebooks
        super().__init__(codec, sample_rate_hz, samples_per_token, **kwargs)
        if self.codec is None:
            return
        available = self.sizes.num_codebooks
        least = getattr(self.codec, "num_semantic_quantizers", 1)
        if num_codebooks is None:
            self.num_codebooks = available
        elif not least <= num_codebooks <= available:
            raise ValueError(
                f"num_codebooks is {num_codebooks}, but the codec ({self.codec.model_type}) has {available}: "
                f"use {least} to {available}"
            )

    @property
    def token_spec(self) -> TokenSpec:
        """The spec of the tokenizer that this config describes."""
        sizes = self.sizes
        assert self.num_codebooks is not None
        return TokenSpec(
            kind="discrete",
            dim=0,
            num_codebooks=self.num_codebooks,
            codebook_size=sizes.codebook_size,
            sample_rate_hz=sizes.sample_rate_hz,
            samples_per_token=sizes.samples_per_token,
            lookahead_samples=sizes.lookahead_samples,
        )


class CodecTokenizer(WrappedCodec):
    """Discrete speech tokens of a public codec: the codes of its first K codebooks.

    `CodecTokenizer.from_codec("kyutai/mimi", num_codebooks=8)` wraps a codec; `save_pretrained` then writes a folder
    that serves as a FlowOmni model's `speech_tokenizer`.
    """

    config_class = CodecConfig

    def __init__(self, config: CodecConfig):
        super().__init__(config)
        self.post_init()

    def encode_whole(self, wav_BS: Tensor) -> Tensor:
        codec, num_codebooks, wav_B1S = self.codec, self.spec.num_codebooks, wav_BS[:, None]
        kind = self.config.codec.model_type
        if kind == "mimi":
            code_BKL = codec.encode(wav_B1S, num_quantizers=num_codebooks, use_streaming=False).audio_codes
        elif kind == "encodec":  # its own `encode` wants a bandwidth; a codebook's codes do not depend on later ones
            code_BKL = codec.quantizer.encode(codec.encoder(wav_B1S)).transpose(0, 1)[:, :num_codebooks]
        else:
            code_BKL = codec.encode(wav_B1S, n_quantizers=num_codebooks).audio_codes
        return code_BKL.transpose(1, 2)

    def to_hidden(self, code_BLK: Tensor) -> Tensor:
        self._check_codes(code_BLK)
        quantizer, code_BKL = self.codec.quantizer, code_BLK.transpose(1, 2)
        kind = self.config.codec.model_type
        if kind == "mimi":
            return quantizer.decode(code_BKL)
        if kind == "encodec":
            return quantizer.decode(code_BKL.transpose(0, 1))
        return quantizer.from_codes(code_BKL)[0]

    def _check_codes(self, code_BLK: Tensor) -> None:
        spec = self.spec
        if code_BLK.shape[2] != spec.num_codebooks:
            raise ValueError(f"codes of {code_BLK.shape[2]} codebooks given; num_codebooks is {spec.num_codebooks}")
        wrong_BLK = (code_BLK < 0) | (code_BLK >= spec.codebook_size)
        if bool(wrong_BLK.any()):
            row, token, codebook = wrong_BLK.nonzero()[0].tolist()
            raise ValueError(
                f"code {int(code_BLK[row, token, codebook])} (row {row}, token {token}, codebook {codebook}) is out of "
                f"range: codebook_size is {spec.codebook_size}, so codes are 0 to {spec.codebook_size - 1}"
            )


AutoConfig.register(CodecConfig.model_type, CodecConfig, exist_ok=True)
AutoModel.register(CodecConfig, CodecTokenizer, exist_ok=True)
