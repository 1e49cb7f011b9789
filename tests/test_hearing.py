"""Stage `hearing`: what its loss counts, what is read and saved, and how its batches are drawn."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from flowomni.encoder import CtcAuxiliary, SpeechEncoder, TextCtcAuxiliary
from tests.tiny import ENCODER
from training.batching import length_batches, spec_augment
from training.stages.hearing import HearingBatch, HearingOptions, HearingStage


def transcripts(*texts: str) -> torch.Tensor:
    """Bytes [B, U], -1 past a row's end."""
    rows = [torch.tensor(list(text.encode()), dtype=torch.int64) for text in texts]
    return pad_sequence(rows, batch_first=True, padding_value=-1)


@pytest.fixture
def stage(tmp_path: Path) -> HearingStage:
    """A stage over a manifest in which nothing is said aloud, so that it reads no recording."""
    turns = [{"role": "user", "text": "hello"}, {"role": "assistant", "text": "hello"}]
    lines = [json.dumps({"id": split, "split": split, "turns": turns}) for split in ("train", "valid")]
    (tmp_path / "manifest.jsonl").write_text("\n".join(lines))
    torch.manual_seed(0)
    return HearingStage(HearingOptions(manifest=str(tmp_path), encoder=ENCODER, attention="eager"), seed=0)


# --------------------------------------------------------------------------------------------------------------- loss


def test_loss_is_the_ctc_of_each_clip_by_its_bytes() -> None:
    torch.manual_seed(0)
    ctc, texts, lengths = CtcAuxiliary(8), ["hello", "", "né"], [20, 7, 9]
    hidden_BTE = torch.randn(3, 20, 8)
    loss = ctc(hidden_BTE, torch.tensor(lengths), transcripts(*texts))
    wanted = torch.zeros(())
    for row, length, text in zip(hidden_BTE, lengths, texts, strict=True):
        if text:
            classes = torch.tensor(list(text.encode())) + 1
            log_probs_TK = ctc.classify(row[:length]).log_softmax(-1)
            alone = F.ctc_loss(log_probs_TK, classes, torch.tensor(length), torch.tensor(len(classes)), reduction="sum")
            wanted = wanted + alone / len(classes)
    torch.testing.assert_close(loss.sum, wanted)
    assert int(loss.count) == 2


@pytest.mark.parametrize("bytes_BU", [transcripts("", ""), torch.full((2, 3), -1)], ids=["no column", "padding"])
def test_nothing_said_is_no_loss(bytes_BU: torch.Tensor) -> None:
    ctc = CtcAuxiliary(8)
    loss = ctc(torch.randn(2, 5, 8), torch.tensor([5, 4]), bytes_BU)
    loss.sum.backward()  # every process takes part in the exchange of gradients
    assert (loss.sum.item(), loss.count.item()) == (0.0, 0)
    assert all(p.grad is not None and not p.grad.any() for p in ctc.parameters())


def test_counts_are_those_of_the_loss(stage: HearingStage) -> None:
    lengths_B = torch.tensor([60, 20, 40])
    batch = HearingBatch(torch.randn(3, 80, 60), lengths_B, transcripts("hello", "", "two"))
    assert stage.counts(batch) == {k: float(loss.count) for k, loss in stage.module(batch).items()} == {"ctc": 2.0}
    assert stage.num_tokens(batch) == 120


@pytest.mark.parametrize(
    ("path", "text"),
    [("hh-ee-l-ll--", "hell"), ("l--l", "ll"), ("---", ""), ("h-é-", "hé")],
)
def test_reading_joins_repeats_and_drops_blanks(path: str, text: str) -> None:
    ctc = CtcAuxiliary(CtcAuxiliary.num_classes)
    with torch.no_grad():
        ctc.classify.weight.copy_(torch.eye(ctc.num_classes))
        ctc.classify.bias.zero_()
    classes = [0 if byte == ord("-") else byte + 1 for byte in path.encode()]
    assert ctc.read(F.one_hot(torch.tensor(classes), ctc.num_classes).float()) == text


def test_text_tokens_are_scored_by_their_embeddings() -> None:
    torch.manual_seed(0)
    ctc, table_VH = TextCtcAuxiliary(8), torch.randn(5, 8, requires_grad=True)
    heard_BPH, lengths, text_BU = torch.randn(3, 9, 8), [9, 4, 6], torch.tensor([[2, 2, 4], [-1, -1, -1], [0, 3, -1]])
    loss = ctc(heard_BPH, torch.tensor(lengths), table_VH, text_BU)
    wanted = torch.zeros(())
    for row, length, ids in zip(heard_BPH, lengths, text_BU, strict=True):
        ids = ids[ids >= 0]
        if len(ids):
            unit_VH = table_VH / table_VH.norm(dim=1, keepdim=True)
            log_probs_PV = torch.cat([ctc.blank(row), row @ unit_VH.T], dim=1)[:length].log_softmax(-1)
            ends = torch.tensor(length), torch.tensor(len(ids))
            wanted = wanted + F.ctc_loss(log_probs_PV, ids + 1, *ends, reduction="sum") / len(ids)
    torch.testing.assert_close(loss.sum, wanted)
    assert int(loss.count) == 2
    loss.sum.backward()
    assert table_VH.grad is None  # the ears come to the words, not the words to the ears


def test_training_brings_what_is_heard_to_the_words() -> None:
    torch.manual_seed(0)
    ctc, table_VH, text_BU = TextCtcAuxiliary(8), torch.randn(6, 8), torch.tensor([[1, 5, 5, 2]])
    heard_BPH = torch.randn(1, 12, 8).requires_grad_()
    optimizer = torch.optim.Adam([heard_BPH, *ctc.parameters()], lr=0.1)
    for _ in range(60):
        optimizer.zero_grad()
        ctc(heard_BPH, torch.tensor([12]), table_VH, text_BU).sum.backward()
        optimizer.step()
    path_P = torch.unique_consecutive(ctc.scores(heard_BPH[0], table_VH).argmax(-1))
    assert [int(c) - 1 for c in path_P if c > 0] == [1, 5, 5, 2]


# --------------------------------------------------------------------------------------------------------------- save


def test_the_saved_folder_is_the_encoder(stage: HearingStage, tmp_path: Path) -> None:
    stage.save(tmp_path / "final")
    loaded, trained = SpeechEncoder.from_pretrained(tmp_path / "final").eval(), stage.module.encoder.eval()
    assert loaded.max_frames == trained.max_frames == 2 * ENCODER["max_source_positions"]
    features_BCF, lengths_B = torch.randn(2, 80, 61), torch.tensor([61, 30])
    with torch.no_grad():
        found, wanted = loaded(features_BCF, lengths_B), trained(features_BCF, lengths_B)
    torch.testing.assert_close(found[0], wanted[0])
    assert torch.equal(found[1], wanted[1])


# ------------------------------------------------------------------------------------------------------------ batches


@pytest.mark.parametrize(("number", "batch_size"), [(1000, 7), (112, 7), (5, 8), (1, 1)])
def test_an_epoch_has_each_example_at_most_once(number: int, batch_size: int) -> None:
    lengths = np.random.default_rng(0).random(number).tolist()
    batches = length_batches(lengths, batch_size, np.random.default_rng(1))
    indices = [i for batch in batches for i in batch]
    size = min(batch_size, number)
    assert len(set(indices)) == len(indices) and set(indices) <= set(range(number))
    assert len(batches) == number // size and {len(batch) for batch in batches} == {size}
    assert batches == length_batches(lengths, batch_size, np.random.default_rng(1))
    if number == 1000:
        assert batches != length_batches(lengths, batch_size, np.random.default_rng(2))


def test_batches_are_alike_in_length() -> None:
    lengths = np.random.default_rng(0).random(1024)
    batches = length_batches(lengths.tolist(), 8, np.random.default_rng(1))
    assert np.mean([np.ptp(lengths[batch]) for batch in batches]) < 0.15  # about 0.78 for batches drawn at random


def test_spec_augment_never_changes_its_input() -> None:
    rng = np.random.default_rng(0)
    features_CF = rng.standard_normal((80, 64)).astype(np.float32)
    before_CF = features_CF.copy()
    masked = 0
    for _ in range(50):
        found_CF = spec_augment(features_CF, rng, max_frames=20, max_bins=12)
        assert np.array_equal(features_CF, before_CF) and not np.shares_memory(found_CF, features_CF)
        assert found_CF.shape == features_CF.shape and found_CF.dtype == features_CF.dtype
        changed_CF = found_CF != before_CF
        assert np.allclose(found_CF[changed_CF], before_CF.mean())
        assert changed_CF.all(axis=1).sum() <= 12 and changed_CF.all(axis=0).sum() <= 8  # an eighth of the clip
        masked += changed_CF.any()
    assert masked > 40
    assert np.array_equal(spec_augment(features_CF, rng, 0, 0), before_CF)
