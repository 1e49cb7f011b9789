"""A tiny FlowOmni model of the true classes with random weights, for tests."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from flowomni.build import assemble
from flowomni.modeling import FlowOmniModel
from flowomni.processing import FlowOmniProcessor
from flowomni.streams import SpeechState
from flowomni.tokenizers import MelTokenizer, MelTokenizerConfig
from training.text_tokenizer import build_text_tokenizer

WORDS = [
    "what",
    "is",
    "one",
    "two",
    "three",
    "plus",
    "minus",
    "say",
    "hello",
    "apple",
    "banana",
    "the",
    "answer",
    "four",
    "five",
    "transcribe",
    "speak",
    "sorry",
]
ENCODER = {
    "d_model": 32,
    "encoder_layers": 2,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 64,
    "num_mel_bins": 80,
    "max_source_positions": 250,
}
LLM = {
    "model_type": "qwen2",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}
INSTRUCTIONS = {"answer": "", "transcribe": "transcribe", "speak": "speak"}


def tiny_speech_tokenizer() -> MelTokenizer:
    config = MelTokenizerConfig(
        autoencoder={
            "latent_dim": 6,
            "width": 16,
            "intermediate_dim": 16,
            "num_encoder_layers": 1,
            "num_decoder_layers": 1,
            "frame_width": 8,
            "num_frame_layers": 1,
        },
        vocoder={"dim": 16, "intermediate_dim": 16, "num_layers": 2},
    )
    return MelTokenizer(config)


def save_tiny_parts(folder: Path, tied: bool = True) -> dict[str, str]:
    """Folders of a tiny Qwen2 with its text tokenizer and of a tiny speech tokenizer."""
    torch.manual_seed(0)
    text_tokenizer = build_text_tokenizer(WORDS)
    config = Qwen2Config(
        vocab_size=len(text_tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
        eos_token_id=text_tokenizer.eos_token_id,
        bos_token_id=None,
        pad_token_id=text_tokenizer.pad_token_id,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder / "llm")
    text_tokenizer.save_pretrained(folder / "llm")
    tiny_speech_tokenizer().save_pretrained(folder / "tokenizer")
    return {"llm": str(folder / "llm"), "speech_tokenizer": str(folder / "tokenizer")}


@cache
def _parts() -> dict[str, str]:
    return save_tiny_parts(Path(mkdtemp(prefix="flowomni-tiny-")))


def tiny_model(seed: int = 0, **sections: Any) -> tuple[FlowOmniModel, FlowOmniProcessor]:
    """A tiny model in evaluation mode. The flow head is not zero, so that nothing is trivially equal."""
    parts = _parts()  # first: building them seeds on its own
    torch.manual_seed(seed)
    values: dict[str, Any] = {
        "encoder": ENCODER,
        "encoder_stack": 4,
        "head": {"kind": "flow", "width": 32, "num_blocks": 1},
        "output_blocks": {"num_layers": 1, "num_heads": 2},
        "layout": {"instructions": INSTRUCTIONS, "max_answer_tokens": 12},
        "loss": {"ctc_weight": 0.5, "text_ctc_weight": 0.5},
    }
    model, processor = assemble(**(parts | values | sections))
    for parameter in model.head.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model.eval(), processor


def lively_model() -> tuple[FlowOmniModel, FlowOmniProcessor]:
    """A model whose random weights say several words and stop now and then, in speech and in text."""
    model, processor = tiny_model(
        seed=7,
        head={"kind": "flow", "width": 32, "num_blocks": 1, "objective": "lsd"},  # draws in one step: quick
        layout={"instructions": INSTRUCTIONS, "max_answer_tokens": 16},
    )
    generator = torch.Generator().manual_seed(0)
    assert model.output_blocks is not None
    with torch.no_grad():
        for block in (*model.llm.model.layers, *model.output_blocks.blocks.layers):
            for parameter in block.parameters():
                if parameter.ndim > 1:
                    parameter *= 4  # far from the identity, or every answer would repeat its prompt
        model.llm.lm_head = torch.nn.Linear(32, len(processor.text_tokenizer))
        model.llm.lm_head.weight.normal_(std=0.4, generator=generator)
        model.llm.lm_head.bias[:] = 0.0
        model.llm.lm_head.bias[:50] = -1e4  # no special tokens, few letters
        model.llm.lm_head.bias[processor.text_eos_id] = 4.5  # about one token in six
        model.state_head.classify.weight *= 3  # decided, yet far from the thresholds NEVER and ALWAYS
        model.state_head.classify.bias[SpeechState.STOP] -= 1.5
    return model, processor
