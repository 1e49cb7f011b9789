"""The tokenizer stage: every bottleneck learns, through the wave and against discriminators too; runs can be cut up.

Shapes: B batch, S samples, L speech tokens, D latent dimension, K codebooks.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import socket
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
import yaml
from vocos.loss import DiscriminatorLoss, FeatureMatchingLoss, GeneratorLoss

from flowomni.tokenizers import AutoencoderConfig, MelTokenizer, VocoderConfig
from tests.test_training import check_resume, read_log
from training.adversarial import AdversarialOptions, Adversary
from training.stages.tokenizer import TokenizerOptions, TokenizerStage
from training.stages.vocoder import VocoderOptions, VocoderStage
from training.train import RunOptions, train

ROOT = Path(__file__).resolve().parent.parent
VOCODER = {"dim": 16, "intermediate_dim": 24, "num_layers": 2}
AUTOENCODER: dict[str, Any] = {
    "latent_dim": 16,
    "width": 48,
    "intermediate_dim": 32,
    "num_encoder_layers": 1,
    "num_decoder_layers": 2,
    "frame_width": 16,
}
BOTTLENECKS: dict[str, dict[str, Any]] = {
    "none": {},
    "sigma_vae": {},
    "kl_vae": {},
    "vq": {"codebook_size": 40},
    "fsq": {"num_codebooks": 2, "fsq_levels": (5, 4, 3)},
    "rvq": {"num_codebooks": 3, "codebook_size": 40, "quantizer_dropout": 0.5},
}
ADVERSARIAL = AdversarialOptions(weight=0.1, feature_weight=0.1, periods=(), fft_sizes=(128,))


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


def options_of(corpus: str, kind: str = "sigma_vae", **changes: Any) -> TokenizerOptions:
    autoencoder = AutoencoderConfig(**AUTOENCODER | BOTTLENECKS[kind] | {"bottleneck": kind})
    values: dict[str, Any] = {"penalty_weight": 1.0 if kind in ("vq", "rvq") else 0.002, "batch_size": 6}
    return TokenizerOptions(corpus, f"{corpus}/vocoder", autoencoder, **values | {"crop_tokens": 6} | changes)


def tokenizer_stage(corpus: str, kind: str = "sigma_vae", seed: int = 0, **changes: Any) -> TokenizerStage:
    torch.manual_seed(seed)
    return TokenizerStage(options_of(corpus, kind, **changes), seed)


def train_some(stage: TokenizerStage, num_steps: int, learning_rate: float = 1e-2) -> list[dict[str, float]]:
    """Steps as the loop takes them, on ever new batches: the mean of each part."""
    trainable = [p for p in stage.module.parameters() if p.requires_grad]
    optimizer, values = torch.optim.AdamW(trainable, lr=learning_rate), []
    for step in range(num_steps):
        losses = stage.module(stage.batch(step, 0, 1), torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        sum(stage.weights[name] * loss.sum / loss.count for name, loss in losses.items()).backward()
        optimizer.step()
        values.append({name: float(loss.sum.detach() / loss.count) for name, loss in losses.items()})
    return values


@pytest.mark.parametrize("kind", BOTTLENECKS)
def test_stage_learns_and_saves_a_whole_tokenizer(corpus: str, tmp_path: Path, kind: str) -> None:
    stage = tokenizer_stage(corpus, kind)
    vocoder_before = copy.deepcopy(stage.module.tokenizer.vocoder.state_dict())
    found = train_some(stage, 20)
    assert set(found[0]) == {"l1", "l2", "penalty"} == set(stage.weights)
    assert sum(values["l1"] for values in found[-5:]) / 5 < 0.8 * found[0]["l1"]
    stage.module.eval()
    values = stage.evaluate(tmp_path, 20)
    assert {"mel_l1", "latent_std_min", "latent_std_max"} <= set(values)
    spec = stage.module.tokenizer.spec
    assert values.get("bitrate") == spec.bitrate
    for index in range(spec.num_codebooks):
        assert 0 < values[f"codebook_use_{index}"] <= 1 <= values[f"perplexity_{index}"] <= spec.codebook_size
    stage.save(tmp_path / "final")
    loaded = MelTokenizer.from_pretrained(tmp_path / "final").eval()
    for name, value in loaded.vocoder.state_dict().items():
        assert torch.equal(value, vocoder_before[name])
    assert loaded.spec == spec
    if spec.kind == "continuous":
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


def test_what_a_distillation_can_be_taken_of(corpus: str) -> None:
    """Latents before the bottleneck and after, also by level, all with gradients to the encoder."""
    for kind in ("kl_vae", "rvq"):
        module = tokenizer_stage(corpus, kind).module
        stage = tokenizer_stage(corpus, kind)
        found = module.reconstruct(stage.batch(0, 0, 1), torch.Generator().manual_seed(0))
        assert found.before_BLD.shape == found.bottleneck.latent_BLD.shape == (6, 6, 16)
        values = [found.before_BLD, found.bottleneck.latent_BLD]
        if kind == "rvq":
            assert found.bottleneck.level_KBLD.shape == (3, 6, 6, 16)
            values += list(found.bottleneck.level_KBLD)
        for value_BLD in values:
            (gradient,) = torch.autograd.grad(value_BLD.sum(), module.tokenizer.encoder.patch.weight, retain_graph=True)
            assert float(gradient.abs().sum()) > 0


def test_the_wave_is_learned_from(corpus: str) -> None:
    """Through a vocoder that stays as it is, or learns with the rest."""
    for train_vocoder in (False, True):
        stage = tokenizer_stage(corpus, magnitude_weight=1.0, phase_weight=0.1, train_vocoder=train_vocoder)
        before = copy.deepcopy(stage.module.tokenizer.vocoder.state_dict())
        found = train_some(stage, 20)
        assert set(found[0]) == set(stage.weights) == {"l1", "l2", "penalty", "magnitude", "phase"}
        assert found[-1]["magnitude"] < (0.6 if train_vocoder else 0.93) * found[0]["magnitude"]
        after = stage.module.tokenizer.vocoder.state_dict()
        assert all(torch.equal(after[name], before[name]) for name in before) != train_vocoder
    plain = tokenizer_stage(corpus, l1_weight=0.0, l2_weight=0.0, penalty_weight=0.0, magnitude_weight=1.0)
    losses = plain.module(plain.batch(0, 0, 1), torch.Generator().manual_seed(0))
    losses["magnitude"].sum.backward()
    assert float(plain.module.tokenizer.encoder.patch.weight.grad.abs().sum()) > 0


# the adversary


def test_each_side_of_the_adversary_learns_from_its_own_loss_alone(corpus: str) -> None:
    stage = tokenizer_stage(corpus, adversarial=ADVERSARIAL, batch_size=1, crop_tokens=2)
    assert set(stage.weights) >= {"adversarial", "feature", "discriminator"}
    tokenizer, adversary = stage.module.tokenizer, stage.module.adversary
    for name, reaches in (("discriminator", adversary), ("adversarial", tokenizer), ("feature", tokenizer)):
        stage.module.zero_grad(set_to_none=True)
        stage.module(stage.batch(0, 0, 1), torch.Generator().manual_seed(0))[name].sum.backward()
        for side in (tokenizer, adversary):
            moved = sum(float(p.grad.abs().sum()) for p in side.parameters() if p.grad is not None)
            assert (moved > 0) == (side is reaches)
    assert all(p.requires_grad for p in adversary.parameters())


def test_the_adversary_has_vocos_losses() -> None:
    """As `VocosExp.training_step` adds them up, on the same discriminators."""
    torch.manual_seed(0)
    adversary = Adversary(dataclasses.replace(ADVERSARIAL, periods=(3,)))
    wav_BS, target_BS = torch.randn(2, 900), torch.randn(2, 900)
    found = adversary(wav_BS, target_BS)
    discriminator, adversarial, feature = 0.0, 0.0, 0.0
    for family, weight in zip(adversary.families, (1.0, 0.1), strict=True):
        true_scores, scores, true_features, features = family(target_BS, wav_BS)
        loss, real, _ = DiscriminatorLoss()(true_scores, scores)
        discriminator = discriminator + weight * loss / len(real)
        loss, each = GeneratorLoss()(scores)
        adversarial = adversarial + weight * loss / len(each)
        feature = feature + weight * FeatureMatchingLoss()(true_features, features) / len(true_features)
    torch.testing.assert_close(found["discriminator"], discriminator[0])
    torch.testing.assert_close(found["adversarial"], adversarial[0])
    torch.testing.assert_close(found["feature"], feature[0])


def test_the_discriminators_learn_to_tell(corpus: str) -> None:
    """With the autoencoder as it is: a hinge loss of 2 is that of knowing nothing."""
    stage = tokenizer_stage(corpus, l1_weight=0.0, adversarial=ADVERSARIAL, batch_size=2, crop_tokens=1)
    stage.module.tokenizer.requires_grad_(False)
    found = train_some(stage, 25, learning_rate=3e-3)
    assert found[-1]["discriminator"] < 0.5 * found[0]["discriminator"]


# runs


def run_options(folder: Path, **changes: Any) -> RunOptions:
    values = {"stage": "tokenizer", "max_steps": 4, "warmup_steps": 1, "log_every": 1, "ema_decay": 0.9}
    return RunOptions(output_dir=str(folder), **values | changes)


def hard_options(corpus: str) -> TokenizerOptions:
    """Everything at once that has a state or is random."""
    return options_of(
        corpus,
        "rvq",
        batch_size=1,
        crop_tokens=2,
        magnitude_weight=0.5,
        train_vocoder=True,
        adversarial=ADVERSARIAL,
        num_eval_answers=2,
    )


def test_a_resumed_run_is_the_run_that_never_stopped(corpus: str, tmp_path: Path) -> None:
    def run(name: str) -> RunOptions:
        return run_options(tmp_path / name, save_every=2, accumulation=2)

    check_resume(run, hard_options(corpus), TokenizerStage, cut_at=6)
    final = MelTokenizer.from_pretrained(tmp_path / "cut" / "final")
    assert not any("adversary" in name for name in final.state_dict())


def test_two_processes_are_one(corpus: str, tmp_path: Path) -> None:
    run = run_options(tmp_path / "two")
    config = json.loads(json.dumps(dataclasses.asdict(run) | {"options": dataclasses.asdict(hard_options(corpus))}))
    (tmp_path / "two.yaml").write_text(yaml.safe_dump(config))
    with socket.socket() as free:
        free.bind(("", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(port)]
    command += ["-m", "training.train", "--config", str(tmp_path / "two.yaml")]
    env = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    launched = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert launched.returncode == 0, launched.stderr[-3000:]
    single = dataclasses.replace(run, output_dir=str(tmp_path / "one"), accumulation=2)
    train(single, hard_options(corpus), TokenizerStage)
    one, two = read_log(tmp_path / "one"), read_log(tmp_path / "two")
    assert len(one) == len(two) == 5  # four steps and the evaluation's line
    for a, b in zip(one, two, strict=True):
        assert a == pytest.approx(b, rel=1e-3)


# bad input


def test_a_dead_codebook_is_warned_about_with_the_remedy(corpus: str, tmp_path: Path) -> None:
    stage = tokenizer_stage(corpus, "rvq")
    books = stage.module.tokenizer.bottleneck.layers
    with torch.no_grad():  # entry 7 of the second codebook is nearest to everything
        books[1].frozen_codebook.mul_(1e3)
        books[1].frozen_codebook[7] = 0
    with pytest.warns(UserWarning, match=r"dead codebooks: 1 \(1 of 40 codes, perplexity 1.0\).*penalty_weight.*fsq"):
        values = stage.evaluate(tmp_path, 1)
    assert values["perplexity_1"] == 1.0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tokenizer_stage(corpus, "fsq").evaluate(tmp_path, 1)


def test_a_corpus_of_another_rate_is_refused(corpus: str, tmp_path: Path) -> None:
    (tmp_path / "answers").mkdir()
    soundfile.write(tmp_path / "answers" / "a.flac", np.zeros(8000), 16000)
    with pytest.raises(ValueError, match=r"a.flac: 16000 Hz.* at 24000 Hz"):
        TokenizerStage(dataclasses.replace(options_of(corpus), corpus=str(tmp_path)), 0)


def test_a_corpus_of_answers_shorter_than_a_token(corpus: str, tmp_path: Path) -> None:
    """Each is one token, padded by silence."""
    (tmp_path / "answers").mkdir()
    for index in range(3):
        soundfile.write(tmp_path / "answers" / f"{index}.flac", np.sin(np.arange(400) * 0.1 * (index + 1)) * 0.1, 24000)
    torch.manual_seed(0)
    stage = TokenizerStage(dataclasses.replace(options_of(corpus, "vq"), corpus=str(tmp_path)), 0)
    train_some(stage, 2)
    assert all(0 <= value < float("inf") for value in stage.evaluate(tmp_path, 2).values())
    assert stage.module.tokenizer.encode(torch.zeros(1, 400))[0].shape == (1, 1, 1)
    stage.save(tmp_path / "final")


def test_stage_errors_name_the_option(corpus: str) -> None:
    with pytest.raises(ValueError, match="no layers"):
        TokenizerOptions(corpus, "", AutoencoderConfig.plain_patch(8, 100))
    with pytest.raises(ValueError, match="batch_size is 0"):
        TokenizerOptions(corpus, "", batch_size=0)
    with pytest.raises(ValueError, match=r"penalty_weight is 0, .*'rvq'.*set it to about 1"):
        options_of(corpus, "rvq", penalty_weight=0.0)
    with pytest.raises(ValueError, match="train_vocoder is true.*magnitude_weight"):
        TokenizerOptions(corpus, "", train_vocoder=True)
    with pytest.raises(ValueError, match=r"feature_weight is 1.0.*set adversarial.weight"):
        AdversarialOptions(feature_weight=1.0)
    with pytest.raises(ValueError, match="periods and adversarial.fft_sizes are both empty"):
        AdversarialOptions(weight=1.0, periods=(), fft_sizes=())
