"""Laws of the mel front, the vocoder and its training stage.

Shapes: B batch, F mel frames, C mel bins, S samples.
"""

from __future__ import annotations

import copy
import io

import numpy as np
import pytest
import soundfile
import torch
from torch import Tensor
from torch.nn import functional
from vocos.feature_extractors import MelSpectrogramFeatures
from vocos.heads import ISTFTHead
from vocos.models import VocosBackbone

from flowomni.tokenizers import MelConfig, MelTokenizer, VocoderConfig
from flowomni.tokenizers.mel import MelFront
from flowomni.tokenizers.vocoder import Vocoder, VocoderState
from training.stages.answers import Answers, held_out
from training.stages.vocoder import VocoderOptions, VocoderStage, spectral_losses

NUM_MELS, N_FFT = 20, 64
TINY = VocoderConfig(dim=16, intermediate_dim=24, num_layers=2)


def build(lookahead_frames: int = 2, hop_length: int = 16) -> Vocoder:
    torch.manual_seed(0)
    config = VocoderConfig(dim=16, intermediate_dim=24, num_layers=2, lookahead_frames=lookahead_frames)
    vocoder = Vocoder(config, NUM_MELS, N_FFT, hop_length).eval()
    with torch.no_grad():  # at their initial values the blocks hardly see their neighbours
        for parameter in vocoder.backbone.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return vocoder


def random_mel(batch_size: int, num_frames: int, seed: int = 1) -> Tensor:
    return torch.randn(batch_size, num_frames, NUM_MELS, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def stream(vocoder: Vocoder, mel_BFC: Tensor, chunk_frames: int) -> list[Tensor]:
    state, chunks = vocoder.init_state(mel_BFC.shape[0]), []
    for chunk_BFC in mel_BFC.split(chunk_frames, dim=1):
        chunk_BS, state = vocoder.step(chunk_BFC, state)
        chunks.append(chunk_BS)
    return [*chunks, vocoder.flush(state)]


@pytest.mark.parametrize("hop_length", [16, 19, 24])
@pytest.mark.parametrize("lookahead_frames", [0, 1, 2, 3])
def test_stream_equals_offline(lookahead_frames: int, hop_length: int) -> None:
    vocoder, mel_BFC = build(lookahead_frames, hop_length), random_mel(2, 23)
    with torch.no_grad():
        offline_BS = vocoder(mel_BFC)
    assert offline_BS.shape == (2, 23 * hop_length)
    for chunk_frames in (1, 2, 7, 23):
        streamed_BS = torch.cat(stream(vocoder, mel_BFC, chunk_frames), dim=1)
        torch.testing.assert_close(streamed_BS, offline_BS, rtol=0, atol=2e-6)


@pytest.mark.parametrize("num_frames", [0, 1, 2, 3])
@pytest.mark.parametrize("hop_length", [16, 19, 24])
def test_short_inputs_have_exact_length(num_frames: int, hop_length: int) -> None:
    for lookahead_frames in (0, 2):
        vocoder = build(lookahead_frames, hop_length)
        wav_BS = vocoder(random_mel(1, num_frames))
        assert wav_BS.shape == (1, num_frames * hop_length)
        assert torch.isfinite(wav_BS).all()


@torch.no_grad()
def vocos_forward(vocoder: Vocoder, mel_BFC: Tensor) -> Tensor:
    """vocos' own forward passes on our weights; only the padding of its convolutions is moved to the left."""
    config = vocoder.config
    backbone = VocosBackbone(NUM_MELS, config.dim, config.intermediate_dim, config.num_layers)
    head = ISTFTHead(config.dim, vocoder.n_fft, vocoder.hop_length, padding="center")
    backbone.load_state_dict(vocoder.backbone.state_dict())
    head.load_state_dict(vocoder.head.state_dict())
    for conv in [backbone.embed, *(block.dwconv for block in backbone.convnext)]:
        ahead = config.lookahead_frames if conv is backbone.embed else 0
        conv.padding = (0,)
        conv.register_forward_pre_hook(lambda _, x, ahead=ahead: functional.pad(x[0], (6 - ahead, ahead)))
    return head(backbone(mel_BFC.transpose(1, 2)))


@pytest.mark.parametrize("hop_length", [16, 19])
def test_equals_vocos_on_the_same_weights(hop_length: int) -> None:
    vocoder, mel_BFC = build(2, hop_length), random_mel(2, 15)
    expected_BS = vocos_forward(vocoder, mel_BFC)  # vocos stops at the centre of the last frame
    assert expected_BS.shape[1] == 14 * hop_length
    with torch.no_grad():
        found_BS = vocoder(mel_BFC)
    torch.testing.assert_close(found_BS[:, : 14 * hop_length], expected_BS, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("lookahead_frames", [0, 2])
def test_lookahead_is_what_it_says(lookahead_frames: int) -> None:
    """By gradient: sample s sees no frame beyond (s + lookahead_samples) / hop, and it does see that one."""
    vocoder, hop = build(lookahead_frames), 16
    mel_BFC = random_mel(1, 24).requires_grad_()
    wav_BS = vocoder(mel_BFC)
    for sample in (8 * hop - 1, 8 * hop, 10 * hop + 5):
        (gradient_BFC,) = torch.autograd.grad(wav_BS[0, sample], mel_BFC, retain_graph=True)
        seen = gradient_BFC[0].abs().amax(1).nonzero().flatten()
        # a frame's window is zero at its very first sample
        assert int(seen.max()) == -(-(sample + vocoder.lookahead_samples) // hop) - 1
        assert int(seen.min()) < sample // hop - 5
    emitted = torch.cat(stream(vocoder, mel_BFC, 1)[:-1], dim=1)
    assert emitted.shape[1] == 24 * hop - vocoder.lookahead_samples


def test_row_equals_row_alone() -> None:
    vocoder, mel_BFC = build(), random_mel(3, 12)
    with torch.no_grad():
        torch.testing.assert_close(vocoder(mel_BFC)[1:2], vocoder(mel_BFC[1:2]), rtol=0, atol=2e-6)


def test_state_is_a_value() -> None:
    """Two interleaved streams equal the two apart, an old state can be used again, and a saved one goes on."""
    vocoder, first_BFC, second_BFC = build(), random_mel(1, 12, seed=1), random_mel(1, 12, seed=2)
    apart = [torch.cat(stream(vocoder, mel_BFC, 3), dim=1) for mel_BFC in (first_BFC, second_BFC)]
    states, woven = [vocoder.init_state(1), vocoder.init_state(1)], [[], []]
    with torch.no_grad():
        for start in range(0, 12, 3):
            for index, mel_BFC in enumerate((first_BFC, second_BFC)):
                before = copy.deepcopy(states[index])
                chunk_BS, after = vocoder.step(mel_BFC[:, start : start + 3], states[index])
                again_BS, _ = vocoder.step(mel_BFC[:, start : start + 3], before)
                assert torch.equal(chunk_BS, again_BS)
                file = io.BytesIO()
                torch.save(after, file)
                file.seek(0)
                with torch.serialization.safe_globals([VocoderState]):
                    states[index] = torch.load(file)
                woven[index].append(chunk_BS)
        for index in range(2):
            assert torch.equal(torch.cat([*woven[index], vocoder.flush(states[index])], dim=1), apart[index])


def test_bfloat16_autocast_keeps_the_fourier_part_in_float32() -> None:
    vocoder, mel_BFC = build(), random_mel(1, 12)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        wav_BS = vocoder(mel_BFC)
    assert wav_BS.dtype == torch.float32
    with torch.no_grad():
        torch.testing.assert_close(wav_BS, vocoder(mel_BFC), rtol=0, atol=0.1 * float(wav_BS.abs().max()))


# the mel front


@pytest.mark.parametrize("hop_length", [256, 300])
def test_log_mel_equals_vocos(hop_length: int) -> None:
    config = MelConfig(hop_length=hop_length)
    wav_BS = torch.randn(2, 9000, generator=torch.Generator().manual_seed(0)) * 0.1
    expected_BCF = MelSpectrogramFeatures(hop_length=hop_length)(wav_BS)
    num_inner = (9000 - 512) // hop_length  # vocos mirrors the end, where we continue with zeros
    found_BFC = MelFront(config).log_mel(wav_BS, num_inner)
    torch.testing.assert_close(found_BFC, expected_BCF[:, :, :num_inner].transpose(1, 2), rtol=1e-4, atol=1e-4)


def test_log_mel_has_a_floor_and_as_many_frames_as_asked() -> None:
    front = MelFront(MelConfig())
    mel_BFC = front.log_mel(torch.zeros(1, 1), 5)
    assert mel_BFC.shape == (1, 5, 100)
    torch.testing.assert_close(mel_BFC, torch.full_like(mel_BFC, float(np.log(1e-5))))


def test_mel_statistics_standardise() -> None:
    front = MelFront(MelConfig(num_mels=20))
    logs = [torch.randn(50, 20) * 3 - 5 for _ in range(4)]
    front.fit_statistics(logs)
    standard_FC = front.standardise(torch.cat(logs))
    torch.testing.assert_close(standard_FC.mean(0), torch.zeros(20), rtol=0, atol=1e-5)
    torch.testing.assert_close(standard_FC.std(0, correction=0), torch.ones(20), rtol=0, atol=1e-5)
    torch.testing.assert_close(front.unstandardise(standard_FC), torch.cat(logs), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MelConfig(hop_length=600), "hop_length is 600"),
        (lambda: MelConfig(num_mels=0), "num_mels is 0"),
        (lambda: VocoderConfig(lookahead_frames=4), "lookahead_frames is 4"),
        (lambda: VocoderConfig(dim=0), "dim is 0"),
    ],
)
def test_bad_sizes_are_named(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


# the stage


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> str:
    """A few short "answers": harmonic tones of changing pitch."""
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "answers").mkdir()
    for index in range(6):
        time_S = np.arange(9000 + 1000 * index) / 24000
        pitch = 120 + 20 * index
        wav_S = sum(0.1 / k * np.sin(2 * np.pi * k * pitch * time_S) for k in range(1, 20))
        soundfile.write(folder / "answers" / f"{index:016x}.flac", wav_S, 24000, subtype="PCM_16")
    return str(folder)


def options(corpus: str, **changes) -> VocoderOptions:
    return VocoderOptions(corpus, vocoder=TINY, batch_size=4, crop_frames=16, **changes)


def test_batch_is_a_pure_function(corpus: str) -> None:
    first, second = VocoderStage(options(corpus), seed=3), VocoderStage(options(corpus), seed=3)
    second.batch(0, 0, 1)
    for index, rank, world_size in ((0, 0, 1), (5, 0, 1), (1, 1, 2)):
        one, two = first.batch(index, rank, world_size), second.batch(index, rank, world_size)
        assert torch.equal(one.wav_BS, two.wav_BS) and torch.equal(one.decoded_B, two.decoded_B)
    assert not torch.equal(first.batch(0, 0, 2).wav_BS, first.batch(0, 1, 2).wav_BS)
    assert not torch.equal(first.batch(0, 0, 1).wav_BS, VocoderStage(options(corpus), seed=4).batch(0, 0, 1).wav_BS)


def test_losses_are_zero_for_the_truth_only() -> None:
    wav_BS = torch.randn(2, 8000, generator=torch.Generator().manual_seed(0)) * 0.1
    assert all(float(value_B.abs().max()) == 0 for value_B in spectral_losses(wav_BS, wav_BS))
    magnitude_B, phase_B = spectral_losses(-wav_BS, wav_BS)  # the same magnitudes, every phase turned
    assert float(magnitude_B.max()) < 1e-4 and float(phase_B.min()) > 1
    assert float(spectral_losses(wav_BS * 0.5, wav_BS)[0].min()) > 0.5


def test_losses_are_sums_over_rows(corpus: str) -> None:
    stage = VocoderStage(options(corpus), seed=0)
    batch, generator = stage.batch(0, 0, 1), torch.Generator()
    whole = stage.module(batch, generator)
    rows = [stage.module(type(batch)(batch.wav_BS[i : i + 1], batch.decoded_B[i : i + 1]), generator) for i in range(4)]
    for name, count in stage.counts(batch).items():
        assert float(whole[name].count) == count == 4
        torch.testing.assert_close(whole[name].sum, sum(row[name].sum for row in rows), rtol=1e-4, atol=1e-4)


def test_one_batch_is_learnt(corpus: str, tmp_path) -> None:
    stage = VocoderStage(options(corpus), seed=0)
    optimizer = torch.optim.AdamW(stage.module.tokenizer.vocoder.parameters(), lr=1e-2)
    batch, totals = stage.batch(0, 0, 1), []
    for _ in range(15):
        losses = stage.module(batch, torch.Generator())
        total = sum(stage.weights[name] * loss.sum / loss.count for name, loss in losses.items())
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        totals.append(float(total.detach()))
    assert totals[-1] < 0.75 * totals[0]
    stage.module.eval()
    values = stage.evaluate(tmp_path, 15)
    assert set(values) == {"mel_l1", "magnitude", "phase"} and all(np.isfinite(list(values.values())))
    assert soundfile.info(tmp_path / "0_decoded.wav").samplerate == 24000
    stage.save(tmp_path / "final")
    loaded = MelTokenizer.from_pretrained(tmp_path / "final").eval()
    wav_BS = batch.wav_BS
    with torch.no_grad():
        latent_BLD, _ = stage.module.tokenizer.encode(wav_BS)
        assert torch.equal(loaded.encode(wav_BS)[0], latent_BLD)
        assert torch.equal(loaded.decode(latent_BLD), stage.module.tokenizer.decode(latent_BLD))


def test_held_out_answers_never_train(tmp_path) -> None:
    (tmp_path / "answers").mkdir()
    names = [f"{index:016x}.flac" for index in range(60)]
    for index, name in enumerate(names):
        soundfile.write(tmp_path / "answers" / name, np.full(8 + index, 0.25), 24000, subtype="PCM_16")
    answers = Answers(str(tmp_path), 24000)
    expected = sorted(8 + index for index, name in enumerate(names) if held_out(name))
    assert 0 < len(expected) < 8
    assert sorted(len(wav_S) for wav_S in answers.evaluation) == expected
    assert not set(expected) & {len(wav_S) for wav_S in answers.training}


def test_crop_margins_are_real_context_and_zeros_outside(tmp_path) -> None:
    (tmp_path / "answers").mkdir()
    soundfile.write(tmp_path / "answers" / "a.flac", np.arange(1, 101) / 128, 24000, subtype="PCM_16")
    crops_BS = Answers(str(tmp_path), 24000).crops(40, 30, 10, 7)
    assert crops_BS.shape == (40, 50)
    for wav_S in crops_BS:
        inside = wav_S.nonzero().flatten()
        assert torch.equal(wav_S[inside].diff(), torch.full((len(inside) - 1,), 1 / 128))
        assert 10 not in set(range(50)) - set(inside.tolist()), "the crop itself lies inside the answer"


def test_corpus_errors_say_what_to_do(tmp_path) -> None:
    with pytest.raises(ValueError, match="make the corpus first"):
        Answers(str(tmp_path), 24000)
    (tmp_path / "answers").mkdir()
    soundfile.write(tmp_path / "answers" / "a.flac", np.zeros(100), 16000, subtype="PCM_16")
    with pytest.raises(ValueError, match="16000 Hz"):
        Answers(str(tmp_path), 24000)
