"""Laws that every speech tokenizer passes, and what is particular to the mel tokenizer.

Shapes: B batch, S samples, L speech tokens, D latent dimension, K codebooks, X whichever of D or K a token has, F mel
frames, C mel bins.
"""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModel

from flowomni.build import load_model
from flowomni.tokenizers import MelTokenizer, MelTokenizerConfig, SpeechTokenizer, TokenSpec

ROOT = Path(__file__).resolve().parent.parent
VOCODER = {"dim": 16, "intermediate_dim": 24, "num_layers": 2}
AUTOENCODER = {
    "latent_dim": 6,
    "width": 24,
    "intermediate_dim": 32,
    "num_encoder_layers": 1,
    "num_decoder_layers": 2,
    "frame_width": 16,
}
PLAIN = {
    "latent_dim": 200,
    "frames_per_token": 2,
    "num_encoder_layers": 0,
    "num_decoder_layers": 0,
    "num_frame_layers": 0,
    "bottleneck": "none",
}
BOTTLENECKS: dict[str, dict] = {
    "none": {},
    "sigma_vae": {},
    "kl_vae": {},
    "vq": {"codebook_size": 50, "frames_per_token": 4},
    "fsq": {"num_codebooks": 2, "fsq_levels": [5, 4, 3]},
    "rvq": {"num_codebooks": 3, "codebook_size": 40, "quantizer_dropout": 0.5, "frames_per_token": 16},
}
CONFIGS = {
    name: MelTokenizerConfig(autoencoder=AUTOENCODER | values | {"bottleneck": name}, vocoder=VOCODER)
    for name, values in BOTTLENECKS.items()
} | {
    "no_lookahead": MelTokenizerConfig(autoencoder=AUTOENCODER, vocoder=VOCODER | {"lookahead_frames": 0}),
    "plain": MelTokenizerConfig(mel={"hop_length": 300}, autoencoder=PLAIN, vocoder=VOCODER),
}


def build(name: str) -> MelTokenizer:
    torch.manual_seed(0)
    tokenizer = MelTokenizer(CONFIGS[name]).eval()
    with torch.no_grad():  # as if trained: every layer sees its neighbours, and the statistics are not 0 and 1
        for parameter in tokenizer.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
        tokenizer.front.mean_C.fill_(-4.0)
        tokenizer.front.std_C.fill_(2.0)
        tokenizer.latent_mean_D.normal_()
        tokenizer.latent_std_D.uniform_(0.5, 2.0)
    return tokenizer


@pytest.fixture(params=CONFIGS)
def tokenizer(request) -> MelTokenizer:
    return build(request.param)


def random_tokens(spec: TokenSpec, batch_size: int, num_tokens: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if spec.kind == "continuous":
        return torch.randn(batch_size, num_tokens, spec.dim, generator=generator)
    return torch.randint(spec.codebook_size, (batch_size, num_tokens, spec.num_codebooks), generator=generator)


def random_wav(batch_size: int, num_samples: int) -> Tensor:
    return torch.randn(batch_size, num_samples, generator=torch.Generator().manual_seed(5)) * 0.1


@torch.no_grad()
def stream(tokenizer: SpeechTokenizer, token_BLX: Tensor, chunk_tokens: int) -> list[Tensor]:
    state, chunks = tokenizer.init_state(token_BLX.shape[0]), []
    for chunk_BLX in token_BLX.split(chunk_tokens, dim=1):
        chunk_BS, state = tokenizer.step(chunk_BLX, state)
        chunks.append(chunk_BS)
    return [*chunks, tokenizer.flush(state)]


# the contract: every tokenizer


def test_stream_equals_offline(tokenizer: SpeechTokenizer) -> None:
    token_BLX = random_tokens(tokenizer.spec, 2, 9)
    with torch.no_grad():
        offline_BS = tokenizer.decode(token_BLX)
    assert offline_BS.shape == (2, 9 * tokenizer.spec.samples_per_token)
    for chunk_tokens in (1, 2, 7, 9):
        streamed_BS = torch.cat(stream(tokenizer, token_BLX, chunk_tokens), dim=1)
        torch.testing.assert_close(streamed_BS, offline_BS, rtol=0, atol=5e-6)


def test_lookahead_is_what_the_spec_says(tokenizer: SpeechTokenizer) -> None:
    """Sample s sees token (s + lookahead - 1) // samples_per_token, none later; it is emitted then.

    Of latents by gradient, of codes by changing them.
    """
    spec = tokenizer.spec
    token_BLX = random_tokens(spec, 1, 9)
    middle = 5 * spec.samples_per_token
    samples = (middle - 1, middle - spec.lookahead_samples, middle + spec.samples_per_token // 2)
    for sample, seen_L in zip(samples, seen_tokens(tokenizer, token_BLX, samples), strict=True):
        seen = seen_L.nonzero().flatten()
        assert int(seen.max()) == (sample + spec.lookahead_samples - 1) // spec.samples_per_token
        assert int(seen.min()) < sample // spec.samples_per_token
    emitted = 0
    for index, chunk_BS in enumerate(stream(tokenizer, token_BLX, 1)[:-1]):
        emitted += chunk_BS.shape[1]
        assert emitted == max(0, (index + 1) * spec.samples_per_token - spec.lookahead_samples)


def seen_tokens(tokenizer: SpeechTokenizer, token_1LX: Tensor, samples: tuple[int, ...]) -> list[Tensor]:
    """For each of the samples, which tokens it depends on."""
    if tokenizer.spec.kind == "continuous":
        token_1LX = token_1LX.requires_grad_()
        wav_1S = tokenizer.decode(token_1LX)
        gradients = [torch.autograd.grad(wav_1S[0, sample], token_1LX, retain_graph=True)[0] for sample in samples]
        token_1LX.requires_grad_(False)
        return [gradient_1LX[0].abs().amax(1) for gradient_1LX in gradients]
    with torch.no_grad():
        wav_1S = tokenizer.decode(token_1LX)
        changed_LLX = token_1LX.repeat(token_1LX.shape[1], 1, 1)
        changed_LLX.diagonal(dim1=0, dim2=1).add_(1).remainder_(tokenizer.spec.codebook_size)
        difference_LS = (tokenizer.decode(changed_LLX) - wav_1S).abs()
    # rows of a batch differ by rounding from the row alone
    return [difference_LS[:, sample] > 5e-6 for sample in samples]


def test_encoding_is_causal_in_tokens(tokenizer: SpeechTokenizer) -> None:
    """A token sees nothing beyond its last frame's window."""
    spec = tokenizer.spec
    wav_BS = random_wav(1, 6 * spec.samples_per_token)
    if spec.kind == "continuous":
        wav_BS.requires_grad_()
        (gradient_BS,) = torch.autograd.grad(tokenizer.encode(wav_BS)[0][0, 2].sum(), wav_BS)
        last = int(gradient_BS[0].nonzero().max())
        assert 2 * spec.samples_per_token < last < 3 * spec.samples_per_token + 512
        return
    token_BLX, _ = tokenizer.encode(wav_BS)
    wav_BS[:, 3 * spec.samples_per_token + 512 :] = 0
    later_BLX, _ = tokenizer.encode(wav_BS)
    assert torch.equal(later_BLX[:, :3], token_BLX[:, :3]) and not torch.equal(later_BLX, token_BLX)


def test_batch_row_equals_row_alone_and_padding_changes_nothing(tokenizer: SpeechTokenizer) -> None:
    """Also of audio shorter than a token, which is one token."""
    spec = tokenizer.spec
    per_token = spec.samples_per_token
    lengths = [1, per_token, 3 * per_token + 17, 5 * per_token]
    wav_BS = random_wav(4, 5 * per_token + 100)
    for row, length in enumerate(lengths):
        wav_BS[row, length:] = float("nan")  # a leak would be loud
    with torch.no_grad():
        token_BLX, mask_BL = tokenizer.encode(wav_BS, torch.tensor(lengths))
        assert token_BLX.shape == (4, 6, spec.dim or spec.num_codebooks) and torch.isfinite(token_BLX).all()
        assert token_BLX.dtype == (torch.float32 if spec.kind == "continuous" else torch.int64)
        assert mask_BL.sum(1).tolist() == [1, 1, 4, 5]
        assert float(token_BLX[~mask_BL].abs().max()) == 0
        decoded_BS = tokenizer.decode(token_BLX)
        for row, length in enumerate(lengths):
            alone_1LX, _ = tokenizer.encode(wav_BS[row : row + 1, :length])
            torch.testing.assert_close(token_BLX[row, mask_BL[row]], alone_1LX[0], rtol=0, atol=1e-4)
            alone_1S = tokenizer.decode(token_BLX[row : row + 1])
            torch.testing.assert_close(decoded_BS[row], alone_1S[0], rtol=0, atol=5e-6)


def test_state_is_a_value(tokenizer: SpeechTokenizer) -> None:
    tokens = [random_tokens(tokenizer.spec, 1, 4, seed) for seed in (1, 2)]
    apart = [torch.cat(stream(tokenizer, token_BLX, 1), dim=1) for token_BLX in tokens]
    states, woven = [tokenizer.init_state(1), tokenizer.init_state(1)], [[], []]
    with torch.no_grad():
        for position in range(4):
            for index in range(2):
                kept = copy.deepcopy(states[index])
                chunk_BS, states[index] = tokenizer.step(tokens[index][:, position : position + 1], states[index])
                assert torch.equal(chunk_BS, tokenizer.step(tokens[index][:, position : position + 1], kept)[0])
                woven[index].append(chunk_BS)
        for index in range(2):
            assert torch.equal(torch.cat([*woven[index], tokenizer.flush(states[index])], dim=1), apart[index])


def test_save_and_load_through_auto_classes(tokenizer: SpeechTokenizer, tmp_path) -> None:
    """`from_pretrained` builds on the meta device: filter bank, windows, codebooks, statistics must come out right."""
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path).eval()
    assert type(loaded) is type(tokenizer) and loaded.spec == tokenizer.spec
    assert [file.suffix for file in tmp_path.iterdir() if file.suffix != ".json"] == [".safetensors"]
    wav_BS = random_wav(1, 9000)
    with torch.no_grad():
        token_BLX, _ = tokenizer.encode(wav_BS)
        assert torch.equal(loaded.encode(wav_BS)[0], token_BLX)
        assert torch.equal(loaded.decode(token_BLX), tokenizer.decode(token_BLX))
    torch.manual_seed(1)
    fresh = type(tokenizer)(AutoConfig.from_pretrained(tmp_path))
    assert fresh.spec == tokenizer.spec


# the mel tokenizer


def test_plain_patch_is_the_mel_itself() -> None:
    tokenizer = build("plain")
    wav_BS = random_wav(1, 6000)
    latent_BLD, _ = tokenizer.encode(wav_BS)
    raw_BLD = latent_BLD * tokenizer.latent_std_D + tokenizer.latent_mean_D
    mel_BFC, _ = tokenizer.mel(wav_BS)
    torch.testing.assert_close(tokenizer.decode_mel(raw_BLD), mel_BFC, rtol=0, atol=1e-5)
    assert tokenizer.spec.samples_per_token == 600 and tokenizer.spec.tokens_per_sec == 40


def test_vocode_takes_log_mel_as_vocos_has_it() -> None:
    tokenizer = build("sigma_vae")
    log_mel_BFC = tokenizer.front.log_mel(random_wav(1, 5000), 16)
    expected_BS = tokenizer.vocoder(tokenizer.front.standardise(log_mel_BFC))
    assert torch.equal(tokenizer.vocode(log_mel_BFC), expected_BS)


def test_latent_statistics_standardise_what_encode_gives() -> None:
    tokenizer = build("sigma_vae")
    with torch.no_grad():
        wavs = [random_wav(1, 40000)[:, start : start + 20000] for start in (0, 20000)]
        tokenizer.fit_latent_statistics(tokenizer.encode_mel(tokenizer.mel(wav_1S)[0])[0] for wav_1S in wavs)
        latent_LD = torch.cat([tokenizer.encode(wav_1S)[0][0] for wav_1S in wavs])
    torch.testing.assert_close(latent_LD.mean(0), torch.zeros(6), rtol=0, atol=1e-3)
    torch.testing.assert_close(latent_LD.std(0, correction=0), torch.ones(6), rtol=0, atol=1e-3)


@pytest.mark.parametrize("name", BOTTLENECKS)
def test_only_the_bottleneck_differs(name: str) -> None:
    """Same parameters in encoder, decoder and vocoder; only a KL-VAE's encoder gives a variance besides."""
    sizes = {}
    for kind in ("none", name):
        values = {key: value for key, value in BOTTLENECKS[name].items() if key == "frames_per_token"}
        values |= BOTTLENECKS[kind] | {"bottleneck": kind}
        tokenizer = MelTokenizer(MelTokenizerConfig(autoencoder=AUTOENCODER | values, vocoder=VOCODER))
        parameters = {**dict(tokenizer.named_parameters()), **dict(tokenizer.named_buffers())}
        sizes[kind] = {key: value.shape for key, value in parameters.items() if not key.startswith("bottleneck.")}
    every = sizes["none"].keys() | sizes[name].keys()
    differing = {key for key in every if sizes["none"].get(key) != sizes[name].get(key)}
    assert differing == ({"encoder.out.weight", "encoder.out.bias"} if name == "kl_vae" else set())


def test_spec_of_codes() -> None:
    """Rate, codebooks and bitrate follow from the configuration."""
    spec = CONFIGS["rvq"].token_spec
    assert (spec.kind, spec.dim, spec.num_codebooks, spec.codebook_size) == ("discrete", 0, 3, 40)
    assert spec.samples_per_token == 4096 and spec.bitrate == pytest.approx(3 * math.log2(40) * 24000 / 4096)
    assert CONFIGS["fsq"].token_spec.codebook_size == 60 and CONFIGS["vq"].token_spec.num_codebooks == 1
    assert CONFIGS["kl_vae"].token_spec.bitrate is None
    assert spec.empty_token().tolist() == [-1, -1, -1]


def test_the_shipped_checkpoint_loads_unchanged() -> None:
    """A configuration from before there were codebooks; `load_model` refuses missing tensors and others."""
    model, _ = load_model(ROOT / "flowomni" / "models" / "flowomni-tiny")
    assert model.speech_tokenizer.spec == TokenSpec("continuous", 32, 0, 0, 24000, 2048, lookahead_samples=1024)


def test_default_sizes() -> None:
    spec = MelTokenizerConfig().token_spec
    assert spec == TokenSpec("continuous", 32, 0, 0, 24000, 2048, lookahead_samples=1024)
    with torch.device("meta"):
        tokenizer = MelTokenizer(MelTokenizerConfig())
    assert sum(p.numel() for p in tokenizer.vocoder.parameters()) < 3e6
    assert (
        1.5e6
        < sum(p.numel() for p in tokenizer.parameters()) - sum(p.numel() for p in tokenizer.vocoder.parameters())
        < 2.5e6
    )


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"mel": {"hop_lenght": 300}}, ["mel.hop_lenght", "hop_length"]),
        ({"vocoder": {"lookahead": 1}}, ["vocoder.lookahead", "lookahead_frames"]),
        ({"autoencoder": {"bottleneck": "sigma"}}, ["bottleneck", "'sigma'", "sigma_vae"]),
        (
            {"autoencoder": PLAIN | {"latent_dim": 32}},
            ["autoencoder.latent_dim is 32", "autoencoder.frames_per_token", "200"],
        ),
        ({"vocodr": {}}, ["vocodr", "'vocoder'"]),
        ({"autoencoder": {"num_codebooks": 4}}, ["num_codebooks is 4", "'sigma_vae'", "'rvq'"]),
        ({"autoencoder": {"num_codebooks": 0, "bottleneck": "rvq"}}, ["num_codebooks is 0"]),
        ({"autoencoder": {"num_codebooks": 2, "bottleneck": "vq"}}, ["num_codebooks is 2", "'vq'", "'rvq'"]),
        ({"autoencoder": {"codebook_size": 1, "bottleneck": "vq"}}, ["codebook_size is 1", "at least 2"]),
        ({"autoencoder": {"fsq_levels": [8, 2], "bottleneck": "fsq"}}, ["fsq_levels is [8, 2]", "from 3 up"]),
        ({"autoencoder": {"quantizer_dropout": 0.5}}, ["quantizer_dropout is 0.5", "'sigma_vae'", "set it to 0"]),
        ({"autoencoder": {"quantizer_dropout": 5, "bottleneck": "rvq"}}, ["quantizer_dropout is 5", "between 0 and 1"]),
    ],
)
def test_config_errors_name_field_and_remedy(sections: dict, words: list[str]) -> None:
    with pytest.raises(ValueError) as error:
        MelTokenizerConfig(**sections)
    for word in words:
        assert word in str(error.value)


def test_config_survives_json() -> None:
    for config in CONFIGS.values():
        again = MelTokenizerConfig.from_dict(json.loads(config.to_json_string()))
        assert again.to_dict() == config.to_dict() and again.token_spec == config.token_spec
        values = {k: v for k, v in config.to_dict().items() if k not in ("model_type", "transformers_version")}
        assert AutoConfig.for_model("flowomni_mel_tokenizer", **values).token_spec == config.token_spec


@pytest.mark.parametrize(
    ("field", "value"), [("sample_rate_hz", 0), ("samples_per_token", 0), ("num_codebooks", 0), ("codebook_size", 1)]
)
def test_a_spec_without_a_rate_or_codes_is_refused(field: str, value: int) -> None:
    values = {"kind": "discrete", "dim": 0, "num_codebooks": 2, "codebook_size": 8, "sample_rate_hz": 24000}
    values |= {"samples_per_token": 2048, "lookahead_samples": 0}
    with pytest.raises(ValueError, match=f"{field} is {value}; of discrete tokens it must be at least"):
        TokenSpec(**values | {field: value})


@pytest.mark.parametrize("name", ["vq", "fsq", "rvq"])
def test_codes_out_of_range_are_refused(name: str) -> None:
    tokenizer = build(name)
    spec = tokenizer.spec
    code_BLK = random_tokens(spec, 1, 3)
    last = spec.codebook_size - 1
    for wrong in (-1, last + 1):
        wrong_BLK = code_BLK.clone()
        wrong_BLK[0, 1, -1] = wrong
        with pytest.raises(ValueError, match=rf"code_BLK holds {wrong}; codes must be in 0 to {last} "):
            tokenizer.decode(wrong_BLK)
    with pytest.raises(ValueError, match=rf"dtype float32 .* {spec.num_codebooks} in the last dimension"):
        tokenizer.step(code_BLK.float(), tokenizer.init_state(1))
    with pytest.raises(ValueError, match=rf"shape \[1, 3, {spec.num_codebooks + 1}\].*num_codebooks"):
        tokenizer.decode(random_tokens(spec, 1, 3)[..., :1].expand(-1, -1, spec.num_codebooks + 1))
