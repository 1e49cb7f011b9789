"""Laws of the ears: Whisper's features and encoder on the audio there is, and the projector."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperForConditionalGeneration, WhisperModel

from flowomni.encoder import (
    HOP_SAMPLES,
    HeardFeatures,
    Projector,
    SpeechEncoder,
    num_encoder_frames,
    num_heard_positions,
    num_mel_frames,
)

MAX_FRAMES = 100


def tiny_config(**changes: object) -> WhisperConfig:
    settings: dict[str, object] = {
        "vocab_size": 60,
        "num_mel_bins": 80,
        "d_model": 32,
        "encoder_layers": 2,
        "encoder_attention_heads": 2,
        "encoder_ffn_dim": 48,
        "decoder_layers": 1,
        "decoder_attention_heads": 2,
        "decoder_ffn_dim": 48,
        "max_source_positions": MAX_FRAMES // 2,
        "max_target_positions": 20,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "decoder_start_token_id": 1,
    }
    return WhisperConfig(**(settings | changes))


def random_(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Weights of an ordinary size everywhere, biases too, which transformers would leave at zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return module.eval()


@pytest.fixture
def whisper() -> WhisperModel:
    return random_(WhisperModel(tiny_config()))


@pytest.fixture
def encoder() -> SpeechEncoder:
    return random_(SpeechEncoder(tiny_config()))


def features(num_rows: int, num_frames: int, seed: int = 0) -> Tensor:
    return torch.randn(num_rows, 80, num_frames, generator=torch.Generator().manual_seed(seed))


def speechlike(num_samples: int, seed: int = 0) -> np.ndarray:
    """Noise of changing loudness, loudest at its very end: the hardest case for the normalisation."""
    noise = np.random.default_rng(seed).normal(size=num_samples)
    return (noise * np.linspace(0.001, 0.2, num_samples)).astype(np.float32)


# ----------------------------------------------------------------------------------------------------------- features


@pytest.mark.parametrize("num_samples", [1, 159, 160, 161, 16000, 33333, 479950, 480000])
@pytest.mark.parametrize("num_mels", [80, 128])
def test_features_equal_the_start_of_transformers_padded_features(num_samples: int, num_mels: int) -> None:
    wav = speechlike(num_samples)
    extractor = WhisperFeatureExtractor(feature_size=num_mels)
    reference = extractor(wav, sampling_rate=16000, return_tensors="pt")["input_features"][0]
    ours = HeardFeatures(num_mels).features(wav)
    assert ours.shape == (num_mels, num_mel_frames(num_samples))
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, reference[:, : ours.shape[1]], atol=1e-5, rtol=0)


def test_features_of_a_click_in_the_last_sample_keep_the_clips_own_normalisation() -> None:
    # The click is loudest in the frame after the last one, and that frame sets the floor of all others.
    wav = np.zeros(16000, np.float32)
    wav[100:200] = 1e-4
    wav[-1] = 1.0
    reference = WhisperFeatureExtractor()(wav, sampling_rate=16000, return_tensors="pt")["input_features"][0]
    ours = HeardFeatures().features(wav)
    torch.testing.assert_close(ours, reference[:, : ours.shape[1]], atol=1e-5, rtol=0)


def test_features_of_silence_are_finite_and_take_tensors_too() -> None:
    heard = HeardFeatures()
    assert torch.isfinite(heard.features(np.zeros(1, np.float32))).all()
    wav = speechlike(4000)
    assert torch.equal(heard.features(torch.from_numpy(wav)), heard.features(wav.astype(np.float64)))


def test_features_hold_no_more_memory_than_they_show() -> None:
    ours = HeardFeatures().features(speechlike(1600))
    assert ours.untyped_storage().nbytes() == ours.numel() * 4


def test_features_settings_survive_json_and_pickle() -> None:
    heard = HeardFeatures.from_whisper_config(tiny_config(num_mel_bins=128))
    assert heard == HeardFeatures(num_mels=128, max_frames=MAX_FRAMES)
    assert HeardFeatures.from_dict(json.loads(json.dumps(heard.to_dict()))) == heard
    assert pickle.loads(pickle.dumps(heard)) == heard
    assert heard.max_heard_sec == 1.0
    assert HeardFeatures().max_heard_sec == 30.0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: HeardFeatures(num_mels=0), "num_mels=0"),
        (lambda: HeardFeatures(num_mels=129), "num_mels=129"),
        (lambda: HeardFeatures(max_frames=0), "max_frames=0"),
        (lambda: HeardFeatures.from_dict({"num_mel": 80}), "num_mels"),
        (lambda: HeardFeatures().features(np.zeros((2, 100), np.float32)), r"shape \[2, 100\]"),
        (lambda: HeardFeatures().features(np.zeros(0, np.float32)), "at least one sample"),
        (lambda: HeardFeatures(max_frames=100).features(np.zeros(16001, np.float32)), "max_heard_sec=1 s"),
    ],
)
def test_bad_features_are_refused_by_name(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


# ------------------------------------------------------------------------------------------------------------ encoder


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_full_window_equals_transformers(attention: str) -> None:
    whisper = random_(WhisperModel(tiny_config(attn_implementation=attention)))
    ours = SpeechEncoder(tiny_config(attn_implementation=attention)).eval()
    assert ours.config._attn_implementation == attention
    ours.whisper.load_state_dict(whisper.encoder.state_dict())
    window = features(3, MAX_FRAMES)
    hidden, lengths = ours(window, torch.full((3,), MAX_FRAMES))
    torch.testing.assert_close(hidden, whisper.encoder(window).last_hidden_state, atol=1e-6, rtol=1e-6)
    assert lengths.tolist() == [MAX_FRAMES // 2] * 3


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_batch_row_equals_that_row_alone_whatever_is_in_the_padding(attention: str) -> None:
    encoder = random_(SpeechEncoder(tiny_config(attn_implementation=attention)))
    lengths = torch.tensor([1, 2, 37, 64, 80])
    batch = features(5, 80)
    for row, length in enumerate(lengths.tolist()):
        batch[row, :, length:] = torch.nan
    hidden, hidden_lengths = encoder(batch, lengths)
    assert hidden_lengths.tolist() == [num_encoder_frames(length) for length in lengths.tolist()]
    for row, length in enumerate(lengths.tolist()):
        alone, _ = encoder(batch[row : row + 1, :, :length], torch.tensor([length]))
        assert alone.shape[1] == num_encoder_frames(length)
        torch.testing.assert_close(hidden[row, : alone.shape[1]], alone[0], atol=1e-5, rtol=1e-5)
        assert (hidden[row, alone.shape[1] :] == 0).all()


def test_gradient_stays_within_a_row_and_finite() -> None:
    encoder = random_(SpeechEncoder(tiny_config()))
    batch = features(2, 60)
    batch[0, :, 31:] = torch.nan
    batch.requires_grad_()
    hidden, _ = encoder(batch, torch.tensor([31, 60]))
    hidden[0].square().sum().backward()
    assert batch.grad is not None
    assert (batch.grad[0, :, :31] != 0).all()
    assert (batch.grad[0, :, 31:] == 0).all()
    assert (batch.grad[1] == 0).all()
    gradients = [parameter.grad for parameter in encoder.parameters() if parameter.requires_grad]
    assert all(gradient is not None and torch.isfinite(gradient).all() for gradient in gradients)


def test_short_audio_is_not_padded_to_the_window(encoder: SpeechEncoder) -> None:
    hidden, lengths = encoder(features(1, 7), torch.tensor([7]))
    assert hidden.shape == (1, 4, encoder.output_dim)
    assert lengths.tolist() == [4]


def test_half_precision_weights_take_float32_features(encoder: SpeechEncoder) -> None:
    hidden, _ = encoder.to(torch.bfloat16)(features(2, 20), torch.tensor([20, 9]))
    assert hidden.dtype == torch.bfloat16
    assert torch.isfinite(hidden).all()


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable")  # its new name needs a later transformers
def test_gradient_checkpointing_changes_nothing(encoder: SpeechEncoder) -> None:
    encoder.train()
    batch, lengths = features(2, 20), torch.tensor([20, 9])
    grads = []
    for enabled in (False, True):
        if enabled:
            encoder.whisper.gradient_checkpointing_enable()
        encoder.zero_grad()
        encoder(batch, lengths)[0].square().sum().backward()
        grads.append(encoder.whisper.conv1.weight.grad.clone())
    assert torch.equal(*grads)


def test_layer_drop_of_one_skips_every_layer_in_training_only() -> None:
    encoder = random_(SpeechEncoder(tiny_config(encoder_layerdrop=1.0)))
    batch, lengths = features(1, 20), torch.tensor([20])
    normal = encoder(batch, lengths)[0]
    dropped = encoder.train()(batch, lengths)[0]
    encoder.whisper.layers = torch.nn.ModuleList()
    assert torch.equal(dropped, encoder.eval()(batch, lengths)[0])
    assert not torch.allclose(normal, dropped)


def test_features_that_do_not_fit_are_refused(encoder: SpeechEncoder) -> None:
    assert encoder.max_heard_sec == 1.0
    with pytest.raises(ValueError, match="max_heard_sec=1 s"):
        encoder(features(1, MAX_FRAMES + 1), torch.tensor([MAX_FRAMES + 1]))
    with pytest.raises(ValueError, match="128 mel bins .* num_mel_bins is 80"):
        encoder(torch.zeros(1, 128, 10), torch.tensor([10]))


# -------------------------------------------------------------------------------------------------------- checkpoints


@pytest.mark.parametrize("kind", [WhisperModel, WhisperForConditionalGeneration])
@pytest.mark.parametrize("shard_size", ["1GB", "20KB"])
def test_checkpoint_gives_the_same_encoder(kind: type, shard_size: str, tmp_path: Path) -> None:
    whisper = random_(kind(tiny_config()))
    whisper.save_pretrained(tmp_path, max_shard_size=shard_size)
    assert (tmp_path / "model.safetensors.index.json").exists() == (shard_size == "20KB")
    random_state = torch.get_rng_state()
    ours = SpeechEncoder.from_pretrained(tmp_path).eval()
    assert torch.equal(torch.get_rng_state(), random_state)
    window = features(2, MAX_FRAMES)
    reference = whisper.get_encoder()(window).last_hidden_state
    torch.testing.assert_close(ours(window, torch.full((2,), MAX_FRAMES))[0], reference, atol=1e-6, rtol=1e-6)
    assert ours.config.d_model == 32
    assert not ours.whisper.embed_positions.weight.requires_grad


def test_half_precision_checkpoint_is_loaded_in_float32(whisper: WhisperModel, tmp_path: Path) -> None:
    whisper.half().save_pretrained(tmp_path)
    ours = SpeechEncoder.from_pretrained(str(tmp_path))
    assert {parameter.dtype for parameter in ours.parameters()} == {torch.float32}
    torch.testing.assert_close(ours.whisper.conv1.weight, whisper.encoder.conv1.weight.float())


def _remove_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def _spoil_config(folder: Path) -> None:
    (folder / "config.json").write_text("{not json")


def _other_model(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({"model_type": "bert"}))


def _list_config(folder: Path) -> None:
    (folder / "config.json").write_text("[]")


def _remove_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def _cut_weights(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])


def _empty_weights(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"")


def _lose_tensor(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["encoder.layers.1.fc1.bias"]
    save_file(weights, folder / "model.safetensors")


def _reshape_tensor(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["encoder.conv1.weight"] = torch.zeros(32, 40, 3)
    save_file(weights, folder / "model.safetensors")


def _fewer_layers_in_config(folder: Path) -> None:
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"encoder_layers": 1, "num_hidden_layers": 1}))


def _broken_setting(folder: Path) -> None:
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"d_model": "wide"}))


def _lose_shard(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {"encoder.conv1.weight": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _spoil_index(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text("{}")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_remove_config, "has no config.json"),
        (_spoil_config, "is not a JSON object"),
        (_list_config, "is not a JSON object"),
        (_other_model, "model_type 'bert'"),
        (_broken_setting, "d_model"),
        (_remove_weights, "has no model.safetensors"),
        (_cut_weights, "cannot be read"),
        (_empty_weights, "cannot be read"),
        (_lose_tensor, "lacks 1 of .*'encoder.layers.1.fc1.bias'"),
        (_reshape_tensor, r"'encoder.conv1.weight' of shape \[32, 40, 3\].*asks for \[32, 80, 3\]"),
        (_fewer_layers_in_config, "'encoder.layers.1"),
        (_lose_shard, "model-00001-of-00002.safetensors' are missing"),
        (_spoil_index, "has no weight_map"),
    ],
)
def test_bad_checkpoint_is_one_clear_line(
    spoil: Callable[[Path], None], message: str, whisper: WhisperModel, tmp_path: Path
) -> None:
    whisper.save_pretrained(tmp_path)
    spoil(tmp_path)
    with pytest.raises(ValueError, match=message) as caught:
        SpeechEncoder.from_pretrained(tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_checkpoint_is_one_clear_line(tmp_path: Path) -> None:
    missing = tmp_path / "nothing" / "here"
    with pytest.raises(ValueError, match="does not exist: give the folder of a Whisper checkpoint") as caught:
        SpeechEncoder.from_pretrained(missing)
    assert str(missing) in str(caught.value)
    assert "\n" not in str(caught.value)
    file = tmp_path / "model.bin"
    file.write_bytes(b"x")
    with pytest.raises(ValueError, match="is a file"):
        SpeechEncoder.from_pretrained(file)


# ---------------------------------------------------------------------------------------------------------- projector


@pytest.mark.parametrize("stack", [1, 2, 4, 5])
def test_projector_row_equals_that_row_alone(stack: int) -> None:
    projector = random_(Projector(8, 12, stack))
    lengths = torch.tensor([1, 9, 13, 20])
    hidden = torch.randn(4, 20, 8, generator=torch.Generator().manual_seed(1))
    for row, length in enumerate(lengths.tolist()):
        hidden[row, length:] = torch.nan
    heard, heard_lengths = projector(hidden, lengths)
    for row, length in enumerate(lengths.tolist()):
        alone, alone_lengths = projector(hidden[row : row + 1, :length], torch.tensor([length]))
        assert alone.shape == (1, heard_lengths[row], 12)
        assert alone_lengths.tolist() == [heard_lengths[row]]
        torch.testing.assert_close(heard[row, : alone.shape[1]], alone[0], atol=1e-6, rtol=1e-5)
        assert (heard[row, alone.shape[1] :] == 0).all()


def test_projector_stacks_neighbours_in_order() -> None:
    projector = Projector(2, 6, 3)
    with torch.no_grad():
        projector.expand.weight.copy_(torch.eye(6))
        projector.project.weight.copy_(torch.eye(6))
        projector.expand.bias.zero_()
        projector.project.bias.zero_()
    frames = torch.arange(100.0, 108.0).reshape(1, 4, 2)  # far above zero, where GELU is the identity
    heard, _ = projector(frames, torch.tensor([4]))
    expected = [[100, 101, 102, 103, 104, 105], [106, 107, 0, 0, 0, 0]]
    torch.testing.assert_close(heard[0], torch.tensor(expected, dtype=torch.float32))


@pytest.mark.parametrize("sizes", [(0, 4, 1), (4, 0, 1), (4, 4, 0)])
def test_projector_refuses_sizes_below_one(sizes: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="=0 must be at least 1"):
        Projector(*sizes)


@pytest.mark.parametrize("num_samples", [1, 160, 161, 4800, 15999, 16000])
@pytest.mark.parametrize("stack", [1, 3, 4])
def test_counts_are_the_lengths_that_come_out(num_samples: int, stack: int, encoder: SpeechEncoder) -> None:
    heard = HeardFeatures.from_whisper_config(encoder.config)
    mel = heard.features(np.zeros(num_samples, np.float32))
    num_frames = num_mel_frames(num_samples)
    assert mel.shape[1] == num_frames == -(-num_samples // HOP_SAMPLES)
    hidden, lengths = encoder(mel[None], torch.tensor([num_frames]))
    positions, position_lengths = Projector(encoder.output_dim, 6, stack)(hidden, lengths)
    assert positions.shape[1] == position_lengths.item() == num_heard_positions(num_frames, stack)
