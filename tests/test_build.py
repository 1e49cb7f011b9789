"""Models on disk and on paper: what is saved comes back, and a configuration that cannot work is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedConfig

from flowomni.build import assemble, load_model, save_model
from flowomni.configuration import FlowOmniConfig
from flowomni.layouts import Turn
from flowomni.modeling import FlowOmniModel
from flowomni.processing import FlowOmniProcessor
from flowomni.tokenizers import MelTokenizerConfig, TokenSpec
from tests.tiny import ENCODER, WORDS, save_tiny_parts, tiny_model
from training.text_tokenizer import build_text_tokenizer

Tiny = tuple[FlowOmniModel, FlowOmniProcessor]
SMALL: dict[str, Any] = {
    "encoder": ENCODER,
    "head": {"kind": "flow", "width": 32, "num_blocks": 1},
    "output_blocks": {"num_layers": 1, "num_heads": 2},
}


@pytest.fixture(scope="module")
def tiny() -> Tiny:
    return tiny_model()


# ---------------------------------------------------------------------------------------------------- save and load


def test_a_saved_model_is_the_same_model(tiny: Tiny, tmp_path: Path) -> None:
    """Also through AutoConfig and AutoModel; the text tokenizer and the layout come back with it."""
    model, processor = tiny
    save_model(model, processor, tmp_path)
    loaded, again = load_model(tmp_path)
    automatic = AutoModel.from_pretrained(tmp_path, dtype="float32")
    assert isinstance(AutoConfig.from_pretrained(tmp_path), FlowOmniConfig) and isinstance(automatic, FlowOmniModel)
    for other in (loaded, automatic):
        assert not other.training
        for section in ("head", "output_blocks", "layout", "loss", "encoder_stack", "text_eos_id"):
            assert getattr(other.config, section) == getattr(model.config, section)
        state = other.state_dict()
        for name, value in model.state_dict().items():
            assert torch.equal(state[name], value), name
    assert again.layout.config == processor.layout.config and again.text_eos_id == processor.text_eos_id
    turns = [Turn("user", "what is one"), Turn("assistant", "the answer")]
    assert torch.equal(again.layout.example(turns).text_BL, processor.layout.example(turns).text_BL)


def test_parts_may_come_from_a_whole_model(tiny: Tiny, tmp_path: Path) -> None:
    """Language model, ears and what reads them are the model's own, to the bit; the voice is new."""
    model, processor = tiny
    save_model(model, processor, tmp_path)
    whole: dict[str, Any] = dict.fromkeys(("llm", "encoder", "projector", "speech_tokenizer"), str(tmp_path))
    changes = {"head": {"kind": "regression"}, "loss": {"text_ctc_weight": 0.5}}
    made, again = assemble(**(SMALL | whole | changes))
    assert made.config.head["kind"] == "regression" and again.text_eos_id == processor.text_eos_id
    state, given = made.state_dict(), model.state_dict()
    taken = ("llm.", "encoder.", "projector.", "speech_tokenizer.", "text_ctc.")
    assert not any(name.startswith("ctc.") for name in state), "what the new model does not read is not taken"
    for name in state:
        if name.startswith(taken):
            assert torch.equal(state[name], given[name]), name
    assert not torch.equal(state["state_head.classify.weight"], given["state_head.classify.weight"])


def test_a_whole_model_without_ears_gives_none(tmp_path: Path) -> None:
    save_model(*tiny_model(encoder=None), tmp_path)
    parts = save_tiny_parts(tmp_path / "parts")
    small = {key: value for key, value in SMALL.items() if key != "encoder"}
    with pytest.raises(ValueError, match="encoder: the model in .* has no speech encoder"):
        assemble(**parts, **small, encoder=str(tmp_path))
    with pytest.raises(ValueError, match="projector: '.*' has no ears"):
        assemble(**parts, **SMALL, projector=str(tmp_path))
    with pytest.raises(ValueError, match="projector: this model has no ears"):
        assemble(**parts, **small, projector=str(tmp_path))


def test_a_text_tokenizer_stays_what_it_was(tiny: Tiny, tmp_path: Path) -> None:
    """One of our own beside a Qwen2 model once came back with Qwen2's pre-tokenizer: every word spelled, no spaces."""
    made = build_text_tokenizer(WORDS)
    _, processor = tiny
    save_model(*tiny, tmp_path)
    _, again = load_model(tmp_path)
    for sentence in ("what is one plus two", "Hello, strange apple"):
        ids = made.encode(sentence, add_special_tokens=False)
        for other in (processor, again):
            assert other.text_tokenizer.encode(sentence, add_special_tokens=False) == ids
            assert other.decode_text(ids) == made.decode(ids)


@pytest.mark.parametrize("tied", [True, False])
def test_half_precision_halves_the_file(tmp_path: Path, tied: bool) -> None:
    """Every matrix is kept once, as float16; the loaded model is float32 and close."""
    model, processor = assemble(**save_tiny_parts(tmp_path / "parts", tied), **SMALL)
    save_model(model, processor, tmp_path / "full")
    save_model(model, processor, tmp_path / "half", half=True)
    with (
        safe_open(tmp_path / "full" / "model.safetensors", "pt") as full,
        safe_open(tmp_path / "half" / "model.safetensors", "pt") as half,
    ):
        names = set(half.keys())
        assert names == set(full.keys()) and ("llm.lm_head.weight" in names) is not tied
        matrices = [name for name, p in model.named_parameters() if p.ndim > 1]
        assert all(half.get_tensor(name).dtype == torch.float16 for name in matrices)
    loaded, _ = load_model(tmp_path / "half")
    for name, value in model.state_dict().items():
        assert loaded.state_dict()[name].dtype == value.dtype
        torch.testing.assert_close(loaded.state_dict()[name], value, rtol=1e-3, atol=1e-6)


def test_a_pretrained_model_of_another_precision_becomes_float32(tmp_path: Path) -> None:
    parts = save_tiny_parts(tmp_path)
    AutoModelForCausalLM.from_pretrained(parts["llm"]).bfloat16().save_pretrained(parts["llm"])
    model, _ = assemble(**parts, **SMALL)
    assert {p.dtype for p in model.parameters()} == {torch.float32}


# -------------------------------------------------------------------------------------------------------- bad input


def test_an_incomplete_checkpoint_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    model, processor = tiny
    with pytest.raises(ValueError, match="is not a model folder"):
        load_model(tmp_path / "nothing")
    with pytest.raises(ValueError, match="holds a 'qwen2' model, not 'flowomni'"):
        load_model(save_tiny_parts(tmp_path / "parts")["llm"])
    state = model.state_dict()
    state.pop("head.net.project_in.weight")
    model.save_pretrained(tmp_path / "lacking", state_dict=state)
    with pytest.raises(ValueError, match=r"lacks tensors: head\.net\.project_in\.weight"):
        load_model(tmp_path / "lacking")
    save_model(model, processor, tmp_path / "mute")
    for file in (tmp_path / "mute").glob("tokenizer*"):
        file.unlink()
    with pytest.raises(ValueError, match="no text tokenizer there"):
        load_model(tmp_path / "mute")


def test_parts_that_do_not_exist(tmp_path: Path) -> None:
    parts = save_tiny_parts(tmp_path)
    for part in ("llm", "speech_tokenizer"):
        with pytest.raises(ValueError, match=f"^{part}: cannot load"):
            assemble(**parts | {part: str(tmp_path / "nothing")})


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"head": {"kind": "flow", "widht": 3}}, r"head\.widht: unknown key; did you mean 'width'"),
        ({"head": {"kind": "flaw"}}, r"head\.kind is 'flaw'.*flow"),
        ({"output_blocks": {"num_layer": 2}}, r"output_blocks\.num_layer: .*did you mean 'num_layers'"),
        ({"output_blocks": {"num_heads": 5}}, r"output_blocks\.num_heads is 5 but llm\.hidden_size is 32"),
        ({"layout": {"speech_delay": 2}}, r"layout\.speech_delay: .*did you mean 'speech_delay_tokens'"),
        ({"layout": {"kind": "duplex"}}, r"layout: kind is 'duplex'"),
        ({"loss": {"text_wieght": 2.0}}, r"loss\.text_wieght: .*did you mean 'text_weight'"),
        ({"encoder_stack": 0}, "encoder_stack is 0"),
        ({"encoder_stak": 4}, "encoder_stak: unknown key; did you mean 'encoder_stack'"),
        ({"llm": {"hidden_size": 8}}, "llm: expected a config with a model_type"),
    ],
)
def test_bad_configuration(tiny: Tiny, sections: dict[str, Any], message: str) -> None:
    values = {"llm": tiny[0].config.llm, "speech_tokenizer": tiny[0].config.speech_tokenizer} | sections
    with pytest.raises(ValueError, match=message):
        FlowOmniConfig(**values)


class CodesConfig(PreTrainedConfig):
    """A speech tokenizer of codes, as far as a config is concerned."""

    model_type = "codes_for_a_test"
    token_spec = TokenSpec("discrete", 0, 4, 64, 24_000, 2_048, 0)


def test_a_head_and_a_tokenizer_that_do_not_fit(tiny: Tiny) -> None:
    """Refused when the configuration is read; the message names both lines."""
    with pytest.raises(ValueError, match=r"head\.kind is 'flow', .*spec\.kind is 'discrete'"):
        FlowOmniConfig(llm=tiny[0].config.llm, speech_tokenizer=CodesConfig())
    FlowOmniConfig(llm=tiny[0].config.llm, speech_tokenizer=MelTokenizerConfig())


def test_a_text_tokenizer_without_an_end(tiny: Tiny) -> None:
    model, _ = tiny
    endless = build_text_tokenizer(["one"])
    endless.eos_token = None
    values = {k: v for k, v in model.config.to_dict().items() if k not in ("model_type", "text_eos_id")}
    with pytest.raises(ValueError, match="text_eos_id is not set and the text tokenizer has no eos token"):
        FlowOmniProcessor(FlowOmniConfig(**values), endless, model.speech_tokenizer.spec)
    ended = FlowOmniProcessor(FlowOmniConfig(**values, text_eos_id=7), endless, model.speech_tokenizer.spec)
    assert ended.text_eos_id == 7
