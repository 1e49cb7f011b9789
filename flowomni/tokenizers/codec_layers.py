"""The public codecs of transformers: sizes as their configs declare them, and their decoders as layers that stream.

| model type                   | speech tokens      | decoder                                  | look-ahead      |
|------------------------------|--------------------|------------------------------------------|-----------------|
| mimi                         | codes, or latents  | causal convolutions and transformer      | none            |
| encodec (causal, mono)       | codes              | causal convolutions and LSTM             | at the start    |
| dac                          | codes              | convolutions padded on both sides        | about 10 tokens |
| pocket_tts_audio_tokenizer   | latents            | as Mimi                                  | none            |
| vibevoice_acoustic_tokenizer | latents            | causal ConvNeXt                          | none            |

EnCodec mirrors its first inputs as padding: the first sample waits for seven tokens, later ones for none.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedConfig

from .streamed import Chain, Conv, ConvTranspose, Layer, Lstm, Pointwise, Residual, Transformer


@dataclass(frozen=True)
class CodecSizes:
    """What a codec's config says.

    Attributes:
        sample_rate_hz, samples_per_token, lookahead_samples: see `TokenSpec`.
        num_codebooks, codebook_size: of its codes; 0 where it has none.
        latent_dim: of its continuous latents; 0 where only codes are offered.
    """

    sample_rate_hz: int
    samples_per_token: int
    lookahead_samples: int
    num_codebooks: int
    codebook_size: int
    latent_dim: int


DISCRETE = ("dac", "encodec", "mimi")
CONTINUOUS = ("mimi", "pocket_tts_audio_tokenizer", "vibevoice_acoustic_tokenizer")


def codec_sizes(config: PreTrainedConfig) -> CodecSizes:
    """Sizes of a codec from its transformers config.

    Raises:
        ValueError: another class of model, or a variant that cannot stream or is not mono.
    """
    sizes = {
        "dac": _dac_sizes,
        "encodec": _encodec_sizes,
        "mimi": _mimi_sizes,
        "pocket_tts_audio_tokenizer": _mimi_sizes,
        "vibevoice_acoustic_tokenizer": _vibevoice_sizes,
    }
    if config.model_type not in sizes:
        raise ValueError(f"codec.model_type is {config.model_type!r}; known codecs: {', '.join(sizes)}")
    return sizes[config.model_type](config)


def decoder_layers(codec: Any) -> Chain:
    """A codec's decoder, (B, hidden_size, T) to (B, 1, S), as layers that stream over the codec's own modules."""
    kind = codec.config.model_type
    if kind == "dac":
        return Chain(_dac_layers(codec.decoder))
    if kind == "encodec":
        return Chain(_seanet_layers(codec.decoder.layers))
    if kind == "vibevoice_acoustic_tokenizer":
        return Chain(_vibevoice_layers(codec.decoder))
    decoder = codec.decoder  # Mimi, and pocket-tts after it
    upsample = decoder.upsample
    return Chain(
        [
            ConvTranspose(upsample.conv, upsample.padding_left, upsample.padding_right),
            Transformer(decoder.decoder_transformer),
            *_seanet_layers(decoder.decoder_seanet.layers),
        ]
    )


# Mimi, pocket-tts and EnCodec: SEANet


def _mimi_sizes(config: PreTrainedConfig) -> CodecSizes:
    if not hasattr(config, "encoder_config"):
        found = transformers.__version__
        raise ValueError(f"codec {config.model_type!r} is another class in transformers {found}: install 5.21 or newer")
    _require_mono(config.audio_channels, "audio_channels")
    if config.encoder_config is None or config.decoder_config is None:
        raise ValueError(
            "codec has no encoder or no decoder (encoder_config or decoder_config is null): use a whole one"
        )
    if not config.use_causal_conv or config.pad_mode == "reflect":
        raise ValueError(
            f"codec.use_causal_conv is {config.use_causal_conv} and codec.pad_mode {config.pad_mode!r}; only a causal "
            "codec with pad_mode 'constant' or 'replicate' is known"
        )
    samples_per_token = math.prod(config.upsampling_ratios) * config.latent_stride
    if config.latent_stride < 2 or round(config.sampling_rate / config.frame_rate) != samples_per_token:
        raise ValueError(
            f"codec.frame_rate is {config.frame_rate}, but upsampling_ratios {config.upsampling_ratios} at "
            f"codec.sampling_rate {config.sampling_rate} give tokens of {samples_per_token} samples: correct frame_rate"
        )
    discrete = config.model_type == "mimi"
    return CodecSizes(
        sample_rate_hz=config.sampling_rate,
        samples_per_token=samples_per_token,
        lookahead_samples=0,
        num_codebooks=config.num_quantizers if discrete else 0,
        codebook_size=config.codebook_size if discrete else 0,
        latent_dim=config.latent_dim,
    )


def _encodec_sizes(config: PreTrainedConfig) -> CodecSizes:
    _require_mono(config.audio_channels, "audio_channels")
    whole_clip = config.norm_type != "weight_norm" or config.normalize or config.chunk_length_s is not None
    if whole_clip or not config.use_causal_conv:
        raise ValueError(
            f"codec.use_causal_conv is {config.use_causal_conv}, norm_type {config.norm_type!r}, normalize "
            f"{config.normalize}: this EnCodec (as the 48 kHz one) normalises whole clips and needs their loudness "
            "beside the codes; use the causal one at 24 kHz"
        )
    mirrored = config.kernel_size - 1 if config.pad_mode == "reflect" else 0
    return CodecSizes(
        sample_rate_hz=config.sampling_rate,
        samples_per_token=config.hop_length,
        lookahead_samples=mirrored * config.hop_length,
        num_codebooks=config.num_quantizers,
        codebook_size=config.codebook_size,
        latent_dim=0,
    )


def _seanet_layers(modules: Iterable[Any]) -> list[Layer]:
    """The modules of a SEANet decoder: Mimi's, pocket-tts' and EnCodec's differ in class but not in what they hold."""
    layers: list[Layer] = []
    for module in modules:
        conv = getattr(module, "conv", None)
        if isinstance(conv, nn.Conv1d):
            layers.append(Conv(conv, conv.dilation[0] * (conv.kernel_size[0] - 1), 0, module.pad_mode))
        elif isinstance(conv, nn.ConvTranspose1d):
            overlap = conv.kernel_size[0] - conv.stride[0]
            right = math.ceil(overlap * module.trim_right_ratio)
            layers.append(ConvTranspose(conv, overlap - right, right))
        elif hasattr(module, "block"):
            layers.append(Residual(Chain(_seanet_layers(module.block)), Chain(_seanet_layers([module.shortcut]))))
        elif hasattr(module, "lstm"):
            layers.append(Lstm(module.lstm))
        else:
            assert isinstance(module, nn.ELU | nn.Identity), type(module)
            layers.append(Pointwise(module))
    return layers


# DAC


def _dac_sizes(config: PreTrainedConfig) -> CodecSizes:
    return CodecSizes(
        sample_rate_hz=config.sampling_rate,
        samples_per_token=config.hop_length,
        lookahead_samples=_dac_lookahead(config.upsampling_ratios),
        num_codebooks=config.n_codebooks,
        codebook_size=config.codebook_size,
        latent_dim=0,
    )


def _dac_lookahead(ratios: Iterable[int]) -> int:
    """Samples by which DAC's decoder is late, layer by layer from the first convolution on."""
    late = 3
    for ratio in ratios:
        late = late * ratio + math.ceil(ratio / 2)  # the transposed convolution's trimmed left end
        late += sum(3 * dilation for dilation in (1, 3, 9))  # the residual units
    return late + 3


def _dac_layers(decoder: Any) -> list[Layer]:
    layers: list[Layer] = [_centred(decoder.conv1)]
    for block in decoder.block:
        padding = block.conv_t1.padding[0]
        layers += [Pointwise(block.snake1), ConvTranspose(block.conv_t1, padding, padding)]
        for unit in (block.res_unit1, block.res_unit2, block.res_unit3):
            inner: list[Layer] = [
                Pointwise(unit.snake1),
                _centred(unit.conv1),
                Pointwise(unit.snake2),
                _centred(unit.conv2),
            ]
            layers.append(Residual(Chain(inner)))
    return [*layers, Pointwise(decoder.snake1), _centred(decoder.conv2), Pointwise(torch.tanh)]


def _centred(conv: nn.Conv1d) -> Conv:
    """A convolution with its own zero padding on both sides."""
    assert isinstance(conv.padding, tuple)
    return Conv(conv, conv.padding[0], conv.padding[0])


# VibeVoice


def _vibevoice_sizes(config: PreTrainedConfig) -> CodecSizes:
    _require_mono(config.channels, "channels")
    return CodecSizes(
        sample_rate_hz=24_000,  # in no field of its config; its feature extractor has it
        samples_per_token=config.hop_length,
        lookahead_samples=0,
        num_codebooks=0,
        codebook_size=0,
        latent_dim=config.hidden_size,
    )


def _vibevoice_layers(decoder: Any) -> list[Layer]:
    layers: list[Layer] = [_left_padded(decoder.stem.conv)]
    layers += [layer for block in decoder.stem.stage for layer in _vibevoice_block(block)]
    for stage in decoder.conv_layers:
        layers.append(ConvTranspose(stage.convtr.convtr, 0, stage.convtr.padding_total))
        layers += [layer for block in stage.stage for layer in _vibevoice_block(block)]
    return [*layers, _left_padded(decoder.head)]


def _left_padded(module: Any) -> Conv:
    return Conv(module.conv, module.left_pad)


def _vibevoice_block(block: Any) -> list[Layer]:
    def norm(x_BCT: Tensor) -> Tensor:
        return block.norm(x_BCT.transpose(1, 2)).transpose(1, 2)

    def scale(x_BCT: Tensor) -> Tensor:
        return x_BCT * block.gamma[:, None]

    def feed_forward(x_BCT: Tensor) -> Tensor:
        y_BTC = block.ffn(block.ffn_norm(x_BCT.transpose(1, 2)))
        return x_BCT + y_BTC.transpose(1, 2) * block.ffn_gamma[:, None]

    return [Residual(Chain([Pointwise(norm), _left_padded(block.mixer), Pointwise(scale)])), Pointwise(feed_forward)]


def _require_mono(num_channels: int, name: str) -> None:
    if num_channels != 1:
        raise ValueError(f"codec.{name} is {num_channels}; speech tokens are of one channel: use a mono codec")
