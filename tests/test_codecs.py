"""Laws of the public codecs behind `SpeechTokenizer`, on saved checkpoints of the true classes with random weights.

Shapes: B batch, S samples, L speech tokens, X one speech token (D latents or K codes), C channels.
"""

from __future__ import annotations

import copy
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    DacConfig,
    EncodecConfig,
    MimiConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    VibeVoiceAcousticTokenizerConfig,
)

from flowomni.build import assemble, load_model, save_model
from flowomni.tokenizers.codec_layers import decoder_layers
from flowomni.tokenizers.codecs import CodecConfig, CodecTokenizer, WrappedCodec
from flowomni.tokenizers.continuous_codecs import LatentCodecConfig, LatentCodecTokenizer
from flowomni.tokenizers.loading import load_speech_tokenizer
from tests.tiny import INSTRUCTIONS, save_tiny_parts, tiny_speech_tokenizer

try:
    from transformers import PocketTTSAudioTokenizerConfig
except ImportError:
    pytest.skip("Mimi and pocket-tts need transformers 5.21", allow_module_level=True)

SEANET: dict[str, Any] = {"hidden_size": 16, "num_filters": 4, "upsampling_ratios": [4, 3]}
TRANSFORMER = {
    "num_hidden_layers": 2,
    "intermediate_size": 24,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "sliding_window": 12,  # shorter than the tests' streams
    "upsample_groups": 16,
}
CODES = {"codebook_size": 16, "codebook_dim": 8}
CODECS: dict[str, PreTrainedConfig] = {
    "mimi": MimiConfig(**SEANET, **TRANSFORMER, **CODES, num_quantizers=4, vector_quantization_hidden_dimension=8),
    "encodec": EncodecConfig(**SEANET, codebook_size=16, target_bandwidths=[8.0, 24.0, 32.0]),
    "dac": DacConfig(  # an odd stride, as in the 24 kHz one
        encoder_hidden_size=4,
        downsampling_ratios=[2, 5],
        decoder_hidden_size=16,
        n_codebooks=4,
        codebook_size=16,
        codebook_dim=4,
        quantizer_dropout=1.0,
    ),
    "pocket": PocketTTSAudioTokenizerConfig(**SEANET, **TRANSFORMER, latent_stride=4, latent_dim=6),
    "vibevoice": VibeVoiceAcousticTokenizerConfig(
        hidden_size=6, num_filters=4, downsampling_ratios=[2, 3], depths=[1, 1, 2]
    ),
}
NUM_CODEBOOKS, NUM_TOKENS = 3, 40
NAMES = {
    "mimi": ("mimi", CodecTokenizer),
    "encodec": ("encodec", CodecTokenizer),
    "dac": ("dac", CodecTokenizer),
    "mimi_latents": ("mimi", LatentCodecTokenizer),
    "pocket": ("pocket", LatentCodecTokenizer),
    "vibevoice": ("vibevoice", LatentCodecTokenizer),
}


def codec_model(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    codec = AutoModel.from_config(CODECS[name]).eval()
    with torch.no_grad():  # as if trained: every layer sees its neighbours, and no codebook is empty
        for parameter in codec.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
        for buffer_name, buffer in codec.named_buffers():
            if buffer_name.endswith((".embed", ".embed_sum")):
                buffer.copy_(torch.randn_like(buffer) * 0.2)
    return codec


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("codecs")
    for name in CODECS:
        codec_model(name).save_pretrained(root / name)
    return {name: root / name for name in CODECS}


def wrap(name: str, folders: dict[str, Path]) -> WrappedCodec:
    codec, wrapper = NAMES[name]
    if wrapper is CodecTokenizer:
        return CodecTokenizer.from_codec(str(folders[codec]), num_codebooks=NUM_CODEBOOKS)
    tokenizer = LatentCodecTokenizer.from_codec(str(folders[codec]))
    generator = torch.Generator().manual_seed(3)
    tokenizer.latent_mean_D.normal_(generator=generator)
    tokenizer.latent_std_D.uniform_(0.5, 2.0, generator=generator)
    return tokenizer


@pytest.fixture(params=NAMES)
def name(request) -> str:
    return request.param


@pytest.fixture
def tokenizer(name: str, folders: dict[str, Path]) -> WrappedCodec:
    return wrap(name, folders)


def random_tokens(tokenizer: WrappedCodec, batch_size: int, num_tokens: int, seed: int = 0) -> Tensor:
    generator, spec = torch.Generator().manual_seed(seed), tokenizer.spec
    if spec.kind == "discrete":
        shape = (batch_size, num_tokens, spec.num_codebooks)
        return torch.randint(0, spec.codebook_size, shape, generator=generator)
    return torch.randn(batch_size, num_tokens, spec.dim, generator=generator)


def random_wav(batch_size: int, num_samples: int) -> Tensor:
    return torch.randn(batch_size, num_samples, generator=torch.Generator().manual_seed(5)) * 0.3


@torch.no_grad()
def stream(tokenizer: WrappedCodec, token_BLX: Tensor, chunk_tokens: int) -> list[Tensor]:
    state, chunks = tokenizer.init_state(token_BLX.shape[0]), []
    for chunk_BLX in token_BLX.split(chunk_tokens, dim=1):
        chunk_BS, state = tokenizer.step(chunk_BLX, state)
        chunks.append(chunk_BS)
    return [*chunks, tokenizer.flush(state)]


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


# wrappers equal what they wrap


@torch.no_grad()
def wrapped_codes(codec: PreTrainedModel, wav_B1S: Tensor) -> Tensor:
    kind = codec.config.model_type
    if kind == "mimi":
        return codec.encode(wav_B1S, num_quantizers=NUM_CODEBOOKS).audio_codes.transpose(1, 2)
    if kind == "encodec":  # three codebooks are 24 kbit/s here
        return codec.encode(wav_B1S, bandwidth=24.0).audio_codes[0].transpose(1, 2)
    return codec.encode(wav_B1S, n_quantizers=NUM_CODEBOOKS).audio_codes.transpose(1, 2)


@torch.no_grad()
def wrapped_decode(codec: PreTrainedModel, code_BKL: Tensor) -> Tensor:
    kind = codec.config.model_type
    if kind == "mimi":
        return codec.decode(code_BKL).audio_values[:, 0]
    if kind == "encodec":
        return codec.decode(code_BKL[None], [None]).audio_values[:, 0]
    return codec.decode(audio_codes=code_BKL).audio_values


@pytest.mark.parametrize("name", ["mimi", "encodec", "dac"])
@pytest.mark.parametrize("num_tokens", [3, NUM_TOKENS])  # fewer than EnCodec mirrors, and many
def test_codes_are_the_codecs_own(name: str, num_tokens: int, folders: dict[str, Path]) -> None:
    tokenizer, codec = wrap(name, folders), AutoModel.from_pretrained(folders[name]).eval()
    wav_BS = random_wav(2, num_tokens * tokenizer.spec.samples_per_token)
    code_BLK, mask_BL = tokenizer.encode(wav_BS)
    assert torch.equal(code_BLK, wrapped_codes(codec, wav_BS[:, None])) and bool(mask_BL.all())
    assert code_BLK.shape == (2, num_tokens, NUM_CODEBOOKS) and len(code_BLK.unique()) > 4
    found_BS = tokenizer.decode(code_BLK)
    assert found_BS.shape == wav_BS.shape
    expected_BS = wrapped_decode(codec, code_BLK.transpose(1, 2))
    num_samples = expected_BS.shape[1]
    assert num_samples == wav_BS.shape[1] - (2 if name == "dac" else 0)  # an odd stride loses some; zeros follow
    close(found_BS[:, :num_samples], expected_BS)
    assert float(found_BS[:, num_samples:].abs().sum()) == 0 < float(expected_BS.std())


@torch.no_grad()
@pytest.mark.parametrize("name", ["mimi_latents", "pocket", "vibevoice"])
def test_latents_are_the_codecs_own(name: str, folders: dict[str, Path]) -> None:
    tokenizer, codec = wrap(name, folders), AutoModel.from_pretrained(folders[NAMES[name][0]]).eval()
    wav_BS = random_wav(2, NUM_TOKENS * tokenizer.spec.samples_per_token)
    if name == "mimi_latents":
        raw_BLD = codec.encoder(wav_BS[:, None]).latents.transpose(1, 2)
        expected_BS = codec.decoder(raw_BLD.transpose(1, 2)).audio_values[:, 0]
    elif name == "pocket":
        raw_BLD = codec.encode(wav_BS[:, None]).latents
        expected_BS = codec.decode(raw_BLD).audio_values[:, 0]
    else:
        raw_BLD = codec.encode(wav_BS[:, None], sample=False).latents
        expected_BS = codec.decode(raw_BLD).audio[:, 0]
    latent_BLD, _ = tokenizer.encode(wav_BS)
    close(latent_BLD * tokenizer.latent_std_D + tokenizer.latent_mean_D, raw_BLD)
    found_BS = tokenizer.decode(latent_BLD)
    assert found_BS.shape == wav_BS.shape
    close(found_BS, expected_BS)
    assert float(expected_BS.std()) > 1e-3


# the contract


def test_stream_equals_offline(tokenizer: WrappedCodec) -> None:
    token_BLX = random_tokens(tokenizer, 2, NUM_TOKENS)
    offline_BS = tokenizer.decode(token_BLX)
    for chunk_tokens in (1, 2, 7, NUM_TOKENS):
        close(torch.cat(stream(tokenizer, token_BLX, chunk_tokens), dim=1), offline_BS)


@pytest.mark.parametrize("num_tokens", [1, 2, 6])
def test_few_tokens_stream_too(num_tokens: int, tokenizer: WrappedCodec) -> None:
    token_BLX = random_tokens(tokenizer, 1, num_tokens)
    offline_BS = tokenizer.decode(token_BLX)
    assert offline_BS.shape == (1, num_tokens * tokenizer.spec.samples_per_token)
    close(torch.cat(stream(tokenizer, token_BLX, 1), dim=1), offline_BS)
    assert tokenizer.flush(tokenizer.init_state(1)).shape == (1, 0)


def test_lookahead_is_what_the_spec_says(name: str, tokenizer: WrappedCodec) -> None:
    """By gradient, sample s sees token (s + lookahead) // samples_per_token, none later; it is emitted then."""
    spec = tokenizer.spec
    per_token, ahead = spec.samples_per_token, spec.lookahead_samples
    with torch.no_grad():
        hidden_BCL = tokenizer.to_hidden(random_tokens(tokenizer, 1, NUM_TOKENS))
    hidden_BCL.requires_grad_()
    layers = decoder_layers(tokenizer.codec)
    wav_S = layers.step(hidden_BCL, layers.init_state(1), last=True)[0][0, 0]
    middle = 18 * per_token
    for sample in (0, middle - ahead % per_token - 1, middle - ahead % per_token, middle + per_token // 2):
        (gradient_BCL,) = torch.autograd.grad(wav_S[sample], hidden_BCL, retain_graph=True)
        seen = gradient_BCL[0].abs().amax(0).nonzero().flatten()
        late = 0 if name == "encodec" and sample > 0 else ahead  # EnCodec mirrors its start, and only that is late
        assert int(seen.max()) == (sample + late) // per_token
        assert sample == 0 or int(seen.min()) < sample // per_token
    emitted = 0
    for index, chunk_BS in enumerate(stream(tokenizer, random_tokens(tokenizer, 1, NUM_TOKENS), 1)[:-1]):
        emitted += chunk_BS.shape[1]
        promised = max(0, (index + 1) * per_token - ahead)
        everything = name == "encodec" and promised > 0
        assert emitted == ((index + 1) * per_token if everything else promised)


def test_batch_row_equals_row_alone_and_padding_changes_nothing(tokenizer: WrappedCodec) -> None:
    per_token = tokenizer.spec.samples_per_token
    lengths = [1, per_token, 3 * per_token + 2, 25 * per_token, 0]
    wav_BS = random_wav(5, 25 * per_token + 5)
    for row, length in enumerate(lengths):
        wav_BS[row, length:] = float("nan")  # a leak would be loud
    with torch.no_grad():
        token_BLX, mask_BL = tokenizer.encode(wav_BS, torch.tensor(lengths))
        assert mask_BL.sum(1).tolist() == [1, 1, 4, 25, 0] and mask_BL.shape[1] == 26
        assert float(token_BLX[~mask_BL].abs().max()) == 0
        decoded_BS = tokenizer.decode(token_BLX)
        for row, length in enumerate(lengths[:-1]):
            alone_1LX, _ = tokenizer.encode(wav_BS[row : row + 1, :length])
            close(token_BLX[row, mask_BL[row]], alone_1LX[0])
            close(decoded_BS[row], tokenizer.decode(token_BLX[row : row + 1])[0])


def test_state_is_a_value(tokenizer: WrappedCodec) -> None:
    """Two interleaved streams equal the two apart, an old state can be used again, and a saved one goes on."""
    tokens = [random_tokens(tokenizer, 1, 21, seed) for seed in (1, 2)]
    apart = [torch.cat(stream(tokenizer, token_BLX, 3), dim=1) for token_BLX in tokens]
    states, woven = [tokenizer.init_state(1), tokenizer.init_state(1)], [[], []]
    with torch.no_grad():
        for start in range(0, 21, 3):
            for index, token_BLX in enumerate(tokens):
                chunk_BLX, kept = token_BLX[:, start : start + 3], copy.deepcopy(states[index])
                chunk_BS, after = tokenizer.step(chunk_BLX, states[index])
                assert torch.equal(chunk_BS, tokenizer.step(chunk_BLX, states[index])[0])
                assert torch.equal(chunk_BS, tokenizer.step(chunk_BLX, kept)[0])
                file = io.BytesIO()
                torch.save(after, file)
                file.seek(0)
                states[index] = torch.load(file, weights_only=False)
                woven[index].append(chunk_BS)
        for index in range(2):
            assert torch.equal(torch.cat([*woven[index], tokenizer.flush(states[index])], dim=1), apart[index])


def test_save_and_load_through_auto_classes(tokenizer: WrappedCodec, tmp_path) -> None:
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path).eval()
    assert type(loaded) is type(tokenizer) and loaded.spec == tokenizer.spec
    assert [file.suffix for file in tmp_path.iterdir() if file.suffix != ".json"] == [".safetensors"]
    wav_BS = random_wav(1, 20 * tokenizer.spec.samples_per_token)
    with torch.no_grad():
        token_BLX, _ = tokenizer.encode(wav_BS)
        assert torch.equal(loaded.encode(wav_BS)[0], token_BLX)
        assert torch.equal(loaded.decode(token_BLX), tokenizer.decode(token_BLX))
    values = json.loads((tmp_path / "config.json").read_text())
    assert values["sample_rate_hz"] == tokenizer.spec.sample_rate_hz
    fresh = AutoConfig.for_model(**{key: value for key, value in values.items() if key != "transformers_version"})
    assert fresh.token_spec == tokenizer.spec


def test_training_mode_does_not_reach_the_codec(name: str, tokenizer: WrappedCodec) -> None:
    wav_BS = random_wav(2, 8 * tokenizer.spec.samples_per_token)
    with torch.no_grad():
        expected_BLX, _ = tokenizer.encode(wav_BS)
        assert torch.equal(tokenizer.train().encode(wav_BS)[0], expected_BLX)
    assert tokenizer.training and not any(p.requires_grad for p in tokenizer.parameters())


def test_latent_statistics_standardise_what_encode_gives(folders: dict[str, Path]) -> None:
    tokenizer = wrap("pocket", folders)
    assert isinstance(tokenizer, LatentCodecTokenizer)
    wavs = random_wav(3, 200 * tokenizer.spec.samples_per_token).split(1)
    tokenizer.fit_latent_statistics(tokenizer.raw_latents(wav_1S)[0] for wav_1S in wavs)
    latent_LD = torch.cat([tokenizer.encode(wav_1S)[0][0] for wav_1S in wavs])
    close(latent_LD.mean(0), torch.zeros(6))
    close(latent_LD.std(0, correction=0), torch.ones(6))


def test_inside_a_flowomni_checkpoint(folders: dict[str, Path], tmp_path) -> None:
    tokenizer = wrap("pocket", folders)
    tokenizer.save_pretrained(tmp_path / "voice")
    parts = save_tiny_parts(tmp_path) | {"speech_tokenizer": str(tmp_path / "voice")}
    head = {"kind": "flow", "width": 32, "num_blocks": 1}
    blocks = {"num_layers": 1, "num_heads": 2}
    model, processor = assemble(**parts, head=head, output_blocks=blocks, layout={"instructions": INSTRUCTIONS})
    save_model(model, processor, tmp_path / "whole")
    loaded, _ = load_model(tmp_path / "whole")
    latent_BLD = random_tokens(tokenizer, 1, 9)
    assert loaded.speech_tokenizer.spec == tokenizer.spec
    assert torch.equal(loaded.speech_tokenizer.decode(latent_BLD), tokenizer.decode(latent_BLD))
    wav_BS = random_wav(1, 500)
    assert torch.equal(loaded.speech_tokenizer.encode(wav_BS)[0], tokenizer.encode(wav_BS)[0])
    wrap("mimi", folders).save_pretrained(tmp_path / "codes")
    with pytest.raises(ValueError, match="head.kind is 'flow'.*discrete"):
        assemble(**parts | {"speech_tokenizer": str(tmp_path / "codes")}, head=head, output_blocks=blocks)


# sizes and bad input


def test_public_sizes() -> None:
    """What the papers say of the published codecs, from the configs that transformers has for them."""
    mimi, encodec = CodecConfig(MimiConfig(), 8).token_spec, CodecConfig(EncodecConfig()).token_spec
    assert (mimi.tokens_per_sec, mimi.num_codebooks, mimi.codebook_size, mimi.lookahead_samples) == (12.5, 8, 2048, 0)
    assert (encodec.tokens_per_sec, encodec.num_codebooks, encodec.lookahead_samples) == (75, 32, 6 * 320)
    dac_24khz = DacConfig(downsampling_ratios=[2, 4, 5, 8], n_codebooks=32, sampling_rate=24000)
    dac = CodecConfig(dac_24khz).token_spec
    assert (dac.tokens_per_sec, dac.num_codebooks, dac.lookahead_samples) == (75, 32, 3141)
    pocket = LatentCodecConfig(PocketTTSAudioTokenizerConfig()).token_spec
    assert (pocket.tokens_per_sec, pocket.dim) == (12.5, 32)
    vibevoice = LatentCodecConfig(VibeVoiceAcousticTokenizerConfig()).token_spec
    assert (vibevoice.tokens_per_sec, vibevoice.dim) == (7.5, 64)


ENCODEC_48KHZ = {
    "audio_channels": 1,
    "norm_type": "time_group_norm",
    "normalize": True,
    "chunk_length_s": 1.0,
    "overlap": 0.01,
    "use_causal_conv": False,
}


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: CodecConfig(CODECS["mimi"], 5), ["num_codebooks is 5", "has 4", "1 to 4"]),
        (lambda: CodecConfig(CODECS["dac"], 0), ["num_codebooks is 0"]),
        (lambda: CodecConfig(CODECS["pocket"]), ["'pocket_tts_audio_tokenizer'", "dac, encodec, mimi"]),
        (lambda: LatentCodecConfig(CODECS["dac"]), ["'dac'", "vibevoice_acoustic_tokenizer"]),
        (lambda: CodecConfig(Qwen2Config()), ["'qwen2'", "mimi"]),
        (lambda: CodecConfig(CODECS["dac"], sample_rate_hz=24000), ["sample_rate_hz is 24000", "has 16000"]),
        (lambda: LatentCodecConfig(CODECS["pocket"], None, 2048), ["samples_per_token is 2048", "has 48"]),
        (lambda: CodecConfig(EncodecConfig(audio_channels=2)), ["audio_channels is 2", "mono"]),
        (lambda: CodecConfig(EncodecConfig(**ENCODEC_48KHZ)), ["use_causal_conv is False", "24 kHz"]),
        (lambda: CodecConfig(MimiConfig(frame_rate=10.0)), ["frame_rate is 10.0", "upsampling_ratios"]),
        (lambda: CodecConfig(MimiConfig(use_causal_conv=False)), ["use_causal_conv is False"]),
        (lambda: LatentCodecConfig(MimiConfig(encoder_config=None)), ["no encoder"]),
        (lambda: CodecConfig(CODECS["mimi"], num_codebook=3), ["num_codebook:", "'num_codebooks'"]),
        (lambda: CodecConfig().token_spec, ["codec is missing"]),
    ],
)
def test_config_errors_name_field_and_remedy(make, words: list[str]) -> None:
    with pytest.raises(ValueError) as error:
        make()
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(("code", "place"), [(16, [0, 1, 2]), (-1, [1, 0, 0])])
def test_codes_out_of_range_are_named(code: int, place: list[int], folders: dict[str, Path]) -> None:
    tokenizer = wrap("dac", folders)
    code_BLK = random_tokens(tokenizer, 2, 4)
    code_BLK[tuple(place)] = code
    with pytest.raises(ValueError, match=rf"code {code} \(row {place[0]}, token {place[1]}, codebook {place[2]}\)"):
        tokenizer.step(code_BLK, tokenizer.init_state(2))
    with pytest.raises(ValueError, match="codes of 2 codebooks given; num_codebooks is 3"):
        tokenizer.decode(random_tokens(tokenizer, 1, 4)[:, :, :2])


def test_bad_checkpoints_are_named(folders: dict[str, Path], tmp_path) -> None:
    with pytest.raises(ValueError, match="nowhere"):
        CodecTokenizer.from_codec(str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match=r"mimi: num_codebooks is 9"):
        CodecTokenizer.from_codec(str(folders["mimi"]), num_codebooks=9)
    with pytest.raises(ValueError, match=r"vibevoice: codec.model_type"):
        CodecTokenizer.from_codec(str(folders["vibevoice"]))
    half = codec_model("dac")
    del half.decoder.conv2
    half.save_pretrained(tmp_path / "half")
    with pytest.raises(ValueError, match="lacks tensors: decoder.conv2"):
        CodecTokenizer.from_codec(str(tmp_path / "half"))


def test_one_loader_for_every_tokenizer(folders: dict[str, Path], tmp_path) -> None:
    assert load_speech_tokenizer(str(folders["mimi"]), num_codebooks=2).spec.num_codebooks == 2
    assert load_speech_tokenizer(str(folders["mimi"]), kind="continuous").spec.dim == 16
    assert isinstance(load_speech_tokenizer(str(folders["vibevoice"])), LatentCodecTokenizer)
    tiny_speech_tokenizer().save_pretrained(tmp_path / "ours")
    assert load_speech_tokenizer(str(tmp_path / "ours")).spec.dim == 6
    with pytest.raises(ValueError, match="kind is 'continuous'.*discrete speech tokens"):
        load_speech_tokenizer(str(folders["dac"]), kind="continuous")
    with pytest.raises(ValueError, match="num_codebooks is 8"):
        load_speech_tokenizer(str(folders["pocket"]), num_codebooks=8)
    with pytest.raises(ValueError, match="'qwen2' model, which is not a speech tokenizer"):
        load_speech_tokenizer(save_tiny_parts(tmp_path)["llm"])
    with pytest.raises(ValueError, match="no speech tokenizer there"):
        load_speech_tokenizer(str(tmp_path / "nowhere"))
