"""The tokenizer stage: every bottleneck learns, through the wave and against discriminators too; runs can be cut up.

Shapes: B batch, S samples, F mel frames, L speech tokens, D latent dimension, K codebooks, N tokens or frames.
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
from tests.teachers import needs_flite, save_text_teacher, save_whisper, spoken
from tests.test_training import check_resume, read_log
from training.adversarial import AdversarialOptions, Adversary
from training.distillation import CorpusTargets, DistillationOptions, Targets, TimedVectors
from training.stages.answers import Answers, Place
from training.stages.tokenizer import TokenizerBatch, TokenizerOptions, TokenizerStage
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
    """Tones of changing pitch, said to be words; an untrained vocoder in `vocoder`, teachers in `text` and `speech`."""
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "answers").mkdir()
    rng, texts = np.random.default_rng(0), {}
    for index in range(6):
        time_S = np.arange(20000) / 24000
        pitch_S = 150 + 20 * index + 50 * np.sin(2 * np.pi * 3 * time_S)
        phase_S = 2 * np.pi * np.cumsum(pitch_S) / 24000
        wav_S = sum(0.1 / k * np.sin(k * phase_S) for k in range(1, 20)) + rng.normal(0, 1e-3, 20000)
        texts[f"{index:016x}.flac"] = " ".join(["seven", "banana", "green", "winter"][: 1 + index % 4])
        soundfile.write(folder / "answers" / f"{index:016x}.flac", wav_S, 24000, subtype="PCM_16")
    write_manifest(folder, texts)
    save_text_teacher(folder / "text")
    save_whisper(folder / "speech")
    VocoderStage(VocoderOptions(str(folder), vocoder=VocoderConfig(**VOCODER)), seed=0).save(folder / "vocoder")
    return str(folder)


def write_manifest(folder: Path, texts: dict[str, str]) -> None:
    """Of answers by file name."""
    lines = []
    for name, text in texts.items():
        answer = {"role": "assistant", "text": text, "audio": f"answers/{name}", "duration_sec": 1.0}
        lines.append(json.dumps({"id": name, "split": "train", "turns": [{"role": "user", "text": "say"}, answer]}))
    (folder / "manifest.jsonl").write_text("\n".join(lines))


def distillation_of(corpus: str, **changes: Any) -> DistillationOptions:
    """Both teachers; padded, because tones are not aligned."""
    values = {"text_teacher": f"{corpus}/text", "speech_teacher": f"{corpus}/speech", "cache": f"{corpus}/targets"}
    return DistillationOptions(**values | {"placement": "padded"} | changes)


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


# distillation


def test_crops_are_drawn_as_ever(tmp_path: Path) -> None:
    """The places of an earlier version, so that runs begun with it go on with the same audio."""
    (tmp_path / "answers").mkdir()
    for index in range(3):
        soundfile.write(tmp_path / "answers" / f"{index}.flac", np.zeros(8), 24000)
    answers = Answers(str(tmp_path), 24000)
    assert sorted(answers.training_names) == ["0.flac", "1.flac", "2.flac"]
    answers.training = [np.arange(num, dtype=np.int16) for num in (20000, 400, 5000)]
    wanted = [(1, 0), (2, 1996), (0, 12528), (0, 9394), (2, 859), (0, 1222), (1, 0), (0, 14512)]
    assert answers.places(8, 2048, 3, 7) == [Place(*place) for place in wanted]
    wav_BS = answers.crops(8, 2048, 100, 3, 7) * 32768
    assert wav_BS[:, 100].tolist() == [start for _, start in wanted]


@pytest.mark.parametrize("kind", BOTTLENECKS)
def test_what_is_distilled_is_what_a_model_would_read(corpus: str, kind: str) -> None:
    stage = tokenizer_stage(corpus, kind)
    found = stage.module.reconstruct(stage.batch(0, 0, 1), torch.Generator().manual_seed(0))
    wanted = {
        "fsq": found.bottleneck.latent_BLD,
        "vq": found.bottleneck.level_KBLD,
        "rvq": found.bottleneck.level_KBLD,
    }.get(kind, found.before_BLD)
    assert found.features is wanted


@pytest.mark.parametrize("kind", ["kl_vae", "fsq", "rvq"])
def test_the_teachers_are_learned_from(corpus: str, kind: str) -> None:
    """Also through the quantisers; `none`, `sigma_vae` and `vq` give the same kinds of features."""
    changes: dict[str, Any] = {"l1_weight": 0.0, "l2_weight": 0.0}
    stage = tokenizer_stage(corpus, kind, distillation=distillation_of(corpus, weight=2.0), **changes)
    assert {name: w for name, w in stage.weights.items() if w >= 1.0 and name != "penalty"} == {
        "distill_text": 1.0,
        "distill_speech": 1.0,
    }
    batch = stage.batch(0, 0, 1)
    assert {kind: targets.target_BLT.shape for kind, targets in batch.targets.items()} == {
        "text": (6, 6, 16),
        "speech": (6, 6, 12),
    }
    losses = stage.module(batch, torch.Generator().manual_seed(0))
    assert {name: float(loss.count) for name, loss in losses.items()} == stage.counts(batch)
    losses["distill_text"].sum.backward()
    tokenizer = stage.module.tokenizer
    assert float(tokenizer.encoder.patch.weight.grad.abs().sum()) > 0
    assert all(p.grad is None for p in tokenizer.decoder.parameters())
    found = train_some(stage, 40)
    for name in ("distill_text", "distill_speech"):
        assert sum(values[name] for values in found[-5:]) / 5 < found[0][name] - 0.05


def test_distillation_changes_nothing_else(corpus: str) -> None:
    """A run with it starts from the same weights, on the same audio, with the same noise."""
    plain = tokenizer_stage(corpus, "rvq", adversarial=ADVERSARIAL)
    distilled = tokenizer_stage(corpus, "rvq", adversarial=ADVERSARIAL, distillation=distillation_of(corpus))
    state = distilled.module.state_dict()
    assert all(torch.equal(state[name], value) for name, value in plain.module.state_dict().items())
    assert {name.split(".")[0] for name in state} - {name.split(".")[0] for name in plain.module.state_dict()} == {
        "distillation"
    }
    assert torch.equal(plain.batch(3, 0, 1).wav_BS, distilled.batch(3, 0, 1).wav_BS)
    batch = distilled.batch(0, 0, 1)
    first = {kind: Targets(each.target_BLT[:1], each.mask_BL[:1]) for kind, each in batch.targets.items()}
    few = TokenizerBatch(batch.wav_BS[:1], first)  # the discriminators are slow
    losses = [m.module(few, torch.Generator().manual_seed(1)) for m in (plain, distilled)]
    assert all(torch.equal(loss.sum, losses[1][name].sum) for name, loss in losses[0].items())


def test_targets_and_tokens_have_one_time(corpus: str, tmp_path: Path) -> None:
    """A click in an answer is found in the token whose target covers it, wherever the crop starts."""
    (tmp_path / "answers").mkdir()
    at_samples = {f"{index}.flac": 9000 + 3001 * index for index in range(5)}
    for name, at in at_samples.items():
        wav_S = np.zeros(30000)
        wav_S[at] = 0.5
        soundfile.write(tmp_path / "answers" / name, wav_S, 24000, subtype="PCM_16")
    stage = TokenizerStage(dataclasses.replace(options_of(corpus), corpus=str(tmp_path), batch_size=40), 0)
    module, token_samples = stage.module, stage.module.tokenizer.spec.samples_per_token
    half, hop = token_samples / 2, module.tokenizer.front.config.hop_length

    def outside(shift_samples: int) -> int:
        """Crops of which the loudest frame's centre lies outside the token with a target, by more than half a hop."""
        spans = {name: (at + shift_samples + np.array([[-half, half]])) / 24000 for name, at in at_samples.items()}
        store = {name: TimedVectors(torch.tensor(span), torch.ones(1, 3)) for name, span in spans.items()}
        stage.targets = CorpusTargets({"speech": store}, {"speech": 3}, token_samples / 24000, "masked")
        num_outside = num_seen = 0
        for index in range(3):
            batch = stage.batch(index, 0, 1)
            mel_BFC = module.reconstruct(batch, torch.Generator()).mel_BFC
            for mel_FC, mask_L in zip(mel_BFC, batch.targets["speech"].mask_BL, strict=True):
                loud_F = mel_FC.exp().sum(1)
                if not 2 < int(loud_F.argmax()) < len(loud_F) - 3 or not mask_L.any():
                    continue  # no click, or at an edge
                num_seen += 1
                centre = int(loud_F.argmax()) * hop - int(mask_L.nonzero()[0, 0]) * token_samples
                num_outside += not -hop / 2 <= centre <= token_samples + hop / 2
        assert num_seen > 40
        return num_outside

    assert outside(0) == 0
    for shift_samples in (-module.margin_frames * hop, module.margin_frames * hop):
        assert outside(shift_samples) > 0


@needs_flite
def test_words_are_distilled_where_they_are_spoken(corpus: str, tmp_path: Path) -> None:
    (tmp_path / "answers").mkdir()
    texts = {"0.flac": "seven banana", "1.flac": "green winter"}
    for name, text in texts.items():
        wav_S = np.repeat(spoken(tmp_path, text), 3)[::2]  # 16 to 24 kHz, well enough
        soundfile.write(tmp_path / "answers" / name, wav_S, 24000, subtype="PCM_16")
    write_manifest(tmp_path, texts)
    distillation = distillation_of(corpus, placement="aligned", speech_teacher="", cache=str(tmp_path / "targets"))
    stage = TokenizerStage(dataclasses.replace(options_of(corpus), corpus=str(tmp_path), distillation=distillation), 0)
    assert stage.targets is not None and not stage.targets.skipped["text"]
    found = train_some(stage, 3)
    assert all(0 < values["distill_text"] < 1 for values in found)
    mask_BL = stage.batch(0, 0, 1).targets["text"].mask_BL
    assert mask_BL.any() and not mask_BL.all()


def test_centred_targets_have_no_mean(corpus: str) -> None:
    """Over all answers and their time; what has no target stays zero."""
    changed = [tokenizer_stage(corpus, distillation=distillation_of(corpus, center=center)) for center in (False, True)]
    names = changed[0].answers.training_names
    plain, centred = (stage.targets.batch(names, [0.0] * len(names), 12) for stage in changed)
    for kind in ("text", "speech"):
        mask_BL = centred[kind].mask_BL
        assert torch.equal(mask_BL, plain[kind].mask_BL) and not mask_BL.all()
        means = [batch[kind].target_BLT[mask_BL].mean(0).abs().max() for batch in (plain, centred)]
        assert float(means[1]) < 0.2 * float(means[0])
        moved_NT = plain[kind].target_BLT[mask_BL] - centred[kind].target_BLT[mask_BL]
        torch.testing.assert_close(moved_NT, moved_NT[:1].expand_as(moved_NT), atol=1e-5, rtol=1e-4)
        assert not centred[kind].target_BLT[~mask_BL].any()


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
        distillation=distillation_of(corpus, center=True),
        num_eval_answers=2,
    )


def test_a_resumed_run_is_the_run_that_never_stopped(corpus: str, tmp_path: Path) -> None:
    def run(name: str) -> RunOptions:
        return run_options(tmp_path / name, save_every=2, accumulation=2)

    check_resume(run, hard_options(corpus), TokenizerStage, cut_at=6)
    final = MelTokenizer.from_pretrained(tmp_path / "cut" / "final")
    assert not any("adversary" in name or "distillation" in name for name in final.state_dict())


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
        assert a == pytest.approx(b, rel=5e-3)  # the adversary's gradient norm feels the order of sums


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
