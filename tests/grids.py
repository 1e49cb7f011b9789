"""A tiny stage for grids of ablations, and files for them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
import yaml

from flowomni.tokenizers import MelTokenizer, MelTokenizerConfig
from tests.tiny import ENCODER, INSTRUCTIONS, save_tiny_parts

SIZES = {"latent_dim": 6, "width": 16, "intermediate_dim": 16, "frame_width": 8}
LAYERS = {"num_encoder_layers": 1, "num_decoder_layers": 1, "num_frame_layers": 1}
DELAY = {"kind": "delay", "width": 16, "num_blocks": 1, "code_dim": 8}
VOCODER = {"dim": 16, "intermediate_dim": 16, "num_layers": 2}


def write(path: Path, content: Any) -> Path:
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content, sort_keys=False))
    return path


def tiny_stage(folder: Path) -> dict[str, Any]:
    """A stage `speech` of a tiny model and a corpus of three conversations; `codes` has a tokenizer of three codes."""
    parts = save_tiny_parts(folder)
    codes = {"bottleneck": "rvq", "num_codebooks": 3, "codebook_size": 16}
    torch.manual_seed(0)
    MelTokenizer(MelTokenizerConfig(autoencoder=SIZES | LAYERS | codes, vocoder=VOCODER)).save_pretrained(
        folder / "codes"
    )
    soundfile.write(folder / "a.wav", 0.1 * np.sin(np.arange(4_800) / 10), 24_000)
    lines = []
    for split in ("train", "valid", "test"):
        says = {"role": "assistant", "text": "one", "audio": "a.wav", "duration_sec": 0.2}
        lines.append(json.dumps({"id": split, "split": split, "turns": [{"role": "user", "text": "one"}, says]}))
    (folder / "manifest.jsonl").write_text("\n".join(lines))
    return {
        "stage": "speech",
        "output_dir": "unused",
        "max_steps": 4,
        "options": {
            "manifest": str(folder),
            "parts": {
                **parts,
                "encoder": ENCODER,
                "head": {"kind": "flow", "width": 64, "num_blocks": 1},
                "output_blocks": {"num_layers": 1, "num_heads": 2},
                "layout": {"instructions": INSTRUCTIONS, "max_answer_tokens": 12},
            },
            "tasks": {"text_to_speech": 1.0},
            "batch_size": 1,
            "num_eval": 1,
        },
    }
