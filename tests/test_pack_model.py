"""Packing: half the size, and the mean of two models where that is asked for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from flowomni.build import load_model, save_model
from scripts.pack_model import pack
from tests.tiny import tiny_model


def test_the_mean_of_two_models_is_taken_once_of_each_tensor(tmp_path: Path) -> None:
    """Tied embeddings have two names, and were averaged twice."""
    for seed in (0, 1):
        model, processor = tiny_model(seed=seed)
        with torch.no_grad():
            model.llm.get_input_embeddings().weight.fill_(float(seed))
        save_model(model, processor, tmp_path / str(seed))
    pack(tmp_path / "0", tmp_path / "mean", {"temperature": 0.5}, average_with=tmp_path / "1")
    first, second, mean = (load_model(tmp_path / name)[0] for name in ("0", "1", "mean"))
    assert bool((mean.get_input_embeddings().weight == 0.5).all())
    wanted = {k: (v + second.state_dict()[k]) / 2 for k, v in first.state_dict().items() if v.is_floating_point()}
    for name, tensor in wanted.items():
        torch.testing.assert_close(mean.state_dict()[name], tensor, atol=2e-3, rtol=2e-3)
    assert mean.config.head["sampling"]["temperature"] == 0.5


def test_models_of_other_sizes_are_refused(tmp_path: Path) -> None:
    for name, width in (("a", 32), ("b", 48)):
        model, processor = tiny_model(head={"kind": "flow", "width": width, "num_blocks": 1})
        save_model(model, processor, tmp_path / name)
    with pytest.raises(ValueError, match=r"--average-with .*b has no tensor head\."):
        pack(tmp_path / "a", tmp_path / "mean", None, average_with=tmp_path / "b")
