"""Any language model: for every family, what FlowOmni adds changes nothing of the text that the plain model gives.

Shapes: B batch, L positions, H hidden width, V vocabulary.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from flowomni.build import assemble, load_model, save_model
from flowomni.layouts import Turn
from flowomni.modeling import FlowOmniModel
from flowomni.streams import Streams
from tests.tiny import INSTRUCTIONS, WORDS, tiny_speech_tokenizer
from training.text_tokenizer import build_text_tokenizer

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "llama": ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}),
    "mistral": ("mistral", {"head_dim": 16, "sliding_window": 4}),
    "gemma": ("gemma", {"head_dim": 16}),
    "gemma2": ("gemma2", {"head_dim": 16, "sliding_window": 4, "query_pre_attn_scalar": 16}),
    "gemma3": (
        "gemma3_text",
        {"head_dim": 16, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "smollm2": ("llama", {"num_attention_heads": 2, "num_key_value_heads": 1}),
    "smollm3": ("smollm3", {"no_rope_layers": [1, 0]}),
}
# Gemma and Mistral refuse what is not user, assistant, user, ...
STRICT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "<|{{ m['role'] }}|>{{ m['content'] | trim }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def save_parts(folder: Path, family: str, tied: bool, template: str | None, dtype: str = "float32") -> dict[str, str]:
    """A random checkpoint of the family's true class with its text tokenizer, and a speech tokenizer."""
    text_tokenizer = build_text_tokenizer(WORDS)
    text_tokenizer.chat_template = template
    text_tokenizer.bos_token = "<|system|>"
    kind, settings = FAMILIES[family]
    ids = {"bos_token_id": None, "eos_token_id": text_tokenizer.eos_token_id, "pad_token_id": 0}
    config = AutoConfig.for_model(
        kind, vocab_size=len(text_tokenizer), tie_word_embeddings=tied, **ids, **(SIZES | settings)
    )
    torch.manual_seed(0)
    plain = AutoModelForCausalLM.from_config(config)
    for parameter in plain.parameters():
        torch.nn.init.normal_(parameter, std=0.3)  # norms too: weights of one would hide a lost or a doubled one
    plain.to(getattr(torch, dtype)).save_pretrained(folder / "llm")
    text_tokenizer.save_pretrained(folder / "llm")
    tiny_speech_tokenizer().save_pretrained(folder / "voice")
    return {"llm": str(folder / "llm"), "speech_tokenizer": str(folder / "voice")}


def logits_inside(model: FlowOmniModel, streams: Streams) -> Tensor:
    """Text logits of all positions in the forward pass of training."""
    seen: list[Tensor] = []
    hook = model.llm.base_model.register_forward_hook(lambda _, __, output: seen.append(output.last_hidden_state))
    model(streams)
    hook.remove()
    return model.text_logits(seen[0])


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("family", FAMILIES)
def test_without_speech_it_is_the_plain_language_model(family: str, tied: bool, tmp_path: Path) -> None:
    """Logits bit for bit those of `AutoModelForCausalLM`, in float32 and bfloat16, before and after saving."""
    parts = save_parts(tmp_path, family, tied, STRICT_TEMPLATE if tied else None)
    plain = AutoModelForCausalLM.from_pretrained(parts["llm"])
    model, processor = assemble(
        **parts,
        head={"kind": "flow", "width": 16, "num_blocks": 1},
        output_blocks={"num_layers": 1, "num_heads": 2},
        layout={"instructions": INSTRUCTIONS | {"answer": "speak"}},
    )
    save_model(model, processor, tmp_path / "model")
    loaded, again = load_model(tmp_path / "model")
    turns = [Turn("user", "what is one"), Turn("assistant", "the answer"), Turn("user", "say hello")]
    streams = processor.layout.example([*turns, Turn("assistant", "hello apple")])
    assert torch.equal(again.layout.example([*turns, Turn("assistant", "hello apple")]).text_BL, streams.text_BL)
    length = streams.text_BL.shape[1]
    with torch.no_grad():
        for dtype in (torch.float32, torch.bfloat16):
            wanted_BLV = plain.to(dtype)(input_ids=streams.text_BL).logits
            assert wanted_BLV[0].argmax(-1).unique().numel() > 3  # a model that has something to say
            for ours in (model.eval().to(dtype), loaded.to(dtype)):
                assert torch.equal(logits_inside(ours, streams), wanted_BLV)
                one_BL = torch.ones(1, length, dtype=torch.bool)
                text_BH, _, _ = ours.advance(ours.embed(streams), one_BL, ours.init_state(1))
                torch.testing.assert_close(ours.text_logits(text_BH), wanted_BLV[:, -1])
                inner = ours.llm
                assert (inner.get_input_embeddings().weight is inner.get_output_embeddings().weight) == tied


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_bfloat16_checkpoint_is_read_in_float32(family: str, tmp_path: Path) -> None:
    """As `from_pretrained(dtype=float32)` reads it; nothing of the model is left in half precision."""
    parts = save_parts(tmp_path, family, True, None, "bfloat16")
    plain = AutoModelForCausalLM.from_pretrained(parts["llm"], dtype="float32")
    model, processor = assemble(**parts, head={"kind": "flow", "width": 16, "num_blocks": 1})
    assert {p.dtype for p in [*model.parameters(), *model.buffers()] if p.is_floating_point()} == {torch.float32}
    streams = processor.layout.example([Turn("user", "what is one"), Turn("assistant", "the answer")])
    with torch.no_grad():
        assert torch.equal(logits_inside(model.eval(), streams), plain(input_ids=streams.text_BL).logits)


def test_an_instruction_reaches_templates_that_know_no_system(tmp_path: Path) -> None:
    """It goes before the first user turn, typed or heard; a template that takes a system turn gets one."""
    asks = [Turn("user", "one"), Turn("assistant", "two"), Turn("user", "three")]
    texts = {}
    for name, template in (("strict", STRICT_TEMPLATE), ("plain", None)):
        parts = save_parts(tmp_path / name, "llama", True, template)
        _, processor = assemble(**parts, head={"kind": "flow", "width": 16, "num_blocks": 1})
        ids = processor.layout.prompt(asks, "transcribe").text_BL[0]
        texts[name] = processor.text_tokenizer.decode(ids)
    assert texts["strict"].count("write down") == texts["plain"].count("write down") == 1
    assert texts["strict"].startswith("<|system|> <|user|> write down")
    assert texts["plain"].startswith("system") and texts["plain"].index("write down") < texts["plain"].index("user")
