"""Letters for the voice: what each text token is spelled like, given to the output blocks."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from flowomni.api import FlowOmni
from flowomni.build import load_model, save_model, spell
from flowomni.fast import accelerate
from flowomni.layouts import Turn
from flowomni.modeling import FlowOmniModel, Letters
from flowomni.processing import FlowOmniProcessor
from flowomni.streams import Streams
from training.lora import LoraOptions
from training.parts import with_sections
from training.stages.speech import SpeechOptions

from .tiny import tiny_model

BLOCKS = {"num_layers": 1, "num_heads": 2, "num_letters": 6}


def spelled_model(trained: bool = True) -> tuple[FlowOmniModel, FlowOmniProcessor]:
    """A tiny model whose voice reads letters; as after training, or as it is made."""
    model, processor = tiny_model(output_blocks=BLOCKS)
    assert model.output_blocks is not None and model.output_blocks.letters is not None
    if trained:
        torch.nn.init.normal_(model.output_blocks.letters.out.weight, std=0.3)
    return model, processor


def example(processor: FlowOmniProcessor, text: str) -> Streams:
    speech_LD = torch.randn(7, 6, generator=torch.Generator().manual_seed(0))
    return processor.layout.example([Turn("user", "say it"), Turn("assistant", text, speech_LX=speech_LD)])


def conditions(model: FlowOmniModel, streams: Streams) -> torch.Tensor:
    with torch.no_grad():
        return model.conditions(streams)


def test_a_word_is_spelled_as_it_stands_in_a_text() -> None:
    model, processor = spelled_model()
    assert model.output_blocks is not None and model.output_blocks.letters is not None
    bytes_VK = model.output_blocks.letters.bytes_VK
    ids = processor.text_tokenizer.encode("banana is hello zoo", add_special_tokens=False)
    spelled = [bytes(bytes_VK[i].tolist()).rstrip(b"\0") for i in ids]
    assert spelled == [b" banan", b" is", b" hello", b" z", b"o", b"o"]  # six bytes at most; zoo is no known word
    assert not bytes_VK[processor.text_tokenizer.all_special_ids].any()


def test_bytes_of_a_byte_level_tokenizer() -> None:
    """As Qwen's and Llama's: a token begins with its space, and may be a part of a character."""
    pieces = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "Ġc", "at"]
    tokenizer = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, [("Ġ", "c"), ("a", "t")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    letters = Letters(len(pieces) + 3, 4, 16)  # a table may be longer than the vocabulary
    letters.spell(PreTrainedTokenizerFast(tokenizer_object=tokenizer))
    ids = [pieces.index("Ġc"), pieces.index("at")]
    assert [bytes(letters.bytes_VK[i].tolist()).rstrip(b"\0") for i in ids] == [b" c", b"at"]
    assert not letters.bytes_VK[-3:].any()


def test_letters_say_nothing_before_they_are_trained() -> None:
    model, processor = spelled_model(trained=False)
    streams = example(processor, "one apple")
    before = conditions(model, streams)
    assert model.output_blocks is not None
    model.output_blocks.letters = None
    assert torch.equal(conditions(model, streams), before)


def test_the_voice_reads_letters_and_the_text_does_not() -> None:
    model, processor = spelled_model()
    assert model.output_blocks is not None and model.output_blocks.letters is not None
    streams = example(processor, "one apple")
    before = conditions(model, streams), model(streams)["text"].sum
    word = int(processor.text_tokenizer.encode("apple", add_special_tokens=False)[0])
    model.output_blocks.letters.bytes_VK[word, 1:4] = torch.tensor(list(b"own"), dtype=torch.uint8)
    after = conditions(model, streams), model(streams)["text"].sum
    assert not torch.allclose(before[0], after[0], atol=1e-3)
    assert torch.equal(before[1], after[1])


@torch.no_grad()
def test_step_by_step_is_all_at_once_compiled_or_not() -> None:
    model, processor = spelled_model()
    compiled = copy.deepcopy(model)
    accelerate(compiled, backend="aot_eager")
    assert compiled.fast is not None
    streams = example(processor, "one apple is the answer")
    length = streams.text_BL.shape[1]
    wanted_LH = model._speak(model._read(streams, None), streams)[0]

    def part(start: int, end: int) -> Streams:
        cut = {k: v[:, start:end] if isinstance(v, torch.Tensor) else v for k, v in streams.__dict__.items()}
        return Streams(**cut)

    for each in (model, compiled):
        _, speech_BH, state = each.read(part(0, 5), each.init_state(1))
        for position in range(5, length):
            torch.testing.assert_close(speech_BH[0], wanted_LH[position - 1], rtol=0, atol=1e-5)
            _, speech_BH, state = each.read(part(position, position + 1), state)


def test_a_saved_model_speaks_alike(tmp_path: Path) -> None:
    model, processor = spelled_model()
    save_model(model, processor, tmp_path)
    first, again = (FlowOmni(*each).say("apple is one") for each in ((model, processor), load_model(tmp_path)))
    assert np.array_equal(first.wav_S, again.wav_S)


def test_a_model_without_letters_can_learn_to_read_them() -> None:
    """The weights that it has stay, and so does what it says, until the letters are trained."""
    model, processor = tiny_model()
    changed = with_sections(model, {"output_blocks": {"num_letters": 6}}).eval()
    spell(changed, processor.text_tokenizer)
    streams = example(processor, "one apple")
    assert torch.equal(conditions(changed, streams), conditions(model, streams))
    assert changed.output_blocks is not None and changed.output_blocks.letters is not None
    assert changed.output_blocks.letters.bytes_VK.any()
    with pytest.raises(ValueError, match=r"options.output_blocks .* ask for other weights"):
        with_sections(model, {"output_blocks": {"num_layers": 2}})
    with pytest.raises(ValueError, match=r"other weights than the model's: output_blocks.letters.bytes_VK"):
        with_sections(changed, {"output_blocks": {"num_letters": 8}})


def test_letters_are_not_left_behind_by_adapters() -> None:
    with pytest.raises(ValueError, match=r"options.output_blocks .* set options.lora.save to 'merged'"):
        SpeechOptions("data", model="model", output_blocks={"num_letters": 6}, lora=LoraOptions(save="adapters"))


@pytest.mark.parametrize("values", [{"num_letters": -1}, {"num_layers": 0, "num_letters": 4}])
def test_letters_that_nothing_reads_are_refused(values: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="num_letters"):
        tiny_model(output_blocks=values)
