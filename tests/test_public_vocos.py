"""The public, non-causal vocos streams: equal to vocos on the same weights, with its declared look-ahead.

Shapes: B batch, S samples, F mel frames, C mel bins, L speech tokens, D latent dimension.
"""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor
from transformers import AutoModel
from vocos import Vocos

from flowomni.tokenizers.loading import load_speech_tokenizer
from flowomni.tokenizers.public_vocos import CLASSES, PublicVocos, VocosMelConfig, VocosMelTokenizer

TINY = {"dim": 16, "intermediate_dim": 24, "num_layers": 3}
PUBLIC = {"dim": 512, "intermediate_dim": 1536, "num_layers": 8}
TINY_MEL = {"sample_rate": 24000, "n_fft": 64, "hop_length": 16, "n_mels": 10}
PUBLIC_MEL = {"sample_rate": 24000, "n_fft": 1024, "hop_length": 256, "n_mels": 100}


def sections(sizes: dict[str, int], mel: dict[str, int]) -> dict[str, dict[str, Any]]:
    """As the published `config.yaml`."""
    head = {"dim": sizes["dim"], "n_fft": mel["n_fft"], "hop_length": mel["hop_length"], "padding": "center"}
    arguments = {
        "feature_extractor": mel | {"padding": "center"},
        "backbone": {"input_channels": mel["n_mels"]} | sizes,
        "head": head,
    }
    return {name: {"class_path": CLASSES[name], "init_args": arguments[name]} for name in CLASSES}


def save(folder: Path, sizes: dict[str, int] = TINY, mel: dict[str, int] = TINY_MEL) -> Vocos:
    """A checkpoint with random weights in vocos' own format."""
    folder.mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump(sections(sizes, mel)))
    torch.manual_seed(0)
    vocos = Vocos.from_hparams(str(folder / "config.yaml")).eval()
    with torch.no_grad():  # at their initial values the blocks hardly see their neighbours
        for parameter in vocos.backbone.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.1 if sizes is TINY else 0.02))
    torch.save(vocos.state_dict(), folder / "pytorch_model.bin")
    return vocos


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> tuple[Path, Vocos]:
    folder = tmp_path_factory.mktemp("vocos") / "tiny"
    return folder, save(folder)


def load(tiny: tuple[Path, Vocos]) -> VocosMelTokenizer:
    tokenizer = VocosMelTokenizer.from_vocos(str(tiny[0]), frames_per_token=4)
    tokenizer.front.mean_C.fill_(-2.0)
    tokenizer.front.std_C.fill_(1.5)
    return tokenizer


def random(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def stream(model: PublicVocos | VocosMelTokenizer, x_BLC: Tensor, chunk: int) -> list[Tensor]:
    state, chunks = model.init_state(x_BLC.shape[0]), []
    for chunk_BLC in x_BLC.split(chunk, dim=1):
        chunk_BS, state = model.step(chunk_BLC, state)
        chunks.append(chunk_BS)
    return [*chunks, model.flush(state)]


@pytest.mark.parametrize("chunk_frames", [1, 2, 7, 40])
def test_stream_equals_vocos(chunk_frames: int, tiny: tuple[Path, Vocos]) -> None:
    mel_BFC = random(2, 40, 10)
    expected_BS = tiny[1].decode(mel_BFC.transpose(1, 2)).clone()  # stops at the centre of the last frame
    found_BS = torch.cat(stream(load(tiny).vocoder, mel_BFC, chunk_frames), dim=1)
    assert expected_BS.shape == (2, 39 * 16) and found_BS.shape == (2, 40 * 16)
    torch.testing.assert_close(found_BS[:, : 39 * 16], expected_BS, rtol=0, atol=5e-6)
    assert bool(torch.isfinite(found_BS).all()) and float(expected_BS.std()) > 0.01


def test_the_published_size_streams_with_29_frames_of_lookahead(tmp_path) -> None:
    """`vocos-mel-24khz`: 8 blocks of 512, by gradient and by what is emitted; float32 rounding apart from vocos."""
    vocos = save(tmp_path / "public", PUBLIC, PUBLIC_MEL)
    tokenizer = VocosMelTokenizer.from_vocos(str(tmp_path / "public"))
    assert tokenizer.config.lookahead_frames == 29 and tokenizer.spec.lookahead_samples == 29 * 256
    assert tokenizer.spec.samples_per_token == 2048 and tokenizer.spec.dim == 800
    mel_BFC = (random(1, 72, 100) - 3).requires_grad_()
    wav_BS = tokenizer.vocoder(mel_BFC)
    expected_BS = vocos.decode(mel_BFC.detach().transpose(1, 2)).clone()
    scale = float(expected_BS.abs().max())
    torch.testing.assert_close(wav_BS[:, : 71 * 256].detach(), expected_BS, rtol=0, atol=1e-5 * scale)
    for frame in (30, 40):
        (gradient_BFC,) = torch.autograd.grad(wav_BS[0, (frame + 1) * 256 - 1], mel_BFC, retain_graph=True)
        assert int(gradient_BFC[0].abs().amax(1).nonzero().max()) == frame + 29
    chunks = stream(tokenizer.vocoder, mel_BFC.detach(), 8)
    assert [chunk_BS.shape[1] // 256 for chunk_BS in chunks] == [0, 0, 0, 3, 8, 8, 8, 8, 8, 29]
    torch.testing.assert_close(torch.cat(chunks, dim=1), wav_BS.detach(), rtol=0, atol=1e-5 * scale)


def test_mel_is_vocos_own(tiny: tuple[Path, Vocos]) -> None:
    """Where vocos mirrors the end of the wave, zeros follow here; everything before is the same."""
    tokenizer, wav_BS = load(tiny), random(2, 40 * 16) * 0.1
    latent_BLD, mask_BL = tokenizer.encode(wav_BS)
    mel_BFC = tokenizer.front.unstandardise(latent_BLD.reshape(2, 40, 10))
    expected_BFC = tiny[1].feature_extractor(wav_BS).transpose(1, 2)
    assert bool(mask_BL.all())
    torch.testing.assert_close(mel_BFC[:, :38], expected_BFC[:, :38], rtol=1e-4, atol=1e-4)


# the contract of every tokenizer


def test_tokenizer_streams_and_keeps_its_lookahead(tiny: tuple[Path, Vocos]) -> None:
    tokenizer = load(tiny)
    spec, latent_BLD = tokenizer.spec, random(2, 9, 40)
    offline_BS = tokenizer.decode(latent_BLD)
    assert offline_BS.shape == (2, 9 * 64)
    for chunk_tokens in (1, 2, 7, 9):
        chunks = stream(tokenizer, latent_BLD, chunk_tokens)
        torch.testing.assert_close(torch.cat(chunks, dim=1), offline_BS, rtol=0, atol=5e-6)
        assert sum(chunk_BS.shape[1] for chunk_BS in chunks[:-1]) == 9 * 64 - spec.lookahead_samples
    latent_BLD.requires_grad_()
    sample = 5 * 64 - spec.lookahead_samples  # the first one that waits for token 5, where the window is zero
    for place, token in ((sample, 4), (sample + 1, 5)):
        (gradient_BLD,) = torch.autograd.grad(tokenizer.decode(latent_BLD)[0, place], latent_BLD)
        assert int(gradient_BLD[0].abs().amax(1).nonzero().max()) == token


def test_short_streams_have_exact_length(tiny: tuple[Path, Vocos]) -> None:
    tokenizer = load(tiny)
    for num_tokens in (1, 2):
        latent_BLD = random(1, num_tokens, 40)
        wav_BS = tokenizer.decode(latent_BLD)
        assert wav_BS.shape == (1, num_tokens * 64) and bool(torch.isfinite(wav_BS).all())
        torch.testing.assert_close(torch.cat(stream(tokenizer, latent_BLD, 1), dim=1), wav_BS, rtol=0, atol=5e-6)
    assert tokenizer.flush(tokenizer.init_state(2)).shape == (2, 0)


def test_batch_row_equals_row_alone_and_padding_changes_nothing(tiny: tuple[Path, Vocos]) -> None:
    tokenizer, lengths = load(tiny), [1, 64, 3 * 64 + 17, 5 * 64]
    wav_BS = random(4, 5 * 64 + 10)
    for row, length in enumerate(lengths):
        wav_BS[row, length:] = float("nan")  # a leak would be loud
    latent_BLD, mask_BL = tokenizer.encode(wav_BS, torch.tensor(lengths))
    assert mask_BL.sum(1).tolist() == [1, 1, 4, 5] and bool(torch.isfinite(latent_BLD).all())
    decoded_BS = tokenizer.decode(latent_BLD)
    for row, length in enumerate(lengths):
        alone_1LD, _ = tokenizer.encode(wav_BS[row : row + 1, :length])
        torch.testing.assert_close(latent_BLD[row, mask_BL[row]], alone_1LD[0], rtol=0, atol=1e-4)
        alone_1S = tokenizer.decode(latent_BLD[row : row + 1])
        torch.testing.assert_close(decoded_BS[row], alone_1S[0], rtol=0, atol=5e-6)


def test_state_is_a_value(tiny: tuple[Path, Vocos]) -> None:
    tokenizer, latent_BLD = load(tiny), random(1, 8, 40)
    expected_BS = torch.cat(stream(tokenizer, latent_BLD, 1), dim=1)
    state, chunks = tokenizer.init_state(1), []
    with torch.no_grad():
        for token in range(8):
            kept, token_BLD = copy.deepcopy(state), latent_BLD[:, token : token + 1]
            chunk_BS, after = tokenizer.step(token_BLD, state)
            tokenizer.step(random(1, 1, 40, seed=9), state)  # another stream from the same state
            assert torch.equal(chunk_BS, tokenizer.step(token_BLD, kept)[0])
            file = io.BytesIO()
            torch.save(after, file)
            file.seek(0)
            state = torch.load(file, weights_only=False)
            chunks.append(chunk_BS)
        assert torch.equal(torch.cat([*chunks, tokenizer.flush(state)], dim=1), expected_BS)


def test_save_and_load_through_auto_classes(tiny: tuple[Path, Vocos], tmp_path) -> None:
    tokenizer, latent_BLD = load(tiny), random(1, 6, 40)
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path).eval()
    assert isinstance(loaded, VocosMelTokenizer) and loaded.spec == tokenizer.spec
    assert torch.equal(loaded.decode(latent_BLD), tokenizer.decode(latent_BLD))
    wav_BS = random(1, 640)
    assert torch.equal(loaded.encode(wav_BS)[0], tokenizer.encode(wav_BS)[0])
    assert load_speech_tokenizer(str(tiny[0])).spec.samples_per_token == 8 * 16


# bad input


@pytest.mark.parametrize(
    ("section", "key", "value", "words"),
    [
        (
            "feature_extractor",
            "class_path",
            "vocos.feature_extractors.EncodecFeatures",
            ["EncodecFeatures", "only vocos"],
        ),
        ("backbone", "class_path", "os.system", ["backbone.class_path is 'os.system'"]),
        ("head", "padding", "same", ["head.padding is 'same'", "center"]),
        ("backbone", "adanorm_num_embeddings", 4, ["adanorm_num_embeddings"]),
        ("backbone", "num_layers", 2, ["pytorch_model.bin does not fit", "convnext"]),
    ],
)
def test_other_kinds_of_vocos_are_named(
    section: str, key: str, value: Any, words: list[str], tiny: tuple[Path, Vocos], tmp_path
) -> None:
    values = sections(TINY, TINY_MEL)
    (values[section] if key == "class_path" else values[section]["init_args"])[key] = value
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))
    (tmp_path / "pytorch_model.bin").write_bytes((tiny[0] / "pytorch_model.bin").read_bytes())
    with pytest.raises(ValueError) as error:
        VocosMelTokenizer.from_vocos(str(tmp_path))
    for word in [str(tmp_path), *words]:
        assert word in str(error.value)


def test_missing_and_damaged_files_are_named(tiny: tuple[Path, Vocos], tmp_path) -> None:
    with pytest.raises(ValueError, match="has no config.yaml"):
        VocosMelTokenizer.from_vocos(str(tmp_path))
    (tmp_path / "config.yaml").write_bytes((tiny[0] / "config.yaml").read_bytes())
    with pytest.raises(ValueError, match="has no pytorch_model.bin"):
        VocosMelTokenizer.from_vocos(str(tmp_path))
    (tmp_path / "pytorch_model.bin").write_bytes(b"not a checkpoint")
    with pytest.raises(ValueError, match="does not fit"):
        VocosMelTokenizer.from_vocos(str(tmp_path))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"frames_per_token": 0}, "frames_per_token is 0"),
        ({"mel": {"hop_lenght": 256}}, "mel.hop_lenght: unknown key; did you mean 'hop_length'"),
        ({"num_layer": 8}, "num_layer: unknown key; did you mean 'num_layers'"),
    ],
)
def test_config_errors_name_the_field(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        VocosMelConfig(**values)
