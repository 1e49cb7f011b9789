"""Laws that every speech tokenizer passes, and what is particular to the mel tokenizer and its training stage.

Shapes: B batch, S samples, L speech tokens, D latent dimension, F mel frames, C mel bins.
"""

from __future__ import annotations

import copy
import dataclasses
import json

import numpy as np
import pytest
import soundfile
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModel

from flowomni.tokenizers import (
    AutoencoderConfig,
    MelTokenizer,
    MelTokenizerConfig,
    SpeechTokenizer,
    TokenSpec,
    VocoderConfig,
)
from flowomni.tokenizers.bottlenecks import SigmaVae
from training.stages.tokenizer import TokenizerOptions, TokenizerStage
from training.stages.vocoder import VocoderOptions, VocoderStage

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
CONFIGS = {
    "sigma_vae": MelTokenizerConfig(autoencoder=AUTOENCODER, vocoder=VOCODER),
    "autoencoder": MelTokenizerConfig(autoencoder=AUTOENCODER | {"bottleneck": "none"}, vocoder=VOCODER),
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
    return torch.randn(batch_size, num_tokens, spec.dim, generator=torch.Generator().manual_seed(seed))


def random_wav(batch_size: int, num_samples: int) -> Tensor:
    return torch.randn(batch_size, num_samples, generator=torch.Generator().manual_seed(5)) * 0.1


@torch.no_grad()
def stream(tokenizer: SpeechTokenizer, latent_BLD: Tensor, chunk_tokens: int) -> list[Tensor]:
    state, chunks = tokenizer.init_state(latent_BLD.shape[0]), []
    for chunk_BLD in latent_BLD.split(chunk_tokens, dim=1):
        chunk_BS, state = tokenizer.step(chunk_BLD, state)
        chunks.append(chunk_BS)
    return [*chunks, tokenizer.flush(state)]


# the contract: every tokenizer


def test_stream_equals_offline(tokenizer: SpeechTokenizer) -> None:
    latent_BLD = random_tokens(tokenizer.spec, 2, 9)
    with torch.no_grad():
        offline_BS = tokenizer.decode(latent_BLD)
    assert offline_BS.shape == (2, 9 * tokenizer.spec.samples_per_token)
    for chunk_tokens in (1, 2, 7, 9):
        streamed_BS = torch.cat(stream(tokenizer, latent_BLD, chunk_tokens), dim=1)
        torch.testing.assert_close(streamed_BS, offline_BS, rtol=0, atol=5e-6)


def test_lookahead_is_what_the_spec_says(tokenizer: SpeechTokenizer) -> None:
    """By gradient, sample s sees token (s + lookahead - 1) // samples_per_token, none later; it is emitted then."""
    spec = tokenizer.spec
    latent_BLD = random_tokens(spec, 1, 9).requires_grad_()
    wav_BS = tokenizer.decode(latent_BLD)
    middle = 5 * spec.samples_per_token
    for sample in (middle - 1, middle - spec.lookahead_samples, middle + spec.samples_per_token // 2):
        (gradient_BLD,) = torch.autograd.grad(wav_BS[0, sample], latent_BLD, retain_graph=True)
        seen = gradient_BLD[0].abs().amax(1).nonzero().flatten()
        assert int(seen.max()) == (sample + spec.lookahead_samples - 1) // spec.samples_per_token
        assert int(seen.min()) < sample // spec.samples_per_token
    emitted = 0
    for index, chunk_BS in enumerate(stream(tokenizer, latent_BLD.detach(), 1)[:-1]):
        emitted += chunk_BS.shape[1]
        assert emitted == max(0, (index + 1) * spec.samples_per_token - spec.lookahead_samples)


def test_encoding_is_causal_in_tokens(tokenizer: SpeechTokenizer) -> None:
    """A token sees nothing beyond its last frame's window."""
    spec = tokenizer.spec
    wav_BS = random_wav(1, 6 * spec.samples_per_token).requires_grad_()
    latent_BLD, _ = tokenizer.encode(wav_BS)
    (gradient_BS,) = torch.autograd.grad(latent_BLD[0, 2].sum(), wav_BS)
    last = int(gradient_BS[0].nonzero().max())
    assert 2 * spec.samples_per_token < last < 3 * spec.samples_per_token + 512


def test_batch_row_equals_row_alone_and_padding_changes_nothing(tokenizer: SpeechTokenizer) -> None:
    per_token = tokenizer.spec.samples_per_token
    lengths = [1, per_token, 3 * per_token + 17, 5 * per_token]
    wav_BS = random_wav(4, 5 * per_token + 100)
    for row, length in enumerate(lengths):
        wav_BS[row, length:] = float("nan")  # a leak would be loud
    with torch.no_grad():
        latent_BLD, mask_BL = tokenizer.encode(wav_BS, torch.tensor(lengths))
        assert latent_BLD.shape == (4, 6, tokenizer.spec.dim) and torch.isfinite(latent_BLD).all()
        assert mask_BL.sum(1).tolist() == [1, 1, 4, 5]
        assert float(latent_BLD[~mask_BL].abs().max()) == 0
        decoded_BS = tokenizer.decode(latent_BLD)
        for row, length in enumerate(lengths):
            alone_1LD, _ = tokenizer.encode(wav_BS[row : row + 1, :length])
            torch.testing.assert_close(latent_BLD[row, mask_BL[row]], alone_1LD[0], rtol=0, atol=1e-4)
            alone_1S = tokenizer.decode(latent_BLD[row : row + 1])
            torch.testing.assert_close(decoded_BS[row], alone_1S[0], rtol=0, atol=5e-6)


def test_state_is_a_value(tokenizer: SpeechTokenizer) -> None:
    tokens = [random_tokens(tokenizer.spec, 1, 4, seed) for seed in (1, 2)]
    apart = [torch.cat(stream(tokenizer, latent_BLD, 1), dim=1) for latent_BLD in tokens]
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
    """`from_pretrained` builds on the meta device: filter bank, windows and statistics must come out right even so."""
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path).eval()
    assert type(loaded) is type(tokenizer) and loaded.spec == tokenizer.spec
    assert [file.suffix for file in tmp_path.iterdir() if file.suffix != ".json"] == [".safetensors"]
    wav_BS = random_wav(1, 9000)
    with torch.no_grad():
        latent_BLD, _ = tokenizer.encode(wav_BS)
        assert torch.equal(loaded.encode(wav_BS)[0], latent_BLD)
        assert torch.equal(loaded.decode(latent_BLD), tokenizer.decode(latent_BLD))
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


def test_sigma_vae_noise_differs_by_row_and_follows_the_generator() -> None:
    bottleneck, latent_BLD = SigmaVae(0.5), torch.ones(2000, 4, 8)
    noisy_BLD, penalty_BL = bottleneck(latent_BLD, torch.Generator().manual_seed(0))
    again_BLD, _ = bottleneck(latent_BLD, torch.Generator().manual_seed(0))
    assert torch.equal(noisy_BLD, again_BLD)
    torch.testing.assert_close(penalty_BL, torch.full((2000, 4), 0.5))
    scale_B = (noisy_BLD - 1).square().mean((1, 2)).sqrt()
    torch.testing.assert_close(scale_B.square().mean().sqrt(), torch.tensor(0.5), rtol=0.1, atol=0)
    assert float(scale_B.min()) < 0.05 and float(scale_B.max()) > 1.0


# the stage


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> str:
    """Tones of changing pitch, and the checkpoint of an untrained vocoder in `vocoder`."""
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "answers").mkdir()
    rng = np.random.default_rng(0)
    for index in range(6):
        time_S = np.arange(20000) / 24000
        pitch_S = 150 + 20 * index + 50 * np.sin(2 * np.pi * 3 * time_S)
        phase_S = 2 * np.pi * np.cumsum(pitch_S) / 24000
        wav_S = sum(0.1 / k * np.sin(k * phase_S) for k in range(1, 20)) + rng.normal(0, 1e-3, 20000)
        soundfile.write(folder / "answers" / f"{index:016x}.flac", wav_S, 24000, subtype="PCM_16")
    VocoderStage(VocoderOptions(str(folder), vocoder=VocoderConfig(**VOCODER)), seed=0).save(folder / "vocoder")
    return str(folder)


def tokenizer_stage(corpus: str, seed: int = 0) -> TokenizerStage:
    torch.manual_seed(seed)
    autoencoder = AutoencoderConfig(**AUTOENCODER | {"latent_dim": 16, "width": 48})
    return TokenizerStage(TokenizerOptions(corpus, f"{corpus}/vocoder", autoencoder, batch_size=6, crop_tokens=6), seed)


def test_stage_learns_and_saves_a_whole_tokenizer(corpus: str, tmp_path) -> None:
    stage = tokenizer_stage(corpus)
    vocoder_before = copy.deepcopy(stage.module.tokenizer.vocoder.state_dict())
    trainable = [p for p in stage.module.parameters() if p.requires_grad]
    optimizer, errors = torch.optim.AdamW(trainable, lr=1e-2), []
    for step in range(20):
        losses = stage.module(stage.batch(step, 0, 1), torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        sum(stage.weights[name] * loss.sum / loss.count for name, loss in losses.items()).backward()
        optimizer.step()
        errors.append(float((losses["l1"].sum / losses["l1"].count).detach()))
    assert errors[-1] < 0.75 * errors[0]
    stage.module.eval()
    values = stage.evaluate(tmp_path, 20)
    assert {"mel_l1", "latent_std_min", "latent_std_max"} <= set(values)
    stage.save(tmp_path / "final")
    loaded = MelTokenizer.from_pretrained(tmp_path / "final").eval()
    for name, value in loaded.vocoder.state_dict().items():
        assert torch.equal(value, vocoder_before[name])
    with torch.no_grad():
        latent_LD = torch.cat([loaded.encode(wav_1S)[0][0] for wav_1S in stage.answers.some_training(100)])
    torch.testing.assert_close(latent_LD.mean(0), torch.zeros(16), rtol=0, atol=1e-2)
    torch.testing.assert_close(latent_LD.std(0), torch.ones(16), rtol=0, atol=1e-1)

    # and its vocoder can be tuned on what its decoder gives, without touching the rest
    tuning = VocoderStage(
        VocoderOptions(corpus, tokenizer=str(tmp_path / "final"), batch_size=4, crop_frames=16, decoded_share=1.0),
        seed=0,
    )
    batch = tuning.batch(0, 0, 1)
    assert bool(batch.decoded_B.all())
    with_decoded = tuning.module(batch, torch.Generator().manual_seed(0))
    true_mels = tuning.module(dataclasses.replace(batch, decoded_B=~batch.decoded_B), torch.Generator())
    assert float((with_decoded["mel"].sum - true_mels["mel"].sum).abs().detach()) > 1e-3
    with_decoded["mel"].sum.backward()
    assert all(p.grad is None for p in tuning.module.tokenizer.encoder.parameters())
    assert all(p.grad is not None for p in tuning.module.tokenizer.vocoder.parameters())


def test_batch_is_a_pure_function(corpus: str) -> None:
    first, second = tokenizer_stage(corpus, seed=3), tokenizer_stage(corpus, seed=3)
    assert torch.equal(first.batch(4, 1, 2).wav_BS, second.batch(4, 1, 2).wav_BS)
    assert not torch.equal(first.batch(4, 0, 2).wav_BS, first.batch(4, 1, 2).wav_BS)


def test_stage_errors_name_the_option(corpus: str) -> None:
    with pytest.raises(ValueError, match="no layers"):
        TokenizerOptions(corpus, "", AutoencoderConfig.plain_patch(8, 100))
    with pytest.raises(ValueError, match="batch_size is 0"):
        TokenizerOptions(corpus, "", batch_size=0)
